"""Layers that hold their weights as integers in buffers, in place of linear layers and embeddings.

They save bytes; only the last, with torch's integer kernel, saves time. Stored and reloaded by `storage`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lmcompress.models.packing import dequantize, pack, row_bytes, unpack
from lmcompress.models.serialization import register_module
from lmcompress.models.surgery import replace_modules


class Packed(nn.Module):
    """A matrix `(out, in)` of integers, scales and zero points; base of the layers that hold one.

    Args:
        packed, scales, zeros: as `quantize` and `pack` return them, `zeros` None if symmetric.
        width: in.
        bits, group_size: of the grid.
        nf4: the integers are places in the codebook `NF4`.
        bias: of the layer.
        channel_scale: `(in,)`, what the inputs are multiplied by first, if the matrix was scaled (see
            `compress.quantization`).
    """

    weight = None  # there is no such tensor; T5 asks

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
        self.rows, self.width = len(packed), width
        self.bits, self.group_size, self.nf4 = bits, group_size, nf4
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("channel_scale", channel_scale)
        self.register_parameter("bias", bias)

    @property
    def weight_count(self) -> int:
        """Return the number of weights the integers stand for."""
        return self.rows * self.width

    @property
    def W_q(self) -> Tensor:
        """Return the packed bytes, under the name by which peft finds the device of such a layer."""
        return self.packed

    @property
    def integers(self) -> Tensor:
        """Return the integers `(out, in)` int8."""
        return unpack(self.packed, self.bits, self.width)

    def dequantized(self, index: Tensor | None = None) -> Tensor:
        """Return the weights `(out, in)` in the scales' dtype, or only the rows in `index`."""
        values = self.on_grid(index)
        return values if self.channel_scale is None else values * self.channel_scale

    def on_grid(self, index: Tensor | None = None) -> Tensor:
        """Return what `dequantized` does, for inputs that `channel_scale` was put on already."""
        buffers = (self.packed, self.scales, self.zeros)
        packed, scales, zeros = (t if t is None or index is None else t[index] for t in buffers)
        integers = unpack(packed, self.bits, self.width)
        return dequantize(integers, scales, zeros, group_size=self.group_size, nf4=self.nf4)

    def spec(self) -> dict:
        """Return what `from_spec` needs."""
        return {
            "rows": self.rows,
            "width": self.width,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.zeros is None,
            "nf4": self.nf4,
            "bias": self.bias is not None,
            "channel_scale": self.channel_scale is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> "Packed":
        """Return a layer with the shapes of the one `spec` was taken from, its values still to come."""
        rows, width, bits, size = (spec[name] for name in ("rows", "width", "bits", "group_size"))
        packed = torch.empty(rows, row_bytes(width, bits), dtype=torch.int8 if bits == 8 else torch.uint8)
        shape = rows, math.ceil(width / (size or width))
        return cls(
            packed,
            torch.empty(shape),
            None if spec["symmetric"] else torch.empty(shape, dtype=torch.int8),
            width=width,
            bits=bits,
            group_size=size,
            nf4=spec["nf4"],
            bias=nn.Parameter(torch.empty(rows)) if spec["bias"] else None,
            channel_scale=torch.empty(width) if spec.get("channel_scale") else None,
        )

    def extra_repr(self) -> str:
        """Return shape and grid, for printing."""
        return f"{self.rows}, {self.width}, bits={self.bits}, group_size={self.group_size}"


@register_module
class QuantizedLinear(Packed):
    """A linear layer whose weights are integers; it takes the place of a Linear or a Conv1D.

    Saves bytes, not time: every forward makes the floating-point weights anew, and drops them again.
    """

    @property
    def in_features(self) -> int:
        """Return the width of x."""
        return self.width

    @property
    def out_features(self) -> int:
        """Return the width of y."""
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b in the dtype of x, `(..., in)` to `(..., out)`.

        For the backward pass W is made again, not kept.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(self._map, x, use_reentrant=False, preserve_rng_state=False)
        return self._map(x)

    def _map(self, x: Tensor) -> Tensor:
        return F.linear(self.scaled(x), self.on_grid().to(x.dtype), self.bias)

    def scaled(self, x: Tensor) -> Tensor:
        """Return x times `channel_scale`, if there is one."""
        return x if self.channel_scale is None else x * self.channel_scale.to(x.dtype)


@register_module
class QuantizedEmbedding(Packed):
    """A table of integers in the place of an embedding; only the rows that are looked up become floats.

    `embed_scale`: what the rows are multiplied by, in the families whose table does so.
    """

    def __init__(self, *tensors: Tensor | None, **grid):
        super().__init__(*tensors, **grid)
        self.embed_scale = 1.0

    @property
    def num_embeddings(self) -> int:
        """Return the number of rows."""
        return self.rows

    @property
    def embedding_dim(self) -> int:
        """Return the width of a row."""
        return self.width

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows of the table, `(...)` to `(..., width)`."""
        return self.dequantized(ids.flatten()).view(*ids.shape, self.width) * self.embed_scale


@register_module
class Int8DynamicLinear(QuantizedLinear):
    """A linear layer that rounds its inputs to 8 bits, too, and multiplies integers: torch's CPU kernel.

    8-bit weights with one scale per row. Where gradients are asked for it computes with the dequantized
    weights.
    """

    multiplies_integers = True  # which torch's operation counter does not see
    _prepacked = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, `(..., in)` to `(..., out)`; inputs rounded over the whole batch to one scale."""
        if x.requires_grad:
            return super().forward(x)
        if self._prepacked is None:
            zeros = torch.zeros(self.rows, dtype=torch.long)
            # Private: the public `quantize_per_channel` would round again what is on the grid already.
            weight = torch._make_per_channel_quantized_tensor(
                self.packed, self.scales[:, 0].double(), zeros, 0
            )
            bias = None if self.bias is None else self.bias.detach().float()
            self._prepacked = torch.ops.quantized.linear_prepack(weight, bias)
        # A reduced range of inputs keeps 16-bit sums from overflowing on processors without VNNI, as in
        # torch.ao.
        return torch.ops.quantized.linear_dynamic(self.scaled(x).float(), self._prepacked, True).to(x.dtype)

    def __getstate__(self) -> dict:
        """Return the state without what the kernel prepared: it cannot be copied, and is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepacked"}


def store_as_integers(
    model: nn.Module, weight: Tensor, tensors: tuple, *, kind: type[QuantizedLinear] = QuantizedLinear, **grid
) -> None:
    """Put packed layers in the place of every Linear, Conv1D and embedding that holds this very `weight`.

    They share the tensors, so what was tied stays tied; a layer used in several places is replaced by one.

    Args:
        weight: the parameter of a layer, as it is there.
        tensors: integers `(out, in)`, scales and zero points, as `packing.quantize` returns them.
        kind: the layer that takes the place of a linear layer.
        grid: `bits`, `group_size`, `nf4`, `channel_scale`.
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
