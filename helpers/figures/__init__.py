"""Figures of the report, drawn from recorded rows: `FIGURES` holds each with caption and needs."""

from collections.abc import Iterable
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
    """

    source: str
    needs: tuple[str, ...]
    caption: str

    def draw(self, rows: list[dict]) -> mpl.Figure:
        """Return the figure of the rows."""
        module, _, function = self.source.partition(":")
        return getattr(import_module(f"helpers.figures.{module}"), function)(rows)

    def drawable(self, rows: Iterable[dict]) -> bool:
        """Return whether a row that the figure needs is among those given."""
        return any(row["technique"] in self.needs for row in rows)


_TABLE = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))
FIGURES = {name: Figure(**entry) for name, entry in _TABLE.items()}
