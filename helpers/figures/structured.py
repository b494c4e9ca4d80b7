"""Figures of structured pruning: what heads and channels are worth, and what their removal saves."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import SHAPE_NAMES, metric_axis
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks

PARTS = {"heads": "Heads kept per attention", "ffn": "Feed-forward channels kept per block"}
SHARES = {
    "products": ("matrix products", "#0072B2"),
    "attention": ("attention", "#E69F00"),
    "rest": ("rest", "#7F7F7F"),
}
TOLERANCE = 0.15  # how far a time ratio may lie from the ratio of FLOPs
LEVELS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def sweep_rows(rows: list[dict]) -> list[dict]:
    """The rows of the sweep over heads and channels: one way of choosing, the one that most rows have."""
    plain = [
        row for row in rows
        if row["technique"] == "heads-ffn" and row["quality"] and not is_recovered(row)
        and row["settings"].get("even", True) and row["settings"].get("loss", "task") == "task"
        and not (row["settings"].get("calibration") or {}).get("scored")
    ]  # fmt: skip
    iterations = [row["settings"].get("n_iters", 1) for row in plain]
    return [
        row for row in plain if row["settings"].get("n_iters", 1) == max(iterations, key=iterations.count)
    ]


def kept(row: dict, part: str) -> float:
    """Heads per attention, or channels per block, that a row kept: the mean over its blocks."""
    entries = row["achieved"][f"{part}_kept"].values()
    return float(np.mean([len(one) if isinstance(one, list) else one for one in entries]))


def sweep_figure(rows: list[dict]) -> Figure:
    """A line of panels per model and task: quality and size over the heads kept, then over the channels kept."""
    swept = sweep_rows(rows)
    pairs = model_tasks(swept)
    figure, axes = plt.subplots(len(pairs), 4, figsize=(13.0, 3.2 * len(pairs)), squeeze=False)
    for line, pair in zip(axes, pairs, strict=True):
        own = [row for row in swept if model_task_of(row) == pair]
        dense = dense_of(rows, pair)
        for place, part in enumerate(PARTS):
            quality, size = line[2 * place : 2 * place + 2]
            _sweep_panels(quality, size, own, dense, part)
        line[0].set_title(f"{pair[0]} · {pair[1]}", loc="left")
    return figure


def _sweep_panels(quality: Axes, size: Axes, own: list[dict], dense: dict, part: str) -> None:
    other = "ffn" if part == "heads" else "heads"
    whole = _whole(own, part)
    levels = sorted({row["settings"].get(other) or 1.0 for row in own}, reverse=True)
    measured = dense["quality"]
    quality.axhspan(measured["low"], measured["high"], color="#000000", alpha=0.1, lw=0)
    if measured["floor"] is not None:
        quality.axhline(measured["floor"], color="#7F7F7F", ls=":", lw=1.2)
    if whole is not None:
        quality.plot(whole, measured["value"], "*", color="#000000", ms=11, zorder=5)
        size.plot(whole, dense["memory"]["file_bytes"] / 1e6, "*", color="#000000", ms=11, zorder=5)
    for level, colour in zip(levels, LEVELS * 3):
        line = [row for row in own if (row["settings"].get(other) or 1.0) == level]
        line = sorted(line, key=lambda row: kept(row, part))
        x = [kept(row, part) for row in line]
        if level == 1 and whole is not None:
            line, x = [*line, dense], [*x, whole]
        what = "FFN" if other == "ffn" else "heads"
        label = f"{what} whole" if level == 1 else f"{level:.0%} of the {what}"
        _errorbar(quality, x, line, color=colour, marker="o", label=label)
        size.plot(
            x, [row["memory"]["file_bytes"] / 1e6 for row in line], marker="o", color=colour, label=label
        )
    if measured["metric"] == "perplexity":
        quality.set_yscale("log")
    quality.set(xlabel=PARTS[part], ylabel=metric_axis(measured["metric"]))
    size.set(xlabel=PARTS[part], ylabel="Size of the file (MB, lower is better)")
    size.legend(fontsize=6)


def _whole(own: list[dict], part: str) -> float | None:
    """What a part has uncut: of a row that left it alone, else by the share that a row kept of it."""
    for row in own:
        if row["settings"].get(part) is None:
            return kept(row, part)
    shares = [(row["settings"][part], row) for row in own if isinstance(row["settings"][part], float)]
    return round(kept(shares[0][1], part) / shares[0][0]) if shares else None


def _errorbar(axis: Axes, x: list[float], rows: list[dict], **look) -> None:
    found = [row["quality"] for row in rows]
    y = [one["value"] for one in found]
    spans = [[max(0.0, one["value"] - one["low"]) for one in found],
             [max(0.0, one["high"] - one["value"]) for one in found]]  # fmt: skip
    axis.errorbar(x, y, yerr=spans, **look)


def importance_maps(rows: list[dict]) -> Figure:
    """Per model: the first-order importance of every head, attentions down, heads across."""
    scored = [row for row in rows if row["technique"] == "head-importance"]
    figure, axes = core.panels(len(scored), height=3.6)
    for axis, row in zip(axes, scored, strict=True):
        entries = row["achieved"]["attentions"]
        grid = np.full((len(entries), max(len(one["heads"]) for one in entries)), np.nan)
        for line, one in zip(grid, entries, strict=True):
            line[: len(one["heads"])] = one["heads"]
        grid[grid <= 0] = np.nan
        image = axis.imshow(grid, cmap="cividis", aspect="auto", norm=LogNorm())
        axis.set_yticks(range(len(entries)), [one["label"] for one in entries])
        axis.set(title=row["model"], xlabel="Head")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="Importance |Σ g∘W| (nats, log)")
    return figure


def replacement_maps(rows: list[dict]) -> Figure:
    """Per model and stack: what the loss gains when block j stands in place of block i; last line: none does."""
    found = [row for row in rows if row["technique"] == "block-replacement"]
    figure, axes = core.panels(len(found), height=4.0)
    for axis, row in zip(axes, found, strict=True):
        made = row["achieved"]
        grid = np.array([*np.array(made["replaced"]).T, made["null"]]) - made["dense"]
        limit = max(float(np.abs(grid).max()), 1e-12)
        image = axis.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        if grid.shape[1] <= 8:
            for (y, x), value in np.ndenumerate(grid):
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=6)
        blocks = grid.shape[1]
        axis.axhline(blocks - 0.5, color="#000000", lw=1)
        axis.set_xticks(range(blocks))
        axis.set_yticks(range(blocks + 1), [*map(str, range(blocks)), "none"])
        axis.set(
            title=f"{row['model']}\n{row['settings']['stack']}",
            xlabel="Place",
            ylabel="Block that stands there",
        )
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="Change of the loss (nats)")
    return figure


def depth_figure(rows: list[dict]) -> Figure:
    """One panel per model and task: quality over the number of blocks dropped, before and after recovery."""
    dropped = [row for row in rows if row["technique"] == "drop-blocks" and row["quality"]]
    pairs = model_tasks(dropped)
    figure, axes = core.panels(len(pairs))
    for axis, pair in zip(axes, pairs, strict=True):
        dense = dense_of(rows, pair)
        core.dense_band(axis, dense)
        control = [
            row for row in rows
            if row["technique"] == "dense" and is_recovered(row) and model_task_of(row) == pair
        ]  # fmt: skip
        title, colour, marker = core.look("drop-blocks")
        for recovered in (False, True):
            own = [r for r in dropped if model_task_of(r) == pair and is_recovered(r) == recovered]
            start = control[:1] if recovered else [dense]
            own = [*start, *sorted(own, key=_gone)] if own else []
            mfc, ls = ("white", "--") if recovered else (colour, "-")
            label = title + (" + recovery" if recovered else "")
            _errorbar(
                axis,
                [_gone(row) for row in own],
                own,
                color=colour,
                marker=marker,
                mfc=mfc,
                ls=ls,
                label=label,
            )
        if control:
            _errorbar(
                axis, [0], control[:1], color="#000000", marker="*", mfc="white", ms=11, ls="", label="Dense + recovery"
            )  # fmt: skip
        if dense["quality"]["metric"] == "perplexity":
            axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=f"{pair[0]}\n{pair[1]}", xlabel="Blocks dropped (of all stacks)")
        axis.set_ylabel(metric_axis(dense["quality"]["metric"]))
    core.common_legend(figure, axes, columns=3)
    return figure


def _gone(row: dict) -> int:
    return sum(len(positions) for positions in row["achieved"].get("dropped", {}).values())


def timed_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Rows with a measured time, each with the analysis of where that time goes, at the same shape."""
    found = []
    for shares in (row for row in rows if row["technique"] == "time-shares"):
        for row in rows:
            same = all(row["settings"].get(part) == shares["settings"].get(part) for part in PARTS)
            if (
                row["technique"] == "heads-ffn"
                and same
                and row["latency"]
                and row["model"] == shares["model"]
            ):
                found.append((row, shares))
                break
    return found


