"""Questions asked of recorded rows, answered here and nowhere else: which is dense, timed, recovered.

A row is the dictionary that `store.RowStore` keeps. Rows are comparable within one model and task.
"""

from collections import Counter
from collections.abc import Iterable
from statistics import median

from lmcompress.results.store import Row, canonical

ModelTask = tuple[str, str]
TIMED_AGAIN = "times-again"  # the technique of rows that hold another row's times, of a process each
NO_CHANGE = "no measurable change"  # of a time, as rows record it
_LEAST, _MOST = ("low_ms", "p5_ms", "ratio_low", "aa_low"), ("high_ms", "p95_ms", "ratio_high", "aa_high")


def model_task_of(row: Row) -> ModelTask:
    """Return the model and the task, within which qualities can be compared."""
    return row["model"], row["task"]


def model_tasks(rows: Iterable[Row]) -> list[ModelTask]:
    """Return the (model, task) pairs of the rows with a measured quality, in order of first appearance."""
    return list(dict.fromkeys(model_task_of(row) for row in rows if row["quality"]))


def scored_rows(rows: Iterable[Row], model_task: ModelTask) -> list[Row]:
    """Return the rows of one model and task that have a measured quality."""
    return [row for row in rows if row["quality"] and model_task_of(row) == model_task]


def by_model_task(rows: Iterable[Row]) -> dict[ModelTask, list[Row]]:
    """Return the rows with a measured quality, grouped by model and task in order of first appearance."""
    groups: dict[ModelTask, list[Row]] = {}
    for row in rows:
        if row["quality"]:
            groups.setdefault(model_task_of(row), []).append(row)
    return groups


def chain_steps(settings: dict[str, object]) -> list[dict]:
    """Return the steps of a chain in a row's settings; none where "steps" is a count or absent."""
    steps = settings.get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list | tuple) else []


def is_recovered(row: Row) -> bool:
    """Return whether the row's model was fine-tuned while or after it was compressed."""
    return any(
        step.get("recovery") or step.get("training")
        for step in (row["settings"], *chain_steps(row["settings"]))
    )


def is_trained(row: Row) -> bool:
    """Return whether compressing itself trained the model, as distillation and QAT do."""
    return any(step.get("training") for step in (row["settings"], *chain_steps(row["settings"])))


def is_dense(row: Row) -> bool:
    """Return whether the row is of the model as it came: not compressed, not trained further."""
    return row["technique"] == "dense" and not is_recovered(row)


def is_timed(row: Row) -> bool:
    """Return whether a row holds times taken of itself, not those of another row of the same shapes."""
    return bool(row["latency"]) and not row["latency"].get("measured_on")


def is_plain(row: Row) -> bool:
    """Return whether a row was pruned to one level everywhere: no N:M pattern, no allocation."""
    return not (row["settings"].get("pattern") or row["settings"].get("allocation"))


def dense_of(rows: Iterable[Row], model_task: ModelTask | None = None) -> Row | None:
    """Return the first scored dense row of a model and task, by default of any; None without one."""
    return next(
        (
            row
            for row in rows
            if row["quality"] and is_dense(row) and model_task in (None, model_task_of(row))
        ),
        None,
    )


def shapes_of(row: Row) -> dict[str, dict]:
    """Return the timed shapes of a row by name; none where it was not timed."""
    return row["latency"]["shapes"] if row["latency"] else {}


def machine_of(row: Row) -> str:
    """Return the name of the machine that a row was measured on."""
    return machine_name(row["provenance"]["machine"])


def machine_name(machine: dict) -> str:
    """Return a machine's processor, with its instructions where they are known: one name is sold with and
    without AVX-512.
    """
    instructions = not machine.get("gpu") and machine.get("instructions")
    return (machine.get("gpu") or machine.get("cpu", "")) + (f", {instructions}" if instructions else "")


