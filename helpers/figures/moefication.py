"""Figures of MoEfication: how sparse activations are, and quality and time against the work that is left."""

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.figures import core
from helpers.figures.structured import _errorbar
from lmcompress.results.labels import metric_axis
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
    """The rows of models cut into experts."""
    return [row for row in rows if row["technique"] == "moefy" and row["quality"]]


def channel_rows(rows: list[dict]) -> list[dict]:
    """The rows of models that lost channels for all tokens alike and no heads."""
    pruned = [row for row in rows if row["technique"] == "heads-ffn" and row["quality"]]
    return [row for row in pruned if row["settings"].get("heads") is None]


def ffn_share(row: dict) -> float:
    """FFN FLOPs that a row's model spends, relative to dense."""
    return row["achieved"].get("ffn_flops_share") or row["settings"]["ffn"]


def sparsity_figure(rows: list[dict]) -> Figure:
    """One panel per model: shares of activations and of neurons, over its blocks."""
    found = [row for row in rows if row["technique"] == "activation-sparsity"]
    figure, axes = core.panels(len(found), height=3.6)
    for axis, row in zip(axes, found, strict=True):
        blocks, thresholds = row["achieved"]["blocks"], row["achieved"]["thresholds"]
        for name, (label, colour) in MEASURES.items():
            y = [block[name][1] if name == "below" else block[name] for block in blocks]
            axis.plot(y, color=colour, marker="o", label=label.format(thresholds[1]))
        names = [f"{block['stack'][:3]} {block['index']}" for block in blocks]
        axis.set_xticks(range(len(names)), names, rotation=45)
        axis.set(title=f"{row['model']}\n{row['task']}", ylim=(-0.03, 1.03), ylabel="Share (fraction)")
    core.common_legend(figure, axes, columns=2)
    return figure


def quality_figure(rows: list[dict]) -> Figure:
    """Per model and task: quality over FFN FLOPs, and below it the activations' mass over the experts used."""
    pairs = model_tasks(expert_rows(rows))
    figure, axes = plt.subplots(2, len(pairs), figsize=(4.4 * max(len(pairs), 2), 7.4), squeeze=False)
    for (quality, mass), pair in zip(axes.T, pairs, strict=True):
        own = [row for row in rows if model_task_of(row) == pair]
        dense = dense_of(rows, pair)["quality"]
        quality.axhspan(dense["low"], dense["high"], color="#000000", alpha=0.1, lw=0)
        quality.plot(1, dense["value"], "*k", ms=11, label="Dense, 95 % interval shaded", zorder=5)
        lines = {("channels removed for all tokens", core.look("heads-ffn")[1], "s", "-."): channel_rows(own)}
        for clustering, colour in CLUSTERINGS.items():
            for router, (marker, ls) in ROUTERS.items():
                asked = {"clustering": clustering, "router": router}.items()
                line = [row for row in expert_rows(own) if asked <= row["settings"].items()]
                lines[f"{clustering}, {router}", colour, marker, ls] = line
                held = {
                    r["settings"]["active"] / r["settings"]["experts"]: r["achieved"]["mass"] for r in line
                }
                mass.plot(sorted(held), [held[x] for x in sorted(held)], color=colour, marker=marker, ls=ls)
        for (label, colour, marker, ls), line in lines.items():
            if line := sorted(line, key=ffn_share):
                x = [ffn_share(row) for row in line]
                _errorbar(quality, x, line, color=colour, marker=marker, ls=ls, label=label)
        mass.plot([0, 1], [0, 1], color="#7F7F7F", lw=1, label="chance")
        quality.set(title=f"{pair[0]}\n{pair[1]}", xlim=(0, 1.04), ylabel=metric_axis(dense["metric"]))
        quality.set(xlabel="FFN FLOPs / dense, router included")
        quality.set_yscale("log" if dense["metric"] == "perplexity" else "linear")
        mass.set(xlim=(0, 1.04), ylim=(0, 1.04), xlabel="Experts used / all")
        mass.set_ylabel("Activations' mass captured (higher is better)")
    core.common_legend(figure, list(axes.flat), columns=3)
    return figure


def timed_rows(rows: list[dict]) -> list[dict]:
    """Rows of models cut into experts whose times were measured on themselves."""
    return [row for row in expert_rows(rows) if is_timed(row)]


def time_figure(rows: list[dict]) -> Figure:
    """Time over dense time per shape, beside the noise floor."""
    return core.latency_ratios(
        timed_rows(rows), lambda row: "{active} of {experts} experts".format(**row["settings"])
    )
