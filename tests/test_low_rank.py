import copy

import pytest
import torch
from tiny_models import FAMILIES, inputs, tiny
from torch import nn

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.compress.low_rank import (
    break_even,
    hadamard_factors,
    rank_for,
    select_layers,
    truncated_svd,
    weight_figures,
)
from lmcompress.compress.low_rank_layers import Factorised, Hadamard, matrix_of
from lmcompress.errors import BadData, BadSetting, NothingTouched
from lmcompress.measure import bytes, kernels
from lmcompress.measure.kernels import layer_speed
from lmcompress.models import anatomy, storage
from lmcompress.weights.spectra import effective_rank, shared_ranks


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def reloaded(model, folder):
    return storage.load(storage.save(model, folder))[0]


# --- parameter formulas


def test_break_even_and_ranks_by_hand():
    assert break_even(768, 768) == 384 and break_even(3072, 768) == 614.4
    assert rank_for(1.0, 3072, 768) == 614 and 614 * (3072 + 768) <= 3072 * 768 < 615 * (3072 + 768)
    assert rank_for(0.5, 768, 768) == 192 and rank_for(7, 3, 9, layers=3) == 7
    # r_g = r B (in + out) / (B out + in), with r = 0.5 r*
    assert break_even(768, 3072, layers=12) == 12 * 768 * 3072 / (3072 + 12 * 768)
    local = 0.5 * 768 * 3072 / (768 + 3072)
    assert rank_for(0.5, 768, 3072, layers=12) == round(local * 12 * (3072 + 768) / (12 * 768 + 3072)) == 1152
    assert rank_for(1.0, 768, 768, pairs=2) == 192
    assert rank_for(0.0001, 8, 8) == 1


@pytest.mark.parametrize(("out", "wide"), [(3, 3), (5, 64), (64, 5), (7, 13), (32, 32)])
def test_a_fraction_never_costs_more_than_it_says_and_two_is_full_rank(out, wide):
    assert rank_for(2.0, out, wide) == min(out, wide)
    for fraction in (0.3, 0.5, 1.0):
        for count in (1, 2, 6):
            rank = rank_for(fraction, out, wide, layers=count)
            cost, budget = rank * (wide + count * out), fraction * count * out * wide
            assert rank == 1 or cost <= budget < cost + wide + count * out


@pytest.mark.parametrize("rank", [0, -1, 0.0, 9, True, "8", None, float("nan"), float("inf")])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(BadSetting, match="rank="):
        rank_for(rank, 8, 20)


# --- truncated SVD


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
def test_the_svd_is_the_optimum(shape):
    matrix, rank = random_matrix(*shape), 4
    second, first = truncated_svd(matrix, rank)
    error = (matrix - second @ first).norm()
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(error, values[rank:].norm())  # Eckart and Young
    torch.testing.assert_close(second.norm(dim=0), values[:rank])
    torch.testing.assert_close(first @ first.T, torch.eye(rank, dtype=torch.float64))
    for seed in range(50):  # with the best other side, too, no other basis does better
        other = random_matrix(rank, shape[1], seed=seed) + 3 * first * (seed % 2)
        assert (matrix - matrix @ torch.linalg.pinv(other) @ other).norm() >= error


def test_a_matrix_of_lower_rank_and_zero_are_exact():
    matrix = random_matrix(6, 2) @ random_matrix(2, 10, seed=1)
    torch.testing.assert_close(torch.mm(*truncated_svd(matrix, 3)), matrix)
    assert not torch.mm(*truncated_svd(torch.zeros(4, 6), 2)).any()


# --- the techniques on every family


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_same_outputs_also_reloaded(family, tmp_path):
    model = tiny(family)
    batch, maps = inputs(model, padded=True), len(anatomy.prunable(model))
    expected = logits(model, batch)
    for name in ("low-rank", "low-rank-aware"):
        new, report = compress.get(name)(model, Context(calibration=[batch]), rank=2.0)
        found = logits(new, batch)
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert report.layers == maps == len(report.achieved["rank_by_layer"])
        assert report.achieved["weight_error"] < 1e-6
        assert len(anatomy.prunable(new)) == 2 * maps  # what comes next sees the narrow maps
    again = reloaded(new, tmp_path)
    assert torch.equal(logits(again, batch), found)
    assert anatomy.count_parameters(again) == anatomy.count_parameters(new)


