"""What each switch of the training recipe buys, one at a time: time, memory, and loss after the same tokens."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lmcompress.errors import StudyError
from lmcompress.measure.peak import peak_rss_bytes
from lmcompress.train import launch, presets
from lmcompress.train.spec import History, TrainSpec


def ablate(model: nn.Module, spec: TrainSpec, switches: Mapping[str, Mapping]) -> list[dict]:
    """Train `model` anew per switch, each in a fresh process, from the same weights on the same batches.

    Args:
        model: stays as it is.
        spec: the baseline, which is the first row, named "baseline".
        switches: name → fields of `TrainSpec` that differ from the baseline.

    Returns:
        Per run: "switch", "tokens_per_s" and "step_ms" (median over the steps after the first tenth, evaluation and
        checkpoints left out), "peak_bytes" and "peak_kind" ("rss" of the process with its libraries, or "cuda"), and
        "loss": the mean training loss over the last tenth of the steps up to "tokens", the fewest that any run saw.

    Raises:
        StudyError: a run failed.
    """
    made = {
        name: _run(model, replace(spec, **changes)) for name, changes in {"baseline": {}, **switches}.items()
    }
    tokens = min(history.steps[-1]["tokens"] for history, _ in made.values())
    return [{"switch": name} | _figures(history, memory, tokens) for name, (history, memory) in made.items()]


def switched(model: nn.Module, spec: TrainSpec, switch: str) -> dict:
    """What `ablate` says of one run: the baseline, or one of the `recipes.SWITCHES`.

    Raises:
        BadSetting: no such switch.
        StudyError: the run failed.
    """
    changed, changes, processes = presets.switched(model, spec, switch)
    history, memory = _run(changed, replace(spec, **changes), processes)
    return _figures(history, memory, history.steps[-1]["tokens"])


def _run(model: nn.Module, spec: TrainSpec, processes: int = 1) -> tuple[History, dict]:
    """Train a copy in a fresh process, or in several that share the parameters: its history, and the most memory of one."""
    with tempfile.TemporaryDirectory() as folder:
        launch.prepare(model, replace(spec, checkpoint=None, evaluate=None), Path(folder))
        command = launch.command(processes) if processes > 1 else [sys.executable]
        done = subprocess.run([*command, "-m", __name__, folder], capture_output=True, text=True)
        if done.returncode:
            raise StudyError(f"the run in {processes} processes failed: {done.stderr[-1000:]}")
        history = json.loads((Path(folder) / launch.HISTORY).read_text(encoding="utf-8"))
    peaks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"peak_bytes"')]
    return History(**history), max(peaks, key=lambda one: one["peak_bytes"])


def _figures(history: History, memory: dict, tokens: int) -> dict:
    return _speed(history) | memory | _loss_at(history, tokens)


def _speed(history: History) -> dict:
    first = len(history.steps) // 10
    seconds, tokens = (
        np.diff([0, *(step[key] for step in history.steps)])[first:] for key in ("seconds", "tokens")
    )
    return {
        "tokens_per_s": float(np.median(tokens / seconds)),
        "step_ms": float(1000 * np.median(seconds)),
    }


def _loss_at(history: History, tokens: int) -> dict:
    seen = [step["loss"] for step in history.steps if step["tokens"] <= tokens]
    return {"loss": float(np.mean(seen[-max(1, len(seen) // 10) :])), "tokens": tokens}


def main() -> None:
    """Run the folder that is named, and print what memory it took at most."""
    launch.run(Path(sys.argv[1]))
    if dist.is_initialized():
        dist.destroy_process_group()
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()
    print(json.dumps({"peak_bytes": peak, "peak_kind": "cuda" if cuda else "rss"}))


if __name__ == "__main__":
    main()
