"""Shapes, masks and multipliers, adapters' scores, and the four techniques that reach a target shape."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, inputs, reloaded, tiny

from lmcompress import compress
from lmcompress.compress import Context, sheared, target_shape
from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.models.surgery import keep_ffn, keep_heads, keep_hidden
from lmcompress.train import TrainSpec, trainer
from lmcompress.train.lora import Lora, adapted

TARGET = {"layers": 1, "heads": 2, "hidden": 20, "ffn": 30}
# table, one block (q and o 16, k and v 8 wide, three maps of the feed-forward, two norms), last norm; a head
# of its own
PARAMETERS = 2 * VOCAB * 20 + (2 * 16 * 20 + 2 * 8 * 20 + 3 * 30 * 20 + 2 * 20) + 20
TECHNIQUES = ["sheared", "lora-prune", "magnitude-shape", "scratch-shape"]


def texts(count=80, length=12, seed=0):
    rows = np.random.default_rng(seed).integers(3, VOCAB, (count, length)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def spec(**changes):
    settings = {"steps": 20, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2}
    return TrainSpec(**({"features": texts(), "evaluate": texts(5, seed=1)} | settings | changes))


def random_masks(found, *, hard, seed=0):
    draw = torch.Generator().manual_seed(seed)
    kept = {"layers": 1, "heads": 1, "hidden": 20, "ffn": 30}
    scores = {
        kind: torch.rand(one.shape, generator=draw) for kind, one in target_shape.open_masks(found).items()
    }
    chosen = target_shape.choose(scores, kept)
    return {kind: chosen[kind] * (1.0 if hard else 0.2 + 0.8 * one) for kind, one in scores.items()}


def test_hard_concrete_values_by_hand():
    half = torch.tensor(0.5)
    assert sheared.drawn(torch.tensor(0.0), half).item() == pytest.approx(0.5)
    s = 1 / (1 + math.exp(-1.5))  # σ((0 + 1) / β)
    assert sheared.drawn(torch.tensor(1.0), half).item() == pytest.approx(1.2 * s - 0.1)
    assert sheared.drawn(torch.tensor(-3.0), half) == 0 and sheared.drawn(torch.tensor(3.0), half) == 1
    assert sheared.settled(torch.tensor(1.0)).item() == pytest.approx(1.2 / (1 + math.exp(-1)) - 0.1)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_expected_l0_is_the_share_of_samples_above_zero(log_alpha):
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    seen = (sheared.drawn(torch.tensor(log_alpha), uniform) > 0).double().mean().item()
    assert sheared.open_chance(torch.tensor(log_alpha)).item() == pytest.approx(seen, abs=0.004)


def constraint_of(found, steps=60):
    counts = {"layers": 1, "heads": 1, "hidden": 20, "ffn": 30}
    return sheared.Constraint(target_shape.open_masks(found), counts, steps=steps, seed=0)


def test_the_penalty_by_hand():
    found = constraint_of(anatomy(tiny("llama")), steps=20)
    for kind, one in found.log_alpha.items():
        one.data.fill_(0.0)
        found.multipliers[kind].data.fill_(0.0)
    found.multipliers["hidden"].data[:] = torch.tensor([2.0, 3.0])
    found.multipliers["heads"].data[:, 1] = torch.tensor([5.0, 0.0])  # linear and square, of the second block
    share = 11 ** (2 / 3) / (1 + 11 ** (2 / 3))
    gap, halfway = share - 20 / 32, share - (1 + 20 / 32) / 2  # the target is reached at step 10 of 20
    other, half = share - 0.5, share - 0.75
    assert found.penalty(10).item() == pytest.approx(2 * gap + 3 * gap**2 + 5 * other, rel=1e-5)
    assert found.penalty(5).item() == pytest.approx(2 * halfway + 3 * halfway**2 + 5 * half, rel=1e-5)
    assert found.penalty(15).item() == pytest.approx(found.penalty(10).item())


@pytest.mark.parametrize("steps", [60, 300])
def test_the_constraint_reaches_the_target_against_a_loss_that_wants_everything(steps):
    found = constraint_of(anatomy(tiny("llama")), steps=steps)
    for step in range(1, steps + 1):
        for leaf in found.sample().values():
            leaf.grad = torch.full_like(leaf, -0.2 / leaf.shape[-1])
        found.update(step)
    for kind, share in found.shares().items():
        assert (share - found.goal[kind]).abs().max() < 0.12, kind


def test_multipliers_ascend_and_masks_take_the_gradient_of_the_loss():
    found = constraint_of(anatomy(tiny("llama")))
    before = found.log_alpha["hidden"].detach().clone()
    leaf = found.sample()["hidden"]
    leaf.grad = torch.zeros_like(leaf)
    leaf.grad[3], leaf.grad[4] = 1.0, -1.0  # the loss wants dimension 3 closed and 4 open
    found.masks["hidden"] = sheared.drawn(found.log_alpha["hidden"], torch.full((32,), 0.2))  # none saturated
    found.update(60)  # the target has come down
    moved = found.log_alpha["hidden"].detach() - before
    assert moved[3] < 0 < moved[4]
    assert (found.multipliers["ffn"][0] > 0).all(), "more channels are open than shall be"


@pytest.mark.parametrize(
    "family, changes",
    [("llama", {"tie_word_embeddings": True})]
    + [(family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "headwise")],
)
@pytest.mark.parametrize("hard", [True, False])
def test_the_cut_model_gives_the_masked_models_logits(family, changes, hard):
    model = tiny(family, **changes)
    found = anatomy(model)
    masks = target_shape.Masks(found)
    masks.current = random_masks(found, hard=hard)
    ids = inputs(model)["input_ids"]
    before = model(ids).logits
    with torch.no_grad():
        with masks.on(model):
            expected = model(ids).logits
        assert torch.equal(model(ids).logits, before), "the hooks are gone"
        if not hard:
            masks.fold(model)
        small = target_shape.cut(model, {kind: one > 0 for kind, one in masks.current.items()})
        assert torch.allclose(small(ids).logits, expected, atol=2e-4)
    assert not torch.allclose(expected, before, atol=0.1)
    assert target_shape.TargetShape.of(anatomy(small)) == target_shape.TargetShape(**TARGET)


def test_unit_scores_are_what_cutting_the_unit_takes_away():
    """With scores for weights, the sum over the layers falls by the score of the unit that is cut off."""
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter))
    found = anatomy(model)
    maps = [one for block in found.blocks for one in block.linears]

    def total(one, block=None):
        blocks = anatomy(one).blocks
        return sum(m.weight2d().sum().item() for b in blocks for m in b.linears if block in (None, b.index))

    scores = target_shape.unit_scores(
        found, {m.name: target_shape.both_sums(m.module.weight.detach()) for m in maps}
    )
    name = found.blocks[1].name
    without = {"heads": keep_heads(model, {name: [2, 3]}), "ffn": keep_ffn(model, {name: [*range(1, 48)]})}
    without["hidden"] = keep_hidden(model, [*range(5), *range(6, 32)])
    assert total(model) - total(without["heads"]) == pytest.approx(scores["heads"][1, 0].item(), rel=1e-4)
    assert total(model) - total(without["ffn"]) == pytest.approx(scores["ffn"][1, 0].item(), rel=1e-3)
    assert total(model) - total(without["hidden"]) == pytest.approx(scores["hidden"][5].item(), rel=1e-3)
    assert scores["layers"].tolist() == pytest.approx([total(model, 0), total(model, 1)])


def test_choice_by_hand():
    scores = {"layers": torch.tensor([1.0, 3.0, 2.0])}
    scores["ffn"] = torch.tensor([[4.0, 1.0, 2.0], [0.0, 5.0, 6.0]])
    chosen = target_shape.choose(scores, {"layers": 2, "ffn": 1})
    assert chosen["layers"].tolist() == [False, True, True]
    assert chosen["ffn"].tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert", "t5", "gemma2"])
def test_other_families_are_refused(family):
    technique = compress.get("sheared" if family == "gemma2" else "magnitude-shape")
    message = "two in a block" if family == "gemma2" else "heads-ffn"
    train = Context(train=spec(steps=4))
    pytest.raises(UnknownFamily, technique, tiny(family), train, layers=1).match(message)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"heads": 1}, "groups"),
        ({"layers": 5}, "layers"),
        ({"share": 1.5}, "share"),
        ({"adapters": "dora"}, "qlora"),
    ],
)
def test_what_cannot_be_is_refused(asked, message):
    train = Context(train=spec(steps=4))
    pytest.raises(BadSetting, compress.get("sheared"), tiny("llama"), train, **asked).match(message)


@pytest.mark.parametrize("name", ["sheared", "lora-prune"])
def test_pruning_needs_steps_and_text(name):
    with pytest.raises(BadSetting, match="no steps to learn in"):
        compress.get(name)(tiny("llama"), Context(train=spec(steps=4)), share=0.0)
    few = spec(steps=10, features=texts(6))  # less text than steps ask for: both stages repeat theirs
    _, report = compress.get(name)(tiny("llama"), Context(train=few), share=0.5, **TARGET)
    assert report.achieved["tokens"] == 10 * 3 * 12, "a step has the three examples there are"


def adapted_gradients(model, lora, batch, watch):
    """Backpropagate through adapters whose B is not zero; return the factors by layer, gradients and all."""
    found, factors = anatomy(model), {}
    with adapted(model, lora), sheared.scored(model, found, watch):
        for number, one in enumerate(m for block in found.blocks for m in block.linears):
            layer = model.get_submodule(one.name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            b.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
            base = layer.get_base_layer()
            weight = base.weight.detach().clone() if base.weight is not None else base.dequantized()
            factors[one.name] = (a, b, weight)
        model(**batch).loss.backward()
        grads = {
            name: [t.clone() for t in (a.data, b.data, a.grad, b.grad, w)]
            for name, (a, b, w) in factors.items()
        }
    return found, grads


@pytest.mark.parametrize("bits", [None, 4])
def test_adapters_scores_are_the_formulas(bits):
    model, seen = tiny("llama"), []
    ids = inputs(model)["input_ids"]
    lora = Lora(rank=3, alpha=6.0, bits=bits)
    found, factors = adapted_gradients(model, lora, {"input_ids": ids, "labels": ids}, seen.append)
    scores = {}
    for name, (a, b, da, db, weight) in factors.items():
        scores[name] = np.zeros(weight.shape)
        for i in range(weight.shape[0]):  # one row at a time, as the paper writes it
            gradient = db[i] @ a + b[i] @ da - db[i] @ da
            scores[name][i] = ((gradient * (weight[i] + 2.0 * (b[i] @ a))) ** 2).numpy()
    (units,) = seen
    block = found.blocks[1]
    by = {one.role: scores[one.name] for one in block.linears}
    second = by["q"][16:].sum() + by["k"][8:].sum() + by["v"][8:].sum() + by["o"][:, 16:].sum()
    assert units["heads"][1, 1].item() == pytest.approx(second, rel=1e-4)
    channel = by["gate"][7].sum() + by["in"][7].sum() + by["out"][:, 7].sum()
    assert units["ffn"][1, 7].item() == pytest.approx(channel, rel=1e-4)
    assert units["layers"][1].item() == pytest.approx(sum(one.sum() for one in by.values()), rel=1e-4)
    linears = [one for each in found.blocks for one in each.linears]
    hidden = sum((scores[m.name] if m.role in ("o", "out") else scores[m.name].T)[9].sum() for m in linears)
    assert units["hidden"][9].item() == pytest.approx(hidden, rel=1e-4)


def test_what_is_gone_stays_gone_and_scores_are_averaged(monkeypatch):
    """Scores that change from step to step: the average decides, and no unit comes back."""
    steps, masks = [], []
    real = target_shape.choose

    def choose(scores, kept):
        steps.append({kind: one.clone() for kind, one in scores.items()})
        masks.append(real(scores, kept))
        return masks[-1]

    monkeypatch.setattr(sheared, "choose", choose)
    compress.get("lora-prune")(tiny("llama"), Context(train=spec()), share=1.0, rank=2, **TARGET)
    counts = [int(one["hidden"].sum()) for one in masks]
    assert counts[0] == 32 and counts[-1] == 20 and counts == sorted(counts, reverse=True)
    for before, after in zip(masks, masks[1:]):
        assert all((after[kind] <= before[kind]).all() for kind in after)
    assert all((later["hidden"][~mask["hidden"]] == -1).all() for mask, later in zip(masks, steps[1:]))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_ends_at_the_target_trains_and_reloads(name, tmp_path):
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    made, report = compress.get(name)(model, Context(train=spec()), **TARGET)
    assert count_parameters(made) == PARAMETERS == report.achieved["parameters"]
    assert report.achieved["shape"] == TARGET
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    tokens, losses = zip(*report.achieved["curve"])
    pruned = 4 * 4 * 12 if name in ("sheared", "lora-prune") else 0
    assert tokens[0] == pruned == report.achieved["pruning_tokens"] and tokens[-1] == 20 * 4 * 12
    assert all(math.isfinite(loss) for loss in losses) and list(tokens) == sorted(tokens)
    reloaded(made, tmp_path / "m")


def test_techniques_see_the_same_text_each_window_once(monkeypatch):
    seen = {}
    real = trainer._gradients
    for name in TECHNIQUES:
        rows = seen.setdefault(name, [])

        def note(model, batch, *more, rows=rows):
            rows.extend(map(tuple, batch["input_ids"].tolist()))
            return real(model, batch, *more)

        monkeypatch.setattr(trainer, "_gradients", note)
        compress.get(name)(tiny("llama"), Context(train=spec()), **TARGET)
    everything = sorted(tuple(one["input_ids"]) for one in texts())
    assert all(sorted(rows) == everything for rows in seen.values())
    assert seen["magnitude-shape"] == seen["scratch-shape"]


@pytest.mark.parametrize("share, last", [(1.0, 1e-2), (0.1, 1e-3)])
def test_the_rate_is_held_or_falls_to_a_share(monkeypatch, share, last):
    kept, real = [], trainer.fit
    monkeypatch.setattr(sheared, "fit", lambda *a, **k: (kept.append(real(*a, **k)), kept[-1])[1])
    compress.get("magnitude-shape")(tiny("llama"), Context(train=spec()), min_rate=share, **TARGET)
    rates = [step["lr"] for step in kept[0].steps]
    assert rates[2] == pytest.approx(1e-2) and rates[-1] == pytest.approx(last, rel=0.1)


@pytest.mark.parametrize("adapters", ["lora", "qlora"])
def test_recovery_by_adapters_changes_the_maps_only_and_leaves_floats(adapters, monkeypatch):
    cuts = []
    monkeypatch.setattr(
        sheared, "cut", lambda *a: (cuts.append(target_shape.cut(*a)), copy.deepcopy(cuts[-1]))[1]
    )
    made, report = compress.get("magnitude-shape")(
        tiny("llama"), Context(train=spec(learning_rate=5e-3)), adapters=adapters, **TARGET
    )
    same = {
        name for name, p in made.named_parameters() if torch.equal(p, dict(cuts[0].named_parameters())[name])
    }
    moved = {name for name, _ in made.named_parameters()} - same
    maps = {f"{one.name}.weight" for block in anatomy(made).blocks for one in block.linears}
    assert moved == maps and count_parameters(made) == PARAMETERS
    assert all(p.dtype == torch.float32 for p in made.parameters())
    assert report.achieved["curve"][-1][1] < report.achieved["curve"][0][1]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_target_shape_in_multiples(name):
    shape = {"heads": 2, "hidden": 0.7, "ffn": 0.7, "multiple_of": 8}
    made, _ = compress.get(name)(tiny("llama"), Context(train=spec(steps=4)), **shape)
    found = target_shape.TargetShape.of(anatomy(made))
    dense = target_shape.TargetShape.of(anatomy(tiny("llama")))
    assert found.hidden == 8 * round(0.7 * (dense.hidden // 8))
    assert found.ffn == 8 * round(0.7 * (dense.ffn // 8)) and found.layers == dense.layers
    with pytest.raises(BadSetting, match="whole groups of 8"):
        compress.get(name)(tiny("llama"), Context(train=spec(steps=4)), **shape | {"hidden": 20})


def test_scores_over_integers_and_a_run_that_only_prunes():
    made, report = compress.get("lora-prune")(
        tiny("llama"), Context(train=spec(steps=6)), share=1.0, bits=4, **TARGET
    )
    assert count_parameters(made) == PARAMETERS and "curve" not in report.achieved
    assert report.achieved["tokens"] == report.achieved["pruning_tokens"] == 6 * 4 * 12


def test_no_unit_that_stays_is_dead_however_far_the_masks_overshot(monkeypatch):
    """Masks that all closed: their units would give nothing and get no gradient."""
    monkeypatch.setattr(sheared.Constraint, "update", lambda self, step: None)
    monkeypatch.setattr(sheared, "INITIAL_LOG_ALPHA", -9.0)
    made, _ = compress.get("sheared")(tiny("llama"), Context(train=spec(steps=2)), share=1.0, **TARGET)
    assert (made.model.embed_tokens.weight.abs().sum(0) > 0).all()
    assert all((one.module.weight.abs().sum(0) > 0).all() for one in anatomy(made).blocks[0].linears)


def test_seeds_decide():
    technique, train = compress.get("sheared"), spec(steps=6)
    runs = [technique(tiny("llama"), Context(train=train, seed=seed), **TARGET)[0] for seed in (0, 0, 1)]
    first, *others = (list(model.parameters()) for model in runs)
    assert [all(map(torch.equal, first, other)) for other in others] == [True, False]


def test_masks_are_learned_from_pieces_of_a_step_as_from_all_of_it():
    contexts = [Context(train=spec(steps=8, micro_batches=count)) for count in (1, 2)]
    reports = [compress.get("sheared")(tiny("llama"), context, **TARGET)[1] for context in contexts]
    whole, pieces = (report.achieved["open_shares"] for report in reports)
    assert whole == pytest.approx(pieces, abs=2e-3)
