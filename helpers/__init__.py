"""What the notebooks share over `lmcompress`, imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers
    from helpers.notebook import budgets, for_kind, in_batch, load_baselines, progress, setup, show, table
    from helpers.report.appendix import results

_HOMES = {
    "setup": "notebook",  # a study to record into, one style of figures, and where this runs
    "load_baselines": "notebook",  # models with their tasks, the dense ones measured
    "budgets": "notebook",  # how long what a finding hangs on is trained
    "for_kind": "notebook",  # what a parameter gives for one kind of model
    "progress": "notebook",  # a progress bar, quiet in batch
    "show": "notebook",  # display a figure once
    "table": "notebook",  # rows as a readable table
    "results": "report.appendix",  # all rows as the report's page of a notebook shows them
    "in_batch": "notebook",  # whether nobody is watching
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
