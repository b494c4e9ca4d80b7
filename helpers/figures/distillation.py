"""Figures of distillation: students taught by the dense model, on hard labels, and untrained."""

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
    """Return how it was trained, a key of `WAYS`; None for other rows and other losses."""
    settings = row["settings"]
    if not row["quality"] or kind_of(row) is None:
        return None
    if row["technique"] != "distil":
        recovery = settings.get("recovery")
        return "untrained" if not recovery else "taught" if recovery.get("teacher") else "hard"
    changed = ABLATED & set(settings)
    if changed == {"soft_weight", "hard_weight"} and settings["soft_weight"] == 0:
        return "hard"
    return None if changed else "taught"


def groups(rows: list[dict], model_task: tuple[str, str]) -> dict[tuple[str, str], list[dict]]:
    """Return (student, way) -> its rows by seed, those of the settings recorded last."""
    by_student: dict[tuple[str, str], list[dict]] = {}
    for row in (row for row in rows if model_task_of(row) == model_task and way_of(row)):
        by_student.setdefault((kind_of(row), way_of(row)), []).append(row)
    same = {
        student: [row for row in by_seed if row["settings"] == by_seed[-1]["settings"]]
        for student, by_seed in by_student.items()
    }
    order = [(kind, training) for kind in KINDS for training in WAYS]
    return {
        student: sorted(same[student], key=lambda row: row["seed"]) for student in order if student in same
    }


def _pairs(rows: list[dict]) -> list[tuple[str, str]]:
    return [model_task for model_task in model_tasks(rows) if groups(rows, model_task)]


def quality_figure(rows: list[dict]) -> Figure:
    """Draw each student untrained, on hard labels and taught, a marker per seed."""
    frames = {model_task: _student_frame(groups(rows, model_task)) for model_task in _pairs(rows)}
    dense_rows = {model_task: dense_of(rows, model_task) for model_task in frames}
    bands = {model_task: dense and dense["quality"] for model_task, dense in dense_rows.items()}
    figure = core.named_panels(frames, bands, means=True)
    for axis, band in zip(figure.axes, bands.values()):
        axis.plot(band["value"] if band else [], -0.3 if band else [], "*", color="#000000", ms=11, zorder=5)
    return figure


def _student_frame(students: dict[tuple[str, str], list[dict]]) -> pd.DataFrame:
    """Return the scored lines of every student, named by how it began and was trained."""
    lines = []
    for (kind, training), by_seed in students.items():
        title, colour, marker = WAYS[training]
        name = f"{KINDS[kind][0]}: {title.lower()}"
        lines.append(core.scored_frame(by_seed).assign(name=name, colour=colour, marker=marker, open=False))
    return pd.concat(lines)


def curves(row: dict) -> dict | None:
    """Return the training curves a row holds, of a student or of a recovery."""
    return row["achieved"].get("curve") or row["achieved"].get("recovery_curve")


def curve_figure(rows: list[dict]) -> Figure:
    """Draw training loss, held-out loss and divergence from the teacher: means and ranges over seeds."""
    pairs = [
        model_task
        for model_task in _pairs(rows)
        if any(curves(by_seed[0]) for by_seed in groups(rows, model_task).values())
    ]
    labels = {
        "train": "Training loss,\neach its own (nats)",
        "validation": "Held-out loss\non labels (nats)",
        "divergence": "Held-out KL\nfrom the teacher (nats)",
    }
    figure, axes = plt.subplots(len(pairs), 3, figsize=(core.WIDTH, 2.4 * len(pairs) + 0.3), squeeze=False)
    palette, dashes = dict(KINDS.values()), {"taught": "", "hard labels": (3, 2)}
    for line, model_task in zip(axes, pairs, strict=True):
        frame = _curve_frame(groups(rows, model_task))
        for axis, (curve, label) in zip(line, labels.items(), strict=True):
            points = frame[frame["part"] == curve]
            if len(points):
                sns.lineplot(
                    points,
                    x="step",
                    y="loss",
                    hue="student",
                    style="way",
                    palette=palette,
                    dashes=dashes,
                    errorbar=("pi", 100),
                    ax=axis,
                    legend=False,
                    lw=1.4,
                )
            axis.set(xlabel="Step", ylabel=label)
        core.title(line[0], model_task)
        for student, training in dict.fromkeys(zip(frame["student"], frame["way"])):
            look = {"color": palette[student], "ls": "--" if dashes[training] else "-"}
            line[0].plot([], [], label=f"{student}, {training}", **look)
    core.common_legend(figure, axes.flat, columns=2)
    return figure


def _curve_frame(students: dict[tuple[str, str], list[dict]]) -> pd.DataFrame:
    """Return one line per point of every training curve: student, way, part of the curve, step and loss."""
    return pd.DataFrame(
        [
            {
                "student": KINDS[kind][0],
                "way": "taught" if training == "taught" else "hard labels",
                "part": curve,
            }
            | point
            for (kind, training), by_seed in students.items()
            for row in by_seed
            for curve, points in (curves(row) or {}).items()
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
    frames, bands = {}, {}
    for model_task in model_tasks(ablation_rows(rows)):
        ablated = [row for row in ablation_rows(rows) if model_task_of(row) == model_task]
        kind, students = kind_of(ablated[0]), groups(rows, model_task)
        usual, control = (students.get((kind, training), []) for training in ("taught", "hard"))
        names = ["usual: soft alone, temperature 4"] * len(usual)
        names += [", ".join(loss_words(row["settings"])) for row in ablated]
        names += ["hard labels only"] * len(control)
        colours = [WAYS["hard" if name == "hard labels only" else "taught"][1] for name in names]
        frame = core.scored_frame([*usual, *ablated, *control])
        frames[model_task] = frame.assign(name=names, colour=colours, marker="o", open=False)
        bands[model_task] = usual[0]["quality"] if usual else None
    return core.named_panels(frames, bands)
