"""Questions asked of recorded rows, answered here and nowhere else: which is dense, timed, recovered.

A row is the dictionary that `store.RowStore` keeps. Rows are comparable within one model and task.
"""

from collections.abc import Iterable

from lmcompress.results.store import Row

ModelTask = tuple[str, str]


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
