"""Reproduction cards: a published finding, its protocol, ours, a tolerance, and the verdict."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from helpers.report import wording as w
from lmcompress.results.verdicts import NO_DIFFERENCE

CANNOT = "cannot be run here"
ELSEWHERE = "not among what this profile measures"
TITLE = "Published findings, gathered"
SIGN = "the sign, after Holm"
VERDICTS = ("reproduced", "ordering reproduced", "consistent", "not reproduced", "reversed", CANNOT)


@dataclass(frozen=True)
class Card:
    """One line of the table; `ours` and `verdict` are made from rows."""

    published: str
    protocol: str
    ours: str
    verdict: str
    differences: str = ""
    tolerance: str = ""


@dataclass(frozen=True)
class Figures:
    """Published figures of one model and task, by technique and settings asked (None: any), that ours are
    held against.

    `model` is the end of the model's name; `task` None takes rows without one. `statistic` is one of the
    weights, else
    the quality is meant.
    """

    published: str
    protocol: str
    model: str
    task: str | None
    values: tuple[tuple[str, dict | None, float], ...]
    command: str
    tolerance: float = 0.02
    differences: str = ""
    statistic: str = ""


@cache
def published() -> dict:
    """Return `published.yaml`, its lists as `Figures`."""
    content = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return {
        name: [Figures(**figures) for figures in entry] if isinstance(entry, list) else entry
        for name, entry in content.items()
    }


def block(cards: list[Card], note: str = "") -> list[str]:
    """The cards as a heading, a note, how they came out, and Markdown tables; nothing without cards.

    Findings that were judged stand together by what was published, which is said once; those that need
    another model
    or machine have a table of their own, folded away.
    """
    if not cards:
        return []
    judged, away = ([c for c in cards if (c.verdict == CANNOT) == is_away] for is_away in (False, True))
    paragraphs = ["### Published findings, and ours", note, _came_out(judged)]
    if judged:
        table = w.table(["Published", "Here", "On, and what differs", "Verdict"], _lines(judged))
        many = len(judged) > w.SHOWN
        paragraphs.append(
            w.folded(w.plural(len(judged), "comparison") + " with them", table) if many else table
        )
    if away:
        lines = [[c.published, c.protocol, c.ours, c.differences or ELSEWHERE] for c in away]
        table = w.table(["Published", "Its protocol", "What would run it", "Why not here"], lines)
        paragraphs.append(
            w.folded(f"{w.plural(len(away), 'finding')} that cannot be judged here, and what would", table)
        )
    return [paragraph for paragraph in paragraphs if paragraph]


def _came_out(judged: list[Card]) -> str:
    """How often each verdict was reached, in a sentence."""
    if not judged:
        return "None of them could be judged with the models and machines there were."
    counts = Counter(card.verdict for card in judged)
    words = sorted(counts, key=lambda word: (_rank(word), word))
    counted = ", ".join(f"{word} {counts[word]}" for word in words)
    return f"Held against what others published, {w.plural(len(judged), 'card')}: {counted}."


def _rank(verdict: str) -> int:
    """The place of a verdict in the table of all of them; one that is not in it comes last."""
    word = verdict.partition(" (")[0]
    return VERDICTS.index(word) if word in VERDICTS else len(VERDICTS)


def _lines(judged: list[Card]) -> list[list[str]]:
    """The lines of the table, the same published finding said once and its cards below one another."""
    by_finding: dict[tuple[str, str], list[Card]] = {}
    for card in judged:
        by_finding.setdefault((card.published, card.protocol), []).append(card)
    lines = []
    for (published, protocol), several in by_finding.items():
        for position, card in enumerate(several):
            tolerance = "" if card.tolerance in ("", SIGN) else card.tolerance
            tolerance = (
                f"within {tolerance}"
                if tolerance.endswith("%")
                else f"asked: {tolerance}"
                if tolerance
                else ""
            )
            remarks = "; ".join(remark for remark in (card.differences, tolerance) if remark)
            lines.append(
                ["″" if position else f"{published}<br>*{protocol}*", card.ours, remarks, card.verdict]
            )
    return lines


def ordering(
    published: str, protocol: str, tests: list[tuple[dict, float, str]], expected: str, *, here: str
) -> list[Card]:
    """A card for a published order of two ways, from the tested differences that bear on it.

    Args:
        found: as `comparisons` gives them.
        expected: the word that the published order predicts for the first against the second.
        here: what differs, first of all our model and task.
    """
    cards = []
    for comparison, p, word in tests:
        names = [w.entrant_label(comparison[side]) for side in ("first", "second")]
        values = " against ".join(w.number(value, comparison["metric"]) for value in comparison["values"])
        result = (
            f"{names[0]} against {names[1]}: {w.metric_name(comparison['metric'])} {values}, "
            f"{w.change_text(comparison, p)}"
        )
        cards.append(Card(published, protocol, result, _verdict(word, expected), here, SIGN))
    return cards


def figures(figures_asked: Figures, rows: list[dict]) -> Card:
    """The card of published figures: judged where rows of that model and task are there, else the command."""
    candidates = [
        r for r in rows if r["model"].endswith(figures_asked.model) and r["task"] == figures_asked.task
    ]
    results, close = [], []
    for technique, settings, value in figures_asked.values:
        row = next((r for r in candidates if r["technique"] == technique and _asked(r, settings)), None)
        if row is not None:
            measured = (
                row["achieved"]["overall"][figures_asked.statistic]
                if figures_asked.statistic
                else row["quality"]["value"]
            )
            close.append(abs(measured - value) <= figures_asked.tolerance * abs(value))
            name = f"{w.label(technique, settings)} " if len(figures_asked.values) > 1 else ""
            results.append(f"{name}{measured:.4g} ({value:.4g} published)")
    tolerance = w.percent(figures_asked.tolerance)
    if not results:
        return Card(
            figures_asked.published,
            figures_asked.protocol,
            f"`{figures_asked.command}`",
            CANNOT,
            figures_asked.differences,
            tolerance,
        )
    verdict = "reproduced" if all(close) else "not reproduced"
    return Card(
        figures_asked.published,
        figures_asked.protocol,
        "; ".join(results),
        verdict,
        figures_asked.differences,
        tolerance,
    )


def _asked(row: dict, settings: dict | None) -> bool:
    """Whether a row was asked exactly these settings, where and how it was calibrated left aside."""
    return (
        settings is None
        or {name: value for name, value in row["settings"].items() if name != "calibration"} == settings
    )


def _verdict(word: str, expected: str) -> str:
    if word == expected:
        return "consistent" if word == NO_DIFFERENCE else "ordering reproduced"
    reversed_ = {word, expected} == {"better", "worse"}
    return f"{'reversed' if reversed_ else 'not reproduced'} ({word})"


def gathered(per_section: list[tuple[str, str, list[Card]]]) -> list[str]:
    """How the cards of every section came out, with links.

    Args:
        per_section: title, anchor and cards of each section.
    """
    lines, total = [], Counter()
    for title, anchor, section_cards in per_section:
        counts = Counter(card.verdict.partition(" (")[0] for card in section_cards)
        total += counts
        if section_cards:
            lines.append([f"[{title}](#{anchor})", *(str(counts[verdict] or "") for verdict in VERDICTS)])
    if not lines:
        return []
    lines.append(["**All**", *(str(total[verdict] or "") for verdict in VERDICTS)])
    judged = sum(total.values()) - total[CANNOT]
    null = sum(NO_DIFFERENCE in c.verdict for *_, section_cards in per_section for c in section_cards)
    unseen = f", {null} of these because no difference could be measured at all" if null else ""
    came_out = (
        f"Of {w.plural(judged, 'card')} that could be judged here, "
        f"{total['reproduced'] + total['ordering reproduced']} came out as published, {total['consistent']} "
        f"did not contradict it, {total['reversed']} came out the other way round and "
        f"{total['not reproduced']} did not come out{unseen}."
        if judged
        else ""
    )
    return [
        "One card per published figure or order, and per model and task that bears on it; each section "
        "prints its own. An order is reproduced when the paired difference has the published sign after "
        "Holm's correction; no measurable difference is no reproduction of an order, but consistent with a "
        "draw. What needs another model or machine is listed with the command that would run it, and judged "
        "by the same code once its rows are there.",
        *([came_out] if came_out else []),
        w.table(["Section", *VERDICTS], lines),
    ]
