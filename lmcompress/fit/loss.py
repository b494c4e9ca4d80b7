"""The loss that may be borne, and how a candidate's loss against the dense model is bounded on examples."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import norm

from lmcompress.errors import BadSetting
from lmcompress.measure.quality import drawn_units
from lmcompress.results.labels import metric_name, number, signed
from lmcompress.results.verdicts import POINTS
from lmcompress.stats import (
    CONFIDENCE,
    LEAST_EXAMPLES,
    RESAMPLES,
    Columns,
    paired_loss_bounds,
    tango_bound,
    tango_score,
)
from lmcompress.tasks import Task

DROPPING = 0.9  # a candidate goes only if the favourable bound at this confidence misses the margin
PROPORTIONS = {  # metrics that are the mean of such a column of 0 and 1
    "accuracy": "correct",
    "accuracy_per_byte": "correct_per_byte",
    "exact_match": "exact_match",
}
PERCENT = ("bleu", "chrf")  # from 0 to 100 as they stand
_SEARCH_RESAMPLES = 1000


@dataclass(frozen=True)
class Margin:
    """The most that may be lost: `amount` of the metric, or as a share of the dense model's value."""

    amount: float
    relative: bool
    points: float = 1.0  # what a loss is multiplied by to be shown

    @classmethod
    def parse(cls, asked: str | float, metric: str) -> "Margin":
        """Return the margin of `1` (points of a metric in percent) or `1%` (of the dense value).

        Raises:
            BadSetting: it is no number above 0, or points of a metric that has none.
        """
        text = str(asked).strip().replace(" ", "")
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = 0.0
        if not 0 < number < 100:
            raise BadSetting(
                f"--max-loss {asked}: give points above 0, such as 1, or a share of the dense value, such "
                "as 1%."
            )
        if text.endswith("%"):
            return cls(number / 100, True, 100.0)
        if metric in PERCENT:
            return cls(number, False)
        if metric not in POINTS:
            raise BadSetting(
                f"--max-loss {asked} means points of a metric in percent, and {metric_name(metric)} is none: "
                f"give a share of the dense value, such as --max-loss {number:g}%."
            )
        return cls(number / 100, False, 100.0)

    def text(self, loss: float | None) -> str:
        """Return a loss with its unit: `+0.40 points`, or `+0.40 % of dense`."""
        if loss is None or not np.isfinite(loss):
            return "not bounded"
        return f"{signed(self.points * loss)} {'% of dense' if self.relative else 'points'}"

    def __str__(self) -> str:
        unit = " % of the dense value" if self.relative else " points"
        return f"{self.points * self.amount:g}" + (
            " point" if unit == " points" and self.points * self.amount == 1 else unit
        )


@dataclass(frozen=True)
class Loss:
    """The loss of a task's metric, paired with the dense model's columns of the same examples.

    A share of examples that are right (accuracy) is tested by Tango's score; everything else by a bootstrap
    over what the task draws: examples, blocks of windows, clusters.
    """

    task: Task
    margin: Margin

    @cached_property
    def is_proportion(self) -> bool:
        """Tell whether the metric is the mean of 0 and 1 over examples."""
        return self.task.metric in PROPORTIONS and not self.task.cluster

    def check(self, dense: Columns) -> None:
        """Refuse a share of a dense value that is not above 0: what is worse would pass for better.

        Raises:
            BadSetting: the margin is such a share.
        """
        metric, (value,) = self.task.metric, self._values(dense)
        if self.margin.relative and not value > 0:
            raise BadSetting(
                f"--max-loss {100 * self.margin.amount:g}% is a share of the dense model's "
                f"{metric_name(metric)}, and that is {number(value, metric)} on the examples to search by, "
                "not above 0. Give points (--max-loss 1) if the metric has them, or a better model."
            )

    def value(self, columns: Columns, dense: Columns) -> float:
        """Return the observed loss, in the margin's unit; one that is not finite is infinite.

        So is a share of a dense value that is not above 0.
        """
        value, reference = self._values(columns, dense)
        loss = reference - value if self.task.higher_is_better else value - reference
        if self.margin.relative:
            loss = loss / reference if reference > 0 else np.inf
        return float(loss) + 0.0 if np.isfinite(loss) else np.inf  # no -0.0

    def bounds(
        self, columns: Columns, dense: Columns, confidence: float = CONFIDENCE, *, quick: bool = False
    ) -> tuple[float, float]:
        """Return the lower and the upper one-sided bound at `confidence`, in the margin's unit."""
        if self.is_proportion:
            lost, gained, n, scale = self.changes(columns, dense)
            if n < LEAST_EXAMPLES:
                return -np.inf, np.inf
            return (
                -tango_bound(gained, lost, n, confidence) * scale,
                tango_bound(lost, gained, n, confidence) * scale,
            )
        if not np.isfinite(self._values(columns, dense)).all():
            return np.inf, np.inf
        vectorised = hasattr(self.task.statistic, "resampled") and not quick
        return paired_loss_bounds(
            self.task.statistic,
            drawn_units(self.task, columns),
            drawn_units(self.task, dense),
            confidence=confidence,
            higher_is_better=self.task.higher_is_better,
            relative=self.margin.relative,
            block=self.task.block,
            resamples=RESAMPLES if vectorised else _SEARCH_RESAMPLES,
        )

    def is_within(self, columns: Columns, dense: Columns) -> bool:
        """Return whether the loss is at most the margin by a one-sided 5 % test."""
        if self.is_proportion:
            lost, gained, n, scale = self.changes(columns, dense)
            amount = self.margin.amount / scale
            return n >= LEAST_EXAMPLES and tango_score(amount, lost, gained, n) <= norm.ppf(1 - CONFIDENCE)
        return self.bounds(columns, dense)[1] <= self.margin.amount

    def misses(self, columns: Columns, dense: Columns) -> bool:
        """Return whether even the favourable bound at `DROPPING` of the loss is above the margin."""
        if self.is_proportion:
            lost, gained, n, scale = self.changes(columns, dense)
            amount = self.margin.amount / scale
            return n >= LEAST_EXAMPLES and tango_score(amount, lost, gained, n) > norm.ppf(DROPPING)
        return self.bounds(columns, dense, DROPPING, quick=True)[0] > self.margin.amount

    def estimate(self, columns: Columns, dense: Columns) -> tuple[float, float]:
        """Return the loss and its standard error; that of a proportion as if two answers more had changed.

        Without them a candidate that changed none of a hundred answers would be sure to change none.
        """
        value = self.value(columns, dense)
        if self.is_proportion:
            lost, gained, n, scale = self.changes(columns, dense)
            share, net = (lost + gained + 2) / (n + 2), (lost - gained) / (n + 2)
            return value, scale * float(np.sqrt(max(share - net**2, 0.0) / n))
        low, high = self.bounds(columns, dense, DROPPING, quick=True)
        return value, float((high - low) / (2 * norm.ppf(DROPPING)))

    def changes(self, columns: Columns, dense: Columns) -> tuple[int, int, int, float]:
        """Return how many answers turned wrong and right, of how many, and what a loss is multiplied by."""
        right, dense_right = (side[PROPORTIONS[self.task.metric]] > 0.5 for side in (columns, dense))
        lost, gained = int((dense_right & ~right).sum()), int((right & ~dense_right).sum())
        scale = 1 / max(float(dense_right.mean()), 1e-9) if self.margin.relative else 1.0
        return lost, gained, len(right), scale

    def _values(self, *sides: Columns) -> list[float]:
        """Return the metric of each side's columns."""
        return [float(self.task.statistic(drawn_units(self.task, columns))) for columns in sides]
