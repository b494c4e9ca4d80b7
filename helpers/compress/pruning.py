"""Unstructured pruning: which single weights of a model's linear maps become zero.

A rule is a score; the smallest scores go, compared within a layer or over all prunable weights. The shape
of the model stays, so bytes and milliseconds stay too unless a format or a kernel uses the zeros: that is
measured elsewhere, never assumed here.
"""

from collections.abc import Callable

import torch
from torch import nn

from helpers.compress import Report, technique
from helpers.errors import BadSetting
from helpers.layers import LinearMap, prunable

Scores = dict[str, torch.Tensor]


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


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean mask, shaped like `scores`, of exactly its `count` smallest entries (ties by position)."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if count:
        mask[torch.topk(scores.flatten(), count, largest=False, sorted=False).indices] = True
    return mask.view_as(scores)


def within_layers(scores: Scores, sparsity: float) -> Scores:
    """Per layer, the mask of the round(sparsity * n) entries with the smallest score."""
    return {name: smallest(score, round(sparsity * score.numel())) for name, score in scores.items()}


def over_all(scores: Scores, sparsity: float) -> Scores:
    """The mask of the round(sparsity * n) smallest scores of all layers together."""
    joined = smallest(torch.cat([score.flatten() for score in scores.values()]), _count(scores, sparsity))
    parts = joined.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def zero_where(maps: list[LinearMap], masks: Scores) -> None:
    """Set the weights under each map's mask, shaped (out, in), to zero in place."""
    with torch.no_grad():
        for linear in maps:
            linear.weight2d().masked_fill_(masks[linear.name], 0.0)


def achieved(maps: list[LinearMap]) -> dict:
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
    """Per parameter name, where a pruned model's prunable weights are not zero (to hold while fine-tuning)."""
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    return {owners[id(m.module.weight)]: m.module.weight.detach() != 0 for m in prunable(model, policy)}


def _count(scores: Scores, sparsity: float) -> int:
    return round(sparsity * sum(score.numel() for score in scores.values()))


def _prune(model: nn.Module, name: str, score: Callable, choose: Callable, sparsity: float, policy: str):
    check_sparsity(sparsity)
    maps = prunable(model, policy)
    scores = {linear.name: score(linear.weight2d().detach()) for linear in maps}
    if maps and sparsity:
        zero_where(maps, choose(scores, sparsity))
    return model, Report(name, len(maps), achieved(maps) if maps else {})


@technique(name="random", version=1, title="Random", masked=True)
def random(model: nn.Module, *, sparsity: float, seed: int = 0, policy: str = "blocks"):
    """Zero a uniformly random `sparsity` of each layer's weights: the control every rule has to beat."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(weight: torch.Tensor) -> torch.Tensor:
        return torch.rand(weight.shape, generator=generator).to(weight.device)

    return _prune(model, "random", uniform, within_layers, sparsity, policy)


@technique(name="magnitude-layer", version=1, title="Magnitude, per layer", masked=True)
def magnitude_layer(model: nn.Module, *, sparsity: float, policy: str = "blocks"):
    """Zero the smallest |W| of each layer (Han et al. 2015)."""
    return _prune(model, "magnitude-layer", torch.abs, within_layers, sparsity, policy)


@technique(name="magnitude-global", version=1, title="Magnitude, global", masked=True)
def magnitude_global(model: nn.Module, *, sparsity: float, policy: str = "blocks"):
    """Zero the smallest |W| over all prunable weights together, so that layers differ in sparsity."""
    return _prune(model, "magnitude-global", torch.abs, over_all, sparsity, policy)
