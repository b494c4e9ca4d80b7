"""Multiple choice by likelihood: does a language model find the right answer likelier than the others?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from string import ascii_uppercase
from typing import Any, ClassVar

import numpy as np
from scipy.special import log_softmax

from lmcompress.tasks.base import Columns, Run, Task
from lmcompress.tasks.batching import positions
from lmcompress.tasks.language_modelling import continuations, for_training, summed_nll


@dataclass(eq=False, kw_only=True)
class MultipleChoice(Task):
    """Examples `{"text", "choices", "label"}`; label is the index of the right choice.

    A choice follows the text and a blank. The one of the highest summed log-probability is the answer; for
    `accuracy_per_byte` that of the highest per byte, which does not prefer short ones.
    """

    kind: ClassVar[str] = "multiple-choice"
    needs: ClassVar[str] = "language modelling"
    text_fields: ClassVar[tuple[str, ...]] = ("text", "choices")
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "accuracy_per_byte")
    further: ClassVar[tuple[str, ...]] = (*metrics, "cross_entropy")
    likelihood: ClassVar[str | None] = "cross_entropy"
    unit: ClassVar[str] = "fraction"

    metric: str = "accuracy"
    higher_is_better: bool | None = None

    def identity(self) -> dict:
        """Return the metric, where it is not the usual one."""
        return {} if self.metric == "accuracy" else {"metric": self.metric}

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return `prediction`, `label`, `correct`, `correct_per_byte`, `cross_entropy` of the right choice.

        The last is of the choices' probabilities, normalised to one.
        """
        texts = [example["text"] for example in self.examples for _ in example["choices"]]
        choices = [choice for example in self.examples for choice in example["choices"]]
        make = partial(continuations, run.tokenizer, texts, choices, model=run.model)
        items, sizes, details = self.cached(run.tokenizer, ("choices", positions(run.model)), make)
        scores, start = -summed_nll(run, items), 0
        columns = {name: np.zeros(len(self.examples)) for name in ("prediction", "correct_per_byte")}
        columns["label"] = np.array([example["label"] for example in self.examples], dtype=np.float64)
        columns["cross_entropy"] = np.zeros(len(self.examples))
        for number, example in enumerate(self.examples):
            of_choices = slice(start, start := start + len(example["choices"]))
            likelihoods, label = scores[of_choices], example["label"]
            is_finite = np.isfinite(likelihoods).all()
            columns["prediction"][number] = likelihoods.argmax() if is_finite else -1
            per_byte = likelihoods / sizes[of_choices]
            columns["correct_per_byte"][number] = is_finite and per_byte.argmax() == label
            columns["cross_entropy"][number] = -log_softmax(likelihoods)[label] if is_finite else np.nan
        columns["correct"] = (columns["prediction"] == columns["label"]).astype(np.float64)
        return columns, details

    def check_collapsed(
        self, columns: Columns, value: float, run: Run
    ) -> tuple[float | None, str | None, dict]:
        """Return chance as the floor of an accuracy."""
        chance = float(np.mean([1 / len(example["choices"]) for example in self.examples]))
        floor, collapsed = (chance if self.metric in self.metrics else None), None
        if (columns["prediction"] < 0).any():
            collapsed = "the model's outputs are not finite numbers"
        elif floor is not None and value <= floor:
            collapsed = f"{self.metric} {value:.3f} is not above chance ({chance:.3f})"
        return floor, collapsed, {"floor": "chance"} if floor is not None else {}

    def features(
        self, tokenizer: Any, examples: list[dict], *, length: int | None = None, model=None
    ) -> list[dict]:
        """Return text and right choice as tokens; labels are the choice's (the model shifts them)."""
        answers = [example["choices"][example["label"]] for example in examples]
        texts = [example["text"] for example in examples]
        items, _, _ = continuations(tokenizer, texts, answers, length=length, model=model)
        return for_training(items)


def answer_indices(answers: Sequence[str], choices: Sequence[Sequence[str]]) -> tuple[list[int | None], str]:
    """Return the index of each right choice, None where there is none, and in words what was expected.

    All answers of a file are of the form that most have: the choice's own text, its letter, or its number,
    which counts from 1 if the last choice's number occurs and 0 does not; if it may count from either, there
    is no index.
    """
    rows = [[choice.strip() for choice in row] for row in choices]
    letters = [ascii_uppercase.find(answer.upper()) if len(answer) == 1 else -1 for answer in answers]
    numbers = [int(answer) if answer.isdecimal() else -1 for answer in answers]
    from_one = 0 not in numbers and any(number == len(row) for number, row in zip(numbers, rows))
    last = ascii_uppercase[min(max(map(len, rows)), 26) - 1]
    forms = {
        "one of its choices, its letter or its number": [
            row.index(answer) if answer in row else -1 for answer, row in zip(answers, rows)
        ],
        f"a letter from A to {last}, of one of its choices": letters,
        f"the number of one of its choices, counted from {int(from_one)}": [n - from_one for n in numbers],
    }
    forms = {
        name: [index if 0 <= index < len(row) else None for index, row in zip(indices, rows)]
        for name, indices in forms.items()
    }
    expected = min(forms, key=lambda name: forms[name].count(None))
    if expected.startswith("the number") and not from_one and 0 not in numbers:
        return [None] * len(answers), "a letter or a choice's text: its numbers may count from 0 or from 1"
    return forms[expected], expected
