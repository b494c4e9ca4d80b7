"""Figures of structured pruning: what heads, channels and blocks are worth, and what their removal saves."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, LogNorm
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import look_of, shape_name
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks

PARTS = {"heads": "Heads kept per attention", "ffn": "Feed-forward channels\nkept per block"}
SHORT = {"heads": "heads", "ffn": "channels"}
SHARES = {
    "products": ("matrix products", "#0072B2"),
    "attention": ("attention", "#E69F00"),
    "rest": ("rest", "#7F7F7F"),
}
TOLERANCE = 0.15  # how far a time ratio may lie from the ratio of FLOPs
LEVELS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def sweep_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of the sweep over heads and channels: those chosen as most rows are."""
    plain = [
        row
        for row in rows
        if row["technique"] == "heads-ffn"
        and row["quality"]
        and not is_recovered(row)
        and row["settings"].get("even", True)
        and row["settings"].get("loss", "task") == "task"
        and not (row["settings"].get("calibration") or {}).get("scored")
    ]
    iterations = [row["settings"].get("n_iters", 1) for row in plain]
    return [
        row for row in plain if row["settings"].get("n_iters", 1) == max(iterations, key=iterations.count)
    ]


def kept(row: dict, dimension: str) -> float:
    """Return the heads per attention, or channels per block, that a row kept: the mean over its blocks."""
    entries = row["achieved"][f"{dimension}_kept"].values()
    return float(
        np.mean([len(kept_units) if isinstance(kept_units, list) else kept_units for kept_units in entries])
    )


def sweep_figure(rows: list[dict]) -> Figure:
    """Draw quality over heads and over channels kept, and the size of the file, a line per model and task."""
    swept = core.scored_frame(sweep_rows(rows))
    for dimension in PARTS:
        swept[dimension] = [kept(row, dimension) for row in swept["row"]]
        swept[f"{dimension}_share"] = [row["settings"].get(dimension) or 1.0 for row in swept["row"]]
    measured = model_tasks(list(swept["row"]))
    shares = sorted({share for dimension in PARTS for share in swept[f"{dimension}_share"]}, reverse=True)
    colours = dict(zip(shares, LEVELS * 3))
    figure, axes = plt.subplots(
        len(measured), 3, figsize=(core.WIDTH, 2.7 * len(measured) + 0.3), squeeze=False
    )
    for line, model_task in zip(axes, measured, strict=True):
        scored, dense = core.of_model_task(swept, model_task), dense_of(rows, model_task)
        for axis, dimension, other in zip(line, PARTS, reversed(PARTS)):
            _sweep_panel(axis, scored, dense, dimension, scored[f"{other}_share"].map(colours))
        _size_panel(line[2], scored, dense)
        core.title(line[0], model_task)
    for share, colour in colours.items():
        name = "nothing else cut" if share == 1 else f"{share:.0%} of the other part kept"
        axes[0][0].plot([], [], "o-", color=colour, label=name)
    core.common_legend(figure, axes.flat, columns=4)
    return figure


def _sweep_panel(axis: Axes, scored: pd.DataFrame, dense: dict, dimension: str, colours: pd.Series) -> None:
    """Draw quality over what was kept of one part, a line per share kept of the other one."""
    whole = _whole(list(scored["row"]), dimension)
    core.dense_band(axis, dense["quality"], x=whole)
    lines = scored.assign(colour=colours, marker="o", name=colours)
    if whole is not None:
        star = core.scored_frame([dense]).assign(colour=LEVELS[0], marker="o", name=LEVELS[0])
        lines = pd.concat([lines, star.assign(**{dimension: whole})])
    core.marks(axis, lines, dimension, named=False)
    axis.set_xlabel(PARTS[dimension])
    core.metric_axis(axis, dense["quality"]["metric"])


def _size_panel(axis: Axes, scored: pd.DataFrame, dense: dict) -> None:
    """Draw the size of the file over the share kept of one part, the other one whole."""
    for dimension, other, look in zip(PARTS, reversed(PARTS), ("o-", "s--")):
        alone = scored[scored[f"{other}_share"] == 1].sort_values(f"{dimension}_share")
        if whole := _whole(list(scored["row"]), dimension):
            x = [*alone[dimension] / whole, 1.0]
            y = [*alone["size_mb"], dense["memory"]["file_bytes"] / 1e6]
            axis.plot(x, y, look, color=core.GREY, label=f"size by {SHORT[dimension]} kept")
    axis.set(
        xlabel="Heads or channels kept\n(fraction)",
        ylabel="Size of the file\n(MB, lower is better)",
        ylim=(0, None),
    )


def _whole(rows: list[dict], dimension: str) -> float | None:
    """Return what a part has uncut: of a row that left it alone, else by the share that a row kept of it."""
    for row in rows:
        if row["settings"].get(dimension) is None:
            return kept(row, dimension)
    shares = [
        (row["settings"][dimension], row) for row in rows if isinstance(row["settings"][dimension], float)
    ]
    return round(kept(shares[0][1], dimension) / shares[0][0]) if shares else None


def importance_maps(rows: list[dict]) -> Figure:
    """Draw the first-order importance of every head, attentions down, heads across, on one log scale."""
    scored = [row for row in rows if row["technique"] == "head-importance"]
    tables = []
    for row in scored:
        attentions = row["achieved"]["attentions"]
        table = pd.DataFrame(
            [attention["heads"] for attention in attentions],
            index=[attention["label"] for attention in attentions],
        )
        tables.append(table.where(table > 0))
    values = pd.concat([table.stack() for table in tables])
    norm = LogNorm(values.min(), max(values.max(), 1.01 * values.min()))
    figure, axes = core.panels(len(scored), height=1.3 + 0.22 * max(map(len, tables)))
    for axis, row, table in zip(axes, scored, tables, strict=True):
        core.heat_map(axis, table, norm, numbers=False)
        axis.set_title(core.short_model(row["model"]))
        axis.set(xlabel="Head", ylabel="")
    core.colour_bar(figure, axes, norm, "Importance |Σ g∘W|\n(nats, log)")
    return figure


