"""Given what I can afford, which measured model should I use, and why: a function of rows.

`python -m lmcompress.study.decision --model gpt2 --max-mb 10 --max-loss 1`. The loss counted is the unfavourable end of its
interval, unless the estimate is asked for. What cannot be told apart goes to the smaller or the faster. Without a
loss allowed, what fits has no measurable loss, nor have the right answers become less likely to it, and, at the
unfavourable end, none above `TOLERATED`.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from lmcompress.errors import BadSetting, StudyError
from lmcompress.results.labels import label_of, likelihood_loss
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks, smallest_format
from lmcompress.results.store import published_rows
from lmcompress.results.verdicts import adjusted, loss_of, loss_scale, without_loss
from lmcompress.study import explain

CHOICE = 3
TOLERATED = 0.05  # of the dense quality: what a loss may reach, at worst, that few examples cannot show
NOTHING = float("inf")


@dataclass(frozen=True)
class Option:
    """One measured way. Loss is in `unit`s, a gain is negative; `ms` is the time counted at each shape.

    `safe`: no measurable loss, neither in the score nor in how likely the right answers are, and an interval that ends
    within `TOLERATED` of the dense quality. `less_likely`: how much so these became, `bits per byte from 0.617 to
    0.625`, if they did. `peak`: bytes of memory of a fresh process, libraries included.
    """

    key: str
    name: str
    baseline: bool
    bytes: int | None
    form: str | None
    loss: float
    loss_low: float
    loss_high: float
    unit: str
    verdict: str
    safe: bool
    ms: dict[str, float] = field(default_factory=dict)
    less_likely: str = ""
    peak: int | None = None


@dataclass(frozen=True)
class Budget:
    """What can be afforded; None is no limit, and for the loss: only what is `Option.safe`.

    `shape` without `max_ms` asks for the fastest. `count` is "worst", the unfavourable end, or "estimate". `max_peak`
    limits `Option.peak`.
    """

    max_bytes: float | None = None
    max_ms: float | None = None
    shape: str | None = None
    max_loss: float | None = None
    count: str = "worst"
    max_peak: float | None = None


@dataclass(frozen=True)
class Decision:
    """`chosen` of `fitting`, `tied` with the best of them; without one, the nearest by loss and by cost."""

    chosen: Option | None
    fitting: list[Option]
    tied: list[Option]
    least_loss: Option | None
    least_cost: Option | None


OTHER_TEXT = "12_other_text"


def measured(rows: list[dict]) -> list[dict]:
    """The rows with a quality, each once though several notebooks recorded it (the timed one), of several seeds the first.

    Without those calibrated on what is scored, which exist to show what that does, and without models trained from
    scratch and dense models trained further, which compress nothing; without texts a model was not made for, by which
    nobody should choose; nor models with fewer than `CHOICE` rows: nothing to choose from.
    """
    scratch = {row["model"] for row in rows if row["technique"] == "architecture"}
    kept = (
        row
        for row in rows
        if row["quality"]
        and row["notebook"] != OTHER_TEXT
        and row["model"] not in scratch
        and row["technique"] != "scratch-shape"
        and not (row["technique"] == "dense" and is_recovered(row))
        and not row["settings"].get("calibration", {}).get("scored")
    )
    found: dict[str, dict] = {}
    for row in kept:
        place = json.dumps([row["technique"], row["settings"], row["provenance"]["model_hash"],
                            row["provenance"]["data_hash"], model_task_of(row)], sort_keys=True)  # fmt: skip
        known = found.get(place)
        if known is None or (row["seed"], not row["latency"]) <= (known["seed"], not known["latency"]):
            found[place] = row
    ways = Counter(model_task_of(row) for row in found.values())
    return [row for row in found.values() if ways[model_task_of(row)] >= CHOICE]


def verdicts_of(rows: list[dict]) -> dict:
    """Verdict per row key, corrected over the comparisons of its model and task."""
    kept = measured(rows)
    return {
        key: word
        for pair in model_tasks(kept)
        for key, (_, word) in adjusted([row for row in kept if model_task_of(row) == pair]).items()
    }


def allowance(dense: dict) -> float:
    """The loss `TOLERATED` of the dense model's quality, in the unit that losses of its metric have."""
    return TOLERATED * dense["quality"]["value"] * loss_scale(dense["quality"]["metric"])[0]


def dense_times(own: list[dict]) -> dict[str, float]:
    """Per shape the dense model's milliseconds: the median over all runs in which it stood beside a variant."""
    seen: dict[str, list[float]] = {}
    for row in own:
        for name, shape in ((row["latency"] or {}).get("shapes") or {}).items():
            if shape["dense_ms"] and not row["latency"].get("measured_on"):
                seen.setdefault(name, []).append(shape["dense_ms"])
    return {name: median(values) for name, values in seen.items()}


def counted_ratio(row: dict, name: str) -> float | None:
    """A row's time over dense at a shape: the slower end of its interval, 1 where no change is measurable."""
    shape = row["latency"]["shapes"][name]
    if row["verdict"]["latency"].get(name) in ("baseline", "no measurable change"):
        return 1.0
    return shape["ratio_high"]


