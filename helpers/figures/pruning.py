"""Figures of unstructured pruning: patterns, sensitivity of layers, and what a zero is worth."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import metric_axis
from lmcompress.results.rows import is_plain, is_recovered, model_task_of, model_tasks

PATTERNS = {None: "unstructured", "4:8": "4:8", "2:4": "2:4"}


def pattern_rows(rows: list[dict]) -> list[dict]:
    """The rows at half the weights in one shot, unstructured or N:M, of the rules that were tried with a pattern."""
    half = [
        row
        for row in rows
        if row["quality"] and not is_recovered(row) and not row["settings"].get("allocation")
        and (row["settings"].get("pattern") in ("2:4", "4:8") or row["settings"].get("sparsity") == 0.5)
    ]  # fmt: skip
    tried = {(model_task_of(row), row["technique"]) for row in half if row["settings"].get("pattern")}
    return [row for row in half if (model_task_of(row), row["technique"]) in tried]


def quality_by_pattern(rows: list[dict]) -> Figure:
    """One panel per model and task: quality of each rule at half the weights, unstructured, 4:8 and 2:4."""
    chosen = pattern_rows(rows)
    pairs = model_tasks(chosen)
    figure, axes = core.panels(len(pairs))
    for axis, pair in zip(axes, pairs, strict=True):
        dense = next(
            r for r in rows if r["technique"] == "dense" and model_task_of(r) == pair and r["quality"]
        )
        own = [row for row in chosen if model_task_of(row) == pair]
        there = [name for name in PATTERNS if any(row["settings"].get("pattern") == name for row in own)]
        axis.axhspan(dense["quality"]["low"], dense["quality"]["high"], color="#000000", alpha=0.1, lw=0)
        axis.axhline(dense["quality"]["value"], color="#000000", lw=1, label="Dense, 95 % interval shaded")
        rules = list(dict.fromkeys(row["technique"] for row in own))
        for place, rule in enumerate(rules):
            title, colour, marker = core.look(rule)
            shift = 0.12 * (place - (len(rules) - 1) / 2)
            for row in (row for row in own if row["technique"] == rule):
                _point(axis, there.index(row["settings"].get("pattern")) + shift, row, colour, marker, title)
        if dense["quality"]["metric"] == "perplexity":
            axis.set_yscale("log")
        axis.set_xticks(range(len(there)), [PATTERNS[name] for name in there])
        axis.set(
            title=f"{pair[0]}\n{pair[1]}",
            xlabel="Where the half that is zero may lie",
            xlim=(-0.5, len(there) - 0.5),
        )
        axis.set_ylabel(metric_axis(dense["quality"]["metric"]))
    core.common_legend(figure, axes, columns=4)
    return figure


def _point(axis: Axes, x: float, row: dict, colour: str, marker: str, title: str) -> None:
    quality = row["quality"]
    value = quality["value"]
    spans = [[max(0.0, value - quality["low"])], [max(0.0, quality["high"] - value)]]
    axis.errorbar(x, value, yerr=spans, color=colour, marker=marker, ls="", label=title)


def sensitivity_maps(
    rows: list[dict], *, technique: str = "sensitivity", level_text: str = "{:.0%} of one group"
) -> Figure:
    """Per model: how far the outputs move when one group of layers is pruned, by block (across) and kind (down).

    Or rounded, or whatever else the analysis `technique` did to one group; drawn is the middle one of its levels.
    """
    scans = [row for row in rows if row["technique"] == technique]
    figure, axes = core.panels(len(scans), height=2.7)
    for axis, row in zip(axes, scans, strict=True):
        found, level = row["achieved"], len(row["achieved"]["levels"]) // 2
        groups = {name: name.split(".") for name in found["change"]}
        lines = list(dict.fromkeys((stack, kind) for stack, _, kind in groups.values()))
        width = 1 + max(int(block) for _, block, _ in groups.values())
        grid = [[float("nan")] * width for _ in lines]
        for name, (stack, block, kind) in groups.items():
            grid[lines.index((stack, kind))][int(block)] = found["change"][name][level]
        image = axis.imshow(grid, cmap="cividis", aspect="auto")
        top = max(max(found["change"][name][level] for name in groups), 1e-12)
        scale = 1000 if top < 0.05 else 1
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    colour = "black" if value > 0.6 * top else "white"
                    axis.text(
                        x, y, f"{scale * value:.2g}", ha="center", va="center", color=colour, fontsize=7
                    )
        several = len({stack for stack, _ in lines}) > 1
        axis.set_yticks(range(len(lines)), [f"{stack} {kind}" if several else kind for stack, kind in lines])
        axis.set_xticks(range(width))
        axis.set(title=f"{row['model']}\n{level_text.format(found['levels'][level])}", xlabel="Block")
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="Change of outputs" + " (text: ×1000)" * (scale > 1))
    return figure


def zeros_worth(rows: list[dict]) -> Figure:
    """What a zero saves: bytes by format over sparsity, and time through each kernel, with the break-evens."""
    kernels = next((row for row in rows if row["technique"] == "kernels"), None)
    timings = kernels["achieved"]["timings"] if kernels else []
    batches = sorted({entry["rows"] for entry in timings})
    figure, axes = core.panels(1 + len(batches))
    bytes_panel(axes[0], rows, model_tasks(rows)[0])
    axes[0].legend(fontsize=7)
    for axis, batch in zip(axes[1:], batches, strict=True):
        kernel_panel(axis, [entry for entry in timings if entry["rows"] == batch])
        axis.set_title(f"One linear map, {batch} tokens")
    if batches:
        axes[1].set_ylabel("Speed-up over dense fp32\n(higher is better; grey: noise floor)")
        axes[1].legend(fontsize=7)
    return figure


def bytes_against_sparsity(rows: list[dict]) -> Figure:
    """Bytes of each storage format over achieved sparsity, relative to the dense file, with break-evens."""
    pairs = model_tasks(rows)
    figure, axes = core.panels(len(pairs), share_y=True)
    for axis, pair in zip(axes, pairs, strict=True):
        bytes_panel(axis, rows, pair)
    core.common_legend(figure, axes[:1], columns=3)
    return figure


def bytes_panel(axis: Axes, rows: list[dict], pair: tuple[str, str]) -> None:
    """Bytes over achieved sparsity of one subject; dotted: break-even by arithmetic; diamond: as measured."""
    own = [
        r for r in rows
        if r["memory"] and model_task_of(r) == pair and not is_recovered(r) and is_plain(r)
    ]  # fmt: skip
    dense = next(row for row in own if row["technique"] == "dense")
    pruned = [row for row in own if row["technique"] == "magnitude-layer"] or own
    pruned = sorted([dense, *pruned], key=lambda row: row["achieved"].get("sparsity", 0.0))
    x = [row["achieved"].get("sparsity", 0.0) for row in pruned]
    for name, (title, colour, break_even) in core.FORMATS.items():
        if name not in dense["memory"]["formats"]:  # of packed integers only
            continue
        y = [row["memory"]["formats"][name] / dense["memory"]["formats"]["dense"] for row in pruned]
        axis.plot(x, y, marker="o", color=colour, label=title)
        if break_even:
            axis.axvline(break_even, color=colour, ls=":", lw=1)
            if (measured := crossing(x, y)) is not None:
                axis.plot([measured], [1.0], marker="D", color=colour, ms=7, mec="white")
    axis.axhline(1.0, color="#000000", lw=0.8)
    axis.set(title=pair[0], xlabel="Achieved sparsity (fraction of prunable weights)")
    axis.set_ylabel("Bytes of the whole model / dense fp32\n(lower is better)")


def crossing(x: list[float], y: list[float]) -> float | None:
    """Where a falling line through the points (x, y) reaches 1, between two of them; None if it does not."""
    for (x0, y0), (x1, y1) in zip(zip(x, y), list(zip(x, y))[1:]):
        if y0 >= 1 > y1 and y0 > y1:
            return x0 + (x1 - x0) * (y0 - 1) / (y0 - y1)
    return None


def kernel_panel(axis: Axes, entries: list[dict]) -> None:
    """Speed-up of one linear map through each kernel over sparsity; dashed: what the arithmetic left would allow."""
    for kernel in dict.fromkeys(entry["kernel"] for entry in entries):
        points = sorted((e for e in entries if e["kernel"] == kernel), key=lambda e: e["sparsity"])
        title, colour = core.KERNELS.get(kernel, (kernel, "#7F7F7F"))
        speed = [1 / p["ratio"] for p in points]
        spans = [[1 / p["ratio"] - 1 / p["ratio_high"] for p in points],
                 [1 / p["ratio_low"] - 1 / p["ratio"] for p in points]]  # fmt: skip
        axis.errorbar(
            [p["sparsity"] for p in points], speed, yerr=spans, marker="o", color=colour, label=title
        )
    levels = sorted({entry["sparsity"] for entry in entries})
    axis.plot(
        levels,
        [1 / (1 - s) for s in levels],
        color="#7F7F7F",
        ls="--",
        lw=1,
        label="by arithmetic, 1/(1 − s)",
    )
    floor = max(entry["noise_floor"] for entry in entries)
    axis.axhspan(1 / (1 + floor), 1 + floor, color="#d9d9d9", lw=0)
    axis.axhline(1.0, color="#000000", lw=0.8)
    axis.set(yscale="log", xlabel="Sparsity (fraction of this map's weights)")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
