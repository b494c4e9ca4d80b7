"""What a compressed model has that its config does not describe, as JSON: compared, written, applied again.

Modules are compared one by one with a fresh skeleton of the config: plain attributes, shapes, classes that
were replaced, modules that are absent or shared.
"""

import math
from collections.abc import Iterator
from importlib import import_module
from numbers import Number
from operator import attrgetter

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lmcompress.errors import BadSetting, CorruptCheckpoint

_REGISTRY: dict[str, type[nn.Module]] = {}
_ARGUMENTS = {  # of torch's own layers, which need no registering
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
}
_MOVED = {  # module when earlier models were saved -> module today: their files stay readable
    "helpers.compress.expert_layers": "lmcompress.compress.expert_layers",
    "helpers.compress.graphs": "lmcompress.formats.graphs",
    "helpers.compress.low_rank_layers": "lmcompress.compress.low_rank_layers",
    "helpers.compress.packed_layers": "lmcompress.models.packed",
    "helpers.compress.resizing": "lmcompress.models.surgery",
    "helpers.headwise": "lmcompress.models.headwise",
    "helpers.train.recipes": "lmcompress.experiments.ablation",
    "lmcompress.compress.export.graphs": "lmcompress.formats.graphs",
    "lmcompress.models.resizing": "lmcompress.models.surgery",
    "lmcompress.train.presets": "lmcompress.experiments.ablation",
}
_PASSING = {"training", "gradient_checkpointing", "name_or_path"}  # state of the process, not of the model
_KINDS = ("replaced", "absent", "shared", "attributes", "shapes")
_ABSENT = object()


