"""Quantization after training: half precision, round to nearest, NF4, GPTQ, AWQ, and integer arithmetic.

Quantized are the linear layers inside the blocks, and the token table on request with a head tied to it;
norms, biases and other heads never. The result holds integers, so its file shrinks by what the row says.
"""

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmcompress.compress import TechniqueResult, refuse_bad_weights, technique
from lmcompress.compress.calibration import Stats, calibrate
from lmcompress.compress.masks import group_of
from lmcompress.compress.second_order import (
    FactorCache,
    four_digits,
    relative_errors,
    round_matrix,
    rounding_order,
)
from lmcompress.compress.settings import Bits
from lmcompress.errors import BadData, BadSetting
from lmcompress.models import packed, storage
from lmcompress.models.anatomy import LinearLayer, count_parameters, prunable
from lmcompress.models.families import integer_layers
from lmcompress.models.packed import Int8DynamicLinear, QuantizedLinear, store_as_integers
from lmcompress.models.serialization import own_tensors

ALPHAS = tuple(step / 10 for step in range(11))  # 0: not scaled, so that the result is never worse
ROWS_TRIED = 2048  # inputs that the integer kernel is tried on
INT8 = {"bits": 8, "group_size": None, "symmetric": True, "kind": Int8DynamicLinear}  # what the kernel takes


@technique("cast", 1, "BF16 or FP16", "#44AA99", "d")
def cast(model, context, *, dtype: Literal["bfloat16", "float16"]):
    """Store every floating-point weight in 16 bits, but not what the constructor computes (rotary tables)."""
    target, changed = getattr(torch, dtype), 0
    for module in model.modules():
        for name, tensor in own_tensors(module):
            if tensor is None or not tensor.is_floating_point() or tensor.dtype == target:
                continue
            changed += 1
            if isinstance(tensor, nn.Parameter):  # its data, so that tied weights stay one parameter
                tensor.data = tensor.data.to(target)
            else:
                setattr(module, name, tensor.to(target))
    refuse_bad_weights(model)
    stored = {"dtype": dtype, "bits_per_weight": 16.0, "share_quantized": 1.0, "backend": f"torch, {dtype}"}
    return model, TechniqueResult("cast", changed, stored)


@technique("rtn", 1, "RTN", "#6699CC", "2")
def rtn(
    model,
    context,
    *,
    bits: Bits,
    group_size: int | None = None,
    symmetric: bool = False,
    embeddings: bool = False,
):
    """Round every weight to the nearest point of its group's grid: weight-only, no text looked at.

    Args:
        bits: 8, 4 or 3; or one of them per group of layers (see `sensitivity.allocate_bits`); alike in the
            techniques below.
        symmetric: the grid's middle is zero; else it spans least to greatest weight.
        embeddings: the token table too, and a head tied to it.
    """
    layers = prunable(model)
    store_nearest(model, layers, bits, embeddings, symmetric=symmetric, group_size=group_size)
    return model, TechniqueResult("rtn", len(layers), achieved(model, QuantizedLinear.execution))


@technique("nf4", 1, "NF4", "#661100", "4")
def nf4(model, context, *, group_size: int = 64, embeddings: bool = False):
    """Round each weight to the nearest of NF4's 16 values (Dettmers et al. 2023), no double quantization."""
    layers = prunable(model)
    store_nearest(model, layers, 4, embeddings, nf4=True, group_size=group_size)
    return model, TechniqueResult("nf4", len(layers), achieved(model, QuantizedLinear.execution))


@technique("int8-dynamic", 2, "Dynamic INT8", "#DDCC77", ">")
def int8_dynamic(model, context):
    """Take weights and inputs in 8 bits, multiplied by `torch.ao.quantization.quantize_dynamic`'s kernel.

    One scale per row of weights; one per call for the inputs, from their least and greatest. For Conv1D too,
    which `quantize_dynamic` passes over in silence.
    """
    backend, layers = check_kernel(model), prunable(model)
    store_nearest(model, layers, **INT8)
    return model, TechniqueResult("int8-dynamic", len(layers), achieved(model, backend))


