"""Chains: what one step did the next one keeps, the result reloads, and what cannot follow says so."""

from dataclasses import replace

import pytest
import torch
import yaml

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.compress.masks import smallest
from lmcompress.compress.pipeline import StepCache, share_of_zeros
from lmcompress.compress.second_order import round_matrix
from lmcompress.errors import BadSetting, StudyError
from lmcompress.measure import bytes
from lmcompress.models import anatomy, storage
from lmcompress.models.families import integer_layers
from lmcompress.models.packed import dequantize, quantize
from lmcompress.study import apply, recipes
from lmcompress.study.study import DENSE, Recovery
from lmcompress.train.trainer import TrainSpec
from tests.test_sweep import house, subject_in  # noqa: F401 - a fixture
from tests.tiny_models import calibration_batches, inputs, kind, tiny

PRUNE = {"technique": "sparsegpt", "sparsity": 0.5}
DISTIL = {"recovery": {"steps": 3, "teacher": True}}
GPTQ = {"technique": "gptq", "bits": 4, "group_size": 16}
HEADS = {"technique": "heads-ffn", "heads": 0.5, "ffn": 0.5}
LOW = {"technique": "low-rank", "rank": 0.5}
QAT = {"technique": "qat", "bits": 4, "training": {"steps": 2}}
ROUND = {"technique": "rtn", "bits": 4, "embeddings": True}


def model_of(family):
    return tiny(family, "classification" if kind(family) == "encoder" else "lm")


