"""Layers of integers at work: kernels where they fit, floats made once, and nothing of it in a file."""

import copy
import logging
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.errors import BadSetting
from lmcompress.measure.calls import Shape, shape_signature
from lmcompress.measure.compute import flops
from lmcompress.models import integer_kernels, packed, storage
from lmcompress.models.families import integer_layers
from lmcompress.models.packed import (
    Int8DynamicLinear,
    Packed,
    QuantizedLinear,
    set_unpacking,
    store_as_integers,
    unpacked_bytes,
)
from lmcompress.train.lora import Lora, adapted
from tests.test_pruning import batches
from tests.tiny_models import tiny

GRIDS = [  # bits, group_size, symmetric, rows; the kernels take 32 to 256 inputs a group and 16 rows a tile
    (4, 64, False, 512),
    (4, None, True, 512),
    (3, 96, False, 500),
    (8, None, False, 500),
    (8, None, True, 512),
]
needs_kernels = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torch has plain loops here"
)


def layer_of(bits, group_size, symmetric, rows=512, width=768, dtype=torch.float32) -> QuantizedLinear:
    """A layer of integers with a bias, and inputs that lie beside zero."""
    torch.manual_seed(0)
    linear = nn.Linear(width, rows).to(dtype)
    whole = packed.quantize(linear.weight, bits=bits, group_size=group_size, symmetric=symmetric)
    holder = nn.Sequential(linear)
    store_as_integers(holder, linear.weight, whole, bits=bits, group_size=group_size)
    return holder[0]


def inputs(rows=2, width=768, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).add(0.3).to(dtype)


def relative(a, b) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def expected(layer, x):
    return nn.functional.linear(x.float(), layer.dequantized().float(), layer.bias.float())


def runs_a_kernel(layer, x) -> bool:
    """Whether a call reaches the float product: forbidden, it fails."""
    refused = {"_floats": mock.DEFAULT, "_from_integers": mock.DEFAULT}
    with mock.patch.multiple(QuantizedLinear, **refused) as products:
        for product in products.values():
            product.side_effect = AssertionError
        try:
            layer(x)
        except AssertionError:
            return False
    return True


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, group_size, symmetric, rows", GRIDS)
@torch.no_grad()
def test_few_rows_go_through_a_kernel_within_the_precision_of_the_format(
    bits, group_size, symmetric, rows, dtype
):
    layer = layer_of(bits, group_size, symmetric, rows, dtype=dtype)
    few, many = inputs(integer_kernels.ROWS, dtype=dtype), inputs(integer_kernels.ROWS + 1, dtype=dtype)
    assert runs_a_kernel(layer, few) and not runs_a_kernel(layer, many)
    for x in (few, many, few[:1], few.view(2, -1, 768), few[:0]):
        y = layer(x)
        assert y.dtype == dtype and y.shape == (*x.shape[:-1], rows)
        assert not y.numel() or relative(y, expected(layer, x)) < 5e-3  # rounding to 4 bits itself: 6e-2
    exact = 1e-6 if dtype == torch.float32 else 6e-3
    assert relative(layer(many), expected(layer, many)) < exact


@needs_kernels
@pytest.mark.parametrize("offset", [1, 8, 16])
@torch.no_grad()
def test_eight_bits_may_lie_anywhere_as_in_a_mapped_file(offset):
    def moved(tensor):  # bytes beyond an address that every load can take
        memory = torch.zeros(tensor.nbytes + 128, dtype=torch.uint8)
        start = -memory.data_ptr() % 64 + offset * tensor.element_size()
        return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    layer, x = layer_of(8, None, False, dtype=torch.bfloat16), inputs(3, dtype=torch.bfloat16)
    layer.packed = moved(layer.packed)
    for rows in (moved(x), x[:, None].expand(3, 2, 768)[:, 1]):
        assert runs_a_kernel(layer, rows) and relative(layer(rows), expected(layer, rows)) < 5e-3


@pytest.mark.parametrize(
    "bits, group_size, width", [(4, 20, 768), (4, 48, 768), (8, 64, 768), (4, 64, 800), (8, None, 776)]
)
@torch.no_grad()
def test_a_grid_that_no_kernel_has_is_unpacked_once_and_is_exact(bits, group_size, width):
    layer = layer_of(bits, group_size, False, width=width)
    x = inputs(1, width)
    assert not runs_a_kernel(layer, x) and relative(layer(x), expected(layer, x)) < 1e-6
    small = layer_of(4, 32, False, rows=64, width=64)  # a cast would take longer than the product
    assert not runs_a_kernel(small, inputs(1, 64))


