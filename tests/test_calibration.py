"""Calibration against plain hooks on whole-model forwards, padding, sharing, and what stays in memory."""

import copy
import gc

import pytest
import torch
from tiny_models import FAMILIES, inputs, kind, tiny
from torch import nn

from lmcompress.compress.calibration import calibrate
from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import anatomy, prunable


@torch.no_grad()
def by_hooks(model: nn.Module, batches: list[dict]) -> dict[str, dict]:
    """Gram, squares and tokens of every map's input, from forwards of the whole model, in float64."""
    sums: dict[str, dict] = {}
    for batch in batches:

        def hook(one, mask):
            def observe(_, args):
                rows = args[0].double().reshape(-1, args[0].shape[-1])
                if mask is not None:
                    rows = rows[mask.flatten().bool()]
                entry = sums.setdefault(one.name, {"gram": 0, "norm_sq": 0, "tokens": 0})
                entry["gram"] = entry["gram"] + rows.T @ rows
                entry["norm_sq"] = entry["norm_sq"] + (rows**2).sum(0)
                entry["tokens"] += len(rows)

            return one.module.register_forward_pre_hook(observe)

        handles = []
        for one in prunable(model):
            from_encoder = one.kind == "cross-attention" and one.role in ("k", "v")
            own = one.stack != "decoder" or kind_of(model) != "encoder-decoder"
            mask = batch["attention_mask"] if own or from_encoder else batch.get("decoder_attention_mask")
            handles.append(hook(one, mask))
        model(**batch)
        for handle in handles:
            handle.remove()
    return sums


def kind_of(model: nn.Module) -> str:
    return anatomy(model).kind


def batches_for(model: nn.Module) -> list[dict]:
    """Three batches of different lengths, the second padded (decoder side too)."""
    shapes = ({}, {"length": 7, "padded": True}, {"batch": 1})
    batches = [inputs(model, seed=seed, **shape) for seed, shape in enumerate(shapes, start=1)]
    if "decoder_input_ids" in batches[1]:
        mask = torch.ones_like(batches[1]["decoder_input_ids"])
        mask[0, -2:] = 0
        batches[1]["decoder_attention_mask"] = mask
    return batches


