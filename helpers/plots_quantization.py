"""Figures of quantization: quality against bytes, time by backend, and training on rounded weights."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers import plots
from helpers.plots_structured import dense_of

LOSSES = {"train": ("training", "#0072B2", ""), "validation": ("validation", "#D55E00", "o")}


def quantized_rows(rows: list[dict]) -> list[dict]:
    """Rows of a model that was scored and is not the dense one as it was given."""
    return [row for row in rows if row["quality"] and row["technique"] != "dense"]


def timed_rows(rows: list[dict]) -> list[dict]:
    """Rows whose time was measured itself, and not taken from a row of the same shapes."""
    return [row for row in quantized_rows(rows) if row["latency"] and not row["latency"].get("measured_on")]


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
            place = (*plots.subject_of(row), settings.get("bits", 8), settings.get("group_size"))
            both = found.setdefault(place, {False: [], True: []})
            both[settings.get("aware", True)].append(row)
    return found


def tag(settings: dict) -> str:
    """Settings in a few characters: `4/32` is 4 bits in groups of 32, `+E` the embeddings too."""
    bits = settings.get("bits", {"bfloat16": "bf16", "float16": "fp16"}.get(settings.get("dtype"), ""))
    bits = "mix" if isinstance(bits, dict) else str(settings.get("weights", bits))
    group = f"/{settings['group_size']}" if settings.get("group_size") else ""
    return bits + group + ("+E" if settings.get("embeddings") else "")


def quality_by_bytes(rows: list[dict]) -> Figure:
    """One panel per model and task: quality over the bytes of the file, every way in its look, trained ones open."""
    made = quantized_rows(rows)
    pairs = plots.subjects(made)
    figure, axes = plots.panels(len(pairs), height=4.4)
    for axis, pair in zip(axes, pairs, strict=True):
        dense, own = dense_of(rows, pair), [row for row in made if plots.subject_of(row) == pair]
        measured, seen = dense["quality"], set()
        axis.axhspan(measured["low"], measured["high"], color="#000000", alpha=0.10, lw=0)
        if measured["floor"] is not None and any(row["quality"]["collapsed"] for row in own):
            axis.axhline(measured["floor"], color="#7F7F7F", ls=":", lw=1.2, label="Floor")
        for row in [dense, *own]:
            _point(axis, row)
            words = tag(row["settings"])
            if words and (row["technique"], words) not in seen and row["quality"]["value"] is not None:
                seen.add((row["technique"], words))
                place = (row["memory"]["file_bytes"] / 1e6, row["quality"]["value"])
                axis.annotate(words, place, (3, 3), textcoords="offset points", fontsize=6)
        if measured["metric"] == "perplexity":
            axis.set_yscale("log")
        axis.set(title=f"{pair[0]}\n{pair[1]}", xlabel="Bytes of the file (MB, lower is better)")
        axis.set_ylabel(plots.unit(measured["metric"]))
    plots.common_legend(figure, axes, columns=4)
    return figure


def _point(axis: Axes, row: dict) -> None:
    title, colour, marker = plots.look(row["technique"])
    quality, trained = row["quality"], plots.is_recovered(row)
    if row["settings"].get("aware") is False:
        title, marker = "Fine-tuned, then rounded", "o"
    value = quality["value"]
    if value is None:
        return
    axis.errorbar(
        row["memory"]["file_bytes"] / 1e6, value,
        yerr=[[max(0.0, value - quality["low"])], [max(0.0, quality["high"] - value)]],
        color=colour, marker=marker, ls="", elinewidth=0.8, ms=11 if row["technique"] == "dense" else 6,
        mfc="white" if trained else colour, label=title,
    )  # fmt: skip


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
        line[0].set_title(f"{model}\n{line[0].get_title(loc='left')}")
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
        shape, (_, colour, marker) = ratios(row)[work], plots.look(row["technique"])
        floor = shape["noise_floor"] or 0.0
        axis.barh(place, 2 * floor, left=1 - floor, height=0.86, color="#d9d9d9", lw=0)
        spans = [[shape["ratio"] - shape["ratio_low"]], [shape["ratio_high"] - shape["ratio"]]]
        axis.errorbar(shape["ratio"], place, xerr=spans, color=colour, marker=marker, ls="", mew=1.6)
        word = row["verdict"]["latency"][work].replace("no measurable change", "no change")
        text = f"{shape['ratio']:.2f}, {word}"
        axis.annotate(
            text, (shape["ratio"], place), (0, 6), textcoords="offset points", ha="center", fontsize=6
        )
    axis.axvline(1.0, color="#000000", lw=0.8)
    axis.set(xscale="log", ylim=(len(own) - 0.4, -0.8))
    axis.xaxis.set_major_locator(plt.FixedLocator([0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.set_title(plots.SHAPES.get(work, work), fontsize=9)
    labels = [", ".join(filter(None, (plots.look(r["technique"])[0], tag(r["settings"])))) for r in own]
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
            axis.set(xlabel="Step", ylabel="Loss (nats, lower is better)" if not aware else "")
    plots.common_legend(figure, list(axes.flat), columns=2)
    return figure
