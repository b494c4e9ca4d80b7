"""Figures of a model cut to a shape and trained on: held-out loss by tokens, and longer texts."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import look_of

SCRATCH = "scratch-shape"
WAYS = ("sheared", "lora-prune", "magnitude-shape", SCRATCH)
KINDS = {
    "none": ("as trained", "#000000", "o"),
    "linear": ("linear", "#0072B2", "s"),
    "dynamic": ("dynamic", "#009E73", "^"),
    "yarn": ("YaRN", "#D55E00", "D"),
}


def runs(rows: list[dict], adapters: str | None = None) -> dict[str, list[dict]]:
    """Return technique -> its rows by seed, of those that recovered all weights, or by `adapters`."""
    by_technique: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        if row["technique"] in WAYS and row["quality"] and row["settings"].get("adapters") == adapters:
            by_technique.setdefault(row["technique"], []).append(row)
    return {technique: by_technique[technique] for technique in WAYS if technique in by_technique}


def curve(run: dict) -> np.ndarray:
    """Return tokens and held-out losses, `(2, points)`, from the cut on."""
    return np.array(run["achieved"]["curve"]).T


def paired(runs: list[dict], other_runs: list[dict]) -> list[tuple[dict, dict]]:
    """Return the runs of two ways that share a seed."""
    by_seed = {run["seed"]: run for run in other_runs}
    return [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]


def switches(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Return switch -> seed -> what the run with it measured."""
    by_switch: dict[str, dict[int, dict]] = {}
    for row in rows:
        if row["technique"] == "switch":
            by_switch.setdefault(row["settings"]["switch"], {})[row["settings"]["seed"]] = row["achieved"]
    return by_switch


def contexts(rows: list[dict]) -> list[dict]:
    """Return the entries of the last row that looked at longer texts."""
    by_row = [row["achieved"]["contexts"] for row in rows if row["technique"] == "context-lengths"]
    return by_row[-1] if by_row else []


def curves_figure(rows: list[dict]) -> Figure:
    """Draw held-out loss over tokens, a line per run, and the mean and range of the gap to scratch."""
    by_technique = runs(rows)
    figure, (losses, gaps) = plt.subplots(1, 2, figsize=(core.WIDTH, 3.6))
    for technique, several in by_technique.items():
        look = look_of(technique)
        for run in several:
            tokens, loss = curve(run)
            losses.plot(
                tokens / 1e3, loss, marker=look.marker, ms=3, lw=1.2, color=look.colour, label=look.title
            )
        pairs = (
            paired(several, by_technique[SCRATCH]) if technique != SCRATCH and SCRATCH in by_technique else []
        )
        if pairs:
            sns.lineplot(
                _gap_frame(pairs),
                x="tokens",
                y="gap",
                errorbar=("pi", 100),
                color=look.colour,
                lw=1.4,
                ax=gaps,
            )
    source = next(iter(by_technique.values()))[0]["achieved"]["source_loss"]
    losses.axhline(source, color="#000000", ls=":", lw=1.2, label="The model it began with")
    gaps.axhline(0.0, color="#000000", lw=0.8)
    tokens = "Tokens, pruning's included (thousands)"
    losses.set(xlabel=tokens, ylabel="Held-out loss (nats, lower is better)")
    gaps.set(xlabel=tokens, ylabel="Loss minus that from scratch\n(nats, lower is better)")
    core.common_legend(figure, [losses], columns=3)
    return figure


def _gap_frame(pairs: list[tuple[dict, dict]]) -> pd.DataFrame:
    """Return per pair of runs the first one's loss minus the second one's, at the first pair's tokens."""
    tokens = curve(pairs[0][0])[0]
    gaps = [np.interp(tokens, *curve(first)) - np.interp(tokens, *curve(second)) for first, second in pairs]
    return pd.concat([pd.DataFrame({"tokens": tokens / 1e3, "gap": gap}) for gap in gaps])


def contexts_figure(rows: list[dict]) -> Figure:
    """Draw perplexity by the window that texts are read in, a line per kind of RoPE scaling."""
    entries = contexts(rows)
    figure, axis = plt.subplots(figsize=(core.WIDTH, 3.6))
    for kind, stretch in dict.fromkeys((entry["kind"], entry["stretch"]) for entry in entries):
        title, colour, marker = KINDS[kind]
        scaled = [entry for entry in entries if (entry["kind"], entry["stretch"]) == (kind, stretch)]
        label = title if kind == "none" else f"{title}, × {stretch:g}"
        windows = [entry["window"] for entry in scaled]
        line = "-" if stretch <= 2 else "--"
        core.interval_line(axis, windows, scaled, color=colour, marker=marker, ls=line, label=label)
    windows = sorted({entry["window"] for entry in entries})
    axis.set_xticks(windows, map(str, windows))
    axis.set_xlabel("Window (tokens)")
    core.metric_axis(axis, "perplexity")
    core.common_legend(figure, [axis], columns=4)
    return figure