def contexts_for(family):
    """The contexts of steps, on a few random sentences."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 100, (8,), generator=draw).tolist() for _ in range(8)]
    labels = [n % 2 if kind(family) == "encoder" else one for n, one in enumerate(ids)]
    features = [{"input_ids": one, "labels": label} for one, label in zip(ids, labels)]
    text = calibration_batches(kind(family))
    for batch in text if kind(family) == "encoder" else ():
        batch["labels"] = torch.arange(len(batch["input_ids"])) % 2

    def step_context(step, position, tokenizer) -> Context:
        return Context(text, TrainSpec(features, steps=3, batch_size=4, learning_rate=1e-2))

    return step_context


def chained(family, *steps):
    model = model_of(family)
    context = Context(step_context=contexts_for(family))
    made, report = compress.get("chain")(model, context, steps=recipes.read(steps))
    return model, made, report


@pytest.mark.parametrize(
    "family, steps",
    [
        ("bert", (PRUNE, DISTIL, GPTQ)),
        ("bert", (PRUNE, QAT)),
        ("gpt2", (HEADS, PRUNE, ROUND)),
        ("gpt2", (LOW, DISTIL, GPTQ)),
        ("t5", (HEADS, PRUNE, ROUND)),
        ("t5", (PRUNE, QAT)),
    ],
)
def test_a_chain_reloads_with_the_same_logits_and_keeps_its_zeros(tmp_path, family, steps):
    dense, made, report = chained(family, *steps)
    found = report.achieved["steps"]
    assert [one["technique"] for one in found] == [s.get("technique", "recovery") for s in steps]
    pruned = [n for n, step in enumerate(steps) if step is PRUNE]
    for one in found[pruned[0] :] if pruned else ():
        assert one["sparsity"] >= 0.499
    assert report.achieved["sparsity"] == found[-1]["sparsity"] == share_of_zeros(made)
    assert integer_layers(made) and not anatomy.prunable(made)
    storage.save(made, tmp_path / "made", report=report)
    again, _ = storage.load(tmp_path / "made")
    batch = inputs(dense, padded=True)
    with torch.no_grad():
        assert torch.equal(made(**batch).logits, again(**batch).logits)


def test_after_integers_only_the_rest_is_trained():
    dense, rounded, _ = chained("bert", GPTQ)
    _, taught, report = chained("bert", GPTQ, DISTIL)
    for before, after in zip(integer_layers(rounded), integer_layers(taught)):
        assert torch.equal(before.packed, after.packed) and torch.equal(before.scales, after.scales)
    assert not torch.equal(rounded.classifier.weight, taught.classifier.weight)
    assert 0 < report.achieved["steps"][1]["trained_share"] < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("how", [{}, {"group_size": 8}, {"act_order": True}], ids=str)
def test_gptq_holds_zeros_and_still_beats_plain_rounding(symmetric, how):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 32, generator=draw)
    weight[smallest(weight.abs(), 192)] = 0
    x = torch.randn(400, 32, generator=draw) @ torch.randn(32, 32, generator=draw)
    grid = {"bits": 3, "symmetric": symmetric, "group_size": how.get("group_size")}
    options = {"act_order": how.get("act_order", False)} | grid

    def back(tensors):
        return dequantize(*tensors, group_size=grid["group_size"])

    held, free = (back(round_matrix(weight, x.T @ x, keep_zeros=k, **options)) for k in (True, False))
    plain = back(quantize(weight, **grid))
    assert (held[weight == 0] == 0).all() and (plain[weight == 0] == 0).all()
    assert (free[weight == 0] != 0).any()
    errors = [(x @ (one - weight).T).norm() for one in (held, plain)]
    assert errors[0] < errors[1]


def test_a_chain_that_begins_alike_goes_on_from_there_with_the_same_result():
    cache, model, step_context = StepCache(), model_of("bert"), contexts_for("bert")
    asked = []

    def counted(step, *rest):
        asked.append(step.get("technique"))
        return step_context(step, *rest)

    chain, context = compress.get("chain"), Context(step_context=counted, step_cache=cache)
    for steps in ((PRUNE, DISTIL, GPTQ), (PRUNE, DISTIL, ROUND)):
        made, _ = chain(model, context, steps=recipes.read(steps))
    assert asked == ["sparsegpt", None, "gptq", "rtn"]
    alone = chained("bert", PRUNE, DISTIL, ROUND)[1]
    assert torch.equal(made(**inputs(model)).logits, alone(**inputs(model)).logits)
    chain(model, replace(context, seed=1), steps=recipes.read([PRUNE]))
    assert asked[-1] == "sparsegpt" and len(cache.results) == 1


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((GPTQ, PRUNE), "step 2 of 2, sparsegpt after gptq: .*cannot follow: .* packed integers"),
        ((ROUND, LOW), "low-rank cannot follow"),
        ((PRUNE, {"technique": "distil", "blocks": 1, "training": {"steps": 2}}), "would fill the zeros"),
        ((LOW, HEADS), "step 2 of 2, heads-ffn after low-rank: .* is a Factorised"),
    ],
    ids=["integers", "factors", "training", "slicing"],
)
def test_what_cannot_follow_says_which_step_and_why(steps, said):
    pytest.raises(StudyError, chained, "gpt2", *steps).match(said)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("no/such.yaml", "no recipe file"),
        ([], "at least one step"),
        (["wanda"], "step 1 is 'wanda'"),
        ([{"technique": "wonder"}], "available: "),
        ([{"technique": "rtn", "bits": 4, "group": 128}], "no setting group; it has bits, group_size"),
        ([{"technique": "rtn"}], "step 1, rtn: rtn needs bits; its settings are bits"),
        ([{"technique": "rtn", "bits": 4, "calibration": {"n": 8}}], "takes no calibration"),
        ([PRUNE | {"calibration": {"n": 8, "scored": True}}], "no step calibrates on scored text"),
        ([{"technique": "qat", "bits": 4}], "training"),
        ([{"recovery": {"steps": 5, "learning_rate": "1e-4"}}], "1.0e-4, not 1e-4"),
        ([{"recovery": {"steps": 5}, "bits": 4}], "a step of its own"),
        ([{"recovery": {"steps": -5}}], "step 1, recovery: steps=-5: give a whole number of at least 1"),
        ([{"recovery": {"steps": 2.5}}], "whole number"),
        ([{"recovery": {"steps": "half"}}], "steps='half'"),
        ([{"recovery": {"steps": 5, "learning_rate": float("nan")}}], "learning_rate=nan"),
        ([{"recovery": {"steps": 5, "learning_rate": [1e-4, 0]}}], "above 0"),
        ([{"recovery": {"steps": 5, "teacher": "yes"}}], "true or false"),
        ([{"technique": "wanda", "sparsity": 0.5, "calibration": {"n": 0}}], "n=0"),
        ([{"technique": "wanda", "sparsity": float("nan")}], "step 1, wanda: .*sparsity"),
        ("- {technique: [", "line 1 is not YAML"),
        ("- a: b: c", "line 1 is not YAML"),
        ("half", "list of at least one step, not 'half'"),
        ("- \xff\xfe", "is not UTF-8"),
        ("[" * 5000, "is not YAML"),
        ([{"technique": "chain", "steps": [PRUNE]}], "no chains in a chain"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_done(recipe, said, tmp_path):
    if isinstance(recipe, str) and not recipe.endswith(".yaml"):
        content, recipe = recipe, tmp_path / "r.yaml"
        recipe.write_bytes(content.encode("latin-1"))
    pytest.raises(BadSetting, recipes.read, recipe).match(said)


def test_reading_completes_a_recipe_and_reading_it_again_changes_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump([PRUNE, DISTIL, GPTQ]))
    steps = recipes.read(tmp_path / "mine.yaml")
    assert steps == recipes.read(steps)
    assert steps[0] == PRUNE | {"version": 1, "calibration": {"n": 128, "length": 128, "seed": 0}}
    assert steps[1]["recovery"] == {"steps": 3, "learning_rate": 1e-4, "batch_size": 16, "teacher": True}


def test_the_bytes_of_sparse_integers_by_hand():
    model = tiny("llama")
    steps = [{"technique": "magnitude-layer", "sparsity": 0.75}, {"technique": "rtn", "bits": 4}]
    steps = recipes.read(steps)
    made, _ = compress.get("chain")(model, Context(step_context=contexts_for("llama")), steps=steps)
    sizes = bytes.bytes_by_format(made)
    saved = 0
    for layer in integer_layers(made):
        kept = int((layer.dequantized() != 0).sum())
        assert layer.packed.nbytes == layer.weight_count / 2
        saved += layer.weight_count // 2 - layer.weight_count // 8 - -(-kept * 4 // 8)
    assert sizes["bitmask_integers"] == sizes["dense"] - saved and saved > 0
    assert "bitmask_integers" not in bytes.bytes_by_format(model)


def test_a_recipe_makes_one_row_that_is_found_again(house):  # noqa: F811
    subject = subject_in(house, "10_combinations")
    steps = [PRUNE | {"calibration": {"n": 20, "length": 16}}, DISTIL, {"technique": "rtn", "bits": 4}]
    (house / "mine.yaml").write_text(yaml.safe_dump(steps))
    row = subject.measure_recipe(house / "mine.yaml", timed=False, keep=house / "kept")
    assert row["technique"] == "chain" and row["settings"]["steps"] == recipes.read(steps)
    assert [one["technique"] for one in row["achieved"]["steps"]] == ["sparsegpt", "recovery", "rtn"]
    assert row["achieved"]["sparsity"] >= 0.499 and "train" in row["provenance"]["calibration"]
    assert row["memory"]["formats"]["bitmask_integers"] < row["memory"]["formats"]["dense"]
    assert subject_in(house, "10_combinations").measure_recipe(steps, timed=False) == row
    assert integer_layers(storage.load(house / "kept")[0])
    assert not list((house / "run" / "checkpoints").glob("*"))
    plain, taught = {"technique": "magnitude-layer", "sparsity": 0.5}, Recovery(steps=3, teacher=True)
    pairs = [  # a recipe of one step is that step's row
        ([plain], subject.measure("magnitude-layer", sparsity=0.5, timed=False)),
        ([plain, DISTIL], subject.measure("magnitude-layer", sparsity=0.5, recovery=taught, timed=False)),
        ([DISTIL], subject.measure(DENSE, recovery=taught, timed=False)),
    ]
    assert all(subject.measure_recipe(steps, timed=False) == expected for steps, expected in pairs)
    with pytest.raises(BadSetting, match="one of its steps"):
        subject.measure("chain", steps=[plain], recovery=taught)


def test_a_recipe_runs_from_the_command_line(house, capsys):  # noqa: F811
    steps = [{"technique": "magnitude-layer", "sparsity": 0.5}, ROUND]
    (house / "mine.yaml").write_text(yaml.safe_dump(steps))
    where = f"--model {house}/model --task {house}/reviews.csv --save {house}/made".split()
    more = ["--output", str(house / "run"), "-p", f"train_path={house / 'train.csv'}", "--examples", "20"]
    assert apply.main([str(house / "mine.yaml"), *where, *more]) == 0
    said = capsys.readouterr().out
    assert "Magnitude, per layer, 50 % → RTN, 4 bits, per-channel, incl. embeddings" in said
    assert share_of_zeros(storage.load(house / "made")[0]) >= 0.5
    for wrong, said in (
        ([str(house / "none.yaml"), *where], "no recipe file"),
        ([str(house / "mine.yaml"), *where, "-p", "limit=3"], "limit is --examples"),
        ([str(house / "mine.yaml"), *where, "-p", "limit"], "write -p name=value"),
        ([str(house / "mine.yaml"), *where, "-p", "labels=[a"], "is not YAML"),
        ([str(house / "mine.yaml"), *where, *more, "--seed", "1"], "another model"),
        ([str(house / "mine.yaml"), *where, "--output", str(house / "new")], "another model"),
    ):
        assert apply.main(wrong) == 1 and said in capsys.readouterr().err
    assert not list((house / "new").glob("rows/*.jsonl")), "refused before anything was measured"