def test_the_weights_are_the_svd_of_each_map_and_biases_stay():
    for family in ("bert", "gpt2"):
        model = tiny(family)
        new, report = compress.get("low-rank")(model, rank=5)
        for one in anatomy.prunable(model):
            layer = new.get_submodule(one.name)
            u, s, vt = torch.linalg.svd(one.weight2d().double())
            expected = ((u[:, :5] * s[:5]) @ vt[:5]).float()
            torch.testing.assert_close(layer.matrix(), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(layer.second.bias, one.module.bias)
            assert report.achieved["rank_by_layer"][one.name] == 5
        gone = sum(
            o.weight2d().numel() - 5 * (o.in_features + o.out_features) for o in anatomy.prunable(model)
        )
        assert anatomy.count_parameters(model) - anatomy.count_parameters(new) == gone
        assert report.achieved["weights_before"] - report.achieved["weights_after"] == gone


def test_kinds_and_blocks_choose_the_maps():
    model = tiny("t5")
    assert {one.kind for one in select_layers(model, "attention")} == {"attention", "cross-attention"}
    some = select_layers(model, "ffn", [1])
    assert {(one.kind, one.block) for one in some} == {("feed-forward", 1)} and len(some) == 4
    new, report = compress.get("low-rank")(model, rank=0.5, kinds="ffn", blocks=[1])
    replaced = {name for name, module in new.named_modules() if isinstance(module, Factorised)}
    assert replaced == {one.name for one in some} == set(report.achieved["weight_error_by_layer"])
    with pytest.raises(BadSetting, match="kinds='mlp'"):
        select_layers(model, "mlp")
    with pytest.raises(BadSetting, match="no block 2, 7"):
        select_layers(model, "all", [0, 2, 7])
    with pytest.raises(NothingTouched):
        select_layers(model, "all", [])
    with pytest.raises(BadSetting, match="rank=33"):
        compress.get("low-rank")(model, rank=33)


def test_error_figures_by_hand():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    model, was = Two(), {"a": 3 * torch.eye(2), "b": 4 * torch.eye(2)}
    model.a.weight.data, model.b.weight.data = 3 * torch.eye(2), torch.zeros(2, 2)
    found = weight_figures(model, was)
    assert found["weight_error_by_layer"] == {"a": 0.0, "b": 1.0}
    assert found["weight_error"] == pytest.approx((32 / 50) ** 0.5)
    assert found["weight_error_geometric"] == pytest.approx(32**0.5 / (50**0.5 * 18**0.5) ** 0.5)
    assert found["weights_before"] == found["weights_after"] == 8
    model.a.weight.data.zero_()
    assert weight_figures(model, was)["weight_error_geometric"] is None


# --- activation-aware


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "albert"])
def test_activation_aware_is_never_above_plain_svd_on_its_inputs(family):
    model = tiny(family)
    batch = inputs(model, batch=8, length=20, padded=True)
    for rank in (0.2, 0.5, 1.0):
        _, report = compress.get("low-rank-aware")(model, Context(calibration=[batch]), rank=rank)
        pairs = report.achieved["output_error_by_layer"].values()
        assert all(pair["aware"] <= pair["svd"] * (1 + 1e-3) for pair in pairs)
        assert report.achieved["output_error"] < 0.98 * report.achieved["output_error_svd"]
        plain = compress.get("low-rank")(model, rank=rank)[1].achieved
        assert report.achieved["weight_error"] >= plain["weight_error"]  # it pays in weights
        assert report.achieved["rank_by_layer"] == plain["rank_by_layer"]


