"""Figures of low rank and sharing: what blocks have in common, quality at equal bytes, and speed by rank."""

from statistics import mean

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import look_of
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks, smallest_format

BASES = {"mean": "of the mean", "stacked": "of the stack", "random": "random"}
RECOVERIES = {
    "shared": "shared maps trained",
    "all": "all trained",
    "lora": "LoRA folded in",
    "lora-per-block": "LoRA per block",
}
FORMS = {  # how a series is held: (label, colour, marker, bytes of (ranks, blocks, out, in) in weights)
    "own": ("a basis for each map", "#000000", "o", lambda k, b, o, i: k["each"] * b * (i + o)),
    "read": ("one basis, of what they read", "#D55E00", "s", lambda k, b, o, i: k["stacked"] * (i + b * o)),
    "write": (
        "one basis, of what they write",
        "#0072B2",
        "^",
        lambda k, b, o, i: k["concatenated"] * (o + b * i),
    ),
    "mean": (
        "mean map, one basis for the rest",
        "#009E73",
        "D",
        lambda k, b, o, i: o * i + k["differences stacked"] * (i + b * o),
    ),
}


def way(row: dict) -> str:
    """Return which form a row has and how it was made, in a few words."""
    settings = row["settings"]
    more = [BASES.get(settings.get("init")), RECOVERIES.get(settings.get("recover"))]
    more += [f"threshold {settings['threshold']:g}"] if "threshold" in settings else []
    return ", ".join([look_of(row["technique"]).title, *filter(None, more)])


def is_part(row: dict) -> bool:
    """Return whether only some layers were changed (for shared mean layers that chooses their size)."""
    return bool({"kinds", "blocks"} & set(row["settings"])) and not row["technique"].startswith("mass")


def share(row: dict, dense: dict) -> float:
    """Return the row's smallest stored form over the dense file."""
    return smallest_format(row)[1] / dense["memory"]["formats"]["dense"]


def forms(rows: list[dict], model_task: tuple[str, str], *, trained: bool) -> dict[str, list[dict]]:
    """Return way -> its rows on whole models, one shot or trained, smallest and first seed first."""
    by_form: dict[str, list[dict]] = {}
    dense = dense_of(rows, model_task)
    for row in (row for row in rows if row["quality"] and model_task_of(row) == model_task and dense):
        if row is not dense and is_recovered(row) == trained and not is_part(row):
            by_form.setdefault(way(row), []).append(row)
    return {
        name: sorted(group, key=lambda r: (share(r, dense), r["seed"])) for name, group in by_form.items()
    }


def redundancy_figure(rows: list[dict]) -> Figure:
    """Draw the weights that hold most of each series' energy, by form; below, cosines between blocks."""
    scans = [row for row in rows if row["technique"] == "redundancy"]
    figure, axes = plt.subplots(
        2, len(scans), figsize=(core.WIDTH, 6.0), squeeze=False, sharex="col", sharey="row"
    )
    for upper, lower, row in zip(*axes, scans, strict=True):
        series = row["achieved"]["series"]
        names = [_series_name(entry, series) for entry in series]
        for form, (label, colour, marker, _) in FORMS.items():
            weights = [held(entry, form) for entry in series]
            upper.plot(range(len(weights)), weights, ls="", color=colour, marker=marker, label=label)
        upper.axhline(1, color=core.GREY, lw=0.8)
        tables = {_series_name(entry, series): entry["cosine"] for entry in row["achieved"]["similarity"]}
        for position, (name, entry) in enumerate(
            (n, s) for n, s in zip(names, series, strict=True) if n in tables
        ):
            cosines = np.array(tables[name], dtype=float)[np.triu_indices(entry["blocks"], 1)]
            lower.plot([position] * len(cosines), np.abs(cosines), "o", color="#332288", ms=3, alpha=0.6)
            limit = 1.96 / (entry["out"] * entry["in"]) ** 0.5
            lower.hlines(limit, position - 0.4, position + 0.4, color=core.GREY, ls=":")
        lower.set_xticks(range(len(names)), names, rotation=90)
        core.title(upper, model_task_of(row))
    for axis in axes[:, 0]:
        axis.set_ylim(bottom=0)
    energy = scans[0]["settings"]["energy"]
    axes[0][0].set_ylabel(f"Weights for {energy:.0%} of the energy\n/ all weights (lower is better)")
    axes[1][0].set_ylabel("|cosine| between two blocks\n(dotted: 95 % of random pairs)")
    core.common_legend(figure, axes.flat, columns=2)
    return figure


def held(entry: dict, form: str) -> float:
    """Return the weights that a series needs in a form of `FORMS`, over the weights it has."""
    size = entry["blocks"], entry["out"], entry["in"]
    return FORMS[form][3](entry["ranks"], *size) / np.prod(size)


