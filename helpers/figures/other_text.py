"""Models on text they were not made for: perplexity by text, and accuracy by field of grammar."""

import pandas as pd
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import metric_axis


def numbers(rows: list[dict]) -> pd.DataFrame:
    """Return a line per row and text, or field of grammar: its value, interval, floor and look."""
    table = core.scored(rows)
    by_key = {row["key"]: row for row in rows}
    lines = []
    for line in table.to_dict("records"):
        quality = by_key[line["key"]]["quality"]
        fields = {
            name.removeprefix("accuracy_").replace("_", " "): scores
            for name, scores in quality["secondary"].items()
            if name.startswith("accuracy_")
        }
        whole = "all fields" if fields else line["task"]
        for text, scores in ({whole: quality} | fields).items():
            ends = {end: scores[end] for end in ("value", "low", "high")}
            lines += [line | ends | {"text": text}] if scores["value"] is not None else []
    return pd.DataFrame(lines)


def other_text(rows: list[dict]) -> Figure:
    """Draw perplexity by text and accuracy by field of grammar, over the trivial baseline's value."""
    table = numbers(rows)
    groups = list(table.groupby(["metric", "model"], sort=False))
    figure, axes = core.panels(len(groups), columns=2, height=3.2)
    for axis, ((metric, model), lines) in zip(axes, groups):
        texts = list(dict.fromkeys(lines["text"]))
        shorts = list(dict.fromkeys(lines["short"]))
        for point in lines.itertuples():
            y = texts.index(point.text) + 0.16 * (shorts.index(point.short) - (len(shorts) - 1) / 2)
            core.mark(axis, point, "value", y)
            axis.plot([], [], point.marker, color=point.colour, label=point.name)
        for text, floor in lines.groupby("text")["floor"].first().dropna().items():
            place = texts.index(text)
            name = "Trivial baseline (unigram, chance)"
            axis.vlines(floor, place - 0.4, place + 0.4, color=core.GREY, ls=":", label=name)
        axis.set_yticks(range(len(texts)), texts)
        axis.set_ylim(len(texts) - 0.4, -0.6)
        if metric == "perplexity":
            core.log_axis(axis, "x")
        label = metric_axis(metric).replace("(per token,", "(per token, log,")
        axis.set(title=core.short_model(model), xlabel=label)
    return core.legend(figure)
