"""Layers in the place of linear ones whose matrix is made of smaller ones, which several layers may share.

Each holds its factors as linear layers, so that pruning and quantization find them; stored and reloaded by
`storage`, shared parameters too.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lmcompress.models.serialization import register_module
from lmcompress.models.surgery import replace_modules


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer on these very parameters, `weight` `(out, in)` and `bias` `(out,)`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.contiguous())
    layer.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return layer


def matrix_of(module: nn.Module) -> Tensor:
    """Return what a linear layer, a layer of this file, or packed integers multiply with, `(out, in)`."""
    for name in ("matrix", "dequantized"):
        if hasattr(module, name):
            return getattr(module, name)()
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def replace_linear(model: nn.Module, old: nn.Module, make: Callable[[Tensor | None], nn.Module]) -> None:
    """Put `make(bias)` in place of `old` and every linear layer with its weight, but no tied table."""

    def holds_weight(module: nn.Module) -> bool:
        return module is old or (isinstance(module, nn.Linear | Conv1D) and module.weight is old.weight)

    replace_modules(model, holds_weight, lambda m: make(getattr(m, "bias", None)).train(m.training))


class _Composed(nn.Module):
    """Base: widths as linear layers have them, `matrix` `(out, in)`, and storage by `spec`."""

    weight = None  # there is no such tensor; T5 asks

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    def spec(self) -> dict:
        """Return what `from_spec` needs: widths, rank, and what a subclass adds."""
        return {"in": self.in_features, "out": self.out_features, "rank": self.rank} | self._more()

    @classmethod
    def from_spec(cls, spec: dict) -> "_Composed":
        """Return a layer with the shapes of the one `spec` was taken from, its values still to come."""
        first, second = torch.empty(spec["rank"], spec["in"]), torch.empty(spec["out"], spec["rank"])
        return cls._empty(spec, first, second, torch.empty(spec["out"]) if spec["bias"] else None)


@register_module
class Factorised(_Composed):
    """y = L (G x) + b: the linear layers `first` G `(rank, in)` and `second` L `(out, rank)` with the bias.

    Layers that are given one Parameter for G share it. With requires_grad off it stays frozen, reloaded too.
    """

    def __init__(self, first: Tensor, second: Tensor, bias: Tensor | None):
        super().__init__(first.shape[1], second.shape[0], first.shape[0])
        self.first, self.second = linear(first), linear(second, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def matrix(self) -> Tensor:
        return matrix_of(self.second) @ matrix_of(self.first)

    def _more(self) -> dict:
        frozen = isinstance(self.first, nn.Linear) and not self.first.weight.requires_grad
        return {"bias": self.second.bias is not None, "frozen": frozen}

    @classmethod
    def _empty(cls, spec: dict, first: Tensor, second: Tensor, bias: Tensor | None) -> "Factorised":
        layer = cls(first, second, bias)
        layer.first.weight.requires_grad_(not spec["frozen"])
        return layer


@register_module
class Hadamard(_Composed):
    """y = ((A₁B₁) ∘ (A₂B₂)) x + b, the product made anew in every call: saves bytes, not time.

    `a1`, `a2` `(out, rank)`, `b1`, `b2` `(rank, in)` are linear layers without bias.
    """

    def __init__(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, bias: Tensor | None):
        super().__init__(b1.shape[1], a1.shape[0], b1.shape[0])
        self.a1, self.b1, self.a2, self.b2 = map(linear, (a1, b1, a2, b2))
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype), self.bias)

    def matrix(self) -> Tensor:
        a1, b1, a2, b2 = map(matrix_of, (self.a1, self.b1, self.a2, self.b2))
        return (a1 @ b1) * (a2 @ b2)

    def _more(self) -> dict:
        return {"bias": self.bias is not None}

    @classmethod
    def _empty(cls, _: dict, first: Tensor, second: Tensor, bias: Tensor | None) -> "Hadamard":
        return cls(second, first, second.clone(), first.clone(), bias)


@register_module
class Adapted(_Composed):
    """y = alpha · W x + b + scale · B A x: a linear layer `base` (W, b) with a low-rank one beside it (LoRA).

    `first` is A `(rank, in)`, drawn as LoRA draws it (uniform, variance 1/(3 in)); `second` is B, zero at
    first. `dropout`: probability on what A reads, in training.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float = 0.0, draw=None):
        super().__init__(base.in_features, base.out_features, rank)
        self.base, self.alpha, self.scale, self.dropout = base, 1.0, float(scale), float(dropout)
        first = (torch.rand(rank, self.in_features, generator=draw) * 2 - 1) / self.in_features**0.5
        self.first = linear(first.to(base.weight))
        self.second = linear(base.weight.new_zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        beside = self.second(self.first(F.dropout(x, self.dropout, self.training)))
        if self.alpha == 1:
            return self.base(x) + self.scale * beside
        y = self.alpha * F.linear(x, self.base.weight) + self.scale * beside
        return y if self.base.bias is None else y + self.base.bias

    def matrix(self) -> Tensor:
        beside = matrix_of(self.second) @ matrix_of(self.first)
        return self.alpha * matrix_of(self.base) + self.scale * beside

    def _more(self) -> dict:
        return {"bias": self.base.bias is not None, "scale": self.scale, "dropout": self.dropout}

    @classmethod
    def _empty(cls, spec: dict, first: Tensor, second: Tensor, bias: Tensor | None) -> "Adapted":
        base = linear(torch.empty(spec["out"], spec["in"]), bias)
        return cls(base, rank=spec["rank"], scale=spec["scale"], dropout=spec["dropout"])
