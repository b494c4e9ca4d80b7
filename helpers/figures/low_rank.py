"""Figures of low rank and sharing: what blocks have in common, quality at equal bytes, merged bases, and speed."""

from statistics import mean

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from helpers.figures import core
from lmcompress.results.labels import metric_axis
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks, smallest_format

BASES = {"mean": "of the mean", "stacked": "of the stack", "random": "random"}
RECOVERIES = {"shared": "shared maps trained", "all": "all trained", "lora": "LoRA folded in",
              "lora-per-block": "LoRA per block"}  # fmt: skip
FORMS = {  # how a series is held: (label, colour, marker, bytes of (ranks, blocks, out, in) in weights)
    "own": ("a basis for each map", "#000000", "o", lambda k, b, o, i: k["each"] * b * (i + o)),
    "read": ("one basis, of what they read", "#D55E00", "s", lambda k, b, o, i: k["stacked"] * (i + b * o)),
    "write": ("one basis, of what they write", "#0072B2", "^", lambda k, b, o, i: k["concatenated"] * (o + b * i)),
    "mean": ("mean map, one basis for the rest", "#009E73", "D",
             lambda k, b, o, i: o * i + k["differences stacked"] * (i + b * o)),
}  # fmt: skip


def way(row: dict) -> str:
    """Which form a row has and how it was made, in a few words."""
    settings = row["settings"]
    more = [BASES.get(settings.get("init")), RECOVERIES.get(settings.get("recover"))]
    more += [f"threshold {settings['threshold']:g}"] if "threshold" in settings else []
    return ", ".join([core.look(row["technique"])[0], *filter(None, more)])


def is_part(row: dict) -> bool:
    """Whether only some layers were changed, which for shared mean layers is how their size is chosen."""
    return bool({"kinds", "blocks"} & set(row["settings"])) and not row["technique"].startswith("mass")


def share(row: dict, dense: dict) -> float:
    """The row's smallest stored form over the dense file."""
    return smallest_format(row)[1] / dense["memory"]["formats"]["dense"]


def forms(rows: list[dict], pair: tuple[str, str], *, trained: bool) -> dict[str, list[dict]]:
    """Way -> its rows on whole models, one shot or after training, the smallest and the first seed first."""
    found: dict[str, list[dict]] = {}
    dense = dense_of(rows, pair)
    for row in (one for one in rows if one["quality"] and model_task_of(one) == pair and dense):
        if row is not dense and is_recovered(row) == trained and not is_part(row):
            found.setdefault(way(row), []).append(row)
    return {name: sorted(own, key=lambda r: (share(r, dense), r["seed"])) for name, own in found.items()}


def redundancy_figure(rows: list[dict]) -> Figure:
    """Per model: weights that hold most of the energy of each series, by form; below, cosines between blocks."""
    own = [row for row in rows if row["technique"] == "redundancy"]
    figure, axes = plt.subplots(2, len(own), figsize=(4.4 * len(own), 6.2), squeeze=False)
    for upper, lower, row in zip(*axes, own, strict=True):
        series = row["achieved"]["series"]
        names = [_series_name(one, series) for one in series]
        for form, (label, colour, marker, _) in FORMS.items():
            y = [held(one, form) for one in series]
            upper.plot(range(len(y)), y, ls="", color=colour, marker=marker, ms=5, label=label)
        upper.axhline(1, color="#7F7F7F", lw=0.8)
        tables = {_series_name(one, series): one for one in row["achieved"]["similarity"]}
        for place, (name, one) in enumerate(
            (n, s) for n, s in zip(names, series, strict=True) if n in tables
        ):
            cosines = np.array(tables[name]["cosine"], dtype=float)[np.triu_indices(one["blocks"], 1)]
            lower.plot([place] * len(cosines), np.abs(cosines), "o", color="#332288", ms=3, alpha=0.6)
            limit = 1.96 / (one["out"] * one["in"]) ** 0.5
            lower.hlines(limit, place - 0.4, place + 0.4, color="#7F7F7F", ls=":")
        for axis in (upper, lower):
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        upper.set_title(row["model"], fontsize=9)
        lower.set_ylim(bottom=0)
    energy = own[0]["settings"]["energy"]
    axes[0][0].set_ylabel(f"Weights for {energy:.0%} of the energy\n/ all weights (lower is better)")
    axes[1][0].set_ylabel("|cosine| between two blocks\n(dotted: 95 % of random pairs)")
    core.common_legend(figure, list(axes.flat), columns=2)
    return figure


def held(one: dict, form: str) -> float:
    """Weights that a series needs in a form of `FORMS`, over the weights it has."""
    size = one["blocks"], one["out"], one["in"]
    return FORMS[form][3](one["ranks"], *size) / np.prod(size)


def _series_name(one: dict, series: list[dict]) -> str:
    stack = one["stack"][:3] + " " if len({other["stack"] for other in series}) > 1 else ""
    kind = {"cross-attention": "cross ", "feed-forward": "ffn "}.get(one["kind"], "")
    return f"{stack}{kind}{one['role']}"


