"""The files that say what a search came to: the model's folder with its card, the proof, recipe and check."""

import json
import re
import shutil
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import yaml

from lmcompress.fit.answers import answers
from lmcompress.fit.candidates import Candidate
from lmcompress.fit.facts import ANSWER, metric_title
from lmcompress.fit.search import Search
from lmcompress.models.families import integer_layers
from lmcompress.models.storage import new_folder
from lmcompress.paths import write_json, write_text
from lmcompress.results.labels import bytes_text, metric_name, number, plural
from lmcompress.results.store import canonical
from lmcompress.tasks.classification import class_names

HERE = Path(__file__).parent
BUSY = 0.1  # A/A noise, from which on a time is not to be relied on
FACTS, ANSWERS = "fit.json", "answers.json"
CHECKS = ("check.py", "check_graph.py")  # the second, which runs graphs, needs nothing of this package
FIGURE = "(figure)"  # where it stands in the text
CAPTION = (
    "Numbered: measured on what confirms, in the order of the tests; green is the answer. Grey: searched, on "
    "fewer examples. Lines reach from the lower to the upper one-sided 95 % bound, cut off at the edges; "
    "the dashed line is the most that may be lost."
)
MEMORY = (
    " Peak memory is of a fresh process that loads the file and makes one such call, beyond what the "
    "libraries take that load the dense model."
)
USAGE = (
    "```python\nimport lmcompress\nmodel, tokenizer = lmcompress.load_compressed({folder!r}{options})\n```"
)
COSTS = {"size": "bytes", "memory": "peak memory"}  # of a goal; of all others the time
AXES = {"size": ("bytes", "File, MB"), "memory": ("peak_bytes", "Peak memory, MB")}
UNITS = {
    ("points", 100.0): "A point is a hundredth of the metric: from 90 % to 89 %.",
    ("points", 1.0): "A point is one of the metric's hundred.",
    ("%", 100.0): "It is stated in % of the dense model's value.",
}
MEANINGS = {
    "accuracy": "the share of examples that are answered right",
    "accuracy_per_byte": "the share of examples whose right choice is the likeliest per byte",
    "exact_match": "the share of outputs that are the reference, letter by letter",
    "macro_f1": "the mean over the classes of F1, which weighs false alarms and misses alike",
    "micro_f1": "F1 of all decisions together, which weighs false alarms and misses alike",
    "matthews": "the correlation of answers and right classes (Matthews); 0 is chance",
    "spearman": "the correlation of the ranks of the model's scores and the right ones",
    "pearson": "the correlation of the model's scores and the right ones",
    "mae": "the mean distance of the model's scores from the right ones",
    "rmse": "the root of the mean squared distance of the model's scores from the right ones",
    "perplexity": "the mean uncertainty about the next token, as a number of equally likely tokens",
    "bleu": "how many word sequences an output shares with the reference, 0 to 100",
    "chrf": "how many character sequences an output shares with the reference, 0 to 100",
} | dict.fromkeys(
    ("rouge1", "rouge2", "rougeL"), "how many words an output shares with the reference, 0 to 1"
)
NEEDED = {
    "torch": "this package (lmcompress)",
    "openvino": "numpy, tokenizers and openvino, nothing of this package",
    "onnxruntime": "numpy, tokenizers and onnxruntime, nothing of this package",
}
RUNS_IN = {"torch": "torch", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


def read(save: Path, job: dict) -> dict | None:
    """Return the facts of a finished search for this very job; None if `save` holds none."""
    file = save / FACTS
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"job": None}
        return content if canonical(content["job"]) == canonical(job) else None
    except (ValueError, LookupError, TypeError):  # cut, or not ours: nothing is saved over it
        return None


def write(search: Search, answer: Candidate, content: dict, save: Path, settings: dict) -> None:
    """Write the model of the answer with card, proof, recipe and check to `save`, wholly or not at all.

    `settings` are the task's, which say what columns of the file are called.
    """
    model, _ = search.model(answer)
    options = f", unpack={search.unpack}" if search.unpack != "auto" and integer_layers(model) else ""
    usage = [USAGE.format(folder=save.name, options=options)]
    if hasattr(model, "usage"):
        usage = [*model.usage(), "", f"Ids of a text are made by tokenizer.json; {CHECKS[1]} shows it whole."]
    if search.task.labels:
        names = class_names(search.loaded.model.config)
        usage += ["", f"Outputs, in order: {', '.join(names)}."] if all(names) else []
    usage = "\n".join(usage)
    with new_folder(save, source=search.loaded.path, replace=False) as temporary:
        shutil.copytree(search.journal.model_folder(answer.name), temporary, dirs_exist_ok=True)
        recipe = yaml.safe_dump(content["answer"]["recipe"], sort_keys=False, allow_unicode=True)
        write_text(temporary / "recipe.yaml", recipe)
        write_text(temporary / "README.md", _filled("card.md", _values(content) | {"usage": usage}))
        write_proof(content, temporary)
        write_json(temporary / FACTS, content)
        write_json(temporary / ANSWERS, answers(search, answer.name, settings))
        for name in CHECKS[: 1 if content["answer"]["runtime"] == "torch" else 2]:
            shutil.copy(HERE / name, temporary / name)


