"""Given what I can afford, which measured model should I use: a function of rows.

`python -m lmcompress.study.decision --model gpt2 --max-mb 10 --max-loss 1%`. A configuration is non-inferior
at a margin if the upper one-sided 95 % bound of its paired loss is at most that share of the dense quality.
Where rows hold scores of a selection set, it chooses; the report set, which it never saw, then confirms.
Sizes are those of files that were written and reloaded; times are compared within one machine.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pandas
import yaml

from lmcompress.errors import BadSetting, StudyError, accept_any_encoding
from lmcompress.results.frame import distinct_labels, frame
from lmcompress.results.labels import bytes_text, change_text, shape_name
from lmcompress.results.rows import (
    NO_CHANGE,
    chain_steps,
    is_dense,
    is_recovered,
    model_task_of,
    model_tasks,
    with_times_again,
)
from lmcompress.results.store import Row, canonical, notebooks_apart, published_rows
from lmcompress.results.verdicts import BASELINE, COLLAPSED, loss_scale
from lmcompress.stats import TOO_FEW_CALLS

CHOICE = 3  # rows of a model and task that make a choice
MARGINS = (0.01, 0.05)  # of the dense quality, fixed beforehand
NOTHING = float("inf")
ON_BY_DEFAULT = ("aware", "even")  # settings that are another configuration if False
RUNTIMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


@dataclass(frozen=True)
class Option:
    """One measured configuration.

    Attributes:
        bytes: of the file that was written.
        loss: against dense, in `unit`s, with its two-sided 95 % interval; a gain is negative.
        bound: upper one-sided 95 % bound of the loss on the report set, a share; None if it collapsed.
        selection_bound: the same on the selection set; None where there was none.
        ms: at each timed shape, the unfavourable end of the interval on `machine`, as dense if unchanged.
        ratio: the same over the dense model's time.
        other_ratio: this where `machine` is another than that of most of the model's configurations.
        processes: that it was timed in, one after the other; of several the least favourable time counts.
        listed: whether every model is asked for this configuration (`configurations.yaml`).
        peak: bytes of memory of a fresh process, libraries included.
    """

    key: str
    name: str
    baseline: bool
    bytes: int | None
    loss: float
    loss_low: float
    loss_high: float
    unit: str
    bound: float | None
    selection_bound: float | None
    verdict: str
    trained: bool
    listed: bool
    runtime: str = "torch"
    machine: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    other_ratio: dict[str, float] = field(default_factory=dict)
    processes: int = 1
    peak: int | None = None
    higher_is_better: bool = True  # of the score

    @property
    def chosen_by(self) -> float | None:
        """The bound that a choice goes by."""
        return self.bound if self.selection_bound is None else self.selection_bound

    def confirmed(self, margin: float) -> bool | None:
        """Return whether the report set confirms `margin`; None where it made the choice itself."""
        if self.baseline or self.selection_bound is None:
            return None
        return self.bound is not None and self.bound <= margin


@dataclass(frozen=True)
class Budget:
    """What can be afforded; None is no limit.

    `margin` is the largest loss, a share of the dense quality, that the bound may reach. `shape` without
    `max_ms` asks for the fastest. `listed` leaves out what not every model is asked for.
    """

    max_bytes: float | None = None
    max_ms: float | None = None
    shape: str | None = None
    margin: float | None = None
    max_peak: float | None = None
    listed: bool = False


@dataclass(frozen=True)
class Decision:
    """The option `chosen` of those `fitting`; without one, the nearest by loss and by cost."""

    chosen: Option | None
    fitting: list[Option]
    least_loss: Option | None = None
    least_cost: Option | None = None


def comparable_rows(rows: Iterable[Row], apart: Collection[str] | None = None) -> list[Row]:
    """Return the rows to choose from: each once (the timed one of several notebooks), of its first seed.

    Left out are rows calibrated on what is scored, which exist to show what that does; models trained from
    scratch and dense models trained further, which compress nothing; and models with fewer than `CHOICE`
    rows.

    Args:
        apart: notebooks whose rows ask something else than which compression to use, such as texts that a
            model was not made for; by default those that `results/published.json` names.
    """
    rows, apart = with_times_again(rows), notebooks_apart() if apart is None else apart
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
        if earlier is None or (row["seed"], not row["latency"]) <= (earlier["seed"], not earlier["latency"]):
            comparable[identity] = row
    counts = Counter(map(model_task_of, comparable.values()))
    return [row for row in comparable.values() if counts[model_task_of(row)] >= CHOICE]


@cache
def configurations() -> list[list[dict]]:
    """Return the steps of each configuration that every model is asked for."""
    return yaml.safe_load(Path(__file__).with_name("configurations.yaml").read_text(encoding="utf-8"))


def configuration_of(row: Row) -> int | None:
    """Return the place of a row's configuration in `configurations`; None if it is not listed."""
    steps = chain_steps(row["settings"]) or [{"technique": row["technique"], **row["settings"]}]
    steps = [_bare(step) for step in steps]
    return configurations().index(steps) if steps in configurations() else None


