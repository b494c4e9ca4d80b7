"""What every figure shares: the frame it is drawn from, one look per technique, axes in units.

Figures are drawn from recorded rows, never from live variables, so that notebook and report use the same
functions. Where a figure says nothing else, it has a panel per model and task.

Every figure is `WIDTH` inches wide: on a page of 900 pixels a point of type is then 1.4 pixels, and nothing
is set below 8 points.
"""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import seaborn.objects as so
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lmcompress.results.frame import frame
from lmcompress.results.labels import look_of, metric_name
from lmcompress.results.labels import metric_axis as metric_label
from lmcompress.results.rows import ModelTask, dense_of

STYLE_SHEET = Path(__file__).with_name("study.mplstyle")
WIDTH = 9.0  # inches
ROW = 0.22  # inches of height that one named row of a panel takes
NOISE, GREY = "#d9d9d9", "#7F7F7F"
RATIO_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)


def use_style() -> None:
    """Apply the project's style sheet to every figure made from now on."""
    plt.style.use(STYLE_SHEET)


# None where all rows are of too few examples for an interval: missing numbers to whatever draws them
_ENDS = ("low", "high", "delta", "delta_low", "delta_high")


def scored_frame(rows: Iterable[dict]) -> pd.DataFrame:
    """Return the lines of the tidy frame that have a quality, with how each is drawn and the row it is of.

    Beside the columns of `lmcompress.results.frame.frame`: `colour`, `marker`, `name` (the technique's title,
    `+ recovery` where it was), `open` (trained while or after compressing: drawn open and dashed), `sparsity`
    (0 where nothing was pruned) and `row`.
    """
    rows = [row for row in rows if row["quality"]]
    looks = [look_of(row["technique"], row["settings"]) for row in rows]
    table = frame(rows)
    recovery = [" + recovery" if row["settings"].get("recovery") else "" for row in rows]
    return table.assign(
        colour=[look.colour for look in looks],
        marker=[look.marker for look in looks],
        name=table["title"] + pd.Series(recovery, table.index, dtype=object),
        open=table["recovered"].astype(bool),
        sparsity=[(row["achieved"] or {}).get("sparsity", 0.0) for row in rows],
        row=pd.Series(rows, table.index, dtype=object),
        **{end: table[end].astype(float) for end in _ENDS},
    )


def of_model_task(frame: pd.DataFrame, model_task: ModelTask) -> pd.DataFrame:
    """Return the lines of one model and task."""
    return frame[(frame["model"] == model_task[0]) & (frame["task"] == model_task[1])]


def panels(count: int, *, columns: int = 3, height: float = 2.9, **shared) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels, `columns` to a line, `height` inches each, and its panels."""
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, min(count, columns), figsize=(WIDTH, height * lines + 0.3), squeeze=False, **shared
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def numbered(axis: Axes, key: Axes, points: list[tuple[float, float]], names: list[str]) -> None:
    """Number points of a panel and write their names into the panel `key`, where none can overprint another.

    A number stands above its point, or below if a higher one is within 8 % beside it.
    """
    for number, (x, y) in enumerate(points, 1):
        top = max(height for beside, height in points if 1 / 1.08 < beside / x < 1.08)
        box = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75}
        style = {
            "textcoords": "offset points",
            "fontsize": 8.5,
            "fontweight": "bold",
            "zorder": 7,
            "bbox": box,
        }
        axis.annotate(str(number), (x, y), (-3, 7 if y == top else -15), **style)
    key.set_axis_off()
    lines = [f"{number}  {name}" for number, name in enumerate(names, 1)]
    key.text(0, 1, "\n".join(lines), transform=key.transAxes, va="top", fontsize=8.5, linespacing=1.5)


def row_panels(counts: list[list[int]], **shared) -> tuple[Figure, np.ndarray]:
    """Return a figure whose panels hold named rows, as many as `counts` says, line by line."""
    heights = [0.75 + ROW * max(line) for line in counts]
    size, shape = (WIDTH, sum(heights) + 0.2), (len(counts), len(counts[0]))
    return plt.subplots(*shape, figsize=size, squeeze=False, height_ratios=heights, **shared)


def empty_figure(text: str) -> Figure:
    """Return a figure that says why nothing is drawn."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1))
    axis.text(0.5, 0.5, text, ha="center", va="center", color=GREY)
    axis.set_axis_off()
    return figure


