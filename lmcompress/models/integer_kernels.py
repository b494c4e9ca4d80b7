"""Torch's kernels that multiply by packed integers: which fit a matrix, and the weights in their layout.

They read a quarter or half of the bytes that a bfloat16 product reads, so they win while a call has few rows
of input (a decoded token) and lose when it has many (`benchmarks/packed_layers.py` measures both).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 8  # of input, up to which they are the faster ones, in bfloat16 and float32
CAST_PAYS_FROM = 2**17  # weights: below, casting float32 inputs to bfloat16 and back takes what is gained
_GROUPS = (256, 128, 64, 32)  # inputs that share a scale in the 4-bit layout
_ROWS_OF_A_TILE = 16  # of weights
_INPUTS_OF_A_LOAD = (
    16  # that the 8-bit kernel reads at once, at aligned addresses: any other ends the process
)
_K_TILES = 8  # of 16 inputs, that CUDA's layout keeps together

Kernel = Callable[[Tensor], Tensor]


def kernel_of(
    integers: Callable[[], Tensor],
    scales: Tensor,
    zeros: Tensor | None,
    *,
    shape: tuple[int, int],
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> Kernel | None:
    """Return a function of inputs `(rows, in)` in `dtype` that gives x Wᵀ `(rows, out)`; None if none fits.

    W `(out, in)` is s·(q - z), as `packed.quantize` returns `integers()`, `scales` and `zeros`. The kernels
    take bfloat16, and others' inputs are cast to it: 0.3 % of the outputs, where rounding normal weights to
    4 bits is 8 % and to 8 bits, which have their scales in float32, 0.8 %.
    """
    rows, width = shape
    size = min(group_size or width, width)
    if not _fast(scales.device) or dtype != torch.bfloat16 and rows * width < CAST_PAYS_FROM:
        return None
    if bits == 8:
        fits = size == width and width % _INPUTS_OF_A_LOAD == 0 and scales.device.type == "cpu"
        return _eight_bits(integers(), scales, zeros, dtype=dtype) if fits else None
    group = next((group for group in _GROUPS if size % group == 0 and width % size == 0), None)
    on_cuda = scales.device.type == "cuda"
    if group is None or on_cuda and width % (16 * _K_TILES):
        return None
    return _four_bits(integers(), scales, zeros, group=group, repeats=size // group, dtype=dtype)


def _fast(device: torch.device) -> bool:
    """Return whether torch has more than a plain loop there (CUDA's kernel is as documented, not run)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _aligned(matrix: Tensor) -> Tensor:
    """Return the matrix where the 8-bit kernel can read it: a copy, if it lies elsewhere, as in a file."""
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % (_INPUTS_OF_A_LOAD * matrix.element_size()) else matrix


def _eight_bits(integers: Tensor, scales: Tensor, zeros: Tensor | None, *, dtype: torch.dtype) -> Kernel:
    """One scale per row, put on in float32; it knows no zero points, so Σ x·z is taken off its result."""
    scale = scales[:, 0].float()
    unscaled, integers = torch.ones_like(scale, dtype=torch.bfloat16), _aligned(integers)
    shift = None if zeros is None else zeros[:, 0].float()

    def multiply(x: Tensor) -> Tensor:
        x = _aligned(x.bfloat16())
        y = torch.ops.aten._weight_int8pack_mm(x, integers, unscaled).float()
        if shift is not None:
            y -= x.sum(-1, keepdim=True, dtype=torch.float32) * shift
        return y.mul_(scale).to(dtype)

    return multiply


def _four_bits(
    integers: Tensor, scales: Tensor, zeros: Tensor | None, *, group: int, repeats: int, dtype: torch.dtype
) -> Kernel:
    """The kernel's weights are s·(q' - 8) + c with q' from 0 to 15, so c is -s·z; 3 bits fit in as they are.

    Rows are filled up to whole tiles; a group longer than the kernel's is `repeats` of those.
    """
    rows = len(integers)
    filled = (0, 0, 0, -rows % _ROWS_OF_A_TILE)
    codes = F.pad(integers, filled) + 8
    offsets = torch.zeros_like(scales) if zeros is None else -scales.float() * zeros
    grid = torch.stack(
        [F.pad(t.float(), filled).repeat_interleave(repeats, 1) for t in (scales, offsets)], -1
    )
    grid = grid.transpose(0, 1).bfloat16().contiguous()  # (groups, out, 2)
    if codes.is_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).view(torch.uint8)
        weight, operation = torch._convert_weight_to_int4pack(pairs, _K_TILES), torch._weight_int4pack_mm
    else:
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        operation = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: operation(x.bfloat16(), weight, group, grid)[:, :rows].to(dtype)
