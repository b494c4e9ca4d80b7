"""The report's page: one HTML file with the compared rows, a chart, filters and the decision; offline.

`page.html` beside this module is the template. Its script repeats `lmcompress.study.decision.decide`, which a
test compares with Python over a grid of budgets on the same rows.
"""

import json
from dataclasses import asdict
from pathlib import Path

from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline

from helpers.report import values
from lmcompress.results.frame import frame
from lmcompress.results.labels import SHAPE_NAMES, look_of, metric_name
from lmcompress.results.rows import by_model_task
from lmcompress.results.store import Row
from lmcompress.results.verdicts import BASELINE
from lmcompress.study import decision

NAME = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")
SLOT = "/*DATA*/"
MARK_SIZE = 12  # pixels


def render(rows: list[Row], *, report: str = "report.md") -> str:
    """Return the page as HTML; the same text for the same rows.

    Args:
        report: the relative address of the report that it stands beside.
    """
    text = json.dumps(data(rows, report=report), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace(SLOT, text.replace("</", "<\\/"))


def data(rows: list[Row], *, report: str) -> dict:
    """Return what the page shows: models and tasks with options, looks of techniques, names of shapes."""
    looks: dict[str, list] = {}
    grouped = by_model_task(decision.comparable_rows(rows))
    subjects = [_subject(group, looks) for group in grouped.values()]
    profile = rows[0]["profile"] if rows else ""
    return {
        "subjects": subjects,
        "looks": looks,
        "shapes": SHAPE_NAMES,
        "margins": decision.MARGINS,
        "report": report,
        "profile": profile,
    }


def _subject(rows: list[Row], looks: dict[str, list]) -> dict:
    """Return one model and task: the dense model first, then every configuration with what it costs."""
    table = frame(rows, details=False).set_index("key", drop=False)
    options = decision.options(rows)
    dense = table[table["verdict"] == BASELINE].iloc[0].to_dict()
    by_key = {row["key"]: row for row in rows}
    return {
        "model": dense["model"],
        "task": dense["task"],
        "metric": metric_name(dense["metric"]),
        "unit": options[0].unit,
        "lower_is_better": not dense["higher_is_better"],
        "scale": abs(dense["value"]) * decision.loss_scale(dense["metric"])[0],
        "options": [asdict(o) | _shown(o, table.loc[o.key].to_dict(), by_key[o.key], looks) for o in options],
    }


def _shown(option: decision.Option, line: dict, row: Row, looks: dict[str, list]) -> dict:
    """Return what a mark needs beyond its option: its look, its numbers in words, and its command.

    `standing` is how the option stands without a margin, where the report set confirms it, and where not.
    """
    look = look_of(row["technique"], row["settings"])
    looks[look.title] = [look.colour, *_outline(look.marker)]
    return {
        "title": look.title,
        "quality": values.quality(line),
        "change": decision.loss_text(option),
        "standing": [decision.standing(option, m) for m in (None, decision.NOTHING, -decision.NOTHING)],
        "command": "" if option.baseline else f"python -m lmcompress.study.apply {option.key} --save FOLDER",
    }


def _outline(marker: str) -> tuple[str, bool]:
    """Return matplotlib's marker as an SVG path around the origin, and whether it has an inside to fill."""
    style = MarkerStyle(marker)
    segments = style.get_path().transformed(style.get_transform()).iter_segments(simplify=False)
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
    path = ""
    for ends, code in segments:
        downwards = ends.reshape(-1, 2) * (MARK_SIZE, -MARK_SIZE)
        path += (
            "Z" if code == Outline.CLOSEPOLY else letters[code] + ",".join(f"{v:.1f}" for v in downwards.flat)
        )
    return path, style.is_filled()
