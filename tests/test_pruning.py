"""Unstructured pruning against PyTorch's own, dense algebra, by hand, as properties; the sensitivity scan."""

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from lmcompress import compress
from lmcompress.compress import Context, masks, second_order, sensitivity
from lmcompress.compress.calibration import calibrate
from lmcompress.compress.pruning import MovementGate, sparsity_at, wanda_scores
from lmcompress.errors import BadSetting, BadWeights, NothingTouched
from lmcompress.models.anatomy import prunable
from lmcompress.train.trainer import TrainSpec
from tests.tiny_models import FAMILIES, calibration_batches, kind, reloaded, tiny

RULES = ("random", "magnitude-layer", "magnitude-global")
CALIBRATED = ("wanda", "sparsegpt")


def batches(kind: str = "encoder", count: int = 3) -> list[dict]:
    return calibration_batches(kind, count, rows=4, length=12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", RULES)
def test_every_family_reaches_the_sparsity_asked_for(family, rule):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned, report = compress.get(rule)(model, sparsity=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    maps = prunable(pruned)
    zeros = sum(int((m.weight2d() == 0).sum()) for m in maps)
    total = sum(m.weight2d().numel() for m in maps)
    assert report.layers == len(maps) > 0
    assert abs(zeros / total - 0.5) < 1e-3
    assert report.achieved["sparsity"] == pytest.approx(zeros / total)
    assert report.achieved["weights_prunable"] == total


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
@pytest.mark.parametrize("rule", ["magnitude-layer", "magnitude-global"])
def test_masks_equal_those_of_torch_on_the_same_policy(family, rule):
    model = tiny(family)
    pruned, _ = compress.get(rule)(model, sparsity=0.7)
    modules = [(m.module, "weight") for m in prunable(model)]
    if rule == "magnitude-global":
        torch_prune.global_unstructured(modules, pruning_method=torch_prune.L1Unstructured, amount=0.7)
    else:
        for module, name in modules:
            torch_prune.l1_unstructured(module, name, amount=0.7)
    for ours, (module, _) in zip(prunable(pruned), modules, strict=True):
        assert torch.equal(ours.module.weight.detach(), module.weight.detach()), ours.name


def test_tied_embeddings_count_once_and_stay_out_of_the_default_policy():
    model = tiny("t5")
    _, blocks = compress.get("magnitude-layer")(model, sparsity=0.5)
    pruned, everything = compress.get("magnitude-layer")(model, sparsity=0.5, policy="all")
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    assert len([m for m in model.modules() if isinstance(m, nn.Embedding)]) > len(tables)
    added = everything.achieved["weights_prunable"] - blocks.achieved["weights_prunable"]
    assert added == sum(tables.values())
    shared = pruned.get_input_embeddings().weight
    assert (shared == 0).float().mean().item() == pytest.approx(0.5, abs=1e-3)
    assert pruned.encoder.get_input_embeddings().weight.data_ptr() == shared.data_ptr()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.999), st.integers(0, 3))
def test_exactly_the_asked_count_goes_even_among_ties(rows, columns, sparsity, seed):
    scores = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    mask = masks.layer_mask(scores, sparsity, None)
    assert int(mask.sum()) == round(sparsity * scores.numel())
    if mask.any() and not mask.all():
        assert scores[mask].max() <= scores[~mask].min()


def test_random_depends_on_the_seed_and_only_on_it():
    model = tiny("bert")
    first, again, other = (
        compress.get("random")(model, Context(seed=seed), sparsity=0.5)[0] for seed in (1, 1, 2)
    )
    weights = [prunable(m)[0].weight2d() for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_nan_weights_are_refused_by_name():
    model = tiny("bert")
    prunable(model)[0].module.weight.data[0, 0] = float("nan")
    with pytest.raises(BadWeights, match=prunable(model)[0].name.rpartition(".")[2]):
        compress.get("magnitude-layer")(model, sparsity=0.5)


def test_a_technique_that_touches_nothing_raises():
    @compress.technique(name="test-nothing", version=1, title="Nothing")
    def nothing(model: nn.Module, context: Context):
        return model, compress.TechniqueResult("test-nothing", 0)

    try:
        with pytest.raises(NothingTouched, match="matched no layer"):
            compress.get("test-nothing")(tiny("bert"))
    finally:
        compress._REGISTRY.pop("test-nothing")


def zeros(model) -> float:
    maps = prunable(model)
    return sum(int((m.weight2d() == 0).sum()) for m in maps) / sum(m.weight2d().numel() for m in maps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", CALIBRATED)
def test_every_family_is_pruned_saved_and_reloaded(family, rule, tmp_path):
    model, given = tiny(family), batches(kind(family))
    pruned, report = compress.get(rule)(model, Context(calibration=given), sparsity=0.5)
    assert zeros(pruned) == pytest.approx(0.5, abs=0.01) == report.achieved["sparsity"]
    reloaded(pruned, tmp_path / "m")


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "t5_gated", "albert"])
@pytest.mark.parametrize("rule", ("magnitude-layer", "random", *CALIBRATED))
def test_patterns_are_exact_in_every_family(family, rule):
    context = Context(calibration=batches(kind(family)))
    for pattern, m, kept in (("2:4", 4, 2), ("1:4", 4, 1)):
        pruned, report = compress.get(rule)(tiny(family), context, pattern=pattern)
        assert report.achieved["sparsity"] >= 0.5
        for one in prunable(pruned):
            nonzero = (one.weight2d().reshape(one.out_features, -1, m) != 0).sum(-1)
            assert int(nonzero.max()) == kept and float((nonzero == kept).float().mean()) > 0.99, one.name


