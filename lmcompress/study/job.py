"""Making one compressed version of a subject's model: what a technique is handed, the training after it, its rate."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lmcompress.compress import Technique, TechniqueResult
from lmcompress.compress.pipeline import recover
from lmcompress.compress.pruning import achieved, kept_masks
from lmcompress.errors import BadSetting, BadWeights, WrongTask
from lmcompress.models.anatomy import prunable
from lmcompress.models.loading import LoadedModel
from lmcompress.tasks import Task
from lmcompress.tasks.calibration import Calibration, calibration_batches
from lmcompress.tasks.language_modelling import stream
from lmcompress.train.recovery import CHOOSING, Recovery
from lmcompress.train.trainer import curve, validation_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CompressionJob:
    """What is asked of a technique on one model and task, and how far: `recorded()` names it, `made()` does it.

    `checkpoint` is the folder of this one row's training states.
    """

    loaded: LoadedModel
    task: Task
    technique: Technique
    settings: dict
    calibration: Calibration | None = None
    training: Recovery | None = None
    recovery: Recovery | None = None
    seed: int = 0
    checkpoint: Path | None = None
    trail: list | None = None

    def recorded(self) -> dict:
        """The settings as they go into the row and its key: with the budgets of what the technique is handed.

        Raises:
            BadSetting: a budget the technique does not take, or lacks.
        """
        recorded, asks = dict(self.settings), self.technique.takes
        for name, value in (("calibration", self.calibration), ("train", self.training)):
            if value and not asks(name):
                raise BadSetting(f"{self.technique.name} takes no {name}: leave the argument out.")
        if asks("calibration"):
            recorded["calibration"] = (self.calibration or Calibration()).settings()
        if asks("train"):
            if self.training is None:
                raise BadSetting(
                    f"{self.technique.name} trains: give it a budget, such as training=Recovery(steps=100)."
                )
            if self.training.teacher:
                raise BadSetting("only recovery=Recovery(...) takes a teacher; training has none.")
            recorded["training"] = self.training.settings()
        if self.recovery and asks("supply"):
            raise BadSetting("a chain's recovery is one of its steps: {recovery: {steps: 60}}.")
        if self.recovery:
            recorded["recovery"] = self.recovery.settings()
        return recorded

    def made(self) -> tuple[torch.nn.Module, TechniqueResult]:
        """The compressed model, recovered, and what was done; of several learning rates the best on held-out text.

        `achieved` then holds the "rates" that were tried, as pairs of rate and loss, and the one "rate" that was kept.

        Raises:
            BadWeights: training failed at every rate.
        """
        trained = "training" if self.training else "recovery"
        varied = getattr(self, trained)
        budgets = varied.each() if varied else []
        if len(budgets) < 2:
            return self._once()
        best, rates, failure = None, [], None
        for budget in budgets:
            rate = budget.learning_rate
            try:
                one = replace(self, **{trained: budget}, checkpoint=self.checkpoint / f"{rate:g}")
                model, report = one._once()
                loss = self._held_out_loss(model, budget, report.tokenizer)
            except BadWeights as error:  # this rate was too high
                rates, failure = [*rates, [rate, None]], error
                continue
            rates.append([rate, loss])
            if best is None or loss < best[0]:
                best = loss, rate, model, report
        if best is None:
            raise failure
        _, rate, model, report = best
        return model, replace(report, achieved=report.achieved | {"rates": rates, "rate": rate})

    def _held_out_loss(self, model: torch.nn.Module, budget: Recovery, tokenizer) -> float:
        """The loss by which a learning rate is chosen."""
        held_out = replace(budget, steps=1, validation=CHOOSING)
        spec = held_out.spec(self.task, tokenizer or self.loaded.tokenizer, seed=0, checkpoint=None)
        return validation_loss(model, spec.evaluate, spec=replace(spec, batch_size=32))["loss"]

    def _once(self) -> tuple[torch.nn.Module, TechniqueResult]:
        model, report = self.technique(self.loaded.model, **self.settings, **self._handed())
        tokenizer = report.tokenizer or self.loaded.tokenizer
        _refuse_other_tokens(self.task, self.loaded.tokenizer, tokenizer)
        if self.recovery:
            curve = self._recover(model, tokenizer)
            if self.technique.masked:
                maps = prunable(model, self.settings.get("policy", "blocks"))
                report = replace(report, achieved=achieved(maps))
            if self.recovery.validation:
                report = replace(report, achieved=report.achieved | {"recovery_curve": curve})
        return model, report

    def _recover(self, model: torch.nn.Module, tokenizer) -> dict:
        checkpoint = self.checkpoint / "recovery"
        spec = self.recovery.spec(self.task, tokenizer, seed=self.seed, checkpoint=checkpoint)
        masks = kept_masks(model) if self.technique.masked else None
        teacher = self.loaded.model if self.recovery.teacher else None
        return curve(recover(model, spec, teacher=teacher, masks=masks))

    def _handed(self, tokenizer=None) -> dict:
        """What a technique asks for by name, beside its settings; `tokenizer`: if an earlier step changed it."""
        tokenizer = tokenizer or self.loaded.tokenizer
        make = {
            "calibration": lambda: calibration(self.loaded, self.task, self.calibration, tokenizer),
            "train": lambda: self.training.spec(
                self.task, tokenizer, seed=self.seed, checkpoint=self.checkpoint / "training"
            ),
            "tokenizer": lambda: tokenizer,
            "seed": lambda: self.seed,
            "supply": lambda: partial(_supply, self),
            "trail": lambda: self.trail,
        }
        return {name: function() for name, function in make.items() if self.technique.takes(name)}


def calibration(
    loaded: LoadedModel,
    task: Task,
    wanted: Calibration | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Batches a technique may look at, with labels where this model and task have a loss."""
    takes_labels = "labels" in inspect.signature(loaded.model.forward).parameters
    budget = asdict(wanted or Calibration())
    return calibration_batches(task, tokenizer or loaded.tokenizer, **budget, labels=takes_labels)


def _supply(chain: CompressionJob, technique: Technique | None, step: dict, place: int, tokenizer) -> dict:
    """What a step of a chain asks for by name: as any technique, or the `train` of a recovery (no technique)."""
    if technique is None:
        checkpoint = chain.checkpoint / f"recovery-{place}"
        spec = Recovery(**step["recovery"]).spec(
            chain.task, tokenizer or chain.loaded.tokenizer, seed=chain.seed, checkpoint=checkpoint
        )
        return {"train": spec}
    text, training = (
        kind(**step[name]) if name in step else None
        for name, kind in (("calibration", Calibration), ("training", Recovery))
    )
    one = replace(
        chain,
        technique=technique,
        calibration=text,
        training=training,
        checkpoint=chain.checkpoint / str(place),
    )
    return one._handed(tokenizer)


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
