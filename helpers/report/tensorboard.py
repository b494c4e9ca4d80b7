"""The training curves that rows hold, as TensorBoard logs: a named folder per run."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.report import values
from lmcompress.errors import BadData
from lmcompress.results.labels import label_of
from lmcompress.results.store import Row

COMMAND = "python -m helpers.report --tensorboard FOLDER"


def write(rows: Iterable[Row], folder: Path) -> str:
    """Write `folder/NOTEBOOK/MODEL, CONFIGURATION, seed N, KEY/`, a log per training; return how many.

    Raises:
        BadData: no row holds a curve.
    """
    from tensorboardX import SummaryWriter  # here: the report is written without it

    count = 0
    for row in {row["key"]: row for row in rows}.values():
        if scalars := list(curves(row["achieved"])):
            title = (
                f"{values.model_name(row['model'])}, {label_of(row)}, seed {row['seed']}, {row['key'][:6]}"
            )
            with SummaryWriter(str(folder / row["notebook"] / re.sub(r"[^\w ,.%+-]+", "-", title))) as log:
                for name, step, loss in scalars:
                    log.add_scalar(f"loss/{name}", loss, step)
            count += 1
    if not count:
        raise BadData("no row holds the curve of a training: run notebooks that train, such as 04 or 05")
    return f"{count} trainings in {folder}: tensorboard --logdir {folder}"


def curves(achieved: dict) -> Iterator[tuple[str, int, float]]:
    """Yield (split, step or tokens, loss) of the curves of a training and of a recovery."""
    for kind in ("curve", "recovery_curve"):
        splits = achieved.get(kind) or {}
        splits = splits if isinstance(splits, dict) else {"train": splits}
        splits |= (
            {"validation": achieved["validation"]} if kind == "curve" and "validation" in achieved else {}
        )
        for split, points in splits.items():
            for point in points if isinstance(points, list) else ():
                yield split, int(point[0]), float(point[1])
