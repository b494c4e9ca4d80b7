"""Models trained from scratch: held-out loss by tokens and seconds, quality by parameters and time per token."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helpers.figures import core
from lmcompress.results.labels import metric_axis

Shape = tuple[int, str]  # layers and kind of φ
STYLES = {"none": ("-", "o", "no φ"), "shared": ("--", "^", "φ"), "per-head": (":", "s", "φ per head")}
STYLES |= {"linear": ("-.", "D", "linear φ")}  # none comes first: the shallowest is the baseline
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
BASELINE = {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}  # what all are timed against: the first shape


def scales(rows: list[dict]) -> list[str]:
    """The scales whose models were trained, smallest model first."""
    sizes: dict[str, int] = {}
    for row in rows:
        if row["technique"] == "architecture":
            size = row["achieved"]["parameters"]
            sizes[row["settings"]["scale"]] = min(size, sizes.get(row["settings"]["scale"], size))
    return sorted(sizes, key=sizes.get)


def of_scale(rows: list[dict], scale: str) -> list[dict]:
    """The rows of one scale: its models, its training times, and pairs of its models."""

    def asked(row: dict) -> dict:
        return (row["achieved"]["first"] if row["technique"] == "paired-difference" else row)["settings"]

    return [row for row in rows if asked(row).get("scale") == scale]


def trained(rows: list[dict], metric: str = "perplexity") -> dict[Shape, list[dict]]:
    """The rows of trained models scored by `metric`: a shape's runs by seed."""
    found: dict[Shape, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        if row["technique"] == "architecture" and row["quality"]["metric"] == metric:
            found.setdefault((row["settings"]["layers"], row["settings"]["phi"]), []).append(row)
    return dict(sorted(found.items(), key=lambda one: (one[0][0], [*STYLES].index(one[0][1]))))


def name_of(shape: Shape) -> str:
    """`5 layers, φ`."""
    return f"{shape[0]} layers, {STYLES[shape[1]][2]}"


def timed(runs: list[dict], part: str = "decode_b1") -> dict | None:
    """The times of a shape at one part of the work, if any of its runs was timed."""
    return next((run["latency"]["shapes"][part] for run in runs if run["latency"]), None)


def step_times(rows: list[dict]) -> dict[Shape, dict]:
    """The measured time of a training step per shape: milliseconds, and the ratio to the baseline's."""
    row = next((row for row in reversed(rows) if row["technique"] == "training-speed"), None)
    shapes = row["achieved"]["shapes"] if row else []
    return {(one["layers"], one["phi"]): one for one in shapes}


def ratio_of(runs: list[dict]) -> float | None:
    """The time per decoded token of a shape over the baseline's, if it was timed."""
    time = timed(runs)
    return time and time["ratio"]


def architecture_figure(rows: list[dict]) -> Figure:
    """A line per run over tokens and over time, a point per run over parameters and over time per token."""
    found, steps = trained(rows), step_times(rows)
    depths = sorted({layers for layers, _ in found})
    figure, ((by_tokens, by_time), (by_size, by_latency)) = plt.subplots(2, 2, figsize=(10.4, 7.4))
    for shape, runs in found.items():
        line, marker, _ = STYLES[shape[1]]
        look = {"color": COLOURS[depths.index(shape[0]) % len(COLOURS)], "label": name_of(shape)}
        time = timed(runs) or (BASELINE if shape == next(iter(found)) else None)
        for run in runs:
            step, loss, _, tokens = np.array(run["achieved"]["validation"]).T
            by_tokens.plot(tokens / 1e6, loss, line, marker="", lw=1.2, **look)
            if shape in steps:
                by_time.plot(step * steps[shape]["ratio"], loss, line, marker="", lw=1.2, **look)
            by_size.plot(run["achieved"]["parameters"] / 1e6, run["quality"]["value"], marker, **look)
            if time:
                spans = [[time["ratio"] - time["ratio_low"]], [time["ratio_high"] - time["ratio"]]]
                value = run["quality"]["value"]
                by_latency.errorbar(time["ratio"], value, xerr=spans, marker=marker, ls="", **look)
    loss, perplexity = "Held-out loss (nats, lower is better)", metric_axis("perplexity")
    by_tokens.set(xlabel="Training tokens (millions)", ylabel=loss)
    by_time.set(xlabel="Training time (in steps of the baseline)", ylabel=loss)
    by_size.set(xlabel="Parameters (millions)", ylabel=perplexity)
    by_latency.set(xlabel="Time per decoded token / baseline's (lower is better)", ylabel=perplexity)
    by_latency.set_visible(any(timed(runs) for runs in found.values()))  # the baseline alone says nothing
    marks = {
        STYLES[kind][2]: Line2D([], [], ls="", marker=STYLES[kind][1], color="#7F7F7F") for _, kind in found
    }
    by_size.legend(marks.values(), marks.keys(), fontsize=7)  # what the legend below tells by lines
    core.common_legend(figure, [by_tokens], columns=4)
    return figure
