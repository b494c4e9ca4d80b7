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
    """Return the rows of the sweep over heads and channels: one way of choosing, the one that most rows have."""
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
    """Return the heads per attention, or channels per block, that a row kept: the mean over its blocks."""
    entries = row["achieved"][f"{part}_kept"].values()
    return float(np.mean([len(one) if isinstance(one, list) else one for one in entries]))


def sweep_figure(rows: list[dict]) -> Figure:
    """Draw, a line of panels per model and task, quality over heads and over channels kept, and the size of the file."""
    swept = core.scored_frame(sweep_rows(rows))
    for part in PARTS:
        swept[part] = [kept(row, part) for row in swept["row"]]
        swept[f"{part}_share"] = [row["settings"].get(part) or 1.0 for row in swept["row"]]
    subjects = model_tasks(list(swept["row"]))
    shares = sorted({share for part in PARTS for share in swept[f"{part}_share"]}, reverse=True)
    colours = dict(zip(shares, LEVELS * 3))
    figure, axes = plt.subplots(
        len(subjects), 3, figsize=(core.WIDTH, 2.7 * len(subjects) + 0.3), squeeze=False
    )
    for line, subject in zip(axes, subjects, strict=True):
        scored, dense = core.of_model_task(swept, subject), dense_of(rows, subject)
        for axis, part, other in zip(line, PARTS, reversed(PARTS)):
            _sweep_panel(axis, scored, dense, part, scored[f"{other}_share"].map(colours))
        _size_panel(line[2], scored, dense)
        core.title(line[0], subject)
    for share, colour in colours.items():
        name = "nothing else cut" if share == 1 else f"{share:.0%} of the other part kept"
        axes[0][0].plot([], [], "o-", color=colour, label=name)
    core.common_legend(figure, axes.flat, columns=4)
    return figure


def _sweep_panel(axis: Axes, scored: pd.DataFrame, dense: dict, part: str, colours: pd.Series) -> None:
    """Draw quality over what was kept of one part, a line per share kept of the other; the dense model at its end."""
    whole = _whole(list(scored["row"]), part)
    core.dense_band(axis, dense["quality"], x=whole)
    lines = scored.assign(colour=colours, marker="o", name=colours)
    if whole is not None:
        star = core.scored_frame([dense]).assign(colour=LEVELS[0], marker="o", name=LEVELS[0])
        lines = pd.concat([lines, star.assign(**{part: whole})])
    core.marks(axis, lines, part, named=False)
    axis.set_xlabel(PARTS[part])
    core.metric_axis(axis, dense["quality"]["metric"])


def _size_panel(axis: Axes, scored: pd.DataFrame, dense: dict) -> None:
    """Draw the size of the file over the share kept of one part, the other one whole."""
    for part, other, look in zip(PARTS, reversed(PARTS), ("o-", "s--")):
        alone = scored[scored[f"{other}_share"] == 1].sort_values(f"{part}_share")
        if whole := _whole(list(scored["row"]), part):
            x = [*alone[part] / whole, 1.0]
            y = [*alone["size_mb"], dense["memory"]["file_bytes"] / 1e6]
            axis.plot(x, y, look, color=core.GREY, label=f"size by {SHORT[part]} kept")
    axis.set(
        xlabel="Heads or channels kept\n(fraction)",
        ylabel="Size of the file\n(MB, lower is better)",
        ylim=(0, None),
    )


def _whole(own: list[dict], part: str) -> float | None:
    """Return what a part has uncut: of a row that left it alone, else by the share that a row kept of it."""
    for row in own:
        if row["settings"].get(part) is None:
            return kept(row, part)
    shares = [(row["settings"][part], row) for row in own if isinstance(row["settings"][part], float)]
    return round(kept(shares[0][1], part) / shares[0][0]) if shares else None


