"""Names, versions, titles, colours and markers of techniques, read from where each is defined without import.

Figures and tables need a technique's look in processes that never load torch: of modules that were not
imported it is read from the literal arguments of `technique(...)`, `register_look(...)` and `analysis(...)`.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

UNKNOWN_COLOUR, UNKNOWN_MARKER = "#7F7F7F", "D"
_CALLS = ("technique", "register_look", "analysis")
_REGISTERED: dict[str, "Look"] = {}


@dataclass(frozen=True)
class Look:
    """How a technique is named and drawn in every table and figure."""

    title: str
    colour: str = UNKNOWN_COLOUR
    marker: str = UNKNOWN_MARKER


def register_look(*, name: str, title: str, **drawn: str) -> Look:
    """Register how rows of the technique `name` are titled and drawn, by `colour` and `marker`."""
    _REGISTERED[name] = Look(title, **drawn)
    return _REGISTERED[name]


def look(name: str) -> Look:
    """Return the look of the technique `name`; an unknown one is drawn grey under its own name."""
    return _REGISTERED.get(name) or _in_sources().get(name) or Look(name)


def analysis(version: int, *names: str) -> int:
    """Declare the version of the analyses `names`, whose rows compress nothing; return it.

    Raise it when the numbers change: rows of the old version are then recorded again.
    """
    return version


def versions() -> dict[str, int]:
    """Return the version of every technique and analysis of this package by name, without importing them."""
    versions: dict[str, int] = {}
    for call in _calls():
        if call.func.id == "analysis":
            version, *names = (argument.value for argument in call.args)
            versions |= dict.fromkeys(names, version)
        elif "version" in (literals := _literals(call)):
            versions[literals["name"]] = literals["version"]
    return versions


@cache
def _in_sources() -> dict[str, Look]:
    """Return the looks that this package's own modules register, by name, without importing them."""
    fields = ("title", "colour", "marker")
    complete = [literals for call in _calls() if {"name", *fields} <= set(literals := _literals(call))]
    return {literals["name"]: Look(*(literals[field] for field in fields)) for literals in complete}


@cache
def _calls() -> list[ast.Call]:
    """Return the calls in this package's modules that name techniques and analyses."""
    calls = []
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        text = source.read_text(encoding="utf-8")
        if source != Path(__file__) and any(f"{call}(" in text for call in _CALLS):
            nodes = ast.walk(ast.parse(text))
            calls += [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", None) in _CALLS]
    return calls


def _literals(call: ast.Call) -> dict[str, object]:
    """Return the constants of a call by name; a technique's first five may stand without."""
    positions = ("name", "version", "title", "colour", "marker") if call.func.id == "technique" else ()
    arguments = [*zip(positions, call.args), *((k.arg, k.value) for k in call.keywords)]
    return {name: argument.value for name, argument in arguments if isinstance(argument, ast.Constant)}