def time_figure(rows: list[dict]) -> Figure:
    """Left: time over FLOPs, both relative to dense. Right: where the time goes, before and after pruning."""
    pairs = timed_pairs(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    line = np.array([0.0, 1.05])
    left.plot(line, line, color="#000000", lw=1, label="time as FLOPs")
    left.fill_between(
        line, line * (1 - TOLERANCE), line * (1 + TOLERANCE), color="#d9d9d9", lw=0, label="±15 %"
    )
    labels, bars = [], []
    for (row, shares), colour in zip(pairs, LEVELS[1:] * 3):
        shape, found = row["latency"]["shapes"][shares["achieved"]["shape"]], shares["achieved"]
        ratio = found["flops"][1] / found["flops"][0]
        spans = [[shape["ratio"] - shape["ratio_low"]], [shape["ratio_high"] - shape["ratio"]]]
        name = f"{row['model']}, {SHAPE_NAMES.get(found['shape'], found['shape'])}"
        left.errorbar(ratio, shape["ratio"], yerr=spans, color=colour, marker="D", ls="", label=name)
        labels += [f"{row['model']}\ndense", "pruned"]
        bars += [{part: share * scale for part, share in one.items()}
                 for one, scale in zip(found["shares"], (1.0, shape["ratio"]))]  # fmt: skip
    left.set(
        xlim=(0, 1.05),
        ylim=(0, None),
        xlabel="FLOPs / dense FLOPs",
        ylabel="Time / dense time (lower is better)",
    )
    left.legend(fontsize=7, loc="upper left")
    start = np.zeros(len(bars))
    for part, (title, colour) in SHARES.items():
        width = np.array([bar[part] for bar in bars])
        right.barh(range(len(bars)), width, left=start, color=colour, label=title)
        start += width
    right.set_yticks(range(len(bars)), labels, fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="Time / dense time, by operation (profiled shares)")
    right.legend(fontsize=7)
    return figure