@technique("gptq", 1, "GPTQ", "#CC6677", "3", needs=("calibration",))
@torch.no_grad()
def gptq(
    model,
    context,
    *,
    bits: Bits,
    group_size: int | None = None,
    symmetric: bool = False,
    embeddings: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    keep_zeros: bool = False,
):
    """Round column by column, and let the columns still to come make up for it (Frantar et al. 2023).

    `achieved` has ‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration text, that of round to nearest on the same inputs,
    and the layers where it is no better. Embeddings are rounded to nearest.

    Args:
        act_order: inputs with the largest sum of squares first; groups have the original weights' scales.
        keep_zeros: weights that are zero stay zero, for a model that was pruned before; else they take part.
    """
    layers, factors, errors = {layer.name: layer for layer in prunable(model)}, FactorCache(damping), {}
    solver = {"symmetric": symmetric, "act_order": act_order, "keep_zeros": keep_zeros}
    for step in calibrate(model, context.calibration, collect=("gram",)) if layers else ():
        for name, stats in step.stats.items():
            gram, weight2d = stats.gram, layers[name].weight2d()
            grid = {"bits": width_of(bits, group_of(layers[name])), "group_size": group_size}
            factor = factors.of(gram, rounding_order(gram, act_order))
            tensors = round_matrix(weight2d, gram, factor=factor, **solver, **grid)
            nearest = packed.quantize(weight2d, symmetric=symmetric, **grid)
            rounded = [packed.dequantize(*stored, group_size=group_size) for stored in (tensors, nearest)]
            errors[name] = output_errors(weight2d.float(), gram, rounded)
            store_as_integers(model, layers[name].module.weight, tensors, **grid)
    store_nearest(model, [], bits, embeddings, symmetric=symmetric, group_size=group_size)
    figures = achieved(model, QuantizedLinear.execution) | compare_errors("gptq", errors)
    return model, TechniqueResult("gptq", len(layers), figures)


@technique("awq", 1, "AWQ", "#1B7837", "8", needs=("calibration",))
def awq(model, context, *, bits: Bits, group_size: int | None = None, symmetric: bool = False):
    """Round to nearest after weights were multiplied by mean|x_j|^α of their input (Lin et al. 2024, eq. 4).

    One α of `ALPHAS` for the layers that read the same input: the least ‖X(W - Ŵ)ᵀ‖ over the calibration
    text. `achieved` has the errors as "gptq" has them, and the "alphas".
    """
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}

    def factors(inputs: Tensor, _: Tensor, alpha: float) -> Tensor:
        return _positive(inputs.abs().mean(0)) ** alpha

    def errors(weight: Tensor, tried: list[tuple], stats: Stats) -> Tensor:
        rounded = [packed.dequantize(*tensors, group_size=group_size) * scale for tensors, scale in tried]
        return output_errors(weight.float(), stats.gram, rounded)

    return _scale_and_round("awq", model, context, factors, errors, backend=QuantizedLinear.execution, **grid)


