"""Weights as integers: rounding to a grid, and packing into bytes (`packed` holds the result).

A weight is s·(q - z): q a whole number of `bits` bits, one scale s and zero point z for each group of
neighbouring inputs of a row. Layout: 8 bits as int8; 4 and 3 bits as uint8, q + 2^(bits-1) of neighbouring
inputs one after the other in little-endian order (two to a byte; eight to three bytes), each row padded to
whole bytes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcompress.errors import BadSetting

BITS = (8, 4, 3)
# Quantiles of a normal variable, 8 above zero, 7 below, and zero itself. (Dettmers et al. 2023, appendix E)
NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)


def check_grid(bits: int, group_size: int | None, symmetric: bool = False) -> None:
    """Raise `BadSetting` for a width, a group or a symmetry that there is not."""
    if isinstance(bits, bool) or bits not in BITS:
        raise BadSetting(f"bits={bits!r} is none of {', '.join(map(str, BITS))}.")
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if group_size is not None and not (whole and group_size > 0):
        raise BadSetting(
            f"group_size={group_size!r} is no whole number of inputs above 0; None gives a row one scale."
        )
    if not isinstance(symmetric, bool):
        raise BadSetting(f"symmetric={symmetric!r} is neither True nor False.")


def quantize(
    weight2d: Tensor, *, bits: int, group_size: int | None = None, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round `weight2d` `(out, in)` to the nearest points of a grid per group of inputs.

    Symmetric: s = max|w| / (2^(bits-1) - 1/2), z = 0. Else the grid spans least to greatest weight, and zero:
    s = (max - min) / (2^bits - 1). No weight moves by more than s/2, but for the rounding of s to its dtype.

    Args:
        group_size: inputs that share a scale, the last group of a row what is left; None: the whole row.

    Returns:
        Integers `(out, in)` int8 in [-2^(bits-1), 2^(bits-1) - 1]; scales `(out, groups)` in the weights'
        dtype; zero points `(out, groups)` int8 in the same range, or None if symmetric.

    Raises:
        BadSetting: no such bits, group or symmetry.
    """
    check_grid(bits, group_size, symmetric)
    groups, half = grouped(weight2d.detach(), group_size).float(), 2 ** (bits - 1)
    if symmetric:
        scales = _scales(groups.abs().amax(-1) / (half - 0.5), weight2d.dtype)
        zeros = None
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = _scales((high - low) / (2 * half - 1), weight2d.dtype)
        zeros = ((-low / scales.float()).round() - half).clamp(-half, half - 1).to(torch.int8)
    integers = to_grid(groups, scales[..., None], None if zeros is None else zeros[..., None], bits)
    return integers.flatten(1)[:, : weight2d.shape[1]].contiguous(), scales, zeros


def quantize_nf4(weight2d: Tensor, *, group_size: int | None = 64) -> tuple[Tensor, Tensor]:
    """Round as `quantize` does, to the 16 values of NF4 times the largest |w| of a group.

    The integers are places in it, less 8.
    """
    check_grid(4, group_size)
    groups = grouped(weight2d.detach(), group_size).float()
    scales = _scales(groups.abs().amax(-1), weight2d.dtype)
    codebook = torch.tensor(NF4, device=groups.device)
    values = (groups / scales.float()[..., None]).contiguous()
    places = torch.bucketize(values, (codebook[1:] + codebook[:-1]) / 2)
    return (places - 8).to(torch.int8).flatten(1)[:, : weight2d.shape[1]].contiguous(), scales


def dequantize(
    integers: Tensor, scales: Tensor, zeros: Tensor | None, *, group_size: int | None, nf4: bool = False
) -> Tensor:
    """Return the weights `(out, in)` in the scales' dtype that `quantize` or `quantize_nf4` rounded."""
    groups, scales = grouped(integers, group_size), scales[..., None]
    if nf4:
        values = torch.tensor(NF4, dtype=scales.dtype, device=scales.device)[groups.int() + 8].mul_(scales)
    else:
        values = from_grid(groups, scales, None if zeros is None else zeros[..., None])
    return values.flatten(1)[:, : integers.shape[1]]


def to_grid(values: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Return the integers nearest to float32 `values`, int8; scales and zero points broadcast over them."""
    whole = (values / scales.float()).round_()
    if zeros is not None:
        whole += zeros
    return whole.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


def from_grid(integers: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Return s·(q - z) in the scales' dtype."""
    values = integers.to(scales.dtype)
    return (values if zeros is None else values.sub_(zeros)).mul_(scales)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Return `(rows, n)` int8 in the layout above: `(rows, n)` int8 or `(rows, ⌈n·bits/8⌉)` uint8."""
    if bits == 8:
        return integers
    count, size = _unit(bits)
    whole = (integers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    units = F.pad(whole, (0, -whole.shape[1] % count)).unflatten(1, (-1, count))
    packed = torch.zeros(*units.shape[:2], size + 1, dtype=torch.uint8, device=units.device)
    for i in range(count):
        byte, shift = divmod(bits * i, 8)
        packed[..., byte] |= units[..., i] << shift
        packed[..., byte + 1] |= units[..., i] >> (8 - shift) if shift else 0
    return packed[..., :size].flatten(1)[:, : row_bytes(integers.shape[1], bits)].contiguous()


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Return the `(rows, width)` integers that `pack` was given."""
    if bits == 8:
        return packed
    count, size = _unit(bits)
    units = F.pad(packed, (0, -packed.shape[1] % size)).unflatten(1, (-1, size))
    whole = torch.empty(*units.shape[:2], count, dtype=torch.uint8, device=units.device)
    for i in range(count):
        byte, shift = divmod(bits * i, 8)
        value = units[..., byte] >> shift
        if shift + bits > 8:
            value = value | units[..., byte + 1] << (8 - shift)
        torch.bitwise_and(value, 2**bits - 1, out=whole[..., i])
    return whole.flatten(1)[:, :width].view(torch.int8) - 2 ** (bits - 1)


def grouped(matrix: Tensor, size: int | None) -> Tensor:
    """Return `(rows, n)` as `(rows, groups, size)`, the last group filled up with zeros."""
    size = min(size or matrix.shape[1], matrix.shape[1])
    return F.pad(matrix, (0, -matrix.shape[1] % size)).unflatten(1, (-1, size))


def _scales(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `steps` in `dtype`; 1 where they are nothing, for a group of zeros."""
    scales = steps.to(dtype)
    return scales.masked_fill(scales == 0, 1)


def _unit(bits: int) -> tuple[int, int]:
    """Return the fewest values that fill whole bytes, and how many bytes."""
    size = math.lcm(bits, 8)
    return size // bits, size // 8


def row_bytes(width: int, bits: int) -> int:
    """Return the bytes of a row of `width` packed integers."""
    return math.ceil(width * bits / 8)
