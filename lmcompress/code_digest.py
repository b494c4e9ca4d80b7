"""A hash of the code that something really imports, blind to comments, docstrings and layout.

What depends on code (a notebook's result, a figure) is renewed when a module that it reaches changes what it does, and
not when a comment in it is corrected.
"""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lmcompress.paths import ROOT

PACKAGES = ("lmcompress", "helpers")


def code_digest(sources: Iterable[str | Path], *, root: Path = ROOT) -> str:
    """Return 16 hex digits of the code of `sources` and of every module of this project that they import.

    Args:
        sources: Python files, or dotted names of modules of `PACKAGES`.
        root: the folder that holds the packages.

    Raises:
        FileNotFoundError: a name or a file that is not there.
    """
    files = [source if isinstance(source, Path) else _file_of(source, root) for source in sources]
    if missing := [str(source) for source, file in zip(sources, files, strict=True) if file is None]:
        raise FileNotFoundError(f"no module {', '.join(missing)} under {root}")
    digest = hashlib.sha256()
    for file in sorted(reached(files, root=root)):
        digest.update(file.relative_to(root).as_posix().encode() if file.is_relative_to(root) else b"")
        digest.update(_code_of(file, file.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def reached(files: Iterable[Path], *, root: Path = ROOT) -> set[Path]:
    """Return `files` and the source files of the project's modules that they import, directly or through others."""
    found, waiting = set(), list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            names = imported(file.read_text(encoding="utf-8"))
            waiting += [module for name in names if (module := _file_of(name, root))]
    return found


def imported(source: str) -> set[str]:
    """Return the dotted names that Python source imports, of `PACKAGES` only; `from a import b` gives `a` and `a.b`.

    A string that is a module's name, alone or as "module:qualname", counts as an import of it.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value.partition(":")[0])  # modules named as text: import_module, "module:qualname"
    parents = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    return {name for name in parents if name.partition(".")[0] in PACKAGES}


def _file_of(name: str, root: Path) -> Path | None:
    """Return the source file of a module of the project; None for a name within a module, or another package."""
    base = root.joinpath(*name.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@cache
def _code_of(file: Path, changed: int) -> str:
    """Return the syntax tree of a file as text, without docstrings; `changed` is its time, for the cache."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant):
                node.body = node.body[1:]
    return repr(_plain(tree))


def _plain(node: object) -> object:
    """Return a syntax tree as nested tuples without empty fields, in which Python versions differ."""
    if isinstance(node, ast.AST):
        fields = [(name, _plain(child)) for name, child in ast.iter_fields(node) if child not in (None, [])]
        return (type(node).__name__, *fields)
    return [_plain(child) for child in node] if isinstance(node, list) else node