def importance_maps(rows: list[dict]) -> Figure:
    """Draw the first-order importance of every head, attentions down, heads across; all models on one log scale."""
    scored = [row for row in rows if row["technique"] == "head-importance"]
    tables = []
    for row in scored:
        attentions = row["achieved"]["attentions"]
        table = pd.DataFrame([one["heads"] for one in attentions], index=[one["label"] for one in attentions])
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
    """Draw what the loss gains when block j stands in place of block i, per stack; last line: when none does."""
    found = [row for row in rows if row["technique"] == "block-replacement"]
    figure, axes = core.panels(len(found), columns=2, height=2.9)
    for axis, row in zip(axes, found, strict=True):
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
    """Draw quality over the number of blocks dropped, before and after recovery: a panel per model and task."""
    dropped = [row for row in rows if row["technique"] == "drop-blocks" and row["quality"]]
    subjects = model_tasks(dropped)
    figure, axes = core.panels(len(subjects))
    for axis, subject in zip(axes, subjects, strict=True):
        dense = dense_of(rows, subject)
        scored = [row for row in rows if row["quality"] and model_task_of(row) == subject]
        control = [row for row in scored if row["technique"] == "dense" and is_recovered(row)][:1]
        look = look_of("drop-blocks")
        core.dense_band(axis, dense["quality"])
        for recovered, start in ((False, [dense]), (True, control)):
            cut = [row for row in dropped if row in scored and is_recovered(row) == recovered]
            frame = core.scored_frame([*start, *cut] if cut else [])
            if not frame.empty:
                name = look.title + " + recovery" * recovered
                frame = frame.assign(
                    dropped=frame["row"].map(_gone), name=name, colour=look.colour, marker=look.marker
                )
                core.marks(axis, frame, "dropped")
        if control:
            core.marks(axis, core.scored_frame(control).assign(dropped=0), "dropped", line=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
        core.title(axis, subject)
        axis.set_xlabel("Blocks dropped (of all stacks)")
        core.metric_axis(axis, dense["quality"]["metric"])
    core.common_legend(figure, axes, columns=4)
    return figure


def _gone(row: dict) -> int:
    return sum(len(positions) for positions in row["achieved"].get("dropped", {}).values())


def timed_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Return rows with a measured time, each with the analysis of where that time goes, at the same shape."""
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
    """Draw time over FLOPs, both relative to dense, and where the time goes before and after pruning."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(core.WIDTH, 3.9))
    line = np.array([0.0, 1.05])
    left.plot(line, line, color="#000000", lw=1, label="time as FLOPs")
    bounds = line * (1 - TOLERANCE), line * (1 + TOLERANCE)
    left.fill_between(line, *bounds, color=core.NOISE, lw=0, label="±15 %")
    bars = []
    for (row, shares), colour in zip(timed_pairs(rows), LEVELS[1:] * 3):
        profile = shares["achieved"]
        shape = row["latency"]["shapes"][profile["shape"]]
        model, ratio = core.short_model(row["model"]), profile["flops"][1] / profile["flops"][0]
        spans = [[shape["ratio"] - shape["ratio_low"]], [shape["ratio_high"] - shape["ratio"]]]
        name = f"{model}, {shape_name(profile['shape'])}"
        left.errorbar(ratio, shape["ratio"], yerr=spans, color=colour, marker="D", ls="", label=name)
        for label, part, scale in zip(
            (f"{model}\ndense", "pruned"), profile["shares"], (1.0, shape["ratio"])
        ):
            bars.append({title: part[key] * scale for key, (title, _) in SHARES.items()} | {"bar": label})
    left.set(
        xlim=(0, 1.05),
        ylim=(0, None),
        xlabel="FLOPs / dense FLOPs",
        ylabel="Time / dense time (lower is better)",
    )
    if bars:
        frame = pd.DataFrame(bars).set_index("bar")
        frame.plot.barh(
            stacked=True, ax=right, color=[colour for _, colour in SHARES.values()], width=0.8, legend=False
        )
    right.invert_yaxis()
    right.set(xlabel="Time / dense time, by operation (profiled shares)", ylabel="")
    core.common_legend(figure, [left, right], columns=4)
    return figure
