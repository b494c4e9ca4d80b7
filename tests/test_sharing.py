import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, VOCAB, inputs, logits, reloaded, tiny
from torch import nn

from lmcompress import compress
from lmcompress.compress import Context, abaco
from lmcompress.compress.low_rank import (
    break_even,
    hadamard_factors,
    rank_for,
    select_layers,
    truncated_svd,
    weight_figures,
)
from lmcompress.compress.low_rank_layers import Adapted, Factorised, Hadamard
from lmcompress.compress.masks import kept_masks
from lmcompress.compress.sharing import _Bases, first_basis, joint_fit, series_of
from lmcompress.errors import BadData, BadSetting, NothingTouched
from lmcompress.measure import kernels
from lmcompress.measure.kernels import layer_speed
from lmcompress.models import anatomy, storage
from lmcompress.train.trainer import TrainSpec, fit
from lmcompress.weights.spectra import effective_rank, shared_ranks

QUERY = "bert.encoder.layer.{}.attention.self.query"


def spec(**changes):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (24, 8), generator=draw).tolist()
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.0}
    return TrainSpec(
        **({"features": [{"input_ids": one, "labels": one} for one in ids]} | settings | changes)
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def relative(matrices, basis, lefts):
    return float((matrices - lefts @ basis).norm() / matrices.norm())


def test_the_stacked_basis_is_the_optimum_and_alternation_reaches_it():
    draw = torch.Generator().manual_seed(1)
    common = torch.randn(5, 12, generator=draw, dtype=torch.float64)
    matrices = torch.randn(3, 9, 5, generator=draw, dtype=torch.float64) @ common
    matrices = matrices + 0.5 * torch.randn(3, 9, 12, generator=draw, dtype=torch.float64)
    values = torch.linalg.svdvals(matrices.reshape(27, 12))
    best = float(values[4:].norm() / values.norm())
    errors = {}
    for init in ("mean", "stacked", "random"):
        basis = first_basis(matrices, 4, init, torch.Generator().manual_seed(0))
        for steps in (0, 1, 300):
            errors[init, steps] = relative(matrices, *joint_fit(matrices, basis, steps))
    assert errors["stacked", 0] == pytest.approx(best)
    assert best < errors["mean", 0] < errors["random", 0]
    for init in ("mean", "random"):
        assert errors[init, 0] >= errors[init, 1] >= errors[init, 300] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_full_rank_basis_is_shared_counted_once_and_reloaded_as_one_tensor(family, tmp_path):
    model = tiny(family)
    new, report = compress.get("global-basis")(model, rank=2.5, init="stacked")
    expected = logits(model)
    assert (logits(new) - expected).norm() < 1e-4 * expected.norm()
    again = reloaded(new, tmp_path)
    maps = anatomy.prunable(model)
    for one in (new, again):
        for series in series_of(maps):
            bases = {id(one.get_submodule(member.name).first.weight) for member in series}
            assert len(bases) == 1 and len(series) == 2
    saved = 0
    for one, _ in series_of(maps):
        rank = rank_for(2.5, one.out_features, one.in_features, layers=2)
        saved += 2 * one.weight2d().numel() - rank * (one.in_features + 2 * one.out_features)
    assert anatomy.count_parameters(model) - saved == anatomy.count_parameters(new)
    assert report.achieved["weights_before"] - report.achieved["weights_after"] == saved


@pytest.mark.parametrize("init", ["mean", "stacked", "random"])
def test_nothing_of_the_original_changes(init):
    model = tiny("bert")
    before = weights(model)
    compress.get("global-basis")(model, rank=0.5, init=init)
    # On the registry's function itself, which is handed a copy: layer 0 was overwritten by a running mean
    # once.
    originals = {one.name: one.weight2d() for one in anatomy.prunable(model)}
    copies = {name: weight.clone() for name, weight in originals.items()}
    compress.get("global-basis").function(model, Context(), rank=0.5, init=init)
    assert all(torch.equal(originals[name], copies[name]) for name in copies)
    now = weights(tiny("bert"))
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_each_init_is_what_it_says():
    model = tiny("bert")
    pair = [model.get_submodule(QUERY.format(i)).weight.detach().double() for i in (0, 1)]
    for init, source in (("mean", (pair[0] + pair[1]) / 2), ("stacked", torch.cat(pair))):
        new, _ = compress.get("global-basis")(model, rank=5, init=init)
        right = torch.linalg.svd(source).Vh[:5]
        for i, weight in enumerate(pair):
            expected = (weight @ right.T @ right).float()
            torch.testing.assert_close(
                new.get_submodule(QUERY.format(i)).matrix(), expected, atol=1e-5, rtol=0
            )
    fits = [("mean", 0), ("stacked", 0), ("mean", 100)]
    made = [compress.get("global-basis")(model, rank=5, init=init, joint_steps=n)[1] for init, n in fits]
    mean, stacked, joint = (report.achieved["weight_error"] for report in made)
    assert stacked < joint + 1e-6 < mean


def test_a_random_basis_stays_frozen_in_training_and_when_reloaded(tmp_path):
    model = tiny("bert")
    new, _ = compress.get("global-basis")(model, rank=0.5, init="random")
    again = reloaded(new, tmp_path)
    for one in (new, again):
        layer = one.get_submodule(QUERY.format(0))
        basis, left = layer.first.weight.clone(), layer.second.weight.clone()
        assert not layer.first.weight.requires_grad
        fit(one, spec(), masks=kept_masks(one))
        assert torch.equal(layer.first.weight, basis) and not torch.equal(layer.second.weight, left)
    other, _ = compress.get("global-basis")(model, Context(seed=1), rank=0.5, init="random")
    assert not torch.equal(other.get_submodule(QUERY.format(0)).first.weight, basis)


def test_what_cannot_be_shared_is_refused():
    for name, more in (("global-basis", {"rank": 0.5}), ("mass", {})):
        with pytest.raises(NothingTouched, match="share"):
            compress.get(name)(tiny("albert"), **more)
        with pytest.raises(NothingTouched, match="share"):
            compress.get(name)(tiny("bert"), blocks=[1], **more)
    context = Context(train=spec())
    for name, wrong in (("abaco", {"schedule": "cosine"}), ("abaco", {"start": 0.0}), ("glam", {"every": 0})):
        pytest.raises(BadSetting, compress.get(name), tiny("bert"), context, rank=0.5, **wrong)
    for wrong in ({"distance": "l2"}, {"threshold": -1.0}):
        pytest.raises(BadSetting, compress.get("glam"), tiny("bert"), context, rank=0.5, **wrong)
    for wrong in ({"init": "zeros"}, {"joint_steps": -1}, {"init": "random", "joint_steps": 2}, {"rank": 99}):
        with pytest.raises(BadSetting):
            compress.get("global-basis")(tiny("bert"), **({"rank": 0.5} | wrong))


def factorised(*bases):
    layers_ = {f"l{i}": Factorised(g, torch.ones(2, len(g)), None) for i, g in enumerate(bases)}
    return layers_, _Bases(layers_, dict.fromkeys(layers_, "encoder"))


def test_the_penalty_is_the_sum_over_pairs_with_its_gradient():
    draws = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    layers_, bases = factorised(*draws, torch.randn(2, 4))  # the last has another shape, and no pair
    parameters = [layers_[f"l{i}"].first.weight for i in range(4)]
    pairs = sum((parameters[i] - parameters[j]).abs().sum() for i in range(4) for j in range(i))
    torch.testing.assert_close(bases.penalty(), pairs)
    found, expected = (torch.autograd.grad(one, parameters) for one in (bases.penalty(), pairs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_closest_pair_is_merged_to_its_mean_below_the_threshold():
    layers_, bases = factorised(torch.zeros(1, 2) + 4, torch.zeros(1, 2), torch.zeros(1, 2) + 1)
    assert bases.merge(2.0, "l1") is None  # the closest are 2 apart
    assert bases.merge(2.1, "l1") == {"layers": [["l1"], ["l2"]], "distance": 2.0}
    assert bases.assignment() == [0, 1, 1]
    assert layers_["l1"].first.weight is layers_["l2"].first.weight
    torch.testing.assert_close(layers_["l2"].first.weight.data, torch.full((1, 2), 0.5))
    # relative: 7 / (sqrt(8) sqrt(1)); the mean weighs the two layers against the one
    merged = bases.merge(2.5, "relative")
    assert merged["distance"] == pytest.approx(7 / 8**0.5, rel=1e-3) and bases.assignment() == [0, 0, 0]
    torch.testing.assert_close(layers_["l0"].first.weight.data, torch.full((1, 2), (4 + 2 * 0.5) / 3))
    assert bases.merge(1e9, "l1") is None


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_glam_merges_while_training_and_keeps_what_it_merged(family, tmp_path):
    model = tiny(family)
    new, report = compress.get("glam")(
        model, Context(train=spec(steps=9, checkpoint=tmp_path / "c")), rank=0.5, every=2, threshold=9.0
    )
    found = report.achieved
    assert [one["step"] for one in found["merges"]] == [2, 4, 6, 8] and not (tmp_path / "c").exists()
    assert [step for step, _ in found["basis_by_layer"]] == [0, 2, 4, 6, 8]
    assert found["basis_by_layer"][0][1] == list(range(len(found["basis_layers"])))
    bases = [new.get_submodule(name).first.weight for name in found["basis_layers"]]
    assert len({id(one) for one in bases}) == found["bases"] == len(bases) - 4
    last = found["basis_by_layer"][-1][1]
    assert all(
        (bases[i] is bases[j]) == (last[i] == last[j]) for i in range(len(last)) for j in range(len(last))
    )
    local = compress.get("low-rank")(model, rank=0.5)[1].achieved["weights_after"]
    once = {id(one): one.numel() for one in bases}
    assert local - found["weights_after"] == sum(one.numel() for one in bases) - sum(once.values()) > 0
    reloaded(new, tmp_path / "m")
    assert len(found["curve"]["train"]) == 9


def test_the_penalty_pulls_the_bases_together_and_without_it_glam_is_fine_tuning():
    model = tiny("bert")

    def spread(weight):
        new, report = compress.get("glam")(
            model, Context(train=spec(steps=20, learning_rate=1e-2)), rank=0.5, weight=weight, threshold=0.0
        )
        assert report.achieved["merges"] == []
        found = {n: m for n, m in new.named_modules() if isinstance(m, Factorised)}
        return float(_Bases(found, dict.fromkeys(found, "")).penalty().detach()), new

    apart, plain = spread(0.0)
    assert spread(1.0)[0] < 0.95 * apart
    local, _ = compress.get("low-rank")(model, rank=0.5)
    fit(local, spec(steps=20, learning_rate=1e-2))
    assert torch.equal(logits(local), logits(plain))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_mass_is_the_mean_in_one_module(family, tmp_path):
    model = tiny(family)
    new, report = compress.get("mass")(model)
    for series in series_of(anatomy.prunable(model)):
        modules = {new.get_submodule(one.name) for one in series}
        assert len(modules) == 1
        (shared,) = modules
        torch.testing.assert_close(shared.weight, sum(one.weight2d() for one in series) / len(series))
        if series[0].module.bias is not None:
            torch.testing.assert_close(shared.bias, sum(one.module.bias for one in series) / len(series))
    assert report.achieved["weights_after"] * 2 == report.achieved["weights_before"]
    again = reloaded(new, tmp_path)
    assert anatomy.count_parameters(new) < anatomy.count_parameters(model)
    assert len({id(again.get_submodule(one.name)) for one in series}) == 1


def test_mass_leaves_the_blocks_that_take_no_part():
    model = tiny("bert", num_hidden_layers=4)
    new, report = compress.get("mass")(model, blocks=[1, 3], kinds="attention")
    assert report.layers == 8 and report.achieved["maps"] == 4
    assert new.get_submodule(QUERY.format(1)) is new.get_submodule(QUERY.format(3))
    for i in (0, 2):
        old, kept = (one.get_submodule(QUERY.format(i)) for one in (model, new))
        assert torch.equal(old.weight, kept.weight)
    mean = (model.get_submodule(QUERY.format(1)).weight + model.get_submodule(QUERY.format(3)).weight) / 2
    torch.testing.assert_close(new.get_submodule(QUERY.format(1)).weight, mean)


@pytest.mark.parametrize("recover", ["shared", "all", "lora", "lora-per-block"])
def test_each_recovery_trains_what_it_says(recover, tmp_path):
    model = tiny("bert")
    start, _ = compress.get("mass")(model)
    new, report = compress.get("mass-trained")(model, Context(train=spec()), recover=recover, rank=4)
    assert len(report.achieved["curve"]["train"]) == 6
    table = "bert.embeddings.word_embeddings.weight"
    before, after = start.state_dict(), new.state_dict()
    assert torch.equal(before[table], after[table]) == (recover != "all")
    first, second = (new.get_submodule(QUERY.format(i)) for i in (0, 1))
    assert all(p.requires_grad for p in new.parameters())
    if recover == "lora-per-block":
        assert isinstance(first, Adapted) and first is not second and first.base is second.base
        assert torch.equal(first.base.weight, start.get_submodule(QUERY.format(0)).weight)
        assert first.scale == 2 and first.dropout == 0.05
        assert not torch.equal(first.second.weight, second.second.weight)
        change = first.matrix() - first.base.weight
        assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 4 and change.any()
    else:
        assert first is second and type(first) is torch.nn.Linear
        change = first.weight - start.get_submodule(QUERY.format(0)).weight
        assert change.abs().max() > 0
        assert (torch.linalg.matrix_rank(change.detach(), rtol=1e-3) <= 4) == (recover == "lora")
        assert anatomy.count_parameters(new) == anatomy.count_parameters(start)
    reloaded(new, tmp_path)


def test_a_lora_begins_as_the_map_and_its_ranks_are_checked():
    base = torch.nn.Linear(6, 4)
    layer, x = Adapted(base, rank=2, scale=2.0, dropout=0.5), torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    layer.second.weight.data.normal_()
    layer.alpha = 0.5
    by_hand = 0.5 * x @ base.weight.T + base.bias + 2 * (x @ layer.first.weight.T) @ layer.second.weight.T
    torch.testing.assert_close(layer.eval()(x), by_hand)
    torch.testing.assert_close(x @ layer.matrix().T + base.bias, by_hand)
    with pytest.raises(BadSetting, match="recover="):
        compress.get("mass-trained")(tiny("bert"), Context(train=spec()), recover="none")
    with pytest.raises(BadSetting, match="rank=33"):
        compress.get("mass-trained")(tiny("bert"), Context(train=spec()), recover="lora", rank=33)


def test_alpha_falls_along_the_schedules():
    linear = [abaco.alpha_at(t / 4, start=0.8, schedule="linear") for t in range(5)]
    assert linear == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert abaco.alpha_at(1.0, start=0.8, schedule="exponential") == 0.8 / 32
    assert abaco.alpha_at(0.2, start=1.0, schedule="exponential") == 0.5


@pytest.mark.parametrize(
    ("family", "schedule"), [("bert", "linear"), ("gpt2", "exponential"), ("t5", "linear")]
)
def test_abaco_trains_only_the_pair_and_its_file_has_no_dense_weight(family, schedule, tmp_path):
    model, train = tiny(family), spec()
    train = replace(train, evaluate=train.features[:4])
    new, report = compress.get("abaco")(model, Context(train=train), rank=0.5, schedule=schedule)
    maps = anatomy.prunable(model)
    file = load_file(storage.save(new, tmp_path) / storage.WEIGHTS)
    for one in maps:
        rank = rank_for(0.5, one.out_features, one.in_features)
        own = {n: tuple(t.shape) for n, t in file.items() if n.startswith(f"{one.name}.") and t.dim() == 2}
        first, second = (f"{one.name}.{part}.weight" for part in ("first", "second"))
        assert own == {first: (rank, one.in_features), second: (one.out_features, rank)}
        assert new.get_submodule(one.name).second.weight.any()
        bias = new.get_submodule(one.name).second.bias
        assert bias is None or torch.equal(bias, one.module.bias)
    old, now = model.state_dict(), new.state_dict()
    assert all(torch.equal(old[name], now[name]) for name in old if name in now)
    jump = report.achieved["final_jump"]
    assert jump["alpha"] == (0 if schedule == "linear" else 1 / 32)
    assert (jump["loss_before"] == jump["loss_after"]) == (schedule == "linear")
    assert all(p.requires_grad for p in new.parameters())
    assert torch.equal(logits(storage.load(tmp_path)[0]), logits(new))


def test_abaco_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    model = tiny("bert")
    expected, report = compress.get("abaco")(model, Context(train=spec()), rank=4)
    train = spec(checkpoint=tmp_path, checkpoint_every=1)

    def stopped(model, train, *, before_step):
        def until(step, done):
            before_step(step, done)
            if step == 4:
                raise KeyboardInterrupt

        return fit(model, train, before_step=until)

    with monkeypatch.context() as patch:
        patch.setattr(abaco, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            compress.get("abaco")(model, Context(train=train), rank=4)
    found, again = compress.get("abaco")(model, Context(train=train), rank=4)
    assert torch.equal(logits(found), logits(expected))
    assert again.achieved["curve"]["train"] == report.achieved["curve"]["train"]


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    pytest.raises(BadSetting, rank_for, rank, 8, 20).match("rank=")


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
def test_the_svd_is_the_optimum(shape):
    low = random_matrix(6, 2) @ random_matrix(2, 10, seed=1)
    torch.testing.assert_close(torch.mm(*truncated_svd(low, 3)), low)
    assert not torch.mm(*truncated_svd(torch.zeros(4, 6), 2)).any()
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


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_same_outputs_also_reloaded(family, tmp_path):
    model = tiny(family)
    batch, maps = inputs(model, padded=True), len(anatomy.prunable(model))
    expected = logits(model, batch)
    for name in ("low-rank", "low-rank-aware"):
        new, report = compress.get(name)(model, Context(calibration=[batch]), rank=2.5)
        found = logits(new, batch)
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert report.layers == maps == len(report.achieved["rank_by_layer"])
        assert report.achieved["weight_error"] < 1e-6
        assert len(anatomy.prunable(new)) == 2 * maps  # what comes next sees the narrow maps
    reloaded(new, tmp_path, batch)


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
        maps = anatomy.prunable(model)
        gone = sum(m.weight2d().numel() - 5 * (m.in_features + m.out_features) for m in maps)
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
    pytest.raises(BadSetting, select_layers, model, "mlp").match("kinds='mlp'")
    pytest.raises(BadSetting, select_layers, model, "all", [0, 2, 7]).match("no block 2, 7")
    pytest.raises(NothingTouched, select_layers, model, "all", [])
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


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "albert"])
def test_activation_aware_is_never_above_plain_svd_on_its_inputs(family):
    model = tiny(family)
    batch = inputs(model, batch=8, length=20, padded=True)
    for rank in (0.2, 0.5, 0.99):
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
    torch.testing.assert_close(lengths, torch.ones(6))  # as a plain SVD's
    assert report.achieved["output_error_by_layer"][name]["aware"] == pytest.approx(float(error), rel=1e-3)
    # the best rank-6 outputs are those of the SVD of the outputs themselves
    best = torch.linalg.svdvals((x @ weight.T).detach())[6:].norm() / (x @ weight.T).detach().norm()
    assert float(error) == pytest.approx(best.item(), rel=1e-3)


def test_hadamard_layer_is_the_element_wise_product(tmp_path):
    a1, b1, a2, b2 = torch.randn(5, 2), torch.randn(2, 7), torch.randn(5, 2), torch.randn(2, 7)
    layer, x = Hadamard(a1, b1, a2, b2, torch.arange(5.0)), torch.randn(4, 7)
    weight = torch.tensor([[float((a1 @ b1)[i, j] * (a2 @ b2)[i, j]) for j in range(7)] for i in range(5)])
    torch.testing.assert_close(layer(x), x @ weight.T + torch.arange(5.0))
    for family in ("bert", "gpt2"):
        model = tiny(family)
        new, report = compress.get("hadamard")(model, rank=0.99, steps=3)
        for one in anatomy.prunable(model):
            module = new.get_submodule(one.name)
            dense = copy.deepcopy(one.module)
            dense.weight.data = module.matrix().t() if one.conv1d else module.matrix()
            x = torch.randn(3, one.in_features)
            torch.testing.assert_close(module(x), dense(x))
        assert report.achieved["weights_after"] <= report.achieved["weights_before"]
        reloaded(new, tmp_path / family)


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


def test_a_hadamard_product_can_be_rounded_and_says_so_where_text_is_needed(tmp_path):
    model = tiny("bert")
    batch = inputs(model)
    new, _ = compress.get("hadamard")(model, rank=0.99, steps=2)
    both, _ = compress.get("rtn")(new, bits=8)
    reloaded(both, tmp_path)
    with pytest.raises(BadData, match="hadamard"):
        compress.get("wanda")(new, Context(calibration=[batch]), sparsity=0.5)


def test_layer_speed_checks_what_it_times_and_finds_the_crossover():
    found = layer_speed(48, 32, ranks=[4, 8], rows=(1, 16), calls=3)
    assert found["break_even"] == 48 * 32 / 80 and [one["rows"] for one in found["crossover"]] == [1, 16]
    order = [(rows, rank) for rows in (1, 16) for rank in (None, 4, 8)]
    assert [(one["rows"], one["rank"]) for one in found["timings"]] == order
    assert all(one["error"] < 1e-4 and one["median_ms"] > 0 for one in found["timings"])
    assert kernels._crossing([10, 20, 30], [0.5, 0.9, 1.4]) == 22.0
    assert kernels._crossing([10, 20], [0.5, 0.9]) is None and kernels._crossing([10, 20], [1.5, 2.0]) == 0
    pytest.raises(BadSetting, layer_speed, 8, 8, ranks=[]).match("ranks=")


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
