"""Scaling before rounding: what the weights of an input are multiplied by, the input itself is divided by.

The product stays the same; what rounding does to it does not. The factors stay beside the integers, a vector per input
counted in the bytes: to fold them into the norm or map before is exact in some families only (not where a residual
reads the norm's output, too), this is in all.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import Batch, Stats, calibrate
from lmcompress.compress.quantization import UNPACKED, achieved, check_kernel, compared, output_errors
from lmcompress.models.anatomy import prunable
from lmcompress.models.packed import Int8DynamicLinear, QuantizedLinear, store_as_integers
from lmcompress.models.packing import check_grid, dequantize, quantize

ALPHAS = tuple(step / 10 for step in range(11))  # 0: not scaled, so that the result is never worse
ROWS_TRIED = 2048  # inputs that the integer kernel is tried on


@technique(
    name="awq",
    version=1,
    title="Activation-aware scaling",
    colour="#1B7837",
    marker="8",
    needs=("calibration",),
)
@torch.no_grad()
def awq(
    model: nn.Module, context: Context, *, bits: int, group_size: int | None = None, symmetric: bool = False
):
    """Round to nearest after weights were multiplied by mean|x_j|^α of their input (Lin et al. 2024, eq. 4 and 5).

    One α of `ALPHAS` for the maps that read the same input: the least ‖X(W - Ŵ)ᵀ‖ over the calibration text, with the
    inputs that the rounded blocks before give. `achieved` has the errors as "gptq" has them, and the "alphas".

    Args:
        context.calibration: batches of text whose activations are looked at.
        bits, group_size, symmetric: as for "rtn".
    """
    check_grid(bits, group_size, symmetric)
    grid = {"bits": bits, "group_size": group_size}

    def sizes(rows: Tensor, _: Tensor) -> list[Tensor]:
        return [_positive(rows.abs().mean(0)) ** alpha for alpha in ALPHAS[1:]]

    def errors(weight: Tensor, tried: Sequence[Tensor], stats: Stats) -> Tensor:
        rounded = (quantize(weight / one, symmetric=symmetric, **grid) for one in tried)
        made = [dequantize(*each, group_size=group_size) * one for each, one in zip(rounded, tried)]
        return output_errors(weight, stats.gram, made)

    found = _scale(model, "awq", context.calibration, sizes, errors, QuantizedLinear, symmetric, **grid)
    return model, TechniqueResult("awq", len(found.get("alphas", ())), achieved(model, UNPACKED) | found)


@technique(
    name="smoothquant",
    version=2,
    title="int8, dynamic, smoothed",
    colour="#B15928",
    marker="p",
    needs=("calibration",),
)
@torch.no_grad()
def smoothquant(model: nn.Module, context: Context):
    """ "int8-dynamic" after inputs were divided by max|x_j|^α / max|w_j|^(1-α) (Xiao et al. 2023, eq. 4).

    One large input makes the one scale of a call coarse for all others. α is chosen as in "awq", by the outputs that
    the kernel gives for `ROWS_TRIED` inputs in one call; in `achieved` "rtn" stands for "int8-dynamic".
    """
    backend, grid = check_kernel(model), {"bits": 8, "group_size": None}

    def sizes(rows: Tensor, weights: Tensor) -> list[Tensor]:
        most, weight = (_positive(one.abs().amax(0)) for one in (rows, weights.float()))
        return [most**alpha / weight ** (1 - alpha) for alpha in ALPHAS[1:]]

    def errors(weight: Tensor, tried: Sequence[Tensor], stats: Stats) -> Tensor:
        rows = torch.cat(stats.rows)
        rows = rows[:: -(-len(rows) // ROWS_TRIED)]
        off = [rows @ weight.float().t()]
        for one in tried:
            tensors = quantize(weight / one, bits=8, symmetric=True)
            layer = Int8DynamicLinear(*tensors, width=weight.shape[1], channel_scale=one, **grid)
            off.insert(-1, layer(rows) - off[-1])
        return torch.stack([one.square().sum() for one in off]).double()

    found = _scale(model, "smoothquant", context.calibration, sizes, errors, Int8DynamicLinear, True, **grid)
    return model, TechniqueResult(
        "smoothquant", len(found.get("alphas", ())), achieved(model, backend) | found
    )


def _scale(
    model: nn.Module,
    name: str,
    calibration: Sequence[Batch],
    sizes: Callable,
    errors: Callable,
    kind: type[QuantizedLinear],
    symmetric: bool,
    **grid,
) -> dict:
    """Scale and round block by block; errors and α's, or {} if there is no map.

    Args:
        sizes: of the inputs `(tokens, in)` and all weights that read them, what weights are multiplied by at each α.
        errors: squared errors of one map for each of the factors on its inputs, and the squared size of its outputs.
    """
    maps, found, alphas = {one.name: one for one in prunable(model)}, {}, {}
    collect = ("gram", "rows") if kind is QuantizedLinear else ("rows",)
    for step in calibrate(model, calibration, collect=collect) if maps else ():
        stats = step.stats
        for _, names in groupby(list(stats), key=lambda name: id(stats[name].rows[0])):
            readers = [maps[name] for name in names]
            weights, read = [one.weight2d().detach() for one in readers], stats[readers[0].name]
            wanted = sizes(torch.cat(read.rows), torch.cat(weights))
            tried = [torch.ones_like(wanted[0]), *((s.max() * s.min()).sqrt() / s for s in wanted)]
            tried = [one.to(weights[0].dtype) for one in tried]
            each = [errors(weight, tried, read) for weight in weights]
            best = int(sum(each)[:-1].argmin())
            held = {"kind": kind, "channel_scale": tried[best] if best else None}
            for one, weight, error in zip(readers, weights, each, strict=True):
                found[one.name], alphas[one.name] = error[[best, 0, -1]], ALPHAS[best]
                tensors = quantize(weight / tried[best], symmetric=symmetric, **grid)
                store_as_integers(model, one.module.weight, tensors, **held, **grid)
    return compared(name, found) | {"alphas": alphas} if maps else {}


def _positive(size: Tensor) -> Tensor:
    """`size` with a floor, for channels that are always zero."""
    return size.clamp(min=max(1e-4 * float(size.max()), 1e-10))
