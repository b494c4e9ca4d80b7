"""How well a model does a task: the number, its interval, and the paired difference from the dense model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcompress.stats import (
    LEAST_EXAMPLES,
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
    """Return the row's "quality"; `baseline` are the dense model's columns on the same examples.

    Accuracies have Wilson's interval and McNemar's test; everything else a bootstrap over whole examples, or
    contiguous blocks of windows where the task says so. Numbers that are not finite become null. The
    "difference" is this model minus the dense one; the task's `likelihood` among "secondary" has one, too.
    `drawn` are `resamples` and `seed` of the bootstrap.
    """
    task, columns = evaluation.task, evaluation.columns
    sampling = {"block": task.block} | drawn
    n = len(next(iter(columns.values())))
    if evaluation.metric == "accuracy":
        interval = wilson(int(columns["correct"].sum()), n)
    else:
        interval = statistic_interval(task.statistic, columns, **sampling)
    secondary = {
        name: statistic_interval(statistic, columns, **sampling).as_dict()
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

    Of the metric, or of the task's `likelihood`: above 0, right answers are less likely than to `baseline`.
    """
    if task.metric == "accuracy" and not likelihood:
        difference = mcnemar(columns["correct"], baseline["correct"])
    else:
        statistic = task.secondary[task.likelihood] if likelihood else task.statistic
        difference = paired_difference(statistic, columns, baseline, block=task.block, **drawn)
    fields = difference.as_dict()
    return None if None in fields.values() else fields


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
