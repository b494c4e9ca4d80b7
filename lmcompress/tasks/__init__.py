"""Benchmarks: examples, metrics with per-example scores, and how a model is run on them.

`load_task` finds a task by name, `evaluate` runs a model on it, `calibration_batches` gives what techniques
calibrate on. What is trained or calibrated on is kept apart from what is scored, here and nowhere else.
"""

import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lmcompress.errors import BadSetting
from lmcompress.tasks import harvested, hub
from lmcompress.tasks.base import Evaluation, Task, evaluate
from lmcompress.tasks.calibration import calibration_batches, calibration_source
from lmcompress.tasks.data import FORMATS
from lmcompress.tasks.own_data import OwnData

__all__ = [
    "TASKS",
    "Evaluation",
    "Task",
    "calibration_batches",
    "calibration_source",
    "evaluate",
    "load_task",
]

TASKS: dict[str, Callable[..., Task]] = harvested.TASKS | hub.TASKS
_COUNTS = ("window", "stride", "max_new_tokens")
SELECTION = dict.fromkeys(harvested.TASKS, "validation") | hub.SELECTION  # the split choices are made on


def load_task(
    name: str | Path,
    *,
    split: str | float | None = None,
    limit: int | None = None,
    seed: int = 0,
    model: Any = None,
    **settings,
) -> Task:
    """Load a task by its name, or make one of a user's own data.

    Args:
        name: one of `TASKS`; a .csv, .tsv, .json, .jsonl, .parquet or .txt file; a Hub id ("owner/name") of,
            or a folder with, a data set in the Hub's layout.
        split: the split to evaluate, and then the only one. By default that of the report, and most tasks
            have a `selection()` on another, to choose configurations on. Of an own file, see `OwnData`.
        limit: most examples of either; which ones depends on `seed` only (of running text: the first).
        model: the model that it is for, whose head tells the kind of own data where columns do not.
        settings: `window` and `stride` of language modelling; of own data see `OwnData`.

    Raises:
        AssetNotFound: the data set is nowhere to be found.
        BadData: it lacks a split or column, or is empty.
        BadSetting: an unknown task or setting.
    """
    path, is_listed = Path(name), str(name) in TASKS
    if not (is_listed or path.suffix.lower() in FORMATS or os.path.isdir(path) or str(name).count("/") == 1):
        raise BadSetting(
            f"unknown task {str(name)!r}: expected one of {', '.join(TASKS)}, a file ({', '.join(FORMATS)}), "
            "a folder laid out like a data set of the Hub, or a Hub id (owner/name)."
        )
    make = TASKS[str(name)] if is_listed else partial(OwnData, name, model=model)
    legal = [p.name for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(settings) - set(legal)):
        raise BadSetting(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(legal)}.")
    for count, given in {"limit": limit, **{n: settings.get(n) for n in _COUNTS}}.items():
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise BadSetting(f"{count}={given!r}: give a whole number of at least 1.")
    make = partial(make, limit=limit, seed=seed, **settings)
    made = make(split=split) if split else make()
    if not is_listed:
        return made.task()
    if not split and str(name) in SELECTION:
        made.selecting = partial(make, split=SELECTION[str(name)])
    return made
