"""The files that say what a search came to: the model's folder with its card, the proof, recipe and check."""

import json
import shutil
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import yaml

from lmcompress.fit.answers import answers
from lmcompress.fit.candidates import Candidate
from lmcompress.fit.facts import ANSWER
from lmcompress.fit.search import Search
from lmcompress.models.families import integer_layers
from lmcompress.paths import atomic_path, write_json, write_text
from lmcompress.results.labels import bytes_text, metric_name, number
from lmcompress.results.store import canonical

HERE = Path(__file__).parent
FACTS, ANSWERS = "fit.json", "answers.json"
CHECKS = ("check.py", "check_graph.py")  # the second, which runs graphs, needs nothing of this package
USAGE = (
    "```python\nimport lmcompress\nmodel, tokenizer = lmcompress.load_compressed({folder!r}{options})\n```"
)
MEMORY = """ Peak memory is of a fresh process that loads the file and makes one such call, beyond
  what the libraries take that load the dense model."""
RUNS_IN = {"torch": "torch", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


def read(save: Path, job: dict) -> dict | None:
    """Return the facts of a finished search for this very job; None if `save` holds none."""
    file = save / FACTS
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if canonical(content["job"]) == canonical(job) else None


def write(search: Search, answer: Candidate, content: dict, save: Path, settings: dict) -> None:
    """Write the model of the answer with card, proof, recipe and check to `save`, wholly or not at all.

    `settings` are the task's, which say what columns of the file are called.
    """
    model, _ = search.model(answer)
    options = f", unpack={search.unpack}" if search.unpack != "auto" and integer_layers(model) else ""
    usage = USAGE.format(folder=save.name, options=options)
    if hasattr(model, "usage"):
        usage = "\n".join(model.usage())
    with atomic_path(save.resolve()) as temporary:
        shutil.copytree(search.journal.model_folder(answer.name), temporary)
        recipe = yaml.safe_dump(content["answer"]["recipe"], sort_keys=False, allow_unicode=True)
        write_text(temporary / "recipe.yaml", recipe)
        write_text(temporary / "README.md", _filled("card.md", _values(content) | {"usage": usage}))
        write_proof(content, temporary)
        write_json(temporary / FACTS, content)
        write_json(temporary / ANSWERS, answers(search, answer.name, settings))
        for name in CHECKS[: 1 if content["answer"]["runtime"] == "torch" else 2]:
            shutil.copy(HERE / name, temporary / name)


def write_proof(content: dict, folder: Path) -> None:
    """Write proof.md and proof.html."""
    values = _values(content)
    tables = {
        "rows": _table(content, content["candidates"]),
        "confirmation": _table(content, content["confirmation"], confirming=True),
    }
    markdown = values | {name: _markdown(table) for name, table in tables.items()}
    html = {name: escape(str(value)) for name, value in values.items()} | {"figure": _figure(content)}
    html |= {name: _html(table) for name, table in tables.items()}
    write_text(folder / "proof.md", _filled("proof.md", markdown))
    write_text(folder / "proof.html", _filled("proof.html", html))


def _filled(name: str, values: dict) -> str:
    return Template((HERE / "templates" / name).read_text(encoding="utf-8")).substitute(values)


def _values(content: dict) -> dict:
    """Return what the templates name, as text."""
    job, answer = content["job"], content["answer"]
    values = {name: content[name] for name in ("text", "command", "margin", "metric")}
    values |= {name: job[name] for name in ("task", "goal", "batch", "length")} | content["machine"]
    values["model"] = Path(job["model"]).name if Path(job["model"]).is_dir() else job["model"]
    values |= {f"n_{name}": f"{count:,}" for name, count in content["examples"].items()}
    values["versions"] = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    values["memory"] = MEMORY if content["dense"]["peak_bytes"] else ""
    values["licence"] = content["licence"] or "not stated by its card"
    if answer:
        values |= {"comparison": _comparison(content), "label": answer["label"]}
        values["runs_in"] = RUNS_IN[answer["runtime"]]
        licence = f"\nlicense: {content['licence']}" if content["licence"] else ""
        values["front_matter"] = (
            f"---\nlibrary_name: transformers\nbase_model: {values['model']}{licence}\n---"
        )
    return values


def _comparison(content: dict) -> str:
    """Return the dense and the compressed model side by side, as a Markdown table."""
    answer, dense, metric = content["answer"], content["dense"], content["metric"]

    def scored(quality: dict) -> str:
        if quality["low"] is None:
            return number(quality["value"], metric)
        value, low, high = (number(quality[end], metric) for end in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    n = f"{content['examples']['confirm']:,}"
    size = f"{bytes_text(answer['bytes'])} ({answer['size_share']:.2f})"
    loss = _span(content, *(answer[key] for key in ("loss", "low", "bound")))
    table = [["", "dense", "compressed"], ["file", bytes_text(dense["bytes"]), size]]
    table.append([f"{metric_name(metric)}, n = {n}", scored(dense["quality"]), scored(answer["quality"])])
    table.append([f"loss, {content['unit']} [one-sided 95 % bounds]", "", loss])
    if peak := answer["peak_bytes"]:
        share = f"{bytes_text(peak)} ({peak / dense['peak_bytes']:.2f})"
        table.append(["peak memory beyond the libraries", bytes_text(dense["peak_bytes"]), share])
    if answer["ms"]:
        ratio, low, high = (f"{answer[key]:.2f}" for key in ("ratio", "ratio_low", "ratio_high"))
        span = f"{answer['ms']:.1f} ({ratio} [{low}, {high}])"
        noise = f"ms a call (ratio; A/A noise ±{answer['noise_floor']:.2f})"
        table.append([noise, f"{answer['dense_ms']:.1f}", span])
    return _markdown(table)


def _span(content: dict, value: float | None, low: float | None, high: float | None) -> str:
    """Return a loss with its bounds in the unit of the margin: `+0.40 [-0.21, +0.97]`."""
    if value is None:
        return ""
    value, low, high = (content["scale"] * loss for loss in (value, low, high))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _table(content: dict, rows: list[dict], *, confirming: bool = False) -> list[list[str]]:
    """Return the lines of candidates as cells, the header first."""
    losses = ("loss", "low", "bound") if confirming else ("search_loss", "search_low", "search_high")
    loss = f"loss, {content['unit']} [one-sided 95 % bounds]"
    peak = ["peak MB"] if content["dense"]["peak_bytes"] else []
    table = [["candidate", "MB", *peak, "time / dense", "KL", "flipped", loss, "examples", "outcome"]]
    for row in rows:
        figures = [""] * (4 + len(peak))
        if row["bytes"] is not None:
            amounts = [row["bytes"], *([row["peak_bytes"]] if peak else [])]
            figures = ["" if amount is None else f"{amount / 1e6:.1f}" for amount in amounts]
            figures.append("" if row["ratio"] is None else f"{row['ratio']:.2f}")
            figures += [f"{row['divergence']:.4f}", f"{100 * row['flipped']:.0f} %"]
        n = content["examples"]["confirm"] if confirming else row["examples"] or ""
        loss = _span(content, *(row[name] for name in losses))
        table.append([row["label"], *figures, loss, str(n), row["state"]])
    return table


def _markdown(table: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def _html(table: list[list[str]]) -> str:
    head, *body = (
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for row, tag in zip(table, ["th"] + ["td"] * (len(table) - 1), strict=True)
    )
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _figure(content: dict) -> str:
    """Return an SVG: bytes against loss on the search part, with bounds and the margin."""
    finite = np.isfinite
    rows = [
        row for row in content["candidates"] if row["search_loss"] is not None and finite(row["search_high"])
    ]
    if not rows:
        return ""
    margin, sizes = content["amount"], [content["dense"]["bytes"], *(row["bytes"] for row in rows)]
    low = min(0.0, *(row["search_low"] for row in rows))
    high = max(2 * margin, *(min(row["search_high"], 5 * margin) for row in rows))

    def x(size: float) -> str:
        return f"{60 + 620 * np.log(size / min(sizes)) / max(np.log(max(sizes) / min(sizes)), 1e-9):.1f}"

    def y(loss: float) -> float:
        return round(300 - 280 * (min(loss, high) - low) / (high - low), 1)

    marks = [
        f'<line class="{name}" x1="60" x2="680" y1="{y(loss)}" y2="{y(loss)}"/>'
        f'<text x="690" y="{y(loss) + 4}">{name}</text>'
        for name, loss in (("dense", 0.0), ("margin", margin))
    ]
    for row in rows:
        column, name = x(row["bytes"]), "answer" if row["state"] == ANSWER else "tried"
        marks.append(
            f'<g class="{name}"><title>{escape(row["label"])}: {bytes_text(row["bytes"])}</title>'
            f'<line x1="{column}" x2="{column}" y1="{y(row["search_low"])}" y2="{y(row["search_high"])}"/>'
            f'<circle cx="{column}" cy="{y(row["search_loss"])}" r="4"/></g>'
        )
    ticks = sorted({min(sizes), sizes[0], max(sizes)})
    marks += [f'<text x="{x(size)}" y="325" text-anchor="middle">{bytes_text(size)}</text>' for size in ticks]
    return f'<svg viewBox="0 0 760 340" role="img" aria-label="Loss against bytes">{"".join(marks)}</svg>'
