"""Where everything lies, and how a file is written so that nobody ever sees half of it.

`ROOT` is `$STUDY_HOME` if set, else the checkout this package lies in, else the current folder.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmcompress.errors import DiskFull


def _find_root() -> Path:
    if os.environ.get("STUDY_HOME"):
        return Path(os.environ["STUDY_HOME"]).expanduser().resolve()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


ROOT = _find_root()
NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "profiles"
DATA_RAW = ROOT / "data" / "raw"
MODELS = ROOT / "models"
RESULTS = ROOT / "results"
IMAGES = ROOT / "images"
RUNS = Path(os.environ.get("STUDY_RUNS", ROOT / "runs"))


@contextmanager
def disk_full_is_named(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into `DiskFull` with the path and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free_mb = shutil.disk_usage(_existing_parent(path)).free / 1e6
        raise DiskFull(
            f"no space left to write {path} ({free_mb:.0f} MB free). What was recorded before is intact: "
            "free some space, or point $STUDY_RUNS at another disk, and run again; finished rows are skipped."
        ) from error


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path` (file or folder); rename it onto `path` only on success.

    Raises:
        DiskFull: no space left; `path` is untouched and the temporary is removed.
    """
    path = Path(path)
    with disk_full_is_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            temporary = holder / path.name
            yield temporary
            if path.is_dir() and temporary.is_dir():
                path.rename(holder / "old")
            os.replace(temporary, path)
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically, creating parent folders."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write sorted, indented JSON atomically; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _existing_parent(path: Path) -> Path:
    for candidate in (path, *path.parents):
        if candidate.exists():
            return candidate
    return Path.cwd()
