"""Rows of a data set or a user's own file, their columns and values checked.

Parquet is streamed by `datasets`, which is imported on the first read and caches nothing on disk: it works
offline, from read-only homes. Text formats are read here, so that every value is what stands in the file.
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from lmcompress.errors import BadData, NoSuchSplit
from lmcompress.models import assets
from lmcompress.paths import scratch_folder

_BATCH_ROWS = 100_000


@dataclass(frozen=True)
class Columns:
    """Columns of a split or file; `title` names it in messages."""

    table: pa.Table
    title: str

    def select(self, columns: Sequence[str]) -> "Columns":
        """Return these columns in this order; `BadData` lists those there are."""
        names = self.table.column_names
        if missing := [column for column in columns if column not in names]:
            raise BadData(
                f"{self.title} has no column {', '.join(map(repr, missing))}; its columns are "
                f"{', '.join(names)}."
            )
        return Columns(self.table.select(list(columns)), self.title)

    def rows(self, *, named: bool = False) -> list[tuple]:
        """Return the rows as plain Python values; `named`: with declared classes' names for their numbers."""
        columns = [column.to_pylist() for column in self.table.columns]
        for i, name in enumerate(self.table.column_names):
            if named and (names := self.class_names(name)):
                numbers = dict(enumerate(names))  # -1, "not labelled", stays what it is
                columns[i] = [
                    [numbers.get(n, n) for n in cell] if isinstance(cell, list) else numbers.get(cell, cell)
                    for cell in columns[i]
                ]
        return list(zip(*columns))

    def class_names(self, column: str) -> list[str] | None:
        """Return the names of a column's classes if the data set declares them (the Hub's `ClassLabel`)."""
        from datasets import ClassLabel, Features

        feature = Features.from_arrow_schema(self.table.schema)[column]
        feature = getattr(feature, "feature", feature)  # of a list
        return feature.names if isinstance(feature, ClassLabel) else None


def read_split(name: str, config: str | None, split: str) -> Columns:
    """Read one split of a data set, a Hub id or a folder, in one `config` (subset) of several.

    Raises:
        AssetNotFound: no such data set here.
        NoSuchSplit, BadData: no such split or configuration; the message lists those there are.
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
    return _read([Path(file) for file in files[split]], f"{title} {split}")


def _files_by_name(folder: Path, data_dir: str | None, title: str) -> dict[str, list[str]]:
    """Return the files of each split by the names that `datasets` knows, where no README lists them."""
    from datasets import load_dataset_builder

    try:
        with scratch_folder() as scratch:
            return load_dataset_builder(
                str(folder), data_dir=data_dir, cache_dir=str(scratch)
            ).config.data_files
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
        try:
            patterns = {str(files["split"]): files["path"] for files in data_files}
            paths = [
                PurePosixPath(p)
                for path in patterns.values()
                for p in ([path] if isinstance(path, str) else path)
            ]
        except (KeyError, TypeError) as error:
            raise BadData(f"{readme}: data_files of a configuration need a split and a path each.") from error
        if outside := [str(path) for path in paths if path.is_absolute() or ".." in path.parts]:
            raise BadData(f"{readme} lists files outside its folder: {', '.join(outside)}.")
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
    text = _decoded(readme)
    try:
        header = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadData(f"the header of {readme} is not YAML: {reason}.") from error
    entries = header.get("configs") if isinstance(header, dict) else None
    entries = entries if isinstance(entries, list) else []
    return [
        entry for entry in entries if isinstance(entry, dict) and {"config_name", "data_files"} <= {*entry}
    ]


def read_file(path: Path) -> Columns:
    """Read a user's .parquet, .jsonl, .json, .csv, .tsv or .txt file (its one column is "text").

    Values of all but .parquet are the strings that stand in the file, numbers too; lists are lists of them.

    Raises:
        BadData: says which file, line or column is not as it should be.
    """
    if not os.path.isfile(path):  # pathlib's fails on a name that is too long
        raise BadData(f"there is no file {path}.")
    return _read([path], str(path))


def _read(files: list[Path], title: str) -> Columns:
    suffix = files[0].suffix.lower()
    if suffix not in FORMATS:
        raise BadData(f"cannot read {title} ({files[0].name}): expected one of {', '.join(FORMATS)}.")
    if suffix == ".parquet":
        tables = _parquet(files, title)
    else:
        try:
            tables = [FORMATS[suffix](file) for file in files]
        except pa.ArrowException as error:
            raise BadData(f"{title}: a column holds values of several kinds ({error}).") from error
        except UnicodeEncodeError as error:  # "\ud800" alone, in a .json
            raise BadData(f"{title} holds a text with half of a character ({error.reason}).") from error
    if any(table.column_names != tables[0].column_names for table in tables):
        raise BadData(f"{title}: its {len(files)} files have different columns.")
    table = pa.concat_tables(tables, promote_options="default") if tables else None
    if not table:
        raise BadData(f"{title} is empty.")
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()  # {"translation": {"en": ...}} has the column "translation.en"
    return Columns(table, title)


def _parquet(files: list[Path], title: str) -> list[pa.Table]:
    """Stream files through `datasets` into tables; its locks go to a folder deleted after."""
    from datasets import load_dataset

    options = {"data_files": [str(file) for file in files], "split": "train", "streaming": True}
    try:
        with scratch_folder() as scratch:
            stream = load_dataset("parquet", cache_dir=str(scratch), **options).with_format("arrow")
            return [table for table in stream.iter(batch_size=_BATCH_ROWS) if len(table)]
    except (ValueError, OSError, StopIteration) as error:
        reason = (str(error).splitlines() or ["it holds no rows"])[0]
        raise BadData(f"{title} could not be read: {reason}") from error


def _decoded(path: Path) -> str:
    """Return a file's text without a spreadsheet's byte-order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 ({error}): save it in that encoding.") from error


