"""Rows that the section of combinations asks for."""

import json
from collections.abc import Callable
from itertools import combinations
from math import fsum

from helpers.report.rows_quantization import tag
from lmcompress.results.labels import look_of
from lmcompress.results.rows import dense_of, model_task_of, smallest_format
from lmcompress.results.verdicts import NO_CHANGE
from lmcompress.stats import TOO_FEW_CALLS

Path = tuple[str, ...]
BUDGETS = (0.25, 0.14, 0.125)  # of the dense bytes
SHORT = {
    "sparsegpt": "SparseGPT",
    "magnitude-layer": "magnitude",
    "heads-ffn": "heads+FFN",
    "low-rank": "low rank",
    "low-rank-aware": "low rank, aware",
    "gptq": "GPTQ",
    "rtn": "rounding",
    "int8-dynamic": "int8",
    "cast": "",
    "qat": "QAT",
    "drop-blocks": "blocks",
}


def steps_of(row: dict) -> list[dict]:
    """The steps that made a row, or one side of a comparison: [] for the dense model."""
    settings = row["settings"]
    if row["technique"] == "chain":
        return [{name: step[name] for name in step if name != "version"} for step in settings["steps"]]
    asked_settings = {name: settings[name] for name in settings if name != "recovery"}
    steps = [] if row["technique"] == "dense" else [{"technique": row["technique"]} | asked_settings]
    return steps + ([{"recovery": settings["recovery"]}] if settings.get("recovery") else [])


def path_of(row: dict) -> Path:
    """Those steps in a form that can be compared and sorted."""
    return tuple(json.dumps(step, sort_keys=True) for step in steps_of(row))


def first_ratio(row: dict) -> float | None:
    """The row's time over the dense model's at its first shape: 1 where that is noise, None if not timed."""
    if row["technique"] == "dense":
        return 1.0
    if not row["latency"]:
        return None
    name, shape = next(iter(row["latency"]["shapes"].items()))
    return 1.0 if row["verdict"]["latency"][name] in (NO_CHANGE, TOO_FEW_CALLS) else shape["ratio"]


def ways(rows: list[dict], model_task: tuple[str, str]) -> dict[Path, list[dict]]:
    """Path -> its scored rows on one model and task, by seed; the dense model left out."""
    by_path: dict[Path, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seed"] or 0):
        if row["quality"] and model_task_of(row) == model_task and (path := path_of(row)):
            by_path.setdefault(path, []).append(row)
    return by_path


def is_single(path: Path) -> bool:
    """Whether a path is one technique and nothing else."""
    return len(path) == 1 and "technique" in json.loads(path[0])


def is_chain(path: Path) -> bool:
    """Whether a path has several steps, at least one of them a technique."""
    return len(path) > 1


def value(by_seed: list[dict]) -> float:
    """The mean quality over seeds, its sign turned where lower is better."""
    sign = 1 if by_seed[0]["quality"]["higher_is_better"] else -1
    return sign * fsum(row["quality"]["value"] for row in by_seed) / len(by_seed)


def size(row: dict) -> int:
    """Bytes of the smallest stored form."""
    return smallest_format(row)[1]


def best_under_budget(
    rows: list[dict], model_task: tuple[str, str], share: float, cost: Callable[[dict], float | None] = size
) -> tuple[list[dict], list[dict]]:
    """The best single technique and the best chain whose cost is at most `share` of the dense model's.

    Args:
        cost: of a row: `size`, or `first_ratio` for the time; None: not measured.

    Returns:
        Rows by seed of each; [] where none fits, or none has a quality that is a number.
    """
    limit, best = share * cost(dense_of(rows, model_task)), []
    for kind in (is_single, is_chain):
        fitting = [
            by_seed
            for path, by_seed in ways(rows, model_task).items()
            if kind(path)
            and all(row["quality"]["value"] is not None for row in by_seed)
            and cost(by_seed[0]) is not None
            and cost(by_seed[0]) <= limit
        ]
        best.append(max(fitting, key=value, default=[]))
    return best[0], best[1]


def families(rows: list[dict], model_task: tuple[str, str]) -> list[Path]:
    """The sets of steps (sorted paths) recorded in several orders; those inside a larger one left out."""
    paths = [path for path in ways(rows, model_task) if is_chain(path)]
    several = sorted({tuple(sorted(a)) for a, b in combinations(paths, 2) if sorted(a) == sorted(b)}, key=len)
    return [
        family
        for position, family in enumerate(several)
        if not any(_within(family, other) for other in several[position + 1 :])
    ]


def _within(path: Path, larger: Path) -> bool:
    return all(path.count(step) <= larger.count(step) for step in path)


def short(step: dict) -> str:
    """A step in a few characters: `GPTQ 4/128+E`."""
    if "recovery" in step:
        return "distil" if step["recovery"].get("teacher") else "tune"
    name = SHORT.get(step["technique"], look_of(step["technique"]).title)
    shares = [step[n] for n in ("sparsity", "heads", "ffn", "rank") if isinstance(step.get(n), float)]
    percentages = "/".join(f"{100 * share:.0f}" for share in shares) + "%" * bool(shares)
    return " ".join(filter(None, [name, percentages, step.get("pattern", ""), tag(step)]))


def label(path: Path) -> str:
    """A path in a few words."""
    return " → ".join(short(json.loads(step)) for step in path)
