"""Comparison with published results: one line and one verdict a claim, however many rows speak to it."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml

from helpers.report import values
from lmcompress.results.labels import label
from lmcompress.results.rows import is_dense, model_tasks
from lmcompress.results.store import Row
from lmcompress.results.verdicts import BETTER, NOT_SIGNIFICANT, WORSE, comparisons

CANNOT = "cannot be run here"
OPPOSITE = {BETTER: WORSE, WORSE: BETTER}


@cache
def claims() -> list[dict]:
    """Return `claims.yaml`: each has `claim`, `source` and one of `order`, `value` or `command`."""
    return yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))


def table(rows: list[Row]) -> str:
    """Return the judged claims as a table."""
    lines = []
    for claim in claims():
        measured, verdict = judged(claim, rows)
        if verdict != CANNOT:
            lines.append([claim["claim"], claim["source"], measured, f"**{verdict}**"])
    return values.table(["Published", "Source", "Here", "Verdict"], lines) if lines else ""


def elsewhere(rows: list[Row]) -> str:
    """Return the claims that need another model or machine, with the command that would judge them."""
    unjudged = [claim for claim in claims() if judged(claim, rows)[1] == CANNOT]
    lines = [
        [c["claim"], c["source"], f"`{c['command']}`" if "command" in c else "another profile"]
        for c in unjudged
    ]
    return values.table(["Published", "Source", "What would judge it"], lines) if lines else ""


def judged(claim: dict, rows: list[Row]) -> tuple[str, str]:
    """Return what the rows say of a claim, and the verdict; the models whose test is n.s. by name alone."""
    if "value" in claim:
        return _value(claim["value"], rows)
    tests = list(_tests(claim["order"], rows)) if "order" in claim else []
    models = values.current(model for model, *_ in tests)
    tests = [test for test in tests if test[0] in models]
    if not tests:
        return "", CANNOT
    expected = claim["order"].get("expect", "better")
    words = [word for *_, word in tests]
    significant = [test for test in tests if test[2] != NOT_SIGNIFICANT]
    texts = [f"{values.model_name(model)} {change} ({word})" for model, change, word in significant]
    unclear = ", ".join(values.model_name(test[0]) for test in tests if test not in significant)
    texts += [f"{NOT_SIGNIFICANT}: {unclear}"] * bool(unclear)
    return "; ".join(texts), _verdict(words, expected)


def _verdict(words: list[str], expected: str) -> str:
    """Return one verdict of several tests; those that are not significant neither support nor contradict."""
    significant = [word for word in words if word != NOT_SIGNIFICANT]
    if expected == NOT_SIGNIFICANT:
        return "consistent" if not significant else "not reproduced"
    if not significant:
        return "not decided (n.s.)"
    agreeing = sum(word == expected for word in significant)
    if agreeing == len(significant):
        return "reproduced" if len(significant) == len(words) else "reproduced where significant"
    return "reversed" if not agreeing else "mixed"


def _tests(order: dict, rows: list[Row]) -> Iterable[tuple[str, str, str]]:
    """Yield model, difference and verdict of every recorded comparison of `first` with `second`, whichever of
    the two was recorded first.
    """
    order_of = [order["first"], order["second"]]
    for model_task in model_tasks(rows):
        for row, p, word in comparisons(rows, model_task):
            sides, metric = [row["achieved"]["first"], row["achieved"]["second"]], row["achieved"]["metric"]
            labels = [label(side["technique"], side["settings"]) for side in sides]
            gap = [row["achieved"]["difference"][end] for end in ("value", "low", "high")]
            if labels == order_of[::-1]:
                gap, word = [-gap[0], -gap[2], -gap[1]], OPPOSITE.get(word, word)
            if p is not None and labels in (order_of, order_of[::-1]):
                yield model_task[0], values.difference(*gap, metric), word


def _value(spec: dict, rows: list[Row]) -> tuple[str, str]:
    part = spec.get("set", "quality")  # "selection", where the published number is of that set
    for row in rows:
        if (
            row.get(part)
            and row["model"].endswith(spec["model"])
            and row["task"] == spec["task"]
            and is_dense(row)
        ):
            measured = row[part]["value"]
            near = abs(measured - spec["published"]) <= spec["tolerance"] * abs(spec["published"])
            return f"{measured:.4f}", "reproduced" if near else "not reproduced"
    return "", CANNOT
