"""Rows that the section of low rank asks for."""

import numpy as np

from lmcompress.results.labels import look_of
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, smallest_format

BASES = {"mean": "of the mean", "stacked": "of the stack", "random": "random"}
RECOVERIES = {
    "shared": "shared maps trained",
    "all": "all trained",
    "lora": "LoRA folded in",
    "lora-per-block": "LoRA per block",
}
FORMS = {  # how a series is held: (label, colour, marker, bytes of (ranks, blocks, out, in) in weights)
    "own": ("a basis for each map", "#000000", "o", lambda k, b, o, i: k["each"] * b * (i + o)),
    "read": ("one basis, of what they read", "#D55E00", "s", lambda k, b, o, i: k["stacked"] * (i + b * o)),
    "write": (
        "one basis, of what they write",
        "#0072B2",
        "^",
        lambda k, b, o, i: k["concatenated"] * (o + b * i),
    ),
    "mean": (
        "mean map, one basis for the rest",
        "#009E73",
        "D",
        lambda k, b, o, i: o * i + k["differences stacked"] * (i + b * o),
    ),
}


def way(row: dict) -> str:
    """Return which form a row has and how it was made, in a few words."""
    settings = row["settings"]
    more = [BASES.get(settings.get("init")), RECOVERIES.get(settings.get("recover"))]
    more += [f"threshold {settings['threshold']:g}"] if "threshold" in settings else []
    return ", ".join([look_of(row["technique"]).title, *filter(None, more)])


def is_part(row: dict) -> bool:
    """Return whether only some layers were changed (for shared mean layers that chooses their size)."""
    return bool({"kinds", "blocks"} & set(row["settings"])) and not row["technique"].startswith("mass")


def share(row: dict, dense: dict) -> float:
    """Return the row's smallest stored form over the dense file."""
    return smallest_format(row)[1] / dense["memory"]["formats"]["dense"]


def forms(rows: list[dict], model_task: tuple[str, str], *, trained: bool) -> dict[str, list[dict]]:
    """Return way -> its rows on whole models, one shot or trained, smallest and first seed first."""
    by_form: dict[str, list[dict]] = {}
    dense = dense_of(rows, model_task)
    for row in (row for row in rows if row["quality"] and model_task_of(row) == model_task and dense):
        if row is not dense and is_recovered(row) == trained and not is_part(row):
            by_form.setdefault(way(row), []).append(row)
    return {
        name: sorted(group, key=lambda r: (share(r, dense), r["seed"])) for name, group in by_form.items()
    }


def held(entry: dict, form: str) -> float:
    """Return the weights that a series needs in a form of `FORMS`, over the weights it has."""
    size = entry["blocks"], entry["out"], entry["in"]
    return FORMS[form][3](entry["ranks"], *size) / np.prod(size)


def part_rows(rows: list[dict]) -> list[dict]:
    """Return the rows where low rank was given to one layer type, or to a run of blocks, and not to both."""
    low_rank_rows = [
        row for row in rows if row["quality"] and row["technique"] == "low-rank" and is_part(row)
    ]
    return [row for row in low_rank_rows if ("kinds" in row["settings"]) != ("blocks" in row["settings"])]


def part_name(row: dict) -> str:
    """Return `feed-forward`, or `blocks 0 to 1`."""
    kinds, blocks = row["settings"].get("kinds"), row["settings"].get("blocks")
    if kinds:
        return "feed-forward" if kinds == "ffn" else kinds
    return f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"
