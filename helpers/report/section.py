"""What a section of the report is: a question, a method, figures and findings, all but prose from rows."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from helpers.report.cards import Card


@dataclass(frozen=True)
class Drawing:
    """A figure of the report: file name without `.png`, caption, and the function that draws it from rows.

    `needs` says whether the rows it draws are among those given; None means always. One of `opening` stands at the
    report's head instead of in its section.
    """

    name: str
    caption: str
    draw: Callable[[list[dict]], Figure]
    needs: Callable[[list[dict]], bool] | None = None
    opening: bool = False


def has(*techniques: str) -> Callable[[list[dict]], bool]:
    """Return a `Drawing.needs`: a row of one of the techniques is there."""
    return lambda rows: any(row["technique"] in techniques for row in rows)


@dataclass(frozen=True)
class Section:
    """One notebook's section. `findings(rows)` gives Markdown paragraphs whose numbers come from the rows.

    `summary(rows)` gives the sentences that the section begins with. `reads` names further notebooks whose rows
    the section needs; "*" means all. `cards(rows)` gives its published findings, printed after the findings.
    """

    notebook: str
    title: str
    question: str
    method: str
    findings: Callable[[list[dict]], list[str]]
    drawings: tuple[Drawing, ...]
    caveats: str
    summary: Callable[[list[dict]], list[str]] = lambda rows: []
    reads: tuple[str, ...] = ()
    cards: Callable[[list[dict]], list[Card]] = lambda rows: []