def _bare(step: dict) -> dict:
    left_out = {"calibration", "version", "training", "seed"}
    step = {
        name: setting
        for name, setting in step.items()
        if name not in left_out and (setting is not False or name in ON_BY_DEFAULT)
    }
    if recovery := step.get("recovery"):
        step["recovery"] = {"teacher": True} if recovery.get("teacher") else {}
    return step


def options(rows: Iterable[Row]) -> list[Option]:
    """Return the options among the comparable rows of one model and task, the dense model first.

    Where a selection set made the choice, what was not scored on it has no bound to be chosen by.
    """
    rows = list(rows)
    table = frame(rows, details=False)
    table["listed"] = [configuration_of(row) is not None for row in rows]
    table["label"] = distinct_labels(rows)
    is_baseline = table["verdict"] == BASELINE
    machine = decisive_machine(table[~is_baseline])
    dense_ms = _dense_ms(table[table["machine"] == machine])
    lines = pandas.concat([table[is_baseline].head(1), table[~is_baseline & table["p_holm"].notna()]])
    measured = [_option(line, dense_ms, machine) for line in lines.to_dict("records")]
    if all(option.selection_bound is None for option in measured if not option.baseline):
        return measured
    return [replace(o, bound=None) if o.selection_bound is None else o for o in measured]


def decisive_machine(table: pandas.DataFrame) -> str:
    """Return the machine on which most of a model's listed configurations were timed: times of others do
    not count.
    """
    timed = table[table["timed"] & table["listed"]]
    timed = timed if len(timed) else table[table["timed"]]
    return "" if timed.empty else timed["machine"].value_counts().index[0]


def _dense_ms(table: pandas.DataFrame) -> dict[str, float]:
    """Return per shape the dense model's milliseconds: the median over all runs beside a variant."""
    columns = [name for name in table if name.startswith("dense_ms.")]
    medians = table.loc[table["timed"], columns].astype(float).median()
    return {name.partition(".")[2]: ms for name, ms in medians.dropna().items()}


def _option(line: dict, dense_ms: dict[str, float], machine: str) -> Option:
    line = {name: None if pandas.isna(cell) else cell for name, cell in line.items()}
    is_baseline, ratio = line["verdict"] == BASELINE, {}
    elsewhere = not is_baseline and line["machine"] != machine
    for shape in [shape for shape in dense_ms if is_baseline or line.get(f"ratio.{shape}")]:
        unchanged = is_baseline or line[f"speed.{shape}"] in (BASELINE, NO_CHANGE, TOO_FEW_CALLS)
        if share := 1.0 if unchanged else line[f"ratio_high.{shape}"]:
            ratio[shape] = share
    ratio, other_ratio = ({}, ratio) if elsewhere else (ratio, {})
    selected, size, peak_mb = line.get("selection_bound_share"), line["size_bytes"], line["peak_mb"]
    collapsed = selected is None and line.get("selection_n")  # on that set, if not on the report set
    runtimes = [name for start, name in RUNTIMES.items() if line["technique"].startswith(start)]
    return Option(
        key=line["key"],
        name=line["label"],
        baseline=is_baseline,
        bytes=None if size is None else int(size),
        loss=line["loss"],
        loss_low=line["loss_low"],
        loss_high=line["loss_high"],
        unit=line["loss_unit"],
        bound=0.0 if is_baseline else None if collapsed else line["bound_share"],
        selection_bound=0.0 if is_baseline else selected,
        verdict=line["verdict"],
        trained=bool(line["recovered"] or line["trained"]),
        listed=is_baseline or bool(line["listed"]),
        runtime=(runtimes or ["torch"])[0],
        machine=machine if ratio else line["machine"] if other_ratio else "",
        ms={shape: dense_ms[shape] * share for shape, share in ratio.items()},
        ratio=ratio,
        other_ratio=other_ratio,
        processes=int(line["processes"]),
        peak=None if peak_mb is None else round(peak_mb * 1e6),
        higher_is_better=bool(line["higher_is_better"]),
    )


