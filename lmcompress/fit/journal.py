"""What a search has measured, on the disk: a line as soon as it is known, scores of every example beside it.

Killed at any moment, the same search goes on from here and measures nothing twice.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmcompress.errors import BadSetting
from lmcompress.paths import naming_write_errors, write_json, write_text
from lmcompress.results.store import RowStore, canonical
from lmcompress.stats import Columns

STATE = "search.jsonl"


class Journal:
    """The folder of one search; its first line says what is searched for: `job`, and `options` as given.

    Raises:
        BadSetting: the folder holds another search, or something else.
    """

    def __init__(self, folder: Path, job: dict, options: dict):
        self.folder, self.store, self.lines = folder, RowStore(folder), []
        if (folder / STATE).is_file():
            self.lines = read(folder)
            if self.lines and canonical(self.lines[0]["job"]) != canonical(job):
                before, now = self.lines[0]["job"], json.loads(canonical(job))
                other = [name for name in now if before.get(name) != now[name]]
                raise BadSetting(
                    f"{folder} holds a search for something else ({', '.join(other)} differ). Save to "
                    "another folder, or remove that one."
                )
            write_text(
                folder / STATE, "".join(map(_line, self.lines))
            )  # without the torn end a kill may leave
        elif folder.exists() and any(folder.iterdir()):
            raise BadSetting(
                f"{folder} holds other files, and the search would keep its work there: move them."
            )
        if not self.lines:
            self.add("job", job=job, options=options)

    def add(self, event: str, **fields: object) -> dict:
        """Append a line, on the disk when this returns."""
        file, line = self.folder / STATE, {"event": event, **fields}
        with naming_write_errors(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as state:
                state.write(_line(line))
                state.flush()
                os.fsync(state.fileno())
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

    def remove_model(self, name: str | None = None) -> None:
        """Remove the model of a candidate, or all models."""
        shutil.rmtree(self.model_folder(name) if name else self.folder / "models", ignore_errors=True)


def read(folder: Path) -> list[dict]:
    """Return the whole lines of a search; a torn last one is none, and there may be none at all."""
    lines = []
    if not (folder / STATE).is_file():
        return lines
    for text in (folder / STATE).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _line(fields: dict) -> str:
    return json.dumps(fields, default=str) + "\n"
