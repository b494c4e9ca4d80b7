"""One harness for every model and technique: quality, latency, memory and compute, with verdicts.

`measure` returns the measured parts of a row; the other names are for notebooks that show one of them.
"""

from __future__ import annotations

import copy
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
from lmcompress.measure.latency import latency, unchanged, verdicts
from lmcompress.measure.memory import memory, peak_memory
from lmcompress.measure.quality import compare, quality, quality_verdict
from lmcompress.models.loading import LoadedModel
from lmcompress.results.scores import columns_of, named

if TYPE_CHECKING:
    from lmcompress.tasks import Task

__all__ = ["Shape", "compare", "default_shapes", "flops", "linear_kernels", "peak_memory", "shape_signature"]

MEASURE_VERSION = 1  # part of each row's key: raise it whenever a measured number changes its meaning
FIELDS = ("quality", "latency", "memory", "compute")  # of a row
PARTS = (*FIELDS, "peak")  # "peak": the peak memory, in a process of its own that takes some seconds
SIZE_TOLERANCE = 1e-3  # of the file: headers differ by this much, weights by more


@dataclass(frozen=True)
class Measured:
    """The measured parts of a row, None where left out, and the per-example `scores` (columns `(n,)`).

    `selection` is the quality on the task's `selection()`, its columns are named "selection.…" in the scores.
    """

    quality: dict | None
    selection: dict | None
    latency: dict | None
    memory: dict | None
    compute: dict | None
    verdict: dict
    scores: dict[str, np.ndarray]

    def row_parts(self) -> dict[str, dict | None]:
        """Return the fields that go into a row: everything but the scores."""
        fields = {name: getattr(self, name) for name in (*FIELDS, "verdict")}
        return fields | ({"selection": self.selection} if self.selection else {})


@dataclass(frozen=True)
class DenseMeasurement:
    """The dense model's row, and its scores on the same examples; without `scores` there is no difference."""

    row: dict
    scores: dict[str, np.ndarray] | None = None


@dataclass(frozen=True)
class Reuse:
    """Rows of the same `shape_signature`, whose numbers are taken over instead of measured again."""

    times_from: dict | None = None  # gives latency, compute and peak memory
    peak_from: dict | None = None  # gives the peak memory alone; may be the dense model's row


def measure(
    model: nn.Module,
    dense: LoadedModel,
    task: Task | None,
    *,
    baseline: DenseMeasurement | None = None,
    reuse: Reuse | None = None,
    folder: Path | str | None = None,
    parts: Sequence[str] = PARTS,
    tokenizer=None,
    shapes: Sequence[Shape] | None = None,
    calls: int = 30,
) -> Measured:
    """Measure `model` on `task` and against `dense`.

    Args:
        model: the compressed model, or the dense one if there is no `baseline`.
        task: None leaves quality out; its `selection()`, if it has one, is scored, too.
        folder: where `model` is saved: gives file bytes and peak memory.
        parts: some of `PARTS`.
        tokenizer: default the dense model's.
        shapes: default `default_shapes(dense.kind, model=dense.model)`; the first is that of the peak memory.
        calls: timed calls per model and shape.
    """
    from lmcompress.tasks import evaluate  # here: "peak" measures the memory of what this module imports

    shapes, reuse = list(shapes or default_shapes(dense.kind, model=dense.model)), reuse or Reuse()
    fields: dict[str, dict | None] = dict.fromkeys((*FIELDS, "selection"))
    scores: dict[str, np.ndarray] = {}
    # The process of the peak takes seconds to start; nothing is timed yet.
    with unchanged(model, dense.model), ThreadPoolExecutor(1) as beside:
        measure_peak = folder is not None and "memory" in parts and "peak" in parts
        peak = beside.submit(_peak, folder if measure_peak else None, model, dense.kind, shapes[0], reuse)
        if "quality" in parts and task is not None:
            dense_scores = baseline.scores if baseline else None
            for part, examples in (("quality", task), ("selection", task.selection())):
                if examples is not None:
                    evaluation = evaluate(model, tokenizer or dense.tokenizer, examples)
                    fields[part] = quality(evaluation, dense_scores and columns_of(dense_scores, part))
                    scores |= named(evaluation.columns, part)
        if "memory" in parts:
            weighed = memory(model, folder) if baseline else _as_given(model, dense, folder)
            fields["memory"] = weighed | peak.result()
    if "latency" in parts:
        fields["latency"] = _latency(model, dense, baseline, reuse, shapes, calls)
    if "compute" in parts:
        fields["compute"] = _compute(model, dense.kind, fields["latency"], reuse, shapes)
    return Measured(**fields, verdict=_verdict(fields, baseline), scores=scores)


