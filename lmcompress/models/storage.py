"""Saves any compressed model as a Hub-style folder, and reloads it with one call.

The folder holds config, safetensors, tokenizer, a model card, and `compression.json`: what the config does
not say about the structure (see `serialization`). Without such differences plain `from_pretrained` reads it,
too. With them the config carries a `model_type` of this package, so that transformers alone stops with an
error instead of making up weights; `import lmcompress` teaches its Auto classes to load it. A model that
another runtime works for (`formats.graphs`) keeps its weights in that runtime's files instead.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from lmcompress.errors import BadSetting, CorruptCheckpoint, StudyError
from lmcompress.models import assets, checkpoints, loading, serialization
from lmcompress.models.anatomy import count_parameters
from lmcompress.models.assets import few
from lmcompress.models.auto import MODEL_TYPE, auto_class
from lmcompress.models.packed import Unpack, set_unpacking
from lmcompress.models.serialization import register_module
from lmcompress.paths import atomic_path, write_json

__all__ = ["check_target", "load", "register_module", "save", "weights_hash"]

log = logging.getLogger(__name__)

VERSION = 1
TRANSFORMERS = "transformers"  # the format of this module; those of others are in lmcompress.formats
CONFIG, RECORD, WEIGHTS, CARD = "config.json", "compression.json", "model.safetensors", "README.md"
# transformers prints the name of a weight file that is none: what a model class called by name ends in.
REMEDY = "`import lmcompress` first, then load the folder with an Auto class or lmcompress.load_compressed"
_FIELDS = {"class": str, "structure": dict, "ties": dict, "buffers": list, "weights": str}


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer=None,
    report=None,
    base_name: str | None = None,
    replace: bool = False,
) -> Path:
    """Write `model` to `folder`, however its layers were sliced, shared or replaced; wholly or not at all.

    `folder`: new or empty; with `replace` also one that `save` wrote and nobody changed. `report`: what the
    technique says it did, an object with `technique` and `as_dict()`. `base_name`: id of the model it was
    made from. Raises `BadSetting` for no `transformers` model, a layer that cannot be rebuilt, or a folder of
    something else; `DiskFull` or `NotWritable`, and what lay at `folder` before is intact.
    """
    if not isinstance(model, PreTrainedModel):
        raise BadSetting(f"cannot save a {type(model).__name__}: no transformers config to rebuild it from")
    runs_elsewhere = hasattr(model, "write_files")  # in another runtime, from that one's files
    with new_folder(folder, source=model.name_or_path, replace=replace) as temporary:
        write_config(model, temporary)
        attention = serialization.attention_of(model)
        twin = serialization.skeleton(type(model), _config(type(model), temporary), attention)
        rebuilt = {"attn_implementation": attention, "structure": serialization.differences(model, twin)}
        if runs_elsewhere:
            rebuilt["weight_files"], usage = model.write_files(temporary), model.usage()
        else:
            tensors, rebuilt["ties"] = tensors_of(model)
            buffers = _changed_buffers(model, twin)
            rebuilt["buffers"] = sorted(buffers)
            save_file(tensors | buffers, temporary / WEIGHTS, metadata={"format": "pt"})
            plain = not rebuilt["structure"] and _is_described(model, twin)
            usage = _usage(model, plain)
            if not plain:
                _disguise(temporary / CONFIG)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        finish(temporary, model, usage=usage, report=report, base_name=base_name, **rebuilt)
    return Path(folder)


@contextmanager
def new_folder(folder: str | Path, *, source: str | Path, replace: bool) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `folder` at the end, wholly or not at all.

    Raises what `check_target` does, before and after, because saving takes its time.
    """
    with atomic_path(check_target(folder, source=source, replace=replace)) as temporary:
        temporary.mkdir()
        yield temporary
        check_target(folder, source=source, replace=replace)


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write the config, and that of what the model generates, as plain transformers does."""
    config = deepcopy(model.config)
    config.architectures, config.dtype = [getattr(model, "stands_for", type(model).__name__)], model.dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def finish(
    folder: Path, model: nn.Module, *, usage: list[str], report=None, base_name: str | None = None, **fields
) -> None:
    """Write the record and the model card of a folder whose other files are there.

    `usage`: lines of the card that say how the model is loaded; `fields`: further ones of the record, such as
    `weight_files` where the weights are not in the usual one.
    """
    weight_files = fields.get("weight_files", [WEIGHTS])
    record = {
        "version": VERSION,
        "class": serialization.key(type(model)),
        "base_model": base_name,
        "technique": getattr(report, "technique", None),
        "report": report and report.as_dict(),
        **{name: kind() for name, kind in _FIELDS.items() if kind in (dict, list)},
        **fields,
        "weights": weights_hash(folder, weight_files),
        "files": sorted({RECORD, CARD, *(file.name for file in folder.iterdir())}),
    }
    write_json(folder / RECORD, record)
    size_mb = sum((folder / name).stat().st_size for name in weight_files) / 1e6
    lines = ["---", "library_name: transformers", *([f"base_model: {base_name}"] if base_name else []), "---"]
    lines += ["", f"# {base_name or type(model).__name__}, {record['technique'] or 'as it was'}", ""]
    lines += [f"{count_parameters(model):,} parameters in {size_mb:.1f} MB of weights.", ""]
    lines += [f"- {name}: {value}" for name, value in (record["report"] or {}).items()]
    (folder / CARD).write_text("\n".join([*lines, "", *usage, ""]), encoding="utf-8")


def check_target(folder: str | Path, *, source: str | Path = "", replace: bool = False) -> Path:
    """Return where a model may be saved, links followed, if nothing there would be lost; else `BadSetting`.

    `source`: the folder that the model came from, never written to. `replace`: accept a folder that `save`
    wrote and nobody changed.
    """
    elsewhere = "name a folder that is new or empty."
    try:
        target = Path(folder).expanduser().resolve()
        names = sorted(child.name for child in target.iterdir()) if target.exists() else []
    except NotADirectoryError as error:
        raise BadSetting(f"{folder} is a file: {elsewhere}") from error
    except (RuntimeError, OSError, ValueError) as error:  # links in a circle, a name too long
        raise BadSetting(f"{folder} can be no folder ({error}): {elsewhere}") from error
    if not names:
        return target
    if source and Path(source).exists() and target.samefile(source):
        raise BadSetting(f"{folder} is the folder that the model was loaded from: {elsewhere}")
    try:
        record = read_record(target) or {}
    except CorruptCheckpoint:
        record = {}
    if others := [name for name in names if name not in record.get("files", ())]:
        raise BadSetting(f"{folder} holds {few(others)}, which saving would delete: {elsewhere}")
    names = " of ".join(filter(None, (record["technique"], record["base_model"])))
    what = f"a saved model ({names or 'of no name'})"
    if not replace:
        raise BadSetting(f"{folder} holds {what}: {elsewhere} Or ask for it to be replaced (replace=True).")
    if weights_hash(target, record.get("weight_files")) != record["weights"]:
        raise BadSetting(f"{folder} holds {what} whose weights were changed since: {elsewhere}")
    return target


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    unpack: Unpack = "auto",
) -> tuple[nn.Module, object | None]:
    """Return the model in `folder`, in eval mode with the logits that were saved, and its tokenizer or None.

    `dtype`: cast floating-point weights to it. `unpack`: when layers of integers hold floating-point weights
    beside them (`packed.set_unpacking`; the bytes are logged, and `packed.unpacked_bytes` returns them): by
    default from the first call that no kernel of integers is faster for, with True now. A folder that `save`
    did not write is handed to `loading.load`. Raises `CorruptCheckpoint` if record and weights are damaged,
    or do not belong together.
    """
    folder = Path(folder)
    checkpoints.check_files(folder)
    record = read_record(folder)
    if record is None:
        loaded = loading.load(str(folder), device=device, **({"dtype": dtype} if dtype else {}))
        return loaded.model, loaded.tokenizer
    if (written := record.get("format", TRANSFORMERS)) != TRANSFORMERS:
        raise BadSetting(f"{folder} holds a model as {written}: use lmcompress.load_compressed(folder).")
    runs_elsewhere, weight_files = "weight_files" in record, record.get("weight_files", [WEIGHTS])
    if missing := [name for name in weight_files if not (folder / name).is_file()]:
        raise CorruptCheckpoint(
            f"{folder} has a {RECORD} but no {', '.join(missing)}: copy the whole folder again"
        )
    if not runs_elsewhere:
        checkpoints.validate_safetensors(folder / WEIGHTS)
    if (digest := weights_hash(folder, weight_files)) != record["weights"]:
        raise CorruptCheckpoint(
            f"{', '.join(weight_files)} in {folder} (hash {digest}): not the file that {RECORD} beside it "
            f"was written with (hash {record['weights']}): save or copy the folder again"
        )
    tensors = {} if runs_elsewhere else load_file(folder / WEIGHTS)
    try:
        buffers = {name: tensors.pop(name) for name in record["buffers"]}
        # Moved now, because moving the model would untie buffers that layers share.
        tensors = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in tensors.items()}
        cls = serialization.model_class(record["class"])
        model = serialization.skeleton(cls, _config(cls, folder), record.get("attn_implementation"))
        serialization.apply(model, record["structure"])
        if runs_elsewhere:
            model.read_files(folder, weight_files)
        else:
            _assign(model, tensors, buffers, record["ties"])
        model.name_or_path = str(folder)  # which `save` does not write to
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except StudyError:
        raise
    except Exception as error:  # an edited file fails in any way
        raise CorruptCheckpoint(
            f"{RECORD} in {folder} does not fit the config and weights beside it ({error}). It was edited, "
            "or belongs to another model: save the model again."
        ) from error
    tokenizer = loading.tokenizer_of(folder) if (folder / "tokenizer_config.json").is_file() else None
    model = model.to(device).eval()
    if held := set_unpacking(model, unpack):
        log.info("%s: %.1f MB of floating-point weights are held beside the integers", folder, held / 1e6)
    return model, tokenizer


def weights_hash(folder: Path, weight_files: Sequence[str] | None = None) -> str | None:
    """Return the hash of a saved model's weights, of several files over all of them; None if one is absent.

    `weight_files`: as its record names them, by default a single `model.safetensors`.
    """
    names = weight_files or [WEIGHTS]
    if not all((folder / name).is_file() for name in names):
        return None
    return assets.folder_hash(folder, names) if len(names) > 1 else assets.file_hash(folder / names[0])


def is_plain(model: PreTrainedModel) -> bool:
    """Return whether plain `from_pretrained` would give `model` back from its config and state dict.

    Raises `BadSetting` for a layer that cannot be rebuilt.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    twin = serialization.skeleton(type(model), config, serialization.attention_of(model))
    return not serialization.differences(model, twin) and _is_described(model, twin)


