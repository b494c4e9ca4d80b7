"""From rows to `report.md`, its pages and its figures; drawn again only where rows or drawing code changed.

The text is a pure function of rows, templates and this code, which is what lets `check` tell a report that is
out of date. A manifest beside the figures holds, per figure, the hash of the rows and code it was drawn from.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from helpers.figures import FIGURES
from helpers.report import appendix, claims, conditions, opening, page, template, tensorboard, values
from lmcompress.code_digest import code_digest
from lmcompress.models.assets import file_hash
from lmcompress.paths import ROOT, atomic_path, write_json, write_text
from lmcompress.results.rows import with_times_again
from lmcompress.results.store import Row
from lmcompress.study import decision
from lmcompress.study.decision import comparable_rows

# Templates in the order they are printed; those named after a notebook have a page of all its rows.
ORDER = (
    "opening",
    "01_weight_statistics",
    "02_pruning",
    "03_structured_pruning",
    "04_distillation",
    "05_quantization",
    "06_low_rank_and_sharing",
    "07_moefication",
    "08_architecture_training",
    "09_sheared_llama",
    "10_combinations",
    "12_other_text",
    "training",
    "challenges",
    "claims",
    "limits",
)
BLOCKS = {
    "listed": lambda rows: str(len(decision.configurations())),
    "models": opening.models_table,
    "decisions": opening.decision_table,
    "commands": opening.commands,
    "standing": opening.standing,
    "claims": claims.table,
}
MANY = 12  # figures to be drawn at once from which on further processes are started


def figure_rows(name: str, figure: str, rows: list[Row]) -> list[Row]:
    """Return the rows of the notebooks that a template's `reads` gives a figure, by default of its own; the
    compared ones where a template of no notebook gives none.
    """
    notebooks = template.read(name)[0].get("reads", {}).get(figure)
    if notebooks is None and not name[:2].isdigit():
        compared = comparable_rows(rows)
        models = values.current(row["model"] for row in compared)
        return [row for row in compared if row["model"] in models]
    return [row for row in rows if row["notebook"] in (notebooks or [name])]


def drawings(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the name of every figure whose rows are there, with those rows, times of all their processes."""
    rows = with_times_again(rows)
    for name in ORDER:
        for figure in template.read(name)[0].get("figures", ()):
            drawn_rows = figure_rows(name, figure, rows)
            if FIGURES[figure].drawable(drawn_rows):
                yield figure, drawn_rows


def drawing_digest(figure: str, rows: list[Row]) -> str:
    """Return the hash of a figure's rows, of the style, and of the code that draws it."""
    style = (ROOT / "helpers/figures/study.mplstyle").read_text(encoding="utf-8")
    content = sorted(json.dumps(row, sort_keys=True) for row in rows)
    hashed = [
        *content,
        style,
        code_digest([f"helpers.figures.{FIGURES[figure].source.partition(':')[0]}"]),
        figure,
    ]
    return hashlib.sha256("\n".join(hashed).encode()).hexdigest()[:16]


def render(rows: list[Row], *, images: str, notebooks: str) -> tuple[dict[str, str], list[str]]:
    """Return the texts by file name, `report.md` and `report/NN_*.md`, and what could not be filled in.

    `images` and `notebooks` are the folders to link to, relative to the report.
    """
    drawn = {
        figure: f"![{figure.replace('-', ' ')}]({images}/{figure}.png)\n\n*{FIGURES[figure].caption}*"
        for figure, _ in drawings(rows)
    }
    blocks = {name: block(rows) for name, block in BLOCKS.items()}
    filler = template.Filler(rows, drawn, blocks)
    present = {row["notebook"] for row in rows}
    texts, pages = [], {}
    for name in ORDER:
        if name[:2].isdigit() and name not in present:
            continue
        text = filler.fill(name)
        if name[:2].isdigit():
            text += f"\n\nAll rows: [report/{name}.md](report/{name}.md). "
            text += f"Notebook: [{name}]({notebooks}/{name}.ipynb)."
            pages[f"report/{name}.md"] = _page(name, text, rows, filler, images)
        texts.append(text)
    for name in sorted(present - set(ORDER)):  # which no section is about
        pages[f"report/{name}.md"] = _page(name, name, rows, filler, images)
    elsewhere = claims.elsewhere(rows)
    pages["report/published_results.md"] = (
        f"# Published results that need another model or machine\n\n{elsewhere}\n"
    )
    parts = ["# Conditions of the rows", conditions.table(rows)]
    if again := conditions.times_again(rows):
        parts += ["## Times in several processes", again]
    parts.append(f"The loss of every training over its steps, as TensorBoard logs: `{tensorboard.COMMAND}`.")
    pages["report/conditions.md"] = "\n\n".join(parts) + "\n"
    return {"report.md": "\n\n".join(texts) + "\n"} | pages, filler.problems


def _page(name: str, text: str, rows: list[Row], filler: template.Filler, images: str) -> str:
    """Return the page of all rows of one notebook, with the figures that the report leaves out."""
    header, _ = template.read(name) if name in ORDER else ({}, "")
    title = text.splitlines()[0].removeprefix("## ")
    further = [f for f in header.get("figures", ()) if f in filler.figures and f"/{f}.png" not in text]
    figures = [filler.figures[figure].replace(f"]({images}/", f"](../{images}/") for figure in further]
    method = header.get("method", "")
    opening_blocks = [f"# {title}: all rows", "[Back to the report](../report.md)", method, *figures]
    return "\n\n".join(filter(None, [*opening_blocks, *appendix.paragraphs(rows, name, filler.lines)])) + "\n"


def build(rows: list[Row], *, report: Path, images: Path, notebooks: str) -> str:
    """Write `report`, its pages and its figures; return a line that says what was done.

    Figures whose rows and drawing code are unchanged are left alone.
    """
    manifest_path = images / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    fresh, due = {}, []
    for figure, drawn_rows in drawings(rows):
        png = images / f"{figure}.png"
        digest, entry = drawing_digest(figure, drawn_rows), manifest.get(png.name)
        if not (entry and entry["drawn_from"] == digest and png.is_file() and entry["png"] == file_hash(png)):
            due.append((figure, drawn_rows, png))
        fresh[png] = digest
    _draw_all(due)
    for stale in set(manifest) - {png.name for png in fresh}:
        (images / stale).unlink(missing_ok=True)
    write_json(
        manifest_path,
        {png.name: {"drawn_from": digest, "png": file_hash(png)} for png, digest in fresh.items()},
    )
    texts, _ = render(rows, images=images.relative_to(report.parent).as_posix(), notebooks=notebooks)
    texts[page.NAME] = page.render(rows, report=report.name)
    for name, text in texts.items():
        file = report.parent / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(exist_ok=True)
            write_text(file, text)
    return f"{report}: {len(rows)} rows, {len(due)} of {len(fresh)} figures redrawn"


def _draw_all(due: list[tuple[str, list[Row], Path]]) -> None:
    """Draw each `(figure, rows, png)`; many of them in a process per core, whose start takes seconds."""
    from joblib import Parallel, cpu_count, delayed

    Parallel(n_jobs=cpu_count() if len(due) >= MANY else 1)(delayed(_draw)(*drawing) for drawing in due)


def _draw(figure: str, rows: list[Row], png: Path) -> None:
    import matplotlib.pyplot as plt

    from helpers.figures import core

    with plt.style.context(core.STYLE_SHEET):
        drawn = FIGURES[figure].draw(rows)
        with atomic_path(png) as temporary:
            drawn.savefig(temporary, metadata={"Software": None})
        plt.close(drawn)
