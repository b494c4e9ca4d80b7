"""Experts of equal size that compute only what was chosen, and equal the dense model when all are."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.compress import moefication as m
from lmcompress.compress.expert_layers import ExpertInput, ExpertOutput, Router
from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.train.trainer import TrainSpec
from tests.tiny_models import FAMILIES, inputs, logits, reloaded, tiny


@pytest.fixture(autouse=True)
def short_training_of_routers(monkeypatch):
    monkeypatch.setattr(m, "STEPS", 100)


def batches(model, **how):
    return [inputs(model, padded=True, seed=seed, **how) for seed in (1, 2)]


def moefied(model, **settings):
    asked = {"experts": 4, "active": 2, "clustering": "random", "router": "centroid"} | settings
    return compress.get("moefy")(model, Context(calibration=batches(model)), **asked)


def experts_of(model):
    return [one for one in model.modules() if isinstance(one, (ExpertInput, ExpertOutput))]


@pytest.mark.parametrize("router", ["centroid", "oracle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_experts_every_family_gives_what_the_dense_model_gives(family, router):
    model = tiny(family)
    made, report = moefied(model, active=4, router=router)
    given = inputs(model)
    one = {name: ids[:1, :1] for name, ids in given.items()}  # a single token takes a path of its own
    for some in (given, one):
        expected = logits(model, some)
        assert (logits(made, some) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert report.achieved["mass"] == pytest.approx(1) and report.layers == len(experts_of(made))
    routers = {layer.router for layer in experts_of(made)}
    added = sum(p.numel() for router in routers for p in router.parameters())
    assert count_parameters(made) == count_parameters(model) + added


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "albert", "t5", "t5_gated", "bart"])
@pytest.mark.parametrize("router", ["mlp", "oracle"])
def test_saved_and_reloaded_it_gives_the_same(family, router, tmp_path):
    made, report = moefied(tiny(family), router=router)
    again = reloaded(made, tmp_path / "saved", tolerance=1e-5, report=report)
    assert all(map(torch.equal, again.state_dict().values(), made.state_dict().values()))
    layers, per_block = experts_of(again), 3 if family in ("llama", "t5_gated") else 2
    assert len(layers) == len(experts_of(made))
    assert len({layer.router for layer in layers}) == len(layers) // per_block
    assert anatomy(again).blocks[0].ffn.width == anatomy(made).blocks[0].ffn.width


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_sum_over_the_chosen_experts_is_the_masked_dense_feed_forward(family, tokens):
    model = tiny(family)
    made, _ = moefied(model)
    dense, sparse = anatomy(model).blocks[0], anatomy(made).blocks[0]
    x = torch.randn(1, tokens, 32)
    router = sparse.ffn.output.module.router
    chosen = router.scores(x[0]).topk(2).indices
    rows = [router_rows(one, dense.ffn.inputs[0]) for one in sparse.ffn.inputs[0].module.weight]
    with torch.no_grad():
        hidden = [F.linear(x[0], one.weight2d(), one.module.bias) for one in dense.ffn.inputs]
        a = F.silu(hidden[0]) * hidden[1] if family == "llama" else F.gelu(hidden[0], approximate="tanh")
        kept = torch.zeros_like(a)
        for token, experts in enumerate(chosen.tolist()):
            for expert in experts:
                kept[token, rows[expert]] = a[token, rows[expert]]
        expected = F.linear(kept, dense.ffn.output.weight2d(), dense.ffn.output.module.bias)
        torch.testing.assert_close(sparse.module.mlp(x)[0], expected, atol=1e-5, rtol=1e-5)


def router_rows(weight, dense):
    """The neurons of the dense map whose rows an expert holds."""
    return [int((dense.weight2d() == row).all(1).nonzero()) for row in weight]


@pytest.mark.parametrize("tokens", [1, 5])
def test_unselected_experts_are_not_computed(tokens):
    torch.manual_seed(0)
    router = Router("centroid", 4, 2, 8)
    router.first.data = torch.randn(4, 8)
    first = ExpertInput(torch.randn(4, 3, 8), torch.randn(4, 3), router)
    last = ExpertOutput(torch.randn(4, 3, 8), None, router)
    x = torch.randn(1, 8).repeat(tokens, 1) + 1e-3 * torch.randn(tokens, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        clean = last(first(x))
    assert counter.get_total_flops() == tokens * (router.flops() + 2 * 2 * (2 * 3 * 8))
    unused = sorted({0, 1, 2, 3} - set(router.scores(x).topk(2).indices.flatten().tolist()))
    assert unused
    first.weight.data[unused], last.weight.data[unused] = torch.nan, torch.nan
    assert torch.equal(last(first(x)), clean)


def test_the_oracle_spends_all_of_w_in_and_saves_w_out():
    router = Router("oracle", 4, 1, 8)
    first = ExpertInput(torch.randn(4, 3, 8), None, router)
    last = ExpertOutput(torch.randn(4, 3, 8), None, router)
    x = torch.randn(5, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = last(first(x).relu())
    assert counter.get_total_flops() == 5 * 2 * (12 * 8 + 3 * 8)
    a = (x @ first.weight.flatten(0, 1).T).relu().view(5, 4, 3)
    best = a.sum(2).argmax(1)
    expected = torch.stack([a[t, e] @ last.weight[e] for t, e in enumerate(best)])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("router", ["oracle", "centroid", "mlp"])
def test_the_reported_share_is_what_the_counter_counts(router):
    model = tiny("gpt2")
    made, report = moefied(model, router=router)
    counts = []
    for one in (made, model):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            anatomy(one).blocks[0].module.mlp(torch.randn(1, 6, 32))
        counts.append(counter.get_total_flops())
    assert report.achieved["ffn_flops_share"] == pytest.approx(counts[0] / counts[1])


@pytest.mark.parametrize(("n", "groups"), [(12, 4), (15, 5), (49, 7), (6, 6), (10, 1)])
def test_clusters_have_equal_sizes_and_every_row_once(n, groups):
    rows = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    found = m.balanced_kmeans(rows, groups, generator=torch.Generator().manual_seed(0))
    assert found.shape == (groups, n // groups) and found.flatten().sort().values.tolist() == list(range(n))


def planted(seed=0):
    """48 rows in 6 shuffled clusters, and the sets of their indices."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(48)[torch.randperm(48, generator=draw)] % 6
    centres = 4 * torch.randn(6, 32, generator=draw)
    return centres[labels] + 0.2 * torch.randn(48, 32, generator=draw), labels