def test_a_width_that_is_no_multiple_of_m_is_refused_before_anything_is_done():
    model = tiny("bert")
    for rule in ("magnitude-layer", *CALIBRATED):
        with pytest.raises(BadSetting, match="no multiple of 5"):
            compress.get(rule)(model, Context(calibration=batches()), pattern="3:5")


def test_wanda_in_the_first_block_equals_its_definition_on_unpadded_inputs():
    model, given = tiny("bert"), batches()
    pruned, _ = compress.get("wanda")(model, Context(calibration=given), sparsity=0.5)
    one, ours = prunable(model)[0], prunable(pruned)[0]
    seen = []
    handle = one.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in given:
            model(**batch)
    handle.remove()
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, given, strict=True)])
    scores = one.weight2d().abs() * rows.norm(dim=0)
    order = scores.argsort(dim=1)[:, : scores.shape[1] // 2]
    expected = one.weight2d().detach().scatter(1, order, 0.0)
    assert torch.equal(ours.weight2d(), expected)


def test_later_blocks_are_calibrated_on_what_the_pruned_ones_before_them_give():
    model, given = tiny("gpt2"), batches("decoder")
    pruned, _ = compress.get("wanda")(model, Context(calibration=given), sparsity=0.5)
    steps = {m: s for step in calibrate(pruned, given, collect=("norm",)) for m, s in step.stats.items()}
    first_of_second = next(m for m in prunable(model) if m.block == 1)
    scores = wanda_scores(first_of_second.weight2d(), steps[first_of_second.name].norm_sq)
    mask = masks.smallest_per_row(scores, scores.shape[1] // 2)
    ours = next(m for m in prunable(pruned) if m.name == first_of_second.name)
    assert torch.equal(ours.weight2d() == 0, mask)


def direct_obs(weight, gram, *, sparsity, pattern, damping, block):
    """The same choice of masks, with every update from the explicit inverse of the Hessian that is left."""
    weight, width = weight.double().clone(), weight.shape[1]
    hessian = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(width, dtype=torch.double)
    group = int(pattern.split(":")[1]) if pattern else block
    kept_in_group = int(pattern.split(":")[0]) if pattern else None
    gone = 0
    for first in range(0, width, group):
        last = min(first + group, width)
        # U_jj² of the sequential elimination: the j-th diagonal of the inverse of H[j:, j:].
        pivots = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(first, last)])
        scores = weight[:, first:last].square() / pivots
        if pattern:
            order = scores.argsort(dim=1)[:, : group - kept_in_group]
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
        else:
            wanted = round(sparsity * len(weight) * last) - gone
            gone += wanted
            mask = torch.zeros(scores.numel(), dtype=torch.bool)
            mask[scores.flatten().argsort()[:wanted]] = True
            mask = mask.view_as(scores)
        for j in range(first, last):
            inverse = torch.linalg.inv(hessian[j:, j:])
            error = weight[:, j] * mask[:, j - first] / inverse[0, 0]
            weight[:, j:] -= error[:, None] * inverse[0][None]
            weight[mask[:, j - first], j] = 0
    return weight


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
@pytest.mark.parametrize("width", [24, 136])
def test_sparsegpt_equals_dense_algebra(pattern, width):
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(6, width, generator=draw)
    x = torch.randn(3 * width, width, generator=draw) @ torch.randn(width, width, generator=draw) / width**0.5
    gram = x.T @ x
    ours = second_order.prune_matrix(weight, gram, sparsity=0.5, pattern=pattern)
    expected = direct_obs(weight, gram, sparsity=0.5, pattern=pattern, damping=0.01, block=second_order.BLOCK)
    assert torch.equal(ours == 0, expected == 0)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1)


def test_a_singular_hessian_is_damped_until_it_works():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e3  # rank 4 of 64
    x[:, 7] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    ours = second_order.prune_matrix(weight, x.T @ x, sparsity=0.5, damping=1e-9)
    assert ours.isfinite().all()
    assert (ours[:, 7] == 0).all()  # an input that is always zero costs nothing
    pytest.raises(BadWeights, second_order.inverse_factor, torch.full((3, 3), float("nan"))).match("NaN")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.floats(0, 0.99))