def test_activation_aware_errors_are_those_of_the_real_inputs():
    """The first block's query: its inputs are recorded, and an independent optimum is computed from them."""
    model = tiny("bert")
    batch, seen = inputs(model, batch=8, length=20), []
    query = model.bert.encoder.layer[0].attention.self.query
    handle = query.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32).double()))
    logits(model, batch)
    handle.remove()
    name, x, weight = "bert.encoder.layer.0.attention.self.query", seen[0], query.weight.double()
    new, report = compress.get("low-rank-aware")(model, Context(calibration=[batch]), rank=6, damping=1e-6)
    error = (x @ (weight - new.get_submodule(name).matrix().double()).T).norm() / (x @ weight.T).norm()
    error = error.detach()
    lengths = new.get_submodule(name).first.weight.norm(dim=1)
    torch.testing.assert_close(
        lengths, torch.ones(6)
    )  # as a plain SVD's, or an optimizer's step would be all of them
    assert report.achieved["output_error_by_layer"][name]["aware"] == pytest.approx(float(error), rel=1e-3)
    # the best rank-6 outputs are those of the SVD of the outputs themselves
    best = torch.linalg.svdvals((x @ weight.T).detach())[6:].norm() / (x @ weight.T).detach().norm()
    assert float(error) == pytest.approx(best.item(), rel=1e-3)


def test_a_rank_deficient_gram_is_no_trouble():
    model = tiny("bert")
    new, report = compress.get("low-rank-aware")(
        model, Context(calibration=[inputs(model, batch=1, length=3)]), rank=0.5
    )
    assert report.achieved["output_error"] <= report.achieved["output_error_svd"]
    assert all(p.isfinite().all() for p in new.parameters())


# --- Hadamard


def test_hadamard_layer_is_the_element_wise_product(tmp_path):
    a1, b1, a2, b2 = torch.randn(5, 2), torch.randn(2, 7), torch.randn(5, 2), torch.randn(2, 7)
    layer, x = Hadamard(a1, b1, a2, b2, torch.arange(5.0)), torch.randn(4, 7)
    weight = torch.tensor([[float((a1 @ b1)[i, j] * (a2 @ b2)[i, j]) for j in range(7)] for i in range(5)])
    torch.testing.assert_close(layer(x), x @ weight.T + torch.arange(5.0))
    for family in ("bert", "gpt2"):
        model = tiny(family)
        batch = inputs(model)
        new, report = compress.get("hadamard")(model, rank=1.0, steps=3)
        for one in anatomy.prunable(model):
            module = new.get_submodule(one.name)
            dense = copy.deepcopy(one.module)
            dense.weight.data = module.matrix().t() if one.conv1d else module.matrix()
            x = torch.randn(3, one.in_features)
            torch.testing.assert_close(module(x), dense(x))
        assert report.achieved["weights_after"] <= report.achieved["weights_before"]
        assert torch.equal(logits(reloaded(new, tmp_path / family), batch), logits(new, batch))


