"""Figures of combinations: chains of techniques beside single ones, and the same steps in every order.

A row's path is the list of its steps, whether one technique or a chain made it; rows of one path differ by their seed.
"""

import json
from collections.abc import Callable
from itertools import combinations, groupby
from math import fsum

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from helpers.figures.quantization import beside, tag
from lmcompress.results.labels import metric_name
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks, smallest_format

Path = tuple[str, ...]
BUDGETS = (0.25, 0.14, 0.125)  # of the dense bytes
SHORT = {
    "sparsegpt": "SparseGPT", "magnitude-layer": "magnitude", "heads-ffn": "heads+FFN", "low-rank": "low rank", "low-rank-aware": "low rank, aware",
    "gptq": "GPTQ", "rtn": "rounding", "int8-dynamic": "int8", "cast": "", "qat": "QAT", "drop-blocks": "blocks",
}  # fmt: skip


def steps_of(part: dict) -> list[dict]:
    """The steps that made a row, or one side of a comparison: [] for the dense model."""
    settings = part["settings"]
    if part["technique"] == "chain":
        return [{name: step[name] for name in step if name != "version"} for step in settings["steps"]]
    own = {name: settings[name] for name in settings if name != "recovery"}
    found = [] if part["technique"] == "dense" else [{"technique": part["technique"]} | own]
    return found + ([{"recovery": settings["recovery"]}] if settings.get("recovery") else [])


def path_of(part: dict) -> Path:
    """Those steps in a form that can be compared and sorted."""
    return tuple(json.dumps(step, sort_keys=True) for step in steps_of(part))


def first_ratio(row: dict) -> float | None:
    """The row's time over the dense model's at its first shape: 1 where that is noise, None if not timed."""
    if row["technique"] == "dense":
        return 1.0
    if not row["latency"]:
        return None
    name, shape = next(iter(row["latency"]["shapes"].items()))
    return 1.0 if row["verdict"]["latency"][name] == "no measurable change" else shape["ratio"]


