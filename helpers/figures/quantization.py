"""Quantization: quality and bytes by number format and backend, time by backend, and the curves of QAT."""

import pandas as pd
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import SECOND_BENCHMARKS

PRUNED = ("sparsegpt", "wanda", "magnitude-layer", "heads-ffn", "drop-blocks")
OTHERS = (*PRUNED, "chain", "low-rank-aware", "distil")  # beside it
FULL = 8  # configurations from which on a model has the whole list, and a panel
AWARE = {True: ("quantization-aware", "#0072B2"), False: ("fine-tuned, then quantized", "#D55E00")}
SHAPES = {"batch1": "#0072B2", "batch8": "#0072B2", "decode_b1": "#D55E00", "decode_b8": "#D55E00"}
SPLITS = {"train": ("training loss", (2, 2)), "validation": ("validation loss", "")}


def quality(rows: list[dict]) -> Figure:
    """Draw relative differences to dense of every number format and backend, the smallest file first."""
    rows = [row for row in rows if row["model"] not in SECOND_BENCHMARKS]
    plain = [row for row in rows if row["technique"] not in OTHERS and "recovery" not in row["settings"]]
    table = core.scored(plain)
    counts = table.groupby("panel")["short"].transform("nunique")
    return core.forest(table[counts >= min(FULL, counts.max())])


def speed(rows: list[dict]) -> Figure:
    """Draw time over dense time by backend and shape: a panel per model and machine."""
    times = core.timed(row for row in rows if row["quality"] and row["technique"] not in ("dense", *OTHERS))
    work = times["shape"].astype(str).str.replace("(encode|prefill)_b", "batch", regex=True)
    looks = {"colour": work.map(SHAPES), "marker": "o", "open": work.str.endswith("8")}
    groups = list(times.assign(**looks).groupby(["model", "machine"], sort=False))
    figure, axes = core.panels(len(groups), columns=2, height=3.8)
    for axis, ((model, machine), lines) in zip(axes, groups):
        core.ratio_panel(axis, lines, list(dict.fromkeys(lines["short"])))
        axis.set(title=f"{core.short_model(model)}\n{machine}", xlabel=core.RATIO)
    for shape in [shape for shape in SHAPES if (work == shape).any()]:
        colour, face = SHAPES[shape], "white" if shape.endswith("8") else SHAPES[shape]
        label = f"{'decode' if '_' in shape else 'read'}, batch {shape[-1]}"
        axes[0].plot([], [], "o", color=colour, mfc=face, label=label)
    return core.legend(figure)


def training(rows: list[dict]) -> Figure:
    """Draw training and validation loss of QAT and of fine-tuning before quantization, per model and bits, of
    the longest budget.
    """
    lines = pd.DataFrame(
        [
            {"model": row["model"], "bits": row["settings"].get("bits", 8), "step": step, "loss": loss}
            | {"aware": row["settings"].get("aware", True), "split": split, "run": f"{row['key']} {split}"}
            | {"seconds": row["achieved"]["curve"]["seconds"], "machine": core.machine_of(row)}
            | {"examples": core.examples_of(row["settings"])}
            for row in rows
            if row["technique"] == "qat" and "curve" in row["achieved"]
            for split in SPLITS
            for step, loss in row["achieved"]["curve"].get(split) or []
        ]
    )
    lines = lines[lines["examples"] == lines.groupby("model")["examples"].transform("max")]
    schemes = list(lines.groupby(["model", "bits"]))
    figure, axes = core.panels(len(schemes), columns=2, height=3.0)
    look = {"hue": "aware", "palette": {aware: colour for aware, (_, colour) in AWARE.items()}}
    look |= {"style": "split", "dashes": {split: dashes for split, (_, dashes) in SPLITS.items()}}
    for axis, ((model, bits), part) in zip(axes, schemes):
        core.curves(axis, part, "step", "loss", size="split", sizes={"train": 0.6, "validation": 1.8}, **look)
        spent: dict[str, list[str]] = {}
        for (machine, aware), seconds in part.groupby(["machine", "aware"])["seconds"].median().items():
            spent.setdefault(machine, []).append(f"{'QAT' if aware else 'fine-tuning'} {seconds:.0f} s")
        lines_of_title = [f"{machine}: {', '.join(times)}" for machine, times in spent.items()]
        axis.set_title("\n".join([f"{core.short_model(model)}, {bits}-bit weights", *lines_of_title]))
        axis.set(xlabel="Step", ylabel="Loss (nats, lower is better)")
    for label, colour in AWARE.values():
        axes[0].plot([], [], color=colour, label=label)
    for label, dashes in SPLITS.values():
        axes[0].plot([], [], color=core.GREY, ls=(0, dashes) if dashes else "-", label=label)
    return core.legend(figure)
