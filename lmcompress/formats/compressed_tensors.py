"""compressed-tensors: integers with scales that transformers and vLLM read, packed into 32-bit words or int8.

"pack-quantized" holds weights of 3, 4 and 8 bits (vLLM runs 4 and 8); "int-quantized" 8-bit weights whose
inputs are rounded to 8 bits too, token by token. An integer layer here is written integer by integer; what it
multiplies its inputs by (AWQ, SmoothQuant) goes into the norm or the linear layer before it.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import UnknownFamily
from lmcompress.formats.dense import dense_copy, read_back, reading_code, undescribed
from lmcompress.models import checkpoints, storage
from lmcompress.models.anatomy import Attention, anatomy
from lmcompress.models.families import is_norm
from lmcompress.models.packed import Int8DynamicLinear, Packed, QuantizedLinear
from lmcompress.models.slicing_check import refuse_difference
from lmcompress.paths import write_json

DYNAMIC = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}  # of inputs


def refusal(model: PreTrainedModel) -> str | None:
    """Return why the format cannot hold `model`, or None."""
    layers = dict(_packed(model))
    if not layers:
        return (
            "compressed-tensors holds integers, and this model has none: quantize it first (rtn, gptq, awq)."
        )
    if tables := [name for name, layer in layers.items() if not isinstance(layer, QuantizedLinear)]:
        return f"{tables[0]} is a table of integers; transformers reads integers in linear layers only."
    if any(layer.nf4 for layer in layers.values()):
        return "compressed-tensors has no NF4: use rtn, gptq or awq with 4 bits."
    for name, layer in layers.items():
        if layer.group_size and layer.width % layer.group_size:
            return f"{name} has {layer.width} inputs, which groups of {layer.group_size} do not divide."
    mixed = len(groups := _groups(layers)) > 1
    if mixed and (not all(symmetric for _, _, symmetric, _ in groups) or "T5" in type(model).__name__):
        return (
            "its layers have several widths, groups or grids, which transformers reads only if all are "
            "symmetric, and not in T5: use one scheme, or symmetric=True."
        )
    if reason := undescribed(model):
        return reason
    dense = dense_copy(model)
    if convs := [name for name in layers if isinstance(dense.get_submodule(name), Conv1D)]:
        return f"{convs[0]} is a Conv1D, which the format does not know: GPT-2 is written as GGUF or ONNX."
    try:
        folded(model)
    except UnknownFamily as error:
        return str(error)
    return None


def write(model: PreTrainedModel, folder: Path, tokenizer) -> tuple[list[str], list[str]]:
    """Write weights, and into the config their scheme; return the file's name and code to read it."""
    model = folded(model)
    layers = dict(_packed(model))
    tensors, _ = storage.tensors_of(model)
    for name, layer in layers.items():
        for leaf in ("packed", "scales", "zeros"):
            tensors.pop(f"{name}.{leaf}", None)
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in _stored(layer).items()}
    groups = _groups(layers)
    others = {n for n, m in dense_copy(model).named_modules() if isinstance(m, nn.Linear)} - layers.keys()
    schemes = {f"group_{i}": _scheme(scheme, groups[scheme]) for i, scheme in enumerate(groups)}
    if len(groups) == 1:  # as other programs write it: all linear layers but these
        schemes["group_0"]["targets"] = ["Linear"]
    formats = {scheme["format"] for scheme in schemes.values()}
    config = QuantizationConfig(
        config_groups=schemes,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=sorted(others),
    )
    fields = checkpoints.read_json(folder / storage.CONFIG)
    fields["quantization_config"] = config.model_dump(mode="json")
    # transformers then makes weights floating-point at loading: its layers of integers expect zero points
    # that are not packed, and T5 asks them for a weight. Yet so it knows one scheme, and rounds no inputs.
    fields["quantization_config"]["dequantize"] = len(groups) == 1 and config.format != "int-quantized"
    write_json(folder / storage.CONFIG, fields)
    save_file(tensors, folder / storage.WEIGHTS, metadata={"format": "pt"})
    return [storage.WEIGHTS], reading_code(model)


def load(folder: Path, *, device, dtype) -> tuple:
    """Return the model as transformers and compressed-tensors read it, and its tokenizer or None."""
    return read_back(folder, device=device, dtype=dtype)


