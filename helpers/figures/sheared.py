"""A model cut to a shape and trained on: held-out loss by tokens, what switches of the recipe cost, and longer texts."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from helpers.figures import core
from lmcompress.results.labels import metric_axis

SCRATCH = "scratch-shape"
WAYS = ("sheared", "lora-prune", "magnitude-shape", SCRATCH)
KINDS = {"none": ("as trained", "#000000", "o"), "linear": ("linear", "#0072B2", "s"),
         "dynamic": ("dynamic", "#009E73", "^"), "yarn": ("YaRN", "#D55E00", "D")}  # fmt: skip


def runs(rows: list[dict], adapters: str | None = None) -> dict[str, list[dict]]:
    """Way to the shape -> its rows by seed, of those that recovered all weights, or by these `adapters`."""
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        if row["technique"] in WAYS and row["quality"] and row["settings"].get("adapters") == adapters:
            found.setdefault(row["technique"], []).append(row)
    return {way: found[way] for way in WAYS if way in found}


def curve(run: dict) -> np.ndarray:
    """Tokens and held-out losses, `(2, points)`, from the cut on."""
    return np.array(run["achieved"]["curve"]).T


def paired(several: list[dict], others: list[dict]) -> list[tuple[dict, dict]]:
    """Runs of two ways that share a seed."""
    by_seed = {run["seed"]: run for run in others}
    return [(run, by_seed[run["seed"]]) for run in several if run["seed"] in by_seed]


def switches(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Switch -> seed -> what the run with it measured."""
    found: dict[str, dict[int, dict]] = {}
    for row in rows:
        if row["technique"] == "switch":
            found.setdefault(row["settings"]["switch"], {})[row["settings"]["seed"]] = row["achieved"]
    return found


def contexts(rows: list[dict]) -> list[dict]:
    """The entries of the last row that looked at longer texts."""
    found = [row["achieved"]["contexts"] for row in rows if row["technique"] == "context-lengths"]
    return found[-1] if found else []


def curves_figure(rows: list[dict]) -> Figure:
    """Held-out loss over tokens, a line per run; and the gap to the target shape from scratch, its mean and range."""
    found = runs(rows)
    figure, (losses, gaps) = plt.subplots(1, 2, figsize=(10.4, 4.2))
    for way, several in found.items():
        title, colour, marker = core.look(way)
        for run in several:
            tokens, loss = curve(run)
            losses.plot(tokens / 1e3, loss, marker=marker, ms=3, lw=1.2, color=colour, label=title)
        if way != SCRATCH and SCRATCH in found:
            _gap(gaps, several, found[SCRATCH], title, colour)
    source = next(iter(found.values()))[0]["achieved"]["source_loss"]
    losses.axhline(source, color="#000000", ls=":", lw=1.2, label="The model it began with")
    gaps.axhline(0.0, color="#000000", lw=0.8)
    losses.set(
        xlabel="Tokens, pruning's included (thousands)", ylabel="Held-out loss (nats, lower is better)"
    )
    gaps.set(xlabel="Tokens, pruning's included (thousands)")
    gaps.set_ylabel("Loss minus that from scratch (nats)")
    core.common_legend(figure, [losses], columns=3)
    return figure


def _gap(axis: Axes, several: list[dict], scratch: list[dict], title: str, colour: str) -> None:
    pairs = [(curve(run), curve(other)) for run, other in paired(several, scratch)]
    if pairs:
        tokens = pairs[0][0][0]
        found = np.array([np.interp(tokens, *first) - np.interp(tokens, *second) for first, second in pairs])
        axis.plot(tokens / 1e3, found.mean(0), color=colour, label=title)
        axis.fill_between(tokens / 1e3, found.min(0), found.max(0), color=colour, alpha=0.2, lw=0)


def contexts_figure(rows: list[dict]) -> Figure:
    """Perplexity by the window that texts are read in, a line per way to stretch positions."""
    found = contexts(rows)
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for kind, stretch in dict.fromkeys((one["kind"], one["stretch"]) for one in found):
        title, colour, marker = KINDS[kind]
        own = [one for one in found if (one["kind"], one["stretch"]) == (kind, stretch)]
        values = [one["value"] for one in own]
        spans = [[one["value"] - one["low"] for one in own], [one["high"] - one["value"] for one in own]]
        label = title if kind == "none" else f"{title}, × {stretch:g}"
        axis.errorbar(
            [one["window"] for one in own], values, yerr=spans, color=colour, marker=marker, label=label
        )
    windows = sorted({one["window"] for one in found})
    axis.set_xticks(windows, map(str, windows))
    axis.set(xlabel="Window (tokens)", ylabel=metric_axis("perplexity"), yscale="log")
    for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    axis.legend()
    return figure
