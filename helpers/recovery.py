"""How much training a row was given: the budget of a recovery, or of a technique that trains."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers.tasks import Task
from helpers.train.trainer import TrainSpec

VALIDATIONS = 10  # while training, where a run has any
CHECKPOINT_EVERY = 100  # steps; a shorter run is begun again rather than kept


@dataclass(frozen=True)
class Recovery:
    """Fine-tuning while or after compressing: `steps` of `batch_size` training examples at a peak `learning_rate`.

    With `teacher`, the model recovers by distillation from the dense model (soft labels alone) and not on hard labels.
    With `validation`, the loss on so many training examples that are held out is recorded `VALIDATIONS` times.
    """

    steps: int
    learning_rate: float = 1e-4
    batch_size: int = 16
    teacher: bool = False
    validation: int = 0

    def settings(self) -> dict:
        """What goes into the row's settings, and so into its key: `teacher` and `validation` only where wanted."""
        optional = ("teacher", "validation")
        return {name: value for name, value in asdict(self).items() if value or name not in optional}

    def spec(self, task: Task, tokenizer: Any, *, seed: int, checkpoint: Path) -> TrainSpec:
        """The run on `task`'s training text; what is held out for validation is the same whatever the seed."""
        held_out = None
        if self.validation:
            held_out = task.training_features(tokenizer, limit=self.validation, part="held-out")
        drawn = {"seed": seed, "part": "rest" if self.validation else "all"}
        return TrainSpec(
            features=task.training_features(tokenizer, limit=self.steps * self.batch_size, **drawn),
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=max(1, self.steps // 10),
            seed=seed,
            checkpoint=checkpoint if self.steps > CHECKPOINT_EVERY else None,
            checkpoint_every=CHECKPOINT_EVERY,
            replace_other=True,  # the folder is named by the row's key, and nothing else is kept there
            evaluate=held_out,
            evaluate_every=max(1, self.steps // VALIDATIONS),
        )
