"""Figures of distillation: students that a teacher taught beside the same students on hard labels, and untrained."""

import textwrap

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import STUDENTS, loss_words, metric_axis
from lmcompress.results.rows import dense_of, model_task_of, model_tasks

KINDS = {  # student: (title, colour of its curves)
    kind: (STUDENTS[kind], colour)
    for kind, colour in (
        ("copied", "#0072B2"),
        ("random", "#D55E00"),
        ("narrow", "#009E73"),
        ("pruned", "#CC79A7"),
    )
}
WAYS = {
    "untrained": ("Not trained afterwards", "#999933", "d"),
    "hard": ("Hard labels only", "#DDAA33", "o"),
    "taught": ("Taught by the dense model", "#882255", "X"),
}
ABLATED = {"temperature", "temperature_schedule", "soft_weight", "hard_weight", "matches", "match_weight"}


def kind_of(row: dict) -> str | None:
    """Which student a row is of, a key of `KINDS`; None for other rows."""
    if row["technique"] == "heads-ffn":
        return "pruned"
    return row["settings"].get("student") if row["technique"] in ("student", "distil") else None


def way_of(row: dict) -> str | None:
    """How it was trained, a key of `WAYS`; None for other rows, and for losses other than the usual."""
    settings = row["settings"]
    if not row["quality"] or kind_of(row) is None:
        return None
    if row["technique"] != "distil":
        recovery = settings.get("recovery")
        return "untrained" if not recovery else "taught" if recovery.get("teacher") else "hard"
    asked = ABLATED & set(settings)
    if asked == {"soft_weight", "hard_weight"} and settings["soft_weight"] == 0:
        return "hard"
    return None if asked else "taught"


