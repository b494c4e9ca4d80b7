"""The comparison section: every measured way side by side, the best per budget, and the count of verdicts."""

import json
from collections import Counter

from helpers import plots
from helpers.plots import smallest_form, subject_of, subjects
from helpers.report import wording as w
from helpers.report.section import Drawing, Section

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.1)
CHOICE = 3
VERDICTS = ("better", "no measurable change", "worse", "collapsed")


def measured(rows: list[dict]) -> list[dict]:
    """The rows with a quality, each once though several notebooks recorded it, and of several seeds the first.

    Without those calibrated on what is scored, which exist to show what that does, and without models trained from
    scratch, which compress nothing; nor models with fewer than `CHOICE` rows: nothing to choose from.
    """
    scratch = {row["model"] for row in rows if row["technique"] == "architecture"}
    kept = (
        row
        for row in rows
        if row["quality"]
        and row["model"] not in scratch
        and row["technique"] != "scratch-shape"
        and not row["settings"].get("calibration", {}).get("scored")
    )
    found: dict[str, dict] = {}
    for row in kept:
        place = json.dumps([row["technique"], row["settings"], row["provenance"]["model_hash"],
                            row["provenance"]["data_hash"], subject_of(row)], sort_keys=True)  # fmt: skip
        if place not in found or row["seed"] <= found[place]["seed"]:
            found[place] = row
    ways = Counter(subject_of(row) for row in found.values())
    return [row for row in found.values() if ways[subject_of(row)] >= CHOICE]


def best_within(rows: list[dict], *, bytes_at_most: float) -> dict | None:
    """The row of best quality whose smallest stored form fits `bytes_at_most`; None if none does."""
    fitting = [row for row in rows if row["memory"] and smallest_form(row)[1] <= bytes_at_most]
    if not fitting:
        return None
    sign = 1 if fitting[0]["quality"]["higher_is_better"] else -1
    return max(fitting, key=lambda row: (sign * row["quality"]["value"], -smallest_form(row)[1]))


def findings(rows: list[dict]) -> list[str]:
    """Per model and task: what to use at each budget; then the verdicts of each technique, counted."""
    text, rows = [], measured(rows)
    if not rows:
        return text
    for pair in subjects(rows):
        own = [row for row in rows if subject_of(row) == pair]
        text.append(f"### {pair[0]} on {pair[1]}")
        text.append(budget_table(own))
    text.append("### Verdicts, counted")
    text.append(verdict_table(rows))
    return text


def budget_table(own: list[dict]) -> str:
    """For each budget of bytes, as a share of the dense file, the best row that fits."""
    dense = next(row for row in own if row["technique"] == "dense" and not plots.is_recovered(row))
    metric = dense["quality"]["metric"]
    verdicts = w.adjusted([row for row in own if row is not dense])
    base = dense["memory"]["formats"]["dense"]
    lines = []
    for budget in BUDGETS:
        best = best_within(own, bytes_at_most=budget * base)
        label = f"{w.percent(budget)} of dense ({w.bytes_text(budget * base)})"
        if best is None:
            lines.append([label, "nothing measured fits", "", "", ""])
            continue
        form, size = smallest_form(best)
        word = "baseline" if best is dense else verdicts[best["key"]][1]
        value = w.with_interval(best["quality"], metric)
        lines.append([label, w.name_of(best), f"{plots.FORMATS[form][0]}, {w.bytes_text(size)}", value, word])
    return w.table(["Budget", "Best measured", "Stored as", metric, "Against dense"], lines)


def verdict_table(rows: list[dict]) -> str:
    """How often each technique was better, no measurable change, worse, or collapsed."""
    counts: dict[str, Counter] = {}
    for pair in subjects(rows):
        own = [row for row in rows if subject_of(row) == pair]
        verdicts = w.adjusted(own)
        for row in own:
            if row["key"] in verdicts:
                name = plots.look(row["technique"], row["settings"])[0] + (
                    " + recovery" if row["settings"].get("recovery") else ""
                )
                counts.setdefault(name, Counter())[verdicts[row["key"]][1]] += 1
    lines = [[name, *(str(counter[word]) for word in VERDICTS)] for name, counter in counts.items()]
    return w.table(["Technique", *VERDICTS], lines)


SECTION = Section(
    notebook="11_comparison",
    title="Comparison",
    question="At the bytes, milliseconds or FLOPs I can afford, which way keeps most quality?",
    method=(
        "All recorded rows side by side. A row is on the front if none that costs no more has better quality. "
        "Bytes are those of the smallest stored form of the same weights; a form that must be expanded before it "
        "runs saves disk and download, not memory."
    ),
    findings=findings,
    drawings=(
        Drawing(
            "comparison-pareto",
            "Quality against bytes, time and FLOPs; the star is the dense model, the grey line joins the front.",
            lambda rows: plots.pareto(measured(rows)),
            lambda rows: bool(measured(rows)),
        ),
    ),
    caveats=(
        "The best row of a budget is chosen on the examples it is scored on, so its value is flattered a little; "
        "rows whose intervals overlap should be read as equals."
    ),
    reads=("*",),
)