@technique("smoothquant", 2, "SmoothQuant (dynamic INT8)", "#B15928", "p", needs=("calibration",))
def smoothquant(model, context):
    """Do "int8-dynamic" after inputs were divided by max|x_j|^α / max|w_j|^(1-α) (Xiao et al. 2023, eq. 4).

    One large input makes the one scale of a call coarse for all others. α is chosen as in "awq", by the
    outputs that the kernel gives for `ROWS_TRIED` inputs in one call; "rtn" stands for "int8-dynamic".
    """

    def factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
        largest, weight = (_positive(matrix.abs().amax(0)) for matrix in (inputs, weights.float()))
        return largest**alpha / weight ** (1 - alpha)

    def errors(weight: Tensor, tried: list[tuple], stats: Stats) -> Tensor:
        inputs = torch.cat(stats.rows)
        inputs = inputs[:: -(-len(inputs) // ROWS_TRIED)]
        exact, grid = inputs @ weight.float().t(), {"width": weight.shape[1], "bits": 8, "group_size": None}
        layers = [Int8DynamicLinear(*tensors, channel_scale=scale, **grid) for tensors, scale in tried]
        squares = [(layer(inputs) - exact).square().sum() for layer in layers]
        return torch.stack([*squares, exact.square().sum()]).double()

    backend = check_kernel(model)
    return _scale_and_round("smoothquant", model, context, factors, errors, backend=backend, **INT8)


@torch.no_grad()
def _scale_and_round(
    name: str,
    model,
    context,
    factors: Callable,
    errors: Callable,
    *,
    backend: str,
    bits: Bits,
    symmetric: bool,
    **scheme,
):
    """Multiply weights and divide their input by the same scales, block by block, then round to nearest.

    The scales stay beside the integers, counted in the bytes: to fold them into what comes before is exact in
    some families only. `factors` gives the weights' multipliers at an α, from the inputs `(tokens, in)` and
    all weights that read them; `errors` one weight's squared error at each scale, then its outputs' size.
    """
    layers, squares, alphas = {layer.name: layer for layer in prunable(model)}, {}, {}
    grid = {"group_size": scheme["group_size"], "symmetric": symmetric}
    collect = ("rows",) if "kind" in scheme else ("gram", "rows")
    for step in calibrate(model, context.calibration, collect=collect) if layers else ():
        # Layers that read the same input hold the same tensors of rows, and take one scale.
        for _, names in groupby(list(step.stats), key=lambda name: id(step.stats[name].rows[0])):
            readers = [layers[name] for name in names]
            weights, seen = [reader.weight2d().detach() for reader in readers], step.stats[readers[0].name]
            together = torch.cat(seen.rows), torch.cat(weights)
            multipliers = [factors(*together, alpha) for alpha in ALPHAS[1:]]
            # Divided by the geometric mean of the extremes: scales lie around 1, as in the authors' code.
            scales = [torch.ones_like(multipliers[0])]
            scales += [(factor.max() * factor.min()).sqrt() / factor for factor in multipliers]
            scales = [scale.to(weights[0].dtype) for scale in scales]
            widths = [width_of(bits, group_of(reader)) for reader in readers]
            tried = [
                [(packed.quantize(weight / scale, bits=width, **grid), scale) for scale in scales]
                for weight, width in zip(weights, widths, strict=True)
            ]
            by_reader = [errors(*pair, seen) for pair in zip(weights, tried, strict=True)]
            best = int(sum(by_reader)[:-1].argmin())
            scheme["channel_scale"] = scales[best] if best else None
            for reader, width, rounded, error in zip(readers, widths, tried, by_reader, strict=True):
                squares[reader.name], alphas[reader.name] = error[[best, 0, -1]], ALPHAS[best]
                store_as_integers(model, reader.module.weight, rounded[best][0], bits=width, **scheme)
    figures = achieved(model, backend) | compare_errors(name, squares) | {"alphas": alphas}
    return model, TechniqueResult(name, len(alphas), figures)


def _positive(size: Tensor) -> Tensor:
    """Return `size` with a floor, for channels that are always zero."""
    return size.clamp(min=max(1e-4 * float(size.max()), 1e-10))


def width_of(bits: Bits, group: str) -> int:
    """Return the bits of a group of layers (`masks.group_of`): its own, or those of all."""
    if isinstance(bits, dict) and group not in bits:
        raise BadSetting(f"bits gives {group} no width; it has {', '.join(bits)}.")
    return bits[group] if isinstance(bits, dict) else bits


def store_nearest(
    model, layers: Sequence[LinearLayer], bits: Bits, embeddings: bool = False, *, symmetric=False, **grid
) -> None:
    """Store `layers`, and on request the token table, at the nearest points of `store_as_integers`' grid."""
    matrices = [(layer.module.weight, layer.weight2d(), group_of(layer)) for layer in layers]
    if embeddings:
        table = model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise BadSetting(
                f"embeddings=True, but the token table is a {type(table).__name__} and no nn.Embedding: "
                "leave it out."
            )
        matrices.append((table.weight, table.weight, "embedding"))
    for weight, weight2d, group in matrices:
        width, group_size = width_of(bits, group), grid["group_size"]
        if grid.get("nf4"):
            tensors = (*packed.quantize_nf4(weight2d, group_size=group_size), None)
        else:
            tensors = packed.quantize(weight2d, bits=width, group_size=group_size, symmetric=symmetric)
        store_as_integers(model, weight, tensors, bits=width, **grid)


def check_kernel(model: nn.Module) -> str:
    """Return the backend that multiplies integers of `model`, in words; refuse where there is none."""
    device, engine = next(model.parameters()).device.type, torch.backends.quantized.engine
    if device != "cpu" or engine == "none":
        raise BadSetting(
            f"int8 inputs need a CPU with one of torch's integer engines; this model is on {device!r}, the "
            f'engine is {engine!r}. Use device="cpu", or "rtn" with bits=8 for the bytes without the kernel.'
        )
    return f"{Int8DynamicLinear.execution}, {engine}"


def achieved(model: nn.Module, backend: str) -> dict:
    """Return what is stored as integers: bits per weight with scales and zero points, share of parameters."""
    layers = integer_layers(model)
    weights = sum(layer.weight_count for layer in layers)
    if not weights:
        return {}
    buffers = {id(buffer): buffer for layer in layers for buffer in layer.buffers()}  # a tied table once
    return {
        "bits_per_weight": 8 * sum(buffer.nbytes for buffer in buffers.values()) / weights,
        "share_quantized": weights / count_parameters(model),
        "weights_quantized": weights,
        "backend": backend,
    }


def stored_integers(folder: str | Path) -> list[dict]:
    """Return what the model saved in `folder` holds as integers, read from its file; [] for a dense one.

    Per packed matrix "name", "shape" and "dtype" in the file, "bits", and how many numbers it has ("unique").
    """
    folder, matrices = Path(folder), []
    if not any(folder.glob("*.safetensors")):
        raise BadData(
            f"{folder} holds no saved model (*.safetensors): give a folder that storage.save wrote."
        )
    record = folder / storage.RECORD
    structure = json.loads(record.read_text()).get("structure", {}) if record.is_file() else {}
    for name, tensor in load_file(folder / storage.WEIGHTS).items() if structure else ():
        layer, _, leaf = name.rpartition(".")
        if leaf == "packed":
            spec, dtype = structure["replaced"][layer]["spec"], str(tensor.dtype).removeprefix("torch.")
            unique = len(packed.unpack(tensor, spec["bits"], spec["width"]).unique())
            matrix = {"name": name, "shape": list(tensor.shape), "dtype": dtype}
            matrices.append(matrix | {"bits": spec["bits"], "unique": unique})
    return matrices


def output_errors(weight: Tensor, gram: Tensor, rounded: Sequence[Tensor]) -> Tensor:
    """Return ‖X(W - Ŵ)ᵀ‖² of each Ŵ in `rounded`, then ‖XWᵀ‖², for `gram` XᵀX: tr((W - Ŵ) XᵀX (W - Ŵ)ᵀ)."""
    errors = [(weight - matrix).to(gram.dtype) for matrix in (*rounded, 0)]
    return torch.stack([((error @ gram) * error).sum() for error in errors]).double().cpu()


def compare_errors(name: str, errors: dict[str, Tensor], baseline: str = "rtn") -> dict:
    """Return relative errors of technique `name` and of `baseline`, in all and by layer; {} without layers.

    `errors` are per layer the squared errors of both, and the squared size of the outputs.
    """
    if not errors:
        return {}
    by_layer = {layer: relative_errors(squares) for layer, squares in errors.items()}
    error, baseline_error = relative_errors(sum(errors.values()))
    figures = {
        "output_error": error,
        f"output_error_{baseline}": baseline_error,
        "output_error_by_layer": {
            layer: {name: four_digits(a), baseline: four_digits(b)} for layer, (a, b) in by_layer.items()
        },
    }
    if baseline == "rtn":  # by construction no low rank is worse than a plain SVD
        no_better = [layer for layer, (a, b) in by_layer.items() if errors[layer][2] and a >= b]
        figures["layers_no_better_than_rtn"] = no_better
    return figures