def assert_stats_equal(stats: dict, sums: dict) -> None:
    assert set(stats) == set(sums)
    for name, stat in stats.items():
        scale = float(sums[name]["gram"].abs().max())
        assert stat.tokens == sums[name]["tokens"], name
        assert stat.gram.dtype == stat.norm_sq.dtype == torch.float32
        torch.testing.assert_close(stat.gram.double(), sums[name]["gram"], atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(stat.norm_sq.double(), sums[name]["norm_sq"], atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("head", ["lm", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_an_unchanged_model_are_those_of_plain_hooks(family, head):
    model = tiny(family, head)
    batches, state = batches_for(model), copy.deepcopy(model.state_dict())
    want = by_hooks(model, batches)
    stats, names = {}, []
    for step in calibrate(model, batches):
        stats |= step.stats
        names.append(step.block.name)
    assert names == [block.name for block in anatomy(model).blocks]
    assert_stats_equal(stats, want)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_later_blocks_see_what_the_changed_blocks_give(family):
    """Every step's statistics equal those of a whole forward of the model as changed so far."""
    model = tiny(family)
    batches = batches_for(model)
    generator = torch.Generator().manual_seed(1)
    for step in calibrate(model, batches):
        now = by_hooks(model, batches)
        assert_stats_equal(step.stats, {name: now[name] for name in step.stats})
        with torch.no_grad():
            for parameter in step.block.module.parameters():
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.6)


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_count(family, head):
    """One padded batch gives the statistics of its rows, each cut to its own length."""
    model = tiny(family, head)
    padded = inputs(model, padded=True)
    rows = []
    for i, length in enumerate(padded["attention_mask"].sum(1)):
        row = {name: value[i : i + 1] for name, value in padded.items()}
        rows.append(row | {name: row[name][:, :length] for name in ("input_ids", "attention_mask")})
    together = {n: s for step in calibrate(model, [padded]) for n, s in step.stats.items()}
    apart = {n: s for step in calibrate(model, rows) for n, s in step.stats.items()}
    for name, stat in together.items():
        assert stat.tokens == apart[name].tokens
        scale = float(apart[name].gram.abs().max())
        torch.testing.assert_close(stat.gram, apart[name].gram, atol=1e-5 * scale, rtol=0)
    if kind(family) != "encoder-decoder" and family != "albert":
        assert {stat.tokens for stat in together.values()} == {int(padded["attention_mask"].sum())}


def test_labels_tell_which_decoder_positions_count():
    model = tiny("t5")
    batch = inputs(model)
    labels = batch.pop("decoder_input_ids")
    labels[1, -3:] = -100
    steps = list(calibrate(model, [batch | {"labels": labels}], collect=("norm",)))
    assert all(stat.gram is None and stat.norm_sq is not None for s in steps for stat in s.stats.values())
    tokens = {name: stat.tokens for step in steps for name, stat in step.stats.items()}
    assert tokens["decoder.block.1.layer.2.DenseReluDense.wi"] == 3 * 7 - 3
    assert tokens["decoder.block.1.layer.1.EncDecAttention.k"] == 3 * 9


def test_a_map_shared_between_blocks_comes_with_the_first():
    model = tiny("bert")
    layers = model.bert.encoder.layer
    layers[1].output.dense = layers[0].output.dense
    first, second = (set(step.stats) for step in calibrate(model, batches_for(model)))
    assert (len(first), len(second)) == (6, 5)


@pytest.mark.parametrize(
    "shape", [{}, {"inner_group_num": 2}, {"num_hidden_groups": 2, "num_hidden_layers": 4}]
)
def test_albert_sums_over_the_runs_of_a_shared_block_and_yields_it_once(shape):
    model = tiny("albert", **({"num_hidden_layers": 3} | shape))
    batches = batches_for(model)
    want = by_hooks(model, batches)
    steps = list(calibrate(model, batches))
    assert [step.block.name for step in steps] == [block.name for block in anatomy(model).blocks]
    assert_stats_equal({name: stat for step in steps for name, stat in step.stats.items()}, want)


def test_replaced_maps_are_run_and_observed_inside():
    """The consumer may factorize a map: later blocks see its output, and a second pass its inner maps."""

    class Factors(nn.Module):
        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.first = nn.Linear(self.in_features, 4, bias=False)
            self.second = nn.Linear(4, self.out_features, bias=False)

        def forward(self, x):
            return self.second(self.first(x))

    model = tiny("llama")
    batches = batches_for(model)
    for step in calibrate(model, batches):
        if step.block.index == 0:
            step.block.module.mlp.down_proj = Factors(step.block.module.mlp.down_proj)
        else:
            now = by_hooks(model, batches)
            assert_stats_equal(step.stats, {name: now[name] for name in step.stats})
    again = {name: stat for step in calibrate(model, batches) for name, stat in step.stats.items()}
    assert again["model.layers.0.mlp.down_proj.second"].gram.shape == (4, 4)


def test_bfloat16_models_are_summed_in_float32():
    model = tiny("llama").bfloat16()
    batches = [inputs(model, batch=8, length=40, seed=seed) for seed in range(3)]
    stats = {name: stat for step in calibrate(model, batches) for name, stat in step.stats.items()}
    assert_stats_equal(stats, by_hooks(model, batches))


def new_values(model: nn.Module) -> int:
    """Number of values in tensors made since `gc.freeze` that are not the model's own."""
    gc.collect()
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in tensors}
    return sum(size for pointer, size in sizes.items() if pointer not in mine)


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3", "t5", "bart"])
def test_what_is_kept_does_not_grow_with_depth(family):
    def most(blocks: int) -> int:
        deeper = {
            "t5": {"num_layers": blocks, "num_decoder_layers": blocks},
            "bart": {"encoder_layers": blocks, "decoder_layers": blocks},
            "gemma3": {"num_hidden_layers": blocks, "layer_types": ["sliding_attention"] * blocks},
        }
        model = tiny(family, **deeper.get(family, {"num_hidden_layers": blocks}))
        batches = [inputs(model, length=40, padded=True, seed=seed) for seed in range(4)]
        gc.collect()
        gc.freeze()  # the rest of the process need not be walked at every step
        try:
            return max(new_values(model) for _ in calibrate(model, batches, collect=("norm",)))
        finally:
            gc.unfreeze()

    assert most(9) <= most(3) * 1.05


def test_the_model_is_left_as_it_was_when_the_consumer_stops_early():
    model = tiny("bart").train()
    steps = calibrate(model, [inputs(model)])
    next(steps)
    assert torch.is_grad_enabled()
    steps.close()
    assert model.training
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_bad_requests():
    model = tiny("bert")
    pytest.raises(BadData, next, calibrate(model, [])).match("no calibration batches")
    pytest.raises(BadSetting, next, calibrate(model, [inputs(model)], collect=("hessian",))).match("norm")
    empty = inputs(model)
    empty["attention_mask"] = torch.zeros_like(empty["attention_mask"])
    pytest.raises(BadData, next, calibrate(model, [empty])).match("padding")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    pytest.raises(BadWeights, next, calibrate(model, [inputs(model)])).match("attention")
