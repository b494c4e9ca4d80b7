"""Weight statistics by type of tensor and by layer: large weights and skewness, norms apart from matrices."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core

TECHNIQUE = "weight-statistics"
TYPES = (
    "token embedding",
    "attention",
    "cross-attention",
    "feed-forward",
    "head",
    "bias of a linear layer",
    "norm gain",
    "norm bias",
    "position bias",
)
DASHES = {"attention": "", "cross-attention": (1, 1.5), "feed-forward": (4, 2), "norm": ""}


def _frame(rows: list[dict], part: str) -> pd.DataFrame:
    """Return a line per model and entry of `part`, `layers` or `groups`, with statistics and `type`."""
    entries = [
        {**entry, "model": core.short_model(row["model"]), "type": _type(entry)}
        for row in rows
        if row["technique"] == TECHNIQUE
        for entry in row["achieved"][part]
    ]
    return pd.DataFrame(entries).assign(
        per_million=lambda table: 1e6 * table["fraction_above_1"].astype(float),
        skewness=lambda table: table["skewness"].astype(float),
    )


def _type(entry: dict) -> str:
    """Return the type of a group of tensors."""
    kind, bias = entry["kind"], entry.get("is_bias")
    if kind == "norm":
        return "norm bias" if bias else "norm gain"
    names = {"embedding": "token embedding", "position-bias": "position bias"}
    return "bias of a linear layer" if bias else names.get(kind, kind)


def fractions(rows: list[dict]) -> Figure:
    """Draw fractions of weights above 0.1 and above 1: by type, and by layer, matrices and norms apart."""
    groups, layers = _frame(rows, "groups"), _frame(rows, "layers")
    norms = layers["kind"] == "norm"
    figure, axes = core.panels(4, columns=2, height=2.9)
    _by_type(axes[0], groups, "fraction_above_0_1")
    axes[0].set(title="|w| > 0.1, by type", xlabel="Fraction of weights")
    _by_layer(axes[1], layers[~norms], "fraction_above_0_1")
    axes[1].set(title="|w| > 0.1, matrices by layer", ylabel="Fraction of weights")
    _by_type(axes[2], groups, "per_million")
    axes[2].set_xscale("symlog", linthresh=0.1)
    axes[2].set_xticks([0, 1, 100, 1e4, 1e6], ["0", "1", "100", "10,000", "1 M"])
    axes[2].set_xlim(-0.03, 3e6)
    axes[2].set(title="|w| > 1, by type", xlabel="Weights per million (symlog, linear below 0.1)")
    _by_layer(axes[3], layers[norms], "fraction_above_1")
    axes[3].set(title="|w| > 1, norm gains and biases by layer", ylabel="Fraction of weights")
    return core.legend(figure)


def skewness(rows: list[dict]) -> Figure:
    """Draw the skewness of the pooled weights by type, and by layer for matrices and for norms."""
    groups, layers = _frame(rows, "groups"), _frame(rows, "layers")
    norms = layers["kind"] == "norm"
    figure, axes = core.panels(3, height=3.2)
    _by_type(axes[0], groups, "skewness")
    axes[0].set_xscale("symlog", linthresh=1)
    axes[0].set_xticks([-5, -1, 0, 1, 5], ["−5", "−1", "0", "1", "5"])
    axes[0].set_xlim(-7, 7)
    axes[0].set(title="By type", xlabel="Skewness (0: symmetric;\nsymlog, linear within ±1)")
    for axis, part, name in ((axes[1], layers[~norms], "Matrices"), (axes[2], layers[norms], "Norms")):
        _by_layer(axis, part, "skewness")
        axis.axhline(0, color=core.DENSE, lw=0.8)
        axis.set(title=f"{name} by layer", ylabel="Skewness (0: symmetric)")
    return core.legend(figure)


def _by_type(axis: Axes, groups: pd.DataFrame, statistic: str) -> None:
    """Draw a statistic of the tensors outside and inside the blocks, types down, a marker per model."""
    types = [name for name in TYPES if name in set(groups["type"])]
    for model, colour, marker in zip(groups["model"].unique(), core.COLOURS, "os^Dv"):
        lines = groups[groups["model"] == model]
        positions = lines["type"].map(types.index)
        look = {"color": colour, "marker": marker, "ls": "", "ms": 5, "mfc": "none", "mew": 1.4}
        axis.plot(lines[statistic], positions, label=model, **look)
    axis.set_yticks(range(len(types)), types)
    axis.set_ylim(len(types) - 0.5, -0.5)


def _by_layer(axis: Axes, layers: pd.DataFrame, statistic: str) -> None:
    """Draw a statistic over the blocks, colour per model, dashes per type; a decoder follows its encoder."""
    palette = dict(zip(layers["model"].unique(), core.COLOURS))
    depth = layers[layers["stack"] == "encoder"].groupby("model")["block"].max().add(1)
    paired = layers.groupby("model")["stack"].transform("nunique") > 1
    behind = layers["model"].map(depth).where(paired & (layers["stack"] == "decoder"), 0).fillna(0)
    lines = layers.assign(layer=layers["block"] + behind)
    look = {"style": "kind", "dashes": DASHES, "markers": False, "palette": palette, "hue": "model"}
    sns.lineplot(lines, x="layer", y=statistic, units="stack", estimator=None, ax=axis, legend=False, **look)
    for kind, dashes in DASHES.items() if set(layers["kind"]) - {"norm"} else ():
        if kind in set(layers["kind"]):
            axis.plot([], [], color=core.GREY, ls=(0, dashes) if dashes else "-", label=kind)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("Layer (decoder behind encoder)")
