"""The quantization section: what fewer bits do to quality, bytes and time, and what training buys."""

from collections.abc import Callable
from functools import partial

from helpers.report import backends, cards, depth
from helpers.report import rows_quantization as p
from helpers.report import wording as w
from helpers.report.rows_quantization import tag
from helpers.report.section import Section, drawings
from helpers.report.structured import dense_sentence, rows_table
from lmcompress.results.labels import look_of
from lmcompress.results.rows import model_task_of, model_tasks
from lmcompress.results.verdicts import NO_CHANGE, comparisons, families, loss_of, without_loss

LOSSES = "final training and validation loss, floating point → aware; nothing was stored as integers"
HOW = {  # title of a line of the text: the techniques it speaks of
    "Half precision": ("cast",),
    "Integers for weights and inputs": ("int8-dynamic", "smoothquant"),
    "Integers for weights only": ("rtn", "gptq", "awq"),
    "NF4": ("nf4",),
    "Deployment backends": ("openvino", "openvino-int8", "onnxruntime-int8"),
}


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for model_task, dense, compressed, verdicts in families(rows):
        text += [f"### {model_task[0]} on {model_task[1]}", dense_sentence(dense)]
        lines = [_line(title, techniques, compressed, verdicts, dense) for title, techniques in HOW.items()]
        text.append("\n".join(line for line in [*lines, *_refusals(rows, model_task)] if line))
        text.append(_comparison_sentence(rows, model_task))
        text.append(_error_sentence(compressed))
        text.append(_training_sentence(rows, model_task))
        text.append(rows_table(dense, compressed, verdicts, name_of=_namer(rows, model_task)))
    text += backends.proof(rows) + backends.speed(rows)
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Name per model and task the smallest file without a measurable loss; then which work got faster."""
    sentences = []
    for model_task, dense, compressed, verdicts in families(rows):
        quantized = p.quantized_rows(compressed)
        if not quantized:
            continue
        safe = without_loss(quantized, verdicts)
        best = min(safe or quantized, key=lambda row: (depth.size(row), loss_of(row)[0]))
        size = f"{depth.share(best, dense)} of the dense bytes"
        text = (
            f"Every quantized model shows a loss, {w.if_only(quantized, verdicts)}; the smallest has {size}."
        )
        if safe:
            text = (
                "Of this section's ways, the smallest file without a measurable loss: "
                f"{w.label_of(best)}, {size} ({w.difference(best)})."
            )
        sentences.append(f"**{model_task[0]} on {model_task[1]}.** {text}")
    words = [word for row in p.timed_rows(rows) for word in backends.verdicts(row).values()]
    if words:
        counts = w.tally(words, ("faster", "slower", NO_CHANGE))
        sentences.append(
            f"**Quantization and time.** Of {w.plural(len(words), 'pair')} of backend and work timed: "
            f"{counts}."
        )
    return sentences


def _line(
    title: str, techniques: tuple[str, ...], compressed: list[dict], verdicts: dict, dense: dict
) -> str:
    """Return a bullet: settings of these techniques by verdict, with the difference where there is one."""
    rows = [
        row
        for row in sorted(compressed, key=depth.size, reverse=True)
        if row["technique"] in techniques and row["key"] in verdicts and tag(row["settings"]) != "mix"
    ]
    texts_by_word: dict[str, list[str]] = {}
    for row in rows:
        value, word = verdicts[row["key"]]
        changed = f", {w.difference(row)}, {w.p_text(value)}" if word != NO_CHANGE else ""
        text = f"{w.label_of(row)} ({depth.share(row, dense)} of the bytes{changed})"
        texts_by_word.setdefault(word, []).append(text)
    text = "; ".join(f"{word}: {_few(texts)}" for word, texts in texts_by_word.items())
    return f"- **{title}.** {text[0].upper()}{text[1:]}." if text else ""


def _few(texts: list[str]) -> str:
    """Settings, the largest first; of many their number and the smallest alone."""
    return ", ".join(texts) if len(texts) <= w.SHOWN else f"{len(texts)} settings, the smallest {texts[-1]}"


def _refusals(rows: list[dict], model_task: tuple[str, str]) -> list[str]:
    """Quote why a technique could not be applied here, unless it was applied after all."""
    done = {(r["technique"], *model_task_of(r)) for r in rows if r["quality"]}
    refused = [r for r in rows if r["technique"] == "refused" and model_task_of(r) == model_task]
    return [
        f"- **{look_of(row['settings']['technique']).title}** could not be done: {row['achieved']['reason']}"
        for row in refused
        if (row["settings"]["technique"], *model_task) not in done
    ]


def _untrained(comparison: dict) -> bool:
    return comparison["first"]["technique"] != "qat"


def _scans(rows: list[dict], model_task: tuple[str, str]) -> list[dict]:
    return [
        r["achieved"] for r in rows if r["technique"] == "sensitivity-bits" and model_task_of(r) == model_task
    ]


def _namer(rows: list[dict], model_task: tuple[str, str]) -> Callable[[dict], str]:
    """A function that names a row or a place of a comparison, mixed bits with where they come from."""
    dealt = [
        (bits, origin)
        for scan in _scans(rows, model_task)
        for origin, bits in scan.get("allocations", {}).items()
    ]

    def name_of(entrant: dict) -> str:
        origin = [f" dealt out {origin}" for bits, origin in dealt if bits == entrant["settings"].get("bits")]
        return w.entrant_label(entrant) + "".join(origin[:1])

    return name_of


def _comparison_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    """List the tested differences but for those of training; mixed bits with where they come from."""
    scans, name_of = _scans(rows, model_task), _namer(rows, model_task)
    same = [
        f"Mixed bits: the scan found no better division than {widths.pop()} bits for all."
        for scan in scans
        if len(widths := set(scan.get("allocations", {}).get("by the scan", {}).values())) == 1
    ]
    lines = [w.test_line(test, name_of) for test in comparisons(rows, model_task, _untrained)]
    paragraphs = [w.tested_list("**One way against another**, on the same examples", lines), *same]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _error_sentence(compressed: list[dict]) -> str:
    """Compare the error of the layers' outputs with RTN's; name the layers where it was no smaller."""
    lines = []
    for row in (candidate for candidate in compressed if "output_error" in candidate["achieved"]):
        achieved = row["achieved"]
        worse = achieved["layers_no_better_than_rtn"]
        total = w.plural(len(achieved["output_error_by_layer"]), "layer")
        where = (
            f"no better in {len(worse)} of {total} ({', '.join(worse)})"
            if worse
            else f"better in each of {total}"
        )
        lines.append(
            f"- {w.label_of(row)}: {w.percent(round(achieved['output_error'], 3))}, against "
            f"{w.percent(round(achieved['output_error_rtn'], 3))} of plain rounding; {where}"
        )
    title = (
        "Error of the layers' outputs on calibration text, ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖, beside plain rounding "
        "of the same inputs"
    )
    return w.folded(title, "\n".join(lines)) if lines else ""


def _ends(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """First and last loss of the curves, each the mean over seeds; without those that were not taken."""
    curves = [row["achieved"]["curve"] for row in rows]
    names = [name for name in p.LOSSES if curves and all(curve.get(name) for curve in curves)]
    return {n: tuple(sum(c[n][end][1] for c in curves) / len(curves) for end in (0, -1)) for n in names}


def _training_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    """Compare quantization-aware with plain training before rounding: losses, time, tested differences."""
    lines = []
    for (*row_model_task, bits, group), by_awareness in p.trained_rows(rows).items():
        if tuple(row_model_task) != model_task:
            continue
        curves = []
        for aware, seeds in ((aware, seeds) for aware, seeds in by_awareness.items() if seeds):
            moved = [f"{name} loss {first:.3f} → {last:.3f}" for name, (first, last) in _ends(seeds).items()]
            seconds = sum(row["achieved"]["curve"]["seconds"] for row in seeds) / len(seeds)
            manner = "with rounded weights" if aware else "in floating point"
            curves.append(f"{manner} {', '.join([*moved, f'{seconds:.1f} s'])}")
        count = len({row["seed"] for seeds in by_awareness.values() for row in seeds})
        tested = [
            f"{word} ({w.change_text(comparison, value)})"
            for comparison, value, word in comparisons(
                rows, model_task, partial(_is_training, grid=(bits, group))
            )
        ]
        against = " As integers, the first against the second, seed by seed: " + "; ".join(tested) + "."
        lines.append(
            f"- {', '.join(w.grid_words({'bits': bits, 'group_size': group}))}, {w.plural(count, 'seed')}: "
            f"{'; '.join(reversed(curves))}.{against if tested else ''}"
        )
    title = (
        "**Trained on rounded weights, and fine-tuned in floating point before rounding**, the same "
        "steps and data:"
    )
    return f"{title}\n\n" + "\n".join(lines) if lines else ""


def _is_training(comparison: dict, *, grid: tuple) -> bool:
    """Whether a comparison is of the two ways to train, on this grid."""
    settings = [comparison[side]["settings"] for side in ("first", "second")]
    return comparison["first"]["technique"] == "qat" and all(
        (asked_settings.get("bits", 8), asked_settings.get("group_size")) == grid
        for asked_settings in settings
    )


def _cards(rows: list[dict]) -> list[cards.Card]:
    """Published orders and figures, judged by what the rows hold."""
    published_cards = []
    for model_task in model_tasks(rows):
        for test in (test for test in comparisons(rows, model_task, _untrained) if _is_published(test[0])):
            text = (
                "GPTQ4 31.1 to 31.9"
                if test[0]["first"]["technique"] == "gptq"
                else "RTN4 in groups of 128 30.48"
            )
            text += ", RTN4 37.28"
            published_cards += cards.ordering(
                text, cards.published()["opt"], [test], "better", here=f"{model_task[0]} on {model_task[1]}"
            )
    for (model, task, *_), by_awareness in p.trained_rows(rows).items():
        plain, aware = _ends(by_awareness[False]), _ends(by_awareness[True])
        if len(plain) == len(aware) == 2:
            losses = ", ".join(f"{name} {plain[name][1]:.3f} → {aware[name][1]:.3f}" for name in plain)
            higher = all(aware[name][1] > plain[name][1] for name in plain)
            verdict = "ordering reproduced" if higher else "not reproduced"
            where = f"{model} on {task}; the weights here are integers"
            published_cards.append(
                cards.Card(".387 → .432, .477 → .524", LOSSES, losses, verdict, where, "both higher")
            )
    return published_cards + [cards.figures(test, rows) for test in cards.published()["quantization"]]


def _is_published(comparison: dict) -> bool:
    """Return True for GPTQ against RTN on one grid, or groups against rows, at 4 bits and nothing else."""
    first, second = comparison["first"], comparison["second"]
    settings = [side["settings"] for side in (first, second)]
    plain = all(side.get("bits") == 4 and not side.get("act_order") for side in settings)
    groups = [side.get("group_size") for side in settings]
    techniques = (first["technique"], second["technique"])
    rounding, grouping = techniques == ("gptq", "rtn"), techniques == ("rtn", "rtn")
    return plain and (rounding and groups[0] == groups[1] or grouping and groups == [128, None])


SECTION = Section(
    notebook="05_quantization",
    findings=findings,
    summary=summary,
    cards=_cards,
    drawings=drawings("quantization-quality", "quantization-speed", "quantization-training"),
)