def _as_given(model: nn.Module, dense: LoadedModel, folder: Path | str | None) -> dict:
    """Return the dense model's `memory` in its checkpoint's dtype: float32 computing makes it no larger."""
    if dense.file_bytes is None or dense.dtype == next(model.parameters()).dtype:
        return memory(model, folder)
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dense.dtype)
    return memory(model, None) | {"file_bytes": dense.file_bytes}


def _peak(folder: Path | str | None, model: nn.Module, kind: str, shape: Shape, reuse: Reuse) -> dict:
    """Return "peak_bytes" and "peak_kind" of a row to reuse, else measured on `folder`'s model, else {}."""
    rows = [row for row in (reuse.times_from, reuse.peak_from) if row and row["memory"]]
    if not rows and folder is None:
        return {}
    device = next(model.parameters()).device.type
    peak = rows[0]["memory"] if rows else peak_memory(folder, kind=kind, shape=shape, device=device)
    return {name: peak[name] for name in ("peak_bytes", "peak_kind")}


def _latency(
    model: nn.Module,
    dense: LoadedModel,
    baseline: DenseMeasurement | None,
    reuse: Reuse,
    shapes: list[Shape],
    calls: int,
) -> dict:
    source = reuse.times_from
    if source and source["latency"]:
        return source["latency"] | {"measured_on": source["latency"].get("measured_on") or source["key"]}
    times = latency(dense.model, model if baseline else None, kind=dense.kind, shapes=shapes, calls=calls)
    return times | {"signature": shape_signature(model), "measured_on": None}


def _compute(model: nn.Module, kind: str, times: dict | None, reuse: Reuse, shapes: list[Shape]) -> dict:
    if reuse.times_from and reuse.times_from["compute"]:
        return reuse.times_from["compute"]
    shape = limiting_shape(shapes)
    milliseconds = times["shapes"][shape.name]["median_ms"] if times else None
    return compute(model, kind=kind, shape=shape, seconds=milliseconds and milliseconds / 1e3)


def limiting_shape(shapes: Sequence[Shape]) -> Shape:
    """Return the shape whose limit matters most: one decoded token a time, or an encoder's largest batch."""
    decoding = [shape for shape in shapes if shape.part == "decode"]
    return min(decoding, key=lambda s: s.batch) if decoding else max(shapes, key=lambda s: s.batch)


def _verdict(fields: dict, baseline: DenseMeasurement | None) -> dict:
    verdict: dict = {"quality": None, "size": None, "latency": None}
    if fields["quality"]:
        verdict["quality"] = quality_verdict(fields["quality"], baseline=baseline is None)
    if fields["latency"]:
        verdict["latency"] = verdicts(fields["latency"])
    if fields["memory"] and baseline is None:
        verdict["size"] = "baseline"
    elif fields["memory"]:
        size, dense_size = fields["memory"]["file_bytes"], (baseline.row["memory"] or {}).get("file_bytes")
        if size is not None and dense_size is not None:
            verdict["size"] = "smaller" if size < dense_size else "larger"
            if abs(size - dense_size) <= SIZE_TOLERANCE * dense_size:
                verdict["size"] = "no change"
    return verdict