def register_module(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: let `cls` stand in for a layer in saved models.

    `spec() -> dict` (JSON) and `classmethod from_spec(spec) -> module` give a module whose parameters and
    persistent buffers have the names and shapes of the saved one's.
    """
    if not callable(getattr(cls, "spec", None)) or not callable(getattr(cls, "from_spec", None)):
        raise BadSetting(f"{cls.__qualname__} needs spec() and classmethod from_spec(spec) to be storable")
    _REGISTRY[key(cls)] = cls
    return cls


def key(cls: type) -> str:
    """Return the name a class is stored under: "module:qualified name"."""
    return f"{cls.__module__}:{cls.__qualname__}"


def attention_of(model: PreTrainedModel) -> str | None:
    """Return the attention implementation: kept in memory only, yet the last digits depend on it."""
    return getattr(model.config, "_attn_implementation", None)


def skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig, attention: str | None) -> PreTrainedModel:
    """Return the model that `config` describes: parameters on "meta", buffers real.

    Buffers that no file holds (rotary frequencies, position ids) are right only as the constructor computes
    them.
    """
    if attention:
        config._attn_implementation = attention
    with init_empty_weights(include_buffers=False):
        return cls(config)


def model_class(name: str) -> type[PreTrainedModel]:
    """Return the model class stored under `name`, from transformers or this package and nowhere else."""
    cls = _find(name, ("transformers", "lmcompress"))
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise CorruptCheckpoint(
            f"no model class {name!r} in the installed transformers or in lmcompress: it was saved with "
            "another version, or the file was edited"
        )
    return cls


def differences(model: nn.Module, other: nn.Module) -> dict[str, dict]:
    """Return what `model` has that the skeleton `other` has not, as JSON without empty kinds.

    "replaced": {module: {"class", "spec"}}; "absent": {module: "none" | "deleted"}; "shared": {module: the
    module it is}; "attributes": {module: {name: value}}; "shapes": {tensor: shape, or null where only the
    skeleton has a tensor}. Raises `BadSetting` for a layer whose class cannot be rebuilt, and says how it can
    be made so.
    """
    structure: dict[str, dict] = {kind: {} for kind in _KINDS}
    first_name: dict[int, str] = {}
    skeleton_modules = dict(other.named_modules(remove_duplicate=False))

    def compare(name: str, module: nn.Module, twin: nn.Module | None) -> None:
        source = first_name.setdefault(id(module), name)
        if source != name:
            if twin is None or twin is not skeleton_modules.get(source):
                structure["shared"][name] = source
            return
        if type(module) is not type(twin):
            structure["replaced"][name] = {"class": key(type(module)), "spec": _spec(module, name)}
            twin = _rebuild(structure["replaced"][name])
        fields = plain_values(module).items()
        if changed := {field: v for field, v in fields if not _same(v, getattr(twin, field, _ABSENT))}:
            structure["attributes"][name] = changed
        structure["shapes"].update(_changed_shapes(name, module, twin))
        for child in dict.fromkeys((*module._modules, *twin._modules)):
            mine, its = module._modules.get(child, _ABSENT), twin._modules.get(child)
            if mine is None or mine is _ABSENT:
                if its is not None:
                    structure["absent"][join(name, child)] = "none" if mine is None else "deleted"
            else:
                compare(join(name, child), mine, its)

    compare("", model, other)
    return {kind: entries for kind, entries in structure.items() if entries}


def apply(model: nn.Module, structure: dict[str, dict]) -> None:
    """Change the skeleton `model` in place to the `structure` that `differences` returned."""
    for name, absence in structure.get("absent", {}).items():
        parent, leaf = split(model, name)
        if absence == "none":
            setattr(parent, leaf, None)
        else:
            del parent._modules[leaf]
    for name, entry in structure.get("replaced", {}).items():
        parent, leaf = split(model, name)
        parent.add_module(leaf, _rebuild(entry))
    for name, source in structure.get("shared", {}).items():
        parent, leaf = split(model, name)
        parent.add_module(leaf, model.get_submodule(source))
    for name, values in structure.get("attributes", {}).items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            was_tuple = isinstance(getattr(module, attribute, None), tuple)
            setattr(module, attribute, tuple(value) if was_tuple else value)
    for name, shape in structure.get("shapes", {}).items():
        parent, leaf = split(model, name)
        store = parent._buffers if leaf in parent._buffers else parent._parameters
        empty = None if shape is None else torch.empty(shape, device="meta")
        store[leaf] = empty if empty is None or store is parent._buffers else nn.Parameter(empty)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield parameters and persistent buffers of the module itself, absent ones as None."""
    yield from module._parameters.items()
    for name, buffer in module._buffers.items():
        # Private: torch offers no other way to ask a module which of its buffers its state dict leaves out.
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def plain_values(module: nn.Module) -> dict[str, object]:
    """Return public attributes that are numbers, strings, None, or lists of these: what a forward reads."""
    return {
        name: _plain(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _PASSING and _is_plain(value)
    }


def join(prefix: str, name: str) -> str:
    """Return the dotted name of a child or tensor."""
    return f"{prefix}.{name}" if prefix else name


def split(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns `name`, and the last part of the name."""
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf


def _changed_shapes(name: str, module: nn.Module, twin: nn.Module) -> dict[str, list[int] | None]:
    mine, its = dict(own_tensors(module)), dict(own_tensors(twin))
    if computed := sorted(set(its) - set(mine)):
        raise BadSetting(
            f"{name} computes {', '.join(computed)} instead of holding it (pruning hooks or a "
            "parametrization): make it permanent first, with torch.nn.utils.prune.remove or "
            "parametrize.remove_parametrizations"
        )
    for tensors in (mine, its):
        tensors |= {
            leaf: tensor if tensor is None else list(tensor.shape) for leaf, tensor in tensors.items()
        }
    return {join(name, leaf): size for leaf, size in mine.items() if size != its.get(leaf)}


def _spec(module: nn.Module, name: str) -> dict:
    cls = type(module)
    if key(cls) in _REGISTRY:
        return module.spec()
    if cls in _ARGUMENTS:
        values = {argument: getattr(module, argument) for argument in _ARGUMENTS[cls]}
        return values | ({"bias": module.bias is not None} if "bias" in values else {})
    if cls.__module__.startswith(("torch.nn.", "transformers.activations")) and not module.state_dict():
        return {}  # an activation or an identity; its plain attributes are compared next
    raise BadSetting(
        f"{name} is a {key(cls)}, which the config does not describe and storage cannot rebuild. Registered: "
        f"{', '.join(sorted(_REGISTRY)) or 'none'}. Decorate the class with storage.register_module, or keep "
        "the config in step (num_hidden_layers, say)"
    )


def _rebuild(entry: dict) -> nn.Module:
    name, spec = entry["class"], entry["spec"]
    cls = _find(name, ("lmcompress", "torch", "transformers"))
    with init_empty_weights(include_buffers=False):
        if hasattr(cls, "from_spec") and key(cls) in _REGISTRY:
            return cls.from_spec(spec)
        if isinstance(cls, type) and (cls in _ARGUMENTS or (issubclass(cls, nn.Module) and not spec)):
            return cls(**spec)
    raise CorruptCheckpoint(
        f"layers of class {name!r} are not registered. Registered: {', '.join(sorted(_REGISTRY)) or 'none'}; "
        "import the module that defines it and try again"
    )


def _find(name: str, packages: tuple[str, ...]) -> object | None:
    """Return the object stored under "module:qualname", registered or imported from `packages`; else None."""
    module, _, qualname = str(name).partition(":")
    module = _MOVED.get(module, module)
    if (cls := _REGISTRY.get(f"{module}:{qualname}")) or module.partition(".")[0] not in packages:
        return cls
    try:
        return attrgetter(qualname)(import_module(module))
    except (ImportError, AttributeError):
        return None


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (np.bool_, str, Number)) and not isinstance(value, complex)


def _plain(value: object) -> object:
    """Return `value` as JSON has it: numpy's numbers are Python's, tuples (a LayerNorm's shape) are lists."""
    if isinstance(value, (tuple, list)):
        return list(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _same(value: object, other: object) -> bool:
    other = _plain(other)
    if isinstance(value, float) and isinstance(other, float) and math.isnan(value):
        return math.isnan(other)
    return type(value) is type(other) and value == other


def place_of(tensor: torch.Tensor) -> tuple:
    """Return what two names of one tensor have in common; an empty tensor is nobody's twin."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype
