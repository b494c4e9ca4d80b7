"""Minimal pairs (BLiMP): does a language model find the acceptable sentence more likely than its twin?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from lmcompress.errors import BadData
from lmcompress.tasks.base import Columns, Run, Statistic, Task
from lmcompress.tasks.language_modelling import start_token, summed_nll

CHANCE = 0.5


@dataclass(eq=False, kw_only=True)
class MinimalPairs(Task):
    """Examples `{"good", "bad", "field", "paradigm"}`.

    A pair is right if the summed log-probability of the good sentence, after a start token and with no end
    token, is higher (Warstadt et al. 2020). Equal sums are wrong.
    """

    kind: ClassVar[str] = "minimal-pairs"
    needs: ClassVar[str] = "language modelling"
    text_fields: ClassVar[tuple[str, ...]] = ("good", "bad")
    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "fraction"
    cluster: ClassVar[str | None] = "paradigm"  # the pairs of one are alike, and as many in each

    @property
    def fields(self) -> list[str]:
        """Names of the fields, sorted; the column `field` counts them."""
        return sorted({example["field"] for example in self.examples})

    @property
    def secondary(self) -> dict[str, Statistic]:
        """Accuracy within each field."""
        return within_fields(f"accuracy_{name}" for name in self.fields)

    def metric_inputs(self, columns: Columns, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Return whether each pair is right, which all should be."""
        return columns["correct"].astype(int), np.ones(len(columns["correct"]), dtype=int)

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return `correct`, `margin` (nats for the good sentence), the numbers of `field` and `paradigm`."""
        sentences = list(dict.fromkeys(e[side] for e in self.examples for side in ("good", "bad")))
        items = self.cached(run.tokenizer, ("sentences",), lambda: _items(run.tokenizer, sentences))
        by_sentence = dict(zip(sentences, summed_nll(run, items)))
        margin = np.array([by_sentence[e["bad"]] - by_sentence[e["good"]] for e in self.examples])
        correct = (margin > 0).astype(np.float64)
        frame = pd.DataFrame(self.examples).assign(correct=correct)
        numbers = {by: pd.factorize(frame[by], sort=True)[0].astype(float) for by in ("field", "paradigm")}
        details = {
            f"accuracy_by_{by}": frame.groupby(by)["correct"].mean().to_dict() for by in ("field", "paradigm")
        }
        return {"correct": correct, "margin": margin} | numbers, details

    def check_collapsed(self, columns: Columns, value: float, run: Run) -> tuple[float, str | None, dict]:
        """Return chance as the floor."""
        collapsed = None
        if not np.isfinite(columns["margin"]).all():
            collapsed = "the model's outputs are not finite numbers"
        elif value <= CHANCE:
            collapsed = f"accuracy {value:.3f} is not above chance"
        return CHANCE, collapsed, {"floor": "chance"}

    def features(self, tokenizer: Any, examples: list[dict], **fit: Any) -> list[dict]:
        """Refuse: minimal pairs only test."""
        raise BadData(f"{self.name} only tests; train on a language-modelling task (pydocs-lm, tinystories).")


def within_fields(names: Iterable[str]) -> dict[str, Statistic]:
    """Return the accuracies within fields by their names, which are in the order of the fields' numbers."""
    return {name: _Within(number) for number, name in enumerate(sorted(names))}


@dataclass(frozen=True)
class _Within:
    """Accuracy over the pairs of one field; NaN for a resample without any."""

    field: int

    def __call__(self, columns: Columns) -> float:
        correct = columns["correct"][columns["field"] == self.field]
        return float(correct.mean()) if len(correct) else float("nan")


def _items(tokenizer: Any, sentences: list[str]) -> list[dict]:
    start = start_token(tokenizer)
    encoded = tokenizer(sentences, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [{"input_ids": [start, *ids[:-1]], "labels": ids} for ids in encoded]
