"""Integers that are integers: grids and packing by hand, GPTQ against dense algebra, every family saved and
reloaded.
"""

import copy
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
from transformers.pytorch_utils import Conv1D

from lmcompress import compress
from lmcompress.compress import Context, second_order
from lmcompress.compress.calibration import calibrate
from lmcompress.compress.masks import group_of
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
from tests.test_pruning import batches
from tests.test_sweep import house, subject_in  # noqa: F401
from tests.tiny_models import FAMILIES, inputs, kind, tiny

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
SHAPES = (
    "bert",
    "gpt2",
    "llama",
    "t5",
    "albert",
    "gemma",
)  # one of each layout: all techniques are tried on them
EVERY = [(f, name) for f in FAMILIES for name in CASES if f in SHAPES or name in ("rtn", "gptq")]


def quantized(family, name, model=None, **changes):
    """A tiny model after technique `name`, and the report."""
    chosen = compress.get(name)
    context = Context(calibration=batches(kind(family)))
    return chosen(model or tiny(family), context, **(CASES[name] | changes))


@torch.no_grad()
def logits(model, **call):
    found = model(**(call or inputs(model, padded=True)))
    return found.logits if hasattr(found, "logits") else found[0]


# Grids and bytes


def test_a_symmetric_grid_by_hand():
    weight = torch.tensor([[3.5, -3.5, 1.2, -0.6, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    whole, scales, zeros = packing.quantize(weight, bits=3, symmetric=True)
    assert whole.tolist() == [[3, -4, 1, -1, 0], [0] * 5]  # 8 values, the outermost half a step inside
    assert scales.tolist() == [[1.0], [1.0]] and zeros is None and whole.dtype == torch.int8


def test_a_grid_from_least_to_greatest_by_hand_in_groups():
    weight = torch.tensor([[-1.0, 6.0, 2.4, 0.0, 14.0]])
    whole, scales, zeros = packing.quantize(weight, bits=3, group_size=3, symmetric=False)
    assert scales.tolist() == [[1.0, 2.0]]  # (6 + 1) / 7 and 14 / 7: the last group has two inputs
    assert zeros.tolist() == [[-3, -4]] and whole.tolist() == [[-4, 3, -1, -4, 3]]
    again = packing.dequantize(whole, scales, zeros, group_size=3)
    assert again.tolist() == [[-1.0, 6.0, 2.0, 0.0, 14.0]]


GRIDS = st.tuples(
    st.sampled_from(packing.BITS),
    st.integers(1, 7),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 50)),
)


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
    whole = torch.randint(-half, half, (rows, width), generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )
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
    largest = torch.cat(
        [weight[:, :64].abs().amax(1, True).expand(5, 64), weight[:, 64:].abs().amax(1, True).expand(5, 36)],
        1,
    )
    choices = largest[..., None] * torch.tensor(packing.NF4)
    nearest = choices.gather(2, (choices - weight[..., None]).abs().argmin(2, True))[..., 0]
    assert torch.equal(again, nearest)


# GPTQ on one matrix


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


def test_act_order_is_undone_exactly():
    """With inputs that do not go together nothing is spread: any order gives the plain rounding, in place."""
    weight, _ = correlated(5, 40)
    gram = torch.diag(torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1)
    assert second_order.rounding_order(gram, True).tolist() != list(range(40))
    for size in (None, 16):
        ours = second_order.round_matrix(weight, gram, bits=4, group_size=size, act_order=True)
        for mine, plain in zip(ours, packing.quantize(weight, bits=4, group_size=size), strict=True):
            assert torch.equal(mine, plain)


def test_gptq_moves_outputs_less_than_round_to_nearest_and_leaves_silent_inputs_alone():
    weight, x = correlated(32, 64)
    x[:, 5] = 0
    gram = x.T @ x
    nearest = packing.quantize(weight, bits=3, group_size=16)
    errors = {}
    for act_order in (False, True):
        ours = second_order.round_matrix(weight, gram, bits=3, group_size=16, act_order=act_order)
        made = [packing.dequantize(*one, group_size=16) for one in (ours, nearest)]
        errors[act_order] = [float((x @ (one - weight).T).square().sum()) for one in made]
        assert errors[act_order][0] < 0.6 * errors[act_order][1]
    assert torch.equal(made[0][:, 5], made[1][:, 5])  # never active: its own nearest point


# Layers


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
    store_as_integers(
        ours,
        ours[0].weight,
        packing.quantize(weight, bits=8, symmetric=True),
        kind=Int8DynamicLinear,
        bits=8,
        group_size=None,
    )
    with torch.no_grad():
        assert torch.equal(ours[0].packed, theirs[0].weight().int_repr())
        assert torch.allclose(ours(x), theirs(x), atol=1e-6)
        assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()
    assert torch.allclose(leaf.grad, ours[0].dequantized().sum(0).expand_as(leaf), atol=1e-5)


# Every family


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CASES if name != "cast"])
def test_zero_matrices_and_inputs_that_are_always_zero_have_no_error(name):
    """Blocks added by expansion have o and down projections of zeros: 0/0 would be no number, after all the
    work.
    """
    model = tiny("llama")
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
        model.model.layers[0].mlp.up_proj.weight.zero_()  # so that down_proj's inputs are zeros
    made, report = quantized("llama", name, model, **({"embeddings": False} if name == "rtn" else {}))
    json.dumps(report.as_dict(), allow_nan=False)
    assert logits(made).isfinite().all()
    if "output_error" in report.achieved:
        zero = "model.layers.1.self_attn.o_proj"
        assert set(report.achieved["output_error_by_layer"][zero].values()) == {0.0}
        assert 0 < report.achieved["output_error"] <= report.achieved["output_error_rtn"]
        assert zero not in report.achieved["layers_no_better_than_rtn"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, name", EVERY)
def test_every_family_is_quantized_saved_and_reloaded(family, name, tmp_path):
    model = tiny(family)
    made, report = quantized(family, name, model)
    again, _ = storage.load(storage.save(made, tmp_path / "m", report=report))
    assert torch.equal(logits(made), logits(again))
    assert count_parameters(again) == count_parameters(made) == count_parameters(model)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_generation_with_a_cache_after_reload(family, name, tmp_path):
    made, _ = quantized(family, name)
    again, _ = storage.load(storage.save(made, tmp_path / "m"))
    call = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = inputs(again, batch=1)["input_ids"]
    ours = made.generate(ids, attention_mask=torch.ones_like(ids), **call)
    assert torch.equal(ours, again.generate(ids, attention_mask=torch.ones_like(ids), **call))
    if name in (
        "rtn",
        "gptq",
        "nf4",
        "awq",
    ):  # 8-bit inputs get one scale per call, so a cache may change the tokens
        plain = again.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **call)
        assert torch.equal(ours, plain)


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
    with pytest.raises(BadData, match="no saved model"):
        stored_integers(tmp_path / "nowhere")
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
    with pytest.raises(BadSetting, match="embedding no width"):
        quantized("llama", "rtn", bits=widths)
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