def same_clusters(members, labels):
    return all(len(set(labels[one].tolist())) == 1 for one in members)


@pytest.fixture(scope="module")
def clustered():
    """A tiny model whose neurons come in 6 planted clusters of like rows, and its labels."""
    model = tiny("opt", activation_function="relu")
    rows, labels = planted()
    with torch.no_grad():
        for block in anatomy(model).blocks:
            block.ffn.inputs[0].module.weight.copy_(rows)
            block.ffn.inputs[0].module.bias.zero_()
    return model, labels


@pytest.mark.parametrize("clustering", ["balanced-kmeans", "co-activation"])
def test_planted_experts_are_found_and_hold_more_mass_than_random_ones(clustered, clustering):
    model, labels = clustered
    made, report = moefied(model, experts=6, clustering=clustering, router="oracle")
    rows = anatomy(model).blocks[0].ffn.inputs[0]
    members = [router_rows(one, rows) for one in anatomy(made).blocks[0].ffn.inputs[0].module.weight]
    assert same_clusters(members, labels)
    _, control = moefied(model, experts=6, clustering="random", router="oracle")
    assert report.achieved["mass"] > control.achieved["mass"] + 0.1


@pytest.mark.parametrize("family", ["opt", "llama", "bert"])
def test_no_router_captures_more_than_the_oracle_and_the_trained_one_beats_chance(family):
    model = tiny(family)
    given = [inputs(model, batch=16, length=20, seed=seed) for seed in range(4)]
    figures = {}
    for router in ("oracle", "centroid", "mlp"):
        asked = {"experts": 6, "active": 2, "router": router}
        figures[router] = compress.get("moefy")(model, Context(calibration=given), **asked)[1].achieved
    assert figures["oracle"]["recall"] == 1 and figures["oracle"]["mass"] == figures["oracle"]["mass_oracle"]
    for router in ("centroid", "mlp"):
        masses, best = (figures[router][name] for name in ("mass_by_block", "mass_oracle_by_block"))
        assert all(mass <= bound for mass, bound in zip(masses, best, strict=True))
    assert figures["mlp"]["recall_by_block"][0] > 2 / 6 and figures["mlp"]["mass_by_block"][0] > 2 / 6
    again = compress.get("moefy")(model, Context(calibration=given), experts=6, active=2, router="mlp")[1]
    assert again.achieved == figures["mlp"]