def test_sparsegpt_reaches_the_sparsity_exactly(rows, width, sparsity):
    draw = torch.Generator().manual_seed(rows * width)
    x = torch.randn(2 * width + 5, width, generator=draw)
    ours = second_order.prune_matrix(torch.randn(rows, width, generator=draw), x.T @ x, sparsity=sparsity)
    assert int((ours == 0).sum()) == round(sparsity * rows * width)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "albert"])
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_movement_keeps_what_grows_and_reaches_its_sparsity(family, amount):
    encoder = kind(family) == "encoder"
    model = tiny(family, "classification" if encoder else "lm")
    rows = [row[row > 0].numpy() for batch in batches(kind(family), 2) for row in batch["input_ids"]]
    features = [{"input_ids": row, "labels": int(row[0]) % 2 if encoder else row} for row in rows]
    train = TrainSpec(features=features, steps=10, batch_size=4, learning_rate=1e-3)
    pruned, report = compress.get("movement")(model, Context(train=train), **amount)
    assert zeros(pruned) == pytest.approx(0.5, abs=1e-3) == report.achieved["sparsity"]
    assert not any("parametrizations" in name for name, _ in pruned.named_parameters())
    before, after = prunable(model)[0].weight2d(), prunable(pruned)[0].weight2d()
    assert not torch.equal(after[after != 0], before[after != 0])  # it was trained


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.sampled_from([1, 100]))
def test_masks_by_value_are_those_by_rank_and_of_equal_scores_take_the_first(rows, width, share, levels):
    draw = torch.Generator().manual_seed(rows * width)
    scores = torch.randint(-levels, levels + 1, (rows, width), generator=draw).float()
    count = round(share * scores.numel())
    ranked = scores.flatten().numpy().argsort(kind="stable")[:count]
    assert masks.lowest(scores, count).flatten().nonzero().flatten().tolist() == sorted(ranked)
    distinct = torch.randperm(rows * width, generator=draw).view(rows, width).float()
    assert torch.equal(masks.lowest(distinct, count), masks.smallest(distinct, count))


def test_movement_scores_are_minus_gradient_times_weight():
    model = tiny("bert", "classification")
    one = prunable(model)[0]
    weight = one.module.weight.detach().clone()
    plain = tiny("bert", "classification")
    batch = batches()[0] | {"labels": torch.tensor([0, 1, 0, 1])}
    gate = MovementGate(weight)
    parametrize.register_parametrization(one.module, "weight", gate)
    for run in (model, plain):
        run.eval()
        run(**batch).loss.backward()
    gradient = prunable(plain)[0].module.weight.grad
    assert torch.allclose(gate.score, -gradient * weight, atol=1e-7)


def test_the_movement_schedule_rises_from_zero_to_the_target():
    levels = [sparsity_at(step / 100, 0.9) for step in range(101)]
    assert levels[0] == levels[10] == 0 and levels[70] == levels[100] == pytest.approx(0.9)
    assert all(a <= b for a, b in zip(levels, levels[1:]))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_scan_leaves_the_model_alone_and_sees_more_change_at_higher_levels(family):
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sensitivity.scan(model, batches(kind(family)), levels=(0.3, 0.9))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert set(found["change"]) == {masks.group_of(one) for one in prunable(model)}
    changes = torch.tensor(list(found["change"].values()))
    assert (changes[:, 1] > changes[:, 0]).float().mean() > 0.8 and (changes >= 0).all()


def test_the_allocation_spares_what_is_sensitive_at_the_same_total():
    found = {
        "levels": [0.3, 0.5, 0.7],
        "weights": {"a": 100, "b": 300},
        "change": {"a": [1.0, 2.0, 4.0], "b": [0.1, 0.2, 0.9]},
    }
    share = sensitivity.allocate(found, 0.5, spread=0.2)
    # "b" is cheaper by the weight everywhere, so it takes all it may, and "a" what is left of 200 zeros.
    assert share == {"a": pytest.approx(0.3), "b": pytest.approx((200 - 30) / 300, abs=1e-4)}
    assert sum(share[g] * found["weights"][g] for g in share) == pytest.approx(200, abs=0.1)


@pytest.mark.parametrize("rule", ["magnitude-layer", *CALIBRATED])
def test_an_allocation_is_followed_group_by_group(rule):
    model, given = tiny("llama"), batches("decoder")
    context = Context(calibration=given)
    share = sensitivity.allocate(sensitivity.scan(model, given), 0.5)
    pruned, report = compress.get(rule)(model, context, sparsity=0.5, allocation=share)
    assert report.achieved["sparsity"] == pytest.approx(0.5, abs=0.02)
    for one in prunable(pruned):
        reached = float((one.weight2d() == 0).float().mean())
        assert reached == pytest.approx(share[masks.group_of(one)], abs=0.02)
    with pytest.raises(BadSetting, match="not the 0.700 asked for"):
        compress.get(rule)(model, context, sparsity=0.7, allocation=share)
    with pytest.raises(BadSetting, match="no sparsity"):
        compress.get(rule)(model, context, sparsity=0.5, allocation={"decoder.0.attention": 0.5})
