"""Rows on disk: every measured setting is one JSON line, kept through kills and full disks.

This is the memory of the study. Notebooks append rows as soon as they are measured and skip keys that are
already there; figures and the report read rows and nothing else. `row.schema.json` beside this file fixes
the fields.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import fastjsonschema
import numpy as np
import safetensors
import safetensors.numpy

from lmcompress.errors import BadData
from lmcompress.paths import RESULTS, atomic_path, from_checkout, naming_write_errors
from lmcompress.results.names import told_apart

Row = dict[str, object]
_INPUTS = ("task", "model_hash", "data_hash", "technique", "technique_version", "measure_version")
_INPUTS += ("settings", "seed")
FURTHER_INPUTS = ("tokenizer_hash", "training_hash", "selection_hash")  # part of a key where there is one
PUBLISHED = RESULTS / "published.json"  # says which profile's rows the committed report shows


def canonical(obj: object) -> str:
    """Return the one JSON text of `obj`: sorted keys, no spaces, ASCII.

    What means the same gives the same text: `1.0` and `1`, tuples and lists, numpy scalars and Python's
    (a float32 counts as the shortest decimal that names it, so `np.float32(0.1)` is `0.1`).

    Raises:
        BadData: `obj` holds NaN, infinity, or something JSON has no word for; the message names the field.
    """
    return json.dumps(_plain(obj, ()), sort_keys=True, separators=(",", ":"), allow_nan=False)


def row_key(**inputs: object) -> str:
    """Return the 16 hex digits under which a measurement is recorded and found again.

    `inputs` are those of `study.provenance.Inputs`; of `FURTHER_INPUTS` one at its default is None, and adds
    nothing.
    """
    identity = {name: value for name, value in inputs.items() if value is not None or name in _INPUTS}
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:16]


def key_of(row: Row) -> str:
    """Return the key of a row, recomputed from what the row itself says."""
    said = row["provenance"] | row
    return row_key(**{name: said.get(name) for name in (*_INPUTS, *FURTHER_INPUTS)})


class RowStore:
    """The rows under one folder: `<notebook>.jsonl` files, and `scores/<key>.safetensors` beside them."""

    def __init__(self, folder: Path | str):
        """Use `folder`, which need not exist before the first append."""
        self.folder = Path(folder)

    def append(self, row: Row) -> None:
        """Validate `row` and add it durably to its notebook's file: one line, one write, synced.

        Safe against other processes appending, and against being killed at any moment: a torn tail left
        by a kill is no row to any reader, and is cut away here before the next row is written.

        Raises:
            BadData: a field is missing, unknown, of the wrong kind, or not finite; the message names it.
            DiskFull: no space left; the rows recorded before are intact.
        """
        text = canonical(row)
        validate(json.loads(text))
        append_line(self._rows_file(row["notebook"]), text)

    def rows(self, notebook: str | None = None) -> list[Row]:
        """Return the rows of one notebook, or of all in order of name; of a repeated key the last row.

        A key recorded by two notebooks is a row of each. What is not the same model or data has not the same
        name (see `told_apart`).

        Raises:
            BadData: a line other than a torn last one does not parse; the message names file and line.
        """
        return told_apart(self.recorded(notebook))

    def recorded(self, notebook: str | None = None) -> list[Row]:
        """Return the same under the names that they were recorded with, from which keys are made."""
        rows = []
        for path in self._files() if notebook is None else [self._rows_file(notebook)]:
            rows += {row["key"]: row for row in _parse(path)}.values()
        return rows

    def find(self, key: str) -> Row | None:
        """Return the row recorded last under `key` in any notebook, or None."""
        needle = key.encode()
        matches = [
            row for path in self._files() for row in _parse(path, containing=needle) if row["key"] == key
        ]
        return sorted(matches, key=lambda row: row["provenance"]["started"])[-1] if matches else None

    def save_scores(self, key: str, scores: dict[str, np.ndarray]) -> Path:
        """Write per-example scores, name to array of any shape, to `scores/<key>.safetensors` atomically.

        Raises:
            BadData: an array is not numeric.
            DiskFull: no space left; an earlier file is intact.
        """
        arrays = {name: np.asarray(values, order="C") for name, values in scores.items()}
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise BadData(f"scores column {name!r} has dtype {array.dtype}; store numbers or booleans")
        path = self._scores_file(key)
        with atomic_path(path) as temporary:
            temporary.write_bytes(safetensors.numpy.save(arrays))
        return path

    def load_scores(self, key: str) -> dict[str, np.ndarray]:
        """Return what `save_scores` stored under `key`.

        Raises:
            BadData: there is no such file, or it is damaged.
        """
        path = self._scores_file(key)
        try:
            return safetensors.numpy.load(path.read_bytes())
        except FileNotFoundError:
            count = len(list(path.parent.glob("*.safetensors")))
            problem = f"no per-example scores at {path} ({count} others are there)"
        except safetensors.SafetensorError as error:
            problem = f"{path} is damaged ({error})"
        raise BadData(f"{problem}. Remove the row with key {key}, and run its notebook again.")

    def has_scores(self, key: str) -> bool:
        """Return whether `save_scores` stored any under `key`."""
        return self._scores_file(key).is_file()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))

    def _rows_file(self, notebook: str) -> Path:
        return self.folder / f"{notebook}.jsonl"

    def _scores_file(self, key: str) -> Path:
        return self.folder / "scores" / f"{key}.safetensors"


def append_line(path: Path, text: str) -> None:
    """Add a line of JSON to a file, wholly or not at all; synced, after a torn end was cut away.

    Raises:
        DiskFull: no space left; the lines before are intact.
    """
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = _mend_tail(descriptor, path)
            try:
                _write_all(descriptor, text.encode() + b"\n")
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def published_folder() -> Path:
    """Return the folder of the rows that the committed report shows."""
    return RESULTS / json.loads(from_checkout(PUBLISHED).read_text(encoding="utf-8"))["profile"]


def published_rows(folder: Path | None = None) -> list[Row]:
    """Return the rows under `folder`, by default those of the committed report.

    Raises:
        BadData: there are none.
    """
    folder = folder or published_folder()
    if rows := RowStore(folder).rows():
        return rows
    raise BadData(
        f"no rows in {folder}: `make report` makes some in runs/pocket/rows, `make publish` promotes a run"
    )


def notebooks_apart() -> tuple[str, ...]:
    """Return the notebooks that `published.json` names: their rows do not say which compression to use."""
    return tuple(_published("apart", ()))


def superseded() -> dict[str, str]:
    """Return the models that `published.json` names with the one that has replaced each: while rows of some
    notebooks are still of the old one, no first answer is.
    """
    return dict(_published("superseded", {}))


def _published(name: str, default: object) -> object:
    return json.loads(PUBLISHED.read_text()).get(name, default) if PUBLISHED.is_file() else default


def _plain(value: object, where: tuple[str, ...]) -> object:
    """Reduce `value` to dict, list, str, int, float, bool and None; whole floats become ints."""
    if isinstance(value, np.ndarray):
        value = list(value) if value.ndim else value[()]
    if isinstance(value, np.floating) and not isinstance(value, float):
        value = float(str(value))
    elif isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadData(f"field {_dotted(where)} is {value}: JSON has no such number; record null instead")
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        plain = {str(name): _plain(child, (*where, str(name))) for name, child in value.items()}
        if len(plain) != len(value):
            raise BadData(f"field {_dotted(where)} has two names that read alike: {list(value)}")
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(child, (*where, str(index))) for index, child in enumerate(value)]
    raise BadData(
        f"field {_dotted(where)} is a {type(value).__name__}, which JSON cannot hold: "
        "pass numbers, strings, booleans, None, lists or dicts"
    )


def _dotted(where: Iterable[object]) -> str:
    return ".".join(map(str, where)) or "(top level)"


@cache
def published_tokenizers() -> dict[str, str]:
    """Return model hash -> tokenizer hash of this project's published models: no part of their rows' keys."""
    return json.loads(Path(__file__).with_name("tokenizers.json").read_text(encoding="utf-8"))


@cache
def _schema() -> dict:
    return json.loads((Path(__file__).parent / "row.schema.json").read_text(encoding="utf-8"))


@cache
def _validator() -> Callable[[Row], Row]:
    return fastjsonschema.compile(_schema(), use_default=False)


def validate(row: Row) -> None:
    """Refuse a row that `row.schema.json` does not describe.

    Raises:
        BadData: names the field, what is wrong with it, and what may stand there.
    """
    try:
        _validator()(row)
    except fastjsonschema.JsonSchemaValueException as error:
        legal = error.definition.get("properties", error.definition.get("enum"))
        available = f"; legal here: {', '.join(map(str, legal))}" if legal else ""
        raise BadData(
            f"row field {_dotted(error.path[1:])}: {error.message[:300]}{available}. "
            "lmcompress/results/row.schema.json describes every field."
        ) from None


def _parse(path: Path, containing: bytes = b"") -> Iterator[Row]:
    """Yield the rows of the file whose line holds `containing`; a torn last line is no row."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or containing not in line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "key" not in row:
                raise ValueError("no object with a key")
        except ValueError as error:
            if number == len(lines):
                return
            raise BadData(
                f"{path}, line {number} is not a JSON row ({error}). It was not written by this project: "
                "remove that line and run the notebook again; its other rows are kept."
            ) from error
        yield row


def _mend_tail(descriptor: int, path: Path) -> int:
    """Make the file end after a whole row and return its length: cut a torn tail, end an unended row."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end == len(content):
        return end
    try:
        json.loads(content[end:])
    except ValueError:
        os.ftruncate(descriptor, end)
        return end
    _write_all(descriptor, b"\n")
    return len(content) + 1


def _write_all(descriptor: int, data: bytes) -> None:
    """Write in one call; go on only where a full disk or a signal cut that call short."""
    while data:
        written = os.write(descriptor, data)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = data[written:]
