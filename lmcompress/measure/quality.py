"""How well a model does a task: the number, its interval, and the paired difference from the dense model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lmcompress.stats import (
    LEAST_EXAMPLES,
    RESAMPLES,
    TOO_FEW_EXAMPLES,
    Columns,
    Difference,
    finite,
    mcnemar,
    paired_difference,
    statistic_interval,
    verdict,
    wilson,
)

if TYPE_CHECKING:
    from lmcompress.tasks import Evaluation, Task


def quality(evaluation: Evaluation, baseline: Columns | None = None, **drawn: int) -> dict:
    """Return a row's "quality" or "selection"; `baseline` are the dense model's columns, same examples.

    Accuracies have Wilson's interval and McNemar's test; everything else a bootstrap over whole examples, or
    contiguous blocks of windows, or clusters (paradigms of minimal pairs), where the task says so. Numbers
    that are not finite become null. The "difference" is this model minus the dense one; the `likelihood`
    among "secondary" has one, too. `drawn` are `resamples` and `seed` of the bootstrap.
    """
    task, columns = evaluation.task, evaluation.columns
    sampling = {"block": task.block} | drawn
    n = len(next(iter(columns.values())))
    units = drawn_units(task, columns)
    if evaluation.metric == "accuracy" and not task.cluster:
        interval = wilson(int(columns["correct"].sum()), n)
    else:
        interval = statistic_interval(task.statistic, units, **sampling)
    secondary = {
        name: statistic_interval(statistic, units, **sampling).as_dict()
        for name, statistic in task.secondary.items()
    }
    difference = None
    if baseline is not None:
        difference = compare(task, columns, baseline, **drawn)
        if task.likelihood and n >= LEAST_EXAMPLES:
            less_likely = compare(task, columns, baseline, likelihood=True, **drawn)
            secondary[task.likelihood]["difference"] = less_likely
    return {
        "metric": evaluation.metric,
        **interval.as_dict(),
        "value": finite(evaluation.value),  # of its `evaluate` module: the same number
        "n": n,
        "higher_is_better": task.higher_is_better,
        "floor": evaluation.floor,
        "collapsed": evaluation.collapsed,
        "difference": difference,
        "secondary": secondary,
        "details": evaluation.details,
    }


def compare(
    task: Task, columns: Columns, baseline: Columns, *, likelihood: bool = False, **drawn: int
) -> dict | None:
    """Return the paired difference, `columns` minus `baseline`, on the same examples; None if not finite.

    Of the metric, with the upper one-sided 95 % bound of the loss, or of the task's `likelihood`: above 0,
    right answers are less likely than to `baseline`. A statistic of many resamples at once has `RESAMPLES`.
    """
    if task.metric == "accuracy" and not likelihood and not task.cluster:
        difference = mcnemar(columns["correct"], baseline["correct"])
    else:
        statistic = task.secondary[task.likelihood] if likelihood else task.statistic
        sampling = {"block": task.block, "resamples": RESAMPLES if hasattr(statistic, "resampled") else 1000}
        sampling |= {"higher_is_better": None if likelihood else task.higher_is_better} | drawn
        sampling |= {"relative": task.metric == "perplexity"}  # a margin on it is of the ratio
        difference = paired_difference(
            statistic, drawn_units(task, columns), drawn_units(task, baseline), **sampling
        )
        if task.cluster:
            difference = replace(difference, test=f"{difference.test} of whole {task.cluster}s")
    fields = difference.as_dict()
    return None if None in fields.values() else fields


def drawn_units(task: Task, columns: Columns) -> Columns:
    """Return what a bootstrap draws: the examples, or the mean of each of the task's clusters."""
    if task.cluster is None:
        return columns
    _, number, sizes = np.unique(columns[task.cluster], return_inverse=True, return_counts=True)
    return {name: np.bincount(number, weights=column) / sizes for name, column in columns.items()}


def quality_verdict(measured: dict, *, baseline: bool) -> str | None:
    """Return what `quality` returned in a word: "baseline", "collapsed", or `stats.verdict`'s.

    "too few examples" where a bootstrap would have to tell; None if it was not compared with anything.
    """
    if baseline:
        return "baseline"
    if measured["collapsed"] or measured["value"] is None:
        return "collapsed"
    if measured["difference"] is None:
        few = measured["metric"] != "accuracy" and measured["n"] < LEAST_EXAMPLES
        return TOO_FEW_EXAMPLES if few else None
    return verdict(Difference(**measured["difference"]), higher_is_better=measured["higher_is_better"])