def groups(rows: list[dict], pair: tuple[str, str]) -> dict[tuple[str, str], list[dict]]:
    """(student, way) -> its rows by seed, those of the settings recorded last."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in (one for one in rows if model_task_of(one) == pair and way_of(one)):
        found.setdefault((kind_of(row), way_of(row)), []).append(row)
    same = {
        place: [row for row in own if row["settings"] == own[-1]["settings"]] for place, own in found.items()
    }
    order = [(kind, way) for kind in KINDS for way in WAYS]
    return {place: sorted(same[place], key=lambda row: row["seed"]) for place in order if place in same}


def _pairs(rows: list[dict]) -> list[tuple[str, str]]:
    return [pair for pair in model_tasks(rows) if groups(rows, pair)]


def quality_figure(rows: list[dict]) -> Figure:
    """One panel per model and task: each student untrained, on hard labels and taught; a marker per seed."""
    pairs = _pairs(rows)
    figure, axes = core.panels(len(pairs))
    for axis, pair in zip(axes, pairs, strict=True):
        found, dense = groups(rows, pair), dense_of(rows, pair)
        kinds = [kind for kind in KINDS if any(place[0] == kind for place in found)]
        if dense:
            core.dense_band(axis, dense)
        for (kind, way), own in found.items():
            title, colour, marker = WAYS[way]
            centre = 1 + kinds.index(kind) + 0.27 * (list(WAYS).index(way) - 1)
            _seeds(axis, centre, own, color=colour, marker=marker, label=title)
        metric = next(iter(found.values()))[0]["quality"]["metric"]
        titles = [textwrap.fill(KINDS[kind][0], 12) for kind in kinds]
        axis.set_xticks(range(len(kinds) + 1), ["Dense", *titles], fontsize=7)
        axis.set(title=f"{pair[0]}\n{pair[1]}", ylabel=metric_axis(metric), xlim=(-0.5, len(kinds) + 0.6))
        if metric == "perplexity":
            axis.set_yscale("log")
    core.common_legend(figure, axes, columns=3)
    return figure


def _seeds(axis: Axes, centre: float, own: list[dict], **look) -> None:
    """A marker with its interval per seed, side by side, and a bar at their mean."""
    found = [row["quality"] for row in own if row["quality"]["value"] is not None]
    for place, one in enumerate(found):
        x, y = centre + 0.06 * (place - (len(found) - 1) / 2), one["value"]
        spans = [[max(0.0, y - one["low"])], [max(0.0, one["high"] - y)]]
        axis.errorbar(x, y, yerr=spans, ls="", ms=5, elinewidth=1, capsize=0, **look)
    if len(found) > 1:
        axis.hlines(
            np.mean([one["value"] for one in found]), centre - 0.13, centre + 0.13, color=look["color"]
        )


def curves(row: dict) -> dict | None:
    """The training curves a row holds, of a student or of a recovery."""
    return row["achieved"].get("curve") or row["achieved"].get("recovery_curve")


def curve_figure(rows: list[dict]) -> Figure:
    """Per model: training loss, loss on held-out labels, divergence from the teacher; means and ranges over seeds."""
    pairs = [pair for pair in _pairs(rows) if any(curves(own[0]) for own in groups(rows, pair).values())]
    parts = {
        "train": "Training loss, each its own (nats)",
        "validation": "Held-out loss on labels (nats)",
        "divergence": "Held-out KL from the teacher (nats)",
    }
    figure, axes = plt.subplots(len(pairs), 3, figsize=(12.6, 3.2 * len(pairs)), squeeze=False)
    for line, pair in zip(axes, pairs, strict=True):
        for (kind, way), own in groups(rows, pair).items():
            title, colour = KINDS[kind]
            style, words = ("-", "taught") if way == "taught" else ("--", "hard labels")
            for axis, part in zip(line, parts, strict=True):
                series = [found[part] for row in own if (found := curves(row)) and found.get(part)]
                if not series or len({len(one) for one in series}) > 1:
                    continue
                steps, values = [step for step, _ in series[0]], np.array(series)[:, :, 1]
                axis.plot(steps, values.mean(0), style, color=colour, label=f"{title}, {words}")
                axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        for axis, label in zip(line, parts.values(), strict=True):
            axis.set(xlabel="Step", ylabel=label)
        line[0].set_title(f"{pair[0]} · {pair[1]}")
    core.common_legend(figure, list(axes.flat), columns=4)
    return figure


def ablation_rows(rows: list[dict]) -> list[dict]:
    """Rows whose loss differs from the usual in one thing."""
    return [row for row in rows if row["technique"] == "distil" and row["quality"] and way_of(row) is None]


def ablation_figure(rows: list[dict]) -> Figure:
    """Per model and task: quality of one student under other losses, with 95 % intervals; band: the usual loss."""
    changed = ablation_rows(rows)
    pairs = model_tasks(changed)
    figure, axes = core.panels(len(pairs))
    figure.set_size_inches(6.2 * len(axes), 3.4)
    for axis, pair in zip(axes, pairs, strict=True):
        found, names = groups(rows, pair), {}
        for row in (one for one in changed if model_task_of(one) == pair):
            names.setdefault(", ".join(loss_words(row["settings"])), []).append(row)
        kind = kind_of(next(iter(names.values()))[0])
        usual, control = (found.get((kind, way), []) for way in ("taught", "hard"))
        lines = {"usual: soft alone, temperature 4": usual, **names, "hard labels only": control}
        for place, own in enumerate(lines.values()):
            for row in own:
                one = row["quality"]
                spans = [[max(0.0, one["value"] - one["low"])], [max(0.0, one["high"] - one["value"])]]
                colour = WAYS["hard" if own is control else "taught"][1]
                axis.errorbar(
                    one["value"], place + 0.08 * row["seed"], xerr=spans, marker="o", ls="", color=colour
                )
        for row in usual[:1]:
            axis.axvspan(row["quality"]["low"], row["quality"]["high"], color="#882255", alpha=0.08, lw=0)
        axis.set_yticks(range(len(lines)), list(lines), fontsize=8)
        axis.invert_yaxis()
        metric = next(iter(names.values()))[0]["quality"]["metric"]
        axis.set(title=f"{pair[0]} · {pair[1]}", xlabel=metric_axis(metric))
    return figure
