"""Figures of combinations: chains of techniques beside single ones, and the same steps in every order.

A row's path is the list of its steps, whether one technique or a chain made it; rows of one path differ by
seed.
"""

import json
from collections.abc import Callable
from itertools import combinations
from math import fsum

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from helpers.figures.quantization import tag
from lmcompress.results.labels import look_of
from lmcompress.results.rows import dense_of, model_task_of, model_tasks, smallest_format
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


def quality_by_bytes(rows: list[dict]) -> Figure:
    """Draw single techniques and chains, each chain joined to the one it goes on from.

    The best single technique and the best chain of every budget of bytes are numbered, and named beside.
    """
    pairs = [
        model_task
        for model_task in model_tasks(rows)
        if any(path_rows[0]["quality"]["difference"] for path_rows in ways(rows, model_task).values())
    ]
    if not pairs:
        return core.empty_figure("Too few examples for differences")
    figure, axes = core.panels(2 * len(pairs), columns=2, height=2.9, width_ratios=(1.5, 1))
    for axis, key, model_task in zip(axes[::2], axes[1::2], pairs, strict=True):
        _bytes_panel(
            axis, key, dense_of(rows, model_task), ways(rows, model_task), _winners(rows, model_task)
        )
        core.title(axis, model_task)
    core.common_legend(figure, axes, columns=4)
    return figure


def _winners(rows: list[dict], model_task: tuple[str, str]) -> set[Path]:
    """Return the best single technique and the best chain of every budget of bytes."""
    return {
        path_of(best[0]) for share in BUDGETS for best in best_under_budget(rows, model_task, share) if best
    }


def _bytes_panel(
    axis: Axes, key: Axes, dense: dict, by_path: dict[Path, list[dict]], winners: set[Path]
) -> None:
    """Draw the paths by bytes, arrows from each to the next step, and name the winners."""
    compared = {path: rows for path, rows in by_path.items() if rows[0]["quality"]["difference"]}
    frame = core.scored_frame([row for rows in compared.values() for row in rows]).dropna(subset=["delta"])
    frame["mb"] = [size(row) / 1e6 for row in frame["row"]]
    chain = look_of("chain")
    chains = [is_chain(path_of(row)) for row in frame["row"]]
    frame.loc[chains, ["name", "colour", "marker"]] = [chain.title, chain.colour, chain.marker]
    first = frame[frame["row"].map(lambda row: row is by_path[path_of(row)][0])]
    core.marks(
        axis, first.assign(low=first["delta_low"], high=first["delta_high"]), "mb", "delta", line=False
    )
    further_seeds = frame.drop(first.index)
    axis.scatter(further_seeds["mb"], further_seeds["delta"], s=6, c=further_seeds["colour"])
    ends = {path_of(line.row): (line.mb, line.delta) for line in first.itertuples()} | {
        (): (size(dense) / 1e6, 0.0)
    }
    for path, end in ends.items():
        begun = any(path == other[:1] != other for other in ends)
        if path and path[:-1] in ends and (is_chain(path) or begun):
            arrow = {"arrowstyle": "->", "color": "#B0B0B0", "lw": 0.8, "shrinkA": 4, "shrinkB": 4}
            axis.annotate("", end, ends[path[:-1]], arrowprops=arrow, zorder=0)
    for share in BUDGETS:
        axis.axvline(share * size(dense) / 1e6, color=core.GREY, ls=":", lw=0.8, label="Budgets of bytes")
    axis.plot(*ends[()], "*", color="#000000", ms=11, label="Dense")
    axis.axhline(0, color="#000000", lw=0.8)
    core.difference_axis(axis, dense["quality"], direction="y", linear_to=1)
    core.log_axis(axis, "x")
    axis.set_xlabel("Smallest stored form (MB, log, lower is better)")
    named = sorted(winners & set(ends), key=lambda path: ends[path])
    core.numbered(axis, key, [ends[path] for path in named], [label(path) for path in named])


def orders_figure(rows: list[dict]) -> Figure:
    """Draw every order of a set of steps, and of some of them, as paired differences to dense by seed."""
    frames = []
    for model_task in model_tasks(rows):
        for family in families(rows, model_task):
            inside = [
                (path, by_seed)
                for path, by_seed in ways(rows, model_task).items()
                if _within(path, family) and by_seed[0]["quality"]["difference"]
            ]
            inside.sort(key=lambda entry: (len(entry[0]), sorted(entry[0]), entry[0]))
            for path, by_seed in inside:
                frame = core.scored_frame(by_seed)
                if is_chain(path):
                    frame = frame.assign(colour=look_of("chain").colour, marker=look_of("chain").marker)
                frames.append(frame.assign(name=label(path)))
    if not frames:
        return core.empty_figure("Too few examples for differences")
    return core.difference_panels(pd.concat(frames), columns=1)
