"""From rows to `report.md`: sections in order, figures redrawn only where rows or drawing code changed.

The text is a pure function of the rows and this code, which is what lets `check` tell a report that is out
of date. A manifest beside the figures holds, per figure, the hash of the rows and code it was drawn from.
"""

import hashlib
import json
from importlib import import_module
from pathlib import Path

from helpers.paths import ROOT, atomic_path, write_json, write_text
from helpers.report import wording as w
from helpers.report.section import Drawing, Section

SECTIONS = (
    "weights",
    "pruning",
    "structured",
    "distillation",
    "quantization",
    "low_rank",
    "moefication",
    "architecture",
    "combinations",
    "comparison",
)
INTRODUCTION = """\
A language model is too big or too slow. Which compression should it get, and what will that cost? Each section
asks one such question, and answers it with measurements on the same models and tasks.

How to read it. Every number below comes from a recorded row; nothing is typed by hand. Brackets hold 95 %
intervals. A difference is paired: the same examples, scored by both models. The words *no measurable change*
mean that the difference could be chance (Holm's correction over all comparisons of a model and task, at 5 %), or,
for times, that it lies within what two copies of the same dense model differ by. What a summary recommends must also
have an interval that reaches no loss at all. *Collapsed* means no better than
a model that knows nothing. Bytes are of files written; every compressed model was saved, reloaded, and only then
measured. A null result is printed as one."""


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


def drawing_digest(rows: list[dict]) -> str:
    """Hash of the rows and of the code and style that draw them."""
    digest = hashlib.sha256(rows_digest(rows).encode())
    for source in sorted((ROOT / "helpers").glob("plots*.py")) + [ROOT / "helpers" / "study.mplstyle"]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def render(rows: list[dict], *, images: str, notebooks: str) -> str:
    """The whole report as Markdown; `images` and `notebooks` are the relative folders to link to."""
    chosen = [(section, own) for section in sections() if (own := section_rows(section, rows))]
    parts = ["# What compressing a language model costs", INTRODUCTION]
    bullets = [f"- {sentence}" for section, own in chosen for sentence in section.summary(own)]
    parts.append("## In short\n\n" + "\n".join(bullets))
    parts.append("## Contents\n\n" + "\n".join(
        f"{i}. [{s.title}](#{_anchor(f'{i} {s.title}')}): {s.question}" for i, (s, _) in enumerate(chosen, 1)
    ) + f"\n{len(chosen) + 1}. [Conditions](#{_anchor(f'{len(chosen) + 1} Conditions')})")  # fmt: skip
    for index, (section, own) in enumerate(chosen, 1):
        parts.append(f"## {index}. {section.title}")
        parts.append(f"**{section.question}**")
        parts.append(
            f"{section.method} Notebook: [{section.notebook}]({notebooks}/{section.notebook}.ipynb)."
        )
        parts.extend(
            f"![{d.caption}]({images}/{d.name}.png)\n\n*{d.caption}*" for d in _drawable(section, own)
        )
        parts.extend(section.findings(own))
        parts.append(f"*What this does not show.* {section.caveats}")
    parts.append(f"## {len(chosen) + 1}. Conditions")
    parts.extend(conditions(rows))
    return "\n\n".join(parts) + "\n"


def conditions(rows: list[dict]) -> list[str]:
    """Profile, machine, packages, data and wall time of the rows, and how to repeat them."""
    profile = rows[0]["profile"]
    places = {json.dumps(row["provenance"]["machine"], sort_keys=True): row for row in rows}
    machines = [_machine_text(row["provenance"]) for row in places.values()]
    packages = sorted({f"{n} {v}" for row in rows for n, v in row["provenance"]["packages"].items() if v})
    codes = sorted({row["provenance"]["code"] for row in rows})
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row["notebook"]] = seconds.get(row["notebook"], 0.0) + row["provenance"]["wall_s"]
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    minutes = [
        [name, str(sum(r["notebook"] == name for r in rows)), f"{s / 60:.1f}"] for name, s in seconds.items()
    ]
    days = sorted(row["provenance"]["started"][:10] for row in rows)
    return [
        f"Profile `{profile}`, {len(rows)} rows, seeds {', '.join(map(str, seeds))}, measured {days[0]} to {days[-1]}.",
        "Machine: " + "; ".join(machines) + ".",
        "Packages: " + ", ".join(packages) + f". Code: {', '.join(codes)}.",
        "Accuracies are compared by McNemar's exact test, everything else by a paired bootstrap; where fewer than 2 % of "
        "its resamples reach a difference, p is that of the normal curve with the interval's width, since a correction "
        "over dozens of comparisons needs finer steps than a thousand resamples have.",
        w.table(["Notebook", "Rows", "Minutes of measuring"], minutes),
        f"To repeat it: `make report PROFILE={profile}`. To check that this page is current: `make check`.",
    ]


def build(rows: list[dict], *, report: Path, images: Path, notebooks: str) -> str:
    """Write `report` and its figures; returns a line that says what was done.

    Figures whose rows and drawing code are unchanged are left alone.
    """
    manifest_path = images / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    fresh, drawn = {}, 0
    for section in sections():
        own = section_rows(section, rows)
        for drawing in _drawable(section, own):
            digest = drawing_digest(own)
            png = images / f"{drawing.name}.png"
            known = manifest.get(png.name)
            if not (known and known["drawn_from"] == digest and png.is_file() and known["png"] == _sha(png)):
                _draw(drawing, own, png)
                drawn += 1
            fresh[png.name] = {"drawn_from": digest, "png": _sha(png)}
    for stale in set(manifest) - set(fresh):
        (images / stale).unlink(missing_ok=True)
    write_json(manifest_path, fresh)
    relative = images.relative_to(report.parent).as_posix()
    text = render(rows, images=relative, notebooks=notebooks)
    if not report.is_file() or report.read_text(encoding="utf-8") != text:
        write_text(report, text)
    return f"{report}: {len(rows)} rows, {drawn} of {len(fresh)} figures redrawn"


def _drawable(section: Section, own: list[dict]) -> list[Drawing]:
    """The drawings whose rows are there: a section may be partly measured."""
    return [drawing for drawing in section.drawings if own and (drawing.needs is None or drawing.needs(own))]


def _draw(drawing: Drawing, rows: list[dict], png: Path) -> None:
    import matplotlib.pyplot as plt

    from helpers import plots

    with plt.style.context(plots.STYLE_SHEET):
        figure = drawing.draw(rows)
        with atomic_path(png) as temporary:
            figure.savefig(temporary, metadata={"Software": None})
        plt.close(figure)


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def _machine_text(provenance: dict) -> str:
    machine = provenance["machine"]
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    instructions = f" with {machine['instructions']}" if machine.get("instructions") else ""
    return (
        f"{machine['cpu']}{instructions}, {machine['cores']} cores ({provenance['threads']} threads used), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB{gpu}, {machine['os']}, Python {machine['python']}"
    )
