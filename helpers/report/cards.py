"""Reproduction cards: a published finding, its protocol, ours, and whether it was found again."""

from dataclasses import dataclass

from helpers.report import wording as w

CANNOT = "cannot be run here"


@dataclass(frozen=True)
class Card:
    """One line of the table; `ours` and `verdict` are made from rows."""

    published: str
    protocol: str
    ours: str
    verdict: str


def table(cards: list[Card]) -> str:
    """The cards as a Markdown table."""
    lines = [[card.published, card.protocol, card.ours, card.verdict] for card in cards]
    return w.table(["Published", "Its protocol", "Ours", "Verdict"], lines)


def ordering(
    published: str, protocol: str, found: list[tuple[dict, float, str]], expected: str
) -> list[Card]:
    """A card for a published order of two ways, from the tested differences that bear on it.

    Args:
        found: as `wording.comparisons` gives them.
        expected: the word that the published order predicts for the first against the second.
    """
    cards = []
    for part, p, word in found:
        names = [w.named(part[place]["technique"], part[place]["settings"]) for place in ("first", "second")]
        values = " against ".join(w.number(value, part["metric"]) for value in part["values"])
        ours = (
            f"{names[0]} against {names[1]}: {part['metric']} {values}, "
            f"{w.difference_text(part['difference'], part['metric'])}, {w.p_text(p)}"
        )
        cards.append(Card(published, protocol, ours, _verdict(word, expected)))
    return cards


def _verdict(word: str, expected: str) -> str:
    if word == expected:
        return "consistent" if word == "no measurable difference" else "ordering reproduced"
    reversed_ = {word, expected} == {"better", "worse"}
    return f"{'reversed' if reversed_ else 'not reproduced'} ({word})"
