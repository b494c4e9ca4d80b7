"""Check what a notebook is given before anything is loaded: kinds of values, names, and where files lie.

Light at import, because the runner checks before a kernel starts, and every notebook again in its setup cell.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

import yaml

from lmcompress.errors import BadSetting
from lmcompress.paths import PROFILES

KINDS = {"str": str, "bool": bool, "int": int, "float": (int, float), "list": (list, tuple), "dict": dict}
OWN_DATA = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".yaml", ".yml"}
EXAMPLES = {"str": "a text", "bool": "true", "int": "1", "float": "0.5", "list": "[0.5]", "dict": "{a: 1}"}


def check_kinds(values: Mapping[str, object], annotations: Mapping[str, object]) -> None:
    """Compare values with the annotations of the parameters cell (types, or their names).

    Raises:
        BadSetting: a value is of another kind; the message says how to write it.
    """
    for name, value in values.items():
        kind = getattr(annotations.get(name), "__name__", annotations.get(name))
        legal = KINDS.get(kind, object)
        if not isinstance(value, legal) or (isinstance(value, bool) and kind in ("int", "float")):
            raise BadSetting(
                f"parameter {name} is {value!r}, a {type(value).__name__}; its type has to be {kind}. Write "
                f"-p '{name}={EXAMPLES[kind]}' to the runner, -y '{name}: {EXAMPLES[kind]}' to papermill, "
                "whose own -p knows no lists."
            )


def unknown_parameters(cells: list[str], annotations: Mapping[str, object]) -> list[str]:
    """Return the names that papermill wrote into one of `cells` and that no notebook has."""
    injected = next((cell for cell in reversed(cells) if cell.startswith("# Parameters\n")), "")
    given = [node.targets[0].id for node in ast.parse(injected).body if isinstance(node, ast.Assign)]
    elsewhere = set().union(*(yaml.safe_load(path.read_text("utf-8")) for path in PROFILES.glob("*.yaml")))
    return [name for name in given if name not in annotations and name not in elsewhere]


def from_folder(value: object, folder: Path) -> object:
    """Return `value` with every text in it that names a file or folder seen from `folder` made absolute.

    Raises:
        BadSetting: a text ends like a data file, and there is none.
    """
    if isinstance(value, (list, tuple)):
        return [from_folder(entry, folder) for entry in value]
    if not isinstance(value, str) or not value:
        return value
    path = folder / value
    if path.exists() and (path.is_file() or path.joinpath("config.json").exists() or value.startswith(".")):
        return str(path.resolve())
    if path.suffix in OWN_DATA and not path.exists():
        raise BadSetting(
            f"there is no file {value} in {folder}: paths are read from where the command is given"
        )
    return value
