"""What a search has measured, on the disk: a line as soon as it is known, scores of every example beside it.

Killed at any moment, the same search goes on from here and measures nothing twice.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmcompress.errors import BadSetting
from lmcompress.paths import write_json
from lmcompress.results.store import RowStore, append_line, canonical
from lmcompress.stats import Columns

STATE = "search.jsonl"
_BEGINNING = b'{"event": "job"'  # of the first line, however little of it a kill left


class Journal:
    """The folder of one search; its first line says what is searched for: `job`, and `options` as given.

    Raises:
        BadSetting: the folder holds another search, or something else.
    """

    def __init__(self, folder: Path, job: dict, options: dict):
        self.folder, self.store, self.lines = folder, RowStore(folder), read(folder)
        if self.lines and canonical(self.lines[0]["job"]) != canonical(job):
            before, now = self.lines[0]["job"], json.loads(canonical(job))
            other = [name for name in now if before.get(name) != now[name]]
            raise BadSetting(
                f"{folder} holds a search for something else ({', '.join(other)} differ). Save to "
                "another folder, or remove that one."
            )
        if (
            not self.lines
            and folder.exists()
            and not (folder.is_dir() and set(os.listdir(folder)) <= {STATE})
        ):
            raise BadSetting(
                f"{folder} holds other files, and the search would keep its work there: move them."
            )
        if not self.lines:
            self.add("job", job=job, options=options)

    def add(self, event: str, **fields: object) -> dict:
        """Append a line, on the disk when this returns."""
        line = {"event": event, **fields}
        append_line(self.folder / STATE, json.dumps(line, default=str))
        self.lines.append(line)
        return line

    def find(self, event: str, **fields: object) -> dict | None:
        """Return the last line of this event with these fields."""
        return next(self.all(event, newest_first=True, **fields), None)

    def all(self, event: str, *, newest_first: bool = False, **fields: object) -> Iterator[dict]:
        """Yield the lines of this event with these fields."""
        for line in reversed(self.lines) if newest_first else list(self.lines):
            if line["event"] == event and all(line.get(k) == v for k, v in fields.items()):
                yield line

    def save_scores(self, name: str, chunk: str, columns: Columns) -> None:
        """Keep the columns of every example of a chunk."""
        self.store.save_scores(f"{name}.{chunk}", columns)

    def load_scores(self, name: str, chunk: str) -> Columns:
        """Return the columns that were kept."""
        return self.store.load_scores(f"{name}.{chunk}")

    def save_outputs(self, name: str, outputs: list[str]) -> None:
        """Keep the texts that a model wrote on the examples that confirm."""
        write_json(self._outputs(name), outputs)

    def load_outputs(self, name: str) -> list[str]:
        """Return the texts that were kept; none of a task that writes nothing."""
        file = self._outputs(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

    def _outputs(self, name: str) -> Path:
        return self.folder / "outputs" / f"{name}.json"

    def model_folder(self, name: str) -> Path:
        """Return where the model of a candidate lies while the search goes on."""
        return self.folder / "models" / name

    def checkpoint_folder(self, name: str) -> Path:
        """Return where the training of a candidate is kept until its model is recorded."""
        return self.folder / "checkpoints" / name

    def remove_model(self, name: str | None = None) -> None:
        """Remove the model of a candidate, or all models."""
        shutil.rmtree(self.model_folder(name) if name else self.folder / "models", ignore_errors=True)

    def remove_checkpoint(self, name: str) -> None:
        """Remove what a candidate's training kept: its model is recorded, or cannot be made."""
        shutil.rmtree(self.checkpoint_folder(name), ignore_errors=True)


def read(folder: Path) -> list[dict]:
    """Return the whole lines of a search; a torn last one is none, and there may be none at all.

    Raises:
        BadSetting: what lies there is no search's.
    """
    lines, file = [], folder / STATE
    content = file.read_bytes() if file.is_file() else b""
    for text in content.splitlines(keepends=True):
        try:
            line = json.loads(text)
            _ = line["event"], lines or line["options"]
            lines.append(line)
        except (ValueError, LookupError, TypeError):
            if text.endswith(b"\n") or not (lines or text.startswith(_BEGINNING[: len(text)])):
                raise BadSetting(f"{file} is no search's: move it, or save to another folder.") from None
    return lines


def remove_work(folder: Path) -> None:
    """Remove the models and checkpoints of a search whose answer is saved; what it measured stays."""
    for name in ("models", "checkpoints") if read(folder) else ():
        shutil.rmtree(folder / name, ignore_errors=True)