def test_a_centroid_is_the_direction_of_an_experts_rows():
    model = tiny("gpt2")
    made, _ = moefied(model, clustering="balanced-kmeans")
    ffn = anatomy(made).blocks[1].ffn.inputs[0].module
    expected = F.normalize(F.normalize(ffn.weight, dim=2).mean(1), dim=1)
    torch.testing.assert_close(ffn.router.first.data, expected.data)


def test_padding_counts_for_nothing():
    model = tiny("bert")
    given = batches(model)
    other = copy.deepcopy(given)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 77
    assert m.activation_sparsity(model, given) == m.activation_sparsity(model, other)
    asked = {"experts": 4, "active": 1, "clustering": "co-activation", "router": "mlp"}
    technique = compress.get("moefy")
    first, second = (technique(model, Context(calibration=some), **asked) for some in (given, other))
    assert first[1].achieved == second[1].achieved
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))


def test_activation_sparsity_by_hand():
    energy = torch.tensor([[4.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [8.9, 1, 0.1, 0]])
    assert m._share_needed(energy).tolist() == [0.25, 1.0, 0.0, 0.5]
    model = tiny("opt", activation_function="relu")
    with torch.no_grad():
        bias = anatomy(model).blocks[0].ffn.inputs[0].module.bias
        bias[:12], bias[12:] = -1e4, 1e4  # a quarter never fires, the rest always
    found = m.activation_sparsity(model, batches(model))["blocks"]
    assert found[0]["zero"] == 0.25 and found[0]["below"] == [0.25] * 3
    assert found[0]["fixed_90"] == pytest.approx(33 / 48, abs=0.03)
    assert 0 < found[1]["zero"] < 1
    dense = m.activation_sparsity(tiny("gpt2"), batches(model))["blocks"]
    assert all(block["zero"] < 0.01 for block in dense)


def spec(model, steps=2):
    rows = [inputs(model, batch=1, seed=seed)["input_ids"][0].tolist() for seed in range(4)]
    features = [{"input_ids": row, "labels": row} for row in rows]
    return TrainSpec(features=features, steps=steps, batch_size=2)


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in ("t5", "opt")])
def test_relufied_every_family_has_zeros_and_reloads(family, tmp_path):
    model = tiny(family)
    context = Context(train=spec(model), calibration=batches(model))
    made, report = compress.get("relufy")(model, context)
    found = report.achieved
    assert found["zero_before"] < 0.01
    assert all(0.2 < found[name] < 0.8 for name in ("zero_swapped", "zero_after"))
    assert len(found["curve"]["train"]) == 2 and report.layers == len(anatomy(model).blocks)
    again = reloaded(made, tmp_path / "saved", report=report)
    with pytest.raises(NothingTouched, match="nothing to replace"):
        compress.get("relufy")(again, context)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"experts": 7}, "divide it: 3, 4, 6, 8"),
        ({"experts": 0}, "whole number from 1"),
        ({"experts": 4.0}, "whole number"),
        ({"active": 5}, "1 to 4"),
        ({"active": 0}, "whole number from 1"),
        ({"clustering": "metis"}, "'balanced-kmeans', 'co-activation', 'random'"),
        ({"router": "dice"}, "'oracle', 'centroid', 'mlp'"),
    ],
)
def test_wrong_settings_are_refused_with_what_there_is(wrong, said):
    pytest.raises(BadSetting, moefied, tiny("bert"), **wrong).match(said)


def test_a_moefied_model_is_not_moefied_again_and_can_be_trained():
    made, _ = moefied(tiny("bert", "classification"))
    pytest.raises(BadSetting, moefied, made).match("no dense feed-forward")
    given = inputs(made) | {"labels": torch.tensor([0, 1, 0])}
    made(**given).loss.backward()
    assert all(one.weight.grad is not None and one.weight.grad.isfinite().all() for one in experts_of(made))
