"""Per-example scores: those of the report's examples and of those that choices are made on, and their file.

A run keeps them in `scores/<key>.safetensors` (see `store`). Published are they in one compressed file per
notebook, from which `python -m lmcompress.measure.recompute` computes every number of its rows again.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lmcompress.paths import atomic_path
from lmcompress.results.store import Row, RowStore

Columns = dict[str, np.ndarray]
SELECTION = "selection."  # before the names of the columns of the selection set
# A column is stored as the narrowest of these that holds it exactly.
KINDS = {"whole": np.int32, "single": np.float32, "double": np.float64}


def named(columns: Columns, part: str) -> Columns:
    """Return the columns of a row's "quality" or "selection" under the names they are stored by."""
    prefix = SELECTION if part == "selection" else ""
    return {prefix + name: column for name, column in columns.items()}


def columns_of(scores: Mapping[str, np.ndarray], part: str = "quality") -> Columns:
    """Return the stored columns of a row's "quality" or "selection", under their own names."""
    is_asked = {name: name.startswith(SELECTION) == (part == "selection") for name in scores}
    return {name.removeprefix(SELECTION): scores[name] for name, asked in is_asked.items() if asked}


def publish_scores(store: RowStore, rows: Iterable[Row], folder: Path) -> None:
    """Write `<notebook>.parquet` into `folder` from the scores that the store has of `rows`; others go.

    A line holds the key, the set ("report" or "selection"), the column's name and its values in the order of
    the examples. A row of several notebooks is in the file of the first.
    """
    import pyarrow as pa  # here: the memory of what measures a model is measured, too
    from pyarrow import parquet

    notebooks: dict[str, set[str]] = {}
    seen: set[str] = set()
    for row in rows:
        if row["key"] not in seen and store.has_scores(row["key"]):
            notebooks.setdefault(row["notebook"], set()).add(row["key"])
        seen.add(row["key"])
    if notebooks:
        folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        if old.stem not in notebooks:
            old.unlink()
    for notebook, keys in notebooks.items():
        scores = [(key, name, column) for key in keys for name, column in store.load_scores(key).items()]
        lines = [_line(*entry) for entry in sorted(scores, key=lambda entry: (entry[1], entry[0]))]
        types = {name: pa.list_(pa.from_numpy_dtype(kind)) for name, kind in KINDS.items()}
        schema = pa.schema({"key": pa.string(), "set": pa.string(), "column": pa.string()} | types)
        with atomic_path(folder / f"{notebook}.parquet") as temporary:
            parquet.write_table(
                pa.Table.from_pylist(lines, schema),
                temporary,
                compression="zstd",
                compression_level=19,
                use_dictionary=["key", "set", "column", "whole.list.element"],
                column_encoding={
                    f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("single", "double")
                },
            )


def _line(key: str, name: str, column: np.ndarray) -> dict[str, object]:
    column = np.asarray(column, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        exact = (kind for kind in KINDS if np.array_equal(column.astype(KINDS[kind]), column, equal_nan=True))
        kind = next(exact)
    which = "selection" if name.startswith(SELECTION) else "report"
    values = {other: column.astype(KINDS[kind]) if other == kind else None for other in KINDS}
    return {"key": key, "set": which, "column": name.removeprefix(SELECTION)} | values


def read_scores(folder: Path) -> dict[str, Columns]:
    """Return key -> columns, named as a store has them, of all files that `publish_scores` wrote there."""
    from pyarrow import parquet

    scores: dict[str, Columns] = {}
    for file in sorted(folder.glob("*.parquet")):
        for line in parquet.read_table(file).to_pylist():
            values = next(line[kind] for kind in KINDS if line[kind] is not None)
            part = "selection" if line["set"] == "selection" else "quality"
            column = np.asarray(values, dtype=np.float64)
            scores.setdefault(line["key"], {}).update(named({line["column"]: column}, part))
    return scores
