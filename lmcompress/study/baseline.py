"""A model with a task and its dense baseline: compress, save, reload, measure what was reloaded, record one row.

Every compressed version is compared with the dense model on the same examples; a row that exists is not made again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lmcompress import compress, device, measure
from lmcompress.compress import Technique, TechniqueResult
from lmcompress.compress.pipeline import StepCache
from lmcompress.measure.calls import usable_length
from lmcompress.models import loading, storage
from lmcompress.registry import register_look
from lmcompress.results.labels import with_interval
from lmcompress.results.rows import chain_steps
from lmcompress.results.store import row_key
from lmcompress.study import recipes
from lmcompress.study.job import CompressionJob, calibration_text
from lmcompress.study.provenance import provenance
from lmcompress.tasks import Task
from lmcompress.tasks.calibration import Calibration, calibration_source
from lmcompress.train.recovery import Recovery

if TYPE_CHECKING:
    from lmcompress.study.study import Study

register_look(name="dense", title="Dense", colour="#000000", marker="*")
DENSE = Technique("dense", 1, lambda model, context: (model, TechniqueResult("dense", 1)))


@dataclass
class Baseline:
    """A dense model, its task, and the recorded row of the dense model (`dense`).

    Give it a `step_cache` where chains begin alike: their first steps are then run once.
    """

    study: Study
    loaded: loading.LoadedModel
    task: Task
    dense: dict | None = None
    step_cache: StepCache | None = None

    @property
    def name(self) -> str:
        """The model's id; of a model given by folder, the folder's own name, which holds on any machine."""
        folder = Path(self.loaded.name).expanduser()
        return folder.resolve().name if folder.is_dir() else self.loaded.name

    def key(self, job: CompressionJob) -> str:
        """Return the key of the job's row: what is done to what, measured by which version."""
        return row_key(
            task=self.task.name,
            model_hash=self.loaded.hash,
            data_hash=self.task.data_hash,
            technique=job.technique.name,
            technique_version=job.technique.version,
            measure_version=measure.MEASURE_VERSION,
            settings=job.recorded(),
            seed=job.seed,
        )

    def measure(
        self,
        technique: str | Technique,
        *,
        calibration: Calibration | None = None,
        training: Recovery | None = None,
        recovery: Recovery | None = None,
        seed: int | None = None,
        keep: Path | None = None,
        timed: bool = True,
        **settings,
    ) -> dict:
        """Return the row of `technique` at `settings`: from the store, else measured and recorded.

        The compressed model is saved, reloaded, and only what was reloaded is measured.

        Args:
            calibration: the text that a technique which needs it may look at (default `Calibration()`).
            training: the budget of a technique that trains.
            recovery: fine-tuning after it.
            seed: default the study's.
            keep: a folder in which to leave the saved model.
            timed: measure times, too, if none were measured on a model of the same shape; a row recorded without
                is measured again when times are asked for.

        Raises:
            BadSetting: a setting or a budget that the technique does not take, or lacks; before anything is done.
        """
        technique = compress.get(technique) if isinstance(technique, str) else technique
        if "step_context" in technique.needs:
            settings["steps"] = recipes.read(settings.get("steps"))
        seed = self.study.seed if seed is None else seed
        job = CompressionJob(
            self.loaded, self.task, technique, settings, calibration, training, recovery, seed
        )
        row = self.study.store.find(self.key(job))
        if row and (keep is None or Path(keep).exists()) and (row["latency"] or not timed):
            return self.study.claim(row)
        return self._make_row(job, keep, timed)

    def _make_row(self, job: CompressionJob, keep: Path | None, timed: bool) -> dict:
        """Run the job, measure what was saved and reloaded, and record its row."""
        started, clock = datetime.now(UTC), time.perf_counter()
        key = self.key(job)
        checkpoint = self.study.folder / "checkpoints" / key
        model, result = replace(job, checkpoint=checkpoint, step_cache=self.step_cache).run()
        measured = self._measure_saved(model, result, keep, timed)
        shutil.rmtree(checkpoint, ignore_errors=True)
        self.study.store.save_scores(key, measured.scores)
        settings = job.recorded()
        looked_at_text = any("calibration" in step for step in (settings, *chain_steps(settings)))
        source = {"calibration": calibration_source(self.task)} if looked_at_text else {}
        row = self.study.new_row(
            key,
            task=self.task.name,
            model=self.name,
            family=self.loaded.family,
            technique=job.technique.name,
            settings=settings,
            seed=job.seed,
            achieved=result.as_dict(),
            **measured.row_parts(),
            provenance=provenance(
                model_hash=self.loaded.hash,
                data_hash=self.task.data_hash,
                technique_version=job.technique.version,
                started=started,
                wall_s=time.perf_counter() - clock,
                on=self.study.device,
                dtype=str(self.loaded.model.dtype).removeprefix("torch."),
                split=self.task.split,
                n_examples=len(self.task.examples),
                scores=f"scores/{key}.safetensors",
                **source,
            ),
        )
        self.study.announce(_one_line(row))
        return self.study.record(row)

    def _measure_saved(
        self, model: nn.Module, result: TechniqueResult, keep: Path | None, timed: bool
    ) -> measure.Measured:
        """Save `model`, in `keep` if it is to stay, reload it, and measure the reloaded one."""
        scratch = self.study.folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix="measure-", dir=scratch, ignore_cleanup_errors=True
        ) as holder:
            folder = storage.save(
                model,
                keep or Path(holder) / "model",
                tokenizer=result.tokenizer or self.loaded.tokenizer,
                report=result,
                base_name=self.name,
            )
            reloaded, tokenizer = storage.load(folder, device=self.study.device)
            return self._measure(reloaded, folder, tokenizer if result.tokenizer else None, timed)

    def _measure(self, model: nn.Module, folder: Path, tokenizer, timed: bool) -> measure.Measured:
        """Measure `model`; what a recorded row of the same shapes and formats has measured is taken over."""
        signature = measure.shape_signature(model)
        shapes = measure.default_shapes(self.loaded.kind, length=self.study.length, model=self.loaded.model)
        lengths = {shape.name: usable_length([model, self.loaded.model], shape) for shape in shapes}
        alike = [row for row in self.study.store.rows() if _alike(row, signature, self.loaded.hash, lengths)]
        times_from = next((row for row in alike if row["technique"] != "dense"), None)
        parts = set(measure.PARTS)
        if not timed:
            parts -= {"peak"} if times_from else {"peak", "latency", "compute"}
        baseline = None
        if self.dense:
            scores = self.study.store.load_scores(self.dense["key"])
            baseline = measure.DenseMeasurement(self.dense, scores)
        return measure.measure(
            model,
            self.loaded,
            self.task,
            baseline=baseline,
            reuse=measure.Reuse(times_from, peak_from=alike[0] if alike else None),
            folder=folder,
            parts=parts,
            tokenizer=tokenizer,
            shapes=shapes,
            calls=self.study.calls,
        )

    def measure_recipe(self, recipe: recipes.Recipe, **how) -> dict:
        """Return the row of a recipe (see `recipes`): of its only technique, or of the "chain" of its steps.

        `how`: `seed`, `keep` and `timed` as for `measure`.
        """
        steps = recipes.read(recipe)
        arguments = recipes.as_one(steps)
        if arguments is None:
            return self.measure("chain", steps=steps, **how)
        return self.measure(**({"technique": DENSE} | arguments), **how)

    def calibration(self, budget: Calibration | None = None, tokenizer=None) -> list[dict[str, torch.Tensor]]:
        """Batches a technique may look at, with labels where this model and task have a loss."""
        return calibration_text(self.loaded, self.task, budget, tokenizer)

    def record(self, technique: str, version: int, *, settings: dict, compute: Callable[[], dict]) -> dict:
        """An analysis of this model with this task's text (a scan, a heat map): see `Study.record_once`."""
        return self.study.record_once(
            technique,
            version,
            model=self.loaded.name,
            settings=settings,
            compute=lambda: {"family": self.loaded.family, "model": self.name} | compute(),
            task=self.task,
        )

    def compare(self, first: dict, second: dict) -> dict:
        """The paired difference `first` minus `second` of two rows of this subject, as an analysis row.

        Its `achieved` has the rows' "first" and "second" (technique, settings, model), the metric, both values and the
        "difference" with its p; both ran on the same examples.
        """
        named = {"first": first, "second": second}

        def compute() -> dict:
            columns = [self.study.store.load_scores(row["key"]) for row in named.values()]
            return {
                **{
                    which: {name: row[name] for name in ("technique", "settings", "model")}
                    for which, row in named.items()
                },
                "metric": self.task.metric,
                "values": [row["quality"]["value"] for row in named.values()],
                "higher_is_better": self.task.higher_is_better,
                "difference": measure.compare(self.task, *columns),
            }

        settings = {which: row["key"] for which, row in named.items()}
        return self.record("paired-difference", 1, settings=settings, compute=compute)


def _alike(row: dict, signature: str, model_hash: str, lengths: dict[str, int]) -> bool:
    """Whether `row` holds a time measured itself on the same shapes and formats of the same model, at these lengths."""
    latency = row["latency"]
    return (
        bool(latency)
        and all(
            lengths.get(name) in (None, shape["length"]) for name, shape in latency["shapes"].items() if shape
        )
        and latency.get("signature") == signature
        and latency.get("measured_on") is None
        and latency["threads"] == torch.get_num_threads()
        and row["provenance"]["model_hash"] == model_hash
        and row["provenance"]["machine"].get("instructions") == device.machine()["instructions"]
        and row["provenance"]["measure_version"] == measure.MEASURE_VERSION
    )


def _one_line(row: dict) -> str:
    quality = row["quality"]
    settings = ", ".join(f"{k}={v}" for k, v in row["settings"].items() if not isinstance(v, dict))
    recovered = " + recovery" if "recovery" in row["settings"] else ""
    return (
        f"{row['model']} · {row['technique']}({settings}){recovered}: {quality['metric']} "
        f"{with_interval(quality, quality['metric'])} · {row['provenance']['wall_s']:.0f} s"
    )
