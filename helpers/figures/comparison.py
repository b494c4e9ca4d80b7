"""The overview: what quality costs in bytes of the file written, per model, with the Pareto front named."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.study.decision import comparable_rows

NEAR = 12  # % of the dense quality: the loss that a panel reaches down to
CORNERS = ((-10, -14), (4, 5), (4, -14), (4, 5), (4, -14), (4, 5))  # of numbers, for neighbours of one size


def pareto_front(points: list[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Return the indices of the points (cost, quality) that no other point beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    front, best = [], float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[index][1] > best:
            front.append(index)
            best = sign * points[index][1]
    return front


def overview(rows: list[dict]) -> Figure:
    """Draw relative quality over the bytes of the written file on shared axes, and name the front."""
    table = core.scored(comparable_rows(rows)).dropna(subset=["size_share", "relative"])
    groups = list(table.groupby("panel", sort=False))
    groups.sort(key=lambda group: group[1]["selection_n"].isna().all())  # as in the table above the figure
    ends = 0.8 * table["size_share"].min(), 1.12 * table["size_share"].max()
    size = core.WIDTH, 1.75 * len(groups) + 0.5
    figure, axes = plt.subplots(len(groups), 2, figsize=size, squeeze=False, width_ratios=(1.5, 1))
    for (axis, key), (name, lines) in zip(axes, groups):
        _panel(axis, key, lines)
        label = core.difference_axis(axis, -NEAR, NEAR / 4, "y")
        axis.set(title=name, xlim=ends, xlabel="", ylabel=label.replace("dense, ", "dense,\n"))
        core.log_axis(axis, "x")
    axes[-1][0].set_xlabel("Bytes of the file written / dense model in FP32 (log, lower is better)")
    return core.legend(figure, columns=5)


def _panel(axis: Axes, key: Axes, lines: pd.DataFrame) -> None:
    """Draw the front up to the dense file in colour and numbered, the rest grey; list the names in `key`."""
    lines = lines.reset_index(drop=True)
    dense_share = lines["size_share"][lines["is_dense"]].max()
    smaller = lines[lines["is_dense"] | (lines["size_share"] < dense_share)]
    order = pareto_front(list(zip(smaller["size_share"], smaller["relative"])), higher_is_better=True)
    front, near = smaller.iloc[order], "not is_dense and relative >= -@NEAR"
    behind, named = lines.drop(smaller.index[order]).query(near), front.query(near)
    axis.vlines(
        behind["size_share"], behind["relative_low"], behind["relative_high"], color="#cccccc", lw=0.8
    )
    axis.plot(behind["size_share"], behind["relative"], ".", color="#aaaaaa", ms=4, label="Not on the front")
    axis.plot(front["size_share"], front["relative"], color=core.GREY, lw=1, label="Pareto front", zorder=2)
    axis.plot([dense_share], [0.0], "*", color=core.DENSE, ms=11, ls="", zorder=5, label="Dense")
    for number, point in enumerate(named.itertuples(), 1):
        face = "white" if point.open else point.colour
        spans = [[point.relative - point.relative_low], [point.relative_high - point.relative]]
        look = {"color": point.colour, "marker": point.marker, "mfc": face, "zorder": 4, "ms": 7}
        axis.errorbar(point.size_share, point.relative, yerr=spans, **look)
        box = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75}
        shift = {"xytext": CORNERS[number % 6], "textcoords": "offset points", "weight": "bold", "size": 8.5}
        axis.annotate(str(number), (point.size_share, point.relative), zorder=7, bbox=box, **shift)
    text = [
        f"{number}  {point.short} ({100 * point.size_share:.0f} %)"
        for number, point in enumerate(named.itertuples(), 1)
    ]
    if below := int((lines["relative"] < -NEAR).sum()):
        text.append(f"below the panel: {below} configurations")
    key.set_axis_off()
    key.text(0, 1, "\n".join(text), transform=key.transAxes, va="top", fontsize=8.5, linespacing=1.4)
