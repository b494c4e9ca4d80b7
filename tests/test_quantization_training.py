"""Training on the grid, scaling before rounding, bytes divided by measured change: by hand, and on every
family.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from lmcompress import compress
from lmcompress.compress import Context, quantization, sensitivity
from lmcompress.compress.calibration import calibrate
from lmcompress.compress.qat import OnGrid, round_inputs
from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.measure import bytes
from lmcompress.models import packed as packing
from lmcompress.models import storage
from lmcompress.models.anatomy import prunable
from lmcompress.models.families import integer_layers
from lmcompress.models.packed import Int8DynamicLinear, QuantizedLinear, store_as_integers
from lmcompress.train.trainer import TrainSpec, fit, validation_loss
from tests.test_pruning import batches
from tests.tiny_models import FAMILIES, VOCAB, inputs, kind, tiny


def spec(**changes) -> TrainSpec:
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, VOCAB, 10).tolist() for _ in range(24)]
    features = [{"input_ids": row, "attention_mask": [1] * 10, "labels": row} for row in rows]
    found = {"features": features, "steps": 3, "batch_size": 8, "learning_rate": 1e-2}
    return TrainSpec(**found | {"evaluate": features[:8], "evaluate_every": 3} | changes)


def layers_of(model) -> dict[str, QuantizedLinear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, QuantizedLinear)}


# Quantization-aware training


def test_the_forward_is_on_the_grid_and_the_gradient_goes_straight_through():
    weight = torch.tensor([[3.5, -3.5, 1.2, -0.6, 0.0]], requires_grad=True)
    x, target = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0]), 2.0
    for conv1d in (False, True):
        grid = OnGrid(conv1d, bits=3, group_size=None, symmetric=True)
        rounded = grid(weight.t() if conv1d else weight)
        flat = rounded.flatten()
        assert flat.tolist() == [3, -4, 1, -1, 0] and rounded.shape == ((5, 1) if conv1d else (1, 5))
        (gradient,) = torch.autograd.grad((flat @ x - target) ** 2, weight)
        # y = 3 - 8 - 1 - 0.5 = -6.5, so 2 (y - 2) x; with the weights themselves y would be -5
        assert gradient.tolist() == [[-17.0, -34.0, 17.0, -8.5, -51.0]]


@pytest.mark.filterwarnings("ignore")
def test_rounded_inputs_are_those_of_the_kernel():
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(48, 20))
    whole = packing.quantize(holder[0].weight, bits=8, symmetric=True)
    store_as_integers(holder, holder[0].weight, whole, kind=Int8DynamicLinear, bits=8, group_size=None)
    for shift, spread in ((0, 1), (5, 1), (-5, 0.1), (0, 100)):
        x = torch.randn(3, 7, 48) * spread + shift
        (rounded,) = round_inputs(holder, (x,))
        ours = rounded @ holder[0].dequantized().t() + holder[0].bias
        assert torch.allclose(ours, holder(x), atol=1e-5 * spread + 1e-5)
        assert len(rounded.unique()) <= 128 and not torch.equal(rounded, x)
    leaf = torch.linspace(-1, 1, 9).requires_grad_()
    round_inputs(holder, (leaf,))[0].sum().backward()
    assert leaf.grad.tolist() == [1.0] * 9


@pytest.mark.parametrize(
    "family, activations",
    [*((family, False) for family in FAMILIES), ("bert", True), ("gpt2", True), ("t5", True)],
)
def test_what_is_stored_is_what_the_last_forward_computed_with(family, activations, tmp_path):
    model, train = tiny(family), spec()
    grid = {"bits": 8, "symmetric": True} if activations else {"bits": 3, "group_size": 16}
    made, report = compress.get("qat")(model, Context(train=train), activations=activations, **grid)
    layer_class = Int8DynamicLinear if activations else QuantizedLinear
    assert {type(one) for one in layers_of(made).values()} == {layer_class}
    assert report.layers == len(integer_layers(made)) == len(prunable(model))
    assert not any(parametrize.is_parametrized(one) or one._forward_pre_hooks for one in made.modules())
    curve = report.achieved["curve"]
    assert [step for step, _ in curve["train"]] == [1, 2, 3] and len(curve["validation"]) == 1
    stored = validation_loss(made, train.evaluate, spec=train)["loss"]
    assert stored == pytest.approx(curve["validation"][-1][1], rel=5e-3 if activations else 6e-5)
    untrained = compress.get("rtn")(model, **grid)[0]
    assert any(
        not torch.equal(layers_of(made)[name].integers, one.integers)
        for name, one in layers_of(untrained).items()
    )
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (made.get_input_embeddings().weight is made.get_output_embeddings().weight) == tied
    again, _ = storage.load(storage.save(made, tmp_path / "m", report=report))
    call = inputs(model)
    with torch.no_grad():
        assert torch.equal(made(**call).logits, again(**call).logits)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_unaware_is_fine_tuning_and_then_rounding(family):
    model, train = tiny(family), spec()
    made, report = compress.get("qat")(model, Context(train=train), bits=3, aware=False)
    fit(model, train)
    rounded, _ = compress.get("rtn")(model, bits=3)
    for name, one in layers_of(rounded).items():
        assert torch.equal(layers_of(made)[name].integers, one.integers)
    float_loss = validation_loss(model, train.evaluate, spec=train)["loss"]
    assert report.achieved["curve"]["validation"][-1][1] == pytest.approx(float_loss, rel=1e-4)
    stored = validation_loss(made, train.evaluate, spec=train)["loss"]
    assert abs(stored - float_loss) > 1e-3 * float_loss


def test_training_on_the_grid_ends_below_training_off_it():
    model, train = tiny("llama"), spec(steps=24, learning_rate=3e-3, warmup_steps=4)
    losses = [
        validation_loss(made, train.evaluate, spec=train)["loss"]
        for made, _ in (
            compress.get("qat")(model, Context(train=train), bits=3, aware=aware) for aware in (True, False)
        )
    ]
    assert losses[0] < losses[1]


def test_a_run_goes_on_from_its_checkpoint_and_a_shared_weight_stays_shared(tmp_path):
    model = tiny("llama")
    blocks = model.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    first, _ = compress.get("qat")(model, Context(train=spec(checkpoint=tmp_path)), bits=4)
    again, report = compress.get("qat")(model, Context(train=spec(checkpoint=tmp_path)), bits=4)
    assert report.achieved["curve"]["train"][-1][0] == 3
    for name, one in layers_of(first).items():
        assert torch.equal(layers_of(again)[name].integers, one.integers)
    up = [block.mlp.up_proj for block in again.model.layers]
    assert isinstance(up[1], QuantizedLinear) and up[0].packed is up[1].packed


@pytest.mark.parametrize(
    "wrong", [{"bits": 5}, {"bits": 4}, {"group_size": 8, "symmetric": True}, {"symmetric": False}]
)
def test_grids_the_kernel_lacks_are_refused(wrong):
    with pytest.raises(BadSetting, match="bits"):
        compress.get("qat")(tiny("bert"), Context(train=spec()), activations=True, **wrong)


def test_a_model_of_integers_has_nothing_to_train():
    made, _ = compress.get("rtn")(tiny("bert"), bits=8)
    with pytest.raises(NothingTouched):
        compress.get("qat")(made, Context(train=spec()), bits=4)


# Scaling


def outliers(family="llama"):
    """A model two of whose input channels are forty times larger than the others."""
    model = tiny(family)
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[[3, 17]] *= 40
            block.post_attention_layernorm.weight[[3, 17]] *= 40
    return model


def numpy_rounding(weight, bits, size):
    """Asymmetric rounding to nearest in plain numpy, `(out, in)`."""
    found = np.empty_like(weight)
    for row, column in itertools.product(range(len(weight)), range(0, weight.shape[1], size)):
        part = weight[row, column : column + size]
        low, high = min(part.min(), 0), max(part.max(), 0)
        step = (high - low) / (2**bits - 1)
        zero = np.round(-low / step)
        found[row, column : column + size] = (
            np.clip(np.round(part / step) + zero, 0, 2**bits - 1) - zero
        ) * step
    return found


def test_the_scale_of_each_group_is_the_best_of_the_grid():
    model, text = outliers(), batches("decoder")
    made, report = compress.get("awq")(model, Context(calibration=text), bits=3, group_size=16)
    rows = {n: torch.cat(s.rows) for n, s in next(calibrate(model, text, collect=("rows",))).stats.items()}
    prefix = "model.layers.0.self_attn"
    names = [f"{prefix}.{one}_proj" for one in "qkv"]
    x = rows[names[0]].double().numpy()
    assert all(rows[name] is rows[names[0]] or torch.equal(rows[name], rows[names[0]]) for name in names)
    weights = [model.get_submodule(name).weight.detach().double().numpy() for name in names]
    errors = []
    for alpha in np.linspace(0, 1, 11):
        s = np.abs(x).mean(0) ** alpha
        errors.append(sum(((x @ (numpy_rounding(w * s, 3, 16) / s - w).T) ** 2).sum() for w in weights))
    best = int(np.argmin(errors))
    assert best > 0 and errors[best] < 0.8 * errors[0]
    assert {report.achieved["alphas"][name] for name in names} == {best / 10}
    layer, total = made.get_submodule(names[0]), 0.0
    for name, weight in zip(names, weights, strict=True):
        made_of = made.get_submodule(name).dequantized().double().numpy()
        total += ((x @ (made_of - weight).T) ** 2).sum()
    assert total == pytest.approx(errors[best], rel=1e-3)
    inside = torch.randn(4, 32)
    assert torch.allclose(layer(inside), inside @ layer.dequantized().t(), atol=1e-5)
    ratio = layer.channel_scale.double().numpy() * np.abs(x).mean(0) ** (best / 10)
    assert ratio.max() / ratio.min() == pytest.approx(1, rel=1e-5)
    share = layer.channel_scale
    assert all(made.get_submodule(name).channel_scale is share for name in names)


def test_the_vector_of_scales_is_counted_in_bytes(tmp_path):
    text = batches("decoder")
    made, report = compress.get("awq")(outliers(), Context(calibration=text), bits=4, group_size=16)
    plain, nearest = compress.get("rtn")(outliers(), bits=4, group_size=16)
    vectors = {id(one.channel_scale): one.channel_scale for one in layers_of(made).values()}
    extra = sum(one.nbytes for one in vectors.values() if one is not None)
    weights = report.achieved["weights_quantized"]
    gained = report.achieved["bits_per_weight"] - nearest.achieved["bits_per_weight"]
    assert extra and gained == pytest.approx(8 * extra / weights)
    sizes = [
        bytes.bytes_by_format(storage.load(storage.save(one, tmp_path / name))[0])["dense"]
        for name, one in (("a", made), ("b", plain))
    ]
    assert sizes[0] - sizes[1] == extra


def test_smoothing_helps_where_inputs_have_outliers():
    model, text = outliers(), batches("decoder")
    plain, _ = compress.get("int8-dynamic")(model)
    made, report = compress.get("smoothquant")(model, Context(calibration=text))
    assert report.achieved["output_error"] < 0.7 * report.achieved["output_error_rtn"]
    with torch.no_grad():
        dense, ours, theirs = (one(**text[0]).logits for one in (model, made, plain))
    assert (ours - dense).norm() < 0.8 * (theirs - dense).norm()
    name = "model.layers.0.mlp.up_proj"
    rows = torch.cat(next(calibrate(model, text, collect=("rows",))).stats[name].rows)
    assert len(rows) < quantization.ROWS_TRIED
    layer, weight = made.get_submodule(name), model.get_submodule(name).weight.detach()
    alpha = report.achieved["alphas"][name]
    both = torch.stack([weight, model.get_submodule("model.layers.0.mlp.gate_proj").weight.detach()])
    s = rows.abs().amax(0) ** alpha / both.abs().amax((0, 1)) ** (1 - alpha)
    ratio = layer.channel_scale * s
    assert float(ratio.max() / ratio.min()) == pytest.approx(
        1, rel=0.2
    )  # rows of a block after a rounded one
    x = torch.randn(5, 32, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantized().sum(0).expand(5, 32), atol=1e-4)


# Bytes divided by measured change

CURVES = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.floats(0, 5, width=16), min_size=3, max_size=3)),
    min_size=1,
    max_size=5,
)


def table(curves) -> dict:
    sizes = {f"g{i}": [size * bits + 1 for bits in packing.BITS] for i, (size, _) in enumerate(curves)}
    changes = {f"g{i}": list(change) for i, (_, change) in enumerate(curves)}
    return {"levels": list(packing.BITS), "bytes": sizes, "change": changes}


def total(found, widths, what) -> float:
    return sum(found[what][name][found["levels"].index(bits)] for name, bits in widths.items())


@settings(max_examples=60, deadline=None)
@given(CURVES, st.sampled_from([3, 4, 8]))
def test_the_allocation_is_the_best_of_all(curves, bits):
    found = table(curves)
    budget = total(found, dict.fromkeys(found["bytes"], bits), "bytes")
    every = [dict(zip(found["bytes"], one)) for one in itertools.product(packing.BITS, repeat=len(curves))]
    best = min(total(found, one, "change") for one in every if total(found, one, "bytes") <= budget)
    widths = sensitivity.allocate_bits(found, bits)
    assert total(found, widths, "bytes") <= budget
    assert total(found, widths, "change") == pytest.approx(best)
    control = sensitivity.allocate_bits(found, bits, seed=1)
    assert control == sensitivity.allocate_bits(found, bits, seed=1)
    assert total(found, control, "bytes") == total(found, widths, "bytes")
    assert sorted(control.values()) == sorted(widths.values())
    assert total(found, control, "change") >= best - 1e-9


@pytest.mark.parametrize("symmetric, size", [(False, None), (True, 10)])
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_the_bytes_of_a_scan_are_those_that_are_stored(family, symmetric, size):
    model, grid = tiny(family), {"group_size": size, "symmetric": symmetric}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sensitivity.scan_bits(model, batches(kind(family)), **grid)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    changes = torch.tensor(list(found["change"].values()))
    assert (changes[:, 2] > changes[:, 0]).all()  # 3 bits change more than 8
    made, report = {}, {}
    control = sensitivity.allocate_bits(found, 4, seed=3)
    for name, bits in {"best": sensitivity.allocate_bits(found), "control": control, "uniform": 4}.items():
        made[name], report[name] = compress.get("rtn")(model, bits=bits, **grid)
        stored = sum(t.nbytes for one in integer_layers(made[name]) for t in one.buffers())
        widths = bits if isinstance(bits, dict) else dict.fromkeys(found["bytes"], bits)
        assert stored == total(found, widths, "bytes")
    each = {name: one.achieved["bits_per_weight"] for name, one in report.items()}
    assert each["best"] == each["control"] <= each["uniform"]


def test_the_control_deals_widths_out_anew_among_equal_groups():
    found = table([(2, [0.0, 1.0 + i, 9.0 + 5 * i]) for i in range(5)] + [(8, [0.0, 1.0, 1.5])])
    drawn = [sensitivity.allocate_bits(found, seed=seed) for seed in range(20)]
    assert len({tuple(one.values()) for one in drawn}) > 3 and len({one["g5"] for one in drawn}) == 1


def test_a_width_that_was_not_scanned_is_refused():
    with pytest.raises(BadSetting, match="8, 4, 3"):
        sensitivity.allocate_bits(table([(1, [0.0, 1.0, 2.0])]), 5)
    with pytest.raises(BadSetting, match="bits=2"):
        sensitivity.scan_bits(tiny("bert"), batches(), levels=(4, 2))
    assert math.isclose(sum(quantization.ALPHAS), 5.5)