def _txt(path: Path) -> pa.Table:
    content = _decoded(path).replace("\r\n", "\n")
    return pa.table({"text": [content] if content else []})


def _csv(path: Path) -> pa.Table:
    """Read every value as the string that stands there; each line's fields are counted."""
    content, limit = _decoded(path), csv.field_size_limit(sys.maxsize)  # texts may exceed the module's 128 kB
    settings: dict[str, Any] = {"delimiter": "\t" if path.suffix.lower() == ".tsv" else ","}
    try:
        header = next(csv.reader(io.StringIO(content, newline=""), **settings), [])
        if len(header) == 1 and (others := [mark for mark in ";\t,|" if mark in header[0]]):
            settings["delimiter"] = others[0]  # a spreadsheet's, where the comma is the decimal one
            header = next(csv.reader(io.StringIO(content, newline=""), **settings))
        # "text, label": the blank belongs neither to the name nor to the values below it.
        settings |= {"skipinitialspace": any(name.startswith(" ") for name in header), "strict": True}
        lines, rows = csv.reader(io.StringIO(content, newline=""), **settings), []
        names = [name.strip() for name in next(lines, [])]
        for fields in lines:
            if len(fields) == len(names):
                rows.append(fields)
            elif "".join(fields).strip():
                raise BadData(
                    f"{path}, line {lines.line_num}: {len(fields)} fields, but the header has {len(names)} "
                    f"({', '.join(names)}). Name every column, and quote a text that holds the delimiter."
                )
    except csv.Error as error:
        raise BadData(f"{path}, line {lines.line_num}, is no {path.suffix}: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    if repeated := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise BadData(
            f"{path} has more than one column {', '.join(map(repr, repeated))}: rename all but one."
        )
    unique = [name or f"column {number}" for number, name in enumerate(names, start=1)]
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(unique, zip(*rows))})


def _json(path: Path) -> pa.Table:
    """Read a list of objects, an object of columns, or an object a line; numbers stay as they are written."""
    decoder = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
    content, rows = _decoded(path), []
    position = len(content) - len(content.lstrip())
    while position < len(content):
        try:
            row, position = decoder.raw_decode(content, position)
        except json.JSONDecodeError as error:
            raise BadData(f"{path}, line {error.lineno}, is no {path.suffix}: {error.msg}.") from error
        except RecursionError as error:
            raise BadData(f"{path}: row {len(rows) + 1} is nested too deeply.") from error
        rows.append(row)
        position = re.compile(r"\s*").match(content, position).end()
    if len(rows) == 1 and isinstance(rows[0], list):
        [rows] = rows
    elif len(rows) == 1 and isinstance(rows[0], dict) and all(isinstance(c, list) for c in rows[0].values()):
        return pa.table({name: pa.array(map(_as_text, column)) for name, column in rows[0].items()})
    if wrong := [i for i, row in enumerate(rows, start=1) if not isinstance(row, dict)]:
        raise BadData(f'{path}: row {wrong[0]} is no object with named values, such as {{"text": "…"}}.')
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([_as_text(row.get(name)) for row in rows]) for name in names})


def _as_text(cell: Any) -> Any:
    """Return a value of a JSON file as it is written there; lists and objects keep their form."""
    if isinstance(cell, dict):
        return {name: _as_text(part) for name, part in cell.items()}
    if isinstance(cell, list):
        return [_as_text(part) for part in cell]
    return json.dumps(cell) if isinstance(cell, bool) else cell


FORMATS: dict[str, Callable[[Path], pa.Table] | None] = {".parquet": None, ".jsonl": _json, ".json": _json}
FORMATS |= {".csv": _csv, ".tsv": _csv, ".txt": _txt}


def sample(examples: list, limit: int | None, seed: int) -> list:
    """Draw at most `limit` examples by `seed`, in their own order."""
    if limit is None or limit >= len(examples):
        return examples
    indices = np.sort(np.random.default_rng(seed).choice(len(examples), size=limit, replace=False))
    return [examples[i] for i in indices]