def _series_name(entry: dict, series: list[dict]) -> str:
    stack = entry["stack"][:3] + " " if len({other["stack"] for other in series}) > 1 else ""
    kind = {"cross-attention": "cross ", "feed-forward": "ffn "}.get(entry["kind"], "")
    return f"{stack}{kind}{entry['role']}"


def budget_figure(rows: list[dict]) -> Figure:
    """Draw quality of every form, one shot and trained, with its bytes over dense."""
    pairs = [model_task for model_task in model_tasks(rows) if dense_of(rows, model_task)]
    frames = {
        model_task: [_budget_frame(rows, model_task, trained=trained) for trained in (False, True)]
        for model_task in pairs
    }
    counts = [
        [max(1, frame["name"].nunique()) for frame in frames_by_training]
        for frames_by_training in frames.values()
    ]
    figure, axes = core.row_panels(counts, sharex="row")
    for line, lengths, (model_task, frames_by_training) in zip(axes, counts, frames.items(), strict=True):
        quality = dense_of(rows, model_task)["quality"]
        for axis, frame, when in zip(line, frames_by_training, ("one shot", "trained"), strict=True):
            core.dense_band(axis, quality, x=None, direction="x", floor=False)
            core.named_rows(axis, frame)
            axis.set_ylim(max(lengths) - 0.4, -0.6)
            core.title(axis, (model_task[0], f"{model_task[1]}, {when}"))
        for axis in line:
            core.metric_axis(axis, quality["metric"], direction="x")
    core.common_legend(figure, axes.flat, columns=1)
    return figure


def _budget_frame(rows: list[dict], model_task: tuple[str, str], *, trained: bool) -> pd.DataFrame:
    """Return the scored lines of every form, smallest first within it, named by form and bytes over dense."""
    dense = dense_of(rows, model_task)
    lines = [
        core.scored_frame([row]).assign(
            name=f"{name.replace(', recovered', '')} ({100 * share(row, dense):.0f} %)"
        )
        for name, by_size in forms(rows, model_task, trained=trained).items()
        for row in by_size
    ]
    empty = pd.DataFrame(columns=["name", "value", "low", "high", "colour", "marker", "open"])
    return pd.concat(lines, ignore_index=True) if lines else empty


def part_rows(rows: list[dict]) -> list[dict]:
    """Return the rows where low rank was given to one layer type, or to a run of blocks, and not to both."""
    low_rank_rows = [
        row for row in rows if row["quality"] and row["technique"] == "low-rank" and is_part(row)
    ]
    return [row for row in low_rank_rows if ("kinds" in row["settings"]) != ("blocks" in row["settings"])]


def part_name(row: dict) -> str:
    """Return `feed-forward`, or `blocks 0 to 1`."""
    kinds, blocks = row["settings"].get("kinds"), row["settings"].get("blocks")
    if kinds:
        return "feed-forward" if kinds == "ffn" else kinds
    return f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"


def speed_figure(rows: list[dict]) -> Figure:
    """Draw the time of two narrow layers over the dense one's, by rank; dotted: by arithmetic."""
    timed = [row for row in rows if row["technique"] == "layer-speed"]
    figure, axes = core.panels(len(timed), columns=2, height=3.6, sharey=True)
    for axis, row in zip(axes, timed, strict=True):
        speed, even = row["achieved"], row["achieved"]["break_even"]
        for count, colour in zip(row["settings"]["rows"], ("#0072B2", "#E69F00", "#882255", "#009E73") * 2):
            ratios = [entry for entry in speed["timings"] if entry["rows"] == count and entry["rank"]]
            qualities = [
                {"value": e["ratio"], "low": e["ratio_low"], "high": e["ratio_high"]} for e in ratios
            ]
            label = f"{count} token{'s' * (count > 1)}"
            ranks = [entry["rank"] for entry in ratios]
            core.interval_line(axis, ranks, qualities, color=colour, marker="o", label=label)
            floor = mean(entry["noise_floor"] for entry in ratios)
            axis.axhspan(1 - floor, 1 + floor, color=colour, alpha=0.08, lw=0)
        ranks = sorted({entry["rank"] for entry in speed["timings"] if entry["rank"]})
        axis.plot(ranks, [rank / even for rank in ranks], ":", color="#000000", label="arithmetic: r / r*")
        axis.axvline(even, color=core.GREY, lw=0.8, ls="--", label="break-even rank r*")
        axis.axhline(1, color="#000000", lw=0.8)
        core.log_axis(axis)
        axis.set_title(f"{core.short_model(row['model'])}, {speed['out']} × {speed['in']}")
        axis.set(xlabel="Rank")
    axes[0].set_ylabel("Time / dense time (log, lower is better);\nbands: two copies of the dense layer")
    core.common_legend(figure, axes, columns=5)
    return figure
