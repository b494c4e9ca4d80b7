"""Weights as integers: rounding to a grid, packing into bytes, layers that hold the result in buffers.

A weight is s·(q - z): q a whole number of `bits` bits, one scale s and zero point z for each group of
neighbouring inputs of a row. Layout: 8 bits as int8; 4 and 3 bits as uint8, q + 2^(bits-1) of neighbouring
inputs one after the other in little-endian order, each row padded to whole bytes.
"""

import math
import warnings
from collections.abc import Callable
from operator import attrgetter, is_
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import BadSetting
from lmcompress.models.integer_kernels import ROWS, kernel_of
from lmcompress.models.serialization import register_module
from lmcompress.models.surgery import replace_modules

BITS = (8, 4, 3)
# Quantiles of a normal variable, 8 above zero, 7 below, and zero itself. (Dettmers et al. 2023, appendix E)
NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)


def _check_grid(bits: int, group_size: int | None, symmetric: bool = False) -> None:
    if isinstance(bits, bool) or bits not in BITS:
        raise BadSetting(f"bits={bits!r} is none of {', '.join(map(str, BITS))}.")
    if group_size is not None and not (type(group_size) is int and group_size > 0):
        raise BadSetting(
            f"group_size={group_size!r} is no whole number of inputs above 0; None gives a row one scale."
        )
    if not isinstance(symmetric, bool):
        raise BadSetting(f"symmetric={symmetric!r} is neither True nor False.")


