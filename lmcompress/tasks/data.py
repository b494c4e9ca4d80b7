"""Rows of a data set or a user's own file, streamed by `datasets`, their columns and values checked.

Nothing is cached on disk: it works offline, from read-only homes. `datasets` is imported on the first read.
"""

import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from lmcompress.errors import BadData, NoSuchSplit
from lmcompress.models import assets

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
FORMATS |= {".txt": "text"}
_BATCH_ROWS = 100_000


@dataclass(frozen=True)
class Columns:
    """The columns asked for of a split or file, in that order; `title` names it in messages."""

    table: pa.Table
    title: str

    def rows(self, *, named: bool = False) -> list[tuple]:
        """Return the rows as plain Python values; `named`: with declared classes' names for their numbers."""
        columns = [column.to_pylist() for column in self.table.columns]
        for i, field in enumerate(self.table.schema):
            if isinstance(field.type, pa.JsonType):  # values of several types, encoded
                columns[i] = [text and json.loads(text) for text in columns[i]]
            elif named and (names := self.class_names(field.name)):
                numbers = dict(enumerate(names))  # -1, "not labelled", stays what it is
                columns[i] = [numbers.get(number, number) for number in columns[i]]
        return list(zip(*columns))

    def class_names(self, column: str) -> list[str] | None:
        """Return the names of a column's classes if the data set declares them (the Hub's `ClassLabel`)."""
        from datasets import ClassLabel, Features

        feature = Features.from_arrow_schema(self.table.schema)[column]
        return feature.names if isinstance(feature, ClassLabel) else None


def read_split(name: str, config: str | None, split: str, columns: Sequence[str]) -> Columns:
    """Read columns of one split of a data set, a Hub id or a folder, in one `config` (subset) of several.

    Raises:
        AssetNotFound: no such data set here.
        NoSuchSplit, BadData: no such split, configuration or column; the message lists those there are.
    """
    folder = assets.resolve(name, kind="datasets")
    title = f"{name} ({config})" if config else name
    listed = listed_files(folder)
    if listed and config is not None and config not in listed:
        raise BadData(f"{name} in {folder} has no configuration {config!r}; it has {', '.join(listed)}.")
    files = next(iter(listed.values())) if listed and config is None else listed.get(config)
    files = files or _files_by_name(folder, config, title)
    if split not in files:
        raise NoSuchSplit(f"{title} in {folder} has no split {split!r}; it has {', '.join(files)}.")
    return _read([Path(file) for file in files[split]], columns, f"{title} {split}")


def _files_by_name(folder: Path, data_dir: str | None, title: str) -> dict[str, list[str]]:
    """Return the files of each split by the names that `datasets` knows, where no README lists them."""
    from datasets import load_dataset_builder

    try:
        with tempfile.TemporaryDirectory() as scratch:
            return load_dataset_builder(str(folder), data_dir=data_dir, cache_dir=scratch).config.data_files
    except (ValueError, OSError) as error:
        expected = f"expected files ({', '.join(FORMATS)}) named by their split"
        raise BadData(f"{title}: no data found in {folder / (data_dir or '')}; {expected}.") from error