def options(own: list[dict]) -> list[Option]:
    """What there is to choose from among the rows of one model and task (`measured`), the dense model first."""
    dense, times = dense_of(own), dense_times(own)
    others = [row for row in own if row is not dense and row["quality"]["difference"]]
    verdicts = adjusted(others)
    spared = {row["key"] for row in without_loss(others, verdicts)}
    unit, allowed = loss_scale(dense["quality"]["metric"])[1], allowance(dense)
    made = []
    for row in [dense, *others]:
        loss = (0.0, 0.0, 0.0) if row is dense else loss_of(row)
        verdict = "baseline" if row is dense else verdicts[row["key"]][1]
        form, size = smallest_format(row) if row["memory"] and row["memory"]["formats"] else (None, None)
        ratios = {name: counted_ratio(row, name) for name in times if name in _shapes(row)}
        ms = {name: times[name] * ratio for name, ratio in ratios.items() if ratio}
        safe = row is dense or (row["key"] in spared and loss[2] <= allowed)
        one = Option(row["key"], label_of(row), row is dense, size, form, *loss, unit, verdict, safe, ms)
        peak = (row["memory"] or {}).get("peak_bytes")
        made.append(replace(one, less_likely=likelihood_loss(row), peak=peak))
    return made


def _shapes(row: dict) -> dict:
    return row["latency"]["shapes"] if row["latency"] else {}


def excess(option: Option, budget: Budget) -> float:
    """By how much the costliest of bytes, time and memory is over its budget: at most 1 fits."""
    asked = (
        (option.bytes, budget.max_bytes),
        (option.ms.get(budget.shape), budget.max_ms),
        (option.peak, budget.max_peak),
    )
    parts = [
        NOTHING if value is None or limit <= 0 else value / limit
        for value, limit in asked
        if limit is not None
    ]
    return max(parts, default=0.0)


def spares(option: Option, budget: Budget) -> bool:
    """Whether the loss is within the budget; a collapsed model never is."""
    if option.verdict == "collapsed":
        return False
    if budget.max_loss is None:
        return option.safe
    return (option.loss if budget.count == "estimate" else option.loss_high) <= budget.max_loss


def cost(option: Option, budget: Budget) -> tuple:
    """What decides among equals: time if only time is asked about, else bytes; then the other, then the loss."""
    size, time = (NOTHING if v is None else v for v in (option.bytes, option.ms.get(budget.shape)))
    first = (time, size) if budget.shape and budget.max_bytes is None else (size, time)
    return (*first, option.loss, option.key)


def decide(choices: list[Option], budget: Budget) -> Decision:
    """The option to use: of those that fit, all whose interval overlaps the best one's are equals; their cheapest.

    Where a loss is allowed and no cost is limited, the cheapest of all that fit. If none fits, the two that came
    nearest: the least loss within the cost, and the least cost within the loss.

    Raises:
        BadSetting: a time budget without a shape, or with a shape that nothing was timed at.
    """
    known = sorted({name for option in choices for name in option.ms})
    if (budget.max_ms is not None or budget.shape) and budget.shape not in known:
        raise BadSetting(f"no time measured at {budget.shape!r}; available: {', '.join(known) or 'none'}")
    alive = [option for option in choices if option.verdict != "collapsed"]
    affordable = [option for option in alive if excess(option, budget) <= 1]
    fitting = [option for option in affordable if spares(option, budget)]
    if fitting:
        best = min(fitting, key=lambda option: (option.loss, option.key))
        limits = (budget.max_bytes, budget.max_ms, budget.max_peak)
        free = budget.max_loss is not None and limits == (None, None, None)
        tied = [option for option in fitting if free or option.loss_low <= best.loss_high]
        return Decision(min(tied, key=lambda option: cost(option, budget)), fitting, tied, None, None)
    sparing = [o for o in alive if spares(o, budget) and excess(o, budget) < NOTHING]
    by_loss = min(affordable, key=lambda option: (option.loss_high, option.key), default=None)
    by_cost = min(sparing, key=lambda o: (excess(o, budget), o.loss_high, o.key), default=None)
    return Decision(None, [], [], by_loss, by_cost)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 1 where nothing measured fits, 2 on a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcompress.study.decision", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--model", default="", help="a model of the rows, or a part of its name; default: all"
    )
    parser.add_argument("--task", default="", help="a task of the rows, or a part of its name")
    parser.add_argument("--max-mb", type=float, help="megabytes (10⁶ bytes) of the smallest stored form")
    parser.add_argument(
        "--max-ram-mb", type=float, help="megabytes of memory a fresh process may take, libraries included"
    )
    parser.add_argument("--max-ms", type=float, help="milliseconds per call at the shape of --at")
    parser.add_argument(
        "--at", metavar="SHAPE", help="batch1, batch8, prefill_b1, decode_b8, …; alone: the fastest"
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        help=f"points of the metric; default: none measurable, nor the right answers less likely, at "
        f"worst {100 * TOLERATED:.0f} %% of the quality",
    )
    parser.add_argument(
        "--count", choices=("worst", "estimate"), default="worst", help="end of the loss's interval"
    )
    parser.add_argument("--results", type=Path, help="a folder of rows (default: those of report.md)")
    asked = parser.parse_args(arguments)
    try:
        rows = measured(published_rows(asked.results))
        pairs = [p for p in model_tasks(rows) if asked.model in p[0] and asked.task in p[1]]
        if not pairs:
            there = "; ".join(f"{model} on {task}" for model, task in model_tasks(rows))
            raise BadSetting(f"no rows of model {asked.model!r} and task {asked.task!r}; available: {there}")
        size, peak = (None if mb is None else mb * 1e6 for mb in (asked.max_mb, asked.max_ram_mb))
        budget = Budget(size, asked.max_ms, asked.at, asked.max_loss, asked.count, peak)
        fits = [_answer([row for row in rows if model_task_of(row) == pair], budget, pair) for pair in pairs]
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(fits) else 1


def _answer(own: list[dict], budget: Budget, pair: tuple[str, str]) -> bool:
    choices = options(own)
    found = decide(choices, budget)
    print(f"{pair[0]} on {pair[1]}: {explain.explain(found, budget, ways=len(choices))}")
    return found.chosen is not None


if __name__ == "__main__":
    sys.exit(main())
