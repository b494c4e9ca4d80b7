"""Checkpoints of a running training: weights and AdamW moments in safetensors, the rest in JSON.

The tensor file carries the JSON, too, and is replaced as a whole: a kill leaves the old state or the new one,
and a `state.json` that something else cut or emptied loses nothing.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lmcompress.errors import BadSetting, CorruptCheckpoint
from lmcompress.paths import atomic_path, write_text
from lmcompress.train import parallel

STATE_FILE = "state.json"
# Where the run is kept, and how often it is looked at, do not decide what comes out.
_NOT_SETTINGS = {"checkpoint", "checkpoint_every", "log_dir", "micro_batches", "replace_other"}
_LATER = {"label_smoothing", "compile"}  # younger than some checkpoints: counts only where it is used
_MOMENTS = ("exp_avg", "exp_avg_sq")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
logger = logging.getLogger(__name__)


@dataclass
class State:
    """What changes while training, and is restored when a run resumes; `history` is a `spec.History`."""

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: object


def fingerprint(
    parameters: Mapping[str, torch.Tensor], spec: object, masks: Mapping[str, torch.Tensor]
) -> str:
    """Return 16 hex digits over all the outcome depends on: settings, data, first weights, masks."""
    digest = hashlib.sha256()
    for setting in fields(spec):
        value = getattr(spec, setting.name)
        if setting.name in _NOT_SETTINGS or (setting.name in _LATER and not value):
            continue
        digest.update(setting.name.encode())
        if setting.name in ("features", "evaluate"):
            for feature in value or []:
                for name in sorted(feature):
                    digest.update(name.encode() + np.asarray(feature[name], dtype=np.float64).tobytes())
        else:
            digest.update(repr(value).encode())
    tensors_digest(parameters, digest)
    return tensors_digest(masks, digest)


def tensors_digest(tensors: Mapping[str, torch.Tensor], digest: "hashlib._Hash | None" = None) -> str:
    """Return 16 hex digits over names, shapes, dtypes and values of `tensors`, after what `digest` saw."""
    digest = digest or hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(parallel.whole(tensor.detach()).cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save(folder: Path, settings: str, state: State) -> None:
    """Write one checkpoint; the one before it is removed only when the new one is whole.

    Of several processes all have to call, and the first one writes.
    """
    step = len(state.history.steps)
    tensors = {f"weight.{name}": parallel.whole(p.detach()) for name, p in state.parameters.items()}
    for name, parameter in state.parameters.items():
        moments = state.optimizer.state[parameter].items()
        tensors |= {f"{key}.{name}": parallel.whole(moment) for key, moment in moments}
    rng = {"cpu": torch.get_rng_state().tolist()}
    if next(iter(state.parameters.values())).is_cuda:
        rng["cuda"] = torch.cuda.get_rng_state().tolist()
    rngs = parallel.gathered(rng)
    if parallel.rank():
        return
    record = {
        "settings": settings,
        "step": step,
        "tensors": f"step-{step:08d}.safetensors",
        "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"},
        "rng": rngs[0],
        "other_rngs": rngs[1:],
        "history": asdict(state.history),
    }
    text = json.dumps(record)
    with atomic_path(folder / record["tensors"]) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={STATE_FILE: text})
    write_text(folder / STATE_FILE, text)
    _remove(folder, but=record["tensors"])


@torch.no_grad()
def restore(folder: Path, settings: str, state: State, *, replace_other: bool = False) -> None:
    """Put weights, moments, schedule, random state and history back as they were; nothing there: do nothing.

    Raises:
        BadSetting: the folder holds another run; `replace_other` removes it, or what cannot be read, instead.
        CorruptCheckpoint: the folder's files cannot be read, or do not belong together.
    """
    begun = False
    try:
        record = _record(folder)
        if record is None:
            return
        if record["settings"] != settings:
            raise BadSetting(
                f"{folder} holds a run of other settings, data or first weights (hash {record['settings']}, "
                f"step {record.get('step')}; this run is {settings}). Name another folder, or delete it."
            )
        tensors, begun = load_file(folder / record["tensors"]), True
        _put_back(record, tensors, state)
    except (*_UNREADABLE, BadSetting) as error:
        if replace_other and not begun:
            logger.warning("the run is begun anew: %s", error)
            _remove(folder, STATE_FILE)
        elif isinstance(error, BadSetting):
            raise
        else:
            raise CorruptCheckpoint(
                f"{folder} cannot be read: its state.json or tensor file is missing, empty, cut or changed "
                f"({type(error).__name__}: {error}). Delete {folder} and train again."
            ) from error


def _record(folder: Path) -> dict | None:
    """Return what `save` wrote as `state.json`, read from the last tensor file where that is torn."""
    file, tensor_files = folder / STATE_FILE, sorted(folder.glob("step-*.safetensors"))
    if not file.exists() and not tensor_files:
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {"settings": record["settings"]} | record
    except _UNREADABLE:
        if not tensor_files:
            raise
    with safe_open(tensor_files[-1], "pt") as tensors:
        return json.loads((tensors.metadata() or {})[STATE_FILE])


def _put_back(record: dict, tensors: Mapping[str, torch.Tensor], state: State) -> None:
    for name, parameter in state.parameters.items():
        parameter.copy_(parallel.like(tensors[f"weight.{name}"], parameter))
        if f"step.{name}" in tensors:  # a parameter that never had a gradient has no moments
            moments = {k: parallel.like(tensors[f"{k}.{name}"], parameter) for k in _MOMENTS}
            step = tensors[f"step.{name}"].to(parameter.device)
            state.optimizer.state[parameter] = {"step": step} | moments
    groups = state.optimizer.param_groups
    state.schedule.load_state_dict(record["schedule"] | {"lr_lambdas": [None] * len(groups)})
    for group, rate in zip(groups, state.schedule.get_last_lr()):
        group["lr"] = rate
    ranks = [record["rng"], *record["other_rngs"]]
    if parallel.rank() < len(ranks):  # a process that was not there keeps the state of its own seed
        rng = ranks[parallel.rank()]
        torch.set_rng_state(torch.tensor(rng["cpu"], dtype=torch.uint8))
        if "cuda" in rng:
            torch.cuda.set_rng_state(torch.tensor(rng["cuda"], dtype=torch.uint8))
    state.history.steps[:] = record["history"]["steps"]
    state.history.validation[:] = record["history"]["validation"]


def _remove(folder: Path, *others: str, but: str = "") -> None:
    """Remove the tensor files of checkpoints, and `others`; whatever else lies in the folder stays."""
    for file in [*folder.glob("step-*.safetensors"), *(folder / name for name in others)]:
        if file.name != but:
            file.unlink(missing_ok=True)
