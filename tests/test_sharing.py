from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCAB, inputs, tiny

from lmcompress import compress
from lmcompress.compress import Context, abaco
from lmcompress.compress.low_rank import rank_for
from lmcompress.compress.low_rank_layers import Adapted, Factorised
from lmcompress.compress.masks import kept_masks
from lmcompress.compress.sharing import _Bases, first_basis, joint_fit, series_of
from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models import anatomy, storage
from lmcompress.train.trainer import TrainSpec, fit

QUERY = "bert.encoder.layer.{}.attention.self.query"


def spec(**changes):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (24, 8), generator=draw).tolist()
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.0}
    return TrainSpec(
        **({"features": [{"input_ids": one, "labels": one} for one in ids]} | settings | changes)
    )


@torch.no_grad()
def logits(model):
    return model.eval()(**inputs(model, padded=True)).logits


def reloaded(model, folder):
    return storage.load(storage.save(model, folder))[0]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def relative(matrices, basis, lefts):
    return float((matrices - lefts @ basis).norm() / matrices.norm())


# --- a global basis


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
    new, report = compress.get("global-basis")(model, rank=2.0, init="stacked")
    expected = logits(model)
    assert (logits(new) - expected).norm() < 1e-4 * expected.norm()
    again = reloaded(new, tmp_path)
    assert torch.equal(logits(again), logits(new))
    maps = anatomy.prunable(model)
    for one in (new, again):
        for series in series_of(maps):
            bases = {id(one.get_submodule(member.name).first.weight) for member in series}
            assert len(bases) == 1 and len(series) == 2
    saved = sum(
        2 * s[0].weight2d().numel() - rank * (s[0].in_features + 2 * s[0].out_features)
        for s in series_of(maps)
        for rank in [rank_for(2.0, s[0].out_features, s[0].in_features, layers=2)]
    )
    assert anatomy.count_parameters(model) - saved == anatomy.count_parameters(new)
    assert anatomy.count_parameters(again) == anatomy.count_parameters(new)
    assert report.achieved["weights_before"] - report.achieved["weights_after"] == saved


def test_the_same_fraction_is_the_same_bytes_as_local_svd():
    model = tiny("bert", hidden_size=96, intermediate_size=192)
    for fraction in (0.25, 0.5, 0.9):
        shared, local = (
            compress.get(name)(model, rank=fraction, **more)[1].achieved
            for name, more in (("global-basis", {"init": "stacked"}), ("low-rank", {}))
        )
        assert shared["weights_after"] == pytest.approx(local["weights_after"], rel=0.05)
        assert local["weights_after"] == pytest.approx(fraction * local["weights_before"], rel=0.05)


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
    mean, stacked, joint = (
        compress.get("global-basis")(model, rank=5, init=i, joint_steps=s)[1].achieved["weight_error"]
        for i, s in (("mean", 0), ("stacked", 0), ("mean", 100))
    )
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
    for wrong in ({"init": "zeros"}, {"joint_steps": -1}, {"init": "random", "joint_steps": 2}, {"rank": 99}):
        with pytest.raises(BadSetting):
            compress.get("global-basis")(tiny("bert"), **({"rank": 0.5} | wrong))


# --- GLAM


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
    again = reloaded(new, tmp_path / "m")
    assert torch.equal(logits(again), logits(new))
    assert anatomy.count_parameters(again) == anatomy.count_parameters(new)
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


# --- MASS


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
    assert torch.equal(logits(again), logits(new))
    assert anatomy.count_parameters(again) == anatomy.count_parameters(new) < anatomy.count_parameters(model)
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
    again = reloaded(new, tmp_path)
    assert torch.equal(logits(again), logits(new))
    assert anatomy.count_parameters(again) == anatomy.count_parameters(new)


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


# --- ABACO


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
        assert own == {
            f"{one.name}.first.weight": (rank, one.in_features),
            f"{one.name}.second.weight": (one.out_features, rank),
        }
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


def test_bad_settings_are_refused():
    for name, wrong in (
        ("abaco", {"schedule": "cosine"}),
        ("abaco", {"start": 0.0}),
        ("glam", {"distance": "l2"}),
        ("glam", {"every": 0}),
        ("glam", {"threshold": -1.0}),
    ):
        with pytest.raises(BadSetting):
            compress.get(name)(tiny("bert"), Context(train=spec()), rank=0.5, **wrong)
