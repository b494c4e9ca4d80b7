"""Figures of quantization: quality against bytes, time by backend, and training on rounded weights."""

from functools import partial

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from helpers.figures.pruning import sensitivity_maps
from lmcompress.results.labels import SHAPE_NAMES, metric_name
from lmcompress.results.rows import dense_of, is_recovered, is_timed, model_task_of, model_tasks

CROWDED = 1.03  # bytes over the neighbour's up to which labels would overprint
LOSSES = {"train": ("training", "#0072B2", ""), "validation": ("validation", "#D55E00", "o")}
rounding_maps = partial(sensitivity_maps, technique="sensitivity-bits", level_text="one group at {} bits")


def quantized_rows(rows: list[dict]) -> list[dict]:
    """Rows of a model that was scored and is not the dense one as it was given."""
    return [row for row in rows if row["quality"] and row["technique"] != "dense"]


def timed_rows(rows: list[dict]) -> list[dict]:
    """Rows whose time was measured itself, and not taken from a row of the same shapes."""
    return [row for row in quantized_rows(rows) if is_timed(row)]


def ratios(row: dict) -> dict[str, dict]:
    """The shapes of a row that were timed against the dense model; a backend may lack some."""
    return {
        name: shape
        for name, shape in row["latency"]["shapes"].items()
        if shape and shape["ratio"] is not None
    }


def trained_rows(rows: list[dict]) -> dict[tuple, dict[bool, list[dict]]]:
    """Rows that hold a training curve: (model, task, bits, group) to aware or not to one row per seed."""
    found: dict[tuple, dict[bool, list[dict]]] = {}
    for row in quantized_rows(rows):
        if row["technique"] == "qat" and "curve" in row["achieved"]:
            settings = row["settings"]
            place = (*model_task_of(row), settings.get("bits", 8), settings.get("group_size"))
            both = found.setdefault(place, {False: [], True: []})
            both[settings.get("aware", True)].append(row)
    return found


def tag(settings: dict) -> str:
    """Settings in a few characters: `4/32`: 4 bits in groups of 32; `+E`: embeddings too."""
    bits = settings.get("bits", {"bfloat16": "bf16", "float16": "fp16"}.get(settings.get("dtype"), ""))
    bits = "mix" if isinstance(bits, dict) else str(settings.get("weights", bits))
    group = f"/{settings['group_size']}" if settings.get("group_size") else ""
    return bits + group + "+E" * settings.get("embeddings", False)


def quality_by_bytes(rows: list[dict]) -> Figure:
    """One panel per model and task: the paired difference to dense over the bytes of the file; trained ones open.

    Labels of neighbours stand above and below their intervals by turns.
    """
    made = [row for row in quantized_rows(rows) if row["quality"]["difference"]]
    pairs = model_tasks(made)
    lines, columns = -(-len(pairs) // 2), min(len(pairs), 2)
    figure, axes = plt.subplots(lines, columns, figsize=(6.4 * columns, 4.0 * lines), squeeze=False)
    for axis in axes.flat[len(pairs) :]:
        axis.set_axis_off()
    for axis, pair in zip(axes.flat, pairs):
        dense = dense_of(rows, pair)
        own = sorted((row for row in made if model_task_of(row) == pair), key=_megabytes)
        axis.axhline(0, color="#000000", lw=0.8)
        axis.plot(_megabytes(dense), 0, "*", color="#000000", ms=11, label="Dense")
        places, below = beside([_megabytes(row) for row in own]), False
        for x, last, row in zip(places, [0.0, *places], own):
            below = not below and x < CROWDED * last
            _point(axis, x, row, below=below)
        metric = dense["quality"]["metric"]
        if metric == "perplexity":
            axis.set_yscale("symlog", linthresh=0.1)
        axis.set_xscale("log")
        axis.margins(y=0.14)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set(title=f"{pair[0]} · {pair[1]}", xlabel="Bytes of the file (MB, log, lower is better)")
        way = "higher" if dense["quality"]["higher_is_better"] else "lower"
        axis.set_ylabel(f"Difference of {metric_name(metric)} to dense\n({way} is better)")
    core.common_legend(figure, list(axes.flat), columns=4)
    return figure


def beside(sizes: list[float]) -> list[float]:
    """Where points are drawn: `sizes`, sorted, but those within 1.5 % of the one before spread around their mean."""
    groups: list[list[float]] = []
    for size in sizes:
        if not groups or size > 1.015 * groups[-1][-1]:
            groups.append([])
        groups[-1].append(size)
    middle = [(sum(group) / len(group), len(group)) for group in groups]
    return [
        mean * (1 + 0.013 * (place - (count - 1) / 2)) for mean, count in middle for place in range(count)
    ]


def _megabytes(row: dict) -> float:
    return row["memory"]["file_bytes"] / 1e6


def _point(axis: Axes, x: float, row: dict, *, below: bool) -> None:
    (title, colour, marker), found = (
        core.look(row["technique"], row["settings"]),
        row["quality"]["difference"],
    )
    spans = [[max(0.0, found["value"] - found["low"])], [max(0.0, found["high"] - found["value"])]]
    axis.errorbar(
        x, found["value"], yerr=spans, color=colour, marker=marker, ls="", elinewidth=0.8, capsize=1.5, label=title,
        mfc="white" if is_recovered(row) else colour,
    )  # fmt: skip
    end = min(found["low"], found["value"]) if below else max(found["high"], found["value"])
    axis.annotate(
        tag(row["settings"]),
        (x, end),
        (0, -3 if below else 3),
        textcoords="offset points",
        fontsize=6,
        rotation=90,
        ha="center",
        va="top" if below else "bottom",
        bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.7},
    )


