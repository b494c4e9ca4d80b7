"""Figures of unstructured pruning: quality, patterns, sensitivity of layers, what a zero is worth."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import FORMAT_NAMES
from lmcompress.results.rows import ModelTask, is_plain, is_recovered, model_task_of, model_tasks

PATTERNS = {None: "unstructured", "4:8": "4:8", "2:4": "2:4"}
FORMATS = {  # storage format: (title, colour, break-even sparsity by arithmetic in fp32)
    name: (FORMAT_NAMES[name], colour, break_even)
    for name, colour, break_even in (
        ("dense", "#000000", None),
        ("dense_zstd", "#E69F00", None),
        ("bitmask", "#0072B2", 1 / 32),
        ("csr_int32", "#009E73", 1 / 2),
        ("csr_int64", "#CC79A7", 2 / 3),
        ("bitmask_integers", "#56B4E9", None),
    )
}
KERNELS = {  # kernel of one linear layer: (title, colour)
    "dense_fp32": ("dense fp32", "#000000"),
    "dense_bf16": ("dense bf16", "#E69F00"),
    "csr": ("CSR, drop-in", "#009E73"),
    "csr_matmul": ("CSR, product alone", "#CC79A7"),
    "semi_structured": ("2:4, semi-structured", "#56B4E9"),
    "rows_removed": ("rows removed", "#0072B2"),
}


def quality_by_sparsity(rows: list[dict]) -> Figure:
    """Draw quality over achieved sparsity, a line per criterion, dashed if trained."""
    frame = core.scored_frame([row for row in rows if is_plain(row)])
    frames = {}
    for model_task in model_tasks(rows):
        scored = core.of_model_task(frame, model_task)
        control = scored[(scored["technique"] == "dense") & scored["open"]]
        budget = control["row"].iloc[0]["settings"]["recovery"] if len(control) else None
        # One budget of fine-tuning in one line: the control's.
        same = scored["row"].map(
            lambda row, budget=budget: (row["settings"].get("recovery") or budget) == budget
        )
        frames[model_task] = scored[(scored["technique"] != "dense") & same]
    xlabel = "Achieved sparsity (fraction\nof prunable weights)"
    return core.quality_panels(frames, rows, "sparsity", xlabel, columns=3)


def pattern_rows(rows: list[dict]) -> list[dict]:
    """Return the one-shot rows at half the weights, unstructured or N:M, of criteria tried with a pattern."""
    half = [
        row
        for row in rows
        if row["quality"]
        and not is_recovered(row)
        and not row["settings"].get("allocation")
        and (row["settings"].get("pattern") in ("2:4", "4:8") or row["settings"].get("sparsity") == 0.5)
    ]
    tried = {(model_task_of(row), row["technique"]) for row in half if row["settings"].get("pattern")}
    return [row for row in half if (model_task_of(row), row["technique"]) in tried]


def quality_by_pattern(rows: list[dict]) -> Figure:
    """Draw quality of each criterion at half the weights, unstructured, 4:8 and 2:4."""
    half = pattern_rows(rows)
    frame = core.scored_frame(sorted(half, key=lambda row: [*PATTERNS].index(row["settings"].get("pattern"))))
    frame["pattern"] = [PATTERNS[row["settings"].get("pattern")] for row in frame["row"]]
    frames = {model_task: core.of_model_task(frame, model_task) for model_task in model_tasks(half)}
    xlabel = "Where the half that is zero may lie"
    return core.quality_panels(frames, rows, "pattern", xlabel, star=None, line=False, dodge=["name"])


def sensitivity_maps(
    rows: list[dict], *, technique: str = "sensitivity", level_text: str = "{:.0%} of one group"
) -> Figure:
    """Draw how far the outputs move when one group of layers is pruned, by block (across) and kind (down).

    Or rounded, or whatever else the analysis `technique` did to one group; drawn is the middle one of its
    levels. All models share one log scale.
    """
    scans = [row for row in rows if row["technique"] == technique]
    tables = [_sensitivity_table(row["achieved"]) for row in scans]
    changes = pd.concat([table.stack() for table in tables])
    norm = LogNorm(max(changes[changes > 0].min(), changes.max() / 1e4), max(changes.max(), 1e-12))
    figure, axes = core.panels(len(scans), height=1.5 + 0.22 * max(map(len, tables)))
    for axis, row, table in zip(axes, scans, tables, strict=True):
        rounded = table.map(lambda change: float(f"{change:.2g}"))  # 130, not 1.3e+02
        core.heat_map(axis, rounded, norm, digits="{:g}")
        levels = row["achieved"]["levels"]
        axis.set_title(f"{core.short_model(row['model'])}\n{level_text.format(levels[len(levels) // 2])}")
        axis.set(xlabel="Block", ylabel="")
    core.colour_bar(figure, axes, norm, "Change of outputs (KL,\nthousandths of a nat, log)")
    return figure


def _sensitivity_table(scan: dict) -> pd.DataFrame:
    """Return the change in thousandths of a nat at the middle level: kinds down, blocks across."""
    level = len(scan["levels"]) // 2
    groups = [(*name.split("."), 1e3 * changes[level]) for name, changes in scan["change"].items()]
    frame = pd.DataFrame(groups, columns=["stack", "block", "kind", "change"]).astype({"block": int})
    several = frame["stack"].nunique() > 1
    frame["group"] = frame["stack"].str[:3] + " " + frame["kind"] if several else frame["kind"]
    return frame.pivot_table("change", "group", "block", sort=False).sort_index(axis="columns")


def zeros_worth(rows: list[dict]) -> Figure:
    """Draw what a zero saves: bytes by format over sparsity, and time through each kernel."""
    kernels = next((row for row in rows if row["technique"] == "kernels"), None)
    timings = kernels["achieved"]["timings"] if kernels else []
    batches = sorted({entry["rows"] for entry in timings})
    figure, axes = core.panels(1 + len(batches), height=3.4)
    bytes_panel(axes[0], rows, model_tasks(rows)[0])
    for axis, batch in zip(axes[1:], batches, strict=True):
        kernel_panel(axis, [entry for entry in timings if entry["rows"] == batch])
        axis.set_title(f"One linear layer,\n{batch} token{'s' * (batch != 1)}")
    if batches:
        axes[1].set_ylabel("Speed-up over dense fp32 (log,\nhigher is better; grey: noise floor)")
    core.common_legend(figure, axes, columns=4)
    return figure


def bytes_against_sparsity(rows: list[dict]) -> Figure:
    """Draw bytes of each storage format over sparsity, relative to the dense file, with break-evens."""
    figure, axes = core.panels(len(model_tasks(rows)), sharey=True)
    for axis, model_task in zip(axes, model_tasks(rows), strict=True):
        bytes_panel(axis, rows, model_task)
    core.common_legend(figure, axes[:1], columns=3)
    return figure


def bytes_panel(axis: Axes, rows: list[dict], model_task: ModelTask) -> None:
    """Draw bytes over achieved sparsity; dotted: break-even by arithmetic; diamond: as measured."""
    stored = [
        row
        for row in rows
        if row["memory"] and model_task_of(row) == model_task and not is_recovered(row) and is_plain(row)
    ]
    dense = next(row for row in stored if row["technique"] == "dense")
    pruned = [row for row in stored if row["technique"] == "magnitude-layer"] or stored
    pruned = sorted([dense, *pruned], key=lambda row: row["achieved"].get("sparsity", 0.0))
    x = [row["achieved"].get("sparsity", 0.0) for row in pruned]
    for name, (title, colour, break_even) in FORMATS.items():
        if name not in dense["memory"]["formats"]:  # of packed integers only
            continue
        y = [row["memory"]["formats"][name] / dense["memory"]["formats"]["dense"] for row in pruned]
        axis.plot(x, y, marker="o", color=colour, label=title)
        if break_even:
            axis.axvline(break_even, color=colour, ls=":", lw=1)
            if (measured := crossing(x, y)) is not None:
                axis.plot([measured], [1.0], marker="D", color=colour, ms=7, mec="white")
    axis.axhline(1.0, color="#000000", lw=0.8)
    axis.set_title(core.short_model(model_task[0]))
    axis.set(xlabel="Achieved sparsity (fraction\nof prunable weights)")
    axis.set_ylabel("Bytes of the whole model / dense fp32\n(lower is better)")


def crossing(x: list[float], y: list[float]) -> float | None:
    """Return where a falling line through the points (x, y) reaches 1 between two of them, or None."""
    for (x0, y0), (x1, y1) in zip(zip(x, y), list(zip(x, y))[1:]):
        if y0 >= 1 > y1 and y0 > y1:
            return x0 + (x1 - x0) * (y0 - 1) / (y0 - y1)
    return None


def kernel_panel(axis: Axes, entries: list[dict]) -> None:
    """Draw the speed-up of one linear layer through each kernel; dashed: what arithmetic would allow."""
    frame = pd.DataFrame(entries).sort_values("sparsity")
    floor = frame["noise_floor"].max()
    axis.axhspan(1 / (1 + floor), 1 + floor, color=core.NOISE, lw=0)
    for kernel, group in frame.groupby("kernel", sort=False):
        title, colour = KERNELS.get(kernel, (kernel, core.GREY))
        speed, low, high = (1 / group[name] for name in ("ratio", "ratio_high", "ratio_low"))
        axis.errorbar(
            group["sparsity"], speed, yerr=[speed - low, high - speed], marker="o", color=colour, label=title
        )
    levels = sorted(frame["sparsity"].unique())
    allowed = [1 / (1 - level) for level in levels]
    axis.plot(levels, allowed, color=core.GREY, ls="--", lw=1, label="by arithmetic, 1/(1 − s)")
    axis.axhline(1.0, color="#000000", lw=0.8)
    axis.set(xlabel="Sparsity (fraction\nof this layer's weights)")
    core.log_axis(axis)
