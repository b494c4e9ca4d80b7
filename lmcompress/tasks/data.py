"""Reading a data set's split from a folder as the Hub lays it out, or a user's own file; columns are checked.

Files are read straight into pandas: nothing is converted or cached on disk.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from lmcompress.errors import BadData
from lmcompress.models import assets

_READERS = {
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False, convert_dates=False),
    ".json": lambda path: pd.read_json(path, lines=True, dtype=False, convert_dates=False),
    ".csv": lambda path: pd.read_csv(path, keep_default_na=False),  # "NA" and "null" are texts
}
_SPLIT_NAMES = {"validation": ("validation", "val", "valid", "dev"), "train": ("train",), "test": ("test",)}


def read_split(name: str, config: str | None, split: str, columns: Sequence[str]) -> pd.DataFrame:
    """One split of a data set, the asked-for columns present.

    Args:
        name: Hub id or folder, see `assets.resolve`.
        config: the Hub's configuration (subset), None for the only one.

    Raises:
        AssetNotFound: no such data set here.
        BadData: no such split or column; the message lists those there are.
    """
    folder = assets.resolve(name, kind="datasets")
    splits = splits_of(folder, config)
    if split not in splits:
        label = f"{name} ({config})" if config else name
        raise BadData(f"{label} in {folder} has no split {split!r}; it has {', '.join(splits) or 'none'}.")
    frame = pd.concat([read_table(path) for path in splits[split]], ignore_index=True)
    return check_columns(frame, columns, f"{name} {split}")


def configs_of(name: str) -> list[str]:
    """Configurations of a data set that are in its folder, sorted."""
    folder = assets.resolve(name, kind="datasets")
    listed = [c["config_name"] for c in _readme_configs(folder)]
    found = listed or [
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    ]
    return sorted(c for c in found if splits_of(folder, c))


def splits_of(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Files of each split: as the README's `configs:` say, else by the file names.

    Patterns whose files are not there are left out (a snapshot may hold some splits only).
    """
    for entry in _readme_configs(folder):
        if config in (None, entry["config_name"]):
            files = entry.get("data_files", [])
            listed = [{"split": "train", "path": files}] if isinstance(files, str) else files
            patterns = [
                (f["split"], [f["path"]] if isinstance(f["path"], str) else f["path"]) for f in listed
            ]
            found = {s: sorted({p for pattern in ps for p in folder.glob(pattern)}) for s, ps in patterns}
            return {split: paths for split, paths in found.items() if paths}
    places = [folder / config] if config else [folder, folder / "data"]
    found = {}
    for split, names in _SPLIT_NAMES.items():
        stems = [pattern for name in names for pattern in (f"{name}-*", f"{name}.*")]
        paths = sorted(
            {p for place in places for stem in stems for p in place.glob(stem) if p.suffix in _READERS}
        )
        if paths:
            found[split] = paths
    return found


def read_table(path: Path) -> pd.DataFrame:
    """Rows of a .parquet, .jsonl, .json (one object a line) or .csv file.

    Raises:
        BadData: no such file, another format, or a file that is not what its name says.
    """
    if path.suffix not in _READERS:
        raise BadData(f"cannot read {path}: expected one of {', '.join(_READERS)}.")
    if not path.is_file():
        raise BadData(f"there is no file {path}.")
    try:
        return _READERS[path.suffix](path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise BadData(f"{path} could not be read as {path.suffix}: {str(error).splitlines()[0]}") from error


def check_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> pd.DataFrame:
    """The frame, if it has rows and all `columns`.

    Raises:
        BadData: says which column is missing and which there are.
    """
    if frame.empty:
        raise BadData(f"{what} is empty.")
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise BadData(
            f"{what} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(str, frame.columns))}."
        )
    return frame


def sample(examples: list[dict], limit: int | None, seed: int) -> list[dict]:
    """At most `limit` examples drawn by `seed`, in their own order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.sort(np.random.default_rng(seed).choice(len(examples), size=limit, replace=False))
    return [examples[i] for i in chosen]


def _readme_configs(folder: Path) -> list[dict]:
    readme = folder / "README.md"
    return _configs_in(readme, readme.stat().st_mtime_ns) if readme.is_file() else []


@lru_cache(maxsize=16)
def _configs_in(readme: Path, modified_ns: int) -> list[dict]:
    """`configs:` of a README's header; parsed once, because a data set may have dozens of them."""
    text = readme.read_text(encoding="utf-8")
    if not text.startswith("---"):
        return []
    header = yaml.safe_load(text.split("---", 2)[1]) or {}
    return [entry for entry in header.get("configs", []) if "config_name" in entry and "data_files" in entry]
