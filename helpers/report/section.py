"""What a section of the report is: a question, a method, figures and findings, all but prose from rows."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure of the report: file name without `.png`, caption, and the function that draws it from rows.

    `needs` says whether the rows it draws are among those given; None means always.
    """

    name: str
    caption: str
    draw: Callable[[list[dict]], Figure]
    needs: Callable[[list[dict]], bool] | None = None


@dataclass(frozen=True)
class Section:
    """One notebook's section. `findings(rows)` gives Markdown paragraphs whose numbers come from the rows.

    `summary(rows)` gives the sentences of the report's opening. `reads` names further notebooks whose rows
    the section needs; "*" means all.
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
