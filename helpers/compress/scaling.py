"""Scaling of inputs before rounding: what a channel's weights are multiplied by, its inputs are divided by.

The product stays the same, what rounding does to it does not. The factors on the inputs stay beside the integers, a
vector per map counted in its bytes: folding them into the map or norm before is exact in some families only (not where
a norm's output is read by a residual, nor through an activation, nor where heads share values); this is in all.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from helpers.compress import Report, technique
from helpers.compress.calibration import Batch, Stats, calibrate
from helpers.compress.packed_layers import Int8DynamicLinear, QuantizedLinear, store_as_integers
from helpers.compress.packing import check_grid, dequantize, quantize
from helpers.compress.quantization import UNPACKED, achieved, check_kernel, compared, output_errors
from helpers.layers import prunable

ALPHAS = tuple(step / 10 for step in range(11))  # at 0 nothing is scaled, so the result is never worse
ROWS_TRIED = 2048  # inputs that the integer kernel is tried on


@technique(name="awq", version=1, title="Activation-aware scaling")
@torch.no_grad()
def awq(
    model: nn.Module,
    *,
    calibration: Sequence[Batch],
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
):
    """Round to nearest after weights were multiplied by mean|x_j|^α of their input (Lin et al. 2024, eq. 4 and 5).

    One α of `ALPHAS` per group of maps that read the same input: the least ‖X(W - Ŵ)ᵀ‖ over the calibration text, with
    the inputs that the rounded blocks before give. `achieved` has the errors as "gptq" has them, and the "alphas".

    Args:
        calibration: batches of text whose activations are looked at.
        bits, group_size, symmetric: as for "rtn".
    """
    check_grid(bits, group_size, symmetric)

    def sizes(rows: Tensor, _: Sequence[Tensor]) -> Iterator[Tensor]:
        mean = _positive(rows.abs().mean(0))
        return (mean**alpha for alpha in ALPHAS[1:])

    def errors(weight: Tensor, tried: Sequence[Tensor | None], stats: Stats) -> Tensor:
        made = []
        for factor in tried:
            tensors = quantize(_over(weight, factor), bits=bits, group_size=group_size, symmetric=symmetric)
            rounded = dequantize(*tensors, group_size=group_size)
            made.append(rounded if factor is None else rounded * factor)
        return output_errors(weight, stats.gram, made)

    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    layers, found = _scale(model, "awq", calibration, sizes, errors, QuantizedLinear, grid)
    return model, Report("awq", layers, achieved(model, UNPACKED) | found)


@technique(name="smoothquant", version=1, title="int8, dynamic, smoothed")
@torch.no_grad()
def smoothquant(model: nn.Module, *, calibration: Sequence[Batch]):
    """ "int8-dynamic" after inputs were divided by max|x_j|^α / max|w_j|^(1-α) (Xiao et al. 2023, eq. 4).

    One large input makes the one scale of a call coarse for all others. α is chosen as in "awq", by the outputs that
    the kernel itself gives for `ROWS_TRIED` inputs in one call; "rtn" stands for "int8-dynamic" in `achieved`.

    Args:
        calibration: batches of text whose activations are looked at.
    """
    backend = check_kernel(model)

    def sizes(rows: Tensor, weights: Sequence[Tensor]) -> Iterator[Tensor]:
        most = _positive(rows.abs().amax(0))
        weight = _positive(torch.cat(list(weights)).float().abs().amax(0))
        return (most**alpha / weight ** (1 - alpha) for alpha in ALPHAS[1:])

    def errors(weight: Tensor, tried: Sequence[Tensor | None], stats: Stats) -> Tensor:
        rows = torch.cat(stats.rows)
        rows = rows[:: -(-len(rows) // ROWS_TRIED)]
        dense, off = rows @ weight.float().t(), []
        for factor in tried:
            tensors = quantize(_over(weight, factor), bits=8, symmetric=True)
            layer = Int8DynamicLinear(
                *tensors, width=weight.shape[1], bits=8, group_size=None, channel_scale=factor
            )
            off.append((layer(rows) - dense).square().sum())
        return torch.stack([*off, dense.square().sum()]).double()

    grid = {"bits": 8, "group_size": None, "symmetric": True}
    layers, found = _scale(model, "smoothquant", calibration, sizes, errors, Int8DynamicLinear, grid)
    return model, Report("smoothquant", layers, achieved(model, backend) | found)


def _scale(
    model: nn.Module,
    name: str,
    calibration: Sequence[Batch],
    sizes: Callable,
    errors: Callable,
    kind: type[QuantizedLinear],
    grid: dict,
) -> tuple[int, dict]:
    """Scale and round block by block; the number of maps, and what was found.

    Args:
        sizes: of the inputs `(tokens, in)` and the weights that read them, what weights are multiplied by at each α.
        errors: squared errors of one map for each of the factors on its inputs, and the squared size of its outputs.
    """
    maps, found, alphas = {one.name: one for one in prunable(model)}, {}, {}
    collect = ("rows",) if kind is Int8DynamicLinear else ("gram", "rows")
    stored = {"bits": grid["bits"], "group_size": grid["group_size"]}
    for step in calibrate(model, calibration, collect=collect) if maps else ():
        for names in _sharing(step.stats):
            stats, weights = step.stats[names[0]], [maps[one].weight2d().detach() for one in names]
            wanted = sizes(torch.cat(stats.rows), weights)
            tried = [None, *(((s.max() * s.min()).sqrt() / s).to(weights[0].dtype) for s in wanted)]
            each = [errors(weight, tried, stats) for weight in weights]
            best = int(sum(each)[:-1].argmin())
            for one, weight, error in zip(names, weights, each, strict=True):
                found[one], alphas[one] = error[[best, 0, -1]], ALPHAS[best]
                tensors = quantize(_over(weight, tried[best]), **grid)
                store_as_integers(
                    model, maps[one].module.weight, tensors, kind=kind, channel_scale=tried[best], **stored
                )
    return len(maps), compared(name, found) | {"alphas": alphas}


def _sharing(stats: dict[str, Stats]) -> list[list[str]]:
    """Names of the maps of a block by the input they read."""
    groups: dict[int, list[str]] = {}
    for name, one in stats.items():
        groups.setdefault(id(one.rows[0]), []).append(name)
    return list(groups.values())


def _over(weight: Tensor, factor: Tensor | None) -> Tensor:
    """The weights for inputs multiplied by `factor` `(in,)`."""
    return weight if factor is None else weight / factor


def _positive(size: Tensor) -> Tensor:
    """`size` with a floor, for channels that are always zero."""
    return size.clamp(min=max(1e-4 * float(size.max()), 1e-10))
