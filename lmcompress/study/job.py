"""Making one compressed version of a model: what a technique is handed, the training after it, its rate."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lmcompress.compress import Context, Technique, TechniqueResult, get
from lmcompress.compress.masks import achieved, kept_masks
from lmcompress.compress.pipeline import NOT_SETTINGS, StepCache, recover
from lmcompress.errors import BadSetting, BadWeights, WrongTask
from lmcompress.models.anatomy import prunable
from lmcompress.models.loading import LoadedModel
from lmcompress.paths import write_text
from lmcompress.study.recipes import check_budget
from lmcompress.tasks import Task
from lmcompress.tasks.calibration import Calibration, calibration_batches
from lmcompress.tasks.language_modelling import stream
from lmcompress.train.recovery import CHOOSING, Recovery
from lmcompress.train.trainer import curve, validation_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CompressionJob:
    """A technique with settings and budgets on one model and task: `recorded()` names it, `run()` does it.

    `checkpoint` is the folder of this one row's training states.

    Raises:
        BadSetting: a setting or a budget that the technique does not take, or lacks.
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
    step_cache: StepCache | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded, made or trained."""
        name, needs = self.technique.name, self.technique.needs
        self.technique.check(self.settings)
        for budget in filter(None, (self.calibration, self.training, self.recovery)):
            check_budget(budget)
        for need, budget in (("calibration", self.calibration), ("train", self.training)):
            if budget and need not in needs:
                raise BadSetting(f"{name} takes no {need}: leave the argument out.")
        if "train" in needs and self.training is None:
            raise BadSetting(f"{name} trains: give it a budget, such as training=Recovery(steps=100).")
        if self.training and self.training.teacher:
            raise BadSetting("only recovery=Recovery(...) takes a teacher; training has none.")
        if self.recovery and "step_context" in needs:
            raise BadSetting("a chain's recovery is one of its steps: {recovery: {steps: 60}}.")

    def recorded(self) -> dict:
        """Return the settings for the row and its key, with the budgets of what the technique needs."""
        recorded = dict(self.settings)
        if "calibration" in self.technique.needs:
            recorded["calibration"] = (self.calibration or Calibration()).settings()
        if self.training:
            recorded["training"] = self.training.settings()
        if self.recovery:
            recorded["recovery"] = self.recovery.settings()
        return recorded

    def context(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Context:
        """Return what the technique needs; `tokenizer`: if an earlier step replaced the model's."""
        needs, tokenizer = self.technique.needs, tokenizer or self.loaded.tokenizer
        text = spec = None
        if "calibration" in needs:
            text = calibration_text(self.loaded, self.task, self.calibration, tokenizer)
        if "train" in needs:
            folder = self.checkpoint / "training"
            spec = self.training.spec(
                self.task, tokenizer, self.loaded.model, seed=self.seed, checkpoint=folder
            )
        step_context = self._step_context if "step_context" in needs else None
        return Context(text, spec, tokenizer, self.seed, step_context, self.step_cache)

    def run(self) -> tuple[nn.Module, TechniqueResult]:
        """Return the compressed model, recovered, and what was done; of several learning rates the best on
        held-out text.

        Where each is tried for `trial_steps`, the training then begins anew with the best. `achieved`
        then holds the "rates" that were tried, as pairs of rate and loss, and the "rate" that was kept.

        Raises:
            BadWeights: training failed at every rate.
        """
        varied = "training" if self.training else "recovery"
        budget = getattr(self, varied)
        budgets = budget.each() if budget else []
        if len(budgets) < 2:
            return self._run_once()
        best, rates, failure = None, [], None
        for budget in budgets:
            rate, trial = budget.learning_rate, budget
            if budget.tries_less:
                trial = replace(budget, steps=budget.trial_steps)
            job = replace(self, **{varied: trial}, checkpoint=self.checkpoint / f"{rate:g}")
            tried = job.checkpoint / "trial.txt"  # so that a run that was stopped later need not try again
            try:
                if budget.tries_less and (known := _read_loss(tried)) is not None:
                    loss, model, result = known, None, None
                else:
                    model, result = job._run_once()
                    loss = self._held_out_loss(model, budget, result.tokenizer)
                    write_text(tried, repr(loss))
            except BadWeights as error:  # this rate was too high
                loss, failure = None, error
            rates.append([rate, loss])
            if loss is not None and (best is None or loss < best[0]):
                best = loss, budget, model, result
        if best is None:
            raise failure
        _, budget, model, result = best
        rate = budget.learning_rate
        if budget.tries_less:
            model = None  # one model less in memory
            job = replace(self, **{varied: budget}, checkpoint=self.checkpoint / "whole")
            model, result = job._run_once()
        return model, replace(result, achieved=result.achieved | {"rates": rates, "rate": rate})

    def _held_out_loss(self, model: nn.Module, budget: Recovery, tokenizer) -> float:
        """Return the loss by which a learning rate is chosen."""
        held_out = replace(budget, steps=1, validation=CHOOSING)
        tokenizer = tokenizer or self.loaded.tokenizer
        spec = held_out.spec(self.task, tokenizer, model, seed=0, checkpoint=None)
        return validation_loss(model, spec.evaluate, spec=replace(spec, batch_size=32))["loss"]

    def _run_once(self) -> tuple[nn.Module, TechniqueResult]:
        model, result = self.technique(self.loaded.model, self.context(), **self.settings)
        tokenizer = result.tokenizer or self.loaded.tokenizer
        _refuse_other_tokens(self.task, self.loaded.tokenizer, tokenizer)
        if not self.recovery:
            return model, result
        losses = self._recover(model, tokenizer)
        if self.technique.masked:
            layers = prunable(model, self.settings.get("policy", "blocks"))
            result = replace(result, achieved=achieved(layers))
        if self.recovery.validation:
            result = replace(result, achieved=result.achieved | {"recovery_curve": losses})
        return model, result

    def _recover(self, model: nn.Module, tokenizer) -> dict:
        folder = self.checkpoint / "recovery"
        spec = self.recovery.spec(self.task, tokenizer, model, seed=self.seed, checkpoint=folder)
        masks = kept_masks(model) if self.technique.masked else None
        teacher = self.loaded.model if self.recovery.teacher else None
        return curve(recover(model, spec, teacher=teacher, masks=masks))

    def _step_context(
        self, step: Mapping[str, object], position: int, tokenizer: PreTrainedTokenizerBase | None
    ) -> Context:
        """Return the context of a chain's step: that of any technique, or the training run of a recovery."""
        tokenizer = tokenizer or self.loaded.tokenizer
        if "recovery" in step:
            budget, folder = Recovery(**step["recovery"]), self.checkpoint / f"recovery-{position}"
            spec = budget.spec(self.task, tokenizer, self.loaded.model, seed=self.seed, checkpoint=folder)
            return Context(train=spec)
        job = replace(
            self,
            technique=get(step["technique"]),
            settings={name: value for name, value in step.items() if name not in NOT_SETTINGS},
            calibration=Calibration(**step["calibration"]) if "calibration" in step else None,
            training=Recovery(**step["training"]) if "training" in step else None,
            checkpoint=self.checkpoint / str(position),
        )
        return replace(job.context(tokenizer), seed=step.get("seed", self.seed))


