"""Folders in which a user wants to keep a compressed model: never one that holds anything else."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from lmcompress.errors import BadSetting
from lmcompress.models.assets import few
from lmcompress.models.storage import RECORD, weights_hash
from lmcompress.paths import atomic_path
from lmcompress.results.store import Row, canonical


def holds(folder: Path, row: Row | None, *, own: Path) -> bool:
    """Return whether `folder` holds the saved model of `row`; False: it may be written; else `BadSetting`.

    Written are new or empty folders, and models that this project saved inside the study's folder, `own`.
    """
    if not folder.exists() and not folder.is_symlink():
        return False
    if not folder.is_dir():
        raise BadSetting(f"{folder} is a file: give a folder that is new or empty to keep the model in.")
    if not any(folder.iterdir()):
        return False
    saved = _saved_model(folder)
    if row and saved and _is_of(saved, row):
        return True
    others = [file.name for file in folder.iterdir() if file.name not in (saved or {}).get("files", ())]
    if not others and folder.resolve().is_relative_to(own.resolve()):
        return False
    what = f"another model ({saved['technique']} of {saved['base_model']})" if saved else "other files"
    what += f" and {few(others)}" if saved and others else ""
    raise BadSetting(
        f"{folder} holds {what}, which would be lost. Keep this model in a folder that is new or empty, or "
        "move what is there."
    )


def refuse_others(folder: Path, rows: Iterable[Row], *, own: Path) -> None:
    """Raise what `holds` would of any row that is still to come: before anything is measured."""
    saved = _saved_model(folder)
    holds(folder, next((row for row in rows if saved and _is_of(saved, row)), None), own=own)


def place(saved: Path, folder: Path, *, own: Path) -> None:
    """Move a saved model to `folder`, if that may still be written as `holds` said before."""
    with atomic_path(folder) as temporary:
        shutil.move(saved, temporary)
        holds(folder, None, own=own)


def _saved_model(folder: Path) -> dict | None:
    """Return the record of a model that `storage.save` wrote to `folder`, unchanged since; else None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["weights"] == weights_hash(folder, record.get("weight_files")):
            return record
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours
        pass
    return None


def _is_of(record: dict, row: Row) -> bool:
    if weights := row["provenance"].get("weights"):
        return record["weights"] == weights
    named = (record["base_model"], record["technique"]) == (row["model"], row["technique"])
    return named and canonical(record["report"]) == canonical(row["achieved"])