def write_proof(content: dict, folder: Path) -> None:
    """Write proof.md and proof.html, which say the same."""
    values = _values(content)
    values["rows"] = _table(content, content["candidates"])
    values["confirmation"] = _table(content, content["confirmation"], confirming=True)
    write_text(folder / "proof.md", _filled("proof.md", values | {"figure": ""}))
    body = _body(_filled("proof.md", values | {"figure": FIGURE}), _figure(content))
    title = escape(values["title"])
    write_text(folder / "proof.html", _filled("proof.html", {"title": title, "body": body}))


def _filled(name: str, values: dict) -> str:
    text = Template((HERE / "templates" / name).read_text(encoding="utf-8")).substitute(values)
    return re.sub(r"\n{3,}", "\n\n", text)


def _values(content: dict) -> dict:
    """Return what the templates name, as text."""
    job, answer = content["job"], content["answer"]
    values = {name: content[name] for name in ("text", "command", "margin", "date")}
    values |= content["machine"] | {"model_hash": job["model_hash"], "task": content["confirming"]["name"]}
    values["cost"] = COSTS.get(job["goal"], "time")
    values["model"] = Path(job["model"]).name if Path(job["model"]).is_dir() else job["model"]
    values |= _files(content)
    values["versions"] = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    values["memory"] = MEMORY if content["dense"]["peak_bytes"] else ""
    values["licence"] = content["licence"] or "not stated by its card"
    metric = metric_title(content["metric"])
    better, change = ("higher", "falls") if content["higher_is_better"] else ("lower", "rises")
    meaning = MEANINGS.get(content["metric"], "a metric of `evaluate`")
    values["metric_meaning"] = f"{metric}: {meaning}; {better} is better."
    values["unit_meaning"] = UNITS[content["unit"], content["scale"]]
    values |= {"promise": "None: no candidate was confirmed.", "check": "There is no model to check."}
    values["title"] = (
        f"{values['model']} on {values['task']}: nothing is sure to lose at most {content['margin']}"
    )
    values["threads"] = plural(content["machine"]["threads"], "thread")
    measured = f"Measured on {content['confirmed_on']} that nothing was chosen by."
    values |= {"comparison": "", "measured": measured if content["confirmation"] else ""}
    if answer:
        claim = f"{change} by at most {content['margin']}"
        values["title"] = (
            f"{values['model']}, compressed: {metric_name(content['metric'])} on {values['task']} {claim}"
        )
        values["promise"] = (
            f"{metric} {claim}. A promise like this one is broken in at most one search of twenty: a "
            f"one-sided 5 % test of non-inferiority with a margin of {content['margin']}."
        )
        values["comparison"] = _comparison(content)
        values["check"] = (
            f"Whoever has to confirm it runs `python check.py {values['task']}` in this folder: it has the "
            "model answer the file again and prints the metric, how many answers differ from the dense "
            f"model's, and how many are as recorded in {ANSWERS}. It needs {NEEDED[answer['runtime']]}."
        )
        values["runs_in"] = RUNS_IN[answer["runtime"]]
        licence = f"\nlicense: {content['licence']}" if content["licence"] else ""
        values["front_matter"] = (
            f"---\nlibrary_name: transformers\nbase_model: {values['model']}{licence}\n---"
        )
    return values


def _files(content: dict) -> dict:
    """Return how the examples were divided, and the files they stand in."""
    searched, confirming, noun = content["data"], content["confirming"], content["noun"]
    train, search, confirm = (f"{content['examples'][name]:,}" for name in ("train", "search", "confirm"))
    source, confirmed, files = "the file", f", {confirm} to confirm.", f"The file: {_with_digest(searched)}."
    if searched["file"] != confirming["file"]:
        source, files = f"`{searched['file']}`", f"{files} What confirms: {_with_digest(confirming)}."
        confirmed = f". Those that confirm are {confirm} of `{confirming['file']}` whose texts are not in it."
    divided = (
        f"The {noun}s of {source} were divided by a hash of their text, equal texts together: {train} to "
        f"calibrate and train on, {search} to search by{confirmed}"
    )
    if repeats := content["examples"]["repeats"]:
        divided += f" {plural(repeats, 'repeat')} of a text with its label left out: each counts once."
    return {"divided": divided, "files": files}


