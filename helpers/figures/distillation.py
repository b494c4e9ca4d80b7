"""Figures of distillation: students that a teacher taught beside the same students on hard labels, and untrained."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import STUDENTS, loss_words
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
    """Return which student a row is of, a key of `KINDS`; None for other rows."""
    if row["technique"] == "heads-ffn":
        return "pruned"
    return row["settings"].get("student") if row["technique"] in ("student", "distil") else None


def way_of(row: dict) -> str | None:
    """Return how it was trained, a key of `WAYS`; None for other rows, and for losses other than the usual."""
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
    """Return (student, way) -> its rows by seed, those of the settings recorded last."""
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
    """Draw each student untrained, on hard labels and taught, a marker per seed: a panel per model and task."""
    frames = {}
    for pair in _pairs(rows):
        lines = []
        for (kind, way), by_seed in groups(rows, pair).items():
            title, colour, marker = WAYS[way]
            look = {"colour": colour, "marker": marker, "open": False}
            lines.append(core.scored_frame(by_seed).assign(name=f"{KINDS[kind][0]}: {title.lower()}", **look))
        frames[pair] = pd.concat(lines)
    figure, axes = core.row_panels([[frame["name"].nunique()] for frame in frames.values()])
    for axis, (pair, frame) in zip(axes.flat, frames.items(), strict=True):
        dense = dense_of(rows, pair)
        if dense:
            core.dense_band(axis, dense["quality"], x=None, which="x", floor=False)
            axis.plot(dense["quality"]["value"], -0.3, "*", color="#000000", ms=11, zorder=5)
        core.named_rows(axis, frame, means=True)
        core.title(axis, pair)
        core.metric_axis(axis, frame["metric"].iloc[0], which="x")
    return figure


def curves(row: dict) -> dict | None:
    """Return the training curves a row holds, of a student or of a recovery."""
    return row["achieved"].get("curve") or row["achieved"].get("recovery_curve")


def curve_figure(rows: list[dict]) -> Figure:
    """Draw training loss, loss on held-out labels and divergence from the teacher: means and ranges over seeds."""
    pairs = [pair for pair in _pairs(rows) if any(curves(own[0]) for own in groups(rows, pair).values())]
    parts = {
        "train": "Training loss,\neach its own (nats)",
        "validation": "Held-out loss\non labels (nats)",
        "divergence": "Held-out KL\nfrom the teacher (nats)",
    }
    figure, axes = plt.subplots(len(pairs), 3, figsize=(core.WIDTH, 2.4 * len(pairs) + 0.3), squeeze=False)
    palette, dashes = dict(KINDS.values()), {"taught": "", "hard labels": (3, 2)}
    for line, pair in zip(axes, pairs, strict=True):
        frame = _curve_frame(groups(rows, pair))
        for axis, (part, label) in zip(line, parts.items(), strict=True):
            points = frame[frame["part"] == part]
            if len(points):
                sns.lineplot(
                    points, x="step", y="loss", hue="student", style="way", palette=palette, dashes=dashes,
                    errorbar=("pi", 100), ax=axis, legend=False, lw=1.4,
                )  # fmt: skip
            axis.set(xlabel="Step", ylabel=label)
        core.title(line[0], pair)
        for student, way in dict.fromkeys(zip(frame["student"], frame["way"])):
            look = {"color": palette[student], "ls": "--" if dashes[way] else "-"}
            line[0].plot([], [], label=f"{student}, {way}", **look)
    core.common_legend(figure, axes.flat, columns=2)
    return figure


def _curve_frame(students: dict[tuple[str, str], list[dict]]) -> pd.DataFrame:
    """Return one line per point of every training curve: student, way, part of the curve, step and loss."""
    return pd.DataFrame(
        [
            {"student": KINDS[kind][0], "way": "taught" if way == "taught" else "hard labels", "part": part}
            | point
            for (kind, way), by_seed in students.items()
            for row in by_seed
            for part, points in (curves(row) or {}).items()
            if isinstance(points, list)
            for point in ({"step": step, "loss": loss} for step, loss in points)
        ],
        columns=["student", "way", "part", "step", "loss"],
    )


def ablation_rows(rows: list[dict]) -> list[dict]:
    """Return the rows whose loss differs from the usual in one thing."""
    return [row for row in rows if row["technique"] == "distil" and row["quality"] and way_of(row) is None]


def ablation_figure(rows: list[dict]) -> Figure:
    """Draw the quality of one student under other losses; band: the usual loss."""
    changed = ablation_rows(rows)
    pairs = model_tasks(changed)
    frames = {}
    for pair in pairs:
        other = [row for row in changed if model_task_of(row) == pair]
        kind, by_way = kind_of(other[0]), groups(rows, pair)
        usual, control = (by_way.get((kind, way), []) for way in ("taught", "hard"))
        names = ["usual: soft alone, temperature 4"] * len(usual)
        names += [", ".join(loss_words(row["settings"])) for row in other] + ["hard labels only"] * len(
            control
        )
        frame = core.scored_frame([*usual, *other, *control]).assign(name=names, marker="o", open=False)
        hard = frame["name"] == "hard labels only"
        frame["colour"] = hard.map({True: WAYS["hard"][1], False: WAYS["taught"][1]})
        frames[pair] = frame, usual
    figure, axes = core.row_panels([[frame["name"].nunique()] for frame, _ in frames.values()])
    for axis, (pair, (frame, usual)) in zip(axes.flat, frames.items(), strict=True):
        for row in usual[:1]:
            axis.axvspan(
                row["quality"]["low"], row["quality"]["high"], color=WAYS["taught"][1], alpha=0.08, lw=0
            )
        core.named_rows(axis, frame)
        core.title(axis, pair)
        core.metric_axis(axis, frame["metric"].iloc[0], which="x")
    return figure
