"""Low rank and weight sharing: quality by form and bytes, and the time of factored layers by rank."""

import pandas as pd
from matplotlib.figure import Figure

from helpers.figures import core

BASES = {"mean": "basis of the mean", "stacked": "basis of the stack", "random": "random basis"}
TRAININGS = {
    "shared": "shared layers trained",
    "all": "all trained",
    "lora": "one LoRA",
    "lora-per-block": "LoRA per block",
}


def is_part(row: dict) -> bool:
    """Return whether only some layers were changed; for shared mean layers, that sets their size."""
    return bool({"kinds", "blocks"} & set(row["settings"])) and not row["technique"].startswith("mass")


def quality(rows: list[dict]) -> Figure:
    """Draw relative differences to dense of every form of low rank and sharing, the smallest file first."""
    table = core.scored(row for row in rows if not is_part(row))
    words = [("settings.init", BASES), ("settings.recover", TRAININGS)]
    for column, names in words:
        if column in table:
            table["short"] += table[column].map(names).radd(", ").fillna("")
    if "settings.threshold" in table:
        table["short"] += table["settings.threshold"].map(", merged below {:g}".format, "ignore").fillna("")
    if "settings.blocks" in table:
        table["short"] += (
            table["settings.blocks"].map(lambda blocks: f", {len(blocks)} blocks", "ignore").fillna("")
        )
    return core.forest(table[~((table["technique"] == "dense") & table["open"])])


def speed(rows: list[dict]) -> Figure:
    """Draw the time of two factored layers over the dense layer's, by rank; dotted: by arithmetic."""
    timed = [row for row in rows if row["technique"] == "layer-speed"]
    figure, axes = core.panels(len(timed), columns=2, height=3.2, sharey=True)
    for axis, row in zip(axes, timed, strict=True):
        layer = row["achieved"]
        lines = pd.DataFrame([entry for entry in layer["timings"] if entry["rank"]])
        colours = lines["rows"].map(dict(zip(row["settings"]["rows"], core.COLOURS)))
        lines = lines.assign(
            name="tokens: " + lines["rows"].astype(str), colour=colours, marker="o", open=False
        )
        core.noise_floor(axis, lines)
        core.points(axis, lines, "rank", "ratio")
        ranks, even = sorted(lines["rank"].unique()), layer["break_even"]
        axis.plot(ranks, [rank / even for rank in ranks], ":", color=core.DENSE, label="arithmetic, r / r*")
        axis.axvline(even, color=core.GREY, lw=0.9, ls="--", label="break-even rank r*")
        core.log_axis(axis)
        axis.set_title(f"Layer {layer['out']} × {layer['in']}, {core.machine_of(row)}")
        axis.set(xlabel="Rank r")
    axes[0].set_ylabel("Time / time of the dense layer\n(log, lower is better)")
    return core.legend(figure)