def ways(rows: list[dict], pair: tuple[str, str]) -> dict[Path, list[dict]]:
    """Path -> its scored rows on one model and task, by seed; the dense model left out."""
    found: dict[Path, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seed"] or 0):
        if row["quality"] and model_task_of(row) == pair and (path := path_of(row)):
            found.setdefault(path, []).append(row)
    return found


def is_single(path: Path) -> bool:
    """Whether a path is one technique and nothing else."""
    return len(path) == 1 and "technique" in json.loads(path[0])


def is_chain(path: Path) -> bool:
    """Whether a path has several steps, at least one of them a technique."""
    return len(path) > 1


def value(own: list[dict]) -> float:
    """The mean quality over seeds, its sign turned where lower is better."""
    sign = 1 if own[0]["quality"]["higher_is_better"] else -1
    return sign * fsum(row["quality"]["value"] for row in own) / len(own)


def size(row: dict) -> int:
    """Bytes of the smallest stored form."""
    return smallest_format(row)[1]


def best_under_budget(
    rows: list[dict], pair: tuple[str, str], share: float, cost: Callable[[dict], float | None] = size
) -> tuple[list[dict], list[dict]]:
    """The best single technique and the best chain whose cost is at most `share` of the dense model's.

    Args:
        cost: of a row: `size`, or `first_ratio` for the time; None: not measured.

    Returns:
        Rows by seed of each; [] where none fits, or none has a quality that is a number.
    """
    limit, best = share * cost(dense_of(rows, pair)), []
    for kind in (is_single, is_chain):
        fitting = [
            own for path, own in ways(rows, pair).items()
            if kind(path) and all(row["quality"]["value"] is not None for row in own)
            and cost(own[0]) is not None and cost(own[0]) <= limit
        ]  # fmt: skip
        best.append(max(fitting, key=value, default=[]))
    return best[0], best[1]


def families(rows: list[dict], pair: tuple[str, str]) -> list[Path]:
    """The sets of steps (sorted paths) recorded in several orders; those inside a larger one left out."""
    paths = [path for path in ways(rows, pair) if is_chain(path)]
    several = sorted({tuple(sorted(a)) for a, b in combinations(paths, 2) if sorted(a) == sorted(b)}, key=len)
    return [
        one
        for place, one in enumerate(several)
        if not any(_within(one, other) for other in several[place + 1 :])
    ]


def _within(path: Path, larger: Path) -> bool:
    return all(path.count(step) <= larger.count(step) for step in path)


def short(step: dict) -> str:
    """A step in a few characters: `GPTQ 4/128+E`."""
    if "recovery" in step:
        return "distil" if step["recovery"].get("teacher") else "tune"
    name = SHORT.get(step["technique"], core.look(step["technique"])[0])
    shares = [step[n] for n in ("sparsity", "heads", "ffn", "rank") if isinstance(step.get(n), float)]
    kept = "/".join(f"{100 * share:.0f}" for share in shares) + "%" * bool(shares)
    return " ".join(filter(None, [name, kept, step.get("pattern", ""), tag(step)]))


def label(path: Path) -> str:
    """A path in a few words."""
    return " → ".join(short(json.loads(step)) for step in path)


def quality_by_bytes(rows: list[dict]) -> Figure:
    """One panel per model and task: single techniques and chains, each chain joined to the one it goes on from."""
    pairs = [pair for pair in model_tasks(rows) if ways(rows, pair)]
    lines, columns = -(-len(pairs) // 2), min(len(pairs), 2)
    figure, axes = plt.subplots(lines, columns, figsize=(6.6 * columns, 4.8 * lines), squeeze=False)
    for axis in axes.flat[len(pairs) :]:
        axis.set_axis_off()
    for axis, pair in zip(axes.flat, pairs):
        _bytes_panel(axis, dense_of(rows, pair), ways(rows, pair), _winners(rows, pair))
        axis.set_title(f"{pair[0]} · {pair[1]}")
    core.common_legend(figure, list(axes.flat), columns=4)
    return figure


def _winners(rows: list[dict], pair: tuple[str, str]) -> set[Path]:
    """The best single technique and the best chain of every budget of bytes."""
    return {path_of(own[0]) for share in BUDGETS for own in best_under_budget(rows, pair, share) if own}


def _bytes_panel(axis: Axes, dense: dict, found: dict[Path, list[dict]], winners: set[Path]) -> None:
    shown = {path: own for path, own in found.items() if own[0]["quality"]["difference"]}
    order = sorted(shown, key=lambda path: size(shown[path][0]))
    places = dict(zip(order, beside([size(shown[path][0]) / 1e6 for path in order]), strict=True))
    ends = {path: (places[path], shown[path][0]["quality"]["difference"]["value"]) for path in order}
    ends[()] = (size(dense) / 1e6, 0.0)
    for path in order:
        if path[:-1] in ends and (is_chain(path) or any(path == other[:1] != other for other in order)):
            arrow = {"arrowstyle": "->", "color": "#B0B0B0", "lw": 0.8, "shrinkA": 3, "shrinkB": 3}
            axis.annotate("", ends[path], ends[path[:-1]], arrowprops=arrow, zorder=0)
        _point(axis, ends[path][0], shown[path], path)
    for path in winners & set(order):
        axis.annotate(
            label(path), ends[path], (4, 0), textcoords="offset points", fontsize=6, va="center",
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7},
        )  # fmt: skip
    for share in BUDGETS:
        axis.axvline(share * size(dense) / 1e6, color="#7F7F7F", ls=":", lw=0.8, label="Budgets of bytes")
    axis.plot(*ends[()], "*", color="#000000", ms=11, label="Dense")
    axis.axhline(0, color="#000000", lw=0.8)
    quality = dense["quality"]
    if quality["metric"] == "perplexity":
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axis.set_xscale("log")
    for line in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        line(lambda number, _: f"{number:g}")
    axis.tick_params(axis="x", which="both", labelsize=7)
    axis.set_xlabel("Smallest stored form (MB, log, lower is better)")
    way = "higher" if quality["higher_is_better"] else "lower"
    axis.set_ylabel(f"Difference of {metric_name(quality['metric'])} to dense ({way} is better)")


def _point(axis: Axes, x: float, own: list[dict], path: Path) -> None:
    """The first seed with its interval, the others as dots."""
    found = own[0]["quality"]["difference"]
    title, colour, marker = core.look("chain" if is_chain(path) else own[0]["technique"])
    title += ", trained on" if own[0]["technique"] == "dense" else ""
    spans = [[max(0.0, found["value"] - found["low"])], [max(0.0, found["high"] - found["value"])]]
    axis.errorbar(
        x, found["value"], yerr=spans, color=colour, marker=marker, ls="", ms=5, elinewidth=0.8, capsize=1.5,
        label=title, mfc="white" if is_recovered(own[0]) else colour,
    )  # fmt: skip
    others = [row["quality"]["difference"]["value"] for row in own[1:] if row["quality"]["difference"]]
    axis.plot([x] * len(others), others, ".", color=colour, ms=3)


def orders_figure(rows: list[dict]) -> Figure:
    """A panel per set of steps: every order of them, and of some of them, as paired differences to dense by seed."""
    panels = [(pair, family) for pair in model_tasks(rows) for family in families(rows, pair)]
    columns = min(2, len(panels))
    rest = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    inside = {one: _inside(rows, *one) for one in panels}
    heights = [0.9 + 0.3 * max(len(inside[one]) for one in line) for line in rest]
    figure, axes = plt.subplots(
        len(rest), columns, figsize=(7.4 * columns, sum(heights) + 0.3), squeeze=False, height_ratios=heights
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, one in zip(axes.flat, panels):
        _orders_panel(axis, inside[one])
        quality = dense_of(rows, one[0])["quality"]
        axis.set_title(f"{one[0][0]} · {one[0][1]}", fontsize=9)
        way = "higher" if quality["higher_is_better"] else "lower"
        axis.set_xlabel(f"Difference of {metric_name(quality['metric'])} to dense ({way} is better)")
    return figure


def _inside(rows: list[dict], pair: tuple[str, str], family: Path) -> list[tuple[Path, list[dict]]]:
    found = ways(rows, pair).items()
    chosen = [one for one in found if _within(one[0], family) and one[1][0]["quality"]["difference"]]
    return sorted(chosen, key=lambda one: (len(one[0]), sorted(one[0]), one[0]))


def _orders_panel(axis: Axes, lines: list[tuple[Path, list[dict]]]) -> None:
    for place, (path, own) in enumerate(lines):
        name = own[0]["technique"] if not is_chain(path) else "chain"
        _, colour, marker = core.look(name)
        for seed, row in enumerate(own):
            found = row["quality"]["difference"]
            spans = [[max(0.0, found["value"] - found["low"])], [max(0.0, found["high"] - found["value"])]]
            y = place + 0.22 * (seed - (len(own) - 1) / 2)
            axis.errorbar(
                found["value"],
                y,
                xerr=spans,
                color=colour,
                marker=marker,
                ls="",
                ms=4,
                elinewidth=0.8,
                capsize=1.5,
            )
    axis.axvline(0, color="#000000", lw=0.8)
    edge = 0
    for _, same in groupby(lines, key=lambda one: sorted(one[0])):
        edge += len(list(same))
        axis.axhline(edge - 0.5, color="#D9D9D9", lw=0.6)
    axis.set_yticks(range(len(lines)), [label(path) for path, _ in lines], fontsize=8)
    axis.set_ylim(len(lines) - 0.4, -0.6)
