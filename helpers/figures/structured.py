"""Structured pruning: quality over parameters kept, time against FLOPs, quality and bytes by heads."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import shape_name
from lmcompress.results.rows import is_recovered

TECHNIQUES = ("heads-ffn", "textpruner", "drop-blocks", "vocabulary")
# TextPruner's own of RoBERTa-large on SST-2, calibrated on what it scores: accuracy and MiB, by the share of
# 16 heads, and of 4,096 channels at 12 heads.
PUBLISHED = {
    "heads": {
        1: (0.9644, 1355.6),
        0.625: (0.9622, 1211.5),
        0.5: (0.961, 1163.5),
        0.375: (0.953, 1115.4),
        0.25: (0.9289, 1067.4),
        0.125: (0.8658, 1024.4),
        0.0625: (0.617, 1007.4),
    },
    "ffn": {0.5: (0.9507, 875.3), 0.25: (0.82, 683.3), 0.125: (0.5206, 587.2)},
}
SIDES = {"heads": "Heads kept (share, FFN whole)", "ffn": "FFN width kept (share, heads whole)"}


def quality_and_time(rows: list[dict]) -> Figure:
    """Draw quality over parameters kept, a panel per model, and time over FLOPs, a panel per machine."""
    table = core.scored(row for row in rows if row["technique"] in ("dense", *TECHNIQUES) and row["memory"])
    table = table[table["is_dense"] | table["technique"].isin(TECHNIQUES)]
    table = table[table["panel"].isin(table[~table["is_dense"]]["panel"])]
    dense = table[table["is_dense"]].set_index("panel")["parameters"]
    table = table.assign(kept=table["parameters"] / table["panel"].map(dense))
    times = _times(rows)
    machines = list(times.groupby("machine", sort=False)) if len(times) else []
    style = {"dense_at": 1.0, "further": len(machines), "line": False}
    figure, axes = core.quality_panels(table, "kept", "Parameters / dense\n(lower is better)", **style)
    for axis, (machine, lines) in zip(axes, machines):
        _time_panel(axis, lines)
        axis.set_title(f"Time of heads+FFN pruned,\n{machine}")
    return core.legend(figure, columns=3)


def levels(rows: list[dict]) -> Figure:
    """Draw quality and bytes over the heads kept and over the FFN width kept, beside TextPruner's."""
    shown = [row for row in rows if row["technique"] in ("dense", "heads-ffn") and not is_recovered(row)]
    table = core.scored(row for row in shown if set(row["settings"]) - {"calibration"} <= {*SIDES, "n_iters"})
    table = table[table["is_dense"] | (table["settings.n_iters"] == 4)].drop_duplicates(["panel", "recipe"])
    figure, axes = core.panels(4, columns=2, height=2.7, sharex=True, sharey="row")
    for column, (side, label) in enumerate(SIDES.items()):
        quality, size = axes[column], axes[column + 2]
        alone = (
            table.reindex(columns=[f"settings.{name}" for name in SIDES if name != side]).isna().all(axis=1)
        )
        lines = table[alone].assign(share=table.get(f"settings.{side}", pd.Series(dtype=float)))
        lines["share"] = lines["share"].astype(float).mask(lines["is_dense"], 1.0)
        lines = lines.dropna(subset=["share"]).sort_values("share")
        for (model, curve), colour, marker in zip(lines.groupby("panel", sort=False), core.COLOURS, "os^Dv"):
            look = {"color": colour, "marker": marker, "label": model}
            curve = curve.assign(relative=curve["relative"].clip(lower=core.BELOW))
            quality.plot(curve["share"], curve["relative"], **look)
            size.plot(curve["share"], curve["size_mb"], **look)
        accuracy, mebibytes = zip(*PUBLISHED[side].values())
        look = {"color": core.GREY, "ls": "--", "marker": "x", "label": "published: RoBERTa-large, SST-2"}
        whole = PUBLISHED["heads"][1][0]
        quality.plot([*PUBLISHED[side]], [100 * (score / whole - 1) for score in accuracy], **look)
        size.plot([*PUBLISHED[side]], [1.048576 * mebi for mebi in mebibytes], **look)
        change = core.difference_axis(quality, float(core.BELOW), 0.0, "y")
        quality.set(ylabel=change.replace("dense, ", "dense,\n").replace("; ", ";\n"), xlim=(0, 1.05))
        core.log_axis(size)
        size.set(xlabel=label, ylabel="File (MB, log,\nlower is better)")
    return core.legend(figure, columns=3)


def _time_panel(axis: Axes, lines: pd.DataFrame) -> None:
    """Draw time over FLOPs, both over dense, with the diagonal and the shaded A/A noise floor."""
    axis.plot([0, 1.05], [0, 1.05], color=core.DENSE, lw=0.9, label="Time falls as FLOPs do")
    core.noise_floor(axis, lines)
    core.points(axis, lines, "flops_share", "ratio", line=False)
    axis.plot(1, 1, "*", color=core.DENSE, ms=11, ls="")
    axis.set(xlim=(0, 1.1), ylim=(0, None), xlabel="FLOPs / dense FLOPs")
    axis.set_ylabel("Time / dense time\n(lower is better)")


def _times(rows: list[dict]) -> pd.DataFrame:
    """Return the timed lines of pruned models whose FLOPs were counted, with `flops_share`."""
    names = {"settings.heads": "heads", "settings.ffn": "ffn"}
    counted = pd.DataFrame(
        [
            {"model": row["model"], "shape": row["achieved"]["shape"]}
            | {name: row["settings"].get(name) for name in names.values()}
            | {"flops_share": row["achieved"]["flops"][1] / row["achieved"]["flops"][0]}
            for row in rows
            if row["technique"] == "time-shares"
        ]
    )
    times = core.timed(row for row in rows if row["technique"] == "heads-ffn")
    if counted.empty or times.empty:
        return pd.DataFrame()
    times = times.rename(columns=names).merge(counted, on=["model", "shape", *names.values()])
    labels = times["model"].map(core.short_model) + ", " + times["shape"].map(shape_name)
    numbers, looks = pd.factorize(labels)[0], (core.COLOURS, "oDv^os^D")
    colours, markers = ([look[number % len(look)] for number in numbers] for look in looks)
    return times.assign(name=labels, colour=colours, marker=markers)