def wide_llama(**changes) -> LlamaForCausalLM:
    """A decoder whose matrices are large enough for the kernels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | changes)).eval()


def counted(model, *arguments, **keywords) -> int:
    """How many matrices one call turns into floats."""
    with mock.patch.object(packed, "dequantize", wraps=packed.dequantize) as made, torch.no_grad():
        model(*arguments, **keywords)
    return made.call_count


@pytest.mark.parametrize("name, settings", [("rtn", {"bits": 4, "group_size": 64}), ("nf4", {})])
def test_no_call_but_the_first_makes_floats(name, settings):
    model, _ = compress.get(name)(wide_llama(), Context(), **settings)
    many = torch.arange(32).view(2, 16)
    assert unpacked_bytes(model) == 0
    assert counted(model, many) == 14 and counted(model, many) == 0
    assert unpacked_bytes(model) == sum(4 * layer.weight_count for layer in integer_layers(model))
    few = torch.arange(2).view(1, 2)
    assert counted(model, few) == counted(model, few) == 0
    assert counted(copy.deepcopy(model), many) == 14  # a copy has none of it
    set_unpacking(model, False)
    assert counted(model, many) == (14 if name == "nf4" else 0) and unpacked_bytes(model) == 0
    model.bfloat16()
    set_unpacking(model, True)
    assert unpacked_bytes(model) == sum(2 * layer.weight_count for layer in integer_layers(model))
    assert counted(model, many) == counted(model, few) == 0
    pytest.raises(BadSetting, set_unpacking, model, "always").match("auto")


def test_what_is_held_follows_buffers_bias_and_dtype():
    layer = layer_of(4, 64, False)
    x = inputs(integer_kernels.ROWS + 1)

    def agrees(rows=slice(None)) -> bool:
        return relative(layer(x[rows].to(layer.scales.dtype)), expected(layer, x[rows])) < 6e-3

    with torch.no_grad():
        assert agrees() and agrees([0])
        layer.scales.mul_(2)
        assert agrees() and agrees([0])
        layer.zeros = layer.zeros + 1
        assert agrees() and agrees([0])
        layer.bias.add_(1)
        assert agrees() and agrees([0])
        layer.bfloat16()
        assert agrees() and agrees([0])
    whole = Int8DynamicLinear(
        *packed.quantize(torch.randn(8, 32), bits=8, symmetric=True),
        width=32,
        bits=8,
        group_size=None,
        bias=nn.Parameter(torch.zeros(8)),
    )
    with torch.no_grad():
        before = whole(inputs(3, 32))
        whole.bias.add_(1)  # as a training of everything else does
        assert torch.allclose(whole(inputs(3, 32)), before + 1)


def test_the_first_call_may_be_under_inference_mode_and_copies_and_pickles_leave_floats_out():
    layer = layer_of(4, 64, False)
    x = inputs(integer_kernels.ROWS + 1)
    with torch.inference_mode():
        first = layer(x)
    layer._unpack = True
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert torch.allclose(leaf.grad, layer.dequantized().sum(0).expand_as(leaf), atol=1e-4)
    data = pickle.dumps(layer)
    assert len(data) < 1.2 * (layer.packed.nbytes + layer.scales.nbytes + layer.zeros.nbytes + 4 * 512 + 9000)
    with torch.no_grad():
        assert torch.equal(pickle.loads(data)(x), first) and torch.equal(copy.deepcopy(layer)(x), first)


@pytest.mark.parametrize("unpack", ["auto", True, False])
def test_saving_a_loaded_model_again_writes_the_same_bytes(unpack, tmp_path, caplog):
    model, report = compress.get("rtn")(
        wide_llama(tie_word_embeddings=True), Context(), bits=4, group_size=64, embeddings=True
    )
    folder = storage.save(model, tmp_path / "a", report=report)
    with caplog.at_level(logging.INFO, logger=storage.__name__):
        again, _ = storage.load(folder, unpack=unpack)
    assert ("floating-point weights are held" in caplog.text) == (unpack is True)
    assert bool(unpacked_bytes(again)) == (unpack is True)
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        logits = again(ids).logits
        assert relative(logits, model(ids).logits) < (6e-3 if unpack is False else 1e-6)
        again(ids[:1, :2])  # by now it holds whatever it makes
    second = storage.save(again, tmp_path / "b", report=report)
    for name in (storage.WEIGHTS, storage.RECORD):
        assert (folder / name).read_bytes() == (second / name).read_bytes()


def test_times_of_layers_that_computed_another_way_are_not_taken_over(monkeypatch):
    model, _ = compress.get("rtn")(tiny("bert"), Context(), bits=4)
    before = shape_signature(model)
    with torch.no_grad():
        model(torch.arange(32).view(2, 16))
    assert shape_signature(model) == before
    monkeypatch.setattr(QuantizedLinear, "execution", "made floating-point in every call")
    assert shape_signature(model) != before


@needs_kernels
@torch.no_grad()
def test_decoded_tokens_agree_with_the_dequantized_model_within_the_format():
    model = wide_llama()
    made, _ = compress.get("rtn")(model, Context(), bits=4, group_size=64)
    exact = copy.deepcopy(made)
    set_unpacking(exact, True)
    ids = torch.arange(48).view(2, 24)
    cache, exact_cache = (one(ids[:, :20], use_cache=True).past_key_values for one in (made, exact))
    for step in range(20, 24):
        token = ids[:, step, None]
        logits, wanted = (
            one(token, past_key_values=kv).logits for one, kv in ((made, cache), (exact, exact_cache))
        )
        dense = model(ids[:, : step + 1]).logits[:, -1:]
        assert relative(logits, wanted) < 0.1 * relative(wanted, dense)
    step = Shape("decode", 1, 16, 4)
    assert flops(made, kind="decoder", shape=step) == flops(exact, kind="decoder", shape=step)


def test_adapters_train_over_integers_that_stay_small():
    model = tiny("llama")
    text = batches("decoder")[0]
    with adapted(model, Lora(rank=2, bits=4)):
        held = [module for module in model.modules() if isinstance(module, Packed)]
        for _ in range(2):
            model(**text | {"labels": text["input_ids"]}).loss.backward()
        factors = [p for n, p in model.named_parameters() if "lora_" in n]
        assert held and all(factor.grad is not None for factor in factors)
        with torch.no_grad():
            model(**text)
        assert unpacked_bytes(model) == 0


def test_a_traced_graph_has_the_weights_as_they_are_and_leaves_nothing_behind():
    layer, x = layer_of(4, 64, False), inputs(4)
    program = torch.export.export(nn.Sequential(layer), (x,), strict=False)
    with torch.no_grad():
        assert relative(program.module()(x), expected(layer, x)) < 1e-6
    assert layer._held == {}
