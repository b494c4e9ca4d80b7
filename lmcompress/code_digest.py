"""Hash the code that something depends on: its files and every module of ours that they reach by imports.

Comments, docstrings, formatting and the Python version do not count: a better comment makes nothing stale.
"""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lmcompress.paths import CODE

PACKAGES = ("lmcompress", "helpers", "scripts")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_digest(sources: Iterable[str | Path], *, code: str = "", root: Path = CODE) -> str:
    """Return 16 hex digits over `sources`, the text `code`, and every module of this project they import.

    `sources`: files, or dotted names of modules of `PACKAGES` under `root`; a missing one is a
    FileNotFoundError. `code`: Python that lies in no file, such as the cells of a notebook.
    """
    digest = hashlib.sha256(_essence(ast.parse(code)).encode())
    for file in sorted(reached(sources, code=code, root=root)):
        digest.update(_digest_of(file, file.stat().st_mtime_ns))
    return digest.hexdigest()[:16]


def reached(sources: Iterable[str | Path], *, code: str = "", root: Path = CODE) -> set[Path]:
    """Return the files of `sources` and those of this project that they, or `code`, import, directly or not.

    Followed are `import` anywhere in a file, and strings that name a module where `importlib` is imported.
    """
    waiting = _imports(ast.parse(code), "", root)
    for source in sources:
        path = source if isinstance(source, Path) else root.joinpath(*source.split("."))
        if not (path.exists() or path.with_suffix(".py").exists()):
            raise FileNotFoundError(f"no module {source} under {root}")
        waiting |= {path} if isinstance(source, Path) else _files(source, root)
    files: set[Path] = set()
    while waiting:
        files.add(file := waiting.pop())
        waiting |= _imported_by(file, file.stat().st_mtime_ns, root) - files
    return files


@cache
def _digest_of(file: Path, changed_ns: int) -> bytes:
    return hashlib.sha256(_essence(_tree(file, changed_ns)).encode()).digest()


@cache
def _tree(file: Path, changed_ns: int) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _imported_by(file: Path, changed_ns: int, root: Path) -> frozenset[Path]:
    package = ".".join(file.parent.relative_to(root).parts) if file.is_relative_to(root) else ""
    return frozenset(_imports(_tree(file, changed_ns), package, root))


def _imports(tree: ast.Module, package: str, root: Path) -> set[Path]:
    """Return the files of the modules that `tree`, a module of `package`, imports."""
    nodes = [
        node for statement in tree.body if not _is_for_editors(statement) for node in ast.walk(statement)
    ]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names |= {alias.name, *_front_door(alias.name, root).values()}
        elif isinstance(node, ast.ImportFrom) and node.module:
            doors = _front_door(node.module, root)
            names |= {node.module, *(doors.get(a.name, f"{node.module}.{a.name}") for a in node.names)}
    if "importlib" in names and not _is_front_door(tree):
        strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        strings = {text.partition(":")[0] for text in strings}  # "module:qualname" names a module, too
        names |= strings | {f"{package}.{text}" for text in strings}
    modules = (name for name in names if name.replace(".", "").isidentifier())
    return {file for name in modules for file in _files(name, root)}


def _is_for_editors(statement: ast.stmt) -> bool:
    """Return True for `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(statement, ast.If) and getattr(statement.test, "id", None) == "TYPE_CHECKING"


def _is_front_door(tree: ast.Module) -> bool:
    """Return True for a package that imports a name only when it is asked for (PEP 562)."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)


def _front_door(package: str, root: Path) -> dict[str, str]:
    """Return the module behind each name that a package with a front door offers; nothing for others."""
    file = root.joinpath(*package.split("."), "__init__.py")
    if package.partition(".")[0] not in PACKAGES or not file.is_file():
        return {}
    tree = _tree(file, file.stat().st_mtime_ns)
    blocks = [node.body for node in tree.body if _is_for_editors(node)] if _is_front_door(tree) else []
    imports = [node for block in blocks for node in block if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module for node in imports for alias in node.names}


@cache
def _files(module: str, root: Path) -> frozenset[Path]:
    """Return the file of a module of ours and the `__init__` of each package above it; nothing for others."""
    words = module.split(".")
    if words[0] not in PACKAGES:
        return frozenset()
    files = [root.joinpath(*words[:depth], "__init__.py") for depth in range(1, len(words) + 1)]
    return frozenset(file for file in (*files, root.joinpath(*words).with_suffix(".py")) if file.is_file())


def _essence(node: object) -> str:
    """Return a syntax tree as text without docstrings, positions and fields that are empty."""
    if isinstance(node, list):
        return "[" + ",".join(map(_essence, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: field for name in node._fields if (field := getattr(node, name, None)) not in (None, [])}
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    inside = ",".join(f"{name}={_essence(field)}" for name, field in fields.items())
    return f"{type(node).__name__}({inside})"
