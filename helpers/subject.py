"""A model with a task and its dense baseline: compress, save, reload, measure what was reloaded, record one row.

Every compressed version is compared with the dense model on the same examples; a row that exists is not made again.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helpers import compress, device, measure, models, recipes, storage
from helpers.compress import Report
from helpers.compress.chains import recover
from helpers.compress.pruning import achieved, kept_masks
from helpers.errors import BadSetting, BadWeights, WrongTask
from helpers.layers import prunable
from helpers.provenance import provenance
from helpers.recovery import CHOOSING, Recovery
from helpers.results import chain_steps, row_key
from helpers.tasks import Task
from helpers.tasks.calibration import Calibration, calibration_batches, calibration_source
from helpers.tasks.language_modelling import stream
from helpers.train.trainer import curve, validation_loss

if TYPE_CHECKING:
    from helpers.sweep import Study

DENSE = compress.Technique("dense", 1, lambda model: (model, Report("dense", 1)), "Dense")


@dataclass
class Subject:
    """A dense model, its task, and the recorded row of the dense model (`dense`)."""

    study: Study
    loaded: models.Loaded
    task: Task
    dense: dict | None = None
    trail: list | None = None  # a list: models of the last chain's steps, for the next that begins alike

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
        if chosen.takes("supply"):
            settings["steps"] = recipes.read(settings.get("steps"))
        recorded_settings = self._recorded(chosen, settings, calibration, training, recovery)
        key = self.key(chosen, recorded_settings, seed)
        found = self.study.store.find(key)
        if found and (keep is None or Path(keep).exists()) and (found["latency"] or not timed):
            return self.study.claim(found)
        started, clock = datetime.now(UTC), time.perf_counter()
        budgets = {"training": training, "recovery": recovery}
        given = {"calibration": calibration, "seed": seed, "key": key}
        model, report = self._made(chosen, settings, **budgets, **given)
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
        shutil.rmtree(self._checkpoint(key), ignore_errors=True)
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

    def _made(
        self,
        chosen: compress.Technique,
        settings: dict,
        *,
        training: Recovery | None,
        recovery: Recovery | None,
        key: str,
        **given,
    ) -> tuple[torch.nn.Module, Report]:
        """The compressed model, recovered, and what was done; of several learning rates the best on held-out text.

        `achieved` then holds the "rates" that were tried, as pairs of rate and loss, and the one "rate" that was kept.
        """
        varied = training or recovery
        budgets = varied.each() if varied else [None]
        if len(budgets) == 1:
            return self._once(chosen, settings, training=training, recovery=recovery, key=key, **given)
        best, rates, failure = None, [], None
        for budget in budgets:
            one = {"training": training and budget, "recovery": recovery if training else budget}
            try:
                own = f"{key}/{budget.learning_rate:g}"
                model, report = self._once(chosen, settings, key=own, **one, **given)
                loss = self._held_out_loss(model, budget, report.tokenizer)
            except BadWeights as error:  # this rate was too high
                rates, failure = [*rates, [budget.learning_rate, None]], error
                continue
            rates.append([budget.learning_rate, loss])
            if best is None or loss < best[0]:
                best = loss, budget.learning_rate, model, report
        if best is None:
            raise failure
        _, rate, model, report = best
        return model, replace(report, achieved=report.achieved | {"rates": rates, "rate": rate})

    def _held_out_loss(self, model: torch.nn.Module, budget: Recovery, tokenizer) -> float:
        """The loss by which a learning rate is chosen."""
        held_out = replace(budget, steps=1, validation=CHOOSING)
        spec = held_out.spec(self.task, tokenizer or self.loaded.tokenizer, seed=0, checkpoint=None)
        return validation_loss(model, spec.evaluate, spec=replace(spec, batch_size=32))["loss"]

    def _once(
        self,
        chosen: compress.Technique,
        settings: dict,
        *,
        calibration: Calibration | None,
        training: Recovery | None,
        recovery: Recovery | None,
        seed: int,
        key: str,
    ) -> tuple[torch.nn.Module, Report]:
        handed = self._handed(chosen, calibration, training, seed, key)
        model, report = chosen(self.loaded.model, **settings, **handed)
        tokenizer = report.tokenizer or self.loaded.tokenizer
        _refuse_other_tokens(self.task, self.loaded.tokenizer, tokenizer)
        if recovery:
            curve = self._recover(model, recovery, tokenizer, masked=chosen.masked, seed=seed, key=key)
            if chosen.masked:
                maps = prunable(model, settings.get("policy", "blocks"))
                report = replace(report, achieved=achieved(maps))
            if recovery.validation:
                report = replace(report, achieved=report.achieved | {"recovery_curve": curve})
        return model, report

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
        takes_labels = "labels" in inspect.signature(self.loaded.model.forward).parameters
        tokenizer = tokenizer or self.loaded.tokenizer
        return calibration_batches(
            self.task, tokenizer, **asdict(wanted or Calibration()), labels=takes_labels
        )

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

    def _recorded(
        self,
        chosen: compress.Technique,
        settings: dict,
        calibration: Calibration | None,
        training: Recovery | None,
        recovery: Recovery | None,
    ) -> dict:
        """The settings as they go into the row and its key: with the budgets of what the technique is handed."""
        recorded = dict(settings)
        for name, value in (("calibration", calibration), ("train", training)):
            if value and not chosen.takes(name):
                raise BadSetting(f"{chosen.name} takes no {name}: leave the argument out.")
        if chosen.takes("calibration"):
            recorded["calibration"] = (calibration or Calibration()).settings()
        if chosen.takes("train"):
            if training is None:
                raise BadSetting(
                    f"{chosen.name} trains: give it a budget, such as training=Recovery(steps=100)."
                )
            if training.teacher:
                raise BadSetting("only recovery=Recovery(...) takes a teacher; training has none.")
            recorded["training"] = training.settings()
        if recovery and chosen.takes("supply"):
            raise BadSetting("a chain's recovery is one of its steps: {recovery: {steps: 60}}.")
        if recovery:
            recorded["recovery"] = recovery.settings()
        return recorded

    def _handed(
        self,
        chosen: compress.Technique,
        calibration: Calibration | None,
        training: Recovery | None,
        seed: int,
        key: str,
        tokenizer=None,
    ) -> dict:
        """What a technique asks for by name, beside its settings; `tokenizer`: if an earlier step changed it."""
        tokenizer = tokenizer or self.loaded.tokenizer
        make = {
            "calibration": lambda: self.calibration(calibration, tokenizer),
            "train": lambda: training.spec(
                self.task, tokenizer, seed=seed, checkpoint=self._checkpoint(key) / "training"
            ),
            "tokenizer": lambda: tokenizer,
            "seed": lambda: seed,
            "supply": lambda: partial(self._supply, seed=seed, key=key),
            "trail": lambda: self.trail,
        }
        return {name: function() for name, function in make.items() if chosen.takes(name)}

    def _supply(self, chosen, step: dict, place: int, tokenizer, *, seed: int, key: str) -> dict:
        """What a step of a chain asks for by name: `_handed`, or the `train` of a recovery (`chosen` is None)."""
        if chosen is None:
            checkpoint = self._checkpoint(key) / f"recovery-{place}"
            spec = Recovery(**step["recovery"]).spec(
                self.task, tokenizer or self.loaded.tokenizer, seed=seed, checkpoint=checkpoint
            )
            return {"train": spec}
        text, training = (
            kind(**step[name]) if name in step else None
            for name, kind in (("calibration", Calibration), ("training", Recovery))
        )
        return self._handed(chosen, text, training, seed, f"{key}/{place}", tokenizer)

    def _checkpoint(self, key: str) -> Path:
        return self.study.folder / "checkpoints" / key

    def _recover(self, model, recovery: Recovery, tokenizer, *, masked: bool, seed: int, key: str) -> dict:
        checkpoint = self._checkpoint(key) / "recovery"
        spec = recovery.spec(self.task, tokenizer, seed=seed, checkpoint=checkpoint)
        masks = kept_masks(model) if masked else None
        teacher = self.loaded.model if recovery.teacher else None
        return curve(recover(model, spec, teacher=teacher, masks=masks))

    def _measured(self, model: torch.nn.Module, folder: Path, *, tokenizer, timed: bool) -> measure.Measured:
        signature = measure.shape_signature(model)
        alike = [row for row in self.study.store.rows() if _alike(row, signature, self.loaded.hash)]
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
            calls=self.study.calls,
        )


def _looked_at_text(settings: dict) -> bool:
    return any("calibration" in part for part in (settings, *chain_steps(settings)))


def _alike(row: dict, signature: str, model_hash: str) -> bool:
    """Whether `row` holds a time measured itself on the same shapes and formats of the same model."""
    latency = row["latency"]
    return (
        bool(latency)
        and latency.get("signature") == signature
        and latency.get("measured_on") is None
        and latency["threads"] == torch.get_num_threads()
        and row["provenance"]["model_hash"] == model_hash
        and row["provenance"]["machine"].get("instructions") == device.machine()["instructions"]
        and row["provenance"]["measure_version"] == measure.MEASURE_VERSION
    )


def _refuse_other_tokens(task: Task, before, after) -> None:
    """Raise `WrongTask` if `after` splits the scored text into other tokens: its perplexity is of other events."""
    if task.metric != "perplexity" or after is before:
        return
    was, now = (one.convert_ids_to_tokens(stream(one, task.examples)[0].tolist()) for one in (before, after))
    if was != now:
        raise WrongTask(
            f"{task.name} is scored by perplexity per token, and the new tokenizer splits its text into {len(now)} "
            f"tokens instead of {len(was)}: the two cannot be compared. Use a task whose metric does not count "
            "tokens, or calibrate on more text so that every token of this one is kept."
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
