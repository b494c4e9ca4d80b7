"""Quantization after training: half precision, round to nearest, GPTQ, NF4, and integer arithmetic.

Rounded are the linear maps inside the blocks, and the token table on request with a head tied to it; norms,
biases and other heads never. The result holds integers, so its file shrinks by what the row says.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmcompress.compress import TechniqueResult, refuse_bad_weights, technique
from lmcompress.compress.calibration import calibrate
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
from lmcompress.models import storage
from lmcompress.models.anatomy import count_parameters, prunable
from lmcompress.models.families import integer_layers
from lmcompress.models.packed import Int8DynamicLinear, store_as_integers
from lmcompress.models.packing import dequantize, quantize, quantize_nf4, unpack
from lmcompress.models.serialization import own_tensors

UNPACKED = "integers made floating-point again in every call"


@technique(name="cast", version=1, title="Half precision", colour="#44AA99", marker="d")
def cast(model, context, *, dtype: Literal["bfloat16", "float16"]):
    """Store every floating-point weight in 16 bits; what the constructor computes (rotary frequencies) stays
    as it is.

    Raises:
        BadWeights: a weight is too large for float16.
    """
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


@technique(name="rtn", version=1, title="Round to nearest", colour="#6699CC", marker="2")
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
        bits: 8, 4 or 3; or one of them per group of layers (see `sensitivity.allocate_bits`).
        symmetric: the grid's middle is zero; else it spans least to greatest weight.
        embeddings: the token table too, and a head tied to it.
    """
    layers = prunable(model)
    matrices = [(layer.module.weight, layer.weight2d(), _width(bits, group_of(layer))) for layer in layers]
    matrices += [(table, table, _width(bits, "embedding")) for table in _tables(model, embeddings)]
    for weight, weight2d, width in matrices:
        scheme = {"bits": width, "group_size": group_size}
        store_as_integers(model, weight, quantize(weight2d, symmetric=symmetric, **scheme), **scheme)
    return model, TechniqueResult("rtn", len(layers), achieved(model, UNPACKED))


@technique(name="nf4", version=1, title="NF4", colour="#661100", marker="4")
def nf4(model, context, *, group_size: int = 64, embeddings: bool = False):
    """Round each weight to the nearest of NF4's 16 values (Dettmers et al. 2023), no double quantization."""
    layers = prunable(model)
    matrices = [(layer.module.weight, layer.weight2d()) for layer in layers]
    for weight, weight2d in matrices + [(table, table) for table in _tables(model, embeddings)]:
        tensors = (*quantize_nf4(weight2d, group_size=group_size), None)
        store_as_integers(model, weight, tensors, nf4=True, bits=4, group_size=group_size)
    return model, TechniqueResult("nf4", len(layers), achieved(model, UNPACKED))


@technique(name="int8-dynamic", version=2, title="int8, dynamic", colour="#DDCC77", marker=">")
def int8_dynamic(model, context):
    """Take weights and inputs in 8 bits, multiplied as integers by the kernel of
    `torch.ao.quantization.quantize_dynamic`.

    One scale per row of weights; one per call for the inputs, from their least and greatest. For Conv1D too,
    which `quantize_dynamic` itself passes over in silence. Needs a CPU (`check_kernel`).
    """
    backend, layers = check_kernel(model), prunable(model)
    scheme = {"kind": Int8DynamicLinear, "bits": 8, "group_size": None}
    for layer in layers:
        tensors = quantize(layer.weight2d(), bits=8, symmetric=True)
        store_as_integers(model, layer.module.weight, tensors, **scheme)
    return model, TechniqueResult("int8-dynamic", len(layers), achieved(model, backend))


@technique(name="gptq", version=1, title="GPTQ", colour="#CC6677", marker="3", needs=("calibration",))
@torch.no_grad()
def gptq(
    model,
    context,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    embeddings: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    keep_zeros: bool = False,
):
    """Round column by column, and let the columns still to come make up for it (Frantar et al. 2023).

    Block by block, with the inputs that the rounded blocks before give. `achieved` has ‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖
    over the calibration text, beside that of round to nearest on the same inputs, and names the layers where
    it is no better.

    Args:
        embeddings: as for "rtn", rounded to nearest.
        act_order: inputs with the largest sum of squares first; a group's scale is then the original
            weights'.
        keep_zeros: weights that are zero stay zero, for a model that was pruned before; else they take part.
    """
    layers = {layer.name: layer for layer in prunable(model)}
    scheme = {"bits": bits, "group_size": group_size}
    solver = {"symmetric": symmetric, "act_order": act_order, "keep_zeros": keep_zeros}
    factors, errors = FactorCache(damping), {}
    for step in calibrate(model, context.calibration, collect=("gram",)) if layers else ():
        for name, stats in step.stats.items():
            gram, weight2d = stats.gram, layers[name].weight2d()
            factor = factors.of(gram, rounding_order(gram, act_order))
            nearest = quantize(weight2d, symmetric=symmetric, **scheme)
            tensors = round_matrix(weight2d, gram, factor=factor, **solver, **scheme)
            rounded = [dequantize(*stored, group_size=group_size) for stored in (tensors, nearest)]
            errors[name] = output_errors(weight2d, gram, rounded)
            store_as_integers(model, layers[name].module.weight, tensors, **scheme)
    for table in _tables(model, embeddings):
        store_as_integers(model, table, quantize(table, symmetric=symmetric, **scheme), **scheme)
    return model, TechniqueResult(
        "gptq", len(layers), achieved(model, UNPACKED) | compare_errors("gptq", errors)
    )


