"""One harness for every model and technique: quality, latency, memory and compute, with verdicts.

`measure` returns the measured parts of a row; the other names are for notebooks that show one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from lmcompress.measure.calls import Shape, default_shapes, shape_signature
from lmcompress.measure.compute import compute, flops
from lmcompress.measure.kernels import linear_kernels
from lmcompress.measure.latency import latency, verdicts
from lmcompress.measure.memory import memory, peak_memory
from lmcompress.measure.quality import compare, quality, quality_verdict
from lmcompress.models.loading import LoadedModel

if TYPE_CHECKING:
    from lmcompress.tasks import Task

__all__ = [
    "MEASURE_VERSION",
    "Measured",
    "Shape",
    "compare",
    "compute",
    "default_shapes",
    "flops",
    "latency",
    "linear_kernels",
    "measure",
    "memory",
    "peak_memory",
    "quality",
    "shape_signature",
]

MEASURE_VERSION = 1  # part of each row's key: raise it whenever a measured number changes its meaning
PARTS = ("quality", "latency", "memory", "compute")
SIZE_TOLERANCE = 1e-3  # of the file: headers differ by this much, weights by more


@dataclass(frozen=True)
class Measured:
    """The measured parts of a row, null where left out, and the per-example `scores` (columns `(n,)`)."""

    quality: dict | None
    latency: dict | None
    memory: dict | None
    compute: dict | None
    verdict: dict
    scores: dict[str, np.ndarray]

    def row_parts(self) -> dict[str, dict | None]:
        """The fields that go into a row: everything but the scores."""
        return {name: getattr(self, name) for name in (*PARTS, "verdict")}


def measure(
    model: nn.Module,
    dense: LoadedModel,
    task: Task | None,
    *,
    baseline: dict | None = None,
    baseline_scores: dict[str, np.ndarray] | None = None,
    folder: Path | str | None = None,
    parts: Sequence[str] = PARTS,
    timed: dict | None = None,
    weighed: dict | None = None,
    peak: bool = True,
    tokenizer=None,
    shapes: Sequence[Shape] | None = None,
    calls: int = 30,
    seed: int = 0,
    progress: bool = False,
) -> Measured:
    """Measure `model` on `task` and against `dense`.

    Args:
        model: the compressed model, or the dense one if there is no `baseline`.
        dense: the original.
        task: None leaves quality out.
        baseline: the dense model's row; without it this is the dense model's own measurement.
        baseline_scores: the dense model's scores on the same examples; without them there is no difference.
        folder: where `model` is saved: gives file bytes and peak memory.
        parts: which of "quality", "latency", "memory", "compute" to measure.
        timed: a row of the same `shape_signature`: its times, peak and compute are taken over.
        weighed: a row of the same `shape_signature`, the dense model's too: its peak memory is taken over.
        peak: measure the peak memory in a process of its own (some seconds), where no row has it.
        tokenizer: default the dense model's.
        shapes: default `default_shapes(dense.kind)`; memory's peak is taken at the first.
        calls: timed calls per model and shape.
        seed: of the bootstrap, the order of calls, and token ids.
        progress: show a bar while evaluating.
    """
    from lmcompress.tasks import (
        evaluate,  # here, because `peak` measures the memory of what this module imports
    )

    shapes = list(shapes or default_shapes(dense.kind))
    found: dict = dict.fromkeys(PARTS)
    scores: dict[str, np.ndarray] = {}
    known = next((row["memory"] for row in (timed, weighed) if row and row["memory"]), None)
    with ThreadPoolExecutor(1) as beside:
        weighing = None  # its process takes seconds to start, and nothing is timed yet
        if "memory" in parts and known is None and folder is not None and peak:
            where = next(model.parameters()).device.type
            weighing = beside.submit(peak_memory, folder, kind=dense.kind, shape=shapes[0], device=where)
        if "quality" in parts and task is not None:
            evaluation = evaluate(model, tokenizer or dense.tokenizer, task, progress=progress)
            scores = evaluation.columns
            found["quality"] = quality(evaluation, baseline_scores if baseline else None, seed=seed)
        if "memory" in parts:
            found["memory"] = memory(model, folder)
            known = weighing.result() if weighing else known
            found["memory"] |= {name: known[name] for name in ("peak_bytes", "peak_kind")} if known else {}
    if "latency" in parts:
        found["latency"] = _latency(model, dense, baseline, timed, shapes, calls=calls, seed=seed)
    if "compute" in parts:
        found["compute"] = _compute(model, dense.kind, found["latency"], timed, shapes)
    return Measured(**found, verdict=_verdict(found, baseline), scores=scores)


def _latency(
    model: nn.Module,
    dense: LoadedModel,
    baseline: dict | None,
    timed: dict | None,
    shapes: list[Shape],
    *,
    calls: int,
    seed: int,
) -> dict:
    if timed and timed["latency"]:
        return timed["latency"] | {"measured_on": timed["latency"].get("measured_on") or timed["key"]}
    variant = model if baseline else None
    measured = latency(dense.model, variant, kind=dense.kind, shapes=shapes, calls=calls, seed=seed)
    return measured | {"signature": shape_signature(model), "measured_on": None}


def _compute(
    model: nn.Module, kind: str, times: dict | None, timed: dict | None, shapes: list[Shape]
) -> dict:
    if timed and timed["compute"]:
        return timed["compute"]
    shape = limiting_shape(shapes)
    milliseconds = times["shapes"][shape.name]["median_ms"] if times else None
    return compute(model, kind=kind, shape=shape, seconds=milliseconds and milliseconds / 1e3)


def limiting_shape(shapes: Sequence[Shape]) -> Shape:
    """The shape whose limit matters most: one decoded token at a time, or an encoder's largest batch."""
    decoding = [shape for shape in shapes if shape.part == "decode"]
    return min(decoding, key=lambda s: s.batch) if decoding else max(shapes, key=lambda s: s.batch)


def _verdict(found: dict, baseline: dict | None) -> dict:
    said: dict = {"quality": None, "size": None, "latency": None}
    if found["quality"]:
        said["quality"] = quality_verdict(found["quality"], baseline=baseline is None)
    if found["memory"]:
        said["size"] = _size_verdict(found["memory"], baseline)
    if found["latency"]:
        said["latency"] = verdicts(found["latency"])
    return said


def _size_verdict(measured: dict, baseline: dict | None) -> str | None:
    if baseline is None:
        return "baseline"
    ours, theirs = measured["file_bytes"], (baseline["memory"] or {}).get("file_bytes")
    if ours is None or theirs is None:
        return None
    if abs(ours - theirs) <= SIZE_TOLERANCE * theirs:
        return "no change"
    return "smaller" if ours < theirs else "larger"
