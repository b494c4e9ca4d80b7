"""A training as a folder, run in processes of its own: by `launch`, or by hand with

python -m torch.distributed.run --nproc-per-node 2 -m lmcompress.train.launch FOLDER
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from lmcompress.errors import BadSetting, StudyError
from lmcompress.models import storage
from lmcompress.paths import write_text
from lmcompress.train import parallel
from lmcompress.train.lora import Lora
from lmcompress.train.spec import History, TrainSpec
from lmcompress.train.trainer import fit

MODEL, TRAINED, SPEC, HISTORY = "model", "trained", "spec.json", "history.json"
_FOLDERS = ("checkpoint", "log_dir")  # fields of a spec


def prepare(model: nn.Module, spec: TrainSpec, folder: Path) -> None:
    """Write what `run` reads: the model as it is, and the spec with its features as JSON."""
    storage.save(model, folder / MODEL, replace=True)
    fields = asdict(spec) | {"dtype": str(spec.dtype).removeprefix("torch.")}
    fields |= {name: str(fields[name].resolve()) for name in _FOLDERS if fields[name]}
    write_text(folder / SPEC, json.dumps(fields, default=lambda array: array.tolist()))


def run(folder: Path) -> History:
    """Train the folder's model in the processes there are; leave `trained/` and `history.json` in it."""
    device = parallel.start()
    fields = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    fields |= {"dtype": getattr(torch, fields["dtype"]), "betas": tuple(fields["betas"])}
    fields |= {name: Path(fields[name]) for name in _FOLDERS if fields[name]}
    fields["lora"] = Lora(**fields["lora"]) if fields["lora"] else None
    model, _ = storage.load(folder / MODEL, device=device)
    history = fit(model, TrainSpec(**fields))
    keep(model, history, folder, whole=lambda: storage.load(folder / MODEL)[0])
    return history


def keep(
    model: nn.Module, history: History, folder: Path, *, whole: Callable[[], nn.Module], tokenizer=None
) -> None:
    """Write the trained model and its history; all processes call, `whole` makes an unsharded model."""
    if parallel.world() > 1:
        weights = parallel.state_dict(model)
        model = whole()
        model.load_state_dict(weights, strict=False)  # tied ones come once
    if not parallel.rank():
        storage.save(model, folder / TRAINED, tokenizer=tokenizer, replace=True)
        write_text(folder / HISTORY, json.dumps(asdict(history)))


def launch(model: nn.Module, spec: TrainSpec, folder: Path, *, processes: int = 2) -> History:
    """Run `fit` over `processes` of this machine, one per GPU if there are any; `model` gets the weights."""
    prepare(model, spec, folder)
    history, _ = start(folder, spec, processes=processes)
    trained, _ = storage.load(folder / TRAINED)
    model.load_state_dict(trained.state_dict())
    return history


def start(
    folder: Path, spec: TrainSpec, *, processes: int, module: str = "lmcompress.train.launch"
) -> tuple[History, str]:
    """Run a prepared folder by `module` in fresh processes; return its history, and what they printed.

    Raises:
        BadSetting: fewer examples in a step than processes.
        StudyError: a process failed; its last words are in the message.
    """
    if not 1 <= processes * spec.micro_batches <= spec.batch_size:
        raise BadSetting(
            f"{processes} processes of {spec.micro_batches} pieces share {spec.batch_size} examples."
        )
    arguments = [*command(processes), "-m", module, str(folder)]
    process = subprocess.run(arguments, capture_output=True, text=True)
    if process.returncode:
        raise StudyError(f"training in {processes} processes failed: {process.stderr[-2000:]}")
    return History(**json.loads((folder / HISTORY).read_text(encoding="utf-8"))), process.stdout


def command(processes: int) -> list[str]:
    """Return the beginning of a command line that runs a module in so many processes of this machine."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def main() -> None:
    """Run the folder that is the only argument."""
    run(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
