"""Figures of MoEfication: how sparse activations are, and quality and time against the work that is left."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import look_of, shape_name
from lmcompress.results.rows import dense_of, is_timed, model_task_of, model_tasks

CLUSTERINGS = {"balanced-kmeans": "#0072B2", "co-activation": "#D55E00", "random": "#8C6D31"}
ROUTERS = {"oracle": ("D", "--"), "mlp": ("o", "-"), "centroid": ("^", ":")}  # marker, line
MEASURES = {
    "zero": ("exactly 0", "#000000"),
    "below": ("below {:g} of the spread", "#7F7F7F"),
    "neurons_90": ("neurons with 90 % of a token's energy", "#0072B2"),
    "fixed_90": ("the same, one choice for all tokens", "#D55E00"),
}


def expert_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of models cut into experts."""
    return [row for row in rows if row["technique"] == "moefy" and row["quality"]]


def channel_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of models that lost channels for all tokens alike and no heads."""
    pruned = [row for row in rows if row["technique"] == "heads-ffn" and row["quality"]]
    return [row for row in pruned if row["settings"].get("heads") is None]


def ffn_share(row: dict) -> float:
    """Return the FFN FLOPs that a row's model spends, relative to dense."""
    return row["achieved"].get("ffn_flops_share") or row["settings"]["ffn"]


def sparsity_figure(rows: list[dict]) -> Figure:
    """Draw shares of activations and of neurons over the blocks, a panel per model."""
    scans = [row for row in rows if row["technique"] == "activation-sparsity"]
    figure, axes = core.panels(len(scans), columns=2, height=2.6, sharey=True)
    for axis, row in zip(axes, scans, strict=True):
        blocks, thresholds = row["achieved"]["blocks"], row["achieved"]["thresholds"]
        for name, (label, colour) in MEASURES.items():
            share = [block[name][1] if name == "below" else block[name] for block in blocks]
            axis.plot(share, color=colour, marker="o", label=label.format(thresholds[1]))
        names = [f"{block['stack'][:3]} {block['index']}" for block in blocks]
        axis.set_xticks(range(len(names)), names)
        core.title(axis, model_task_of(row))
        axis.set(ylim=(-0.03, 1.03), ylabel="Share (fraction)", xlabel="Block")
    core.common_legend(figure, axes, columns=2)
    return figure


def quality_figure(rows: list[dict]) -> Figure:
    """Draw quality over FFN FLOPs and, below it, the activations' mass over the experts used.

    Models that were cut at one number of active experts only are left to the tables, if another has several.
    """
    measured = model_tasks(expert_rows(rows))
    active = {s: {ffn_share(row) for row in expert_rows(rows) if model_task_of(row) == s} for s in measured}
    measured = [model_task for model_task in measured if len(active[model_task]) > 1] or measured
    figure, axes = plt.subplots(2, len(measured), figsize=(core.WIDTH, 6.2), squeeze=False)
    for (quality, mass), model_task in zip(axes.T, measured, strict=True):
        scored = [row for row in rows if model_task_of(row) == model_task]
        dense = dense_of(rows, model_task)["quality"]
        core.dense_band(quality, dense, x=1, floor=False)
        for clustering, colour in CLUSTERINGS.items():
            for router, (marker, ls) in ROUTERS.items():
                settings = {"clustering": clustering, "router": router}.items()
                cut = [row for row in expert_rows(scored) if settings <= row["settings"].items()]
                if not cut:
                    continue
                cut.sort(key=ffn_share)
                look = {"color": colour, "marker": marker, "ls": ls}
                x, qualities = [ffn_share(row) for row in cut], [row["quality"] for row in cut]
                core.interval_line(quality, x, qualities, label=f"{clustering}, {router}", **look)
                used = [row["settings"]["active"] / row["settings"]["experts"] for row in cut]
                mass.plot(used, [row["achieved"]["mass"] for row in cut], **look)
        if removed := sorted(channel_rows(scored), key=ffn_share):
            look = {
                "color": look_of("heads-ffn").colour,
                "marker": "s",
                "ls": "-.",
                "label": "channels removed for all tokens",
            }
            core.interval_line(
                quality, [ffn_share(row) for row in removed], [row["quality"] for row in removed], **look
            )
        mass.plot([0, 1], [0, 1], color=core.GREY, lw=1, label="chance")
        core.title(quality, model_task)
        quality.set(xlim=(0, 1.04), xlabel="FFN FLOPs / dense,\nrouter included (lower is better)")
        core.metric_axis(quality, dense["metric"])
        mass.set(xlim=(0, 1.04), ylim=(0, 1.04), xlabel="Experts used / all")
        mass.set_ylabel("Activations' mass captured\n(fraction, higher is better)")
    core.common_legend(figure, axes.flat, columns=3)
    return figure


def timed_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of models cut into experts whose times were measured on themselves."""
    return [row for row in expert_rows(rows) if is_timed(row)]


def time_figure(rows: list[dict]) -> Figure:
    """Draw time over dense time per shape, over the shaded noise floor."""
    frames = []
    for row in timed_rows(rows):
        experts = "{active} of {experts} experts".format(**row["settings"])
        name = f"{core.short_model(row['model'])}, {experts}"
        frames += [
            core.ratio_frame([row], shape, [f"{name}: {shape_name(shape)}"])
            for shape in row["latency"]["shapes"]
        ]
    frame = pd.concat(frames, ignore_index=True)
    figure, axes = core.row_panels([[len(frame)]])
    core.ratio_rows(axes[0][0], frame)
    axes[0][0].set_xlabel(
        "Time / dense time (log, lower is better); grey: what two copies of the dense model differ by"
    )
    return figure
