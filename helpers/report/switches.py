"""What each switch of the training recipe changes, from runs that took turns with the baseline."""

from collections.abc import Iterable
from statistics import median

from helpers.report import values
from lmcompress.results.store import Row, canonical

ROUNDS = 3  # of the same switch, below which its time is noise
FIGURES = ("Step time / baseline", "Peak memory / baseline", "Loss − baseline")


def table(rows: Iterable[Row]) -> str:
    """Return per switch its `effects` as a table; a sentence where none ran `ROUNDS` times; "" without any.

    A round is a seed: the baseline and every switch, one after the other, so that drift hits all alike.
    """
    rows = [row for row in rows if row["technique"] == "switch"]
    lines = [
        [values.model_name(model), switch, str(len(rounds)), *map(_spread, zip(*rounds))]
        for (model, switch), rounds in effects(rows).items()
        if len(rounds) >= ROUNDS
    ]
    if not lines:
        sentence = f"Switches of the training recipe ran fewer than {ROUNDS} times each: "
        return f"{sentence}what they cost cannot be told." if rows else ""
    return values.table(["Model", "Switch", "Rounds", *FIGURES], lines)


def effects(rows: Iterable[Row]) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """Return by model and switch, per round, the `FIGURES` against the baseline of that round."""
    rounds: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        shared = {name: setting for name, setting in row["settings"].items() if name != "switch"}
        rounds.setdefault((row["model"], canonical(shared)), {})[row["settings"]["switch"]] = row["achieved"]
    changes: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for (model, _), runs in rounds.items():
        baseline = runs.pop("baseline", None)
        for switch, run in runs.items() if baseline else ():
            ratios = [run[name] / baseline[name] for name in ("step_ms", "peak_bytes")]
            changes.setdefault((model, switch), []).append((*ratios, run["loss"] - baseline["loss"]))
    return changes


def _spread(column: Iterable[float]) -> str:
    column = list(column)
    return f"{median(column):.2f} [{min(column):.2f}, {max(column):.2f}]"