def excess(option: Option, budget: Budget) -> float:
    """Return by how much the costliest of bytes, time and memory is over its budget: at most 1 fits."""
    costs = [(option.bytes, budget.max_bytes), (option.peak, budget.max_peak)]
    costs += [(option.ms.get(budget.shape), budget.max_ms)]
    shares = [
        NOTHING if cost is None or limit <= 0 else cost / limit for cost, limit in costs if limit is not None
    ]
    untimed = budget.shape is not None and budget.shape not in option.ms
    return NOTHING if untimed else max(shares, default=0.0)


def spares(option: Option, budget: Budget) -> bool:
    """Return whether the option is non-inferior at the budget's margin; a collapsed model never is."""
    if option.verdict == COLLAPSED or option.chosen_by is None:
        return False
    return budget.margin is None or option.chosen_by <= budget.margin


def cost(option: Option, budget: Budget) -> tuple:
    """Return what decides: the bound where no margin is given; else time if a shape is, else bytes."""
    size, time = (NOTHING if c is None else c for c in (option.bytes, option.ms.get(budget.shape)))
    first = (time, size) if budget.shape and budget.max_ms is None else (size, time)
    bound = [] if budget.margin is not None else [option.chosen_by]
    return (*bound, *first, not option.baseline, option.chosen_by, option.key)


def decide(choices: Iterable[Option], budget: Budget) -> Decision:
    """Return the cheapest that fits, or without a margin the one of least loss that fits.

    If none fits, the two that came nearest: the least loss within the cost, and the least cost within the
    loss.

    Raises:
        BadSetting: a time budget without a shape, or with a shape that nothing was timed at.
    """
    choices = [option for option in choices if option.listed or not budget.listed]
    timed = ", ".join(sorted({name for option in choices for name in option.ms})) or "none"
    if budget.max_ms is not None and not budget.shape:
        raise BadSetting(f"a time budget needs a shape (--at SHAPE); timed: {timed}")
    if budget.shape and budget.shape not in timed.split(", "):
        raise BadSetting(f"no time measured at {budget.shape!r}; available: {timed}")
    alive = [option for option in choices if option.verdict != COLLAPSED and option.chosen_by is not None]
    affordable = [option for option in alive if excess(option, budget) <= 1]
    fitting = [option for option in affordable if spares(option, budget)]
    if fitting:
        return Decision(min(fitting, key=lambda option: cost(option, budget)), fitting)
    sparing = [o for o in alive if spares(o, budget) and excess(o, budget) < NOTHING]
    by_loss = min(affordable, key=lambda option: (option.chosen_by, option.key), default=None)
    by_cost = min(sparing, key=lambda o: (excess(o, budget), o.chosen_by, o.key), default=None)
    return Decision(None, [], by_loss, by_cost)


def named(choices: list[Option]) -> Iterator[tuple[float, str | None, Option]]:
    """Yield per margin the listed option that is smallest (shape None), and the fastest at each timed shape;
    nothing where that is the dense model.
    """
    for margin in MARGINS:
        for shape in (None, *choices[0].ratio):
            option = decide(choices, Budget(shape=shape, margin=margin, listed=True)).chosen
            if not option.baseline and (shape is None or option.ratio[shape] < 1):
                yield margin, shape, option


def loss_text(option: Option) -> str:
    """Return the change of the score that the loss is, whose direction the metric says."""
    if option.baseline:
        return "dense"
    sign = -1 if option.higher_is_better else 1
    low, high = sorted((sign * option.loss_low, sign * option.loss_high))
    return change_text(sign * option.loss, low, high, option.unit)


def described(option: Option, budget: Budget) -> str:
    """Return `GPTQ, 4 bits (8.5 MB, 3.1 ms at decode, batch 1; +0.12 PPL [+0.09, +0.15])`."""
    size = "size not measured" if option.bytes is None else bytes_text(option.bytes)
    ms = option.ms.get(budget.shape)
    time = f", {ms:.1f} ms at {shape_name(budget.shape)}" if ms is not None else ""
    if budget.max_peak is not None and option.peak is not None:
        time += f", {option.peak / 1e6:.0f} MB of memory"
    return f"{option.name} ({size}{time}; {loss_text(option)})"


