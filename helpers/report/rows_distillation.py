"""Rows that the section of distillation asks for."""

from lmcompress.results.labels import STUDENTS
from lmcompress.results.rows import model_task_of

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


def ablation_rows(rows: list[dict]) -> list[dict]:
    """Return the rows whose loss differs from the usual in one thing."""
    return [row for row in rows if row["technique"] == "distil" and row["quality"] and way_of(row) is None]
