"""Unstructured pruning against PyTorch's own, by hand, and as properties."""

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.compress import masks as mask_module
from lmcompress.errors import BadSetting, BadWeights, NothingTouched
from lmcompress.models.anatomy import prunable
from tests.tiny_models import FAMILIES, tiny

RULES = ("random", "magnitude-layer", "magnitude-global")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", RULES)
def test_every_family_reaches_the_sparsity_asked_for(family, rule):
    model = tiny(family)
    pruned, report = compress.get(rule)(model, sparsity=0.5)
    maps = prunable(pruned)
    zeros = sum(int((m.weight2d() == 0).sum()) for m in maps)
    total = sum(m.weight2d().numel() for m in maps)
    assert report.layers == len(maps) > 0
    assert abs(zeros / total - 0.5) < 1e-3
    assert report.achieved["sparsity"] == pytest.approx(zeros / total)
    assert report.achieved["weights_prunable"] == total


@pytest.mark.parametrize("rule", RULES)
def test_the_argument_is_not_touched(rule):
    model = tiny("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compress.get(rule)(model, sparsity=0.9)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


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


def test_conv1d_weights_are_pruned_as_linear_layers():
    model = tiny("gpt2")
    pruned, report = compress.get("magnitude-layer")(model, sparsity=0.5)
    names = {linear.name for linear in prunable(pruned)}
    assert {"c_attn", "c_proj", "c_fc"} <= {name.rpartition(".")[2] for name in names}
    assert report.achieved["sparsity_by_kind"].keys() == {"attention", "feed-forward"}


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


def test_global_pruning_by_hand():
    scores = {"a": torch.tensor([[0.1, 5.0]]), "b": torch.tensor([[0.2, 0.3]])}
    masks = mask_module.over_all(scores, 0.75)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [[True, False]],
        "b": [[True, True]],
    }
    masks = {name: mask_module.layer_mask(score, 0.5, None).tolist() for name, score in scores.items()}
    assert masks == {"a": [[True, False]], "b": [[True, False]]}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.999), st.integers(0, 3))
def test_exactly_the_asked_count_goes_even_among_ties(rows, columns, sparsity, seed):
    scores = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    mask = mask_module.layer_mask(scores, sparsity, None)
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


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, 50, "0.5", None, float("nan"), True])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(BadSetting, match="fraction"):
        compress.get("magnitude-layer")(tiny("bert"), sparsity=sparsity)


def test_zero_sparsity_changes_nothing():
    model = tiny("bert")
    pruned, report = compress.get("magnitude-global")(model, sparsity=0.0)
    assert report.achieved["sparsity"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pruned.parameters(), strict=True))


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


def test_an_unknown_technique_lists_those_there_are():
    with pytest.raises(BadSetting, match="magnitude-global"):
        compress.get("magnitud")


def test_kept_masks_name_parameters_and_mark_what_is_not_zero():
    pruned, _ = compress.get("magnitude-layer")(tiny("gpt2"), sparsity=0.5)
    masks = mask_module.kept_masks(pruned)
    parameters = dict(pruned.named_parameters())
    assert masks and all(torch.equal(masks[name], parameters[name] != 0) for name in masks)
