"""Checkpoints of a running training: weights and AdamW moments in safetensors, the rest in JSON.

`state.json` is replaced last and names the tensor file it belongs to, so a kill between any two writes leaves
either the old pair or the new one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from helpers.errors import BadSetting, CorruptCheckpoint
from helpers.paths import atomic_path, write_text

STATE = "state.json"
# Where the run is kept, and how often it is looked at, do not decide what comes out.
_NOT_SETTINGS = {"checkpoint", "checkpoint_every", "micro_batches"}


def fingerprint(
    parameters: Mapping[str, torch.Tensor], spec: object, masks: Mapping[str, torch.Tensor]
) -> str:
    """16 hex digits over everything the outcome depends on: settings, data, first weights, masks."""
    assert is_dataclass(spec)
    digest = hashlib.sha256()
    for setting in fields(spec):
        value = getattr(spec, setting.name)
        if setting.name in _NOT_SETTINGS:
            continue
        digest.update(setting.name.encode())
        if setting.name in ("features", "evaluate"):
            for feature in value or []:
                for name in sorted(feature):
                    digest.update(name.encode() + np.asarray(feature[name], dtype=np.float64).tobytes())
        else:
            digest.update(repr(value).encode())
    for name, tensor in [*parameters.items(), *masks.items()]:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save(folder: Path, settings: str, parameters, optimizer, schedule, history) -> None:
    """Write one checkpoint; the one before it is removed only when the new one is whole.

    Raises:
        DiskFull: no space left; the checkpoint before is intact.
    """
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    state = {
        "settings": settings,
        "step": len(history.steps),
        "tensors": f"step-{len(history.steps):08d}.safetensors",
        "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
        "rng": _rng_states(parameters),
        "history": asdict(history),
    }
    with atomic_path(folder / state["tensors"]) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    write_text(folder / STATE, json.dumps(state))
    for file in folder.glob("step-*.safetensors"):
        if file.name != state["tensors"]:
            file.unlink()


def restore(folder: Path, settings: str, parameters, optimizer, schedule, history) -> None:
    """Put weights, moments, schedule, random state and history back as they were; nothing there: do nothing.

    Raises:
        BadSetting: the folder holds another run.
        CorruptCheckpoint: the folder's files do not belong together.
    """
    if not (folder / STATE).exists():
        return
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["settings"] != settings:
        raise BadSetting(
            f"{folder} holds a run of other settings, data or first weights (hash {state['settings']}, at step "
            f"{state['step']}; this run is {settings}). Name another folder, or delete that one."
        )
    try:
        tensors = load_file(folder / state["tensors"])
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            moments = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if moments["exp_avg"] is not None:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) for key, value in moments.items()
                }
    except (OSError, KeyError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{folder} cannot be read ({error}). Delete it and train again.") from error
    schedule.load_state_dict(state["schedule"] | {"lr_lambdas": [None] * len(optimizer.param_groups)})
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr()):
        group["lr"] = rate
    torch.set_rng_state(torch.tensor(state["rng"]["cpu"], dtype=torch.uint8))
    if "cuda" in state["rng"]:
        torch.cuda.set_rng_state(torch.tensor(state["rng"]["cuda"], dtype=torch.uint8))
    history.steps[:], history.validation[:] = state["history"]["steps"], state["history"]["validation"]


def _rng_states(parameters: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    states = {"cpu": torch.get_rng_state().tolist()}
    if next(iter(parameters.values())).is_cuda:
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states
