"""Names, titles, colours and markers of techniques, written where each is defined and read without importing it.

A technique's look stands at its `@technique` line. Figures and tables need it in processes that never load torch, so
looks of modules that were not imported are read from their source: the literal arguments of `technique(...)` and
`register_look(...)` calls.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

UNKNOWN_COLOUR, UNKNOWN_MARKER = "#7F7F7F", "D"
_CALLS = ("technique", "register_look")
_REGISTERED: dict[str, "Look"] = {}


@dataclass(frozen=True)
class Look:
    """How a technique is named and drawn in every table and figure."""

    title: str
    colour: str = UNKNOWN_COLOUR
    marker: str = UNKNOWN_MARKER


def register_look(
    *, name: str, title: str, colour: str = UNKNOWN_COLOUR, marker: str = UNKNOWN_MARKER
) -> Look:
    """Register how rows of the technique `name` are titled and drawn."""
    _REGISTERED[name] = Look(title, colour, marker)
    return _REGISTERED[name]


def look(name: str) -> Look:
    """Return the look of the technique `name`; an unknown one is drawn grey under its own name."""
    return _REGISTERED.get(name) or _in_sources().get(name) or Look(name)


@cache
def _in_sources() -> dict[str, Look]:
    """Return the looks that this package's own modules register, by name, without importing them."""
    looks = {}
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        text = source.read_text(encoding="utf-8")
        if any(f"{call}(\n" in text or f"{call}(name=" in text for call in _CALLS):
            looks |= _looks_of(ast.parse(text))
    return looks


def _looks_of(tree: ast.Module) -> dict[str, Look]:
    looks = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in _CALLS:
            literals = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if {"name", "title", "colour", "marker"} <= set(literals):
                looks[literals["name"]] = Look(literals["title"], literals["colour"], literals["marker"])
    return looks