def _is_described(model: PreTrainedModel, twin: PreTrainedModel) -> bool:
    """Return whether plain `from_pretrained` gives the values of `model`, whose structure `twin` has.

    That is: it ties the same parameters, there is one dtype, and buffers are at most rounded to it.
    """
    twin.tie_weights()  # undone by making it on "meta"
    fresh = dict(twin.named_buffers())
    return (
        _tied(model) == _tied(twin)
        and len({p.dtype for p in model.parameters() if p.is_floating_point()}) <= 1
        and all(torch.equal(fresh[n].to(b), b) for n, b in _changed_buffers(model, twin).items())
    )


def _tied(model: nn.Module) -> set[frozenset[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _disguise(file: Path) -> None:
    """Make the config in `file` one that transformers alone stops at, whichever class reads it."""
    fields = checkpoints.read_json(file)
    fields["original_model_type"], fields["model_type"] = fields["model_type"], MODEL_TYPE
    fields["architectures"] = [f"Lmcompress{name}" for name in fields["architectures"]]
    write_json(file, fields | {"transformers_weights": REMEDY})


def _config(cls: type[PreTrainedModel], folder: Path) -> PreTrainedConfig:
    """Return the config that `model.config` was when `folder` was saved."""
    fields = checkpoints.read_json(folder / CONFIG)
    if fields.get("model_type") == MODEL_TYPE:
        del fields["transformers_weights"]
        fields["model_type"] = fields.pop("original_model_type")
        fields["architectures"] = [name.removeprefix("Lmcompress") for name in fields["architectures"]]
    # Of a graph's class the config may be any.
    config_class = (
        CONFIG_MAPPING[fields["model_type"]] if cls.config_class is AutoConfig else cls.config_class
    )
    return config_class.from_dict(fields)


def tensors_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    for name, buffer in list(buffers.items()):
        other = fresh.get(name)
        if other is not None and other.dtype == buffer.dtype and torch.equal(other, buffer.cpu()):
            del buffers[name]
    return {name: buffer.clone() for name, buffer in buffers.items()}


def read_record(folder: Path) -> dict | None:
    """Return `compression.json` as `save` wrote it; None if there is none, or a partial checkpoint's."""
    if not (file := folder / RECORD).is_file():
        return None
    record = checkpoints.read_json(file)
    if "base" in record:
        return None
    if record.get("version") != VERSION:
        raise CorruptCheckpoint(
            f"{file} has version {record.get('version')!r}; this package reads version {VERSION} of its own "
            "format. If the folder comes from elsewhere, delete that file to load it as a plain checkpoint."
        )
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(record.get(name), kind)]
    wrong += [name for name in ("files", "weight_files") if not _are_names(record.get(name, []))]
    if not isinstance(record.get("format", TRANSFORMERS), str):
        wrong.append("format")
    if wrong:
        raise CorruptCheckpoint(f"{file} lacks a valid {', '.join(wrong)}: save or copy the folder again")
    return record


def _are_names(names: object) -> bool:
    """Return whether `names` lists files in the folder itself: a path out of it would be read and copied."""
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return is_list and all(Path(name).name == name for name in names)


def _assign(model: nn.Module, tensors: dict, buffers: dict, ties: dict[str, str]) -> None:
    """Make `tensors` the model's, one Parameter object per tie, and check that no name is left over."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = dict(tensors)
    for name in parameters & tensors.keys():
        state[name] = nn.Parameter(tensors[name], requires_grad=tensors[name].is_floating_point())
    state |= {name: state[first] for name, first in ties.items()}
    model.load_state_dict(state, strict=True, assign=True)
    for name, buffer in buffers.items():
        parent, leaf = serialization.split(model, name)
        parent.register_buffer(leaf, buffer, persistent=False)


def _usage(model: PreTrainedModel, plain: bool) -> list[str]:
    """Return the lines of the card that say how the model is loaded."""
    code = ['model, tokenizer = lmcompress.load_compressed("this folder")']
    if auto := auto_class(type(model).__name__):
        code = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("this folder")']
    if not (auto and plain):
        code.insert(0, "import lmcompress  # transformers alone cannot rebuild this structure")
    return ["```python", *code, "```"]