def quantize(
    weight2d: Tensor, *, bits: int, group_size: int | None = None, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round `weight2d` `(out, in)` to the nearest points of a grid per group of inputs (None: a whole row).

    Symmetric: s = max|w| / (2^(bits-1) - 1/2), z = 0. Else the grid spans least to greatest weight, and zero:
    s = (max - min) / (2^bits - 1). No weight moves by more than s/2, but for the rounding of s to its dtype.

    Returns integers `(out, in)` int8 in [-2^(bits-1), 2^(bits-1) - 1]; scales `(out, groups)` in the weights'
    dtype; zero points `(out, groups)` int8 in the same range, or None if symmetric. Raises `BadSetting`.
    """
    _check_grid(bits, group_size, symmetric)
    groups, half = _grouped(weight2d.detach(), group_size).float(), 2 ** (bits - 1)
    if symmetric:
        scales, zeros = _scales(groups.abs().amax(-1) / (half - 0.5), weight2d.dtype), None
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = _scales((high - low) / (2 * half - 1), weight2d.dtype)
        zeros = ((-low / scales.float()).round() - half).clamp(-half, half - 1).to(torch.int8)
    integers = to_grid(groups, scales[..., None], None if zeros is None else zeros[..., None], bits)
    return integers.flatten(1)[:, : weight2d.shape[1]].contiguous(), scales, zeros


def quantize_nf4(weight2d: Tensor, *, group_size: int | None = 64) -> tuple[Tensor, Tensor]:
    """Round as `quantize` does, to the values of `NF4` (integers are places in it, less 8) times max|w|."""
    _check_grid(4, group_size)
    groups = _grouped(weight2d.detach(), group_size).float()
    scales = _scales(groups.abs().amax(-1), weight2d.dtype)
    codebook = torch.tensor(NF4, device=groups.device)
    values = (groups / scales.float()[..., None]).contiguous()
    places = torch.bucketize(values, (codebook[1:] + codebook[:-1]) / 2)
    return (places - 8).to(torch.int8).flatten(1)[:, : weight2d.shape[1]].contiguous(), scales


def dequantize(
    integers: Tensor, scales: Tensor, zeros: Tensor | None, *, group_size: int | None, nf4: bool = False
) -> Tensor:
    """Return the weights `(out, in)` in the scales' dtype that `quantize` or `quantize_nf4` rounded."""
    groups, scales = _grouped(integers, group_size), scales[..., None]
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
    units = _grouped(whole, count, full=True)
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
    units = _grouped(packed, size, full=True)
    whole = torch.empty(*units.shape[:2], count, dtype=torch.uint8, device=units.device)
    for i in range(count):
        byte, shift = divmod(bits * i, 8)
        value = units[..., byte] >> shift
        if shift + bits > 8:
            value = value | units[..., byte + 1] << (8 - shift)
        torch.bitwise_and(value, 2**bits - 1, out=whole[..., i])
    return whole.flatten(1)[:, :width].view(torch.int8) - 2 ** (bits - 1)


def row_bytes(width: int, bits: int) -> int:
    """Return the bytes of a row of `width` packed integers."""
    return math.ceil(width * bits / 8)


def _grouped(matrix: Tensor, size: int | None, *, full: bool = False) -> Tensor:
    """Return `(rows, n)` as `(rows, groups, size)`, the last group filled up with zeros."""
    width = matrix.shape[1]
    size = size if full else min(size or width, width)
    return F.pad(matrix, (0, -width % size)).unflatten(1, (-1, size))


def _scales(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `steps` in `dtype`; 1 where they are nothing, for a group of zeros."""
    scales = steps.to(dtype)
    return scales.masked_fill(scales == 0, 1)


def _unit(bits: int) -> tuple[int, int]:
    """Return the fewest values that fill whole bytes, and how many bytes."""
    size = math.lcm(bits, 8)
    return size // bits, size // 8


class Packed(nn.Module):
    """A matrix `(out, in)` of integers, scales and zero points; base of the layers that hold one.

    `packed`, `scales`, `zeros`: as `pack` and `quantize` return them. `width`: in. `nf4`: the integers are
    places in that codebook. `channel_scale`: `(in,)`, what the inputs are multiplied by first (AWQ), or None.
    """

    weight = None  # there is no such tensor; T5 asks
    W_q = property(attrgetter("packed"))  # where peft looks for the device of such a layer

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        *,
        width: int,
        bits: int,
        group_size: int | None,
        nf4: bool = False,
        bias: Tensor | None = None,
        channel_scale: Tensor | None = None,
    ):
        super().__init__()
        self.rows, self.width, self.bits, self.group_size, self.nf4 = (
            len(packed),
            width,
            bits,
            group_size,
            nf4,
        )
        buffers = {"packed": packed, "scales": scales, "zeros": zeros, "channel_scale": channel_scale}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    @property
    def weight_count(self) -> int:
        return self.rows * self.width

    @property
    def integers(self) -> Tensor:
        """Return `(out, in)` int8."""
        return unpack(self.packed, self.bits, self.width)

    def dequantized(self, index: Tensor | None = None) -> Tensor:
        """Return the weights `(out, in)` in the scales' dtype, or only the rows in `index`."""
        values = self._on_grid(index)
        return values if self.channel_scale is None else values * self.channel_scale

    def _on_grid(self, index: Tensor | None = None) -> Tensor:
        """Return what `dequantized` does, for inputs that `channel_scale` was put on already."""
        buffers = (self.packed, self.scales, self.zeros)
        packed, scales, zeros = (t if t is None or index is None else t[index] for t in buffers)
        integers = unpack(packed, self.bits, self.width)
        return dequantize(integers, scales, zeros, group_size=self.group_size, nf4=self.nf4)

    def spec(self) -> dict:
        grid = {name: getattr(self, name) for name in ("rows", "width", "bits", "group_size", "nf4")}
        held = {name: getattr(self, name) is not None for name in ("bias", "channel_scale")}
        return {**grid, **held, "symmetric": self.zeros is None}

    @classmethod
    def from_spec(cls, spec: dict) -> "Packed":
        """Return a layer with the shapes of the one `spec` was taken from, its values still to come."""
        grid = {name: spec[name] for name in ("width", "bits", "group_size", "nf4")}
        rows, width, bits = spec["rows"], spec["width"], spec["bits"]
        scales = torch.empty(rows, math.ceil(width / (spec["group_size"] or width)))
        return cls(
            torch.empty(rows, row_bytes(width, bits), dtype=torch.int8 if bits == 8 else torch.uint8),
            scales,
            None if spec["symmetric"] else scales.to(torch.int8),
            bias=nn.Parameter(torch.empty(rows)) if spec["bias"] else None,
            channel_scale=torch.empty(width) if spec.get("channel_scale") else None,
            **grid,
        )

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.width}, bits={self.bits}, group_size={self.group_size}"


Unpack = Literal["auto", True, False]


@register_module
class QuantizedLinear(Packed):
    """A linear layer whose weights are integers; it takes the place of a Linear or a Conv1D.

    A call of up to `integer_kernels.ROWS` inputs runs through a kernel of integers where one fits; any other
    through floating-point weights that are made once, at the first such call, and held beside the integers
    (see `set_unpacking`). What is held so is never saved, copied or pickled, and made anew when a buffer, the
    bias or the inputs' dtype changes. With gradients to pass on, the weights are made again in each pass.
    """

    multiplies_integers = False
    execution = "torch's kernels of integers for few rows where they fit, else made floating-point once"
    in_features, out_features = property(attrgetter("width")), property(attrgetter("rows"))
    _unpack: Unpack = "auto"

    def __init__(self, *tensors: Tensor | None, **grid):
        super().__init__(*tensors, **grid)
        self._held: dict[Callable, tuple] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b in the dtype of x, `(..., in)` to `(..., out)`."""
        if torch.compiler.is_compiling():  # nothing made in a graph outlives it
            return self._from_integers(x)
        if torch.is_grad_enabled() and x.requires_grad and self._unpack is not True:
            return checkpoint(self._from_integers, x, use_reentrant=False, preserve_rng_state=False)
        few = 0 < x.numel() <= ROWS * self.width
        if self._unpack is False or self._unpack == "auto" and few:
            if kernel := self._once(QuantizedLinear._kernel, x.dtype):
                y = kernel(self._scaled(x).reshape(-1, self.width)).view(*x.shape[:-1], self.rows)
                return y if self.bias is None else y + self.bias
            if self._unpack is False:
                return self._from_integers(x)
        return F.linear(x, self._once(QuantizedLinear._floats, x.dtype), self.bias)

    def _from_integers(self, x: Tensor) -> Tensor:
        return F.linear(self._scaled(x), self._on_grid().to(x.dtype), self.bias)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.channel_scale is None else x * self.channel_scale.to(x.dtype)

    def _floats(self, dtype: torch.dtype) -> Tensor:
        return self.dequantized().to(dtype)

    def _kernel(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        grid = {"shape": (self.rows, self.width), "bits": self.bits, "group_size": self.group_size}
        if self.nf4:  # torch has none for it
            return None
        return kernel_of(lambda: self.integers, self.scales, self.zeros, dtype=dtype, **grid)

    def _once(self, make: Callable, dtype: torch.dtype):
        """Return `make(self, dtype)`, made again only when what it is made of has changed."""
        tensors = (*self._buffers.values(), self.bias)
        # Private: torch has no other way to see that a tensor was changed in place.
        versions = [0 if t is None or t.is_inference() else t._version for t in tensors]
        of, at, sources, held = self._held.get(make, (None, None, (), None))
        if of != dtype or at != versions or not all(map(is_, sources, tensors)):
            with torch.inference_mode(False), torch.no_grad():  # so that a later call may have gradients
                held = make(self, dtype)
            self._held[make] = dtype, versions, tensors, held
        return held

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_held": {}}


@register_module
class QuantizedEmbedding(Packed):
    """A table of integers in the place of an embedding; only the rows that are looked up become floats."""

    num_embeddings, embedding_dim = property(attrgetter("rows")), property(attrgetter("width"))

    def __init__(self, *tensors: Tensor | None, **grid):
        super().__init__(*tensors, **grid)
        self.embed_scale = 1.0  # what the rows are multiplied by, in the families whose table does so

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows of the table, `(...)` to `(..., width)`."""
        return self.dequantized(ids.flatten()).view(*ids.shape, self.width) * self.embed_scale


@register_module
class Int8DynamicLinear(QuantizedLinear):
    """A linear layer that rounds its inputs to 8 bits, too, and multiplies integers: torch's CPU kernel.

    8-bit weights with one scale per row. Where gradients are asked for it uses the dequantized weights.
    """

    multiplies_integers = True  # which torch's operation counter does not see
    execution = "torch linear_dynamic"

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, `(..., in)` to `(..., out)`; inputs rounded over the whole batch to one scale."""
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)
        weight = self._once(Int8DynamicLinear._prepacked, torch.float32)
        # As in torch.ao, a reduced range of inputs keeps 16-bit sums from overflowing without VNNI.
        return torch.ops.quantized.linear_dynamic(self._scaled(x).float(), weight, True).to(x.dtype)

    def _prepacked(self, _: torch.dtype) -> torch.ScriptObject:
        """Return weights and bias in the kernel's layout.

        The kernel takes its weights as a tensor of torch's quantized dtypes only, which are deprecated. What
        stays is no match for it: `onednn.qlinear_pointwise` behind `aminmax` and a rounding of the inputs
        takes 1.5 to 2.1 times as long at 1 and 8 rows, at 128 mostly 0.8 to 1.5 (768x768 to 3072x768, Zen 5).
        """
        scales, zeros = self.scales[:, 0].double(), torch.zeros(self.rows, dtype=torch.long)
        bias = None if self.bias is None else self.bias.detach().float()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            # Private: the public `quantize_per_channel` would round again what is on the grid already.
            weight = torch._make_per_channel_quantized_tensor(self.packed, scales, zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, bias)


def set_unpacking(model: nn.Module, unpack: Unpack) -> int:
    """Say when layers of integers hold floating-point weights too; return the bytes that they hold by now.

    "auto": from the first call that no kernel of integers is faster for. True: from now on, for every call,
    also with gradients; the results are those of the dequantized weights to the last digit, in as much
    memory as the dense model's and the integers'. False: never, for models that must stay small: kernels of
    integers for every call where they fit, elsewhere weights made again in each. Layers that multiply
    integers alone (int8-dynamic) take no part. Raises `BadSetting`.
    """
    if not (unpack is True or unpack is False or unpack == "auto"):
        raise BadSetting(f'unpack={unpack!r} is none of True, False, "auto".')
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and not m.multiplies_integers]
    for layer in layers:
        layer._unpack, layer._held = unpack, {}
        if unpack is True:
            layer._once(QuantizedLinear._floats, layer.scales.dtype)
    return unpacked_bytes(model)


def unpacked_bytes(model: nn.Module) -> int:
    """Return the bytes of floating-point weights that layers of integers hold by now, beside the integers."""
    held = [getattr(module, "_held", {}).get(QuantizedLinear._floats) for module in model.modules()]
    return sum(entry[3].nbytes for entry in held if entry)


def store_as_integers(
    model: nn.Module, weight: Tensor, tensors: tuple, *, kind: type[QuantizedLinear] = QuantizedLinear, **grid
) -> None:
    """Put packed layers in the place of every Linear, Conv1D and embedding that holds this very `weight`.

    They share the `tensors` (integers `(out, in)`, scales and zero points, as `quantize` returns them), so
    what was tied stays tied; a layer used in several places is replaced by one. `kind` takes the place of a
    linear layer; `grid`: `bits`, `group_size`, `nf4`, `channel_scale`.
    """
    integers, scales, zeros = tensors
    stored = pack(integers, grid["bits"]), scales, zeros

    def like(layer: nn.Module) -> Packed:
        if isinstance(layer, nn.Linear | Conv1D):
            return kind(*stored, width=integers.shape[1], bias=layer.bias, **grid)
        table = QuantizedEmbedding(*stored, width=integers.shape[1], **grid)
        table.embed_scale = float(torch.as_tensor(getattr(layer, "embed_scale", 1.0)).to(weight.dtype))
        return table

    replace_modules(model, lambda module: getattr(module, "weight", None) is weight, like)
