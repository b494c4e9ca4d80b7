"""The section on out-of-domain text: what a model knows of it, and what compression costs there."""

from helpers.report import wording as w
from helpers.report.rows_other_text import points
from helpers.report.section import Section, drawings
from lmcompress.results.rows import model_task_of, model_tasks
from lmcompress.results.verdicts import BASELINE, COLLAPSED, WORSE, adjusted


def label(model_task: tuple[str, str]) -> str:
    """Return the text's name and, for a model of the harvested docs, whether the text is of that kind."""
    model, task = model_task
    if not model.endswith("-pydocs"):
        return task
    return f"{task} ({'the text it was made for' if task.startswith('pydocs') else 'out of domain'})"


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for model in dict.fromkeys(model for model, _ in model_tasks(rows)):
        scored = [row for row in rows if row["model"] == model and row["quality"]]
        text += [f"### {model} on other text", _quality_table(scored)]
        text += [
            _nothing_to_lose(row)
            for row in scored
            if row["technique"] == "dense" and row["quality"]["collapsed"]
        ]
        text += [_fields(scored)]
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Per model: of which texts it knows more than word counts or chance, and what compression cost there."""
    sentences = []
    for model in dict.fromkeys(model for model, _ in model_tasks(rows)):
        scored = [row for row in rows if row["model"] == model and row["quality"]]
        elsewhere = [row for row in scored if not row["task"].startswith("pydocs")]
        dense = [row for row in elsewhere if row["technique"] == "dense"]
        lost = [row["task"] for row in dense if row["quality"]["collapsed"]]
        phrases = [f"no better than a model that knows nothing on {w.listing(lost)}"] if lost else []
        for row in (row for row in dense if row["task"] not in lost):
            words = [
                word for _, word in adjusted([o for o in elsewhere if o["task"] == row["task"]]).values()
            ]
            counts = (
                w.listing([f"{words.count(word)} {word}" for word in dict.fromkeys(words)])
                if words
                else "none"
            )
            value = w.with_interval(row["quality"], row["quality"]["metric"])
            floor = row["quality"]["floor"]
            floor_text = (
                f", where knowing nothing gives {w.number(floor, row['quality']['metric'])}" if floor else ""
            )
            phrases.append(
                f"{w.metric_name(row['quality']['metric'])} {value} on {row['task']}{floor_text}; of its "
                f"compressions there: {counts}"
            )
        if not elsewhere and scored:
            phrases = ["none was scored here, so that nothing is said of it"]
        home = adjusted([row for row in scored if row not in elsewhere])
        if home and elsewhere:
            worse = sum(word in (WORSE, COLLAPSED) for _, word in home.values())
            phrases.append(f"on its own text {worse} of {len(home)} are worse")
        if phrases:
            sentences.append(f"**{model} on text it was not made for**: {'; '.join(phrases)}.")
    return sentences


def _quality_table(scored: list[dict]) -> str:
    lines = []
    for model_task in model_tasks(scored):
        text_rows = [row for row in scored if model_task_of(row) == model_task]
        verdicts = adjusted(text_rows)
        for row in text_rows:
            quality, metric = row["quality"], row["quality"]["metric"]
            p, word = verdicts.get(row["key"], (None, COLLAPSED if quality["collapsed"] else BASELINE))
            bits = quality["secondary"].get("bits_per_byte")
            lines.append(
                [
                    label(model_task),
                    w.label_of(row),
                    f"{w.metric_name(metric)} {w.with_interval(quality, metric)}",
                    w.with_interval(bits) if bits else "",
                    w.number(quality["floor"], metric),
                    w.difference(row) if quality["difference"] else "",
                    "" if p is None else w.p_text(p),
                    word,
                ]
            )
    header = [
        "Text",
        "Model",
        "Quality",
        "Bits per byte",
        "Knowing nothing",
        "Difference to dense",
        "p (Holm)",
    ]
    return w.table([*header, "Verdict"], lines)


def _nothing_to_lose(dense: dict) -> str:
    quality = dense["quality"]
    return (
        f"On **{dense['task']}** the dense model is collapsed before anything is done to it: "
        f"{quality['collapsed']} ({quality['details']['floor']}). It knows less of this text than how often "
        "each token occurs in it, so nothing was compressed there: a difference between two such models "
        "would say nothing."
    )


def _fields(scored: list[dict]) -> str:
    """Tabulate accuracy by field of grammar, and name the fields that the dense model knows."""
    rows = [row for row in scored if row["quality"]["metric"] == "accuracy"]
    by_field: dict[str, list[str]] = {}
    for name, _, interval in points(rows, "accuracy"):
        by_field.setdefault(name, []).append(w.with_interval(interval, "accuracy"))
    dense = next((row for row in rows if row["technique"] == "dense"), None)
    if not dense or len(by_field) < 2:
        return ""
    fields = [
        name
        for name, row, interval in points([dense], "accuracy")
        if name != "all" and (interval["low"] or 0.0) > row["quality"]["floor"]
    ]
    return (
        f"**{dense['task']} by field**, {dense['quality']['n']} pairs; chance is "
        f"{w.number(dense['quality']['floor'], 'accuracy')}. With its whole interval above chance the dense "
        f"model is in {w.listing(fields) if fields else 'no field'}.\n\n"
        + w.table(["Field", *map(w.label_of, rows)], [[name, *values] for name, values in by_field.items()])
    )


SECTION = Section(
    notebook="12_other_text",
    findings=findings,
    summary=summary,
    drawings=drawings("other-text"),
)
