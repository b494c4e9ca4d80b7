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

from lmcompress import compress, device, measure
from lmcompress.compress import TechniqueResult
from lmcompress.compress.pipeline import StepCache
from lmcompress.measure.calls import usable_length
from lmcompress.models import loading, storage
from lmcompress.registry import register_look
from lmcompress.results.rows import chain_steps
from lmcompress.results.store import row_key
from lmcompress.study import job, recipes
from lmcompress.study.job import CompressionJob
from lmcompress.study.provenance import provenance
from lmcompress.tasks import Task
from lmcompress.tasks.calibration import Calibration, calibration_source
from lmcompress.train.recovery import Recovery

if TYPE_CHECKING:
    from lmcompress.study.study import Study

register_look(name="dense", title="Dense", colour="#000000", marker="*")
DENSE = compress.Technique("dense", 1, lambda model, context: (model, TechniqueResult("dense", 1)))


@dataclass
class Baseline:
    """A dense model, its task, and the recorded row of the dense model (`dense`)."""

    study: Study
    loaded: loading.LoadedModel
    task: Task
    dense: dict | None = None
    step_cache: StepCache | None = (
        None  # give one where chains begin alike: their first steps are then shared
    )

    @property
    def name(self) -> str:
        """The model's id; of a model given by folder, the folder's own name, which holds on any machine."""
        given = Path(self.loaded.name).expanduser()
        return given.resolve().name if given.is_dir() else self.loaded.name

    def key(self, technique: compress.Technique, settings: dict, seed: int) -> str:
        """The row's key: what was done to what, measured by which version."""
        return row_key(
            task=self.task.name,
            model_hash=self.loaded.hash,
            data_hash=self.task.data_hash,
            technique=technique.name,
            technique_version=technique.version,
            measure_version=measure.MEASURE_VERSION,
            settings=settings,
            seed=seed,
        )

    def measure(
        self,
        technique: str | compress.Technique,
        *,
        calibration: Calibration | None = None,
        training: Recovery | None = None,
        recovery: Recovery | None = None,
        seed: int | None = None,
        keep: Path | None = None,
        timed: bool = True,
        **settings,
    ) -> dict:
        """The row of `technique` at `settings`, from the store if it is there, else measured and recorded.

        The compressed model is saved, reloaded, and only what was reloaded is measured.

        Args:
            calibration: the text a technique that asks for `calibration` may look at (default `Calibration()`).
            training: the budget of a technique that trains (asks for `train`).
            recovery: fine-tuning after it.
            keep: a folder in which to leave the saved model.
            timed: measure times, too, if none were measured on a model of the same shape; a row recorded without
                is measured again when times are asked for.
        """
        chosen = compress.get(technique) if isinstance(technique, str) else technique
        seed = self.study.seed if seed is None else seed
        budgets = {"calibration": calibration, "training": training, "recovery": recovery}
        if "step_context" in chosen.needs:
            settings["steps"] = recipes.read(settings.get("steps"))
        asked = CompressionJob(
            self.loaded, self.task, chosen, settings, seed=seed, step_cache=self.step_cache, **budgets
        )
        recorded_settings = asked.recorded()
        key = self.key(chosen, recorded_settings, seed)
        found = self.study.store.find(key)
        if found and (keep is None or Path(keep).exists()) and (found["latency"] or not timed):
            return self.study.claim(found)
        started, clock = datetime.now(UTC), time.perf_counter()
        checkpoint = self.study.folder / "checkpoints" / key
        model, report = replace(asked, checkpoint=checkpoint).run()
        tokenizer = report.tokenizer or self.loaded.tokenizer
        scratch = Path(tempfile.mkdtemp(prefix="measure-", dir=_made(self.study.folder / "scratch")))
        try:
            folder = storage.save(
                model, keep or scratch / "model", tokenizer=tokenizer, report=report, base_name=self.name
            )
            reloaded, own_tokenizer = storage.load(folder, device=self.study.device)
            changed = own_tokenizer if report.tokenizer else None
            measured = self._measured(reloaded, folder, tokenizer=changed, timed=timed)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
        self.study.store.save_scores(key, measured.scores)
        row = {
            "key": key,
            "notebook": self.study.notebook,
            "profile": self.study.profile,
            "task": self.task.name,
            "model": self.name,
            "family": self.loaded.family,
            "technique": chosen.name,
            "settings": recorded_settings,
            "seed": seed,
            "achieved": report.as_dict(),
            **measured.row_parts(),
            "provenance": provenance(
                model_hash=self.loaded.hash,
                data_hash=self.task.data_hash,
                technique_version=chosen.version,
                started=started,
                wall_s=time.perf_counter() - clock,
                on=self.study.device,
                dtype=str(self.loaded.model.dtype).removeprefix("torch."),
                split=self.task.split,
                n_examples=len(self.task.examples),
                scores=f"scores/{key}.safetensors",
                **(
                    {"calibration": calibration_source(self.task)}
                    if _looked_at_text(recorded_settings)
                    else {}
                ),
            ),
        }
        self.study.announce(_one_line(row))
        return self.study._append(row)

    def measure_recipe(self, recipe: recipes.Recipe, **how) -> dict:
        """The row of a recipe (see `recipes`): of its one technique if there is no more to it, else of the "chain".

        `how`: `seed`, `keep` and `timed` as for `measure`.
        """
        steps = recipes.read(recipe)
        one = recipes.as_one(steps)
        if one is None:
            return self.measure("chain", steps=steps, **how)
        return self.measure(one[0] or DENSE, **one[1], **how)

    def calibration(self, wanted: Calibration | None = None, tokenizer=None) -> list[dict[str, torch.Tensor]]:
        """Batches a technique may look at, with labels where this model and task have a loss."""
        return job.calibration_text(self.loaded, self.task, wanted, tokenizer)

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
                    place: {name: row[name] for name in ("technique", "settings", "model")}
                    for place, row in named.items()
                },
                "metric": self.task.metric,
                "values": [row["quality"]["value"] for row in named.values()],
                "higher_is_better": self.task.higher_is_better,
                "difference": measure.compare(self.task, *columns),
            }

        settings = {place: row["key"] for place, row in named.items()}
        return self.record("paired-difference", 1, settings=settings, compute=compute)

    def _measured(self, model: torch.nn.Module, folder: Path, *, tokenizer, timed: bool) -> measure.Measured:
        signature = measure.shape_signature(model)
        shapes = measure.default_shapes(self.loaded.kind, length=self.study.length)
        lengths = {shape.name: usable_length([model, self.loaded.model], shape) for shape in shapes}
        alike = [row for row in self.study.store.rows() if _alike(row, signature, self.loaded.hash, lengths)]
        compared = next((row for row in alike if row["technique"] != "dense"), None)
        baseline = self.dense
        wanted = measure.PARTS if timed or compared else ("quality", "memory")
        return measure.measure(
            model,
            self.loaded,
            self.task,
            baseline=baseline,
            baseline_scores=self.study.store.load_scores(baseline["key"]) if baseline else None,
            folder=folder,
            parts=wanted,
            timed=compared,
            weighed=alike[0] if alike else None,
            peak=timed,
            tokenizer=tokenizer,
            shapes=shapes,
            calls=self.study.calls,
        )


def _looked_at_text(settings: dict) -> bool:
    return any("calibration" in part for part in (settings, *chain_steps(settings)))


def _alike(row: dict, signature: str, model_hash: str, lengths: dict[str, int]) -> bool:
    """Whether `row` holds a time measured itself on the same shapes and formats of the same model, at these lengths."""
    latency = row["latency"]
    return (
        bool(latency)
        and all(lengths.get(name) in (None, one["length"]) for name, one in latency["shapes"].items() if one)
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
        f"{quality['value']:.4g} [{quality['low']:.4g}, {quality['high']:.4g}] · {row['provenance']['wall_s']:.0f} s"
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
