"""Measure the packages against the budgets of `[tool.house]`; `python tests/house.py` prints the table.

Rooms and their order are those of import-linter's layer contract, in the same file.
"""

import ast
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
HOUSE = TOOL["house"]
PACKAGES = ("lmcompress", "helpers")
VAGUE, EMPTY = set(HOUSE["vague_names"].split()), HOUSE["empty_names"].split()


def sources(place: str) -> list[Path]:
    """Return the Python files of a package, room, module or folder, given its path without suffix."""
    return (
        [ROOT / f"{place}.py"] if (ROOT / f"{place}.py").is_file() else sorted((ROOT / place).rglob("*.py"))
    )


def lines(place: str) -> int:
    """Return how many lines the files of `place` have."""
    return sum(file.read_text(encoding="utf-8").count("\n") for file in sources(place))


def rooms(package: str) -> set[str]:
    """Return the subpackages of a package: what a reader opens as one thing."""
    return {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}


def layers() -> list[set[str]]:
    """Return the modules of each layer, highest first."""
    contract = next(c for c in TOOL["importlinter"]["contracts"] if c["type"] == "layers")
    return [set(layer.replace("|", ":").replace(" ", "").split(":")) for layer in contract["layers"]]


def bindings(tree: ast.AST) -> Iterator[str]:
    """Yield the name of each parameter and of each assigned or loop variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def shares_of_names(package: str) -> dict[str, float]:
    """Return the share (fraction 0-1) of all bindings that are vague, and of each empty word."""
    names = Counter(
        name for file in sources(package) for name in bindings(ast.parse(file.read_text(encoding="utf-8")))
    )
    vague = sum(count for name, count in names.items() if name in VAGUE)
    return {"vague": vague / names.total(), **{word: names[word] / names.total() for word in EMPTY}}


def measurements() -> dict[str, float]:
    """Return every measured figure by the name of its budget."""
    code = [file for place in (*PACKAGES, "scripts", "tests", "benchmarks") for file in sources(place)]
    text = [line for file in code for line in file.read_text(encoding="utf-8").splitlines()]
    skip = "# fmt: " + "skip"
    figures = {f"lines of {place}": lines(place) for place in HOUSE["lines"]}
    figures |= {f"rooms of {package}": len(rooms(package)) for package in HOUSE["rooms"]}
    figures |= {
        "levels": len(layers()),
        "lines too long": sum(len(line) > TOOL["ruff"]["line-length"] for line in text),
        "formatting switched off": sum(skip in line for line in text),
    }
    for package in PACKAGES:
        shares = shares_of_names(package)
        figures[f"vague names of {package}, %"] = round(100 * shares.pop("vague"), 1)
        figures[f"emptiest name of {package}, %"] = round(100 * max(shares.values()), 1)
    return figures


def budgets() -> dict[str, float]:
    """Return the most that each measured figure may be."""
    most = {f"lines of {place}": budget for place, budget in HOUSE["lines"].items()}
    most |= {f"rooms of {package}": budget for package, budget in HOUSE["rooms"].items()}
    return most | {
        "levels": HOUSE["levels"],
        "lines too long": 0,
        "formatting switched off": HOUSE["formatting_off"],
        **{f"vague names of {package}, %": HOUSE["vague_percent"] for package in PACKAGES},
        **{f"emptiest name of {package}, %": HOUSE["empty_percent"] for package in PACKAGES},
    }


def main() -> int:
    """Print each figure beside its budget; return 1 if one is above it."""
    most, failed = budgets(), False
    for name, figure in measurements().items():
        print(f"{name:40} {figure:>8} of {most[name]:>6}{'  above' if figure > most[name] else ''}")
        failed |= figure > most[name]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