def _with_digest(source: dict) -> str:
    return f"`{source['file']}`, SHA-256 `{source['sha256'] or 'none: a data set'}`"


def _comparison(content: dict) -> str:
    """Return the dense and the compressed model side by side, as a Markdown table."""
    answer, dense, metric = content["answer"], content["dense"], content["metric"]

    def scored(quality: dict) -> str:
        if quality["low"] is None:
            return number(quality["value"], metric)
        value, low, high = (number(quality[end], metric) for end in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    table = [["", "dense (original)", "compressed", "compressed / dense"]]
    sizes = [bytes_text(side["bytes"]) for side in (dense, answer)]
    table.append(["file", *sizes, f"{100 * answer['size_share']:.0f} %"])
    if answer["ms"]:
        ratio, low, high = (f"{100 * answer[key]:.0f}" for key in ("ratio", "ratio_low", "ratio_high"))
        times = f"{answer['dense_ms']:.1f} ms", f"{answer['ms']:.1f} ms"
        noise = f"A/A noise ±{100 * answer['noise_floor']:.0f} %"
        if answer["noise_floor"] > BUSY:
            noise += ", the machine was busy: take the time again"
        span = f"{ratio} % [{low}, {high}], median over rounds; {noise}"
        table.append([f"time, {content['timed']}", *times, span])
    if answer["peak_bytes"]:
        peaks = [side["peak_bytes"] for side in (dense, answer)]
        share = f"{100 * peaks[1] / peaks[0]:.0f} %"
        table.append(["peak memory beyond the libraries", *map(bytes_text, peaks), share])
    name = f"{metric_name(metric)} [95 % interval] on {content['confirmed_on']}"
    table.append([name, scored(dense["quality"]), scored(answer["quality"]), ""])
    loss = _span(content, *(answer[key] for key in ("loss", "low", "bound")))
    table.append([f"loss, {_unit(content)} [one-sided 95 % bounds], on the same", "", loss, ""])
    return _markdown(table)


def _unit(content: dict) -> str:
    return "% of dense" if content["unit"] == "%" else content["unit"]


def _span(content: dict, value: float | None, low: float | None, high: float | None) -> str:
    """Return a loss with its bounds in the unit of the margin: `+0.40 [-0.21, +0.97]`."""
    if value is None:
        return ""
    bounds = [f"{content['scale'] * bound:+.2f}" for bound in (low, high) if bound is not None]
    return f"{content['scale'] * value:+.2f} [{', '.join(bounds) if len(bounds) == 2 else 'not bounded'}]"


def _table(content: dict, rows: list[dict], *, confirming: bool = False) -> str:
    """Return a Markdown table of candidates; "none" of none."""
    losses = ("loss", "low", "bound") if confirming else ("search_loss", "search_low", "search_high")
    loss = f"loss, {_unit(content)} [one-sided 95 % bounds]"
    peak = ["peak memory, MB"] if content["dense"]["peak_bytes"] else []
    header = [
        "candidate",
        "file, MB",
        *peak,
        "time / dense",
        "KL from dense, nats, 64 texts",
        "changed answers of these",
        loss,
    ]
    table = [
        ["test", *header, "outcome"] if confirming else [*header, f"{content['noun']}s scored", "outcome"]
    ]
    for number_of_test, row in enumerate(rows, 1):
        figures = [""] * (4 + len(peak))
        if row["bytes"] is not None:
            amounts = [row["bytes"], *([row["peak_bytes"]] if peak else [])]
            figures = ["" if amount is None else f"{amount / 1e6:.1f}" for amount in amounts]
            figures.append("" if row["ratio"] is None else f"{row['ratio']:.2f}")
            divergence = "not finite" if row["divergence"] is None else f"{row['divergence']:.4f}"
            figures += [divergence, f"{100 * row['flipped']:.0f} %"]
        span = _span(content, *(row[name] for name in losses))
        cells = [row["label"], *figures, span or ("not finite" if row["examples"] else "")]
        cells = [str(number_of_test), *cells] if confirming else [*cells, f"{row['examples']:,}"]
        table.append([*cells, row["state"]])
    return _markdown(table) if rows else "None."


def _markdown(table: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def _body(markdown: str, figure: str) -> str:
    """Return our own Markdown, of headings, lists, tables, code and paragraphs, as HTML."""

    def inline(text: str) -> str:
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
        return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text, flags=re.DOTALL)

    def table(block: str) -> str:
        head, _, *body = (
            [inline(cell.strip()) for cell in line[1:-1].split("|")] for line in block.split("\n")
        )
        lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
        head = "".join(f"<th>{cell}</th>" for cell in head)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"

    def items(block: str) -> str:
        entries = re.split(r"(?:^|\n)(?:-|\d+\.) ", block)[1:]
        tag = "ul" if block[0] == "-" else "ol"
        return f"<{tag}>{''.join(f'<li>{inline(entry)}</li>' for entry in entries)}</{tag}>"

    html = {
        "# ": lambda block: f"<h1>{inline(block[2:])}</h1>",
        "## ": lambda block: f"<h2>{inline(block[3:])}</h2>",
        "|": table,
        "- ": items,
        "1. ": items,
        "```": lambda block: f"<pre>{escape(block.strip('`').strip())}</pre>",
        FIGURE: lambda _: figure,
        "": lambda block: f"<p>{inline(block)}</p>",
    }
    blocks = [block for block in markdown.strip().split("\n\n") if block]
    return "\n".join(html[next(mark for mark in html if block.startswith(mark))](block) for block in blocks)


def _figure(content: dict) -> str:
    """Return an SVG: what is asked to be small against the loss, with bounds and the margin.

    What was tested is drawn as confirmed, numbered in the order of the tests; the rest as searched.
    """
    quantity, title = AXES.get(content["job"]["goal"], ("ratio", "Time / time of dense"))
    unit = 1.0 if quantity == "ratio" else 1e6
    tested = [row["name"] for row in content["confirmation"]]
    points = []  # candidate, loss and bounds, colour, number of the test
    for row in content["candidates"]:
        is_tested = row["name"] in tested
        names = ("loss", "low", "bound") if is_tested else ("search_loss", "search_low", "search_high")
        losses = [row[name] for name in names]
        if row[quantity] and None not in losses:
            colour = "#117733" if row["state"] == ANSWER else "#4477aa" if is_tested else "#aaaaaa"
            points.append((row, losses, colour, tested.index(row["name"]) + 1 if is_tested else ""))
    if not points:
        return ""
    dense = content["dense"].get(quantity, 1.0) / unit
    costs = [dense, *(row[quantity] / unit for row, *_ in points)]
    left, right = 0.9 * min(costs), 1.1 * max(costs)
    margin = content["amount"]
    low, high = -1.5 * margin, 2.5 * margin

    def x(cost: float) -> float:
        return round(70 + 600 * float(np.log(cost / left) / np.log(right / left)), 1)

    def y(loss: float) -> float:
        return round(20 + 270 * (high - min(max(loss, low), high)) / (high - low), 1)

    marks = []
    for height, colour, name in ((0.0, "#555555", "dense"), (margin, "#cc3333", "margin")):
        line = f'<line x1="70" x2="670" y1="{y(height)}" y2="{y(height)}" stroke="{colour}"'
        dash = ' stroke-dasharray="5 4"/>' if height else "/>"
        marks.append(f'{line}{dash}<text x="676" y="{y(height) + 4}" fill="{colour}">{name}</text>')
    for row, (loss, bottom, top), colour, test in sorted(points, key=lambda point: bool(point[3])):
        column = x(row[quantity] / unit)
        marks.append(
            f'<g stroke="{colour}" fill="{colour}"><title>{escape(row["label"])}</title>'
            f'<line x1="{column}" x2="{column}" y1="{y(bottom)}" y2="{y(top)}" stroke-width="1.5"/>'
            f'<circle cx="{column}" cy="{y(loss)}" r="4"/></g>'
            f'<text x="{column + 7}" y="{y(loss) - 5}" fill="{colour}">{test}</text>'
        )
    for share in (-1, 0, 1, 2):
        text = f"{content['scale'] * share * margin:+.3g}" if share else "0"
        marks.append(f'<text x="64" y="{y(share * margin) + 4}" text-anchor="end">{text}</text>')
    ticks, column = [size * 10.0**power for power in range(-3, 6) for size in (1, 1.5, 2, 3, 5, 7)], 0.0
    for tick in (tick for tick in ticks if left < tick < right):
        if x(tick) < column + 40:
            continue
        column = x(tick)
        marks.append(f'<text x="{x(tick)}" y="308" text-anchor="middle">{tick:g}</text>')
        marks.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="290" y2="294" stroke="#555555"/>')
    loss = f"Loss, {_unit(content)} (up: worse)"
    marks.append('<line x1="70" x2="670" y1="290" y2="290" stroke="#555555"/>')
    marks.append(f'<text x="370" y="328" text-anchor="middle">{title} (log, lower is better)</text>')
    marks.append(f'<text transform="translate(14 155) rotate(-90)" text-anchor="middle">{loss}</text>')
    label = escape(f"{loss} against {title}")
    svg = f'<svg viewBox="0 0 740 336" role="img" aria-label="{label}">{"".join(marks)}</svg>'
    return f"<figure>{svg}<figcaption>{CAPTION}</figcaption></figure>"
