"""Models trained from scratch or cut to a shape: loss over tokens, and final loss by depth."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import look_of

PHI = {  # φ on every head's output: (title, dashes, marker)
    "none": ("baseline", "", "o"),
    "shared": ("φ shared by the heads", (4, 2), "^"),
    "per-head": ("φ per head", (1, 1.5), "s"),
    "linear": ("linear φ", (4, 1, 1, 1), "D"),
}
SHAPED = ("sheared", "lora-prune", "magnitude-shape", "scratch-shape")


def training(rows: list[dict]) -> Figure:
    """Draw what φ adds to the held-out loss over tokens, and perplexity by depth; a row per scale."""
    lines = pd.DataFrame(
        [
            {"tokens": tokens / 1e6, "loss": loss, "run": row["key"], "seed": row["seed"]}
            | {name: row["settings"][name] for name in ("scale", "layers", "phi")}
            | {"perplexity": row["quality"]["value"], "parameters": row["achieved"]["parameters"]}
            for row in rows
            if row["technique"] == "architecture" and row["quality"]["metric"] == "perplexity"
            for _, loss, _, tokens in row["achieved"]["validation"]
        ]
    )
    lines = lines.sort_values("parameters", kind="stable").drop_duplicates(["run", "tokens"])
    figure, axes = core.panels(2 * lines["scale"].nunique(), columns=2, height=2.8)
    for gaps, final, (scale, runs) in zip(axes[::2], axes[1::2], lines.groupby("scale", sort=False)):
        _gaps(gaps, runs)
        _depths(final, runs.drop_duplicates("run"))
        gaps.set_title(f"{scale} scale, {runs['tokens'].max():.3g} M tokens:\nwhat φ adds, a line per seed")
        final.set_title(f"{scale} scale: does φ buy back a layer?\nafter training, a mark per seed")
    return core.legend(figure)


def _gaps(axis: Axes, lines: pd.DataFrame) -> None:
    """Draw over tokens the held-out loss with φ less that without, of the same depth and seed."""
    keys = ["layers", "seed", "tokens"]
    plain = lines[lines["phi"] == "none"].set_index(keys)["loss"]
    gap = lines[lines["phi"] == "shared"].join(plain, on=keys, rsuffix="_plain").dropna()
    gap = gap.assign(gap=gap["loss"] - gap["loss_plain"])
    palette = dict(zip(sorted(gap["layers"].unique()), core.COLOURS))
    core.curves(axis, gap, "tokens", "gap", hue="layers", palette=palette)
    for layers, colour in palette.items():
        axis.plot([], [], color=colour, label=f"{layers} layers")
    axis.axhline(0, color=core.DENSE, lw=0.9)
    axis.set(xlabel="Training tokens (millions)", ylabel="Held-out loss, φ − none\n(nats, lower is better)")


def _depths(axis: Axes, runs: pd.DataFrame) -> None:
    """Draw perplexity on the report set over the number of layers, means joined."""
    for (phi, (title, dashes, marker)), colour in zip(PHI.items(), core.COLOURS):
        points = runs[runs["phi"] == phi]
        if len(points):
            axis.plot(points["layers"], points["perplexity"], marker, color=colour, ms=4, alpha=0.7)
            means, line = points.groupby("layers")["perplexity"].mean(), (0, dashes) if dashes else "-"
            axis.plot(means.index, means, color=colour, ls=line, marker=marker, mfc="none", label=title)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="Layers", ylabel="Perplexity (lower is better)")


def shaped(rows: list[dict]) -> Figure:
    """Draw held-out loss over tokens of shapes cut from a larger model, and the gap to scratch."""
    runs = [row for row in rows if row["technique"] in SHAPED and row["quality"]]
    runs = [row for row in runs if not row["settings"].get("adapters")]
    lines = pd.DataFrame(
        [
            {"tokens": tokens / 1e3, "loss": loss, "seed": row["seed"]}
            | {"technique": row["technique"], "run": row["key"]}
            for row in runs
            for tokens, loss in row["achieved"]["curve"]
        ]
    )
    figure, (losses, gaps) = core.panels(2, columns=2, height=3.2)
    palette = {technique: look_of(technique).colour for technique in SHAPED}
    core.curves(losses, lines, "tokens", "loss", hue="technique", palette=palette)
    losses.axhline(
        runs[0]["achieved"]["source_loss"], color=core.DENSE, ls=":", label="Dense, before the cut"
    )
    keys = ["seed", "tokens"]
    scratch = lines[lines["technique"] == "scratch-shape"].set_index(keys)["loss"]
    gap = lines[lines["technique"] != "scratch-shape"].join(scratch, on=keys, rsuffix="_scratch").dropna()
    gap = gap.assign(gap=gap["loss"] - gap["loss_scratch"])
    core.curves(gaps, gap, "tokens", "gap", hue="technique", palette=palette)
    gaps.axhline(0, color=core.DENSE, lw=0.9)
    for technique in dict.fromkeys(lines["technique"]):
        losses.plot([], [], color=palette[technique], label=look_of(technique).title)
    tokens = "Tokens, pruning's included (thousands)"
    losses.set(title="A target shape, cut or from scratch", xlabel=tokens)
    losses.set_ylabel("Held-out loss (nats, lower is better)")
    gaps.set(title="Against scratch of the same seed", xlabel=tokens)
    gaps.set_ylabel("Loss − loss from scratch\n(nats, lower is better)")
    return core.legend(figure, columns=3)
