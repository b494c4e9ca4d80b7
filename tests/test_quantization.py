"""Integers that are integers: grids and packing by hand, GPTQ against algebra, every family reloaded."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import norm
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from lmcompress import compress
from lmcompress.compress import Context, quantization, second_order, sensitivity
from lmcompress.compress.calibration import calibrate
from lmcompress.compress.masks import group_of
from lmcompress.compress.qat import OnGrid, round_inputs
from lmcompress.compress.quantization import stored_integers
from lmcompress.errors import BadData, BadSetting, BadWeights, NothingTouched
from lmcompress.measure import bytes
from lmcompress.measure.calls import Shape, shape_signature
from lmcompress.measure.compute import weight_bytes_read
from lmcompress.measure.memory import memory
from lmcompress.models import packed as packing
from lmcompress.models import storage
from lmcompress.models.anatomy import anatomy, count_parameters, prunable
from lmcompress.models.families import integer_layers
from lmcompress.models.packed import Int8DynamicLinear, Packed, QuantizedLinear, store_as_integers
from lmcompress.train.trainer import TrainSpec, fit, validation_loss
from tests.test_pruning import batches
from tests.test_sweep import house, subject_in  # noqa: F401
from tests.tiny_models import FAMILIES, VOCAB, kind, logits, reloaded, tiny

CASES = {
    "rtn": {"bits": 4, "group_size": 10, "embeddings": True},
    "gptq": {"bits": 3},
    "nf4": {"group_size": 16},
    "int8-dynamic": {},
    "awq": {"bits": 4, "group_size": 10},
    "smoothquant": {},
    "cast": {"dtype": "bfloat16"},
}
GROUPS = [f"decoder.{block}.{part}" for block in (0, 1) for part in ("attention", "feed-forward")]
SHAPES = ("bert", "gpt2", "llama", "t5", "albert", "gemma")  # one of each layout: all techniques are tried
EVERY = [(f, name) for f in FAMILIES for name in CASES if f in SHAPES or name in ("rtn", "gptq")]


def quantized(family, name, model=None, **changes):
    """A tiny model after technique `name`, and the report."""
    chosen = compress.get(name)
    context = Context(calibration=batches(kind(family)))
    return chosen(model or tiny(family), context, **(CASES[name] | changes))


def test_a_grid_from_least_to_greatest_by_hand_in_groups():
    weight = torch.tensor([[-1.0, 6.0, 2.4, 0.0, 14.0]])
    whole, scales, zeros = packing.quantize(weight, bits=3, group_size=3, symmetric=False)
    assert scales.tolist() == [[1.0, 2.0]]  # (6 + 1) / 7 and 14 / 7: the last group has two inputs
    assert zeros.tolist() == [[-3, -4]] and whole.tolist() == [[-4, 3, -1, -4, 3]]
    again = packing.dequantize(whole, scales, zeros, group_size=3)
    assert again.tolist() == [[-1.0, 6.0, 2.0, 0.0, 14.0]]


GROUP_SIZES = st.one_of(st.none(), st.integers(1, 50))
GRIDS = st.tuples(st.sampled_from(packing.BITS), st.integers(1, 7), st.integers(1, 40), GROUP_SIZES)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.booleans(), st.integers(0, 10**6))
def test_no_weight_moves_by_more_than_half_a_step_and_zero_stays(grid, symmetric, seed):
    bits, rows, width, size = grid
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weight[:, ::3] = 0
    whole, scales, zeros = packing.quantize(weight, bits=bits, group_size=size, symmetric=symmetric)
    again = packing.dequantize(whole, scales, zeros, group_size=size)
    steps = scales.repeat_interleave(min(size or width, width), 1)[:, :width]
    assert ((again - weight).abs() <= steps * 0.5001).all() and (again[:, ::3] == 0).all()
    assert scales.shape == (rows, math.ceil(width / (size or width)))
    for row in whole:
        assert len(row.unique()) <= 2**bits


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(0, 10**6))
def test_unpack_is_the_exact_inverse_of_pack(grid, seed):
    bits, rows, width, _ = grid
    half = 2 ** (bits - 1)
    draw = torch.Generator().manual_seed(seed)
    whole = torch.randint(-half, half, (rows, width), generator=draw).to(torch.int8)
    packed = packing.pack(whole, bits)
    assert packed.shape == (rows, math.ceil(width * bits / 8))
    assert torch.equal(packing.unpack(packed, bits, width), whole)


def test_the_layout_of_bytes_by_hand():
    assert packing.pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4).tolist() == [[0xF0, 0x08]]
    every = torch.arange(-4, 4, dtype=torch.int8)[None]
    number = sum(value << 3 * place for place, value in enumerate(range(8)))
    assert packing.pack(every, 3).tolist() == [list(number.to_bytes(3, "little"))]
    assert packing.pack(every, 8) is every


def test_nf4_is_the_quantiles_of_a_normal_and_takes_the_nearest():
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0], below]))
    assert np.allclose(packing.NF4, values / values.max(), atol=1e-6)
    weight = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    whole, scales = packing.quantize_nf4(weight, group_size=64)
    again = packing.dequantize(whole, scales, None, group_size=64, nf4=True)
    parts = weight.split(64, dim=1)
    largest = torch.cat([part.abs().amax(1, True).expand_as(part) for part in parts], 1)
    choices = largest[..., None] * torch.tensor(packing.NF4)
    nearest = choices.gather(2, (choices - weight[..., None]).abs().argmin(2, True))[..., 0]
    assert torch.equal(again, nearest)


def correlated(rows, width, *, seed=1):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draw)
    x = torch.randn(3 * width, width, generator=draw) @ torch.randn(width, width, generator=draw) / width**0.5
    return weight, x


def direct_gptq(weight, gram, *, bits, size, symmetric, order, damping=0.01):
    """Column by column with the explicit inverse of the Hessian of the columns that are left, in float64."""
    width, half = weight.shape[1], 2 ** (bits - 1)
    hessian = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(width, dtype=torch.double)
    new, grids = weight.double().clone(), {}
    fresh = size < width and order == list(range(width))
    result, left = torch.zeros_like(new), list(order)
    while left:
        column = left[0]
        group = column // size
        if group not in grids:
            source = (new if fresh else weight.double())[:, group * size : (group + 1) * size]
            if symmetric:
                grids[group] = source.abs().amax(1) / (half - 0.5), torch.zeros(len(new))
            else:
                low, high = source.amin(1).clamp(max=0), source.amax(1).clamp(min=0)
                step = (high - low) / (2 * half - 1)
                grids[group] = step, (-low / step).round() - half
        step, zero = grids[group]
        whole = ((new[:, column] / step).round() + zero).clamp(-half, half - 1)
        result[:, column] = step * (whole - zero)
        inverse = torch.linalg.inv(hessian[left][:, left])
        new[:, left] -= ((new[:, column] - result[:, column]) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("width, size", [(24, None), (30, 8), (136, 96), (136, None)])
@pytest.mark.parametrize("bits, symmetric", [(4, True), (3, False)])
def test_gptq_equals_dense_algebra(bits, symmetric, width, size, act_order):
    weight, x = correlated(4, width)
    gram = x.T @ x
    whole, scales, zeros = second_order.round_matrix(
        weight, gram, bits=bits, group_size=size, symmetric=symmetric, act_order=act_order
    )
    ours = packing.dequantize(whole, scales, zeros, group_size=size)
    order = gram.diagonal().argsort(descending=True).tolist() if act_order else list(range(width))
    expected = direct_gptq(weight, gram, bits=bits, size=size or width, symmetric=symmetric, order=order)
    assert (ours - expected).abs().max() < 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, size", [(8, None), (4, 7), (3, 16)])
def test_a_conv1d_and_a_linear_of_the_same_weights_become_the_same_layer(bits, size, symmetric):
    linear, conv = nn.Linear(33, 12), Conv1D(12, 33)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    x, outputs = torch.randn(2, 5, 33), []
    for layer, weight2d in ((linear, linear.weight), (conv, conv.weight.t())):
        holder = nn.Sequential(layer)
        whole = packing.quantize(weight2d, bits=bits, group_size=size, symmetric=symmetric)
        store_as_integers(holder, layer.weight, whole, bits=bits, group_size=size)
        made = holder[0]
        assert isinstance(made, QuantizedLinear) and (made.in_features, made.out_features) == (33, 12)
        assert made.packed.dtype == (torch.int8 if bits == 8 else torch.uint8) and made.bias is layer.bias
        assert made.dequantized().shape == (12, 33) and made.weight_count == 12 * 33
        assert torch.allclose(made(x), x @ made.dequantized().T + layer.bias, atol=1e-5)
        outputs.append(holder(x))
    assert torch.equal(*outputs)


@pytest.mark.filterwarnings("ignore")
def test_the_integer_kernel_computes_what_quantize_dynamic_does():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 20))
    theirs = torch.ao.quantization.quantize_dynamic(
        plain, {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    )
    ours, weight, x = copy.deepcopy(plain), plain[0].weight, torch.randn(3, 7, 48)
    whole = packing.quantize(weight, bits=8, symmetric=True)
    store_as_integers(ours, ours[0].weight, whole, kind=Int8DynamicLinear, bits=8, group_size=None)
    with torch.no_grad():
        assert torch.equal(ours[0].packed, theirs[0].weight().int_repr())
        assert torch.allclose(ours(x), theirs(x), atol=1e-6)
        assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()
    assert torch.allclose(leaf.grad, ours[0].dequantized().sum(0).expand_as(leaf), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, name", EVERY)
def test_every_family_is_quantized_saved_and_reloaded(family, name, tmp_path):
    model = tiny(family)
    made, report = quantized(family, name, model)
    again = reloaded(made, tmp_path / "m", report=report)
    assert count_parameters(made) == count_parameters(model)
    assert shape_signature(again) == shape_signature(made) != shape_signature(model)
    json.dumps(report.as_dict(), allow_nan=False)
    layers = integer_layers(again)
    if name == "cast":
        assert not layers and {p.dtype for p in again.parameters()} == {torch.bfloat16}
        return
    assert report.layers == len(prunable(model)) == len(layers) - ("embeddings" in CASES[name])
    assert sum(one.weight_count for one in layers) == report.achieved["weights_quantized"]
    if name == "gptq":
        assert report.achieved["output_error"] < report.achieved["output_error_rtn"]
        assert set(report.achieved["output_error_by_layer"]) == {one.name for one in prunable(model)}
    if name in ("awq", "smoothquant"):
        assert report.achieved["output_error"] <= report.achieved["output_error_rtn"]
        assert any(report.achieved["alphas"].values())
    if name in ("int8-dynamic", "smoothquant"):
        return
    for path, layer in made.named_modules(remove_duplicate=False):  # the same weights in the dense model
        if isinstance(layer, Packed):
            module = model.get_submodule(path)
            weight = layer.dequantized()
            module.weight.data = weight.t() if isinstance(module, Conv1D) else weight
    assert torch.allclose(logits(made), logits(model), atol=1e-3)


@pytest.mark.parametrize("name, bits", [("rtn", 8), ("rtn", 4), ("rtn", 3), ("gptq", 4), ("nf4", 4)])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_file_holds_integers_and_shrinks_by_what_the_arithmetic_says(family, name, bits, tmp_path):
    model = tiny(family)
    changes = (
        {"bits": bits, "embeddings": False} if name == "rtn" else {"bits": bits} if name == "gptq" else {}
    )
    made, report = quantized(family, name, model, group_size=20, **changes)
    folder = storage.save(made, tmp_path / "m")
    file, dense = folder / "model.safetensors", memory(model, storage.save(model, tmp_path / "dense"))
    held, expected, weights = load_file(file), dense["formats"]["dense"], 0
    for one in prunable(model):
        rows, width, groups = one.out_features, one.in_features, math.ceil(one.in_features / 20)
        packed = held[f"{one.name}.packed"]
        assert f"{one.name}.weight" not in held
        assert packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
        bit = np.unpackbits(packed.numpy().view(np.uint8), axis=1, bitorder="little")[:, : width * bits]
        values = bit.reshape(rows, width, bits) @ (1 << np.arange(bits))
        assert all(len(np.unique(row)) <= 2**bits for row in values)
        expected += (
            rows * math.ceil(width * bits / 8) + rows * groups * (4 + (name != "nf4")) - rows * width * 4
        )
        weights += rows * width
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    found = memory(made, folder)
    assert found["file_bytes"] - header == sum(t.nbytes for t in held.values()) == expected
    assert found["formats"]["dense"] == expected < dense["formats"]["dense"]
    assert found["parameters"] == dense["parameters"]
    zeros = sum(int((layer.dequantized() == 0).sum()) for layer in integer_layers(made))
    assert found["nonzero_parameters"] == dense["nonzero_parameters"] - zeros
    stored = expected - (dense["formats"]["dense"] - 4 * weights)
    assert report.achieved["bits_per_weight"] == pytest.approx(8 * stored / weights)
    assert report.achieved["share_quantized"] == pytest.approx(weights / dense["parameters"])


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "gemma"])
def test_a_tied_head_stays_tied_and_an_untied_one_stays_dense(family, tmp_path):
    made, _ = quantized(family, "rtn")
    for one in (made, storage.load(storage.save(made, tmp_path / "m"))[0]):
        table, head = one.get_input_embeddings(), one.get_output_embeddings()
        assert (
            isinstance(head, QuantizedLinear) and head.packed is table.packed and head.scales is table.scales
        )
    plain, _ = quantized(family, "rtn", embeddings=False)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    made, _ = quantized("llama", "rtn")  # its head has weights of its own
    assert isinstance(made.get_output_embeddings(), nn.Linear)


def test_the_bytes_a_call_reads_leave_out_a_table_of_integers_unless_the_head_reads_it():
    nbytes = {}
    for family, part in (("bert", "forward"), ("gpt2", "decode"), ("t5", "encode"), ("t5", "decode")):
        model = tiny(family, None if family == "bert" else "lm")
        made, _ = quantized(family, "rtn", model)
        assert weight_bytes_read(made, Shape(part, 1)) < weight_bytes_read(model, Shape(part, 1))
        nbytes[family, part] = weight_bytes_read(made, Shape(part, 1))
        table = sum(t.nbytes for t in made.get_input_embeddings().buffers())
        everything = sum(t.nbytes for t in {id(t): t for t in (*made.parameters(), *made.buffers())}.values())
        if family == "gpt2":
            positions = made.transformer.wpe.weight.nbytes
            assert nbytes[family, part] == everything - positions
        if family == "bert":
            others = [m.weight.nbytes for m in made.modules() if isinstance(m, nn.Embedding)]
            assert nbytes[family, part] == everything - table - sum(others)
    assert min(nbytes["t5", "encode"], nbytes["t5", "decode"]) > 0
    biases = sum(m.weight.nbytes for m in made.modules() if isinstance(m, nn.Embedding))
    assert nbytes["t5", "encode"] + nbytes["t5", "decode"] == everything - biases


def test_gptq_reads_what_the_rounded_blocks_before_give():
    model, given = tiny("llama"), batches("decoder")
    made, report = compress.get("gptq")(model, Context(calibration=given), bits=3, group_size=16)
    one = next(one for one in prunable(model) if one.block == 1)
    half, rest = copy.deepcopy(made), anatomy(model).blocks[1]
    half.model.layers[1] = copy.deepcopy(rest.module)  # block 0 rounded, block 1 as it was
    gram = {n: s for step in calibrate(half, given, collect=("gram",)) for n, s in step.stats.items()}[
        one.name
    ].gram
    whole = second_order.round_matrix(one.weight2d(), gram, bits=3, group_size=16)
    layer = made.get_submodule(one.name)
    assert torch.equal(layer.integers, whole[0]) and torch.equal(layer.scales, whole[1])
    moved = [layer.dequantized() - one.weight2d().detach(), one.weight2d().detach()]
    error, size = (float(((m @ gram) * m).sum()) for m in moved)
    assert report.achieved["output_error_by_layer"][one.name]["gptq"] == pytest.approx(
        (error / size) ** 0.5, rel=1e-2
    )


def test_cast_keeps_what_the_constructor_computes_and_refuses_what_overflows():
    model = tiny("llama")
    made, report = compress.get("cast")(model, dtype="float16")
    assert made.model.rotary_emb.inv_freq.dtype == torch.float32
    assert report.achieved["bits_per_weight"] == 16 and report.achieved["share_quantized"] == 1
    assert bytes.bytes_by_format(made)["dense"] * 2 == bytes.bytes_by_format(model)["dense"]
    with pytest.raises(NothingTouched):
        compress.get("cast")(made, dtype="float16")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(BadWeights, match="half precision"):
        compress.get("cast")(model, dtype="float16")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CASES if name != "cast"])
def test_a_model_that_is_integers_already_has_nothing_to_quantize(name):
    made, _ = quantized("bert", "rtn", embeddings=False, bits=8)
    with pytest.raises(NothingTouched, match="matched no layer"):
        quantized("bert", name, made, **({"embeddings": False} if name == "rtn" else {}))


def test_the_proof_of_integers_counts_what_lies_in_the_file(tmp_path):
    assert stored_integers(storage.save(tiny("gpt2"), tmp_path / "dense")) == []
    pytest.raises(BadData, stored_integers, tmp_path / "nowhere").match("no saved model")
    made, report = quantized("gpt2", "rtn", bits=dict.fromkeys(GROUPS, 3) | {"embedding": 4})
    found = stored_integers(storage.save(made, tmp_path / "m"))
    by_name = {one["name"]: one for one in found}
    table = by_name.pop("transformer.wte.packed")  # and the head that is tied to it
    assert table == {"name": table["name"], "dtype": "uint8", "unique": 16, "shape": [100, 16], "bits": 4}
    assert len(by_name) == report.layers == 8
    for name, one in by_name.items():
        layer = made.get_submodule(name.removesuffix(".packed"))
        assert one["unique"] == len(set(layer.integers.flatten().tolist())) <= 8 and one["bits"] == 3
        assert one["shape"] == list(layer.packed.shape) and one["dtype"] == "uint8"
    plain, _ = quantized("bert", "int8-dynamic")
    found = stored_integers(storage.save(plain, tmp_path / "m8"))
    assert {one["dtype"] for one in found} == {"int8"} and max(one["unique"] for one in found) > 16


def test_widths_by_group_are_followed_and_a_missing_one_is_refused():
    widths = dict(zip(GROUPS, (8, 4, 3, 4), strict=True))
    made, _ = quantized("llama", "rtn", bits=widths, embeddings=False)
    for one in prunable(tiny("llama")):
        layer = made.get_submodule(one.name)
        assert layer.bits == widths[group_of(one)]
        whole = packing.quantize(one.weight2d(), bits=layer.bits, group_size=10)
        assert torch.equal(layer.integers, whole[0])
    pytest.raises(BadSetting, quantized, "llama", "rtn", bits=widths).match("embedding no width")
    with pytest.raises(BadSetting, match="decoder.1.feed-forward no width"):
        quantized("llama", "rtn", bits={name: widths[name] for name in GROUPS[:3]}, embeddings=False)


def test_a_table_that_is_none_is_refused():
    made, _ = quantized("gpt2", "rtn", bits=8)
    fresh = tiny("gpt2")
    fresh.set_input_embeddings(made.get_input_embeddings())
    with pytest.raises(BadSetting, match="QuantizedEmbedding"):
        compress.get("nf4")(fresh, embeddings=True)


@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_sweep_hold_true_bytes_and_share_times_among_equal_shapes(house):  # noqa: F811
    subject = subject_in(house)
    asked = {"rtn": {"bits": 4}, "gptq": {"bits": 4}, "int8-dynamic": {}, "cast": {"dtype": "float16"}}
    rows = {name: subject.measure(name, **settings) for name, settings in asked.items()}
    for row in rows.values():
        assert row["verdict"]["size"] == "smaller" and row["latency"]["shapes"]["batch1"]["median_ms"] > 0
        assert row["memory"]["parameters"] == subject.dense["memory"]["parameters"]
        assert 0 < row["achieved"]["bits_per_weight"] < 17 and row["quality"]["n"] == 60
        assert row["achieved"]["backend"]
    assert rows["gptq"]["latency"]["measured_on"] == rows["rtn"]["key"]
    assert rows["gptq"]["achieved"]["output_error"] < rows["gptq"]["achieved"]["output_error_rtn"]
    assert rows["gptq"]["provenance"]["calibration"]
    signatures = {row["latency"]["signature"] for row in (subject.dense, *rows.values())}
    assert len(signatures) == 4  # that of rtn and gptq is one


def spec(**changes) -> TrainSpec:
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, VOCAB, 10).tolist() for _ in range(24)]
    features = [{"input_ids": row, "attention_mask": [1] * 10, "labels": row} for row in rows]
    found = {"features": features, "steps": 3, "batch_size": 8, "learning_rate": 1e-2}
    return TrainSpec(**found | {"evaluate": features[:8], "evaluate_every": 3} | changes)


def layers_of(model) -> dict[str, QuantizedLinear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, QuantizedLinear)}


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
    pairs = zip(layers_of(untrained).values(), layers_of(made).values(), strict=True)
    assert any(not torch.equal(one.integers, other.integers) for one, other in pairs)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (made.get_input_embeddings().weight is made.get_output_embeddings().weight) == tied
    reloaded(made, tmp_path / "m", report=report)


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
    saved = [storage.load(storage.save(one, tmp_path / name))[0] for name, one in (("a", made), ("b", plain))]
    sizes = [bytes.bytes_by_format(one)["dense"] for one in saved]
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


CHANGES = st.lists(st.floats(0, 5, width=16), min_size=3, max_size=3)
CURVES = st.lists(st.tuples(st.integers(1, 6), CHANGES), min_size=1, max_size=5)


def table(curves) -> dict:
    sizes = {f"g{i}": [size * bits + 1 for bits in packing.BITS] for i, (size, _) in enumerate(curves)}
    changes = {f"g{i}": list(change) for i, (_, change) in enumerate(curves)}
    return {"levels": list(packing.BITS), "bytes": sizes, "change": changes}


def total(found, widths, what) -> float:
    return sum(found[what][name][found["levels"].index(bits)] for name, bits in widths.items())


@settings(max_examples=60, deadline=None)
@given(CURVES, st.sampled_from([3, 4, 8]), st.sampled_from([0.25, 0.5, 1.0]))
def test_the_allocation_is_the_best_of_all(curves, bits, share):
    found = table(curves)
    uniform = [dict.fromkeys(found["bytes"], width) for width in (bits, {8: 4}.get(bits, 3))]
    full, fewer = (total(found, widths, "bytes") for widths in uniform)
    budget = fewer + share * (full - fewer)
    every = [dict(zip(found["bytes"], one)) for one in itertools.product(packing.BITS, repeat=len(curves))]
    best = min(total(found, one, "change") for one in every if total(found, one, "bytes") <= budget)
    widths = sensitivity.allocate_bits(found, bits, share=share)
    assert total(found, widths, "bytes") <= budget
    assert total(found, widths, "change") == pytest.approx(best)
    control = sensitivity.allocate_bits(found, bits, share=share, seed=1)
    assert control == sensitivity.allocate_bits(found, bits, share=share, seed=1)
    assert total(found, control, "bytes") == total(found, widths, "bytes")
    assert sorted(control.values()) == sorted(widths.values())
    assert total(found, control, "change") >= best - 1e-9


@pytest.mark.parametrize("symmetric, size, embeddings", [(False, None, True), (True, 10, False)])
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_the_bytes_of_a_scan_are_those_that_are_stored(family, symmetric, size, embeddings):
    model, grid = tiny(family), {"group_size": size, "symmetric": symmetric, "embeddings": embeddings}
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


@pytest.mark.parametrize("technique", ["rtn", "gptq", "awq"])
def test_layers_have_the_bits_of_their_group(technique):
    model, context = tiny("bert"), Context(calibration=batches())
    groups = sensitivity.groups_of(model)
    widths = dict(zip(groups, itertools.cycle([3, 8, 4])))
    alike, _ = compress.get(technique)(model, context, bits=4)
    same, _ = compress.get(technique)(model, context, bits=dict.fromkeys(groups, 4))
    assert all(torch.equal(same.state_dict()[name], value) for name, value in alike.state_dict().items())
    made, _ = compress.get(technique)(model, context, bits=widths)
    by_name = {name: layer.bits for name, layer in made.named_modules() if isinstance(layer, Packed)}
    assert by_name == {layer.name: widths[group_of(layer)] for layer in prunable(model)}
    with pytest.raises(BadSetting, match="no width"):
        compress.get(technique)(model, context, bits={"encoder.0.attention": 4})


def test_the_control_deals_widths_out_anew_among_equal_groups():
    few = table([(1, [0.0, 1.0, 2.0])])
    pytest.raises(BadSetting, sensitivity.allocate_bits, few, 5).match("8, 4, 3")
    pytest.raises(BadSetting, sensitivity.scan_bits, tiny("bert"), batches(), levels=(4, 2)).match("bits=2")
    found = table([(2, [0.0, 1.0 + i, 9.0 + 5 * i]) for i in range(5)] + [(8, [0.0, 1.0, 1.5])])
    drawn = [sensitivity.allocate_bits(found, seed=seed) for seed in range(20)]
    assert len({tuple(one.values()) for one in drawn}) > 3 and len({one["g5"] for one in drawn}) == 1
