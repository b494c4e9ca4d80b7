"""Is the committed report what its rows and code would give now? Each finding names the stale thing.

A row is stale if the technique or the measuring has a newer version, or if its committed model changed; a
figure if its rows or its drawing code changed; the text if rendering it again gives anything else.
"""

import json
from pathlib import Path

from helpers.report import build, page
from lmcompress import registry
from lmcompress.errors import BadData
from lmcompress.measure import MEASURE_VERSION
from lmcompress.models import loading
from lmcompress.models.assets import file_hash
from lmcompress.paths import IMAGES, MODELS, ROOT
from lmcompress.results.rows import chain_steps
from lmcompress.results.store import PUBLISHED, published_rows, validate

MOST_WORDS, MOST_FIGURES = 6000, 12


def stale_rows(rows: list[dict]) -> list[str]:
    """Return sentences about rows older than the code or their model, or that no run could record."""
    versions, problems = registry.versions(), []
    for row in rows:
        complaints, provenance = [], row["provenance"]
        try:
            validate(row)
        except BadData as error:
            complaints.append(str(error))
        for step in chain_steps(row["settings"]):
            current = versions.get(step.get("technique"))
            if current not in (None, step.get("version")):
                complaints.append(
                    f"its step {step['technique']} has version {step.get('version')}, not {current}"
                )
        recorded, current = provenance["technique_version"], versions.get(row["technique"])
        if current not in (None, recorded):
            complaints.append(f"technique version {recorded}, the code has {current}")
        if provenance["measure_version"] != MEASURE_VERSION:
            complaints.append(
                f"measured by version {provenance['measure_version']}, the code has {MEASURE_VERSION}"
            )
        if row["model"].startswith(("pocket/", "reference/")) and (MODELS / row["model"]).is_dir():
            committed = loading.identity(row["model"])
            if provenance["model_hash"] != committed:
                complaints.append(
                    f"{row['model']} was {provenance['model_hash']}, the committed model is {committed}"
                )
        where = f"row {row['key']} ({row['notebook']}, {row['technique']})"
        problems += [f"{where}: {complaint}" for complaint in complaints]
    return problems


def stale_figures(rows: list[dict], images: Path) -> list[str]:
    """Return sentences about figures that are missing, altered, or older than their rows or drawing code."""
    manifest_path = images / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    problems, expected = [], set()
    for figure, drawn_rows in build.drawings(rows):
        name = f"{figure}.png"
        expected.add(name)
        entry, png = manifest.get(name), images / name
        if entry is None or not png.is_file():
            problems.append(f"figure {name} is missing")
        elif entry["drawn_from"] != build.drawing_digest(figure, drawn_rows):
            problems.append(f"figure {name} is older than its rows or the code that draws it")
        elif entry["png"] != file_hash(png):
            problems.append(f"figure {name} is not the file that was drawn")
    return problems + [f"figure {name} belongs to no section" for name in sorted(set(manifest) - expected)]


def limits(text: str) -> list[str]:
    """Return sentences about a report that is longer than a colleague reads in twenty minutes."""
    words, figures = len(text.split()), text.count("\n![")
    problems = [f"report.md has {words} words, more than {MOST_WORDS}"] if words > MOST_WORDS else []
    return problems + (
        [f"report.md has {figures} figures, more than {MOST_FIGURES}"] if figures > MOST_FIGURES else []
    )


def check(
    *, report: Path = ROOT / "report.md", images: Path = IMAGES, rows: list[dict] | None = None
) -> list[str]:
    """Return all that is out of date in the committed report; an empty list means it is current."""
    if rows is None:
        if not PUBLISHED.is_file():
            return [f"{PUBLISHED} is missing: `make publish PROFILE=…` promotes a run"]
        try:
            rows = published_rows()
        except BadData as error:
            return [str(error)]
    problems = stale_rows(rows) + stale_figures(rows, images)
    relative = images.relative_to(report.parent).as_posix()
    texts, unfilled = build.render(rows, images=relative, notebooks="notebooks")
    problems += [f"template {problem}" for problem in unfilled] + limits(texts["report.md"])
    texts[page.NAME] = page.render(rows, report=report.name)
    for name, rendered in texts.items():
        file = report.parent / name
        committed = file.read_text(encoding="utf-8") if file.is_file() else ""
        if rendered != committed:
            problems.append(f"{name}: {_first_difference(rendered, committed)}")
    return problems


def _first_difference(rendered: str, committed: str) -> str:
    if not committed:
        return "is missing"
    for number, (new, old) in enumerate(zip(rendered.splitlines(), committed.splitlines()), 1):
        if new != old:
            return f"line {number} is not what the rows give.\n  there:   {old[:160]}\n  by rows: {new[:160]}"
    return "its length is not what the rows give"
