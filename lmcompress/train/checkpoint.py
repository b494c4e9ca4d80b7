"""Checkpoints of a running training: weights and AdamW moments in safetensors, the rest in JSON.

`state.json` is replaced last and names the tensor file it belongs to, so a kill between any two writes leaves
either the old pair or the new one.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lmcompress.errors import BadSetting, CorruptCheckpoint
from lmcompress.paths import atomic_path, write_text
from lmcompress.train import parallel

STATE_FILE = "state.json"
# Where the run is kept, and how often it is looked at, do not decide what comes out.
_NOT_SETTINGS = {"checkpoint", "checkpoint_every", "log_dir", "micro_batches", "replace_other"}
_LATER = {"label_smoothing", "compile"}  # younger than some checkpoints: counts only where it is used
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """What changes while training, and is restored when a run resumes; `history` is a `trainer.History`."""

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: object


def fingerprint(
    parameters: Mapping[str, torch.Tensor], spec: object, masks: Mapping[str, torch.Tensor]
) -> str:
    """Return 16 hex digits over everything the outcome depends on: settings, data, first weights, masks."""
    assert is_dataclass(spec)
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
    _add_tensors(digest, parameters)
    _add_tensors(digest, masks)
    return digest.hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return 16 hex digits over the names, shapes, dtypes and values of `tensors`."""
    digest = hashlib.sha256()
    _add_tensors(digest, tensors)
    return digest.hexdigest()[:16]


def _add_tensors(digest, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(parallel.whole(tensor.detach()).cpu().reshape(-1).view(torch.uint8).numpy().data)


def save(folder: Path, settings: str, state: State) -> None:
    """Write one checkpoint; the one before it is removed only when the new one is whole.

    Of several processes all have to call, and the first one writes.

    Raises:
        DiskFull: no space left; the checkpoint before is intact.
    """
    step = len(state.history.steps)
    tensors = {f"weight.{name}": parallel.whole(p.detach()) for name, p in state.parameters.items()}
    for name, parameter in state.parameters.items():
        moments = state.optimizer.state[parameter].items()
        tensors |= {f"{key}.{name}": parallel.whole(value) for key, value in moments}
    rngs = parallel.gathered(_rng_states(state.parameters))
    record = {
        "settings": settings,
        "step": step,
        "tensors": f"step-{step:08d}.safetensors",
        "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"},
        "rng": rngs[0],
        "other_rngs": rngs[1:],
        "history": asdict(state.history),
    }
    if parallel.rank():
        return
    with atomic_path(folder / record["tensors"]) as temporary:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        except SafetensorError as error:  # its own class: a full disk would not be recognised as one
            code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
            raise OSError(code, str(error)) from error
    write_text(folder / STATE_FILE, json.dumps(record))
    for file in folder.glob("step-*.safetensors"):
        if file.name != record["tensors"]:
            file.unlink()


@torch.no_grad()
def restore(folder: Path, settings: str, state: State, *, replace_other: bool = False) -> None:
    """Put weights, moments, schedule, random state and history back as they were; nothing there: do nothing.

    Args:
        replace_other: remove another run's checkpoint and begin.

    Raises:
        BadSetting: the folder holds another run.
        CorruptCheckpoint: the folder's files do not belong together.
    """
    for leftover in folder.glob(".*.tmp"):  # of a run killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    if not (folder / STATE_FILE).exists():
        return
    record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if record["settings"] != settings and replace_other:
        shutil.rmtree(folder)
        return
    if record["settings"] != settings:
        raise BadSetting(
            f"{folder} holds a run of other settings, data or first weights (hash {record['settings']}, "
            f"at step {record['step']}; this run is {settings}). Name another folder, or delete that one."
        )
    try:
        tensors = load_file(folder / record["tensors"])
        for name, parameter in state.parameters.items():
            parameter.copy_(parallel.like(tensors[f"weight.{name}"], parameter))
            if f"step.{name}" in tensors:  # a parameter that never had a gradient has no moments
                moments = {k: parallel.like(tensors[f"{k}.{name}"], parameter) for k in _MOMENTS}
                step = tensors[f"step.{name}"].to(parameter.device)
                state.optimizer.state[parameter] = {"step": step} | moments
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CorruptCheckpoint(f"{folder} cannot be read ({error}). Delete it and train again.") from error
    state.schedule.load_state_dict(
        record["schedule"] | {"lr_lambdas": [None] * len(state.optimizer.param_groups)}
    )
    for group, rate in zip(state.optimizer.param_groups, state.schedule.get_last_lr()):
        group["lr"] = rate
    ranks = [record["rng"], *record["other_rngs"]]
    if parallel.rank() < len(ranks):  # a process that was not there keeps the state of its own seed
        rng = ranks[parallel.rank()]
        torch.set_rng_state(torch.tensor(rng["cpu"], dtype=torch.uint8))
        if "cuda" in rng:
            torch.cuda.set_rng_state(torch.tensor(rng["cuda"], dtype=torch.uint8))
    state.history.steps[:] = record["history"]["steps"]
    state.history.validation[:] = record["history"]["validation"]


def _rng_states(parameters: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    states = {"cpu": torch.get_rng_state().tolist()}
    if next(iter(parameters.values())).is_cuda:
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states
