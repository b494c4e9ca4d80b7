"""Models on text they were not made for: perplexity by text, and accuracy by field of grammar."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import metric_axis


def points(own: list[dict], metric: str) -> list[tuple[str, dict, dict]]:
    """A model's numbers of one metric, each under the name of its text or field, with its row and interval."""
    found = []
    for row in (row for row in own if row["quality"] and row["quality"]["metric"] == metric):
        quality = row["quality"]
        fields = {
            name.removeprefix("accuracy_").replace("_", " and "): part
            for name, part in quality["secondary"].items()
            if name.startswith("accuracy_")
        }
        parts = {"all" if fields else row["task"]: quality} | fields
        found += [(name, row, part) for name, part in parts.items() if part["value"] is not None]
    return found


def other_text(rows: list[dict]) -> Figure:
    """A line of panels per model: perplexity over its texts, accuracy over fields, dotted what knows nothing."""
    rows = [row for row in rows if row["quality"]]
    metrics = list(dict.fromkeys(row["quality"]["metric"] for row in rows))
    names = list(dict.fromkeys(row["model"] for row in rows))
    size = (6.0 * len(metrics), 3.6 * len(names))
    figure, axes = plt.subplots(len(names), len(metrics), figsize=size, squeeze=False)
    for line, name in zip(axes, names, strict=True):
        for axis, metric in zip(line, metrics, strict=True):
            _panel(axis, points([row for row in rows if row["model"] == name], metric))
            axis.set(title=name, ylabel=metric_axis(metric))
            if metric == "perplexity":
                axis.set_yscale("log")
    core.common_legend(figure, list(axes.flat), columns=4)
    return figure


def _panel(axis: Axes, found: list[tuple[str, dict, dict]]) -> None:
    names = list(dict.fromkeys(name for name, _, _ in found))
    ways = list(dict.fromkeys((row["technique"], str(row["settings"])) for _, row, _ in found))
    for name, row, part in found:
        title, colour, marker = core.look(row["technique"], row["settings"])
        place = ways.index((row["technique"], str(row["settings"])))
        x = names.index(name) + 0.16 * (place - (len(ways) - 1) / 2)
        spans = [[part["value"] - part["low"]], [part["high"] - part["value"]]]
        axis.errorbar(x, part["value"], yerr=spans, color=colour, marker=marker, ls="", label=title)
        if row["quality"]["floor"] is not None:
            at, label = names.index(name), "Knows nothing: unigram or chance"
            axis.hlines(row["quality"]["floor"], at - 0.4, at + 0.4, color="#7F7F7F", ls=":", label=label)
    axis.set_xticks(range(len(names)), [name.replace(" and ", " and\n") for name in names])
