"""Is the committed report what its rows and code would give now? Each finding names the stale thing.

A row is stale if the technique or the measuring has a newer version, or if its committed model changed; a
figure if its rows or its drawing code changed; the text if rendering it again gives anything else.
"""

import json
from importlib import import_module
from pathlib import Path

from helpers.report import build as b
from helpers.report import page
from lmcompress.errors import BadData
from lmcompress.models import loading
from lmcompress.models.assets import file_hash
from lmcompress.paths import IMAGES, MODELS, ROOT
from lmcompress.results.rows import chain_steps
from lmcompress.results.store import PUBLISHED, published_rows, validate


def stale_rows(rows: list[dict]) -> list[str]:
    """Sentences about rows older than the code or the committed model they speak of, or that no run could record."""
    versions, found = current_versions(), []
    for row in rows:
        where, provenance = f"row {row['key']} ({row['notebook']}, {row['technique']})", row["provenance"]
        try:
            validate(row)
        except BadData as error:
            found.append(f"{where}: {error}")
        wanted = versions["techniques"].get(row["technique"])
        for step in chain_steps(row["settings"]):
            known = versions["techniques"].get(step.get("technique"))
            if known not in (None, step.get("version")):
                found.append(
                    f"{where}: its step {step['technique']} has version {step.get('version')}, not {known}"
                )
        if wanted is not None and provenance["technique_version"] != wanted:
            found.append(
                f"{where}: technique version {provenance['technique_version']}, the code has {wanted}"
            )
        if provenance["measure_version"] != versions["measure"]:
            found.append(
                f"{where}: measured by version {provenance['measure_version']}, the code has {versions['measure']}"
            )
        if row["model"].startswith(("pocket/", "reference/")) and (MODELS / row["model"]).is_dir():
            now = loading.identity(row["model"])
            if provenance["model_hash"] != now:
                found.append(
                    f"{where}: {row['model']} was {provenance['model_hash']}, the committed model is {now}"
                )
    return found


def current_versions() -> dict:
    """Versions of measuring and techniques that the code has now."""
    registered = import_module("lmcompress.compress").registered()
    techniques = {name: entry.version for name, entry in registered.items()}
    techniques["weight-statistics"] = import_module("lmcompress.weights.statistics").VERSION
    for name in ("sensitivity", "sensitivity-bits"):
        techniques[name] = import_module("lmcompress.compress.sensitivity").VERSION
    for name in ("kernels", "layer-speed"):
        techniques[name] = import_module("lmcompress.measure.kernels").VERSION
    techniques["redundancy"] = import_module("lmcompress.weights.spectra").VERSION
    techniques["activation-sparsity"] = import_module("lmcompress.compress.moefication").VERSION
    techniques["architecture"] = import_module("lmcompress.experiments.architecture").VERSION
    return {"measure": import_module("lmcompress.measure").MEASURE_VERSION, "techniques": techniques}


def stale_figures(rows: list[dict], images: Path) -> list[str]:
    """Sentences about figures that are missing, altered, or older than their rows or drawing code."""
    manifest_path = images / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    found, expected = [], set()
    for section in b.sections():
        own = b.section_rows(section, rows)
        for drawing in b._drawable(section, own):
            name = f"{drawing.name}.png"
            expected.add(name)
            known, png = manifest.get(name), images / name
            if known is None or not png.is_file():
                found.append(f"figure {name} is missing")
            elif known["drawn_from"] != b.drawing_digest(own):
                found.append(f"figure {name} is older than its rows or the code that draws it")
            elif known["png"] != file_hash(png):
                found.append(f"figure {name} is not the file that was drawn")
    found.extend(f"figure {name} belongs to no section" for name in sorted(set(manifest) - expected))
    return found


def check(
    *, report: Path = ROOT / "report.md", images: Path = IMAGES, rows: list[dict] | None = None
) -> list[str]:
    """Everything out of date in the committed report; an empty list means it is current."""
    if rows is None:
        if not PUBLISHED.is_file():
            return [f"{PUBLISHED} is missing: `make publish PROFILE=…` promotes a run"]
        try:
            rows = published_rows()
        except BadData as error:
            return [str(error)]
    found = stale_rows(rows) + stale_figures(rows, images)
    relative = images.relative_to(report.parent).as_posix()
    wanted = b.render(rows, images=relative, notebooks="notebooks")
    have = report.read_text(encoding="utf-8") if report.is_file() else ""
    if wanted != have:
        found.append(f"{report.name}: {_first_difference(wanted, have)}")
    html = report.with_name(page.NAME)
    if not html.is_file() or html.read_text(encoding="utf-8") != page.render(rows, report=report.name):
        found.append(f"{html.name} is missing, or not what the rows and its template give")
    return found


def _first_difference(wanted: str, have: str) -> str:
    if not have:
        return "is missing"
    pairs = enumerate(zip(wanted.splitlines(), have.splitlines()), 1)
    for number, (new, old) in pairs:
        if new != old:
            return f"line {number} is not what the rows give.\n  there:   {old[:160]}\n  by rows: {new[:160]}"
    return "its length is not what the rows give"
