"""What a technique may use beside the model: text to look at, a training run, the tokenizer, a seed.

A technique declares at its `@technique` line which of these it `needs`; whoever calls it fills in those, and
nothing is made (no text is read, no batch is padded) for a technique that does without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lmcompress.compress.calibration import Batch
    from lmcompress.compress.pipeline import StepCache
    from lmcompress.train.spec import TrainSpec

NEEDS = ("calibration", "train", "tokenizer", "seed", "step_context")


@dataclass(frozen=True)
class Context:
    """What a technique is given beside the model and its settings; a field it does not need stays None.

    Attributes:
        calibration: padded batches of text, with `labels` where model and task have a loss.
        train: the data, steps and learning rate of a technique that trains.
        tokenizer: the model's.
        seed: of whatever a technique draws.
        step_context: of a chain: returns the context of a step, given the step, its position from 0, and the
            tokenizer that an earlier step put in place of the model's (else None).
        step_cache: of a chain: the models that the steps of the last chain left.
    """

    calibration: Sequence[Batch] | None = None
    train: TrainSpec | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    seed: int = 0
    step_context: Callable[[Mapping[str, object], int, PreTrainedTokenizerBase | None], Context] | None = None
    step_cache: StepCache | None = None

    def missing(self, needs: Sequence[str]) -> list[str]:
        """Return those of `needs` that nobody filled in."""
        return [name for name in needs if getattr(self, name) is None]