@torch.no_grad()
def folded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose layers multiply no inputs: their channel scales are in the layers before them.

    A scale goes into the norm that alone makes the inputs, into the rows of v for an attention's output, or
    into those of a feed-forward's ungated factor: all exact. Raises `UnknownFamily` where it is not (a norm
    whose output is also the residual stream, a GELU in between), as the blocks' outputs then show.
    """
    scaled = [name for name, layer in _packed(model) if layer.channel_scale is not None]
    if not scaled:
        return model
    original, model = model, copy.deepcopy(model)
    producers = _producers(model)
    for name in scaled:
        layer = model.get_submodule(name)
        if layer.channel_scale is None:
            continue  # went with a layer that reads the same inputs
        producer, index, readers = producers.get(name) or (None, None, [])
        scales = [reader.channel_scale for reader in readers]
        if producer is None or any(s is None or not torch.equal(s, scales[0]) for s in scales):
            raise UnknownFamily(_kept_scale(name))
        if not _scale_outputs(producer, index, layer.channel_scale):
            raise UnknownFamily(_kept_scale(name))
        for reader in readers:
            reader.channel_scale = None
    try:
        refuse_difference(dense_copy(original), dense_copy(model))
    except UnknownFamily as error:
        raise UnknownFamily(_kept_scale(scaled[0])) from error
    return model


def _kept_scale(name: str) -> str:
    return (
        f"channel scales, such as those of {name}, cannot be moved into the layer before it exactly: its "
        "inputs are read by others too, or pass a nonlinearity. compressed-tensors has no place for them, "
        "and scaling the rounded weights instead would round them again: use rtn or gptq, or "
        'format="transformers".'
    )


def _packed(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Packed))


def _stored(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Return the tensors of the format for one layer."""
    if isinstance(layer, Int8DynamicLinear):
        return {"weight": layer.integers, "weight_scale": layer.scales}
    shape = torch.tensor([layer.rows, layer.width])
    packed = pack_to_int32(layer.integers, layer.bits)
    stored = {"weight_packed": packed, "weight_scale": layer.scales, "weight_shape": shape}
    if layer.zeros is not None:
        stored["weight_zero_point"] = pack_to_int32(layer.zeros, layer.bits, packed_dim=0).contiguous()
    return stored


def _groups(layers: dict[str, QuantizedLinear]) -> dict[tuple, list[str]]:
    """Return the layers of each scheme: bits, group size, symmetric or not, inputs rounded or not."""
    groups: dict[tuple, list[str]] = {}
    for name, layer in layers.items():
        scheme = layer.bits, layer.group_size, layer.zeros is None, isinstance(layer, Int8DynamicLinear)
        groups.setdefault(scheme, []).append(name)
    return groups


def _scheme(scheme: tuple, targets: list[str]) -> dict:
    bits, group_size, symmetric, dynamic = scheme
    grid = {"num_bits": bits, "symmetric": symmetric, "strategy": "group" if group_size else "channel"}
    entry = {"targets": targets, "weights": grid | ({"group_size": group_size} if group_size else {})}
    if dynamic:
        return entry | {"input_activations": DYNAMIC, "format": "int-quantized"}
    return entry | {"format": "pack-quantized"}


def _producers(model: PreTrainedModel) -> dict[str, tuple[nn.Module, Tensor | None, list[nn.Module]]]:
    """Return by a linear layer's name what makes its inputs, which outputs of it, and all who read them."""
    made, read = {}, {}  # id of a tensor -> the norm that gave it; -> the layers that took it
    names, alive = {module: name for name, module in model.named_modules()}, []

    def gave(module: nn.Module, _, output) -> None:
        alive.append(output)
        made[id(output)] = module

    def took(module: nn.Module, inputs: tuple) -> None:
        alive.append(inputs[0])
        read.setdefault(id(inputs[0]), []).append(module)

    blocks = anatomy(model).blocks
    linears = {id(layer.module): layer.module for block in blocks for layer in block.linears}.values()
    hooks = [module.register_forward_pre_hook(took) for module in linears]
    hooks += [m.register_forward_hook(gave) for n, m in model.named_modules() if is_norm(n, m)]
    try:
        refuse_difference(model, model)  # runs it on a few tokens
    finally:
        for hook in hooks:
            hook.remove()
    producers = {
        names[reader]: (norm, None, readers)
        for tensor, norm in made.items()
        for readers in [read.get(tensor, [])]
        for reader in readers
    }
    for block in blocks:
        for attention in block.attentions:
            layer, index = _values(attention)
            producers[attention.o.name] = (layer, index, [attention.o.module])
        if block.ffn:
            factor = next(layer for layer in block.ffn.inputs if layer.role == "in")
            producers[block.ffn.output.name] = (factor.module, None, [block.ffn.output.module])
    return producers


def _values(attention: Attention) -> tuple[nn.Module, Tensor]:
    """Return the layer that makes the values, and which of its rows each input of `o` is."""
    heads, width = torch.arange(attention.heads), torch.arange(attention.head_dim)
    if attention.layout == "split":
        heads, layer = heads // (attention.heads // attention.kv_heads), attention.v
        return layer.module, (heads[:, None] * attention.head_dim + width).flatten()
    start = 2 * attention.heads * attention.head_dim
    if attention.layout == "interleaved":
        heads, start = heads * 3, 2 * attention.head_dim
    return attention.qkv.module, (start + heads[:, None] * attention.head_dim + width).flatten()


def _scale_outputs(module: nn.Module, index: Tensor | None, scale: Tensor) -> bool:
    """Multiply outputs of a norm or linear layer by `scale`; return whether that can be done."""
    rows = module.rows if isinstance(module, QuantizedLinear) else len(module.weight)
    index = torch.arange(rows)[-len(scale) :] if index is None else index
    factor = torch.ones(rows, dtype=scale.dtype)
    factor[index] = scale
    if not torch.equal(factor[index], scale):  # heads that share their values ask for different scales
        return False
    holder = "scales" if isinstance(module, QuantizedLinear) else "weight"
    tensors = [getattr(module, holder), getattr(module, "bias", None)]
    for tensor in filter(lambda t: t is not None, tensors):
        tensor.mul_(factor if tensor.dim() == 1 else factor[:, None])
    return True
