"""From rows to `report.md`: sections in order, figures redrawn only where rows or drawing code changed.

The text is a pure function of the rows and this code, which is what lets `check` tell a report that is out
of date. A manifest beside the figures holds, per figure, the hash of the rows and code it was drawn from.
"""

import hashlib
import json
from importlib import import_module
from pathlib import Path

from helpers.figures import FIGURES
from helpers.report import cards, challenges, conditions, opening, page
from helpers.report import wording as w
from helpers.report.section import Drawing, Section, texts
from lmcompress.code_digest import code_digest
from lmcompress.models.assets import file_hash
from lmcompress.paths import ROOT, atomic_path, write_json, write_text
from lmcompress.study import decision

SECTIONS = (
    "weights",
    "pruning",
    "structured",
    "distillation",
    "quantization",
    "low_rank",
    "moefication",
    "architecture",
    "sheared",
    "combinations",
    "other_text",
    "comparison",
)
MANY = 12  # figures to be drawn at once from which on further processes are started


def sections() -> list[Section]:
    """The report's sections in the order they are printed."""
    return [import_module(f"helpers.report.{name}").SECTION for name in SECTIONS]


def section_rows(section: Section, rows: list[dict]) -> list[dict]:
    """The rows a section speaks of: its notebook's, or all."""
    if "*" in section.reads:
        return [row for row in rows if row["quality"]]
    return [row for row in rows if row["notebook"] in (section.notebook, *section.reads)]


def rows_digest(rows: list[dict]) -> str:
    """Hash of rows, independent of their order."""
    texts = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def drawings(rows: list[dict]) -> list[tuple[Drawing, list[dict]]]:
    """Return every figure of the report with the rows it is drawn from."""
    return [
        (drawing, section_rows(section, rows))
        for section in sections()
        for drawing in drawable(section, section_rows(section, rows))
    ]


def drawing_digest(drawing: Drawing, rows: list[dict]) -> str:
    """Return the hash of a figure's rows, of the style, and of the code that draws it."""
    module = FIGURES[drawing.name].source.partition(":")[0]
    style = (ROOT / "helpers/figures/study.mplstyle").read_text(encoding="utf-8")
    texts = (
        rows_digest(rows),
        style,
        code_digest([f"helpers.figures.{module}"]),
    )
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def render(rows: list[dict], *, images: str, notebooks: str) -> str:
    """The whole report as Markdown; `images` and `notebooks` are the relative folders to link to."""
    reported = [(section, read_rows) for section in sections() if (read_rows := section_rows(section, rows))]
    titles = [section.text["title"] for section, _ in reported] + [cards.TITLE, "Conditions"]
    paragraphs = _opening(rows, reported, titles, images)
    for title, (section, read_rows) in zip(titles, reported, strict=False):
        paragraphs += [f"## {titles.index(title) + 1}. {title}", f"**{section.text['question']}**"]
        paragraphs.append(
            f"{section.text['method']} Notebook: [{section.notebook}]({notebooks}/{section.notebook}.ipynb)."
        )
        paragraphs.append("\n".join(f"- {sentence}" for sentence in section.summary(read_rows)))
        paragraphs.extend(_figure(d, images) for d in drawable(section, read_rows) if not d.opening)
        paragraphs.extend(section.findings(read_rows))
        paragraphs.extend(cards.block(section.cards(read_rows)))
        paragraphs.append(f"*What this does not show.* {section.text['caveats']}")
    paragraphs.append(f"## {len(titles) - 1}. {cards.TITLE}")
    cards_by_section = [section.cards(read_rows) for section, read_rows in reported]
    paragraphs.extend(
        cards.gathered(
            [
                (t, _anchor(f"{i} {t}"), m)
                for i, (t, m) in enumerate(zip(titles, cards_by_section, strict=False), 1)
            ]
        )
    )
    paragraphs.append(f"## {len(titles)}. Conditions")
    paragraphs.extend(conditions.paragraphs(rows))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _opening(rows: list[dict], reported: list, titles: list[str], images: str) -> list[str]:
    """What to use, one figure, the contents, the words, and the challenges."""
    paragraphs = ["# What compressing a language model costs", texts()["introduction"]]
    paragraphs += opening.summary(rows, {section.notebook: section.text["title"] for section, _ in reported})
    paragraphs.append(f"To filter the rows and set a budget of your own: [{page.NAME}]({page.NAME}).")
    paragraphs += [
        _figure(d, images)
        for section, read_rows in reported
        for d in drawable(section, read_rows)
        if d.opening
    ]
    questions = [section.text["question"] for section, _ in reported] + ["Which of them came out again?", ""]
    lines = [
        f"{i}. [{title}](#{_anchor(f'{i} {title}')})" + (f": {question}" if question else "")
        for i, (title, question) in enumerate(zip(titles, questions, strict=True), 1)
    ]
    paragraphs += [
        "## Contents",
        "\n".join(lines),
        "## How to read it",
        texts()["reading"].format(tolerated=w.percent(decision.TOLERATED)),
        opening.subjects_table(rows),
        "## The words",
        *(f"**{word}** {meaning}" for word, meaning in texts()["definitions"].items()),
        texts()["names"],
    ]
    if sentences := challenges.sentences(rows):
        paragraphs += [texts()["challenges"], "\n".join(f"- {sentence}" for sentence in sentences)]
    return paragraphs


