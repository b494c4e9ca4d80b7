"""Models on text they were not made for: perplexity by text, and accuracy by field of grammar."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core


def points(rows: list[dict], metric: str) -> list[tuple[str, dict, dict]]:
    """Return the numbers of one metric: name of the text or field, row, and value with its interval."""
    numbers = []
    for row in (row for row in rows if row["quality"] and row["quality"]["metric"] == metric):
        quality = row["quality"]
        fields = {
            name.removeprefix("accuracy_").replace("_", " and "): quality_part
            for name, quality_part in quality["secondary"].items()
            if name.startswith("accuracy_")
        }
        by_name = {"all" if fields else row["task"]: quality} | fields
        numbers += [
            (name, row, quality_part)
            for name, quality_part in by_name.items()
            if quality_part["value"] is not None
        ]
    return numbers


def other_text(rows: list[dict]) -> Figure:
    """Draw perplexity by text and accuracy by field of grammar, dotted what a trivial baseline gives."""
    rows = [row for row in rows if row["quality"]]
    metrics = list(dict.fromkeys(row["quality"]["metric"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        len(models), len(metrics), figsize=(core.WIDTH, 3.0 * len(models) + 0.3), squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        for axis, metric in zip(line, metrics, strict=True):
            scored = points([row for row in rows if row["model"] == model], metric)
            if scored:
                _panel(axis, scored)
            axis.set(title=core.short_model(model), xlabel="")
            core.metric_axis(axis, metric)
    core.common_legend(figure, axes.flat, columns=4)
    return figure


def _panel(axis: Axes, scored: list[tuple[str, dict, dict]]) -> None:
    """Draw a model's numbers by text or field, its variants side by side."""
    frame = core.scored_frame([row for _, row, _ in scored]).assign(
        text=[name.replace(" and ", " and\n") for name, _, _ in scored],
        open=False,
        **{end: [quality[end] for _, _, quality in scored] for end in ("value", "low", "high")},
    )
    frame["variant"] = [f"{row['technique']} {row['settings']}" for row in frame["row"]]
    core.marks(axis, frame, "text", line=False, dodge=["variant"], by="variant", named=False)
    for position, name in enumerate(dict.fromkeys(frame["text"])):
        floor = frame[frame["text"] == name]["row"].iloc[0]["quality"]["floor"]
        if floor is not None:
            label = "Trivial baseline: unigram or chance"
            axis.hlines(floor, position - 0.4, position + 0.4, color=core.GREY, ls=":", label=label)
    for title, group in frame.groupby("name", sort=False):
        look = group.iloc[0]
        axis.plot([], [], ls="", color=look["colour"], marker=look["marker"], label=title)