def test_alternating_least_squares_descends_and_finds_a_product_that_is_there():
    matrix = random_matrix(12, 16)
    plain = (matrix - torch.mm(*truncated_svd(matrix, 3))).norm()
    errors = []
    for steps in (0, 1, 3, 10, 30):
        a1, b1, a2, b2 = hadamard_factors(matrix, 3, steps=steps)
        errors.append(float((matrix - (a1 @ b1) * (a2 @ b2)).norm()))
    assert errors[0] == pytest.approx(float(plain))
    assert all(b <= a * (1 + 1e-9) for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.8 * errors[0]
    parts = [random_matrix(12, 1, seed=s) @ random_matrix(1, 16, seed=s + 9) for s in range(4)]
    product = (parts[0] + 0.1 * parts[1]) * (2 + 0.1 * parts[2])  # rank 2 times rank 2
    a1, b1, a2, b2 = hadamard_factors(product, 2, steps=200)
    assert (product - (a1 @ b1) * (a2 @ b2)).norm() < 1e-2 * product.norm()
    plain = (product - torch.mm(*truncated_svd(product, 2))).norm()
    assert plain > 2 * (product - (a1 @ b1) * (a2 @ b2)).norm()


# --- what comes after


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_low_rank_and_then_quantized_or_pruned_is_stored_as_it_is(family, tmp_path):
    model = tiny(family)
    batch = inputs(model)
    narrow, _ = compress.get("low-rank")(model, rank=1.0)
    for name, settings in (
        ("rtn", {"bits": 8}),
        ("gptq", {"bits": 8}),
        ("wanda", {"sparsity": 0.5}),
    ):
        both, report = compress.get(name)(narrow, Context(calibration=[batch]), **settings)
        assert report.layers == 2 * len(anatomy.prunable(model))
        again = reloaded(both, tmp_path / name)
        assert torch.equal(logits(again, batch), logits(both, batch))
        if name != "wanda":
            expected = logits(narrow, batch)
            assert (logits(both, batch) - expected).norm() < 0.1 * expected.norm()
            assert anatomy.count_parameters(again) == anatomy.count_parameters(narrow)
            assert bytes.file_bytes(tmp_path / name) < 0.8 * bytes.file_bytes(
                storage.save(narrow, tmp_path / "n", replace=True)
            )


def test_a_hadamard_product_can_be_rounded_and_says_so_where_text_is_needed(tmp_path):
    model = tiny("bert")
    batch = inputs(model)
    new, _ = compress.get("hadamard")(model, rank=1.0, steps=2)
    both, _ = compress.get("rtn")(new, bits=8)
    assert torch.equal(logits(reloaded(both, tmp_path), batch), logits(both, batch))
    with pytest.raises(BadData, match="hadamard"):
        compress.get("wanda")(new, Context(calibration=[batch]), sparsity=0.5)


def test_matrix_of_any_layer():
    conv1d = tiny("gpt2").transformer.h[0].attn.c_attn
    assert torch.equal(matrix_of(conv1d), conv1d.weight.t())


# --- analyses


def test_layer_speed_checks_what_it_times_and_finds_the_crossover():
    found = layer_speed(48, 32, ranks=[4, 8], rows=(1, 16), calls=3)
    assert found["break_even"] == 48 * 32 / 80 and [one["rows"] for one in found["crossover"]] == [1, 16]
    assert [(one["rows"], one["rank"]) for one in found["timings"]] == [
        (rows, rank) for rows in (1, 16) for rank in (None, 4, 8)
    ]
    assert all(one["error"] < 1e-4 and one["median_ms"] > 0 for one in found["timings"])
    assert kernels._crossing([10, 20, 30], [0.5, 0.9, 1.4]) == 22.0
    assert kernels._crossing([10, 20], [0.5, 0.9]) is None and kernels._crossing([10, 20], [1.5, 2.0]) == 0
    with pytest.raises(BadSetting, match="ranks="):
        layer_speed(8, 8, ranks=[])


def test_ranks_of_stacks_of_blocks(tmp_path):
    model = tiny("bert")
    with torch.no_grad():
        one, two = (layer.attention.self.query.weight for layer in model.bert.encoder.layer)
        one.copy_((random_matrix(32, 3) @ random_matrix(3, 32, seed=1)).float())
        two.copy_(-one + torch.outer(torch.arange(32.0), torch.ones(32)) * 1e-6)
        key, other = (layer.attention.self.key.weight for layer in model.bert.encoder.layer)
    model.save_pretrained(tmp_path)
    rows = {(row["kind"], row["role"]): row for row in shared_ranks(tmp_path)}
    assert len(rows) == 6 and rows["attention", "q"]["blocks"] == 2
    ranks = rows["attention", "q"]["ranks"]
    assert ranks["each"] <= 3 and ranks["stacked"] <= 3 and ranks["mean"] == 1
    found = rows["attention", "k"]["ranks"]
    values = torch.linalg.svdvals(torch.cat([key, other]).double().detach()).numpy()
    assert found["stacked"] == round(effective_rank(values) * 32)
    values = torch.linalg.svdvals(torch.cat([key, other], dim=1).double().detach()).numpy()
    assert found["concatenated"] == round(effective_rank(values) * 32)
    values = torch.linalg.svdvals(((key - other) / 2).double().detach()).numpy()
    assert found["differences stacked"] == round(effective_rank(values) * 32)
