"""Unstructured pruning that looks at activations: Wanda and SparseGPT, for every family, block by block.

A block is pruned with the inputs that the already pruned blocks before it give; padding does not count.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import Batch, Stats, calibrate
from lmcompress.compress.pruning import Amount, achieved, layer_levels, n_of_m, smallest_per_row
from lmcompress.compress.second_order import inverse_factor, prune_matrix
from lmcompress.models.anatomy import LinearLayer, prunable


def wanda_scores(weight: Tensor, norm_sq: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂, `(out, in)`. (Sun et al. 2024, eq. 1)"""
    return weight.detach().abs().float() * norm_sq.sqrt()


@technique(
    name="wanda", version=1, title="Wanda", colour="#009E73", marker="^", needs=("calibration",), masked=True
)
def wanda(
    model: nn.Module,
    context: Context,
    *,
    sparsity: Amount = None,
    pattern: str | None = None,
    allocation: dict[str, float] | None = None,
):
    """Zero the smallest |W_ij|·‖X_j‖ of every output row, or of every M neighbours (Sun et al. 2024).

    Args:
        context.calibration: batches of text whose activations are looked at.
        sparsity: fraction of each row, rounded to whole weights.
        pattern: "2:4", "4:8" instead.
        allocation: a sparsity per group of layers with the mean `sparsity` (see `sensitivity.allocate`).
    """

    def treat(one: LinearLayer, stats: Stats, level: float) -> Tensor:
        scores = wanda_scores(one.weight2d(), stats.norm_sq)
        if pattern:
            mask = n_of_m(scores, pattern, name=one.name)
        else:
            mask = smallest_per_row(scores, round(level * scores.shape[1]))
        return one.weight2d().masked_fill(mask, 0)

    return _block_by_block(
        model, "wanda", context.calibration, ("norm",), treat, sparsity, pattern, allocation
    )


@technique(
    name="sparsegpt",
    version=1,
    title="SparseGPT",
    colour="#CC79A7",
    marker="v",
    needs=("calibration",),
    masked=True,
)
def sparsegpt(
    model: nn.Module,
    context: Context,
    *,
    sparsity: Amount = None,
    pattern: str | None = None,
    allocation: dict[str, float] | None = None,
    damping: float = 0.01,
):
    """Zero by W² / U_jj² and move the remaining weights to make up for it (Frantar & Alistarh 2023).

    Args:
        context.calibration: batches of text whose activations are looked at.
        sparsity: fraction of each layer.
        pattern: "2:4", "4:8" instead.
        allocation: a sparsity per group of layers with the mean `sparsity` (see `sensitivity.allocate`).
        damping: added to the Hessian's diagonal, as a fraction of its mean.
    """

    known: list[Tensor] = []  # the last Hessian and its factor: q, k and v read the same inputs

    def treat(one: LinearLayer, stats: Stats, level: float) -> Tensor:
        if not (known and known[0].shape == stats.gram.shape and torch.equal(known[0], stats.gram)):
            known[:] = [stats.gram, inverse_factor(stats.gram, damping=damping)]
        return prune_matrix(one.weight2d(), stats.gram, sparsity=level, pattern=pattern, factor=known[1])

    return _block_by_block(
        model, "sparsegpt", context.calibration, ("gram",), treat, sparsity, pattern, allocation
    )


@torch.no_grad()
def _block_by_block(
    model: nn.Module,
    name: str,
    calibration: Sequence[Batch],
    collect: Sequence[str],
    treat: Callable[[LinearLayer, Stats, float], Tensor],
    sparsity: Amount,
    pattern: str | None,
    allocation: dict[str, float] | None,
):
    maps = {one.name: one for one in prunable(model)}
    levels = layer_levels(list(maps.values()), sparsity, pattern, allocation)
    if pattern:  # refuse before an hour of work, not in the middle of it
        for one in maps.values():
            n_of_m(one.weight2d()[:1], pattern, name=one.name)
    if any(levels.values()):
        for step in calibrate(model, calibration, collect=collect):
            for one, stats in ((maps[key], found) for key, found in step.stats.items()):
                one.weight2d().copy_(treat(one, stats, levels[one.name]))
    return model, TechniqueResult(name, len(maps), achieved(list(maps.values())) if maps else {})
