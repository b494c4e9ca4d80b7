"""Given what I can afford, which measured model should I use, and why: a function of rows.

`python -m lmcompress.study.decision --model gpt2 --max-mb 10 --max-loss 1`. The loss counted is the
unfavourable end of its interval, unless the estimate is asked for. What cannot be told apart goes to the
smaller or the faster. Without a loss allowed, what fits has no measurable loss, nor have the right answers
become less likely to it, and, at the unfavourable end, none above `TOLERATED`.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pandas

from lmcompress.errors import BadSetting, StudyError, accept_any_encoding
from lmcompress.results.frame import frame
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks, scored_rows
from lmcompress.results.store import Row, canonical, notebooks_apart, published_rows
from lmcompress.results.verdicts import BASELINE, COLLAPSED, NO_CHANGE, loss_scale
from lmcompress.stats import TOO_FEW_CALLS
from lmcompress.study import explain

CHOICE = 3
TOLERATED = 0.05  # of the dense quality: what a loss may reach, at worst, that few examples cannot show
NOTHING = float("inf")


@dataclass(frozen=True)
class Option:
    """One measured way. Loss is in `unit`s, a gain is negative; `ms` is the time counted at each shape.

    `safe`: no measurable loss, neither in the score nor in how likely the right answers are, and an interval
    that ends within `TOLERATED` of the dense quality. `less_likely`: how much so these became, `bits per byte
    from 0.617 to 0.625`, if they did. `peak`: bytes of memory of a fresh process, libraries included.
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

    `shape` without `max_ms` asks for the fastest. `count` is "worst", the unfavourable end, or "estimate".
    `max_peak` limits `Option.peak`.
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


def comparable_rows(rows: list[Row], apart: Collection[str] | None = None) -> list[Row]:
    """Return the rows to choose from: each once (the timed one of several notebooks), of its first seed.

    Left out are rows calibrated on what is scored, which exist to show what that does; models trained from
    scratch and dense models trained further, which compress nothing; and models with fewer than `CHOICE`
    rows.

    Args:
        apart: notebooks whose rows ask something else than which compression to use, such as texts that a
            model was not made for; by default those that `results/published.json` names.
    """
    apart = notebooks_apart() if apart is None else apart
    scratch = {row["model"] for row in rows if row["technique"] == "architecture"}
    comparable: dict[str, Row] = {}
    for row in rows:
        if (
            not row["quality"]
            or row["notebook"] in apart
            or row["model"] in scratch
            or row["technique"] == "scratch-shape"
            or (row["technique"] == "dense" and is_recovered(row))
            or row["settings"].get("calibration", {}).get("scored")
        ):
            continue
        hashes = [row["provenance"]["model_hash"], row["provenance"]["data_hash"]]
        identity = canonical([row["technique"], row["settings"], hashes, model_task_of(row)])
        earlier = comparable.get(identity)
        if earlier is None or _precedence(row) <= _precedence(earlier):
            comparable[identity] = row
    counts = Counter(map(model_task_of, comparable.values()))
    return [row for row in comparable.values() if counts[model_task_of(row)] >= CHOICE]


def _precedence(row: Row) -> tuple[int, bool]:
    return row["seed"], not row["latency"]


def verdicts_of(rows: list[Row]) -> dict[str, str]:
    """Return the verdict per key of the comparable rows, corrected within its model and task."""
    table = frame(comparable_rows(rows), details=False)
    return dict(table.loc[table["p_holm"].notna(), ["key", "verdict"]].itertuples(index=False))


def allowance(dense_row: Row) -> float:
    """Return the loss `TOLERATED` of the dense model's quality, in the unit of its metric's losses."""
    return TOLERATED * dense_row["quality"]["value"] * loss_scale(dense_row["quality"]["metric"])[0]


def options(rows: list[Row]) -> list[Option]:
    """Return the options among the comparable rows of one model and task, the dense model first."""
    table = frame(rows, details=False)
    is_baseline = table["verdict"] == BASELINE
    dense_ms = _dense_ms(table)
    allowed = allowance(dense_of(rows))
    lines = pandas.concat([table[is_baseline].head(1), table[~is_baseline & table["p_holm"].notna()]])
    return [_option(line, dense_ms, allowed) for line in lines.to_dict("records")]


def _dense_ms(table: pandas.DataFrame) -> dict[str, float]:
    """Return per shape the dense model's milliseconds: the median over all runs beside a variant."""
    columns = [name for name in table if name.startswith("dense_ms.")]
    medians = table.loc[table["timed"], columns].astype(float).median()
    return {name.partition(".")[2]: ms for name, ms in medians.dropna().items()}


def _option(line: dict, dense_ms: dict[str, float], allowed: float) -> Option:
    """Return the option of a frame's line; a time counts at its slower end, as dense if unchanged."""
    line = {name: None if pandas.isna(field) else field for name, field in line.items()}
    ms = {}
    for shape, reference in dense_ms.items():
        unchanged = line[f"speed.{shape}"] in (BASELINE, NO_CHANGE, TOO_FEW_CALLS)
        ratio = 1.0 if unchanged else line[f"ratio_high.{shape}"]
        if ratio:
            ms[shape] = reference * ratio
    is_baseline, size, peak_mb = line["verdict"] == BASELINE, line["smallest_bytes"], line["peak_mb"]
    return Option(
        key=line["key"],
        name=line["label"],
        baseline=is_baseline,
        bytes=None if size is None else int(size),
        form=line["smallest_format"],
        loss=line["loss"],
        loss_low=line["loss_low"],
        loss_high=line["loss_high"],
        unit=line["loss_unit"],
        verdict=line["verdict"],
        safe=is_baseline or bool(line["no_loss"] and line["loss_high"] <= allowed),
        ms=ms,
        less_likely=line["likelihood_loss"],
        peak=None if peak_mb is None else round(peak_mb * 1e6),
    )


