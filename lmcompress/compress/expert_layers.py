"""The maps of a feed-forward cut into experts: for each token only the chosen experts' weights are multiplied.

The input maps give the chosen experts' activations, the family's own activation (and gate) works on these alone, and
the output map takes them back to the tokens. Stored and reloaded by `storage`.
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

    `chosen` `(tokens, active)`: experts per token. `order`: the sorted pairs' places in `chosen`, flat. `counts`: pairs
    per expert.
    """

    chosen: Tensor
    order: Tensor
    counts: list[int]

    @classmethod
    def of(cls, scores: Tensor, active: int) -> "Plan":
        """The plan that gives each token the `active` experts of highest score; `scores` is `(tokens, experts)`."""
        chosen = scores.topk(active, dim=1).indices
        flat = chosen.flatten()
        return cls(
            chosen, flat.argsort(stable=True), torch.bincount(flat, minlength=scores.shape[1]).tolist()
        )

    @property
    def tokens(self) -> Tensor:
        """The token of each sorted pair."""
        return self.order // self.chosen.shape[1]


class Router(nn.Module):
    """Scores experts for a token, and keeps the plan from the input maps to the output map.

    "centroid": cosine of the token with the mean of an expert's (normalised) rows. "mlp": two layers with a tanh that
    predict each expert's sum of |activations|. "oracle": those sums themselves, known only after all input rows were
    multiplied, so that only the output map's work is saved.
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
        """`(tokens, in)` to `(tokens, experts)`; what a centroid's cosine has in common for all experts is left out."""
        first = F.linear(x, self.first)
        return F.linear(first.tanh(), self.second, self.bias) if self.kind == "mlp" else first

    def plan(self, x: Tensor) -> Plan:
        """The plan for the tokens of `x` `(..., in)`: made once, however many input maps ask."""
        if self._plan is None or self._plan[0] is not x:
            self._plan = x, Plan.of(self.scores(x.reshape(-1, self.width)), self.active)
        return self._plan[1]

    def taken(self) -> Plan:
        """The plan that the input maps used; forgotten here."""
        (_, plan), self._plan = self._plan, None
        return plan

    def flops(self) -> int:
        """Per token, a multiply-add as two."""
        return 2 * sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)


class _Experts(nn.Module):
    """A linear map whose hidden side is cut into experts; the maps of a feed-forward share the router.

    `weight` `(experts, size, width)`: rows of an input map, columns of an output map; `bias` `(experts, size)` of the
    one, `(width,)` of the other.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, router: Router):
        super().__init__()
        self.experts, self.size, self.width = weight.shape
        ends = self.width, self.experts * self.size  # as the dense map had them
        self.in_features, self.out_features = ends if isinstance(self, ExpertInput) else ends[::-1]
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.router = router

    def spec(self) -> dict:
        """What `from_spec` needs; that the router is shared is stored apart."""
        bias, router = None if self.bias is None else list(self.bias.shape), self.router
        return {
            "shape": list(self.weight.shape),
            "bias": bias,
            "router": [router.kind, router.active, router.width],
        }

    @classmethod
    def from_spec(cls, spec: dict) -> "_Experts":
        """A map with the shapes of the one `spec` was taken from, its values still to come."""
        kind, active, width = spec["router"]
        bias = None if spec["bias"] is None else torch.empty(spec["bias"])
        return cls(torch.empty(spec["shape"]), bias, Router(kind, spec["shape"][0], active, width))


@register_module
class ExpertInput(_Experts):
    """Takes the place of an input map (or a gate): `(..., in)` to the activations of the chosen experts alone.

    Returns `(..., active * size)`: the pairs' rows in the plan's order, whichever token they belong to; or all
    `(..., experts * size)` where the router is the oracle. What lies between it and `ExpertOutput` must be element-wise.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Multiply only the chosen experts' rows."""
        rows = x.reshape(-1, self.width)
        if self.router.kind == "oracle":
            made = F.linear(
                rows, self.weight.flatten(0, 1), None if self.bias is None else self.bias.flatten()
            )
            return made.view(*x.shape[:-1], -1)
        plan = self.router.plan(x)
        if len(rows) == 1:
            chosen = plan.chosen[0]
            bias = None if self.bias is None else self.bias[chosen].flatten()
            return F.linear(rows, self.weight[chosen].flatten(0, 1), bias).view(*x.shape[:-1], -1)
        pieces = rows[plan.tokens].split(plan.counts)
        made = [
            F.linear(piece, self.weight[e], None if self.bias is None else self.bias[e])
            for e, piece in enumerate(pieces) if len(piece)
        ]  # fmt: skip
        return torch.cat(made).view(*x.shape[:-1], -1)


@register_module
class ExpertOutput(_Experts):
    """Takes the place of the output map: sums what the chosen experts give each token."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., active * size)` in the plan's order to `(..., out)`."""
        if self.router.kind == "oracle":
            every = hidden.reshape(-1, self.experts, self.size)
            plan = Plan.of(every.abs().sum(2), self.router.active)
            rows = every.gather(1, plan.chosen[..., None].expand(-1, -1, self.size)).flatten(0, 1)[plan.order]
        else:
            plan = self.router.taken()
            rows = hidden.reshape(-1, self.size)
        if len(plan.chosen) == 1 and self.router.kind != "oracle":
            y = rows.reshape(1, -1) @ self.weight[plan.chosen[0]].flatten(0, 1)
        else:
            pieces = [piece @ self.weight[e] for e, piece in enumerate(rows.split(plan.counts)) if len(piece)]
            y = torch.cat(pieces)[plan.order.argsort()].view(*plan.chosen.shape, self.width).sum(1)
        y = y if self.bias is None else y + self.bias
        return y.view(*hidden.shape[:-1], self.width)
