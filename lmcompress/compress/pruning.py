"""Unstructured pruning: which single weights of a model's linear maps become zero.

A rule is a score; the smallest scores go, compared within a layer, over all prunable weights, or within every M
neighbours of a row (N:M patterns). The shape of the model stays, so bytes and milliseconds stay too unless a format
or a kernel uses the zeros: that is measured elsewhere, never assumed here.
"""

from collections.abc import Callable

import torch
from torch import nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import LinearLayer, prunable

Scores = dict[str, torch.Tensor]
Amount = float | None


def check_sparsity(sparsity: float) -> float:
    """`sparsity` as a float if it is a fraction in [0, 1).

    Raises:
        BadSetting: below 0, at or above 1, or no number.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise BadSetting(
            f"sparsity {sparsity!r} is not in [0, 1): it is the fraction of weights set to zero, "
            "so write 0.5 for 50 %."
        )
    return float(sparsity)


def check_pattern(pattern: str) -> tuple[int, int]:
    """N and M of a pattern such as "2:4": at most N of every M neighbouring inputs of a row stay.

    Raises:
        BadSetting: not two whole numbers with 0 < N < M.
    """
    parts = str(pattern).split(":")
    if (
        len(parts) != 2
        or not all(part.isdecimal() for part in parts)
        or not 0 < int(parts[0]) < int(parts[1])
    ):
        raise BadSetting(
            f'pattern {pattern!r} is not "N:M" with 0 < N < M; "2:4" keeps 2 of every 4 weights.'
        )
    return int(parts[0]), int(parts[1])


def amount(sparsity: float | None, pattern: str | None) -> float:
    """The sparsity asked for, by number or by pattern.

    Raises:
        BadSetting: both or neither given, or one of them illegal.
    """
    if (sparsity is None) == (pattern is None):
        raise BadSetting(
            f"sparsity={sparsity!r} and pattern={pattern!r}: give one of them, the fraction of zeros (sparsity=0.5) "
            'or how many of how many neighbours stay (pattern="2:4").'
        )
    if pattern is None:
        return check_sparsity(sparsity)
    n, m = check_pattern(pattern)
    return 1 - n / m


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean mask, shaped like `scores`, of exactly its `count` smallest entries (ties by position)."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if count:
        mask[torch.topk(scores.flatten(), count, largest=False, sorted=False).indices] = True
    return mask.view_as(scores)


def smallest_per_row(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean mask of the `count` smallest entries of every row of `scores` `(rows, n)`."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, torch.topk(scores, count, largest=False, sorted=False).indices, True)


def n_of_m(scores: torch.Tensor, pattern: str, *, name: str = "the matrix") -> torch.Tensor:
    """Boolean mask of the M - N smallest of every M neighbours along the inputs of `scores` `(out, in)`.

    Raises:
        BadSetting: the number of inputs is no multiple of M.
    """
    n, m = check_pattern(pattern)
    if scores.shape[1] % m:
        raise BadSetting(
            f"{name} has {scores.shape[1]} inputs, no multiple of {m}: pattern {pattern} cannot be laid on it. "
            f"Use sparsity={1 - n / m:g} instead."
        )
    return smallest_per_row(scores.reshape(-1, m), m - n).view_as(scores)


def over_all(scores: Scores, sparsity: float) -> Scores:
    """The mask of the round(sparsity * n) smallest scores of all layers together."""
    joined = smallest(torch.cat([score.flatten() for score in scores.values()]), _count(scores, sparsity))
    parts = joined.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def group_of(one: LinearLayer) -> str:
    """The group that an allocation gives one sparsity: stack, block and kind, as in "decoder.2.attention"."""
    return f"{one.stack}.{one.block}.{one.kind}"


def layer_levels(
    maps: list[LinearLayer], sparsity: Amount, pattern: str | None, allocation: dict[str, float] | None
) -> dict[str, float]:
    """The sparsity of each map: the same for all, or its group's in `allocation` (see `sensitivity.allocate`).

    Raises:
        BadSetting: a group has no sparsity, the allocation's total is not `sparsity`, or a pattern is given, too.
    """
    target = amount(sparsity, pattern)
    if not allocation:
        return dict.fromkeys((one.name for one in maps), target)
    if pattern:
        raise BadSetting(f"pattern {pattern} fixes the sparsity of every layer: leave `allocation` out.")
    if missing := sorted({group_of(one) for one in maps} - set(allocation)):
        raise BadSetting(
            f"the allocation gives {', '.join(missing)} no sparsity; it has {', '.join(allocation)}"
        )
    levels = {one.name: check_sparsity(allocation[group_of(one)]) for one in maps}
    sizes = {one.name: one.weight2d().numel() for one in maps}
    total = sum(levels[name] * sizes[name] for name in levels) / sum(sizes.values())
    if abs(total - target) > 0.005:
        raise BadSetting(
            f"the allocation removes {total:.3f} of the weights, not the {target:.3f} asked for."
        )
    return levels


def zero_where(maps: list[LinearLayer], masks: Scores) -> None:
    """Set the weights under each map's mask, shaped (out, in), to zero in place."""
    with torch.no_grad():
        for linear in maps:
            linear.weight2d().masked_fill_(masks[linear.name], 0.0)


