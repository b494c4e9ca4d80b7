"""Masks of unstructured pruning: how many weights go and which, given a score for each."""

import numpy as np
import torch
from torch import Tensor, nn

from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import LinearLayer, prunable
from lmcompress.models.mixtures import is_fused

Scores = dict[str, Tensor]


def level_of(sparsity: float | None, pattern: str | None) -> float:
    """Return the sparsity given by number or by pattern (at most N of every M neighbours of a row stay)."""
    if pattern is None:
        return float(sparsity)
    n, m = map(int, pattern.split(":"))
    return 1 - n / m


def layer_levels(
    layers: list[LinearLayer],
    sparsity: float | None,
    pattern: str | None,
    allocation: dict[str, float] | None = None,
) -> dict[str, float]:
    """Return the sparsity of each layer: the same for all, or its group's (`sensitivity.allocate`)."""
    target = level_of(sparsity, pattern)
    if not allocation:
        return dict.fromkeys((layer.name for layer in layers), target)
    if pattern:
        raise BadSetting(f"pattern {pattern} fixes the sparsity of every layer: leave `allocation` out.")
    if missing := sorted({group_of(layer) for layer in layers} - set(allocation)):
        has = ", ".join(allocation)
        raise BadSetting(f"the allocation gives {', '.join(missing)} no sparsity; it has {has}")
    levels = {layer.name: float(allocation[group_of(layer)]) for layer in layers}
    sizes = {layer.name: layer.weight2d().numel() for layer in layers}
    total = sum(levels[name] * sizes[name] for name in levels) / sum(sizes.values())
    if abs(total - target) > 0.005:  # rounding the levels moves the total by less
        raise BadSetting(f"the allocation removes {total:.3f} of all, not the {target:.3f} asked for.")
    return levels


def group_of(layer: LinearLayer) -> str:
    """Return the group that an allocation treats alike: stack, block, kind, as in "decoder.2.attention"."""
    return f"{layer.stack}.{layer.block}.{layer.kind}"


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return a bool mask, shaped like `scores`, of exactly `count` smallest entries (ties by position)."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if count:
        mask[torch.topk(scores.flatten(), count, largest=False, sorted=False).indices] = True
    return mask.view_as(scores)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of `smallest`, of equal scores the first, several times faster on a CPU.

    For masks laid anew at every step. `smallest` takes others of equal scores, which recorded masks hold.
    """
    mask, flat = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device), scores.flatten()
    if count:
        if flat.device.type == "cpu":
            largest = np.partition(flat.detach().numpy(), count - 1)[count - 1].item()
        else:
            largest = flat.kthvalue(count).values
        mask = flat <= largest
        if surplus := int(mask.count_nonzero()) - count:
            mask[(flat == largest).nonzero().flatten()[-surplus:]] = False
    return mask.view_as(scores)


def smallest_per_row(scores: Tensor, count: int) -> Tensor:
    """Return a boolean mask of the `count` smallest entries of every row of `scores` `(rows, n)`."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, torch.topk(scores, count, largest=False, sorted=False).indices, True)


def n_of_m(scores: Tensor, pattern: str, *, name: str = "the matrix") -> Tensor:
    """Return a mask of the M - N smallest of every M neighbours along the inputs of `scores` `(out, in)`."""
    n, m = map(int, pattern.split(":"))
    if scores.shape[1] % m:
        inputs = f"{name} has {scores.shape[1]} inputs, no multiple of {m}"
        raise BadSetting(f"{inputs}: it can have no pattern {pattern}. Use sparsity={1 - n / m:g} instead.")
    return smallest_per_row(scores.reshape(-1, m), m - n).view_as(scores)


def layer_mask(
    score: Tensor, level: float, pattern: str | None, *, name: str = "the matrix", by_row: bool = False
) -> Tensor:
    """Return what a layer loses: a share of its smallest, or of each row's, or some of every M neighbours."""
    if pattern:
        return n_of_m(score, pattern, name=name)
    if by_row:
        return smallest_per_row(score, round(level * score.shape[1]))
    return smallest(score, round(level * score.numel()))


def over_all(scores: Scores, sparsity: float) -> Scores:
    """Return the masks of the round(sparsity * n) smallest scores of all layers together."""
    together = torch.cat([score.flatten() for score in scores.values()])
    mask = smallest(together, round(sparsity * together.numel()))
    masks = mask.split([score.numel() for score in scores.values()])
    return {name: mask.view_as(score) for (name, score), mask in zip(scores.items(), masks, strict=True)}


def achieved(layers: list[LinearLayer]) -> dict:
    """Return the sparsity reached: overall, least and greatest of a layer, per kind; {} without layers."""
    if not layers:
        return {}
    counts = [(x.kind, int((x.weight2d() == 0).sum()), x.weight2d().numel()) for x in layers]

    def share(counts: list[tuple[str, int, int]]) -> float:
        return sum(zeros for _, zeros, _ in counts) / sum(size for *_, size in counts)

    by_layer = [share([count]) for count in counts]
    return {
        "sparsity": share(counts),
        "sparsity_least": min(by_layer),
        "sparsity_most": max(by_layer),
        "sparsity_by_kind": {
            k: share([c for c in counts if c[0] == k]) for k in sorted({c[0] for c in counts})
        },
        "weights_prunable": sum(size for *_, size in counts),
    }


def kept_masks(model: nn.Module, *, policy: str = "blocks") -> Scores:
    """Return where a pruned model's weights are not zero, by parameter: what training multiplies them by."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = [layer.module.weight for layer in prunable(model, policy)]
    for experts in filter(is_fused, model.modules()):  # which are listed as views of these
        weights += [parameter for parameter in experts.parameters() if parameter.dim() == 3]
    trained = [weight for weight in weights if weight.requires_grad and id(weight) in names]
    return {names[id(weight)]: weight.detach() != 0 for weight in trained}
