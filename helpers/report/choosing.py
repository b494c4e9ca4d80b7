"""Ways of choosing what structure goes, against one another: for the section on structured pruning."""

from helpers.report import wording as w
from lmcompress.results.rows import model_task_of
from lmcompress.results.verdicts import comparisons


def _is_tool(found: dict) -> bool:
    """Whether a comparison is of our choice with TextPruner's at the same settings."""
    techniques = (found["first"]["technique"], found["second"]["technique"])
    return (
        techniques == ("heads-ffn", "textpruner")
        and found["first"]["settings"] == found["second"]["settings"]
    )


def tool_sentence(rows: list[dict], pair: tuple[str, str]) -> str:
    """Whether TextPruner's choice leads to the same scores as ours; where it knows another loss, that says so."""
    found = comparisons(rows, pair, _is_tool)
    if not found:
        return ""
    soft = any(
        row["technique"] == "textpruner" and row["settings"].get("use_logits") and model_task_of(row) == pair
        for row in rows
    )
    apart = (
        " Its soft labels are another loss than ours; below it is held against our hard ones." if soft else ""
    )
    alike = [
        one for one, _, _ in found if one["values"][0] == one["values"][1] and one["difference"]["p"] == 1
    ]
    others = [
        f"{w.label(one['first']['technique'], one['first']['settings'])}: {word} "
        f"({w.difference_text(one['difference'], one['metric'])}, {w.p_text(value)})"
        for one, value, word in found
        if one not in alike
    ]
    rest = ". Ours against it in the others: " + "; ".join(others) if others else ""
    return f"**TextPruner** at the same settings scored exactly as ours in {len(alike)} of {len(found)}{rest}.{apart}"


def comparison_sentence(rows: list[dict], pair: tuple[str, str]) -> str:
    """The tested differences between ways of choosing: what all have in common is said once."""
    found = comparisons(rows, pair, lambda one: not _is_tool(one))
    if not found:
        return ""
    places = [one[place] for one, _, _ in found for place in ("first", "second")]
    common = {
        name: value for name, value in places[0]["settings"].items()
        if all(place["settings"].get(name) == value for place in places) and name in ("heads", "ffn")
    }  # fmt: skip

    def name_of(place: dict) -> str:
        return w.label(place["technique"], {n: v for n, v in place["settings"].items() if n not in common})

    lines = [
        (
            f"- {name_of(one['first'])}, against {name_of(one['second'])}: {word} "
            f"({w.difference_text(one['difference'], one['metric'])}, {w.p_text(value)})",
            [word],
        )
        for one, value, word in found
    ]
    kept = [f"{w.percent(v)} of the {'heads' if n == 'heads' else 'channels'}" for n, v in common.items()]
    asked = w.listing(kept) if kept else ""
    title = "**One way of choosing against another**, on the same examples" + (
        f", {asked} kept" if asked else ""
    )
    return w.tested_list(title, lines)
