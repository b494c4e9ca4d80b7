"""Benchmarks: examples, metrics with per-example scores, and how a model is run on them.

`load_task` finds a task by name, `evaluate` runs a model on it, `calibration_batches` gives what techniques
calibrate on. What is trained or calibrated on is kept apart from what is scored, here and nowhere else.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

from lmcompress.errors import BadSetting
from lmcompress.tasks import harvested, hub
from lmcompress.tasks.base import Evaluation, Task, evaluate
from lmcompress.tasks.calibration import calibration_batches, calibration_source
from lmcompress.tasks.own_data import own_file

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


def load_task(
    name: str | Path, *, split: str | None = None, limit: int | None = None, seed: int = 0, **settings
) -> Task:
    """A task by name, or classification of the texts in a .csv or .jsonl file.

    Args:
        split: the split to evaluate; each task has a default.
        limit: most examples; which ones depends on `seed` only (text for language models: the first ones).
        settings: `window` and `stride` of language modelling; `text_column`, `label_column`, `text_pair_column`,
            `labels` and `train_path` of a file.

    Raises:
        AssetNotFound: the data set is nowhere to be found.
        BadData: it lacks a split or column, or is empty.
        BadSetting: an unknown task or setting.
    """
    if Path(name).suffix in (".csv", ".jsonl"):
        make, arguments = own_file, (Path(name),)
    elif str(name) in TASKS:
        make, arguments = TASKS[str(name)], ()
    else:
        raise BadSetting(
            f"unknown task {str(name)!r}: expected one of {', '.join(TASKS)}, or a .csv or .jsonl file."
        )
    legal = [p.name for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(settings) - set(legal))
    if unknown:
        raise BadSetting(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(legal)}.")
    if limit is not None and limit < 1:
        raise BadSetting(f"limit {limit}: at least one example is needed.")
    chosen = {"split": split} if split else {}
    return make(*arguments, limit=limit, seed=seed, **chosen, **settings)