def excess(option: Option, budget: Budget) -> float:
    """Return by how much the costliest of bytes, time and memory is over its budget: at most 1 fits."""
    costs = (
        (option.bytes, budget.max_bytes),
        (option.ms.get(budget.shape), budget.max_ms),
        (option.peak, budget.max_peak),
    )
    shares = [
        NOTHING if cost is None or limit <= 0 else cost / limit for cost, limit in costs if limit is not None
    ]
    return max(shares, default=0.0)


def spares(option: Option, budget: Budget) -> bool:
    """Return whether the loss is within the budget; a collapsed model never is."""
    if option.verdict == COLLAPSED:
        return False
    if budget.max_loss is None:
        return option.safe
    return (option.loss if budget.count == "estimate" else option.loss_high) <= budget.max_loss


def cost(option: Option, budget: Budget) -> tuple:
    """Return what decides among equals: time if only time is limited, else bytes; the other; the loss."""
    size, time = (NOTHING if c is None else c for c in (option.bytes, option.ms.get(budget.shape)))
    first = (time, size) if budget.shape and budget.max_bytes is None else (size, time)
    return (*first, option.loss, option.key)


def decide(choices: list[Option], budget: Budget) -> Decision:
    """Return the cheapest of those that fit and whose interval overlaps that of the best.

    Where a loss is allowed and no cost is limited, the cheapest of all that fit. If none fits, the two that
    came nearest: the least loss within the cost, and the least cost within the loss.

    Raises:
        BadSetting: a time budget without a shape, or with a shape that nothing was timed at.
    """
    timed = ", ".join(sorted({name for option in choices for name in option.ms})) or "none"
    if budget.max_ms is not None and not budget.shape:
        raise BadSetting(f"a time budget needs a shape (--at SHAPE); timed: {timed}")
    if budget.shape and budget.shape not in timed.split(", "):
        raise BadSetting(f"no time measured at {budget.shape!r}; available: {timed}")
    alive = [option for option in choices if option.verdict != COLLAPSED]
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


def answers(rows: list[Row], budget: Budget, *, model: str = "", task: str = "") -> list[tuple[str, bool]]:
    """Return per model and task of the rows a sentence, and whether anything fits.

    Args:
        model: the name, or a part of it; "" takes all. So for `task`.

    Raises:
        BadSetting: no such model and task, or none of them was timed at the budget's shape.
    """
    rows = comparable_rows(rows)
    available = model_tasks(rows)
    selected = [model_task for model_task in available if model in model_task[0] and task in model_task[1]]
    if not selected:
        listed = "; ".join(f"{model} on {task}" for model, task in available)
        raise BadSetting(
            f"no rows of model {model!r} and task {task!r}; available: {listed or 'none'} (a choice needs at "
            f"least {CHOICE} rows of a model and task)"
        )
    sentences, untimed = [], []
    for model_task in selected:
        choices = options(scored_rows(rows, model_task))
        try:
            decision = decide(choices, budget)
        except BadSetting as error:  # this model was not timed there; the others may have been
            untimed.append(error)
            text, fits = str(error), False
        else:
            text = explain.explain(decision, budget, count=len(choices))
            fits = decision.chosen is not None
        sentences.append((f"{model_task[0]} on {model_task[1]}: {text}", fits))
    if len(untimed) == len(selected):
        raise untimed[0]
    return sentences


def main(arguments: list[str] | None = None) -> int:
    """Answer on the command line; return 1 where nothing measured fits, 2 on a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcompress.study.decision", description=__doc__.split("\n")[0]
    )
    strictest = f"none measurable, nor the right answers less likely, at worst {TOLERATED:.0%} of the quality"
    add = parser.add_argument
    add("--model", default="", help="a model of the rows, or a part of its name; default: all")
    add("--task", default="", help="a task of the rows, or a part of its name")
    add("--max-mb", type=float, help="megabytes (10⁶ bytes) of the smallest stored form")
    add("--max-ram-mb", type=float, help="megabytes of memory a fresh process may take, libraries included")
    add("--max-ms", type=float, help="milliseconds per call at the shape of --at")
    add("--at", metavar="SHAPE", help="batch1, batch8, prefill_b1, decode_b8, …; alone: the fastest")
    add("--max-loss", type=float, help=f"points of the metric; default: {strictest}".replace("%", "%%"))
    add("--count", choices=("worst", "estimate"), default="worst", help="end of the loss's interval")
    add("--results", type=Path, help="a folder of rows (default: those of report.md)")
    accept_any_encoding()
    asked = parser.parse_args(arguments)
    size, peak = (None if mb is None else mb * 1e6 for mb in (asked.max_mb, asked.max_ram_mb))
    try:
        budget = Budget(size, asked.max_ms, asked.at, asked.max_loss, asked.count, peak)
        found = answers(published_rows(asked.results), budget, model=asked.model, task=asked.task)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(sentence for sentence, _ in found))
    return 0 if all(fits for _, fits in found) else 1


if __name__ == "__main__":
    sys.exit(main())
