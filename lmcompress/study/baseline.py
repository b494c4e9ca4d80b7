"""A model with a task and its dense baseline: compress, save, reload, measure what was reloaded, record one
row.

Every compressed version is compared with the dense model on the same examples; a row that exists is not made
again.
"""

from __future__ import annotations

import shutil
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
from lmcompress.measure.calls import Shape, usable_length
from lmcompress.models import checkpoints, loading, storage
from lmcompress.paths import owned_folder
from lmcompress.registry import register_look
from lmcompress.results.labels import with_interval
from lmcompress.results.rows import chain_steps, is_timed
from lmcompress.results.scores import columns_of
from lmcompress.study import kept, recipes
from lmcompress.study.job import CompressionJob, calibration_text
from lmcompress.study.provenance import Inputs, reads_training
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

    def inputs(self, job: CompressionJob) -> Inputs:
        """Return what decides the job's numbers: what is done to what, measured by which version."""
        settings = job.recorded()
        return Inputs.of(
            self.loaded.path,
            self.loaded.hash,
            self.task,
            trains=reads_training(settings),
            technique=job.technique.name,
            technique_version=job.technique.version,
            settings=settings,
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
        keep: Path | str | None = None,
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
            keep: a folder in which to leave the saved model: new, empty, or one that holds this very model.
            timed: measure times, too, if none were measured on a model of the same shape; a row whose times
                are missing, or of other threads, lengths or fewer calls, is then measured again.

        Raises:
            BadSetting: a setting or a budget that the technique does not take, or lacks, or a `keep` that
                holds something else; before anything is done.
        """
        budgets = {"calibration": calibration, "training": training, "recovery": recovery}
        job = self.job(technique, **budgets, seed=seed, **settings)
        inputs = self.inputs(job)
        row = self._recorded(inputs.key, keep, timed)
        if row is None:
            with self.study.measuring(inputs.key):  # another process may have measured it meanwhile
                row = self._recorded(inputs.key, keep, timed) or self._make_row(job, inputs, keep, timed)
        return self.study.claim(row)

    def job(self, technique: str | Technique, *, seed: int | None = None, **settings) -> CompressionJob:
        """Return what makes the compressed model; settings and budgets as `measure` takes them."""
        technique = compress.get(technique) if isinstance(technique, str) else technique
        if "step_context" in technique.needs:
            settings["steps"] = recipes.read(settings.get("steps"))
        budgets = {name: settings.pop(name, None) for name in ("calibration", "training", "recovery")}
        seed = self.study.seed if seed is None else seed
        return CompressionJob(self.loaded, self.task, technique, settings, **budgets, seed=seed)

    def make(self, recipe: recipes.Recipe, folder: Path, *, seed: int | None = None) -> Path:
        """Make a recipe's model and save it in the new `folder`, scoring nothing."""
        job = self.job(**_arguments(recipe), seed=seed)
        checkpoint = self.study.folder / "checkpoints" / self.inputs(job).key
        saved, _ = self._made(replace(job, checkpoint=checkpoint), folder)
        shutil.rmtree(checkpoint, ignore_errors=True)
        return saved

    def _made(self, job: CompressionJob, folder: Path) -> tuple[Path, TechniqueResult]:
        model, result = replace(job, step_cache=self.step_cache).run()
        tokenizer = result.tokenizer or self.loaded.tokenizer
        about = {"tokenizer": tokenizer, "report": result, "base_name": self.name}
        return storage.save(model, folder, **about), result

    def _recorded(self, key: str, keep: Path | str | None, timed: bool) -> dict | None:
        """Return the recorded row if it answers what is asked: model in `keep`, and the times asked for."""
        row = self.study.store.find(key)
        is_kept = keep is None or kept.holds(Path(keep), row, own=self.study.folder)
        if row is None or not is_kept:
            return None
        return row if not timed or self._times_fit(row, self._lengths()) else None

    @property
    def _shapes(self) -> list[Shape]:
        return measure.default_shapes(self.loaded.kind, length=self.study.length, model=self.loaded.model)

    def _lengths(self, *models: nn.Module) -> dict[str, int]:
        """Return per timed shape the length in tokens that the dense model and `models` can take."""
        return {shape.name: usable_length([*models, self.loaded.model], shape) for shape in self._shapes}

    def _times_fit(self, row: dict, lengths: dict[str, int]) -> bool:
        """Return whether a row has times at these lengths, on this device, with these threads and calls."""
        latency = row["latency"]
        return (
            bool(latency)
            and latency["threads"] == torch.get_num_threads()
            and latency["device"] == self.study.device
            and row["provenance"].get("calls", self.study.calls) >= self.study.calls
            and all(lengths.get(name) in (None, t["length"]) for name, t in latency["shapes"].items() if t)
        )

    def _make_row(self, job: CompressionJob, inputs: Inputs, keep: Path | str | None, timed: bool) -> dict:
        """Run the job, measure what was saved and reloaded, record its row, and put the model into `keep`."""
        started, clock = datetime.now(UTC), time.perf_counter()
        key, selection = inputs.key, self.task.selection()
        checkpoint = self.study.folder / "checkpoints" / key
        with owned_folder(self.study.folder / "scratch", "measure-") as holder:
            folder, result = self._made(replace(job, checkpoint=checkpoint), holder / "model")
            reloaded, tokenizer = storage.load(folder, device=self.study.device)
            measured = self._measure(reloaded, folder, tokenizer if result.tokenizer else None, timed)
            del reloaded
            self.study.store.save_scores(key, measured.scores)
            row = self.study.new_row(
                key,
                task=self.task.name,
                model=self.name,
                family=self.loaded.family,
                technique=job.technique.name,
                settings=inputs.settings,
                seed=job.seed,
                achieved=result.as_dict(),
                **measured.row_parts(),
                provenance=inputs.provenance(
                    started=started,
                    wall_s=time.perf_counter() - clock,
                    on=self.study.device,
                    dtype=str(self.loaded.model.dtype).removeprefix("torch."),
                    split=self.task.split,
                    n_examples=len(self.task.examples),
                    **({"selection_split": selection.split} if selection else {}),
                    scores=f"scores/{key}.safetensors",
                    weights=checkpoints.read_json(folder / storage.RECORD)["weights"],
                    **({"calls": self.study.calls} if measured.latency else {}),
                    **self._origins(inputs.settings),
                ),
            )
            self.study.record(row)
            if keep is not None:
                kept.place(folder, Path(keep), own=self.study.folder)
        shutil.rmtree(checkpoint, ignore_errors=True)  # not before the row is on the disk
        self.study.announce(_one_line(row))
        return row

    def _origins(self, settings: dict) -> dict[str, str]:
        """Return where a model given by folder lies (two path parts), and where calibration text is from."""
        path = Path(self.loaded.name).expanduser()
        origins = {"folder": "/".join(path.resolve().parts[-2:])} if path.is_dir() else {}
        if any("calibration" in step for step in (settings, *chain_steps(settings))):
            origins["calibration"] = calibration_source(self.task, self.loaded.model)
        return origins

    def _measure(self, model: nn.Module, folder: Path, tokenizer, timed: bool) -> measure.Measured:
        """Measure `model`; what a recorded row of the same shapes and formats has measured is taken over."""
        signature = measure.shape_signature(model)
        lengths = self._lengths(model)
        alike = [row for row in self.study.store.rows() if self._is_alike(row, signature, lengths)]
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
            shapes=self._shapes,
            calls=self.study.calls,
        )

    def _is_alike(self, row: dict, signature: str, lengths: dict[str, int]) -> bool:
        """Return whether `row` was timed itself, on the same shapes, formats and model, on this machine."""
        provenance = row["provenance"]
        return (
            is_timed(row)
            and row["latency"].get("signature") == signature
            and self._times_fit(row, lengths)
            and provenance["model_hash"] == self.loaded.hash
            and provenance["machine"].get("instructions") == device.machine()["instructions"]
            and provenance["measure_version"] == measure.MEASURE_VERSION
        )

    def measure_recipe(self, recipe: recipes.Recipe, **how) -> dict:
        """Return the row of a recipe (see `recipes`): of its only technique, or of the "chain" of its steps.

        `how`: `seed`, `keep` and `timed` as for `measure`.
        """
        return self.measure(**_arguments(recipe), **how)

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

        Its `achieved` has the rows' "first" and "second" (technique, settings, model), the metric, both
        values and the "difference" with its p; both ran on the same examples.
        """
        named = {"first": first, "second": second}

        def compute() -> dict:
            columns = [columns_of(self.study.store.load_scores(row["key"])) for row in named.values()]
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


def _arguments(recipe: recipes.Recipe) -> dict:
    """Return the arguments with which `measure` makes one row of a recipe."""
    steps = recipes.read(recipe)
    arguments = recipes.as_one(steps)
    return {"technique": "chain", "steps": steps} if arguments is None else {"technique": DENSE} | arguments


def _one_line(row: dict) -> str:
    quality = row["quality"]
    settings = ", ".join(f"{k}={v}" for k, v in row["settings"].items() if not isinstance(v, dict))
    recovered = " + recovery" if "recovery" in row["settings"] else ""
    return (
        f"{row['model']} · {row['technique']}({settings}){recovered}: {quality['metric']} "
        f"{with_interval(quality, quality['metric'])} · {row['provenance']['wall_s']:.0f} s"
    )