def with_times_again(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, without those of `TIMED_AGAIN`; what those timed has the times of all its processes.

    Of each shape the median over the processes, the row's own among them, the widest interval, the largest
    noise floor and the least favourable verdict; of the host, threads and lengths of most of them (of two
    with as many, of the host that took most times of the model).
    "latency" says how many "processes" they were, and of which "machine": the rest of the row is of its own.
    Rows that stand on another's times have its new ones. Fine-tuning changes no shape: the same configuration
    fine-tuned, if it was not timed, has those times too.
    """
    rows, again = list(rows), {}
    for row in rows:
        if row["technique"] == TIMED_AGAIN:
            again.setdefault(row["settings"]["of"], {})[row["key"]] = row
    hosts = Counter((run["model"], _host(run)) for runs in again.values() for run in runs.values())
    rows = [
        _timed_by(row, list(again[row["key"]].values()), hosts) if row["key"] in again else row
        for row in rows
        if row["technique"] != TIMED_AGAIN
    ]
    by_key = {row["key"]: row for row in rows if row["key"] in again}
    by_shape = {_shape_of(row): row for row in by_key.values()}
    sources = [
        by_key.get(row["latency"]["measured_on"]) if row["latency"] else by_shape.get(_shape_of(row))
        for row in rows
    ]
    return [_as_timed(row, source) if source else row for row, source in zip(rows, sources)]


def _shape_of(row: Row) -> str:
    settings = {name: setting for name, setting in row["settings"].items() if name != "recovery"}
    return canonical([row["model"], row["task"], row["technique"], settings])


def _as_timed(row: Row, timed: Row) -> Row:
    latency = timed["latency"] | {"measured_on": timed["key"]}
    return row | {
        "latency": latency,
        "verdict": (row["verdict"] or {}) | {"latency": timed["verdict"]["latency"]},
    }


def _timed_by(row: Row, again: list[Row], hosts: Counter) -> Row:
    runs = [{s["shape"]: s for s in other["achieved"]["shapes"]} for other in again]
    all_conditions = [
        _conditions(other, other["achieved"]["threads"], run) for other, run in zip(again, runs)
    ]
    counts = Counter(all_conditions)
    usual = max(counts, key=lambda conditions: (counts[conditions], hosts[row["model"], conditions[0]]))
    again = [other for other, conditions in zip(again, all_conditions) if conditions == usual]
    runs = [run for run, conditions in zip(runs, all_conditions) if conditions == usual]
    if (
        is_timed(row) and _conditions(row, row["latency"]["threads"], shapes_of(row)) == usual
    ):  # the first process
        speeds = row["verdict"]["latency"]
        runs.append({name: shape | {"speed": speeds[name]} for name, shape in shapes_of(row).items()})
    by_shape: dict[str, list[dict]] = {}
    for run in runs:
        for name, shape in run.items():
            by_shape.setdefault(name, []).append(shape)
    shapes = {name: _pooled(runs) for name, runs in by_shape.items()}
    speeds = {name: shape.pop("speed") for name, shape in shapes.items()}
    about = {name: again[0]["achieved"][name] for name in ("device", "dtype", "threads", "calls")}
    about |= {"machine": again[0]["provenance"]["machine"]}
    return row | {
        "latency": about | {"measured_on": None, "processes": len(runs), "shapes": shapes},
        "verdict": (row["verdict"] or {}) | {"latency": speeds},
    }


def _host(row: Row) -> tuple:
    """Return what tells machines of one name apart: two of them may differ by twice in the same call."""
    machine = row["provenance"]["machine"]
    return machine_of(row), machine.get("os"), machine.get("memory_bytes")


def _conditions(row: Row, threads: int, shapes: dict[str, dict]) -> tuple:
    """Return what times have to share to be of one thing: host, threads, and the length of each shape."""
    return _host(row), threads, tuple(sorted((name, shape["length"]) for name, shape in shapes.items()))


def _pooled(runs: list[dict]) -> dict:
    names = [name for name in runs[0] if name not in ("shape", "speed")]
    pooling = dict.fromkeys(_LEAST, min) | dict.fromkeys((*_MOST, "noise_floor"), max)
    pooled = {name: pooling.get(name, median)([run[name] for run in runs]) for name in names}
    speeds = {run["speed"] for run in runs}
    return pooled | {"speed": min(speeds, key=lambda speed: (speed != "slower", speed == "faster"))}