def difference_panels(compared: pd.DataFrame, *, columns: int = 2, linear_to: float = 0.1) -> Figure:
    """Return a figure of paired differences to dense: a panel per model and task, a line per `name`."""
    named = compared.groupby(["model", "task"])["name"].nunique().sort_values(ascending=False, kind="stable")
    measured, counts = list(named.index), list(named)  # the longest first: neighbours are of one height
    lines = [counts[start : start + columns] for start in range(0, len(counts), columns)]
    if not counts:
        return empty_figure("Too few examples for differences")
    figure, axes = row_panels([line + [0] * (min(columns, len(counts)) - len(line)) for line in lines])
    for position, (axis, model_task) in enumerate(zip(axes.flat, measured)):
        differences = of_model_task(compared, model_task)
        axis.axvline(0, color="#000000", lw=0.8)
        named_rows(axis, differences, "delta")
        axis.set_ylim(max(lines[position // columns]) - 0.4, -0.6)
        title(axis, model_task)
        difference_axis(axis, differences["row"].iloc[0]["quality"], linear_to=linear_to)
    for axis in axes.flat[len(measured) :]:
        axis.set_axis_off()
    return figure


def title(axis: Axes, model_task: ModelTask) -> None:
    """Title a panel with its model, without the folder it lies in, and its task."""
    axis.set_title(f"{short_model(model_task[0])}\n{model_task[1]}")


def short_model(model: str) -> str:
    """Return a model's name without the folder or the organisation it comes from."""
    return model.rpartition("/")[2]


def common_legend(figure: Figure, axes: Iterable[Axes], *, columns: int) -> None:
    """Put one legend below the figure for all its panels, each label once; a long one makes it taller."""
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.2 * -(-len(handles) // columns))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def metric_axis(axis: Axes, metric: str, *, direction: str = "y") -> None:
    """Label an axis with a metric's unit and direction; perplexity's is log, and says so."""
    label = metric_label(metric)
    if metric == "perplexity":
        log_axis(axis, direction)
        label = label.replace("(per token,", "(log,")
    axis.set(**{f"{direction}label": label.replace(" (", "\n(") if direction == "y" else label})


def log_axis(axis: Axes, direction: str = "y") -> None:
    """Set a log scale with plain numbers at its ticks: 20, 50, 100, not powers of ten."""
    axis.set(**{f"{direction}scale": "log"})
    line = getattr(axis, f"{direction}axis")
    low, high = line.get_view_interval()
    narrow = high / low < 6  # a decade's ticks at 1, 2 and 5 would leave one or none
    line.set_major_locator(
        ticker.MaxNLocator(4) if narrow else ticker.LogLocator(subs=(1, 2, 5), numticks=12)
    )
    if high / low > 200:
        line.set_major_locator(ticker.LogLocator(numticks=8))
    line.set_major_formatter(lambda number, _: f"{number:,.10g}")
    line.set_minor_locator(ticker.NullLocator())


def difference_axis(
    axis: Axes, quality: dict, *, direction: str = "x", linear_to: float | None = None
) -> None:
    """Label an axis of differences to dense; perplexity's may be symlog, and then says so.

    It is where differences reach over ten times `linear_to`, up to which it stays linear.
    """
    metric = quality["metric"]
    better = "higher" if quality["higher_is_better"] else "lower"
    label = f"Δ {metric_name(metric)} to dense\n({better} is better)"
    line = getattr(axis, f"{direction}axis")
    line.get_major_locator().set_params(nbins=5)
    if metric == "perplexity" and linear_to and max(map(abs, line.get_view_interval())) > 10 * linear_to:
        getattr(axis, f"set_{direction}scale")("symlog", linthresh=linear_to)
        line.set_major_formatter(lambda number, _: f"{number:g}")
        label = label.replace("better)", f"better;\nsymlog, linear within ±{linear_to:g})")
    axis.set(**{f"{direction}label": label})


def dense_band(
    axis: Axes, quality: dict, *, x: float | None = 0.0, direction: str = "y", floor: bool = True
) -> None:
    """Shade the dense model's interval, draw its `floor` as a line and, at `x`, the model as a star."""
    span, line = (axis.axhspan, axis.axhline) if direction == "y" else (axis.axvspan, axis.axvline)
    if quality["low"] is not None:  # else of too few examples for an interval
        span(quality["low"], quality["high"], color="#000000", alpha=0.10, lw=0, label="Dense, 95 % interval")
    if x is not None:
        axis.plot(x, quality["value"], "*", color="#000000", ms=11, label="Dense", zorder=5)
    if floor and quality["floor"] is not None:
        line(quality["floor"], color=GREY, ls=":", lw=1.2, label="Floor: majority class or unigram")


_WRITTEN = {"color": "colour", "marker": "marker", "linestyle": "ls"}  # property of a plot: its column


def marks(
    axis: Axes,
    lines: pd.DataFrame,
    x: str,
    y: str = "value",
    *,
    by: str = "name",
    line: bool = True,
    dodge=(),
    named: bool = True,
) -> None:
    """Draw points with their intervals over `x`, one look per `by`; open and dashed where it was trained.

    Args:
        lines: with `low` and `high`, `colour`, `marker` and `open`.
        line: join the points of one look.
        dodge: columns whose values stand side by side on a categorical axis.
        named: put the looks into the legend.
    """
    points = lines.dropna(subset=[y]).reset_index(drop=True)
    if points.empty:
        return
    points = points.assign(ls=points["open"].map({True: "--", False: "-"}))
    points = points.astype({"low": float, "high": float})
    apart = [so.Dodge(by=list(dodge))] if dodge else []
    plot = so.Plot(points, x=x, y=y, ymin="low", ymax="high", color="colour", group=by)
    plot = plot.add(so.Range(linewidth=1.2), *apart, legend=False)
    dots = so.Dot(pointsize=5, edgewidth=1.2)
    plot = plot.add(dots, *apart, marker="marker", fill="open", legend=False)
    if line:
        plot = plot.add(so.Line(linewidth=1.4), linestyle="ls", legend=False)
    as_written = {
        name: {value: value for value in points[column]}
        for name, column in _WRITTEN.items()
        if line or name != "linestyle"
    }
    plot.scale(**as_written, fill={True: False, False: True}).on(axis).plot()
    for name, group in points.groupby(by, sort=False) if named else ():
        style = point_style(group.iloc[0]) | ({"ls": group["ls"].iloc[0]} if line else {})
        axis.plot([], [], label=name, **style)


def point_style(point: pd.Series) -> dict[str, object]:
    """Return how matplotlib draws a line of the frame as a point."""
    face = "white" if point["open"] else point["colour"]
    return {"color": point["colour"], "marker": point["marker"], "mfc": face, "ls": "", "mew": 1.4}


def quality_panels(
    frames: dict[ModelTask, pd.DataFrame],
    rows: list[dict],
    x: str,
    xlabel: str,
    *,
    columns: int = 4,
    star: float | None = 0.0,
    **style,
) -> Figure:
    """Draw the quality of each model and task over `x` in a panel of its own, over the dense model's band.

    Args:
        columns: of the legend.
        star: where on `x` the dense model stands; without it neither the model nor the floor is drawn.
        style: how `marks` draws.
    """
    figure, axes = panels(len(frames))
    for axis, (model_task, lines) in zip(axes, frames.items(), strict=True):
        dense = dense_of(rows, model_task)["quality"]
        dense_band(axis, dense, x=star, floor=star is not None)
        marks(axis, lines, x, **style)
        title(axis, model_task)
        axis.set_xlabel(xlabel)
        metric_axis(axis, dense["metric"])
    common_legend(figure, axes, columns=columns)
    return figure


def named_panels(
    frames: dict[ModelTask, pd.DataFrame], bands: dict[ModelTask, dict | None], **style
) -> Figure:
    """Draw the quality of each model and task by name, over the interval in `bands`."""
    figure, axes = row_panels([[lines["name"].nunique()] for lines in frames.values()])
    for axis, (model_task, lines) in zip(axes.flat, frames.items(), strict=True):
        if bands[model_task]:
            dense_band(axis, bands[model_task], x=None, direction="x", floor=False)
        named_rows(axis, lines, **style)
        title(axis, model_task)
        metric_axis(axis, lines["metric"].iloc[0], direction="x")
    return figure


def interval_line(axis: Axes, x: list[float], qualities: list[dict], **look) -> None:
    """Draw qualities with their intervals over `x`."""
    ends = np.array(
        [[quality[name] for name in ("value", "low", "high")] for quality in qualities], dtype=float
    )
    spans = [np.maximum(0, ends[:, 0] - ends[:, 1]), np.maximum(0, ends[:, 2] - ends[:, 0])]
    axis.errorbar(x, ends[:, 0], yerr=spans, elinewidth=1.2, **look)


def named_rows(axis: Axes, lines: pd.DataFrame, x: str = "value", *, means: bool = False) -> None:
    """Draw one line per `name`, down the panel: a point with its interval per row, seeds side by side.

    Args:
        x: `value`, or `delta` for the paired difference to dense.
        means: draw a bar at the mean of several seeds.
    """
    low, high = ("low", "high") if x == "value" else (f"{x}_low", f"{x}_high")
    lines = lines.astype({low: float, high: float})  # None where there are too few examples
    names = list(dict.fromkeys(lines["name"]))
    for position, name in enumerate(names):
        group = lines[lines["name"] == name].dropna(subset=[x])
        for seed, (_, point) in enumerate(group.iterrows()):
            spans = [[max(0.0, point[x] - point[low])], [max(0.0, point[high] - point[x])]]
            y = position + 0.2 * (seed - (len(group) - 1) / 2)
            axis.errorbar(point[x], y, xerr=spans, elinewidth=1, **point_style(point))
        if means and len(group) > 1:
            axis.plot(group[x].mean(), position, "|", color=group["colour"].iloc[0], ms=16, mew=1.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(max(len(names), 1) - 0.4, -0.6)


def ratio_frame(timed: list[dict], shape: str, names: list[str]) -> pd.DataFrame:
    """Return the times of rows over the dense model's at one shape, as `ratio_rows` draws them."""
    ratios = frame(timed).reindex(
        columns=[f"{field}.{shape}" for field in ("ratio", "ratio_low", "ratio_high", "noise_floor")]
    )
    ratios.columns = [column.partition(".")[0] for column in ratios]
    looks = [look_of(row["technique"], row["settings"]) for row in timed]
    return ratios.assign(
        name=names, colour=[look.colour for look in looks], marker=[look.marker for look in looks]
    )


def ratio_rows(axis: Axes, lines: pd.DataFrame) -> None:
    """Draw time over dense time per `name`, with its interval, over the shaded noise floor, on a log scale.

    Args:
        lines: name, ratio, ratio_low, ratio_high, noise_floor (fraction), colour, marker; a missing ratio is
            a shape that the variant cannot run.
    """
    for position, line in enumerate(lines.itertuples()):
        if pd.isna(line.ratio):
            axis.text(1.0, position, "cannot run it", ha="center", va="center", fontsize=8, color=GREY)
            continue
        floor = 0.0 if pd.isna(line.noise_floor) else line.noise_floor
        axis.barh(position, 2 * floor, left=1 - floor, height=0.86, color=NOISE, lw=0)
        spans = [[line.ratio - line.ratio_low], [line.ratio_high - line.ratio]]
        axis.errorbar(line.ratio, position, xerr=spans, color=line.colour, marker=line.marker, ls="", mew=1.4)
    axis.axvline(1.0, color="#000000", lw=0.8)
    axis.set_yticks(range(len(lines)), lines["name"])
    axis.set(xscale="log", ylim=(max(len(lines), 1) - 0.4, -0.6))
    axis.margins(x=0.12)
    low_end, high_end = axis.get_xlim()
    ticks = RATIO_TICKS if high_end > 2 * low_end else [step / 10 for step in range(5, 21)]
    axis.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    axis.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axis.xaxis.set_minor_locator(ticker.NullLocator())


def heat_map(
    axis: Axes,
    table: pd.DataFrame,
    norm: Normalize,
    *,
    digits: str = "{:.2f}",
    cmap: str = "cividis",
    numbers: bool = True,
) -> None:
    """Draw a table as a heat map on the scale `norm`; up to eight columns hold `numbers`."""
    annotated = table.map(lambda number: "" if pd.isna(number) else digits.format(number))
    sns.heatmap(
        table,
        ax=axis,
        norm=norm,
        cmap=cmap,
        cbar=False,
        linewidths=0.5,
        annot=annotated if numbers and table.shape[1] <= 8 else None,
        fmt="",
        annot_kws={"fontsize": 8},
    )
    axis.tick_params(rotation=0, length=0)
    axis.grid(False)


def colour_bar(
    figure: Figure, axes: list[Axes], norm: Normalize, label: str, *, cmap: str = "cividis"
) -> None:
    """Put one colour bar beside panels that share a scale."""
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=axes, label=label, pad=0.01)
    bar.ax.yaxis.set_major_formatter(lambda number, _: f"{number:.10g}")
    bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
