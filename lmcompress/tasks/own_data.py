"""A user's own file, or any labelled data set of the Hub's layout, as a task."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmcompress.errors import BadData
from lmcompress.tasks.classification import Classification
from lmcompress.tasks.data import FORMATS, Columns, read_file, read_split, sample
from lmcompress.tasks.language_modelling import LanguageModelling

Labels = Sequence[str] | Mapping[str, str] | str | None


def own_labels(
    source: str | Path,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    config: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
    labels: Labels = None,
    train_path: str | Path | None = None,
    metric: str = "accuracy",
    higher_is_better: bool = True,
) -> Classification:
    """Make a task of labelled texts: a file's rows, or a split of a Hub id or a folder laid out like one.

    Args:
        config: configuration (subset) of a Hub id or folder.
        labels: class names in the order of the model's outputs, or the model's name for each label of the
            file (`{"pos": "positive", "neg": "negative"}`); on a command line `0,1` or
            `pos=positive,neg=negative`. By default the data set's own, or sorted.
        train_path: a file to train on; a Hub id or folder has its train split.
        metric: a metric of ours, or any `evaluate` metric of class indices by its path or name.
        higher_is_better: said of an `evaluate` metric that is not ours.

    Raises:
        BadData: a column that is not there, no rows, a blank cell, an unknown label, or one label only.
        BadSetting: no such metric.
    """
    columns = [text_column, label_column, *([text_pair_column] if text_pair_column else [])]
    is_file = Path(source).suffix.lower() in FORMATS and not Path(source).is_dir()
    name = Path(source).name if is_file or Path(source).is_dir() else str(source)
    _check_training_file(train_path)
    labels = _parsed(labels)
    renamed = labels if isinstance(labels, Mapping) else {}

    def read(split: str, file: str | Path | None) -> Columns:
        return read_file(Path(file), columns) if file else read_split(str(source), config, split, columns)

    def indexed(content: Columns) -> list[dict]:
        examples = _texts(content)
        if unknown := sorted({example["label"] for example in examples} - set(known)):
            raise BadData(f"{content.title} has the labels {unknown}, which are not among {known}.")
        return [{**e, "label": names.index(renamed.get(e["label"], e["label"]))} for e in examples]

    evaluated = read(split, source if is_file else None)
    known = list(labels or evaluated.class_names(label_column) or [])
    known = known or sorted({example["label"] for example in _texts(evaluated)}, key=_by_number)
    names = list(dict.fromkeys(renamed.get(label, label) for label in known))
    if len(names) < 2:
        raise BadData(f"{source}: column {label_column!r} has fewer than two different labels ({names}).")
    has_training = train_path or not is_file
    return Classification(
        name=name,
        split=split,
        examples=sample(indexed(evaluated), limit, seed),
        source=name,
        training=(lambda split: indexed(read(split, train_path))) if has_training else None,
        training_source=str(train_path or ""),
        training_is_own=True,
        labels=names,
        labels_ordered=bool(labels) and not renamed,
        metric=metric,
        higher_is_better=higher_is_better,
    )


def own_text(
    path: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int | None = None,
    train_path: str | Path | None = None,
) -> LanguageModelling:
    """Make a language-modelling task of a .txt file (UTF-8); of its paragraphs `limit` takes the first."""
    del seed
    _check_training_file(train_path)

    def paragraphs(path: Path) -> list[dict]:
        [(content,)] = read_file(path, ["text"]).rows()
        return [{"text": text, "document": 0} for text in content.split("\n\n")]

    def documents(_: str) -> list[dict]:  # trained on in random order, so each paragraph is a document
        return [example | {"document": i} for i, example in enumerate(paragraphs(Path(train_path)))]

    return LanguageModelling(
        name=path.name,
        split=split,
        examples=paragraphs(path)[:limit],
        source=path.name,
        training=documents if train_path else None,
        training_source=str(train_path or ""),
        training_is_own=True,
        window=window,
        stride=stride,
    )


def _check_training_file(path: str | Path | None) -> None:
    """Refuse a file that is not there before anything is measured."""
    if path and not Path(path).is_file():
        raise BadData(f"there is no file train_path={str(path)!r}.")


def _parsed(labels: Labels) -> list[str] | dict[str, str] | None:
    """Return `labels` as strings, a command line's `a,b` or `a=x,b=y` taken apart."""
    if isinstance(labels, str):
        fields = [field.strip() for field in labels.split(",")]
        labels = dict(field.split("=", 1) for field in fields) if all("=" in f for f in fields) else fields
    if isinstance(labels, Mapping):
        return {str(label).strip(): str(name).strip() for label, name in labels.items()}
    return labels and [str(label) for label in labels]


def _texts(content: Columns) -> list[dict]:
    """Return `{"text", "label", "pair"}` as strings."""
    rows = content.rows(named=True)
    is_blank = [any(cell is None or not str(cell).strip() for cell in row) for row in rows]
    if any(is_blank):
        raise BadData(
            f"{content.title}: {sum(is_blank)} rows lack a text or a label, the first is row "
            f"{is_blank.index(True)}. Remove them."
        )
    return [dict(zip(("text", "label", "pair"), map(str, row))) for row in rows]


def _by_number(label: str) -> tuple[float, str]:
    """Return what sorts numbers by value, before texts."""
    try:
        return float(label) if math.isfinite(float(label)) else math.inf, label
    except ValueError:
        return math.inf, label
