"""Figures of weight statistics: statistics by block, norms apart from matrices, and spectra."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.figures import core

TECHNIQUE = "weight-statistics"
KINDS = {  # kind of tensor: colour, the same in every figure
    "attention": "#0072B2",
    "cross-attention": "#56B4E9",
    "feed-forward": "#D55E00",
    "norm": "#009E73",
}
MATRICES = {
    "original": ("#000000", "o"),
    "consecutive difference": ("#D55E00", "s"),
    "difference to the mean": ("#0072B2", "^"),
    "Gaussian of the same shape": ("#7F7F7F", "x"),
}
ROLES = ("q", "k", "v", "qkv", "o", "gate", "in", "out")
MOMENTS = {  # statistic: (its axis, what a value of a matrix is multiplied by there)
    "mean": ("Mean (thousandths)", 1e3),
    "std": ("Standard deviation", 1),
    "skewness": ("Skewness\n(0: symmetric)", 1),
    "excess_kurtosis": ("Excess kurtosis\n(0: Gaussian)", 1),
}
FRACTIONS = {
    "fraction_above_0_1": ("Fraction\nwith |x| > 0.1", 1),
    "fraction_above_1": ("Weights with |x| > 1\n(per million)", 1e6),
}
NORMS = MOMENTS | FRACTIONS | {"mean": ("Mean", 1), "fraction_above_1": ("Fraction\nwith |x| > 1", 1)}
CURVED = 10  # an excess kurtosis above this is drawn on a symlog scale


def layer_frame(rows: list[dict]) -> pd.DataFrame:
    """Return one line per model, stack, block and kind of tensor with every statistic."""
    return pd.DataFrame(
        [
            layer | {"model": core.short_model(row["model"])}
            for row in rows
            if row["technique"] == TECHNIQUE
            for layer in row["achieved"]["layers"]
        ]
    ).drop_duplicates(["model", "stack", "block", "kind"])


def moments_figure(rows: list[dict]) -> Figure:
    """Draw mean, deviation, skewness and excess kurtosis of the matrices by block, a column per model."""
    return _by_block(rows, MOMENTS)


def fractions_figure(rows: list[dict]) -> Figure:
    """Draw the fractions of matrix weights above 0.1 and above 1 by block, a column per model."""
    return _by_block(rows, FRACTIONS)


def _by_block(rows: list[dict], statistics: dict[str, tuple[str, float]]) -> Figure:
    layers = layer_frame(rows).query("kind != 'norm'")
    models = list(dict.fromkeys(layers["model"]))
    figure, axes = plt.subplots(
        len(statistics),
        len(models),
        figsize=(core.WIDTH, 1.75 * len(statistics) + 0.4),
        sharex="col",
        squeeze=False,
        sharey="row" if statistics is FRACTIONS else False,
    )
    for line, (statistic, (label, factor)) in zip(axes, statistics.items(), strict=True):
        for axis, model in zip(line, models, strict=True):
            lines = layers[layers["model"] == model]
            _lines(
                axis,
                lines.assign(value=factor * lines[statistic].astype(float)),
                statistic,
                hue="kind",
                palette=KINDS,
            )
            axis.set(xlabel="", ylabel="")
        line[0].set_ylabel(label)
    for top, bottom, model in zip(axes[0], axes[-1], models, strict=True):
        top.set_title(model)
        bottom.set_xlabel("Block")
    core.common_legend(figure, axes.flat, columns=4)
    return figure


def norms_figure(rows: list[dict]) -> Figure:
    """Draw every statistic of the normalisation gains and biases by block, a line per model."""
    norms = layer_frame(rows).query("kind == 'norm'")
    palette = dict(zip(dict.fromkeys(norms["model"]), plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    figure, axes = core.panels(len(NORMS), height=2.3)
    for axis, (statistic, (label, _)) in zip(axes, NORMS.items(), strict=True):
        _lines(
            axis, norms.assign(value=norms[statistic].astype(float)), statistic, hue="model", palette=palette
        )
        axis.set(xlabel="Block", ylabel=label)
    core.common_legend(figure, axes, columns=3)
    return figure


def _lines(axis: plt.Axes, layers: pd.DataFrame, statistic: str, *, hue: str, palette: dict) -> None:
    """Draw the column `value` over the blocks, a line per group; dashed: the decoder of a pair."""
    decoder = (layers.groupby("model")["stack"].transform("nunique") > 1) & (layers["stack"] == "decoder")
    for name, group in layers.groupby(layers[hue] + np.where(decoder, ", decoder", ""), sort=False):
        dashed = name.endswith(", decoder")
        colour = palette.get(group[hue].iloc[0], core.GREY)
        sns.lineplot(
            group,
            x="block",
            y="value",
            ax=axis,
            color=colour,
            marker="o",
            ls="--" if dashed else "-",
            label=name,
            mfc="white" if dashed else colour,
            mec=colour,
            legend=False,
            errorbar=None,
        )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(nbins=4)
    if statistic == "excess_kurtosis" and layers["value"].abs().max() > CURVED:
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
        axis.set_title("symlog, linear within ±1", loc="right", fontsize=8, fontweight="normal")


def spectra_figure(rows: list[dict]) -> Figure:
    """Draw effective rank per role, and how fast the energy gathers, of matrices and block differences."""
    rows = [row for row in rows if row["technique"] == TECHNIQUE]
    figure, axes = plt.subplots(2, len(rows), figsize=(core.WIDTH, 5.8), squeeze=False, sharey="row")
    for upper, lower, row in zip(*axes, rows, strict=True):
        spectra = sorted(row["achieved"]["spectra"], key=_order)
        stacks = {entry["stack"] for entry in spectra}
        roles = list(dict.fromkeys(_role(entry, stacks) for entry in spectra))
        for number, (kind, (colour, marker)) in enumerate(MATRICES.items()):
            entries = [entry for entry in spectra if entry["of"] == kind]
            if not entries:
                continue
            x = np.array([roles.index(_role(entry, stacks)) for entry in entries]) + (number - 1.5) * 0.15
            rank, low, high = (
                np.array([e[name] for e in entries]) for name in ("effective_rank", "low", "high")
            )
            upper.errorbar(
                x, rank, yerr=[rank - low, high - rank], color=colour, marker=marker, ls="", ms=4, capsize=0
            )
            curve = np.mean([entry["curve"] for entry in entries], axis=0)
            lower.plot(np.linspace(0, 1, len(curve)), curve, color=colour, label=kind)
        energy = row["settings"]["energy"]
        lower.axhline(energy, color=core.GREY, ls=":", lw=1)
        upper.set_xticks(range(len(roles)), roles, rotation=90 if len(roles) > 4 else 0, fontsize=8)
        upper.set_title(core.short_model(row["model"]), fontsize=9)
        upper.set(ylim=(0, 1))
        lower.set(xlabel="Singular values\nkept (fraction)", xlim=(0, 1), ylim=(0, 1.02))
    axes[0][0].set_ylabel(
        f"Effective rank at {energy:.0%} of the energy\n(fraction; lower compresses better)"
    )
    axes[1][0].set_ylabel("Share of the energy Σσ²\n(mean over roles)")
    core.common_legend(figure, axes[1], columns=4)
    return figure


def _order(entry: dict) -> tuple:
    kinds, role = list(KINDS), entry["role"]
    position = ROLES.index(role) if role in ROLES else len(ROLES)
    return entry["stack"] == "decoder", kinds.index(entry["kind"]), position, role


def _role(entry: dict, stacks: set[str]) -> str:
    stack = entry["stack"][:3] + " " if len(stacks) > 1 else ""
    return f"{stack}{'cross ' if entry['kind'] == 'cross-attention' else ''}{entry['role']}"
