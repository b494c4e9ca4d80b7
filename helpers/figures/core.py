"""Figures drawn from recorded rows, never from live variables: the same function serves notebook and report.

One colour and marker per technique wherever it appears; intervals are drawn, and the noise floor is shaded.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmcompress.results.labels import SHAPE_NAMES, look_of, metric_axis
from lmcompress.results.rows import is_plain, is_recovered, is_timed, model_task_of, model_tasks

STYLE_SHEET = Path(__file__).with_name("study.mplstyle")

FORMATS = {  # storage format: (title, colour, break-even sparsity by arithmetic in fp32)
    "dense": ("dense", "#000000", None),
    "dense_zstd": ("dense + zstd", "#E69F00", None),
    "bitmask": ("bitmask + values", "#0072B2", 1 / 32),
    "csr_int32": ("CSR, int32 indices", "#009E73", 1 / 2),
    "csr_int64": ("CSR, int64 indices", "#CC79A7", 2 / 3),
    "bitmask_integers": ("bitmask + packed integers", "#56B4E9", None),
}
KERNELS = {  # kernel of one linear map: (title, colour)
    "dense_fp32": ("dense fp32", "#000000"),
    "dense_bf16": ("dense bf16", "#E69F00"),
    "csr": ("CSR, drop-in", "#009E73"),
    "csr_matmul": ("CSR, product alone", "#CC79A7"),
    "semi_structured": ("2:4, semi-structured", "#56B4E9"),
    "rows_removed": ("rows removed", "#0072B2"),
}
LEGEND_LINE = 0.22  # inches


def use_style() -> None:
    """Apply the project's style sheet to every figure made from now on."""
    plt.style.use(STYLE_SHEET)


def look(technique: str, settings: dict | None = None) -> tuple[str, str, str]:
    """Title, colour and marker of a technique; an unknown one is drawn grey under its own name.

    With `settings`, a student that no teacher taught is not called distilled, nor rounding after training aware of it.
    """
    known = look_of(technique, settings)
    return known.title, known.colour, known.marker


def panels(count: int, *, height: float = 3.9, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, three to a line, `height` inches each; returns the panels in reading order."""
    columns, lines = min(count, 3), -(-count // 3)
    size = (4.2 * columns, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=share_y)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def common_legend(figure: Figure, axes: list[Axes], *, columns: int) -> None:
    """One legend below the figure for the labels of all its panels, each once; the figure grows with a long one."""
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_LINE * max(0, -(-len(handles) // columns) - 3))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def quality_against_sparsity(rows: list[dict]) -> Figure:
    """One panel per model and task: quality over achieved sparsity, a line per rule, dashed if recovered."""
    pairs = model_tasks(rows)
    figure, axes = panels(len(pairs))
    for axis, pair in zip(axes, pairs, strict=True):
        own = [row for row in rows if row["quality"] and model_task_of(row) == pair and is_plain(row)]
        dense = next(row for row in own if row["technique"] == "dense" and not is_recovered(row))
        dense_band(axis, dense)
        for name in dict.fromkeys(row["technique"] for row in own if row["technique"] != "dense"):
            for recovered in (False, True):
                _line(axis, own, dense, name, recovered)
        if dense["quality"]["metric"] == "perplexity":
            axis.set_yscale("log")
        axis.set(title=f"{pair[0]}\n{pair[1]}", xlabel="Achieved sparsity (fraction of prunable weights)")
        axis.set_ylabel(metric_axis(dense["quality"]["metric"]))
    common_legend(figure, axes, columns=3)
    return figure


def dense_band(axis: Axes, dense: dict) -> None:
    """The dense model as a star at 0 with its interval as a band, and the floor of the metric as a line."""
    quality = dense["quality"]
    axis.axhspan(quality["low"], quality["high"], color="#000000", alpha=0.10, lw=0)
    axis.plot(
        [0], [quality["value"]], "*", color="#000000", ms=11, label="Dense, 95 % interval shaded", zorder=5
    )
    if quality["floor"] is not None:
        axis.axhline(
            quality["floor"], color="#7F7F7F", ls=":", lw=1.2, label="Floor: majority class or unigram"
        )


def _line(axis: Axes, own: list[dict], dense: dict, name: str, recovered: bool) -> None:
    chosen = [row for row in own if row["technique"] == name and is_recovered(row) == recovered]
    control = next((row for row in own if row["technique"] == "dense" and is_recovered(row)), None)
    if recovered and control:  # one budget of fine-tuning in one line: the control's
        budget = control["settings"]["recovery"]
        chosen = [row for row in chosen if row["settings"].get("recovery", budget) == budget]
    if not chosen:
        return
    title, colour, marker = look(name)
    chosen = sorted(chosen, key=lambda row: row["achieved"]["sparsity"])
    x = [row["achieved"]["sparsity"] for row in chosen]
    y = [row["quality"]["value"] for row in chosen]
    spans = [[max(0.0, row["quality"]["value"] - row["quality"]["low"]) for row in chosen],
             [max(0.0, row["quality"]["high"] - row["quality"]["value"]) for row in chosen]]  # fmt: skip
    axis.errorbar(
        x, y, yerr=spans, color=colour, marker=marker, ls="--" if recovered else "-",
        mfc="white" if recovered else colour,
        label=title + (" + recovery" if chosen[0]["settings"].get("recovery") else ""),
    )  # fmt: skip


def latency_ratios(rows: list[dict], name_of: Callable[[dict], str] | None = None) -> Figure:
    """Time of a variant over time of the dense model, per shape, with the A/A noise floor shaded.

    `name_of` names a row's variant; by default its technique does.
    """
    timed = [row for row in rows if is_timed(row)]
    entries = [
        (
            f"{row['model']}, {name_of(row) if name_of else look(row['technique'])[0].lower()}: {SHAPE_NAMES.get(name, name)}",
            shape,
            row["technique"],
        )
        for row in timed
        if row["technique"] != "dense"
        for name, shape in row["latency"]["shapes"].items()
    ]
    figure, axis = plt.subplots(figsize=(8.6, 0.8 + 0.34 * max(len(entries), 1)))
    for position, (_, shape, technique) in enumerate(entries):
        floor = shape["noise_floor"]
        axis.barh(position, 2 * floor, left=1 - floor, height=0.86, color="#d9d9d9", lw=0)
        _, colour, marker = look(technique)
        spans = [[shape["ratio"] - shape["ratio_low"]], [shape["ratio_high"] - shape["ratio"]]]
        axis.errorbar(shape["ratio"], position, xerr=spans, color=colour, marker=marker, ls="")
    axis.axvline(1.0, color="#000000", lw=0.8)
    axis.set_yticks(range(len(entries)), [label for label, _, _ in entries])
    axis.invert_yaxis()
    axis.set_xlabel("Time / dense time (lower is better); grey: what two copies of the dense model differ by")
    return figure
