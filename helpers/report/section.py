"""What a section of the report is: a question, a method, figures and findings, all but prose from rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from helpers.figures import FIGURES
from helpers.report.cards import Card


@cache
def texts() -> dict:
    """Return the report's prose that no row changes: `text.yaml`."""
    return yaml.safe_load(Path(__file__).with_name("text.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Drawing:
    """A figure of the report: file name without `.png`, and the function that draws it from rows.

    `needs` says whether the rows it draws are among those given; None means always. One of `opening` stands
    at the
    report's head instead of in its section.
    """

    name: str
    draw: Callable[[list[dict]], Figure]
    needs: Callable[[list[dict]], bool] | None = None
    opening: bool = False

    @property
    def caption(self) -> str:
        """Return the sentence under the figure."""
        return FIGURES[self.name].caption


def drawings(*names: str, opening: bool = False) -> tuple[Drawing, ...]:
    """Return the figures of `FIGURES` by name."""
    return tuple(Drawing(name, FIGURES[name].draw, FIGURES[name].drawable, opening) for name in names)


@dataclass(frozen=True)
class Section:
    """One notebook's section. `findings(rows)` gives Markdown paragraphs whose numbers come from the rows.

    `summary(rows)` gives the sentences that the section begins with. `reads` names further notebooks whose
    rows
    the section needs; "*" means all. `cards(rows)` gives its published findings, printed after the findings.
    """

    notebook: str
    findings: Callable[[list[dict]], list[str]]
    drawings: tuple[Drawing, ...]
    summary: Callable[[list[dict]], list[str]] = lambda rows: []
    reads: tuple[str, ...] = ()
    cards: Callable[[list[dict]], list[Card]] = lambda rows: []

    @property
    def text(self) -> dict[str, str]:
        """Return title, question, method and caveats."""
        return texts()["sections"][self.notebook]
