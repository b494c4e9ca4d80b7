"""The report's page: one HTML file with the rows that are shown, a chart, filters, and the decision; no
network.

`page.html` beside this module is the template. Its script holds the same decision as
`lmcompress.study.decision`, tested on
the same rows in a browser.
"""

import json
from dataclasses import asdict
from pathlib import Path

from helpers.report import rows_comparison as figures
from helpers.report import wording as w
from lmcompress.results.labels import SHAPE_NAMES, look_of
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks
from lmcompress.results.verdicts import loss_scale
from lmcompress.study import decision, explain

NAME = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")
SLOT = "/*DATA*/"


def render(rows: list[dict], *, report: str = "report.md") -> str:
    """The page as HTML; the same text for the same rows.

    Args:
        report: the relative address of the report that it stands beside.
    """
    text = json.dumps(data(rows, report=report), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace(SLOT, text.replace("</", "<\\/"))


def data(rows: list[dict], *, report: str) -> dict:
    """Return what the page shows: subjects with options, looks of techniques, names of shapes."""
    comparable, looks = decision.comparable_rows(rows), {}
    shown = [
        _subject([row for row in comparable if model_task_of(row) == model_task], looks)
        for model_task in model_tasks(comparable)
    ]
    profile = rows[0]["profile"] if rows else ""
    return {"subjects": shown, "looks": looks, "shapes": SHAPE_NAMES, "report": report, "profile": profile}


def _subject(rows: list[dict], looks: dict) -> dict:
    """One model and task: the dense model first, then every way with what it costs."""
    dense, by_key = dense_of(rows), {row["key"]: row for row in rows}
    choices = decision.options(rows)
    metric, value = dense["quality"]["metric"], dense["quality"]["value"]
    kind = next((kind for kind in figures.KINDS if figures.kind_rows(rows, kind)), "not timed")
    floors = {
        name: timing["noise_floor"] for name, timing in (dense["latency"] or {"shapes": {}})["shapes"].items()
    }
    return {
        "model": dense["model"],
        "task": dense["task"],
        "kind": kind,
        "metric": w.metric_name(metric),
        "unit": choices[0].unit,
        "near": figures.NEAR * value * loss_scale(metric)[0],
        "floors": floors,
        "allowed": decision.allowance(dense),
        "options": [asdict(choice) | _shown(by_key[choice.key], choice, looks) for choice in choices],
    }


def _shown(row: dict, option: decision.Option, looks: dict) -> dict:
    """What a mark needs beyond its option: its look, its words, and what it costs besides bytes and time."""
    drawn = look_of(row["technique"], row["settings"])
    looks[drawn.title] = [drawn.colour, drawn.marker]
    change = "" if option.baseline else w.difference(row)
    compute, ratios = row["compute"] or {}, {}
    for name in option.ms:
        ratios[name] = figures.ratio(row, name)
    return {
        "title": drawn.title,
        "open": is_recovered(row),
        "change": change,
        "ratios": ratios,
        "size": explain.size_text(option),
        "quality": w.with_interval(row["quality"], row["quality"]["metric"]),
        "flops": compute.get("flops"),
    }
