"""Counts the operations of a call and holds its speed against what the machine can do.

The two shares, of matmul rate and of memory bandwidth, tell a reader what limits the model: the larger one.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lmcompress import device
from lmcompress.measure.calls import Shape, prepared_calls


def flops(model: nn.Module, *, kind: str, shape: Shape) -> int | None:
    """Return the floating-point operations of one call of `shape` (per token for "decode"), or None for 0.

    A multiply-add counts as two. Counted are matrix products, zeros included, and attention, causal in full;
    element-wise work is left out. A layer that `multiplies_integers` counts like its product in floating
    point; other integer kernels and sparse ones are not seen by torch's counter.
    """
    integer_flops = [0]

    def add(layer: nn.Module, _, output: torch.Tensor) -> None:
        integer_flops[0] += 2 * output.numel() * layer.in_features

    with torch.no_grad():
        call = prepared_calls({"model": model}, shape, kind=kind)["model"]
        call.prepare()
        hooks = [layer.register_forward_hook(add) for layer in _integer_kernels(model)]
        try:
            with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
                call.run()
        finally:
            for hook in hooks:
                hook.remove()
    return (counter.get_total_flops() + integer_flops[0]) // call.steps or None


def _integer_kernels(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if getattr(layer, "multiplies_integers", False)]


def compute(model: nn.Module, *, kind: str, shape: Shape, seconds: float | None) -> dict | None:
    """Return the row's "compute" for one call (per token for "decode") of `shape` that takes `seconds`.

    Shares are fractions of `device.ceiling()` for the model's dtype: of bandwidth a lower bound, each weight
    that the call uses being read once; of matmul null where integers are multiplied. None for a graph that
    another library runs: torch sees neither its operations nor its weights.
    """
    if hasattr(model, "stands_for"):
        return None
    counted = flops(model, kind=kind, shape=shape)
    first = next(p for p in model.parameters() if p.is_floating_point())
    rate = counted / seconds / 1e9 if counted and seconds else None
    integers = bool(_integer_kernels(model))
    machine = device.ceiling(first.device, first.dtype, at_least=0.0 if integers else rate or 0.0)
    moved = weight_bytes_read(model, shape)
    return {
        "flops": counted,
        "shape": shape.name,
        "gflops_per_s": rate,
        "ceiling_gflops": machine["gflops_per_s"],
        "matmul_share": None if integers or not rate else rate / machine["gflops_per_s"],
        "bandwidth_share": seconds and moved / seconds / 1e9 / machine["bandwidth_gb_per_s"],
    }


def weight_bytes_read(model: nn.Module, shape: Shape) -> int:
    """Return the bytes of parameters and buffers one call must read: not of tables only looked up in.

    Of an encoder-decoder, "encode" reads the encoder, "decode" everything else, "forward" both.
    """
    used = {id(p): p for p in (*model.parameters(), *model.buffers())}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_tensors = set() if head is None else _held(head)
    for module in model.modules():
        if hasattr(module, "num_embeddings"):  # an nn.Embedding, or its table as integers
            for key in _held(module) - head_tensors:
                used.pop(key, None)
    if getattr(model.config, "is_encoder_decoder", False) and shape.part != "forward":
        encoder = _held(model.get_encoder()) - head_tensors
        used = {key: p for key, p in used.items() if (key in encoder) == (shape.part == "encode")}
    return sum(tensor.nbytes for tensor in used.values())


def _held(module: nn.Module) -> set[int]:
    return {id(t) for t in (*module.parameters(), *module.buffers())}


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__) -> int:
    """Return QKᵀ and the product with V: 2·b·h·s_q·s_k·(d_k + d_v), of however many key/value heads."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _packed_flops(inputs: Sequence[int], *_, out_shape: Sequence[int], **__) -> int:
    """Return 2·rows·in·out of a product with packed integers, whatever their layout."""
    return 2 * inputs[1] * math.prod(out_shape)


# torch has no formulas for these: without them such products count as nothing.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._weight_int4pack_mm: _packed_flops,
    torch.ops.aten._weight_int4pack_mm_for_cpu: _packed_flops,
    torch.ops.aten._weight_int8pack_mm: _packed_flops,
}
