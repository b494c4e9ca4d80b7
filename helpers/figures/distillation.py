"""Distillation: students by how they began and what they were trained on."""

from collections import Counter

from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import STUDENTS, loss_words

TRAININGS = {  # (colour, marker)
    "not trained": ("#999933", "d"),
    "hard labels": ("#DDAA33", "o"),
    "distilled": ("#882255", "X"),
}


def losses_taken(rows: list[dict]) -> dict[str, list[str]]:
    """Return model → the loss (`loss_words`) that its students were taught by: of the longest runs the most
    frequent; the others were trials.
    """
    counts: dict[str, Counter] = {}
    for row in (
        row for row in rows if row["technique"] == "distil" and row["settings"].get("soft_weight") != 0
    ):
        key = core.examples_of(row["settings"]), *loss_words(row["settings"])
        counts.setdefault(row["model"], Counter())[key] += 1
    return {
        model: list(max(counter, key=lambda key: (key[0], counter[key], -len(key)))[1:])
        for model, counter in counts.items()
    }


def student_of(row: dict, losses: dict[str, list[str]]) -> tuple[str, str] | None:
    """Return which student a row is of, and how it was trained; None for other rows and other losses.

    `losses`: model → the loss that counts as "distilled".
    """
    settings, recovery = row["settings"], row["settings"].get("recovery")
    kind = "pruned" if row["technique"] == "heads-ffn" else settings.get("student")
    if not row["quality"] or row["technique"] not in ("heads-ffn", "student", "distil") or not kind:
        return None
    if row["technique"] == "distil":
        if settings.get("soft_weight") == 0:
            return kind, "hard labels"
        return (kind, "distilled") if loss_words(settings) == losses.get(row["model"]) else None
    return kind, "not trained" if not recovery else "distilled" if recovery.get("teacher") else "hard labels"


def quality(rows: list[dict]) -> Figure:
    """Draw each student untrained, trained on hard labels and distilled, a marker per seed."""
    losses = losses_taken(rows)
    students = {row["key"]: student for row in rows if (student := student_of(row, losses))}
    table = core.scored(row for row in rows if row["key"] in students or row["technique"] == "dense")
    table = table[table["key"].isin(students) | table["is_dense"]]
    kinds = [*STUDENTS, "dense"]
    drawn = [students.get(key, ("dense", "not trained")) for key in table["key"]]
    table = table.assign(
        short=[f"{STUDENTS.get(kind, kind)}: {training}" for kind, training in drawn],
        colour=[TRAININGS[training][0] for _, training in drawn],
        marker=[TRAININGS[training][1] for _, training in drawn],
        open=False,
        rank=[(kinds.index(kind), [*TRAININGS].index(training)) for kind, training in drawn],
    )
    return core.forest(table.sort_values("rank", kind="stable"), sort=False)
