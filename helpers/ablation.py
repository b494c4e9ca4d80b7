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
from torch import nn

from helpers.errors import StudyError
from helpers.measure.peak import peak_rss_bytes
from helpers.train import launch
from helpers.train.spec import History, TrainSpec


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
    found = []
    for name, changes in {"baseline": {}, **switches}.items():
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"checkpoint": None, "evaluate": None}
            launch.prepare(model, replace(spec, **changes, **quiet), Path(folder))
            done = subprocess.run([sys.executable, "-m", __name__, folder], capture_output=True, text=True)
            if done.returncode:
                raise StudyError(f"the run {name!r} failed: {done.stderr[-1000:]}")
            history = json.loads((Path(folder) / launch.HISTORY).read_text(encoding="utf-8"))
            found.append((name, History(**history), json.loads(done.stdout.splitlines()[-1])))
    tokens = min(history.steps[-1]["tokens"] for _, history, _ in found)
    return [{"switch": name} | _speed(h) | memory | _loss_at(h, tokens) for name, h, memory in found]


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
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()
    print(json.dumps({"peak_bytes": peak, "peak_kind": "cuda" if cuda else "rss"}))


if __name__ == "__main__":
    main()
