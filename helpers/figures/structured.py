"""Structured pruning: quality over the parameters kept, and time against FLOPs."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import shape_name

TECHNIQUES = ("heads-ffn", "textpruner", "drop-blocks", "vocabulary")


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
    look = {
        "colour": pd.Series(core.COLOURS)[: len(times)],
        "marker": pd.Series(list("oDv^os^D"))[: len(times)],
    }
    return times.assign(name=labels, **look)