def speed_figure(rows: list[dict]) -> Figure:
    """A line of panels per timed model, a panel per kind of work: time over dense time of every backend.

    Grey is what two copies of the dense model differ by; right of 1 is slower, and each point has its verdict.
    """
    timed = timed_rows(rows)
    models = list(dict.fromkeys(row["model"] for row in timed))
    own = {model: [row for row in timed if row["model"] == model] for model in models}
    work = {
        model: list(dict.fromkeys(name for row in own[model] for name in ratios(row))) for model in models
    }
    columns = max(len(names) for names in work.values())
    heights = [0.75 + 0.42 * len(own[model]) for model in models]
    figure, axes = plt.subplots(
        len(models), columns, figsize=(1.9 + 2.6 * columns, 0.4 + sum(heights)), squeeze=False, sharex=True,
        height_ratios=heights,
    )  # fmt: skip
    for line, model in zip(axes, models, strict=True):
        for place, axis in enumerate(line):
            if place < len(work[model]):
                _speed_panel(axis, own[model], work[model][place], named=place == 0)
            else:
                axis.set_axis_off()
        line[0].set_title(f"{model}\n{line[0].get_title(loc='left')}", fontsize=9)
    figure.supxlabel(
        "Time / dense time (lower is better, log); grey: what two copies of the dense model differ by",
        fontsize=9,
    )
    return figure


def _speed_panel(axis: Axes, own: list[dict], work: str, *, named: bool) -> None:
    for place, row in enumerate(own):
        if work not in ratios(row):
            axis.text(1.0, place, "cannot do it", ha="center", va="center", fontsize=7, color="#7F7F7F")
            continue
        shape, (_, colour, marker) = ratios(row)[work], core.look(row["technique"])
        floor = shape["noise_floor"] or 0.0
        axis.barh(place, 2 * floor, left=1 - floor, height=0.86, color="#d9d9d9", lw=0)
        spans = [[shape["ratio"] - shape["ratio_low"]], [shape["ratio_high"] - shape["ratio"]]]
        axis.errorbar(shape["ratio"], place, xerr=spans, color=colour, marker=marker, ls="")
        word = row["verdict"]["latency"][work].replace("no measurable change", "no change")
        axis.annotate(
            f"{shape['ratio']:.2f}, {word}", (shape["ratio"], place), (0, 6), textcoords="offset points", ha="center",
            fontsize=6, color="#D55E00" if word == "slower" else "#000000",
        )  # fmt: skip
    axis.axvline(1.0, color="#000000", lw=0.8)
    axis.set(xscale="log", ylim=(len(own) - 0.4, -0.8))
    axis.xaxis.set_major_locator(plt.FixedLocator([0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.margins(x=0.15)
    axis.tick_params(labelbottom=True, labelsize=8)
    axis.set_title(SHAPE_NAMES.get(work, work), fontsize=9)
    labels = [", ".join(filter(None, (core.look(r["technique"])[0], tag(r["settings"])))) for r in own]
    axis.set_yticks(range(len(own)), labels if named else [""] * len(own), fontsize=8)


def training_figure(rows: list[dict]) -> Figure:
    """Side by side per model: losses of the run in floating point, and of the one on rounded weights; all seeds."""
    groups = trained_rows(rows)
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(8.6, 0.5 + 2.9 * len(groups)), squeeze=False, sharey="row", sharex="row"
    )
    for line, (place, both) in zip(axes, groups.items(), strict=True):
        model, task, bits, group = place
        for axis, aware in zip(line, (False, True), strict=True):
            for row in both[aware]:
                for name, (title, colour, marker) in LOSSES.items():
                    points = row["achieved"]["curve"].get(name) or []
                    axis.plot(
                        *zip(*points) if points else ([], []), color=colour, marker=marker, ms=3, lw=1, label=title,
                        alpha=1.0 if len(both[aware]) == 1 else 0.7,
                    )  # fmt: skip
            grid = f"{bits} bits" + (f", groups of {group}" if group else "")
            how = f"rounded to {grid} in every step" if aware else "in floating point"
            count = len(both[aware])
            axis.set_title(f"{model}\n{how}, {count} seed{'' if count == 1 else 's'}", fontsize=9)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(xlabel="Step", ylabel="Loss (nats, lower is better)" if not aware else "")
    core.common_legend(figure, list(axes.flat), columns=2)
    return figure
