"""How much training a row was given: the budget of a recovery, or of a technique that trains."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lmcompress.device import choose, fast_dtype
from lmcompress.errors import BadSetting
from lmcompress.tasks import Task
from lmcompress.train.trainer import TrainSpec

VALIDATIONS = 10  # while training, where a run has any
CHECKPOINT_EVERY = 100  # steps; a shorter run is begun again rather than kept
CHOOSING = 256  # held-out training examples by whose loss one of several learning rates is chosen


def product_dtype(asked: str | None) -> str:
    """Return the dtype that products are asked for in, by default the faster of this machine's.

    Like the number of threads it belongs to the machine, so that a row's key is the same on all of them; its
    provenance says what it was.
    """
    return asked or str(fast_dtype(choose().device)).removeprefix("torch.")


@dataclass(frozen=True)
class Recovery:
    """Fine-tuning while or after compressing."""

    steps: int
    # The peak; of several each is tried, and that of the lowest loss on `CHOOSING` held-out examples is taken
    learning_rate: float | Sequence[float] = 1e-4
    batch_size: int = 16
    teacher: bool = False  # distil from the dense model (soft labels alone) instead of hard labels
    validation: int = 0  # held-out training examples whose loss is recorded `VALIDATIONS` times
    apart: bool = False  # leave the held-out examples alone even without `validation`
    dtype: str | None = None  # of the products, weights stay: "float32", "bfloat16", None as `product_dtype`
    trial_steps: int = 0  # of each of several rates, 0: all; a longer run then begins anew with the best

    def settings(self) -> dict:
        """Return what goes into the row's settings and key: of the optional only what is set, or used."""
        rates = self.rates()
        settings = asdict(self) | {"learning_rate": rates[0] if len(rates) == 1 else rates}
        del settings["apart"]
        if len(rates) == 1 or not self.tries_less:
            del settings["trial_steps"]
        usual = {"teacher": False, "validation": 0, "dtype": None}
        return {name: setting for name, setting in settings.items() if setting != usual.get(name, ...)}

    @property
    def tries_less(self) -> bool:
        """Whether rates are tried for a part of the steps only."""
        return 0 < self.trial_steps < self.steps

    def rates(self) -> list[float]:
        """Return the learning rates to try; none at all is a `BadSetting`."""
        single = isinstance(self.learning_rate, str) or not isinstance(self.learning_rate, Sequence)
        rates = [self.learning_rate] if single else list(self.learning_rate)
        if not rates:
            raise BadSetting("learning_rate=[] leaves nothing to try: give a rate, or several.")
        return rates

    def each(self) -> "list[Recovery]":
        """Return one budget per learning rate; of several, all leave the held-out examples alone."""
        apart = self.apart or len(self.rates()) > 1
        return [replace(self, learning_rate=rate, apart=apart) for rate in self.rates()]

    def spec(
        self, task: Task, tokenizer, model: nn.Module | None = None, *, seed: int, checkpoint: Path | None
    ) -> TrainSpec:
        """Return the run of `model` on the training text of `task`, of one rate; any seed holds out alike."""
        if model is not None and "labels" not in inspect.signature(model.forward).parameters:
            raise BadSetting(
                f"{type(model).__name__} has no head, so no loss to train on: take a model with a head for "
                "this task, or a compression that trains nothing."
            )
        if len(self.rates()) > 1:
            raise BadSetting(f"one learning rate is needed here, not {len(self.rates())}: {self.rates()}.")

        def features(limit: int, subset: str, **drawn: int) -> list[dict]:
            return task.training_features(tokenizer, model=model, limit=limit, subset=subset, **drawn)

        subset = "rest" if self.validation or self.apart else "all"
        return TrainSpec(
            features=features(self.steps * self.batch_size, subset, seed=seed),
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.rates()[0],
            warmup_steps=max(1, self.steps // 10),
            seed=seed,
            checkpoint=checkpoint if self.steps > CHECKPOINT_EVERY else None,
            checkpoint_every=CHECKPOINT_EVERY,
            dtype=getattr(torch, product_dtype(self.dtype)),
            replace_other=True,  # the folder is named by the row's key, and nothing else is kept there
            evaluate=features(self.validation, "held-out") if self.validation else None,
            evaluate_every=max(1, self.steps // VALIDATIONS),
        )