def budget_figure(rows: list[dict]) -> Figure:
    """A column per model: quality over bytes, one shot; below, each form after training, a marker per seed."""
    pairs = [pair for pair in model_tasks(rows) if dense_of(rows, pair)]
    after = [forms(rows, pair, trained=True) for pair in pairs]
    lines = max(1, max(map(len, after)))
    figure, axes = plt.subplots(2, len(pairs), figsize=(6.4 * len(pairs), 5.6 + 0.26 * lines), squeeze=False,
                                height_ratios=[4.2, 0.8 + 0.26 * lines])  # fmt: skip
    for upper, lower, pair, made in zip(*axes, pairs, after, strict=True):
        dense = dense_of(rows, pair)
        quality, before = dense["quality"], forms(rows, pair, trained=False)
        for place, own in enumerate(before.values()):
            _over_bytes(upper, own, dense, 0.003 * (place - (len(before) - 1) / 2))
        upper.plot([1], [quality["value"]], "*", color="#000000", ms=11, label="Dense")
        upper.axhspan(quality["low"], quality["high"], color="#000000", alpha=0.1, lw=0)
        lower.axvspan(quality["low"], quality["high"], color="#000000", alpha=0.1, lw=0)
        for place, own in enumerate(made.values()):
            for row in own:
                _across(lower, row, place + 0.16 * (own.index(row) - (len(own) - 1) / 2))
        labels = [
            f"{name.replace(', recovered', '')} ({100 * share(own[0], dense):.0f} %)"
            for name, own in made.items()
        ]
        lower.set_yticks(range(len(labels)), labels, fontsize=7)
        lower.set_ylim(max(1, len(labels)) - 0.5, -0.5)
        upper.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        upper.set(title=f"{pair[0]}\n{pair[1]}, one shot", xlabel="Bytes / dense bytes, smallest stored form")
        upper.set_ylabel(metric_axis(quality["metric"]))
        lower.set(title="after the same steps (bytes / dense)", xlabel=metric_axis(quality["metric"]))
        if quality["metric"] == "perplexity":
            upper.set_yscale("log")
            lower.set_xscale("log")
    core.common_legend(figure, list(axes[0]), columns=4)
    return figure


def _spans(quality: dict) -> list[list[float]]:
    value = quality["value"]
    return [[max(0.0, value - quality["low"])], [max(0.0, quality["high"] - value)]]


def _over_bytes(axis: Axes, own: list[dict], dense: dict, shift: float) -> None:
    _, colour, marker = core.look(own[0]["technique"])
    own = [row for row in own if row["quality"]["value"] is not None]
    spans = np.concatenate([_spans(row["quality"]) for row in own], axis=1) if own else None
    style = {"mean": ":", "random": "--"}.get(own[0]["settings"].get("init"), "-") if own else "-"
    axis.errorbar(
        [share(row, dense) + shift for row in own], [row["quality"]["value"] for row in own], yerr=spans,
        color=colour, marker=marker, ls=style, lw=1, elinewidth=0.8, capsize=1.5, label=way(own[0]) if own else None,
    )  # fmt: skip


def _across(axis: Axes, row: dict, place: float) -> None:
    quality, (_, colour, marker) = row["quality"], core.look(row["technique"])
    if quality["value"] is not None:
        axis.errorbar(quality["value"], place, xerr=_spans(quality), color=colour, marker=marker, ls="", ms=5,
                      elinewidth=0.9, capsize=1.5)  # fmt: skip


def part_rows(rows: list[dict]) -> list[dict]:
    """Rows where low rank was given to one layer type, or to a run of blocks, and not to both."""
    own = [row for row in rows if row["quality"] and row["technique"] == "low-rank" and is_part(row)]
    return [row for row in own if ("kinds" in row["settings"]) != ("blocks" in row["settings"])]


def part_name(row: dict) -> str:
    """`feed-forward`, or `blocks 0 to 1`."""
    kinds, blocks = row["settings"].get("kinds"), row["settings"].get("blocks")
    if kinds:
        return "feed-forward" if kinds == "ffn" else kinds
    return f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"


def speed_figure(rows: list[dict]) -> Figure:
    """Per map: time of two narrow ones over the dense one's, by rank; dotted: what arithmetic alone would give."""
    own = [row for row in rows if row["technique"] == "layer-speed"]
    figure, axes = core.panels(len(own), height=4.2)
    for axis, row in zip(axes, own, strict=True):
        made, even = row["achieved"], row["achieved"]["break_even"]
        for count, colour in zip(row["settings"]["rows"], ("#0072B2", "#E69F00", "#882255", "#009E73") * 2):
            found = [one for one in made["timings"] if one["rows"] == count and one["rank"]]
            y = [one["ratio"] for one in found]
            spans = [[max(0.0, one["ratio"] - one["ratio_low"]) for one in found],
                     [max(0.0, one["ratio_high"] - one["ratio"]) for one in found]]  # fmt: skip
            x, label = [one["rank"] for one in found], f"{count} row{'s' * (count > 1)}"
            axis.errorbar(x, y, yerr=spans, color=colour, marker="o", ms=4, label=label)
            floor = mean(one["noise_floor"] for one in found)
            axis.axhspan(1 - floor, 1 + floor, color=colour, alpha=0.08, lw=0)
        ranks = sorted({one["rank"] for one in made["timings"] if one["rank"]})
        axis.plot(ranks, [rank / even for rank in ranks], ":", color="#000000", label="arithmetic: r / r*")
        axis.axvline(even, color="#7F7F7F", lw=0.8, ls="--", label="break-even rank r*")
        axis.axhline(1, color="#000000", lw=0.8)
        axis.set(title=f"{made['out']} × {made['in']}, {row['model']}", xlabel="Rank", yscale="log")
        axis.yaxis.set_major_locator(plt.FixedLocator([0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5]))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_locator(plt.NullLocator())
    axes[0].set_ylabel("Time / dense time (lower is better, log);\nbands: two copies of the dense map")
    core.common_legend(figure, axes, columns=5)
    return figure
