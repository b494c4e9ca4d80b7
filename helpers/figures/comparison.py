"""The figure of the comparison: what quality costs in bytes, per model, with the front named.

A row is on the front if none that is as small loses less. Losses are paired differences to dense. Panels show
the dense model's neighbourhood; how many rows lie further away is written at their edge.
"""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from helpers.figures.combinations import label, path_of
from lmcompress.results.rows import dense_of, is_dense, model_task_of, model_tasks, smallest_format
from lmcompress.study.decision import Budget, comparable_rows, decide, options

NEAR = 0.12  # of the dense quality: the loss that a panel reaches down to
KINDS = {"encoder": "batch1", "decoder": "prefill_b1", "encoder-decoder": "encode_b1"}  # the shape that tells


def pareto_front(points: list[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Return the indices of the points (cost, quality) that no other point beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    front, best = [], float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[index][1] > best:
            front.append(index)
            best = sign * points[index][1]
    return front


def kind_rows(rows: list[dict], kind: str) -> list[dict]:
    """Return the rows of the models of one kind, told by the shapes that their dense model was timed at."""
    timed = {model_task_of(r) for r in rows if r["latency"] and KINDS[kind] in r["latency"]["shapes"]}
    return [row for row in rows if model_task_of(row) in timed]


def ratio(row: dict, shape: str) -> tuple[float, float, float] | None:
    """Return time over dense at a shape with its interval; 1 for dense, None if it was not timed."""
    if is_dense(row):
        return 1.0, 1.0, 1.0
    timed = row["latency"] and row["latency"]["shapes"].get(shape)
    return (timed["ratio"], timed["ratio_low"], timed["ratio_high"]) if timed and timed["ratio"] else None


def overview(rows: list[dict]) -> Figure:
    """Draw quality against dense over the bytes left, all panels on the same axes, the front named."""
    rows = comparable_rows(rows)
    measured = model_tasks(rows)
    figure, axes = plt.subplots(
        len(measured),
        2,
        figsize=(core.WIDTH, 1.75 * len(measured) + 0.5),
        squeeze=False,
        width_ratios=(1.5, 1),
    )
    for (axis, key), model_task in zip(axes, measured, strict=True):
        _panel(axis, key, [row for row in rows if model_task_of(row) == model_task])
        axis.set_title(f"{core.short_model(model_task[0])}, {model_task[1]}")
        axis.set(xlim=(0.09, 1.12), ylim=(-100 * NEAR, 100 * NEAR / 4), xlabel="")
        axis.set_ylabel("Δ quality (% of dense,\nhigher is better)")
        core.log_axis(axis, "x")
    axes[-1][0].set_xlabel("Bytes of the smallest stored form / dense (log, lower is better)")
    core.common_legend(figure, axes[:, 0], columns=5)
    return figure


def relative_frame(rows: list[dict]) -> pd.DataFrame:
    """Return the scored lines with bytes over dense, and `better`, `low` and `high` in % of dense."""
    dense = dense_of(rows)
    lines = core.scored_frame([row for row in rows if row["memory"]])
    lines = lines[lines["delta"].notna() | (lines["key"] == dense["key"])].reset_index(drop=True)
    scale = (100 if dense["quality"]["higher_is_better"] else -100) / dense["quality"]["value"]
    ends = lines[["delta", "delta_low", "delta_high"]].astype(float).fillna(0.0) * scale
    share = lines["smallest_bytes"] / smallest_format(dense)[1]
    return lines.assign(
        share=share, better=ends["delta"], low=ends.min(axis="columns"), high=ends.max(axis="columns")
    )


def _panel(axis: Axes, key: Axes, rows: list[dict]) -> None:
    """Draw the front in colour and numbered, the choice ringed, what is not on the front faint."""
    lines = relative_frame(rows)
    front = pareto_front(list(zip(lines["share"], lines["better"])), higher_is_better=True)
    choice = decide(options(rows), Budget()).chosen
    marked = {lines["key"][index] for index in front} | {choice.key}
    near = lines[lines["high"] >= -100 * NEAR]
    faint = near[~near["key"].isin(marked)]
    axis.vlines(faint["share"], faint["low"], faint["high"], color="#cccccc", lw=0.8, zorder=1)
    axis.plot(faint["share"], faint["better"], ".", color="#bbbbbb", ms=4, zorder=1.1)
    axis.axhline(0.0, color="#000000", lw=0.8, zorder=1.2)
    on_front = lines.loc[front]
    axis.plot(on_front["share"], on_front["better"], color=core.GREY, lw=1, zorder=2)
    compressed = lines[lines["key"].isin(marked) & ~lines["row"].map(is_dense)].sort_values("share")
    core.marks(axis, compressed, "share", "better", line=False, named=False)
    axis.plot(1.0, 0.0, "*", color="#000000", ms=11, label="Dense", zorder=5)
    if not choice.baseline:
        ringed = lines.loc[lines["key"] == choice.key].iloc[0]
        axis.plot(
            ringed["share"],
            ringed["better"],
            "o",
            ms=14,
            mfc="none",
            mec="#000000",
            zorder=6,
            ls="",
            label="Smallest to rely on",
        )
    axis.plot([], [], ".", color="#bbbbbb", label="not on the front")
    points = list(zip(compressed["share"], compressed["better"]))
    names = [
        f"{label(path_of(row))} ({100 * share:.0f} %)"
        for row, share in zip(compressed["row"], compressed["share"])
    ]
    core.numbered(axis, key, points, names)
    if away := int((lines["high"] < -100 * NEAR).sum()):
        axis.text(
            0.02, 0.03, f"{away} lose more", transform=axis.transAxes, fontsize=8, color=core.GREY, zorder=6
        )
