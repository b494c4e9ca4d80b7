"""Students, and what they learn from their teacher: losses by hand, padding, controls, resuming, refusals."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.compress.masks import kept_masks
from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.train import TrainSpec, batches, checkpoint, distillation, fit, students, trainer
from lmcompress.train.distillation import DistillationLoss, distil, divergence
from lmcompress.train.recovery import Recovery
from tests.tiny_models import FAMILIES, VOCAB, inputs, reloaded, tiny

THREE = {"bert": "classification", "gpt2": "lm", "t5": "lm"}
STILL = {  # no dropout, so that what is trained can be compared with what is evaluated
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def teacher_of(family, **changes):
    return tiny(family, THREE.get(family, "lm"), **STILL.get(family, {}), **changes)


def features(family, count=24, *, seed=0, longest=10):
    """Random ids; a class for BERT, the ids themselves for GPT-2, some other text for T5."""
    draw = torch.Generator().manual_seed(seed)

    def text():
        length = int(torch.randint(4, longest, (1,), generator=draw))
        return torch.randint(3, VOCAB, (length,), generator=draw).tolist()

    rows = []
    for i in range(count):
        ids = text()
        rows.append({"input_ids": ids, "labels": {"bert": i % 2, "t5": text()}.get(family, ids)})
    return rows


def spec(family, **changes):
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.0}
    return TrainSpec(**({"features": features(family)} | settings | changes))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def first_batch(model, train):
    stream = batches.batch_stream(train.features, train.batch_size, pad_id=0, seed=train.seed)
    return next(stream)


def test_positions_are_spread_evenly_with_both_ends():
    assert students.spread(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    assert students.spread(24, 3) == [0, 12, 23]
    assert students.spread(5, 1) == [0] and students.spread(5, 5) == [0, 1, 2, 3, 4]
    for depth in range(1, 30):
        assert all(len(set(students.spread(depth, count))) == count for count in range(1, depth + 1))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_copied_students_hold_the_named_blocks_of_the_teacher(family):
    depth = {"t5": {"num_layers": 4}, "gpt2": {"n_layer": 4}, "bart": {"encoder_layers": 4}}
    teacher = tiny(family, **depth.get(family, {"num_hidden_layers": 4}))
    stack = next(iter(anatomy(teacher).stacks))
    student = students.copied_blocks(teacher, {stack: [1, 3]})
    theirs, ours = anatomy(teacher).stacks, anatomy(student).stacks
    depths = {name: len(blocks) for name, blocks in theirs.items()}
    assert {name: len(blocks) for name, blocks in ours.items()} == depths | {stack: 2}
    for mine, position in zip(ours[stack], (1, 3)):
        given = theirs[stack][position].module.state_dict()
        assert all(torch.equal(mine.module.state_dict()[name], tensor) for name, tensor in given.items())
    assert students.depths(students.copied_blocks(teacher, 0.5))[stack] == 2
    assert students.depths(teacher)[stack] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_random_students_have_the_copied_ones_shapes_and_weights_of_their_own(family):
    teacher, state = tiny(family), torch.get_rng_state()
    copied, fresh = students.copied_blocks(teacher, 1), students.same_shape_random(teacher, 1, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (copied, fresh)]
    assert shapes[0] == shapes[1] and set(students.depths(fresh).values()) == {1}
    again, other = (students.same_shape_random(teacher, 1, seed=seed) for seed in (1, 2))
    assert same(weights(fresh), weights(again)) and not same(weights(fresh), weights(other))
    assert not same(weights(copied), weights(fresh)) and not fresh.training


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_students_have_the_widths_asked_for_and_run(family):
    teacher = tiny(family)
    student = students.narrower(teacher, hidden=0.5, ffn=0.25, heads=0.5, blocks=1, seed=3)
    was, found = anatomy(teacher), anatomy(student)
    block = was.blocks[0]
    assert found.hidden_size == 16 and set(students.depths(student).values()) == {1}
    for one in found.blocks:
        assert one.attention.heads == block.attention.heads // 2
        assert one.attention.kv_heads == block.attention.kv_heads // 2
        assert one.attention.head_dim == block.attention.head_dim
        assert one.ffn.width == block.ffn.width // 4
    with torch.no_grad():
        assert student(**inputs(student)).logits.shape[-1] == VOCAB


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: students.copied_blocks(m, 0), "from 1 to 2"),
        (lambda m: students.copied_blocks(m, 3), "from 1 to 2"),
        (lambda m: students.copied_blocks(m, 1.5), "up to 1.0"),
        (lambda m: students.copied_blocks(m, True), "whole number"),
        (lambda m: students.copied_blocks(m, {"decoder": [0]}), "this model has encoder"),
        (lambda m: students.copied_blocks(m, {"encoder": [2]}), "0 to 1"),
        (lambda m: students.copied_blocks(m, {"encoder": []}), "one has to stay"),
        (lambda m: students.narrower(m, hidden=0.0), "hidden=0.0"),
        (lambda m: students.narrower(m, ffn=2), "up to 1.0"),
        (lambda m: compress.get("student")(m, student="wide"), "one of 'copied'"),
        (lambda m: compress.get("student")(m, student="random"), "copied and random take blocks"),
        (lambda m: compress.get("student")(m, student="narrow"), "copied and random take blocks"),
        (lambda m: compress.get("student")(m, blocks=1, width=0.5), "copied and random take blocks"),
        (lambda m: distil_with(m, temperature=0.0), "temperature"),
        (lambda m: distil_with(m, soft_weight=-1.0), "at least 0"),
        (lambda m: distil_with(m, matches="logits"), "hidden.attention"),
        (lambda m: distil_with(m, temperature_schedule="linear"), "constant, flsw"),
        (lambda m: distil_with(m, temperature_schedule="flsw", temperature=2.0), "start above 2"),
        (lambda m: distil_with(m, soft_weight=0.0), "nothing to learn"),
        (lambda m: distil_with(m, soft_weight=0.0, matches="hidden", match_weight=0.0), "nothing to learn"),
        (lambda m: distil(m, m, spec("bert", micro_batches=2)), "micro_batches"),
        (lambda m: distil(m, m, spec("bert", label_smoothing=0.1)), "label_smoothing"),
        (lambda m: distil(tiny("bert", "classification", num_labels=3), m, spec("bert")), "same of each"),
        (lambda m: distil(tiny("gpt2"), tiny("gpt2", vocab_size=90), spec("gpt2")), "the same of each"),
        (lambda m: distil_with(m, students.narrower(m, heads=0.5), matches="hidden+attention"), "hidden"),
    ],
)
def test_students_losses_and_pairs_that_cannot_be_are_refused(make, message):
    with pytest.raises(BadSetting, match=message):
        make(tiny("bert", "classification"))


def distil_with(teacher, student=None, **settings):
    distil(teacher, student or students.copied_blocks(teacher, 1), spec("bert"), **settings)


def hand_soft(theirs, ours, temperature):
    """−Σ p log q over classes, mean over rows; no factor T²."""
    p, log_q = F.softmax(theirs / temperature, -1), F.log_softmax(ours / temperature, -1)
    return float(-(p * log_q).sum(-1).mean())


def rows_by_hand(family, batch, logits):
    """The logits that predict something, one row at a time."""
    if family == "bert":
        return logits
    rows = []
    for i, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            if label != -100 and (family == "t5" or place):
                rows.append(logits[i, place if family == "t5" else place - 1])
    return torch.stack(rows)


@pytest.mark.parametrize("family", THREE)
def test_the_losses_are_those_of_the_formulas(family):
    teacher = teacher_of(family)
    student = students.same_shape_random(teacher, 1, seed=1)
    train = spec(family, steps=1, batch_size=12)
    batch = first_batch(teacher, train)
    assert "attention_mask" in batch
    with torch.no_grad():
        theirs, ours = (model(**batch, output_hidden_states=True) for model in (teacher, student))
    settings = {"temperature": 3.0, "soft_weight": 0.7, "hard_weight": 0.2, "match_weight": 0.1}
    step = distil(teacher, student, train, matches="hidden", **settings).steps[0]
    logits = [rows_by_hand(family, batch, one.logits) for one in (theirs, ours)]
    assert step["soft"] == pytest.approx(hand_soft(*logits, 3.0), rel=1e-5)
    assert step["hard"] == pytest.approx(float(ours.loss), rel=1e-5)
    matched = 0.0
    for stack in students.depths(student):
        name = f"{stack}_hidden_states" if family == "t5" else "hidden_states"
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        if family == "t5" and stack == "decoder":
            mask = batch["labels"] != -100
        for place, position in ((0, 0), (1, 2)):  # the one block's end meets the second block's
            difference = (theirs[name][position] - ours[name][place])[mask]
            matched += float(difference.square().mean())
    assert step["matched"] == pytest.approx(matched, rel=1e-5)
    total = 0.7 * step["soft"] + 0.2 * step["hard"] + 0.1 * step["matched"]
    assert step["loss"] == pytest.approx(total, rel=1e-5)


def test_attentions_are_matched_over_pairs_of_tokens_and_the_models_keep_their_attention():
    teacher = teacher_of("bert", attn_implementation="sdpa")
    student = students.same_shape_random(teacher, 1, seed=1)
    train = spec("bert", steps=1, batch_size=12)
    batch = first_batch(teacher, train)
    assert "attention_mask" in batch
    seen = []
    for model in (teacher, student):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            seen.append(model(**batch, output_attentions=True, output_hidden_states=True))
        model.set_attn_implementation("sdpa")
    step = distil(teacher, student, train, matches="hidden+attention").steps[0]
    expected = 0.0
    mask = batch["attention_mask"].bool()
    for place, position in ((0, 0), (1, 2)):
        expected += float(
            (seen[0].hidden_states[position] - seen[1].hidden_states[place])[mask].square().mean()
        )
    squares, pairs = 0.0, 0
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        difference = (seen[0].attentions[1] - seen[1].attentions[0])[row, :, :length, :length]
        squares, pairs = squares + float(difference.square().sum()), pairs + difference.numel()
    assert step["matched"] == pytest.approx(expected + squares / pairs, rel=1e-5)
    assert {model.config._attn_implementation for model in (teacher, student)} == {"sdpa"}


def test_a_regressions_soft_loss_is_the_squared_difference():
    teacher = teacher_of("bert", num_labels=1)
    student = students.same_shape_random(teacher, 1, seed=1)
    rows = [row | {"labels": float(i)} for i, row in enumerate(features("bert"))]
    train = spec("bert", steps=1, features=rows)
    batch = first_batch(teacher, train)
    with torch.no_grad():
        expected = F.mse_loss(student(**batch).logits, teacher(**batch).logits)
        gap = divergence(teacher, student, rows[:1])
        one = {"input_ids": torch.tensor([rows[0]["input_ids"]])}
        difference = teacher(**one).logits - student(**one).logits
    assert gap == pytest.approx(float(difference.square()), rel=1e-4)
    assert distil(teacher, student, train).steps[0]["soft"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("matches", ["none", "hidden+attention"])
def test_padding_does_not_change_the_losses(family, matches, monkeypatch):
    def losses():
        teacher = teacher_of(family)
        student = students.same_shape_random(teacher, 1, seed=1)
        return distil(teacher, student, spec(family, steps=2), hard_weight=0.5, matches=matches).steps

    plain, collate = losses(), batches.collate

    def longer(rows, *, pad_id):
        """As ever, and three columns of padding more."""
        batch = collate(rows, pad_id=pad_id)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        fill = {"input_ids": 7, "labels": -100}
        batch["attention_mask"] = mask
        return {
            name: F.pad(value, (0, 3), value=fill.get(name, 0)) if value.ndim == 2 else value
            for name, value in batch.items()
        }

    monkeypatch.setattr(batches, "collate", longer)
    for before, after in zip(plain, losses()):
        for name in ("soft", "hard", "matched", "loss"):
            if name in before:
                assert after[name] == pytest.approx(before[name], rel=2e-4), name


@pytest.mark.parametrize("family", THREE)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(family):
    teacher = teacher_of(family)
    student = students.copied_blocks(teacher, 2)
    before, gradients = weights(student), []
    for parameter in student.parameters():
        parameter.register_hook(lambda gradient: gradients.append(float(gradient.abs().max())))
    rows = features(family)
    assert divergence(teacher, student, rows) == pytest.approx(0, abs=1e-9)
    distil(teacher, student, spec(family, learning_rate=1e-5, evaluate=rows))
    # Then AdamW makes steps of rounding noise, as large as the rate.
    assert 0 <= max(gradients[: len(before)]) < 1e-7
    assert divergence(teacher, student, rows) < 1e-4
    assert all((before[name] - p).abs().max() < 1e-4 for name, p in student.named_parameters())


@pytest.mark.parametrize("family", THREE)
def test_soft_labels_bring_a_student_nearer_to_its_teacher_than_hard_labels_or_nothing(family):
    teacher = teacher_of(family)
    untrained = students.copied_blocks(teacher, 1)
    rows = features(family, 32)
    train = spec(family, features=rows, steps=40, batch_size=8, learning_rate=5e-3)
    gap = {"untrained": divergence(teacher, untrained, rows)}
    for name, weight in (("soft", (1.0, 0.0)), ("hard", (0.0, 1.0))):
        student = students.copied_blocks(teacher, 1)
        distil(teacher, student, train, soft_weight=weight[0], hard_weight=weight[1], temperature=2.0)
        gap[name] = divergence(teacher, student, rows)
    assert gap["soft"] < 0.5 * gap["untrained"] and gap["soft"] < 0.5 * gap["hard"], gap


def test_a_multi_label_head_is_learnt_class_by_class():
    head = {"num_labels": 3, "problem_type": "multi_label_classification"}
    teacher = teacher_of("bert", **head)
    rows = [row | {"labels": [float(i % 2), 1.0, 0.0]} for i, row in enumerate(features("bert", 32))]
    student = students.copied_blocks(teacher, 1)
    first = {"input_ids": torch.tensor([rows[0]["input_ids"]])}
    with torch.no_grad():
        p, q = (model(**first).logits.double().sigmoid() for model in (teacher, student))
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert divergence(teacher, student, rows[:1]) == pytest.approx(kl.mean().item(), rel=1e-4)
    gap = divergence(teacher, student, rows)
    settings = {"steps": 40, "batch_size": 8, "learning_rate": 5e-3}
    distil(teacher, student, spec("bert", features=rows, **settings), hard_weight=0.0)
    assert divergence(teacher, student, rows) < 0.5 * gap


def test_hard_labels_alone_are_plain_fine_tuning_and_ask_no_teacher():
    teacher = teacher_of("gpt2")
    theirs, ours = students.copied_blocks(teacher, 1), students.copied_blocks(teacher, 1)
    train = spec("gpt2", evaluate=features("gpt2", 6, seed=1), evaluate_every=2)
    expected = fit(theirs, train)
    calls = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    history = distil(teacher, ours, replace(train, evaluate=None), soft_weight=0.0, hard_weight=1.0)
    handle.remove()
    assert not calls and "soft" not in history.steps[0]
    for step, other in zip(history.steps, expected.steps, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert (step["lr"], step["tokens"]) == (other["lr"], other["tokens"])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(theirs.parameters(), ours.parameters()))


def test_validation_holds_the_loss_and_the_divergence():
    teacher = teacher_of("gpt2")
    student, rows = students.copied_blocks(teacher, 1), features("gpt2", 6, seed=1)
    history = distil(teacher, student, spec("gpt2", steps=4, evaluate=rows, evaluate_every=2))
    assert [one["step"] for one in history.validation] == [2, 4]
    assert history.validation[-1]["divergence"] == pytest.approx(divergence(teacher, student, rows), rel=1e-5)
    assert not student.training and not teacher.training


@pytest.mark.parametrize("matches", ["none", "hidden"])
def test_a_seed_repeats_a_run_and_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, monkeypatch, matches):
    teacher = tiny("bert", "classification")  # with dropout

    def run(**changes):
        student = students.narrower(teacher, hidden=0.5, heads=0.5, seed=2)
        train = spec("bert", **({"steps": 8, "checkpoint_every": 3} | changes))
        return student, distil(teacher, student, train, matches=matches)

    straight, expected = run()
    assert same(weights(straight), weights(run()[0]))
    assert not same(weights(straight), weights(run(seed=1)[0]))
    real, seen = trainer._gradients, []

    def stop(*arguments):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "_gradients", stop)
        run(checkpoint=tmp_path)
    resumed, history = run(checkpoint=tmp_path)
    assert [one["loss"] for one in history.steps] == [one["loss"] for one in expected.steps]
    assert [one["lr"] for one in history.steps] == [one["lr"] for one in expected.steps]
    assert same(weights(straight), weights(resumed))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    finished, _ = run(checkpoint=tmp_path)  # a finished run is read, not trained
    assert same(weights(finished), weights(straight))
    with pytest.raises(BadSetting, match="other settings"):
        distil(
            teacher,
            students.narrower(teacher, hidden=0.5, heads=0.5, seed=2),
            spec("bert", steps=8, checkpoint=tmp_path),
            matches=matches,
            temperature=5.0,
        )
    assert (tmp_path / checkpoint.STATE_FILE).exists()


def test_projections_stand_where_widths_differ_and_are_trained():
    teacher, settings = teacher_of("t5"), distillation.Losses(4.0, 1.0, 0.0, "hidden", 1.0)
    narrow = students.narrower(teacher, hidden=0.5, heads=0.5)
    objective = DistillationLoss(teacher, narrow, spec("t5"), settings)
    drawn, real = {}, objective.begin

    def begin(model):
        parameters = real(model)
        drawn.update({name: parameter.detach().clone() for name, parameter in parameters.items()})
        return parameters

    objective.begin = begin
    fit(narrow, objective.spec, objective=objective)
    weights = [projection.weight for projection in objective.projections]
    assert [tuple(weight.shape) for weight in weights] == [(32, 16)] * 6  # per stack: embeddings, 2 blocks
    assert not any(torch.equal(weights[i], drawn[f"projection.{i}.weight"]) for i in range(6))
    same_width = DistillationLoss(teacher, students.copied_blocks(teacher, 1), spec("t5"), settings)
    assert same_width.begin(teacher) == {} and same_width.projections == [None] * 4


def test_a_teachers_classes_are_computed_once_where_examples_come_again():
    teacher, rows, calls, losses = teacher_of("bert"), features("bert", 12), [], []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    # Steps of 4 examples: less than twice the 12, twice, and twice without the cache.
    for steps, cache, expected in ((5, True, 5), (6, True, 3), (6, False, 6)):
        calls.clear()
        student = students.same_shape_random(teacher, 1, seed=1)
        train = spec("bert", features=rows, steps=steps, min_learning_rate=1e-3)
        losses.append([step["soft"] for step in distil(teacher, student, train, cache=cache).steps])
        assert len(calls) == expected
    handle.remove()
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1][:5], rel=1e-5)


def test_the_focal_schedule_lowers_the_temperature_where_the_two_disagree(monkeypatch):
    """tau = T + (mean(w) - w), w = 1 - cos of the logits: the loss of the first step, by hand."""
    teacher, seen = teacher_of("bert"), []
    student = students.same_shape_random(teacher, 1, seed=1).eval()
    monkeypatch.setattr(student, "train", lambda mode=True: student)  # no dropout
    real = distillation.target_logits

    def look(model, batch, logits):
        seen.append(real(model, batch, logits))
        return seen[-1]

    monkeypatch.setattr(distillation, "target_logits", look)
    train = spec("bert", steps=1)
    (step,) = distil(teacher, student, train, temperature=3.0, temperature_schedule="flsw").steps
    theirs, ours = seen
    w = 1 - torch.cosine_similarity(ours, theirs, dim=-1)
    tau = (3.0 + w.mean() - w)[:, None]
    assert tau.std() > 0
    by_hand = -((theirs / tau).softmax(-1) * (ours / tau).log_softmax(-1)).sum(-1).mean()
    assert step["soft"] == pytest.approx(by_hand.item(), rel=1e-3)


def test_masked_weights_stay_zero_and_the_others_learn():
    teacher = teacher_of("gpt2")
    student, _ = compress.get("magnitude-layer")(teacher, sparsity=0.5)
    masks, before = kept_masks(student), weights(student)
    rows = features("gpt2")
    gap = divergence(teacher, student, rows)
    distil(teacher, student, spec("gpt2", steps=20, learning_rate=3e-3, weight_decay=0.1), masks=masks)
    after = weights(student)
    assert all(not after[name][~mask].any() for name, mask in masks.items())
    assert all((after[name] != before[name])[mask].any() for name, mask in masks.items())
    assert divergence(teacher, student, rows) < 0.7 * gap
    assert not any(p._backward_hooks for p in student.parameters())


def test_data_and_weights_that_teach_nothing_are_refused():
    teacher = tiny("bert", "classification")
    student = students.copied_blocks(teacher, 1)
    nothing = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 4
    unlabelled = spec("gpt2", features=nothing)
    pytest.raises(BadData, distil, teacher, student, spec("bert", features=[])).match("no training features")
    pytest.raises(BadData, distil, tiny("gpt2"), tiny("gpt2"), unlabelled).match("nothing to predict")
    pytest.raises(BadData, divergence, tiny("gpt2"), tiny("gpt2"), nothing).match("nothing to predict")
    body = teacher.base_model
    pytest.raises(BadSetting, distil, body, body, spec("bert")).match("no head")
    recovery = Recovery(steps=1).spec
    pytest.raises(BadSetting, recovery, None, None, body, seed=0, checkpoint=None).match(
        "no loss to train on"
    )
    with torch.no_grad():
        student.classifier.weight.fill_(float("inf"))
    pytest.raises(BadWeights, distil, teacher, student, spec("bert")).match("learning_rate")


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("student", ["copied", "random", "narrow"])
def test_the_technique_gives_a_student_that_saves_and_reloads(family, student, tmp_path):
    teacher = teacher_of(family)
    width = {"width": 0.5} if student == "narrow" else {}
    before = weights(teacher)
    asked = {"student": student, "blocks": 1, "hard_weight": 0.5} | width
    made, report = compress.get("distil")(teacher, Context(train=spec(family)), **asked)
    assert same(before, weights(teacher))
    assert report.achieved["parameters_share"] == count_parameters(made) / count_parameters(teacher)
    assert (report.achieved["parameters_share"] < 1) == (family != "albert" or student == "narrow")
    assert set(report.achieved["blocks"].values()) == {1} and report.layers == len(report.achieved["blocks"])
    losses = report.achieved["final_losses"]
    assert losses["loss"] == pytest.approx(losses["soft"] + 0.5 * losses["hard"], rel=1e-5)
    reloaded(made, tmp_path / "model")


def test_the_untrained_control_is_the_student_distil_begins_with():
    teacher = tiny("bert", "classification")
    for settings in ({"blocks": 1}, {"student": "random", "blocks": 1}, {"student": "narrow", "width": 0.5}):
        made, report = compress.get("student")(teacher, Context(seed=4), **settings)
        name = settings.get("student", "copied")
        by_hand = {
            "copied": lambda: students.copied_blocks(teacher, 1),
            "random": lambda: students.same_shape_random(teacher, 1, seed=4),
            "narrow": lambda: students.narrower(teacher, hidden=0.5, ffn=0.5, heads=0.5, seed=4),
        }[name]()
        assert same(weights(made), weights(by_hand))
        assert report.achieved.get("kept") == ({"encoder": [0]} if name == "copied" else None)
