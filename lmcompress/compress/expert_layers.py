"""A feed-forward's layers cut into experts: a token is multiplied by the chosen experts' weights only.

The input layers give the chosen experts' activations, the family's own activation (and gate) works on these
alone, and the output layer takes them back to the tokens. Stored and reloaded by `storage`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcompress.models.serialization import register_module

ROUTERS = ("oracle", "centroid", "mlp")
HIDDEN = 64  # width of the small MLP


@dataclass
class Plan:
    """Which expert works on which token: all `(token, expert)` pairs, sorted by expert.

    `experts` `(tokens, active)`: those of each token; `order`: where in it, flat, the sorted pairs are;
    `counts`: pairs per expert.
    """

    experts: Tensor
    order: Tensor
    counts: list[int]

    @classmethod
    def of(cls, scores: Tensor, active: int) -> "Plan":
        """Return the plan that gives each token the `active` experts of highest score `(tokens, experts)`."""
        experts = scores.topk(active, dim=1).indices
        counts = torch.bincount(experts.flatten(), minlength=scores.shape[1]).tolist()
        return cls(experts, experts.flatten().argsort(stable=True), counts)

    @property
    def tokens(self) -> Tensor:
        return self.order // self.experts.shape[1]


class Router(nn.Module):
    """Scores experts for a token, and keeps the plan from the input layers to the output layer.

    "centroid": cosine of the token with the mean of an expert's (normalised) rows. "mlp": two layers with a
    tanh that predict each expert's sum of |activations|. "oracle": those sums themselves, known only after
    all input rows were multiplied, so that only the output layer's work is saved.
    """

    def __init__(self, kind: str, experts: int, active: int, width: int):
        super().__init__()
        self.kind, self.active, self.width = kind, active, width
        self._plan: tuple[Tensor, Plan] | None = None
        if kind != "oracle":
            self.first = nn.Parameter(torch.empty(HIDDEN if kind == "mlp" else experts, width))
        if kind == "mlp":
            self.second = nn.Parameter(torch.empty(experts, HIDDEN))
            self.bias = nn.Parameter(torch.empty(experts))

    def scores(self, x: Tensor) -> Tensor:
        """Score `(tokens, in)` as `(tokens, experts)`; factors that all experts share are left out."""
        first = F.linear(x, self.first)
        return F.linear(first.tanh(), self.second, self.bias) if self.kind == "mlp" else first

    def plan(self, x: Tensor) -> Plan:
        """Return the plan for the tokens of `x` `(..., in)`, the same for all input layers."""
        if self._plan is None or self._plan[0] is not x:
            self._plan = x, Plan.of(self.scores(x.reshape(-1, self.width)), self.active)
        return self._plan[1]

    def taken(self) -> Plan:
        """Return the plan that the input layers used, and forget it."""
        (_, plan), self._plan = self._plan, None
        return plan

    def flops(self) -> int:
        """Return the operations per token, a multiply-add as two."""
        return 2 * sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)


class _Experts(nn.Module):
    """A linear layer whose hidden side is cut into experts; the layers of a feed-forward share the router.

    `weight` `(experts, size, width)`: rows of an input layer, columns of an output layer; `bias` `(experts,
    size)` of the one, `(width,)` of the other.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, router: Router):
        super().__init__()
        self.experts, self.size, self.width = weight.shape
        ends = self.width, self.experts * self.size  # as the dense layer had them
        self.in_features, self.out_features = ends if isinstance(self, ExpertInput) else ends[::-1]
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.router = router

    def spec(self) -> dict:
        """Return what `from_spec` needs; that the router is shared is stored apart."""
        bias = None if self.bias is None else list(self.bias.shape)
        router = [self.router.kind, self.router.active, self.router.width]
        return {"shape": list(self.weight.shape), "bias": bias, "router": router}

    @classmethod
    def from_spec(cls, spec: dict) -> "_Experts":
        """Return a layer with the shapes of the one `spec` was taken from, its values still to come."""
        kind, active, width = spec["router"]
        bias = None if spec["bias"] is None else torch.empty(spec["bias"])
        return cls(torch.empty(spec["shape"]), bias, Router(kind, spec["shape"][0], active, width))


@register_module
class ExpertInput(_Experts):
    """Takes the place of an input layer or gate: `(..., in)` to the chosen experts' activations alone.

    Returns `(..., active * size)`, the pairs' rows in the plan's order, or all `(..., experts * size)` where
    the router is the oracle. What lies between it and `ExpertOutput` must be element-wise.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.width)
        if self.router.kind == "oracle":
            return self._of_experts(rows, slice(None)).view(*x.shape[:-1], -1)
        plan = self.router.plan(x)
        if len(rows) == 1:
            return self._of_experts(rows, plan.experts[0]).view(*x.shape[:-1], -1)
        pieces = rows[plan.tokens].split(plan.counts)
        outputs = [self._of_experts(piece, slice(e, e + 1)) for e, piece in enumerate(pieces) if len(piece)]
        return torch.cat(outputs).view(*x.shape[:-1], -1)

    def _of_experts(self, rows: Tensor, experts: slice | Tensor) -> Tensor:
        """Map `(n, in)` to the activations of all `experts`, `(n, experts * size)`."""
        bias = None if self.bias is None else self.bias[experts].flatten()
        return F.linear(rows, self.weight[experts].flatten(0, 1), bias)


@register_module
class ExpertOutput(_Experts):
    """Takes the place of the output layer: sums what the chosen experts give each token."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., active * size)` in the plan's order to `(..., out)`."""
        is_oracle = self.router.kind == "oracle"
        if is_oracle:
            every = hidden.reshape(-1, self.experts, self.size)
            plan = Plan.of(every.abs().sum(2), self.router.active)
            pairs = every.gather(1, plan.experts[..., None].expand(-1, -1, self.size)).flatten(0, 1)
            rows = pairs[plan.order]
        else:
            plan, rows = self.router.taken(), hidden.reshape(-1, self.size)
        if len(plan.experts) == 1 and not is_oracle:
            y = rows.reshape(1, -1) @ self.weight[plan.experts[0]].flatten(0, 1)
        else:
            pieces = [piece @ self.weight[e] for e, piece in enumerate(rows.split(plan.counts)) if len(piece)]
            y = torch.cat(pieces)[plan.order.argsort()].view(*plan.experts.shape, self.width).sum(1)
        y = y if self.bias is None else y + self.bias
        return y.view(*hidden.shape[:-1], self.width)
