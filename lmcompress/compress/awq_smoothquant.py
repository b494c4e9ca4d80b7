"""Scaling before rounding: what the weights of an input are multiplied by, the input itself is divided by.

The product stays the same; what rounding does to it does not. The factors stay beside the integers, a vector
per input counted in the bytes: to fold them into the norm or map before is exact in some families only (not
where a residual reads the norm's output, too), this is in all.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import Stats, calibrate
from lmcompress.compress.quantization import UNPACKED, achieved, check_kernel, compare_errors, output_errors
from lmcompress.models.anatomy import prunable
from lmcompress.models.packed import Int8DynamicLinear, QuantizedLinear, store_as_integers
from lmcompress.models.packing import dequantize, quantize

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
def awq(model, context, *, bits: int, group_size: int | None = None, symmetric: bool = False):
    """Round to nearest after weights were multiplied by mean|x_j|^α of their input (Lin et al. 2024, eq. 4
    and 5).

    One α of `ALPHAS` for the maps that read the same input: the least ‖X(W - Ŵ)ᵀ‖ over the calibration text,
    with the inputs that the rounded blocks before give. `achieved` has the errors as "gptq" has them, and the
    "alphas".
    """
    scheme = {"bits": bits, "group_size": group_size}

    def factors(inputs: Tensor, _: Tensor) -> list[Tensor]:
        return [_positive(inputs.abs().mean(0)) ** alpha for alpha in ALPHAS[1:]]

    def errors(weight: Tensor, candidates: Sequence[Tensor], stats: Stats) -> Tensor:
        rounded = []
        for scale in candidates:
            tensors = quantize(weight / scale, symmetric=symmetric, **scheme)
            rounded.append(dequantize(*tensors, group_size=group_size) * scale)
        return output_errors(weight, stats.gram, rounded)

    figures = _scale(model, "awq", context, factors, errors, QuantizedLinear, symmetric, **scheme)
    return model, TechniqueResult("awq", len(figures.get("alphas", ())), achieved(model, UNPACKED) | figures)


@technique(
    name="smoothquant",
    version=2,
    title="int8, dynamic, smoothed",
    colour="#B15928",
    marker="p",
    needs=("calibration",),
)
@torch.no_grad()
def smoothquant(model, context):
    """ "int8-dynamic" after inputs were divided by max|x_j|^α / max|w_j|^(1-α) (Xiao et al. 2023, eq. 4).

    One large input makes the one scale of a call coarse for all others. α is chosen as in "awq", by the
    outputs that the kernel gives for `ROWS_TRIED` inputs in one call; in `achieved` "rtn" stands for
    "int8-dynamic".
    """
    backend, scheme = check_kernel(model), {"bits": 8, "group_size": None}

    def factors(inputs: Tensor, weights: Tensor) -> list[Tensor]:
        largest, weight = (_positive(matrix.abs().amax(0)) for matrix in (inputs, weights.float()))
        return [largest**alpha / weight ** (1 - alpha) for alpha in ALPHAS[1:]]

    def errors(weight: Tensor, candidates: Sequence[Tensor], stats: Stats) -> Tensor:
        inputs = torch.cat(stats.rows)
        inputs = inputs[:: -(-len(inputs) // ROWS_TRIED)]
        exact, squares = inputs @ weight.float().t(), []
        for scale in candidates:
            tensors = quantize(weight / scale, bits=8, symmetric=True)
            layer = Int8DynamicLinear(*tensors, width=weight.shape[1], channel_scale=scale, **scheme)
            squares.append((layer(inputs) - exact).square().sum())
        return torch.stack([*squares, exact.square().sum()]).double()

    figures = _scale(model, "smoothquant", context, factors, errors, Int8DynamicLinear, True, **scheme)
    layers = len(figures.get("alphas", ()))
    return model, TechniqueResult("smoothquant", layers, achieved(model, backend) | figures)


def _scale(
    model: nn.Module,
    name: str,
    context: Context,
    factors: Callable[[Tensor, Tensor], list[Tensor]],
    errors: Callable[[Tensor, Sequence[Tensor], Stats], Tensor],
    kind: type[QuantizedLinear],
    symmetric: bool,
    **scheme,
) -> dict:
    """Scale and round block by block; return the errors and α's, or {} if there is no layer.

    Args:
        factors: of the inputs `(tokens, in)` and all weights that read them, what weights are multiplied by
            at each α.
        errors: squared errors of one layer for each candidate on its inputs, and the squared size of its
            outputs.
    """
    layers, squares, alphas = {layer.name: layer for layer in prunable(model)}, {}, {}
    collect = ("gram", "rows") if kind is QuantizedLinear else ("rows",)
    for step in calibrate(model, context.calibration, collect=collect) if layers else ():
        stats = step.stats
        # Layers that read the same input hold the same tensors of rows, and take one scale.
        for _, names in groupby(list(stats), key=lambda name: id(stats[name].rows[0])):
            readers = [layers[name] for name in names]
            weights, seen = [reader.weight2d().detach() for reader in readers], stats[readers[0].name]
            multiplied = factors(torch.cat(seen.rows), torch.cat(weights))
            # Divided by the geometric mean of the extremes, so that the scales lie around 1 (as in the
            # authors' code).
            scales = [torch.ones_like(multiplied[0])]
            scales += [(factor.max() * factor.min()).sqrt() / factor for factor in multiplied]
            scales = [scale.to(weights[0].dtype) for scale in scales]
            by_reader = [errors(weight, scales, seen) for weight in weights]
            best = int(sum(by_reader)[:-1].argmin())
            stored = {"kind": kind, "channel_scale": scales[best] if best else None}
            for reader, weight, error in zip(readers, weights, by_reader, strict=True):
                squares[reader.name], alphas[reader.name] = error[[best, 0, -1]], ALPHAS[best]
                tensors = quantize(weight / scales[best], symmetric=symmetric, **scheme)
                store_as_integers(model, reader.module.weight, tensors, **stored, **scheme)
    return compare_errors(name, squares) | {"alphas": alphas} if layers else {}


def _positive(size: Tensor) -> Tensor:
    """Return `size` with a floor, for channels that are always zero."""
    return size.clamp(min=max(1e-4 * float(size.max()), 1e-10))
