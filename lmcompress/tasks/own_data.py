"""A user's own labelled texts as a task."""

import math
from pathlib import Path

from lmcompress.errors import BadData
from lmcompress.tasks.classification import Classification
from lmcompress.tasks.data import check_columns, read_table, sample


def own_file(
    path: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
    labels: list[str] | None = None,
    train_path: str | Path | None = None,
) -> Classification:
    """Labelled texts of a .csv or .jsonl file, all of them evaluated.

    Args:
        labels: class names in the order of the model's outputs; sorted by default.
        train_path: a file like it to train on.

    Raises:
        BadData: a column that is not there, no rows, a blank cell, an unknown label, or one label only.
    """
    columns = [text_column, label_column, *([text_pair_column] if text_pair_column else [])]

    def rows(file: Path) -> list[dict]:
        frame = check_columns(read_table(Path(file)), columns, str(file))
        missing = frame[columns].isna() | frame[columns].map(lambda value: not str(value).strip())
        blank = missing.any(axis=1)
        if blank.any():
            raise BadData(
                f"{file}: {blank.sum()} rows lack a text or a label, the first is row {blank.argmax()}. Remove them."
            )
        return [
            dict(zip(("text", "label", "pair"), map(str, row)))
            for row in frame[columns].itertuples(index=False)
        ]

    def numbered(file: Path) -> list[dict]:
        found = rows(file)
        unknown = sorted({row["label"] for row in found} - set(order))
        if unknown:
            raise BadData(f"{file} has the labels {unknown}, which are not among {order}.")
        return [{**row, "label": order.index(row["label"])} for row in found]

    order = [str(x) for x in labels] if labels else sorted({r["label"] for r in rows(path)}, key=_by_number)
    if len(order) < 2:
        raise BadData(f"{path}: column {label_column!r} has fewer than two different labels ({order}).")
    return Classification(
        name=path.name,
        split=split,
        examples=sample(numbered(path), limit, seed),
        source=path.name,
        training=(lambda _: numbered(Path(train_path))) if train_path else None,
        training_source=str(train_path or ""),
        labels=order,
    )


def _by_number(label: str) -> tuple[float, str]:
    try:
        number = float(label)
    except ValueError:
        number = math.inf
    return (number if math.isfinite(number) else math.inf, label)