def _figure(drawing: Drawing, images: str) -> str:
    return f"![{drawing.caption}]({images}/{drawing.name}.png)\n\n*{drawing.caption}*"


def build(rows: list[dict], *, report: Path, images: Path, notebooks: str) -> str:
    """Write `report` and its figures; returns a line that says what was done.

    Figures whose rows and drawing code are unchanged are left alone.
    """
    manifest_path = images / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    digests, due = {}, []
    for drawing, drawn_rows in drawings(rows):
        png = images / f"{drawing.name}.png"
        digests[png], entry = drawing_digest(drawing, drawn_rows), manifest.get(png.name)
        current = entry and entry["drawn_from"] == digests[png] and png.is_file()
        if not (current and entry["png"] == file_hash(png)):
            due.append((drawing, drawn_rows, png))
    _draw_all(due)
    fresh = {png.name: {"drawn_from": digest, "png": file_hash(png)} for png, digest in digests.items()}
    for stale in set(manifest) - set(fresh):
        (images / stale).unlink(missing_ok=True)
    write_json(manifest_path, fresh)
    relative = images.relative_to(report.parent).as_posix()
    text = render(rows, images=relative, notebooks=notebooks)
    if not report.is_file() or report.read_text(encoding="utf-8") != text:
        write_text(report, text)
    write_text(report.with_name(page.NAME), page.render(rows, report=report.name))
    return f"{report}: {len(rows)} rows, {len(due)} of {len(fresh)} figures redrawn"


def drawable(section: Section, rows: list[dict]) -> list[Drawing]:
    """Return the drawings whose rows are there: a section may be partly measured."""
    return [
        drawing for drawing in section.drawings if rows and (drawing.needs is None or drawing.needs(rows))
    ]


def _draw_all(due: list[tuple[Drawing, list[dict], Path]]) -> None:
    """Draw each `(drawing, rows, png)`; many of them in a process per core, whose start takes seconds."""
    from joblib import Parallel, cpu_count, delayed

    Parallel(n_jobs=cpu_count() if len(due) >= MANY else 1)(
        delayed(_draw)(*due_drawing) for due_drawing in due
    )


def _draw(drawing: Drawing, rows: list[dict], png: Path) -> None:
    import matplotlib.pyplot as plt

    from helpers.figures import core

    with plt.style.context(core.STYLE_SHEET):
        figure = drawing.draw(rows)
        with atomic_path(png) as temporary:
            figure.savefig(temporary, metadata={"Software": None})
        plt.close(figure)


def _anchor(title: str) -> str:
    letters = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return letters.replace(" ", "-")