def _read_loss(file: Path) -> float | None:
    """Return the loss that was written there, None if nothing that can be read was."""
    try:
        return float(file.read_text())
    except (OSError, ValueError):
        return None


def calibration_text(
    loaded: LoadedModel, task: Task, budget: Calibration | None = None, tokenizer=None
) -> list[dict[str, Tensor]]:
    """Return batches a technique may look at, with labels where this model and task have a loss."""
    takes_labels = "labels" in inspect.signature(loaded.model.forward).parameters
    fit = asdict(budget or Calibration()) | {"labels": takes_labels, "model": loaded.model}
    return calibration_batches(task, tokenizer or loaded.tokenizer, **fit)


def _refuse_other_tokens(task: Task, before, after) -> None:
    """Raise `WrongTask` if `after` splits the scored text otherwise: its perplexity is of other events."""
    if task.metric != "perplexity" or after is before:
        return
    old, new = (t.convert_ids_to_tokens(stream(t, task.examples)[0].tolist()) for t in (before, after))
    if old != new:
        raise WrongTask(
            f"{task.name} is scored by perplexity per token, and the new tokenizer splits its text into "
            f"{len(new)} tokens instead of {len(old)}: the two cannot be compared. Use a task whose metric "
            "does not count tokens, or calibrate on more text so that every token of this one is kept."
        )
