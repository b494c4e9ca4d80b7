"""Which layers a model can spare weights or bits in: a scan, and a division of zeros or bytes that uses it.

Each group of layers (attention or feed-forward of one block) is pruned, or rounded, by itself. To divide so
that the sum of changes is least takes for granted that they add up, which a uniform division then tests.
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcompress.compress.calibration import Batch, on_device
from lmcompress.compress.masks import group_of, layer_mask
from lmcompress.compress.settings import check_setting
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import prunable
from lmcompress.models.packed import BITS, dequantize, quantize, row_bytes
from lmcompress.registry import analysis

VERSION = analysis(1, "sensitivity", "sensitivity-bits")
TOKENS_COMPARED = 2048  # positions whose distributions are held for comparison, over all batches


def _pruned(weight2d: Tensor, sparsity: float) -> Tensor:
    check_setting("the scan", "sparsity", sparsity)
    return weight2d.masked_fill(layer_mask(weight2d.abs(), sparsity, None), 0)


def groups_of(model: nn.Module, *, embeddings: bool = False) -> dict[str, list[Tensor]]:
    """Return the weights `(out, in)` of each group of layers, and on request of the token table."""
    groups: dict[str, list[Tensor]] = {}
    for layer in prunable(model):
        groups.setdefault(group_of(layer), []).append(layer.weight2d())
    return groups | ({"embedding": [model.get_input_embeddings().weight]} if embeddings else {})


@torch.no_grad()
def scan(
    model: nn.Module,
    batches: Sequence[Batch] | Callable[[], float],
    *,
    levels: Sequence[float] = (0.5, 0.7, 0.9),
    treat: Callable[[Tensor, float], Tensor] = _pruned,
    embeddings: bool = False,
) -> dict:
    """Return how far the outputs move when one group of layers is treated, by default pruned by magnitude.

    Args:
        model: left as it was.
        batches: calibration text, of which `TOKENS_COMPARED` positions are compared; or a function that says
            how far the outputs of `model` have moved.
        levels: sparsities tried, or whatever `treat` takes.
        treat: the new weights `(out, in)` for those of a map and a level.
        embeddings: the token table is a group besides, "embedding", with a head that is tied to it.

    Returns:
        {"levels", "weights": {group: count}, "change": {group: [per level]}}: nats of KL divergence from the
        dense model's distribution, or 1 − cosine of the last hidden states where a model has none.
    """
    groups, change = groups_of(model, embeddings=embeddings), {}
    moved = batches if callable(batches) else _distance(model, batches)
    for group, matrices in groups.items():
        dense = [matrix.detach().clone() for matrix in matrices]
        try:
            change[group] = []
            for level in levels:
                for matrix, weight in zip(matrices, dense, strict=True):
                    matrix.copy_(treat(weight, level))
                change[group].append(moved())
        finally:
            for matrix, weight in zip(matrices, dense, strict=True):
                matrix.copy_(weight)
    weights = {group: sum(matrix.numel() for matrix in matrices) for group, matrices in groups.items()}
    return {"levels": list(levels), "weights": weights, "change": change}


def scan_bits(
    model: nn.Module,
    batches: Sequence[Batch] | Callable[[], float],
    *,
    levels: Sequence[int] = BITS,
    group_size: int | None = None,
    symmetric: bool = False,
    embeddings: bool = False,
) -> dict:
    """Return a `scan` of rounding to each width of `levels`, on the grid of "rtn".

    It has "bytes" besides: {group: [per level]}, what the group takes with its scales and zero points.
    """

    def rounded(weight: Tensor, bits: int) -> Tensor:
        tensors = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)
        return dequantize(*tensors, group_size=group_size)

    scanned, sizes = scan(model, batches, levels=levels, treat=rounded, embeddings=embeddings), {}
    for group, matrices in groups_of(model, embeddings=embeddings).items():
        sizes[group] = [0] * len(levels)
        for matrix in matrices:
            rows, width = matrix.shape
            scales = rows * math.ceil(width / (group_size or width))
            for index, bits in enumerate(levels):
                grid_bytes = scales * (matrix.element_size() + (not symmetric))
                sizes[group][index] += rows * row_bytes(width, bits) + grid_bytes
    return scanned | {"bytes": sizes}


def allocate_bits(
    scanned: dict, bits: int = 4, *, share: float = 1.0, seed: int | None = None
) -> dict[str, int]:
    """Return a width per group of layers: no more bytes than `bits` for all, the least sum of the changes.

    `bits`, a level of `scan_bits`, is the uniform width whose bytes are the budget; with a `share` below 1
    that share of the way to them from those of the next smaller level. A `seed` makes a control of exactly
    the same bytes: the widths dealt out anew among the groups of one size.
    """
    levels, sizes, changes = scanned["levels"], scanned["bytes"], scanned["change"].values()
    if bits not in levels:
        raise BadSetting(f"bits={bits!r} was not scanned; the scan has {', '.join(map(str, levels))}.")
    smaller = max((level for level in levels if level < bits), default=bits)
    full, fewer = (sum(group[levels.index(level)] for group in sizes.values()) for level in (bits, smaller))
    spare = fewer + share * (full - fewer) - sum(map(min, sizes.values()))  # above the least of all groups
    states: list[tuple[int, float, tuple]] = [(0, 0.0, ())]
    for group_bytes, change in zip(sizes.values(), changes, strict=True):
        longer = sorted(
            (taken + size - min(group_bytes), cost + more, (*widths_so_far, level))
            for taken, cost, widths_so_far in states
            for size, more, level in zip(group_bytes, change, levels, strict=True)
            if taken + size - min(group_bytes) <= spare
        )
        # Kept is what nothing beats in both bytes and change.
        cheapest = accumulate((cost for _, cost, _ in longer), min, initial=math.inf)
        states = [state for state, before in zip(longer, cheapest) if state[1] < before]
    widths = dict(zip(sizes, states[-1][2], strict=True))
    draw = random.Random(seed)
    for alike in dict.fromkeys(map(tuple, sizes.values())) if seed is not None else ():
        names = [name for name, group_bytes in sizes.items() if tuple(group_bytes) == alike]
        widths |= zip(names, draw.sample([widths[name] for name in names], len(names)))
    return widths


def allocate(scanned: dict, sparsity: float, *, spread: float = 0.2) -> dict[str, float]:
    """Return a sparsity per group with the weighted mean `sparsity` and the least sum of a scan's changes.

    Between the levels of the `scan` the change is taken as linear, and made convex; then the cheapest zeros
    come first. No group lies further than `spread` from `sparsity`: nothing rests on one end of a curve.
    """
    check_setting("the allocation", "sparsity", sparsity)
    low, high = max(0.0, sparsity - spread), min(0.99, sparsity + spread)
    if not low < sparsity < high:
        raise BadSetting(f"sparsity {sparsity} leaves no room to divide: between 0 and 0.99 it can be done.")
    weights, pieces = scanned["weights"], []
    for group, changes in scanned["change"].items():
        curve = _convex([(0.0, 0.0), *zip(scanned["levels"], changes, strict=True)], low, high)
        for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
            pieces.append(((y1 - y0) / ((x1 - x0) * weights[group]), x0, x1, group))
    share = dict.fromkeys(weights, low)
    zeros_left = (sparsity - low) * sum(weights.values())
    for _, start, end, group in sorted(pieces):
        taken = min((end - start) * weights[group], zeros_left)
        share[group] += taken / weights[group]
        zeros_left -= taken
    return {group: round(level, 4) for group, level in share.items()}


def _convex(points: list[tuple[float, float]], low: float, high: float) -> list[tuple[float, float]]:
    """Return the lower convex hull through `points` from `low` to `high`, its last slope going on."""
    points = sorted(points)

    def slope(a: tuple[float, float], b: tuple[float, float]) -> float:
        return (b[1] - a[1]) / (b[0] - a[0])

    def at(x: float) -> float:
        right = next((i for i, point in enumerate(points) if point[0] >= x), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(right, 1) - 1], points[max(right, 1)]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    hull: list[tuple[float, float]] = []
    for point in [(low, at(low)), *(point for point in points if low < point[0] < high), (high, at(high))]:
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _distance(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], float]:
    """Return the function that says how far the outputs of `model` are from those of now."""
    dense_outputs, distribution = _outputs(model, batches)

    def distance() -> float:
        outputs, _ = _outputs(model, batches)
        kl = (dense_outputs.exp() * (dense_outputs - outputs)).sum(-1)
        change = kl if distribution else 1 - (dense_outputs * outputs).sum(-1)
        return max(0.0, float(change.mean()))

    return distance


def _outputs(model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, bool]:
    """Return outputs at compared positions, `(positions, width)`, and whether they are log-probabilities."""
    batches, outputs, distribution = on_device(model, batches), [], False
    each = math.ceil(TOKENS_COMPARED / len(batches))
    for batch in batches:
        if "labels" in batch and batch["labels"].dim() == 1:
            del batch["labels"]  # classes are not needed, and a frozen encoder would refuse them
        output = model(**batch)
        distribution = hasattr(output, "logits")
        rows = output.logits if distribution else output.last_hidden_state
        if rows.dim() == 3:  # (batch, seq, width): padding does not count
            rows = rows[batch["labels"] != -100 if "labels" in batch else batch["attention_mask"].bool()]
        rows = rows[:each].float()
        outputs.append(F.log_softmax(rows, dim=-1) if distribution else F.normalize(rows, dim=-1))
    if outputs[0].shape[-1] == 1:
        raise BadSetting("a model with a single output has no distribution: scan it without its head.")
    return torch.cat(outputs), distribution
