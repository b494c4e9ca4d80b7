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
    """Draw held-out loss over tokens and final loss by depth and φ, a line of panels per scale."""
    trained = [row for row in rows if row["technique"] == "architecture"]
    trained = [row for row in trained if row["quality"]["metric"] == "perplexity"]
    by_scale: dict[str, list[dict]] = {}
    for row in sorted(trained, key=lambda row: row["achieved"]["parameters"]):
        by_scale.setdefault(row["settings"]["scale"], []).append(row)
    figure, axes = core.panels(2 * len(by_scale), columns=2, height=2.8)
    for position, (scale, runs) in enumerate(by_scale.items()):
        _depths(axes[2 * position], axes[2 * position + 1], runs)
        tokens = max(row["achieved"]["tokens"] for row in runs) / 1e6
        machine = ", ".join(dict.fromkeys(core.machine_of(row) for row in runs))
        axes[2 * position].set_title(f"{scale} scale, from scratch, {tokens:.3g} M tokens\n{machine}")
        axes[2 * position + 1].set_title(
            f"{scale} scale: does φ buy back a layer?\nfinal loss, a mark per run"
        )
    return core.legend(figure)


def _depths(losses: Axes, final: Axes, runs: list[dict]) -> None:
    """Draw held-out loss over tokens, a line per run, and the last one over the number of layers."""
    lines = pd.DataFrame(
        [
            {"tokens": tokens / 1e6, "loss": loss, "run": row["key"]}
            | {"layers": row["settings"]["layers"], "phi": row["settings"]["phi"]}
            for row in runs
            for _, loss, _, tokens in row["achieved"]["validation"]
        ]
    )
    palette = dict(zip(sorted(lines["layers"].unique()), core.COLOURS))
    look = {"hue": "layers", "palette": palette, "style": "phi"}
    look["dashes"] = {phi: dashes for phi, (_, dashes, _) in PHI.items()}
    core.curves(losses, lines, "tokens", "loss", **look)
    losses.set(xlabel="Training tokens (millions)", ylabel="Held-out loss (nats, lower is better)")
    last = lines.groupby("run").last().reset_index()
    for phi, (title, dashes, marker) in PHI.items():
        points = last[last["phi"] == phi]
        if len(points):
            colour = core.COLOURS[list(PHI).index(phi)]
            final.plot(points["layers"], points["loss"], marker, color=colour, ms=4, alpha=0.7)
            means = points.groupby("layers")["loss"].mean()
            line = (0, dashes) if dashes else "-"
            final.plot(means.index, means, color=colour, ls=line, marker=marker, mfc="none", label=title)
    for layers, colour in palette.items():
        losses.plot([], [], color=colour, label=f"{layers} layers")
    final.xaxis.get_major_locator().set_params(integer=True)
    final.set(xlabel="Layers", ylabel="Final held-out loss\n(nats, lower is better)")


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
