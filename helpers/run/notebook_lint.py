"""What has to be true of every committed notebook; `python -m helpers.run.notebook_lint [--strip | --badges ADDRESS]`.

Stripped of outputs, run order visible in its name, one `parameters` cell, the `python3` kernel, cells short
enough to read, nothing installed after the first cell, and that cell the template's.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat

from lmcompress.errors import BadSetting
from lmcompress.paths import NOTEBOOKS, ROOT, write_text

CELL_LINES, CELLS, SOURCE_BYTES = 40, 45, 60_000
TEMPLATE = "_template.ipynb"
BADGE = "[![Colab](https://colab.research.google.com/assets/colab-badge.svg)](%s)"
OPENS = "https://colab.research.google.com/github/%s/blob/main/notebooks/%s"


def problems(path: Path) -> list[str]:
    """Everything that is wrong with one notebook, as sentences."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if any(cell.outputs or cell.execution_count is not None for cell in code):
        found.append("has outputs or execution counts: make lint")
    if "widgets" in notebook.metadata or "papermill" in notebook.metadata:
        found.append("carries widget or papermill state: make lint")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("its kernel is not python3")
    if sum("parameters" in cell.metadata.get("tags", []) for cell in code) != 1:
        found.append("needs exactly one cell tagged `parameters`")
    if len({cell.get("id") for cell in notebook.cells}) != len(notebook.cells):
        found.append("cell ids are missing or not unique")
    if not code or code[0].source != bootstrap():
        found.append(f"its first code cell is not that of {TEMPLATE}: make lint")
    first = notebook.cells[0] if notebook.cells else None
    if first is None or not re.match(r"# .+\?", first.source):
        found.append("its first cell is not a title that asks a question")
    elif len(first.source.split()) > 160:
        found.append(
            f"its introduction has {len(first.source.split())} words; 120 and the links are the limit"
        )
    if len(notebook.cells) > CELLS:
        found.append(f"has {len(notebook.cells)} cells, more than {CELLS}")
    if sum(len(cell.source.encode()) for cell in notebook.cells) > SOURCE_BYTES:
        found.append(f"its source is larger than {SOURCE_BYTES} bytes")
    for index, cell in enumerate(code):
        if len(cell.source.splitlines()) > CELL_LINES:
            found.append(f"code cell {index} has more than {CELL_LINES} lines")
        if index > 0 and re.search(r"^\s*[%!]\s*pip ", cell.source, re.M):
            found.append(f"code cell {index} installs packages; only the first cell may")
        if re.search(r"import \*|except\s*:|filterwarnings\(.ignore.\)", cell.source):
            found.append(f"code cell {index} has a star import, a bare except or a blanket warning filter")
    return [f"{path.name}: {sentence}" for sentence in found]


def bootstrap() -> str:
    """The first code cell of the template: what a notebook does in Colab before anything else."""
    cells = nbformat.read(NOTEBOOKS / TEMPLATE, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def strip(path: Path) -> bool:
    """Remove outputs, counts and widget state, keep ids, renew the bootstrap; returns whether the file changed."""
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    notebook.metadata = nbformat.NotebookNode(
        {k: v for k, v in notebook.metadata.items() if k in ("kernelspec", "language_info", "study")}
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if path.name != TEMPLATE and '"google.colab" in sys.modules' in cell.source:
                cell.source = bootstrap()
    after = nbformat.writes(notebook) + "\n"
    if after != before:
        write_text(path, after)
    return after != before


def set_address(address: str) -> None:
    """Let Colab open the notebooks: a badge in each and in README's table, the address in the bootstrap cell.

    Args:
        address: of the repository on GitHub, as for git clone; empty takes badges and address out again.

    Raises:
        BadSetting: it is not on GitHub, from where Colab opens notebooks.
    """
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", address)
    if address and not found:
        raise BadSetting(
            f"{address} is not on GitHub; write make badges REPOSITORY=https://github.com/OWNER/NAME"
        )
    repository = found[1] if found else ""

    def badge(name: str, before: str) -> str:
        return before + BADGE % (OPENS % (repository, name)) if repository else ""

    for path in sorted(NOTEBOOKS.glob("*.ipynb"), key=lambda path: path.name != TEMPLATE):
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        title, *rest = re.sub(r"\n\n\[!\[Colab\].*", "", first.source).split("\n", 1)
        first.source = "\n".join([title + badge(path.name, "\n\n"), *rest])
        if path.name == TEMPLATE:
            new = f'address = "https://github.com/{repository}"' if repository else 'address = ""'
            cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
            cell.source = re.sub(r'address = "[^"]*"', new, cell.source)
        write_text(path, nbformat.writes(notebook) + "\n")
        strip(path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.compile(r"^(\| \[\w+\]\(notebooks/(\w+\.ipynb)\))[^|]*\|", re.M)
    write_text(ROOT / "README.md", row.sub(lambda m: f"{m[1]}{badge(m[2], ' ')} |", readme))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 1 if any notebook has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.run.notebook_lint", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--strip", action="store_true", help="strip outputs and renew the bootstrap first")
    parser.add_argument(
        "--badges", metavar="ADDRESS", help="let Colab open the notebooks from there; '' undoes it"
    )
    options = parser.parse_args(arguments)
    try:
        if options.badges is not None:
            set_address(options.badges)
    except BadSetting as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    if options.strip:
        for path in paths:
            if strip(path):
                print(f"stripped {path.name}")
    names = [path.name for path in paths if not path.name.startswith("_")]
    found = [f"{name}: name does not start with two digits" for name in names if not re.match(r"\d\d_", name)]
    found += [sentence for path in paths for sentence in problems(path)]
    print("\n".join(found) if found else f"{len(paths)} notebooks are stripped and in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
