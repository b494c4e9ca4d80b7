"""Check every committed notebook; `python -m helpers.run.notebook_lint [--fix | --badges ADDRESS]`.

Run order visible in its name, one `parameters` cell, the `python3` kernel, cells short enough to read, no
installing after the first cell, and that cell the template's. nbstripout strips the outputs (`make lint`).
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat

from lmcompress.errors import BadSetting, StudyError, accept_any_encoding
from lmcompress.paths import NOTEBOOKS, ROOT, from_checkout, write_text

CELL_LINES, CELLS, SOURCE_BYTES, INTRODUCTION_WORDS = 40, 45, 60_000, 160
TEMPLATE = "_template.ipynb"
BADGE = "[![Colab](https://colab.research.google.com/assets/colab-badge.svg)](%s)"
OPENS = "https://colab.research.google.com/github/%s/blob/main/notebooks/%s"


def problems(path: Path) -> list[str]:
    """Return everything that is wrong with one notebook, as sentences."""
    notebook = nbformat.read(path, as_version=4)
    cells, code = notebook.cells, code_cells(notebook)
    title = cells[0].source if cells else ""
    words, size = len(title.split()), sum(len(cell.source.encode()) for cell in cells)
    wrong = {
        "its kernel is not python3": notebook.metadata.get("kernelspec", {}).get("name") != "python3",
        "needs exactly one cell tagged `parameters`": sum(map(is_parameters, code)) != 1,
        "cell ids are missing or not unique": len({cell.get("id") for cell in cells}) != len(cells),
        f"its first code cell is not that of {TEMPLATE}: make lint": not code
        or code[0].source != bootstrap(),
        "its first cell is not a title that asks a question": not re.match(r"# .+\?", title),
        f"its introduction has {words} words; 120 and the links are the limit": words > INTRODUCTION_WORDS,
        f"has {len(cells)} cells, more than {CELLS}": len(cells) > CELLS,
        f"its source is larger than {SOURCE_BYTES} bytes": size > SOURCE_BYTES,
        "its name does not start with two digits": not re.match(r"\d\d_|_template", path.stem),
    }
    banned = r"import \*|except\s*:|filterwarnings\(.ignore.\)"
    for index, cell in enumerate(code):
        wrong |= {
            f"code cell {index} has more than {CELL_LINES} lines": len(cell.source.splitlines()) > CELL_LINES,
            f"code cell {index} installs packages; only the first cell may": index > 0
            and re.search(r"^\s*[%!]\s*pip ", cell.source, re.M),
            f"code cell {index} has a star import, a bare except or a blanket warning filter": re.search(
                banned, cell.source
            ),
        }
    return [f"{path.name}: {sentence}" for sentence, broken in wrong.items() if broken]


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the code cells of a notebook in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_parameters(cell: nbformat.NotebookNode) -> bool:
    """Return True for the cell that papermill writes its parameters after."""
    return "parameters" in cell.metadata.get("tags", [])


def bootstrap() -> str:
    """Return the first code cell of the template: what a notebook does in Colab before anything else."""
    return code_cells(nbformat.read(NOTEBOOKS / TEMPLATE, as_version=4))[0].source


def renew_bootstrap(path: Path) -> None:
    """Write the template's first code cell over that of the notebook `path`."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        if '"google.colab" in sys.modules' in cell.source:
            cell.source = bootstrap()
    write_text(path, nbformat.writes(notebook) + "\n")


def set_address(address: str) -> None:
    """Let Colab open the notebooks: a badge in each and in README's table, the address in the bootstrap cell.

    Args:
        address: of the repository on GitHub, as for git clone; empty takes badges and address out again.

    Raises:
        BadSetting: it is not on GitHub, from where Colab opens notebooks.
    """
    on_github = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", address)
    if address and not on_github:
        raise BadSetting(
            f"{address} is not on GitHub; write make badges REPOSITORY=https://github.com/OWNER/NAME"
        )
    repository = on_github[1] if on_github else ""

    def badge(name: str, before: str) -> str:
        return before + BADGE % (OPENS % (repository, name)) if repository else ""

    for path in sorted(NOTEBOOKS.glob("*.ipynb"), key=lambda path: path.name != TEMPLATE):
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        title, *body = re.sub(r"\n\n\[!\[Colab\].*", "", first.source).split("\n", 1)
        first.source = "\n".join([title + badge(path.name, "\n\n"), *body])
        if path.name == TEMPLATE:
            line = f'address = "https://github.com/{repository}"' if repository else 'address = ""'
            cell = code_cells(notebook)[0]
            cell.source = re.sub(r'address = "[^"]*"', line, cell.source)
        write_text(path, nbformat.writes(notebook) + "\n")
        renew_bootstrap(path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.compile(r"^(\| \[\w+\]\(notebooks/(\w+\.ipynb)\))[^|]*\|", re.M)
    write_text(ROOT / "README.md", row.sub(lambda m: f"{m[1]}{badge(m[2], ' ')} |", readme))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if any notebook has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.run.notebook_lint", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--fix", action="store_true", help="renew every first code cell before checking")
    parser.add_argument(
        "--badges", metavar="ADDRESS", help="let Colab open the notebooks from there; '' undoes it"
    )
    accept_any_encoding()
    options = parser.parse_args(arguments)
    try:
        paths = sorted(from_checkout(NOTEBOOKS).glob("*.ipynb"))
        if options.badges is not None:
            set_address(options.badges)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths if options.fix else ():
        renew_bootstrap(path)
    sentences = [sentence for path in paths for sentence in problems(path)]
    print("\n".join(sentences) if sentences else f"{len(paths)} notebooks are in order")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
