"""The report's first tables: the models, what to use for each of them, and the commands that make it."""

from collections.abc import Iterable
from itertools import chain

import pandas

from helpers.report import values
from lmcompress.results.frame import frame
from lmcompress.results.labels import bytes_text, metric_name, number, percent, shape_name, short_machine
from lmcompress.results.rows import by_model_task, model_task_of
from lmcompress.results.store import Row
from lmcompress.results.verdicts import BASELINE
from lmcompress.study import decision
from lmcompress.study.decision import Budget, Option

# Beginnings of names. Published in bfloat16, written in float32 by the rows: half of the bytes are no saving.
PUBLISHED_IN_BF16 = ("pocket/gpt2-pydocs", "pocket/llama-pydocs", "reference/t5-")
TASKS = {
    "sst2": "SST-2, sentiment of a sentence",
    "stsb": "STS-B, similarity of two sentences",
    "pydocs-lm": "next token of Python docstrings",
    "multi30k-en-de": "Multi30k, English to German captions",
    "multi30k-en-fr": "Multi30k, English to French captions",
    "pydocs-library": "library of a docstring",
    "pydocs-summary": "summary line of a docstring",
    "pydocs-continuation": "continuation of a docstring",
}


def subjects(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the compared rows by model and task, those first whose choices a set of its own has made."""
    grouped = by_model_task(decision.comparable_rows(rows))
    apart = {pair: any(row.get("selection") for row in group) for pair, group in grouped.items()}
    return {pair: grouped[pair] for pair in sorted(grouped, key=lambda pair: not apart[pair])}


def decided(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return of `subjects` those that the first tables answer for: no model that another one has replaced."""
    groups = subjects(rows)
    models = values.current(model for model, _ in groups)
    return {subject: group for subject, group in groups.items() if subject[0] in models}


def choices(rows: Iterable[Row]) -> dict[tuple[str, str], list[Option]]:
    """Return the options of each model and task that is `decided`, the dense model first."""
    return {model_task: decision.options(group) for model_task, group in decided(rows).items()}


def models_table(rows: list[Row]) -> str:
    """Return the table of the models: what they do, how well, and how long one call takes."""
    dense = frame(chain.from_iterable(subjects(rows).values()), details=False)
    dense = dense[dense["verdict"] == BASELINE].drop_duplicates(["model", "task"])
    lines, measured = [], choices(rows)
    split = {row["key"]: row["provenance"]["split"] for row in rows if row["quality"]}
    for line in dense.to_dict("records"):
        subject = measured.get((line["model"], line["task"]))
        floor = "" if pandas.isna(line["floor"]) else number(line["floor"], line["metric"])
        lines.append(
            [
                f"{values.model_name(line['model'])} (`{line['model']}`)",
                f"{line['parameters'] / 1e6:.1f} M",
                _call(subject[0]) if subject else values.NOT_TIMED,
                TASKS.get(line["task"], line["task"]),
                f"{line['n']:,.0f} ({split[line['key']]})",
                floor or "none",
            ]
        )
    header = "Model|Parameters|Dense call|Task|Examples|Trivial baseline"
    return values.table(header.split("|"), lines)


def _call(dense: Option) -> str:
    """Return how long one call of the dense model takes at batch 1."""
    texts = [f"{ms:.1f} ms at {shape_name(shape)}" for shape, ms in dense.ms.items() if shape.endswith("1")]
    return f"{', '.join(texts)} ({short_machine(dense.machine)})" if texts else values.NOT_TIMED


def published_size(line: dict) -> str:
    """Return the bytes of a dense model as it was published."""
    if line["size_bytes"] < 3 * line["parameters"]:  # measured as it was given
        return f"{line['parameters'] * 4 / 1e6:.1f} MB in FP32, {values.size(line)} as published in BF16"
    if line["model"].startswith(PUBLISHED_IN_BF16):
        return f"{values.size(line)} in FP32, {line['parameters'] * 2 / 1e6:.1f} MB as published in BF16"
    return values.size(line)


def decision_table(rows: list[Row]) -> str:
    """Return what to use per model and margin: the smallest written file and the fastest at each shape."""
    dense_lines = frame(decision.comparable_rows(rows), details=False)
    lines = []
    for (model, _), group in decided(rows).items():
        options = decision.options(group)
        dense = dense_lines[(dense_lines["key"] == options[0].key)].iloc[0].to_dict()
        subject = (
            f"{values.model_name(model)}, {metric_name(dense['metric'])} {values.quality(dense)}, "
            f"{published_size(dense)}"
        )
        stricter = [[], []]
        for margin in decision.MARGINS:
            smallest = decision.decide(options, Budget(margin=margin, listed=True)).chosen
            size = (
                f"**{smallest.name}**: {bytes_text(smallest.bytes)}, {_time(smallest)}, "
                f"{decision.loss_text(smallest)}, {_bound(smallest, margin)}"
            )
            size = "none smaller" if smallest.baseline else size
            answers = [[size], _fastest(options, margin)]
            cells = map(_differing, answers, stricter)
            lines.append([subject, percent(margin), *cells, _asked(rows, group, options) if subject else ""])
            subject, stricter = "", answers
    header = "Model, dense quality and file|Margin|Smallest file|Fastest, time / dense time|Measured"
    return values.table(header.split("|"), lines)


def _time(option: Option) -> str:
    """Return the time over dense time, from the shape that gains most to the one that gains least."""
    ratios = (option.ratio or option.other_ratio).values()
    ends = dict.fromkeys(f"{end(ratios):.2f}" for end in (min, max) if ratios)
    time = f"time {' to '.join(ends)}" if ends else values.NOT_TIMED
    return time if option.ratio or not ends else f"{time} on {short_machine(option.machine)}"


def _bound(option: Option, margin: float) -> str:
    """Return the bound of the loss; where other examples made the choice, the bound there, and whether the
    report set, unseen by the choice, confirms it.
    """
    bound, first = (f"{max(0.0, 100 * share):.2g} %" for share in (option.bound, option.chosen_by))
    word = {True: "confirmed", False: "not confirmed"}.get(option.confirmed(margin))
    return f"bound {bound} (chosen at {first}, {word})" if word else f"bound {bound}"


def _differing(answers: list[str], stricter: list[str]) -> str:
    """Return the answers, of which those of the line above, of the stricter margin, are not repeated."""
    changed = [answer for answer in answers if answer not in stricter]
    rest = "" if len(changed) == len(answers) else "else as above" if changed else "as above"
    return "; ".join(filter(None, [*changed, rest]))


def _fastest(options: list[Option], margin: float) -> list[str]:
    """Return the fastest listed configuration at each timed shape, those of one configuration together."""
    if not any(option.ratio and not option.baseline for option in options):
        return ["not measured"]
    by_option: dict[str, list[str]] = {}
    for of, shape, fastest in decision.named(options):
        if of == margin and shape:
            doubt = f", {_bound(fastest, margin)}" * (fastest.confirmed(margin) is False)
            doubt += ", one process" * (fastest.processes == 1)
            name = f"**{fastest.name}** ({bytes_text(fastest.bytes)}, {decision.loss_text(fastest)}{doubt})"
            by_option.setdefault(name, []).append(f"{fastest.ratio[shape]:.2f} at {shape_name(shape)}")
    texts = [f"{name}: {', '.join(shapes)}" for name, shapes in by_option.items()]
    return texts or ["none inside the margin is faster"]


def _asked(rows: list[Row], group: list[Row], options: list[Option]) -> str:
    """Return how many of the listed configurations were measured, refused and timed, and on what."""
    listed, of = decision.configurations(), model_task_of(group[0])
    places = {row["key"]: decision.configuration_of(row) for row in group}
    found = places.values(), [places[option.key] for option in options if option.ratio]
    measured, timed = (len(set(numbers) - {None}) for numbers in found)
    refused = [row for row in rows if row["technique"] == "refused" and model_task_of(row) == of]
    count = sum(row["settings"].get("listed") in listed for row in refused)
    on = f" ({short_machine(options[0].machine)})" if timed else ""
    return f"{measured} of {len(listed)}{f', {count} refused' * bool(count)}, {timed} timed{on}"


def commands(rows: list[Row]) -> str:
    """Return the command that makes what the decision table names, and the keys it takes, each once."""
    lines = ["```", "python -m lmcompress.study.apply KEY --save FOLDER", ""]
    for (model, _), options in choices(rows).items():
        roles: dict[str, str] = {}
        for margin, shape, option in decision.named(options):
            role = f"{percent(margin)}, " + (shape_name(shape) if shape else "smallest")
            roles.setdefault(option.key, f"{option.key}  {role}")
        lines += [values.model_name(model), *roles.values()] if roles else []
    return "\n".join([*lines, "```"]) if len(lines) > 3 else ""


def standing(rows: list[Row]) -> str:
    """Return on which examples the decisions were made, per model, in a sentence."""
    kinds: dict[str, list[str]] = {}
    left_out = []
    reported_only = {row["key"] for row in rows if row["quality"] and not row.get("selection")}
    for (model, _), options in choices(rows).items():
        text = "selected and reported on the same examples"
        if any(option.selection_bound is not None for option in options[1:]):
            text = "selected on one set and reported on another"
            unscored = [option.name for option in options if option.key in reported_only]
            left_out += [f"{values.model_name(model)}'s {', '.join(unscored)}"] * bool(unscored)
        kinds.setdefault(text, []).append(values.model_name(model))
    all_alike = len(kinds) == 1 < len(choices(rows))
    sentences = [f"{'All' if all_alike else ', '.join(names)}: {text}." for text, names in kinds.items()]
    sentences += [f"Not scored on the first, and left out: {'; '.join(left_out)}."] * bool(left_out)
    return " ".join(sentences)