def achieved(maps: list[LinearLayer]) -> dict:
    """Sparsity really reached over `maps`: overall, least and greatest of a layer, and per kind."""
    zeros = {linear.name: int((linear.weight2d() == 0).sum()) for linear in maps}
    sizes = {linear.name: linear.weight2d().numel() for linear in maps}
    fractions = [zeros[name] / sizes[name] for name in zeros]
    kinds = sorted({linear.kind for linear in maps})
    return {
        "sparsity": sum(zeros.values()) / sum(sizes.values()),
        "sparsity_least": min(fractions),
        "sparsity_most": max(fractions),
        "sparsity_by_kind": {
            kind: sum(zeros[m.name] for m in maps if m.kind == kind)
            / sum(sizes[m.name] for m in maps if m.kind == kind)
            for kind in kinds
        },
        "weights_prunable": sum(sizes.values()),
    }


def kept_masks(model: nn.Module, *, policy: str = "blocks") -> dict[str, torch.Tensor]:
    """Per name of a trained parameter, where a pruned model's prunable weights are not zero (to hold meanwhile)."""
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = [one.module.weight for one in prunable(model, policy) if one.module.weight.requires_grad]
    return {owners[id(weight)]: weight.detach() != 0 for weight in weights}


def _count(scores: Scores, sparsity: float) -> int:
    return round(sparsity * sum(score.numel() for score in scores.values()))


def layer_mask(
    score: torch.Tensor, sparsity: float | None, pattern: str | None, *, name: str = "the matrix"
) -> torch.Tensor:
    """What one layer loses under a rule that compares within the layer, or within every M of a pattern."""
    if pattern:
        return n_of_m(score, pattern, name=name)
    return smallest(score, round(sparsity * score.numel()))


def _prune(
    model: nn.Module,
    name: str,
    score: Callable,
    sparsity: Amount,
    pattern: str | None,
    policy: str,
    allocation: dict[str, float] | None = None,
):
    maps = prunable(model, policy)
    levels = layer_levels(maps, sparsity, pattern, allocation)
    if any(levels.values()):
        masks = {
            one.name: layer_mask(score(one.weight2d().detach()), levels[one.name], pattern, name=one.name)
            for one in maps
        }
        zero_where(maps, masks)
    return model, TechniqueResult(name, len(maps), achieved(maps) if maps else {})


@technique(
    name="random", version=1, title="Random", colour="#8C6D31", marker="x", needs=("seed",), masked=True
)
def random(
    model: nn.Module,
    context: Context,
    *,
    sparsity: Amount = None,
    pattern: str | None = None,
    policy: str = "blocks",
):
    """Zero a uniformly random `sparsity` of each layer's weights: the control every rule has to beat."""
    generator = torch.Generator().manual_seed(context.seed)

    def uniform(weight: torch.Tensor) -> torch.Tensor:
        return torch.rand(weight.shape, generator=generator).to(weight.device)

    return _prune(model, "random", uniform, sparsity, pattern, policy)


@technique(
    name="magnitude-layer", version=1, title="Magnitude, per layer", colour="#0072B2", marker="o", masked=True
)
def magnitude_layer(
    model: nn.Module,
    context: Context,
    *,
    sparsity: Amount = None,
    pattern: str | None = None,
    allocation: dict[str, float] | None = None,
    policy: str = "blocks",
):
    """Zero the smallest |W| of each layer (Han et al. 2015), or of every M neighbours; see `layer_levels`."""
    return _prune(model, "magnitude-layer", torch.abs, sparsity, pattern, policy, allocation)


@technique(
    name="magnitude-global", version=1, title="Magnitude, global", colour="#D55E00", marker="s", masked=True
)
def magnitude_global(model: nn.Module, context: Context, *, sparsity: float, policy: str = "blocks"):
    """Zero the smallest |W| over all prunable weights together, so that layers differ in sparsity."""
    check_sparsity(sparsity)
    maps = prunable(model, policy)
    if maps and sparsity:
        zero_where(maps, over_all({one.name: one.weight2d().detach().abs() for one in maps}, sparsity))
    return model, TechniqueResult("magnitude-global", len(maps), achieved(maps) if maps else {})
