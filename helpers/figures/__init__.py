"""Figures of the report, drawn from recorded rows: `FIGURES` holds each with caption and needs."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import yaml
from matplotlib import figure as mpl


@dataclass(frozen=True)
class Figure:
    """A figure of the report, as `figures.yaml` lists it.

    Attributes:
        source: `module:function` of this package; the function takes rows.
        needs: the techniques of which one row must be there, scored or not.
        caption: what stands under it.
        where: `module:function`, which says of rows whether there is anything to draw; empty: needs decide.
    """

    source: str
    needs: tuple[str, ...]
    caption: str
    where: str = ""

    def draw(self, rows: list[dict]) -> mpl.Figure:
        """Return the figure of the rows."""
        return _function(self.source)(rows)

    def drawable(self, rows: list[dict]) -> bool:
        """Return whether a row that the figure needs is among those given, and what `where` asks holds."""
        if not any(row["technique"] in self.needs for row in rows):
            return False
        return not self.where or _function(self.where)(rows)


def _function(name: str) -> Callable:
    module, _, function = name.partition(":")
    return getattr(import_module(f"helpers.figures.{module}"), function)


_TABLE = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))
FIGURES = {name: Figure(**entry) for name, entry in _TABLE.items()}