def check_kernel(model: nn.Module) -> str:
    """Return the backend that multiplies integers of `model`, in words.

    Raises:
        BadSetting: the model is not on a CPU, or this torch has no integer kernel for it.
    """
    device, engine = next(model.parameters()).device.type, torch.backends.quantized.engine
    if device != "cpu" or engine == "none":
        raise BadSetting(
            f"int8 inputs need a CPU with one of torch's integer engines; this model is on {device!r}, the "
            f'engine is {engine!r}. Use device="cpu", or "rtn" with bits=8 for the bytes without the kernel.'
        )
    return f"torch linear_dynamic, {engine}"


def achieved(model: nn.Module, backend: str) -> dict:
    """Return what is stored as integers: bits per weight with scales and zero points, share of parameters."""
    layers = integer_layers(model)
    weights = sum(layer.weight_count for layer in layers)
    if not weights:
        return {}
    buffers = {
        id(buffer): buffer for layer in layers for buffer in layer.buffers()
    }  # a tied table counts once
    return {
        "bits_per_weight": 8 * sum(buffer.nbytes for buffer in buffers.values()) / weights,
        "share_quantized": weights / count_parameters(model),
        "weights_quantized": weights,
        "backend": backend,
    }


def stored_integers(folder: str | Path) -> list[dict]:
    """Return what the model saved in `folder` holds as integers, read from its file; [] for a dense one.

    Returns:
        Per packed matrix "name", "shape" and "dtype" in the file, "bits", and how many different whole
        numbers it unpacks to ("unique", at most 2^bits).
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
        if leaf != "packed":
            continue
        spec, dtype = structure["replaced"][layer]["spec"], str(tensor.dtype).removeprefix("torch.")
        unique = len(unpack(tensor, spec["bits"], spec["width"]).unique())
        shape = list(tensor.shape)
        matrices.append(
            {"name": name, "shape": shape, "dtype": dtype, "bits": spec["bits"], "unique": unique}
        )
    return matrices


def _width(bits: Bits, group: str) -> int:
    """Return the width of a group of layers (`masks.group_of`), or of the token table ("embedding")."""
    if isinstance(bits, dict) and group not in bits:
        raise BadSetting(f"bits gives {group} no width; it has {', '.join(bits)}.")
    return bits[group] if isinstance(bits, dict) else bits


def _tables(model: nn.Module, embeddings: bool) -> list[nn.Parameter]:
    """Return the token table's parameter, its own matrix, if `embeddings` are to be rounded; else nothing."""
    if not embeddings:
        return []
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise BadSetting(
            f"embeddings=True, but the token table is a {type(table).__name__} and no nn.Embedding: leave it "
            "out."
        )
    return [table.weight]


def output_errors(weight2d: Tensor, gram: Tensor, rounded: Sequence[Tensor]) -> Tensor:
    """Return ‖X(W - Ŵ)ᵀ‖² of each Ŵ in `rounded`, then ‖XWᵀ‖², for `gram` XᵀX: tr((W - Ŵ) XᵀX (W - Ŵ)ᵀ)."""
    weight = weight2d.float()
    errors = [weight - matrix.float() for matrix in rounded] + [weight]
    return torch.stack([((error @ gram) * error).sum() for error in errors]).double().cpu()


def compare_errors(name: str, errors: dict[str, Tensor]) -> dict:
    """Return relative errors of technique `name` and of round to nearest, in all and by layer; {} if there is
    no layer.

    Args:
        errors: per layer the squared errors of both, and the squared size of the outputs.
    """
    if not errors:
        return {}

    by_layer = {layer: relative_errors(squares) for layer, squares in errors.items()}
    error, nearest = relative_errors(sum(errors.values()))
    return {
        "output_error": error,
        "output_error_rtn": nearest,
        "output_error_by_layer": {
            layer: {name: four_digits(a), "rtn": four_digits(b)} for layer, (a, b) in by_layer.items()
        },
        "layers_no_better_than_rtn": [n for n, (a, b) in by_layer.items() if errors[n][2] and a >= b],
    }
