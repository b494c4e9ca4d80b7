"""Where everything lies, and how a file is written so that nobody ever sees half of it.

`ROOT` is `$STUDY_HOME` if set, else the checkout this package lies in, else the current folder.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from lmcompress.errors import AssetNotFound, DiskFull, NotWritable

CODE = Path(__file__).resolve().parent.parent  # holds the packages: the checkout, or site-packages
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
# begins the names of the folders in which `atomic_path` collects what it writes
_HOLDER = ".lmcompress-unfinished-"
_SCRATCH = "lmcompress-scratch-"  # likewise of those among the system's temporary files
# What numpy, and the streams of a library in C++, say in place of a number when a write was cut short.
_CUT = re.compile(r"\d+ requested and \d+ written|iostream error")

ROOT = CODE if (CODE / "notebooks" / "_template.ipynb").is_file() else Path.cwd()
if os.environ.get("STUDY_HOME"):
    ROOT = Path(os.environ["STUDY_HOME"]).expanduser().resolve()
NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "profiles"
DATA_RAW = ROOT / "data" / "raw"
MODELS = ROOT / "models"
RESULTS = ROOT / "results"
IMAGES = ROOT / "images"
RUNS = Path(os.environ.get("STUDY_RUNS", ROOT / "runs"))


def from_checkout(path: Path) -> Path:
    """Return `path`, which comes with the checkout and not with the packages; `AssetNotFound` without it."""
    if not path.exists():
        raise AssetNotFound(
            f"{path} is not there. It comes with the project's checkout, which an installed package does not "
            f"hold; looked for under {ROOT}. Clone the repository, then run from its folder or set "
            "$STUDY_HOME to it."
        )
    return path


@contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Turn what the system answers to a write to `path` into a sentence: `DiskFull` or `NotWritable`."""
    try:
        yield
    except Exception as error:
        # Libraries in Rust (safetensors, tokenizers) tell the number in a message of their own class.
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = getattr(error, "errno", None) or (number and int(number[1]))
        if code is None and _CUT.search(str(error)):
            code = errno.ENOSPC
        if code in _FULL:
            folder = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            free = f"{os.strerror(code)}; {shutil.disk_usage(folder).free / 1e6:.0f} MB free"
            raise DiskFull(
                f"no space left to write {path} ({free}). What was recorded before is intact: free some "
                "space, or point $STUDY_RUNS (temporary files: $TMPDIR) at another disk, and run again; "
                "finished rows are skipped."
            ) from error
        if code in _REFUSED and str(path.parent) in str(getattr(error, "filename", None) or path):
            raise NotWritable(
                f"cannot write {path}: {os.strerror(code)}. Name a folder that this user may write to, "
                "or point $STUDY_RUNS at one."
            ) from error
        raise


@contextmanager
def owned_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, removed at the end; what killed processes left there goes first."""
    with naming_write_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
    sweep(parent, prefix)
    while True:
        with naming_write_errors(parent):
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: `sweep` leaves the folder alone
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with this process, however that ends
        if folder.is_dir():  # not swept before it was locked
            break
        os.close(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def scratch_folder() -> AbstractContextManager[Path]:
    """Yield a new folder among the system's temporary files, as `owned_folder` does."""
    return owned_folder(Path(tempfile.gettempdir()), _SCRATCH)


def sweep_scratch() -> None:
    """Remove the `scratch_folder`s whose process is gone."""
    sweep(Path(tempfile.gettempdir()), _SCRATCH)


def sweep(parent: Path, prefix: str = _HOLDER) -> None:
    """Remove `owned_folder`s whose process is gone; what was killed between its two renames is finished."""
    for holder in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # held by a living process, or removed by another sweep
            lock = os.open(holder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                names = {entry.name for entry in holder.iterdir()}
                for name in names - {"replaced"} if "replaced" in names else ():
                    if not (parent / name).exists():
                        os.replace(holder / name, parent / name)
                shutil.rmtree(holder)
            finally:
                os.close(lock)


@contextmanager
def claimed(path: Path, waiting: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[None]:
    """Hold the file `path` against every other process and thread; removed at the end, let go by a kill.

    `waiting` is entered while another holds it.
    """
    while True:
        with naming_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with waiting():
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)  # removed by the one that held it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; rename it onto `path` only on success.

    What killed processes left beside `path` is removed first. Raises `DiskFull` or `NotWritable`: then `path`
    is untouched and the temporary is removed.
    """
    path = Path(path)
    with naming_write_errors(path), owned_folder(path.parent, _HOLDER) as holder:
        temporary = holder / path.name
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as written:
                os.fsync(written)  # else a power cut may leave it empty under its final name
        if path.is_dir() and temporary.is_dir():
            path.rename(holder / "replaced")
        os.replace(temporary, path)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically, creating parent folders."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write sorted, indented JSON atomically; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