def listed_files(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return the files, by configuration and split, that the README's `configs:` list and the folder has.

    `load_dataset` refuses a README that lists absent files, and a snapshot may hold some splits only.
    """
    readme, listed = folder / "README.md", {}
    for entry in _readme_configs(readme, readme.stat().st_mtime_ns) if readme.is_file() else []:
        data_files = entry["data_files"]
        if not isinstance(data_files, list) or not all(isinstance(files, dict) for files in data_files):
            data_files = [{"split": "train", "path": data_files}]
        patterns = {files["split"]: files["path"] for files in data_files}
        splits = {
            split: sorted(
                {str(file) for p in ([path] if isinstance(path, str) else path) for file in folder.glob(p)}
            )
            for split, path in patterns.items()
        }
        listed[entry["config_name"]] = {split: files for split, files in splits.items() if files}
    return {config: splits for config, splits in listed.items() if splits}


@lru_cache(maxsize=16)
def _readme_configs(readme: Path, modified_ns: int) -> list[dict]:
    """Return `configs:` of a README's header; parsed once, because a data set may have dozens of them."""
    text = readme.read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---", 2)[1]) or {} if text.startswith("---") else {}
    return [entry for entry in header.get("configs", []) if "config_name" in entry and "data_files" in entry]


def read_file(path: Path, columns: Sequence[str]) -> Columns:
    """Read a user's .parquet, .jsonl, .json, .csv, .tsv or .txt file (its one column is "text").

    Values of a .csv or .tsv file are the strings that stand in it.

    Raises:
        BadData: says which file, line or column is not as it should be.
    """
    if not path.is_file():
        raise BadData(f"there is no file {path}.")
    return _read([path], columns, str(path))


def _read(files: list[Path], columns: Sequence[str], title: str) -> Columns:
    suffix = files[0].suffix.lower()
    if suffix not in FORMATS:
        raise BadData(f"cannot read {title} ({files[0].name}): expected one of {', '.join(FORMATS)}.")
    if not sum(file.stat().st_size for file in files):
        raise BadData(f"{title} is empty.")
    options = {"sample_by": "document"} if suffix == ".txt" else {}
    if suffix in DELIMITERS:
        options, *others = [_csv_options(file, columns) for file in files]
        if any(other != options for other in others):
            raise BadData(f"{title}: its {len(files)} files have different columns.")
    table = _load(FORMATS[suffix], files, title, **options)
    if FORMATS[suffix] == "json" and any(pa.types.is_timestamp(field.type) for field in table.schema):
        # The JSON reader takes texts like "2024-05-01" for dates; declared as Json they stay what they are.
        from datasets import Features, Json

        features = Features({name: Json() for name in table.column_names})
        table = _load("json", files, title, features=features)
    names = table.column_names
    if missing := [column for column in columns if column not in names]:
        raise BadData(
            f"{title} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(names)}."
        )
    return Columns(table.select(list(columns)), title)


def _load(builder: str, files: list[Path], title: str, **options) -> pa.Table:
    """Stream files through `datasets` into a table; the builder's locks go to a folder deleted after."""
    from datasets import load_dataset

    options |= {"data_files": [str(file) for file in files], "split": "train", "streaming": True}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            stream = load_dataset(builder, cache_dir=scratch, **options).with_format("arrow")
            tables = [table for table in stream.iter(batch_size=_BATCH_ROWS) if len(table)]
    except (ValueError, OSError, StopIteration) as error:
        reason = (str(error).splitlines() or ["it holds no rows"])[0]
        raise BadData(f"{title} could not be read: {reason}") from error
    if not tables:
        raise BadData(f"{title} is empty.")
    return pa.concat_tables(tables)


def _csv_options(path: Path, columns: Sequence[str]) -> dict[str, Any]:
    """Return the csv builder's options that keep every value a string; each line's fields are counted.

    The builder's reader shifts columns where all rows have a field more than the header, and fills up others.
    """
    delimiter = DELIMITERS[path.suffix.lower()]
    limit = csv.field_size_limit(sys.maxsize)  # texts may be longer than the module's 128 kB
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            # "text, label": the blank belongs neither to the name nor to the values below it.
            spaced = any(name.startswith(" ") for name in next(csv.reader(stream, delimiter=delimiter), []))
            stream.seek(0)
            lines = csv.reader(stream, delimiter=delimiter, skipinitialspace=spaced, strict=True)
            header = [name.strip() for name in next(lines, [])]
            for fields in lines:
                if len(fields) != len(header) and "".join(fields).strip():
                    raise BadData(
                        f"{path}, line {lines.line_num}: {len(fields)} fields, but the header has "
                        f"{len(header)} ({', '.join(header)}). Name every column, and quote a text that "
                        "holds the delimiter."
                    )
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 ({error}): save it in that encoding.") from error
    except csv.Error as error:
        raise BadData(f"{path}, line {lines.line_num}, is no {path.suffix}: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    if repeated := [name for name in columns if header.count(name) > 1]:
        raise BadData(f"{path} has more than one column {', '.join(map(repr, repeated))}.")
    if len(header) == 1 and (others := [mark for mark in ";\t,|" if mark in header[0]]):
        raise BadData(
            f"{path}: its fields seem to be separated by {others[0]!r} ({header[0]}); {path.suffix} means "
            f"{delimiter!r}. Save it with that, or under the other name (.csv: commas, .tsv: tabs)."
        )
    from datasets import Features, Value

    unique = [name if header.index(name) == i else f"{name}.{i}" for i, name in enumerate(header)]
    return {
        "sep": delimiter,
        "skipinitialspace": spaced,
        "encoding": "utf-8-sig",  # a spreadsheet's byte-order mark is no part of the first column's name
        "na_filter": False,  # "NA" and "null" are texts
        "header": 0,
        "column_names": unique,
        "features": Features({name: Value("string") for name in unique}),
    }


def sample(examples: list, limit: int | None, seed: int) -> list:
    """Draw at most `limit` examples by `seed`, in their own order."""
    if limit is None or limit >= len(examples):
        return examples
    indices = np.sort(np.random.default_rng(seed).choice(len(examples), size=limit, replace=False))
    return [examples[i] for i in indices]
