"""Saves any compressed model as a Hub-style folder, and reloads it with one call.

The folder holds config, safetensors, tokenizer, a model card, and `compression.json`: what the config does
not say about the structure (see `serialization`). Without such differences plain `from_pretrained` reads it
too.
"""

import errno
import json
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lmcompress.errors import BadSetting, CorruptCheckpoint
from lmcompress.models import assets, checkpoints, loading, serialization
from lmcompress.models.serialization import register_module
from lmcompress.paths import atomic_path, write_json

__all__ = ["load", "register_module", "save"]

VERSION = 1
RECORD, WEIGHTS = "compression.json", "model.safetensors"
_FIELDS = {"class": str, "structure": dict, "ties": dict, "buffers": list, "weights": str}


def save(
    model: PreTrainedModel, folder: str | Path, *, tokenizer=None, report=None, base_name: str | None = None
) -> Path:
    """Write `model` to `folder`, however its layers were sliced, shared or replaced.

    Args:
        model: any `transformers` model.
        folder: replaced as a whole if it exists; untouched if saving fails.
        tokenizer: saved beside the model.
        report: what the technique says it did: an object with `technique` and `as_dict()`.
        base_name: id of the model it was made from.

    Raises:
        BadSetting: not a `transformers` model, or a layer of a class that cannot be rebuilt.
        DiskFull: no space left; what lay at `folder` before is intact.
    """
    if not isinstance(model, PreTrainedModel):
        raise BadSetting(
            f"cannot save a {type(model).__name__}: it has no transformers config to rebuild from"
        )
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        _save_configs(model, temporary)
        attention = serialization.attention_of(model)
        twin = serialization.skeleton(type(model), temporary, attention)
        tensors, ties = _tensors(model)
        buffers = _changed_buffers(model, twin)
        record = {
            "version": VERSION,
            "class": serialization.key(type(model)),
            "attn_implementation": attention,
            "base_model": base_name,
            "technique": getattr(report, "technique", None),
            "report": report.as_dict() if report is not None else None,
            "structure": serialization.differences(model, twin),
            "ties": ties,
            "buffers": sorted(buffers),
        }
        _save_tensors(tensors | buffers, temporary / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_json(temporary / RECORD, record | {"weights": assets.file_hash(temporary / WEIGHTS)})
        (temporary / "README.md").write_text(_card(record, tensors), encoding="utf-8")
    return Path(folder)


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[nn.Module, object | None]:
    """Return the model in `folder`, in eval mode, its logits those that were saved; its tokenizer or None.

    A folder that `save` did not write is handed to `loading.load`.

    Args:
        folder: as written by `save`.
        device: where the model shall be.
        dtype: cast floating-point weights to it; default as saved.

    Raises:
        CorruptCheckpoint: `compression.json` or the weights are damaged, or do not belong together.
    """
    folder = Path(folder)
    record = _read_record(folder)
    if record is None:
        loaded = loading.load(str(folder), device=device, **({"dtype": dtype} if dtype else {}))
        return loaded.model, loaded.tokenizer
    tensors = _read_tensors(folder, record["weights"])
    try:
        buffers = {name: tensors.pop(name) for name in record["buffers"]}
        # Moved now, because moving the model would untie buffers that layers share.
        tensors = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in tensors.items()}
        cls = serialization.model_class(record["class"])
        model = serialization.skeleton(cls, folder, record.get("attn_implementation"))
        serialization.apply(model, record["structure"])
        _assign(model, tensors, buffers, record["ties"])
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise CorruptCheckpoint(
            f"{RECORD} in {folder} does not fit the config and weights beside it ({error}). It was edited, "
            "or belongs to another model: save the model again."
        ) from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = loading.tokenizer_of(folder) if (folder / "tokenizer_config.json").is_file() else None
    return model.to(device).eval(), tokenizer


def _tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the state dict, every tensor once and compact, and {further name: first name} of tied ones."""
    tensors, ties, names = {}, {}, {}
    for name, tensor in model.state_dict().items():
        first = names.setdefault(serialization.place_of(tensor), name)
        if first != name:
            ties[name] = first
            continue
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return tensors, ties


def _changed_buffers(model: nn.Module, twin: nn.Module) -> dict[str, torch.Tensor]:
    """Return buffers outside the state dict that the config would not give back (`bfloat16()` casts them)."""
    saved, fresh = model.state_dict(), dict(twin.named_buffers())
    return {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name not in saved
        and not (
            name in fresh and fresh[name].dtype == buffer.dtype and torch.equal(fresh[name], buffer.cpu())
        )
    }


def _save_configs(model: PreTrainedModel, folder: Path) -> None:
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # its own class: a full disk would not be recognised as one
        if "os error 28" not in str(error):
            raise
        raise OSError(errno.ENOSPC, str(error)) from error


def _read_record(folder: Path) -> dict | None:
    """`compression.json` as `save` wrote it, or None if there is none, or a partial checkpoint's."""
    if not (file := folder / RECORD).is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(f"{file} is not JSON ({error}): save or copy the folder again") from error
    if isinstance(record, dict) and "base" in record:
        return None
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION:
        raise CorruptCheckpoint(
            f"{file} has version {version!r}; this package reads version {VERSION} of its own format. "
            "If the folder comes from elsewhere, delete that file to load it as a plain checkpoint."
        )
    if wrong := [name for name, kind in _FIELDS.items() if not isinstance(record.get(name), kind)]:
        raise CorruptCheckpoint(f"{file} lacks a valid {', '.join(wrong)}: save or copy the folder again")
    return record


def _read_tensors(folder: Path, expected: str) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise CorruptCheckpoint(f"{folder} has a {RECORD} but no {WEIGHTS}: copy the whole folder again")
    checkpoints.validate_safetensors(file)
    if (actual := assets.file_hash(file)) != expected:
        raise CorruptCheckpoint(
            f"{file} (hash {actual}) is not the file that {RECORD} beside it was written with (hash "
            f"{expected}): "
            "save or copy the folder again"
        )
    return load_file(file)


def _assign(model: nn.Module, tensors: dict, buffers: dict, ties: dict[str, str]) -> None:
    """Make `tensors` the model's, one Parameter object per tie, and check that no name is left over."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {
        name: nn.Parameter(t, requires_grad=t.is_floating_point()) if name in parameters else t
        for name, t in tensors.items()
    }
    model.load_state_dict(
        state | {name: state[first] for name, first in ties.items()}, strict=True, assign=True
    )
    for name, buffer in buffers.items():
        parent, leaf = serialization.split(model, name)
        parent.register_buffer(leaf, buffer, persistent=False)


def _card(record: dict, tensors: dict[str, torch.Tensor]) -> str:
    parameters = sum(t.numel() for t in tensors.values())
    size_mb = sum(t.nbytes for t in tensors.values()) / 1e6
    base = record["base_model"]
    lines = ["---", "library_name: transformers", *([f"base_model: {base}"] if base else []), "---", ""]
    lines += [f"# {base or record['class'].rpartition(':')[2]}, {record['technique'] or 'as it was'}", ""]
    lines += [f"{parameters:,} values in {size_mb:.1f} MB of weights.", ""]
    lines += [f"- {name}: {value}" for name, value in (record["report"] or {}).items()]
    call = (
        'lmcompress.models.storage.load("this folder")'
        if record["structure"]
        else "from_pretrained, as any model"
    )
    return "\n".join([*lines, "", f"Load with `{call}`.", ""])
