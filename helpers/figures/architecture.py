"""Models trained from scratch: loss by tokens and seconds, quality by parameters and time per token."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import metric_axis

Shape = tuple[int, str]  # layers and kind of φ
STYLES = {"none": ("-", "o", "no φ"), "shared": ("--", "^", "φ"), "per-head": (":", "s", "φ per head")}
STYLES |= {"linear": ("-.", "D", "linear φ")}  # none comes first: the shallowest is the baseline
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
BASELINE = {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}  # what all are timed against: the first shape


def scales(rows: list[dict]) -> list[str]:
    """Return the scales whose models were trained, smallest model first."""
    sizes: dict[str, int] = {}
    for row in rows:
        if row["technique"] == "architecture":
            size = row["achieved"]["parameters"]
            sizes[row["settings"]["scale"]] = min(size, sizes.get(row["settings"]["scale"], size))
    return sorted(sizes, key=sizes.get)


def of_scale(rows: list[dict], scale: str) -> list[dict]:
    """Return the rows of one scale: its models, its training times, and pairs of its models."""

    def settings_of(row: dict) -> dict:
        return (row["achieved"]["first"] if row["technique"] == "paired-difference" else row)["settings"]

    return [row for row in rows if settings_of(row).get("scale") == scale]


def trained(rows: list[dict], metric: str = "perplexity") -> dict[Shape, list[dict]]:
    """Return the rows of trained models scored by `metric`: a shape's runs by seed."""
    by_shape: dict[Shape, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        if row["technique"] == "architecture" and row["quality"]["metric"] == metric:
            by_shape.setdefault((row["settings"]["layers"], row["settings"]["phi"]), []).append(row)
    return dict(sorted(by_shape.items(), key=lambda entry: (entry[0][0], [*STYLES].index(entry[0][1]))))


def name_of(shape: Shape) -> str:
    """Return `5 layers, φ`."""
    return f"{shape[0]} layers, {STYLES[shape[1]][2]}"


def timed(runs: list[dict], shape: str = "decode_b1") -> dict | None:
    """Return the times of a shape at one part of the work, if any of its runs was timed."""
    return next((run["latency"]["shapes"][shape] for run in runs if run["latency"]), None)


def step_times(rows: list[dict]) -> dict[Shape, dict]:
    """Return the measured time of a training step per shape: ms, and the ratio to the baseline's."""
    row = next((row for row in reversed(rows) if row["technique"] == "training-speed"), None)
    shapes = row["achieved"]["shapes"] if row else []
    return {(entry["layers"], entry["phi"]): entry for entry in shapes}


def ratio_of(runs: list[dict]) -> float | None:
    """Return the time per decoded token of a shape over the baseline's, if it was timed."""
    time = timed(runs)
    return time and time["ratio"]


def architecture_figure(rows: list[dict], *, scale: int | None = None) -> Figure:
    """Draw held-out loss over tokens and over time, and perplexity over parameters and over time per token.

    Args:
        scale: place of the one scale to draw in `scales`, smallest first; None: the rows are of one scale.
    """
    rows = rows if scale is None else of_scale(rows, scales(rows)[scale])
    by_shape, steps = trained(rows), step_times(rows)
    depths = sorted({layers for layers, _ in by_shape})
    palette = {depth: COLOURS[position % len(COLOURS)] for position, depth in enumerate(depths)}
    figure, axes = plt.subplots(2, 2, figsize=(core.WIDTH, 6.4))
    (by_tokens, by_time), (by_size, by_latency) = axes
    curves, points = _curve_frame(by_shape, steps), _point_frame(by_shape)
    looks = {"hue": "layers", "palette": palette, "style": "phi", "legend": False}
    dashes = {
        kind: {"-": "", "--": (4, 2), ":": (1, 1.5), "-.": (4, 1, 1, 1)}[STYLES[kind][0]] for kind in STYLES
    }
    for axis, x in ((by_tokens, "tokens"), (by_time, "time")):
        shown = curves.dropna(subset=[x])
        if shown.empty:
            continue
        sns.lineplot(
            shown, x=x, y="loss", units="run", estimator=None, lw=1.1, dashes=dashes, ax=axis, **looks
        )
    markers = {kind: STYLES[kind][1] for kind in STYLES}
    for axis, x in ((by_size, "parameters"), (by_latency, "ratio")):
        sns.scatterplot(
            points.dropna(subset=[x]), x=x, y="perplexity", s=45, markers=markers, ax=axis, **looks
        )
    spans = points.dropna(subset=["ratio"])
    by_latency.hlines(
        spans["perplexity"], spans["low"], spans["high"], colors=spans["layers"].map(palette), lw=1.2
    )
    loss, perplexity = "Held-out loss (nats, lower is better)", metric_axis("perplexity")
    by_tokens.set(xlabel="Training tokens (millions)", ylabel=loss)
    by_time.set(xlabel="Training time (in steps of the baseline)", ylabel=loss)
    by_size.set(xlabel="Parameters (millions, lower is better)", ylabel=perplexity)
    by_latency.set(xlabel="Time per decoded token / baseline's (lower is better)", ylabel=perplexity)
    by_latency.set_visible(any(timed(runs) for runs in by_shape.values()))  # the baseline alone says nothing
    for shape in by_shape:
        line, marker, _ = STYLES[shape[1]]
        by_tokens.plot([], [], line, marker=marker, color=palette[shape[0]], label=name_of(shape))
    core.common_legend(figure, axes.flat, columns=4)
    return figure


def _curve_frame(by_shape: dict[Shape, list[dict]], steps: dict[Shape, dict]) -> pd.DataFrame:
    """Return one line per held-out loss: millions of tokens, steps of the baseline, layers, φ and run."""
    lines = []
    for (layers, phi), runs in by_shape.items():
        ratio = steps.get((layers, phi), {}).get("ratio", np.nan)
        for run in runs:
            for step, loss, _, tokens in run["achieved"]["validation"]:
                line = {
                    "tokens": tokens / 1e6,
                    "time": step * ratio,
                    "loss": loss,
                    "run": f"{layers} {phi} {run['seed']}",
                }
                lines.append(line | {"layers": layers, "phi": phi})
    return pd.DataFrame(lines)


def _point_frame(by_shape: dict[Shape, list[dict]]) -> pd.DataFrame:
    """Return one line per run: millions of parameters, time per token over the baseline's, perplexity."""
    lines = []
    for shape, runs in by_shape.items():
        time = timed(runs) or (BASELINE if shape == next(iter(by_shape)) else {})
        for run in runs:
            line = {"parameters": run["achieved"]["parameters"] / 1e6, "perplexity": run["quality"]["value"]}
            line |= {"layers": shape[0], "phi": shape[1], "ratio": time.get("ratio", np.nan)}
            lines.append(line | {end: time.get(f"ratio_{end}", np.nan) for end in ("low", "high")})
    return pd.DataFrame(lines)