def replacement_maps(rows: list[dict]) -> Figure:
    """Draw what the loss gains when block j stands in place of block i, per stack; last line: none does."""
    scans = [row for row in rows if row["technique"] == "block-replacement"]
    figure, axes = core.panels(len(scans), columns=2, height=2.9)
    for axis, row in zip(axes, scans, strict=True):
        scan = row["achieved"]
        change = np.array([*np.array(scan["replaced"]).T, scan["null"]]) - scan["dense"]
        names = [*map(str, range(change.shape[1])), "none"]
        norm = CenteredNorm(0, max(float(np.abs(change).max()), 1e-12))
        core.heat_map(axis, pd.DataFrame(change, names, names[:-1]), norm, cmap="RdBu_r")
        axis.axhline(change.shape[1], color="#000000", lw=1)
        axis.set_title(f"{core.short_model(row['model'])}, {row['settings']['stack']}")
        axis.set(xlabel="Place", ylabel="Block that stands there")
        core.colour_bar(figure, [axis], norm, "Change of the loss (nats)", cmap="RdBu_r")
    return figure


def depth_figure(rows: list[dict]) -> Figure:
    """Draw quality over the number of blocks dropped, before and after recovery."""
    dropped = [row for row in rows if row["technique"] == "drop-blocks" and row["quality"]]
    look, frames = look_of("drop-blocks"), {}
    for model_task in model_tasks(dropped):
        scored = [row for row in rows if row["quality"] and model_task_of(row) == model_task]
        dense = [row for row in scored if row["technique"] == "dense"]
        controls = [row for row in dense if is_recovered(row)][
            :1
        ]  # where the line of the recovered ones begins
        cut = [row for row in dropped if row in scored]
        starts = [dense_of(scored), *(controls if any(map(is_recovered, cut)) else [])]
        frame = core.scored_frame([*starts, *cut]).assign(colour=look.colour, marker=look.marker)
        recovery = frame["open"].map({True: " + recovery", False: ""})
        frame = frame.assign(dropped=frame["row"].map(_gone), name=look.title + recovery)
        control = core.scored_frame(controls).assign(dropped=0) if controls else frame[:0]
        frames[model_task] = pd.concat([frame, control])
    figure = core.quality_panels(frames, rows, "dropped", "Blocks dropped (of all stacks)")
    for axis in figure.axes[: len(frames)]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _gone(row: dict) -> int:
    return sum(len(positions) for positions in row["achieved"].get("dropped", {}).values())


def timed_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Return rows with a measured time, each with the analysis of where that time goes, at the same shape."""

    def matches(row: dict, shares: dict) -> bool:
        asked = [[side["settings"].get(dimension) for dimension in PARTS] for side in (row, shares)]
        timed = row["technique"] == "heads-ffn" and row["latency"] and row["model"] == shares["model"]
        return timed and asked[0] == asked[1] and shares["achieved"]["shape"] in row["latency"]["shapes"]

    profiles = [row for row in rows if row["technique"] == "time-shares"]
    firsts = ((next((row for row in rows if matches(row, shares)), None), shares) for shares in profiles)
    return [(row, shares) for row, shares in firsts if row]


def time_figure(rows: list[dict]) -> Figure:
    """Draw time over FLOPs, both relative to dense, and where the time goes before and after pruning."""
    figure, (by_flops, by_operation) = plt.subplots(1, 2, figsize=(core.WIDTH, 3.9))
    line = np.array([0.0, 1.05])
    by_flops.plot(line, line, color="#000000", lw=1, label="time as FLOPs")
    bounds = line * (1 - TOLERANCE), line * (1 + TOLERANCE)
    by_flops.fill_between(line, *bounds, color=core.NOISE, lw=0, label="±15 %")
    bars = []
    for (row, shares), colour in zip(timed_pairs(rows), LEVELS[1:] * 3):
        profile = shares["achieved"]
        shape = row["latency"]["shapes"][profile["shape"]]
        model, ratio = core.short_model(row["model"]), profile["flops"][1] / profile["flops"][0]
        spans = [[shape["ratio"] - shape["ratio_low"]], [shape["ratio_high"] - shape["ratio"]]]
        name = f"{model}, {shape_name(profile['shape'])}"
        by_flops.errorbar(ratio, shape["ratio"], yerr=spans, color=colour, marker="D", ls="", label=name)
        for label, shares_of_time, scale in zip(
            (f"{model}\ndense", "pruned"), profile["shares"], (1.0, shape["ratio"])
        ):
            bars.append(
                {title: shares_of_time[key] * scale for key, (title, _) in SHARES.items()} | {"bar": label}
            )
    by_flops.set(
        xlim=(0, 1.05),
        ylim=(0, None),
        xlabel="FLOPs / dense FLOPs",
        ylabel="Time / dense time (lower is better)",
    )
    if bars:
        frame = pd.DataFrame(bars).set_index("bar")
        frame.plot.barh(
            stacked=True,
            ax=by_operation,
            color=[colour for _, colour in SHARES.values()],
            width=0.8,
            legend=False,
        )
    by_operation.invert_yaxis()
    by_operation.set(xlabel="Time / dense time, by operation (profiled shares)", ylabel="")
    core.common_legend(figure, [by_flops, by_operation], columns=4)
    return figure