def standing(option: Option, margin: float | None) -> str:
    """Return in words on which examples the option was chosen and whether others confirm it, if asked for."""
    if option.baseline or option.bound is None:
        return ""
    if option.selection_bound is None:
        return "selected and reported on the same examples"
    if margin is None:
        return ""
    return "confirmed on the report set" if option.confirmed(margin) else "not confirmed on the report set"


def explain(decision: Decision, budget: Budget, *, count: int) -> str:
    """Return the decision in sentences: what, and from how many; or what came nearest."""
    if decision.chosen:
        words = standing(decision.chosen, budget.margin)
        text = f"use {described(decision.chosen, budget)}{words and '; ' + words}. "
        return text + f"{len(decision.fitting)} of {count} measured configurations fit."
    text = f"nothing measured fits, of {count} configurations."
    if decision.least_loss:
        text += f" Least loss within the cost: {described(decision.least_loss, budget)}."
    if decision.least_cost:
        text += f" Least cost within the loss: {described(decision.least_cost, budget)}."
    return text


def margin_of(asked: str | None, dense_row: Row) -> float | None:
    """Return a loss asked for, `1%` of the dense quality or `0.5` of the metric's unit, as a share.

    Raises:
        BadSetting: it is no number, or negative.
    """
    if asked is None:
        return None
    number, is_share = asked.strip().removesuffix("%"), asked.strip().endswith("%")
    try:
        loss = float(number)
    except ValueError:
        loss = -1.0
    if not 0 <= loss < NOTHING:
        raise BadSetting(f"--max-loss {asked}: give a share such as 1%, or a number in the metric's unit")
    quality = dense_row["quality"]
    if quality["value"] <= 0:
        raise BadSetting(f"--max-loss {asked}: the dense model's {quality['metric']} is not above 0")
    return loss / 100 if is_share else loss / loss_scale(quality["metric"])[0] / quality["value"]


def answers(
    rows: Iterable[Row], budget: Budget, *, max_loss: str | None = None, model: str = "", task: str = ""
) -> list[tuple[str, bool]]:
    """Return per model and task of the rows a sentence, and whether anything fits.

    Args:
        max_loss: as `margin_of` takes it; replaces the budget's margin.
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
        scored = [row for row in rows if model_task_of(row) == model_task]
        choices = options(scored)
        asked = budget
        try:
            if max_loss is not None:
                asked = replace(budget, margin=margin_of(max_loss, next(filter(is_dense, scored))))
            decision = decide(choices, asked)
        except BadSetting as error:  # this model was not timed there; the others may have been
            untimed.append(error)
            text, fits = str(error), False
        else:
            count = sum(option.listed or not asked.listed for option in choices)
            text, fits = explain(decision, asked, count=count), decision.chosen is not None
        sentences.append((f"{model_task[0]} on {model_task[1]}: {text}", fits))
    if len(untimed) == len(selected):
        raise untimed[0]
    return sentences


def main(arguments: list[str] | None = None) -> int:
    """Answer on the command line; return 1 where nothing measured fits, 2 on a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcompress.study.decision", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--model", default="", help="a model of the rows, or a part of its name; default: all")
    add("--task", default="", help="a task of the rows, or a part of its name")
    add("--max-mb", type=float, help="megabytes (10⁶ bytes) of the written file")
    add("--max-ram-mb", type=float, help="megabytes of memory a fresh process may take, libraries included")
    add("--max-ms", type=float, help="milliseconds per call at the shape of --at")
    add("--at", metavar="SHAPE", help="batch1, batch8, prefill_b1, decode_b8, …; alone: the fastest")
    add(
        "--max-loss",
        help="1%% of the dense quality, or 0.5 of the metric's unit; held to a one-sided 95 %% bound",
    )
    add("--all", action="store_true", help="also what not every model is asked for; the report leaves it out")
    add("--results", type=Path, help="a folder of rows (default: those of report.md)")
    accept_any_encoding()
    asked = parser.parse_args(arguments)
    size, peak = (None if mb is None else mb * 1e6 for mb in (asked.max_mb, asked.max_ram_mb))
    try:
        budget = Budget(size, asked.max_ms, asked.at, None, peak, listed=not asked.all)
        rows = published_rows(asked.results)
        found = answers(rows, budget, max_loss=asked.max_loss, model=asked.model, task=asked.task)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(sentence for sentence, _ in found))
    return 0 if all(fits for _, fits in found) else 1


if __name__ == "__main__":
    sys.exit(main())
