"""Ways of choosing what structure goes, against one another: for the section on structured pruning."""

from helpers.report import wording as w
from lmcompress.results.rows import model_task_of
from lmcompress.results.verdicts import comparisons


def _is_tool(comparison: dict) -> bool:
    """Whether a comparison is of our choice with TextPruner's at the same settings."""
    techniques = (comparison["first"]["technique"], comparison["second"]["technique"])
    return (
        techniques == ("heads-ffn", "textpruner")
        and comparison["first"]["settings"] == comparison["second"]["settings"]
    )


def tool_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    """Say whether TextPruner's choice leads to the scores of ours, and where it knows another loss."""
    tests = comparisons(rows, model_task, _is_tool)
    if not tests:
        return ""
    soft = any(
        row["technique"] == "textpruner"
        and row["settings"].get("use_logits")
        and model_task_of(row) == model_task
        for row in rows
    )
    apart = (
        " Its soft labels are another loss than ours; below it is held against our hard ones." if soft else ""
    )
    alike = [
        comparison
        for comparison, _, _ in tests
        if comparison["values"][0] == comparison["values"][1] and comparison["difference"]["p"] == 1
    ]
    differing = [
        f"{w.entrant_label(comparison['first'])}: {word} ({w.change_text(comparison, value)})"
        for comparison, value, word in tests
        if comparison not in alike
    ]
    remainder = ". Ours against it in the others: " + "; ".join(differing) if differing else ""
    return (
        f"**TextPruner** at the same settings scored exactly as ours in {len(alike)} of "
        f"{len(tests)}{remainder}.{apart}"
    )


def comparison_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    """The tested differences between ways of choosing: what all have in common is said once."""
    tests = comparisons(rows, model_task, lambda comparison: not _is_tool(comparison))
    if not tests:
        return ""
    entrants = [comparison[entrant] for comparison, _, _ in tests for entrant in ("first", "second")]
    common = {
        name: value
        for name, value in entrants[0]["settings"].items()
        if all(entrant["settings"].get(name) == value for entrant in entrants) and name in ("heads", "ffn")
    }

    def name_of(entrant: dict) -> str:
        return w.label(
            entrant["technique"], {n: v for n, v in entrant["settings"].items() if n not in common}
        )

    lines = [w.test_line(test, name_of) for test in tests]
    fractions = [
        f"{w.percent(v)} of the {'heads' if n == 'heads' else 'channels'}" for n, v in common.items()
    ]
    held_alike = w.listing(fractions) if fractions else ""
    title = "**One way of choosing against another**, on the same examples" + (
        f", {held_alike} kept" if held_alike else ""
    )
    return w.tested_list(title, lines)
