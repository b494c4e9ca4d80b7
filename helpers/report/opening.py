"""The report's first screen: what to use per model, one figure, a few sentences."""

from collections import Counter

from helpers.report import wording as w
from helpers.report import zeros
from helpers.report.section import texts
from lmcompress.results.labels import SHAPE_NAMES
from lmcompress.results.rows import dense_of, is_timed, model_task_of, model_tasks, scored_rows
from lmcompress.results.verdicts import COLLAPSED, NO_CHANGE
from lmcompress.study import decision, explain
from lmcompress.study.decision import Budget, Decision, Option


def subject_options(rows: list[dict]) -> dict[tuple[str, str], list[Option]]:
    """What there is to choose from, per model and task."""
    comparable = decision.comparable_rows(rows)
    return {
        model_task: decision.options([row for row in comparable if model_task_of(row) == model_task])
        for model_task in model_tasks(comparable)
    }


def summary(rows: list[dict], titles: dict[str, str]) -> list[str]:
    """The table of the smallest and the fastest, and sentences on all that was measured.

    Args:
        titles: notebook to the title of its section.
    """
    choices = subject_options(rows)
    if not choices:
        return []
    lines, comparable, home = [], decision.comparable_rows(rows), sections_of(rows, titles)
    for model_task, options in choices.items():
        scored = scored_rows(comparable, model_task)
        dense = dense_of(scored)
        allowed = decision.allowance(dense)
        value = w.with_interval(dense["quality"], dense["quality"]["metric"])
        metric = w.metric_name(dense["quality"]["metric"])
        subject = f"{model_task[0]}, {model_task[1]}: {w.bytes_text(options[0].bytes)}, {metric} {value}"
        slow = _none_faster(scored, home)
        small, fast = _answers(options, None)
        compressed = [row for row in scored if row["technique"] != "dense"]
        tried = dict.fromkeys(home.get(row["technique"], row["notebook"]) for row in compressed)
        tried = w.listing([_within(section) for section in tried])
        first = [_smallest(small, options, tried), _fastest(fast, options[0]) or slow]
        more_to_say = _unproven(small.chosen, options) if small.chosen.bytes < options[0].bytes else ""
        lines.append([subject, "none measurable", first[0] + more_to_say, first[1]])
        more = _answers(options, allowed)
        small = min(small, more[0], key=lambda answer: answer.chosen.bytes)
        fast = {
            s: min(fast[s], more[1][s], key=lambda f, s=s: f.chosen.ms.get(s, decision.NOTHING)) for s in fast
        }
        if (second := [_smallest(small, options, tried), _fastest(fast, options[0]) or slow]) != first:
            share = w.percent(decision.TOLERATED)
            lines.append(["", f"or at worst {allowed:.1f} {options[0].unit} ({share})", *second])
    fastest = "Fastest (time / dense time, slower end of the interval)"
    table = w.table(["Dense model, task", "Loss allowed", "Smallest", fastest], lines)
    return [table, "\n".join(f"- {section}" for section in _sentences(rows, choices, titles) if section)]


def _answers(options: list[Option], loss: float | None) -> tuple[Decision, dict[str, Decision]]:
    """The smallest, and the fastest at every shape."""
    fast = {shape: decision.decide(options, Budget(shape=shape, max_loss=loss)) for shape in options[0].ms}
    return decision.decide(options, Budget(max_loss=loss)), fast


def _smallest(answer: Decision, options: list[Option], tried: str) -> str:
    option, dense = answer.chosen, options[0]
    if option is None or option.bytes >= dense.bytes:
        untold = [o for o in options[1:] if o.bytes and o.bytes < dense.bytes and o.verdict == NO_CHANGE]
        if untold:
            return (
                f"none to rely on: of {w.plural(len(untold), 'smaller way')} that cannot be told from dense, "
                f"every interval shows a loss or reaches beyond {w.percent(decision.TOLERATED)}, or the "
                f"right answers are less likely{_unproven(dense, options)}"
            )
        return f"none to rely on; tried: {tried}"
    return f"{option.name}: {_cost(option, dense)}, {explain.loss_text(option)}"


def _cost(option: Option, dense: Option) -> str:
    return f"{explain.size_text(option)} ({w.percent(round(option.bytes / dense.bytes, 3))})"


def _unproven(than: Option, options: list[Option]) -> str:
    """The smallest below `than` whose interval reaches no loss, but is too wide to rely on."""
    smaller = [o for o in options if o.bytes and o.bytes < than.bytes and not o.safe and not o.less_likely]
    smaller = [o for o in smaller if o.verdict == NO_CHANGE and o.loss_low <= 0]
    if not smaller:
        return ""
    smallest = min(smaller, key=lambda o: (o.bytes, o.key))
    return f"; unproven: {smallest.name}, {_cost(smallest, options[0])}, {explain.loss_text(smallest)}"


def _fastest(answers: dict[str, Decision], dense: Option) -> str:
    """Name the fastest at every shape, equal answers together; nothing where none beats dense."""
    places: dict[tuple[str, str], list[str]] = {}
    for shape, option in ((shape, answer.chosen) for shape, answer in answers.items()):
        if option is not None and option.ms.get(shape, dense.ms[shape]) < dense.ms[shape]:
            ratio = f"{option.ms[shape] / dense.ms[shape]:.2f} ({SHAPE_NAMES.get(shape, shape)})"
            places.setdefault((option.name, option.less_likely), []).append(ratio)
    return "; ".join(
        f"{name}: {', '.join(ratios)}{lost and f', {lost}'}" for (name, lost), ratios in places.items()
    )


def sections_of(rows: list[dict], titles: dict[str, str]) -> dict[str, str]:
    """Return per technique the title of the first section that records it."""
    home: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["notebook"]):
        if row["notebook"] in titles:
            home.setdefault(row["technique"], titles[row["notebook"]])
    return home


def _none_faster(rows: list[dict], home: dict[str, str]) -> str:
    """Say that nothing was faster, and which sections' models were timed: others may well be faster."""
    timed = [
        home.get(row["technique"], row["notebook"])
        for row in rows
        if row["technique"] != "dense" and is_timed(row)
    ]
    if not timed:
        return "none was timed"
    faster = any(
        word == "faster"
        for row in rows
        if row["latency"] and row["technique"] != "dense"
        for word in row["verdict"]["latency"].values()
    )
    sections = w.listing([_within(section) for section in dict.fromkeys(timed)])
    return (
        f"{'none to rely on that is faster' if faster else 'none faster than dense'}; timed: {sections} only"
    )


def _within(title: str) -> str:
    """A title within a sentence."""
    return title[0].lower() + title[1:]


def subjects_table(rows: list[dict]) -> str:
    """Tabulate the compressed models: how large they are, on what and how they are scored."""
    comparable, tasks, lines = decision.comparable_rows(rows), texts()["tasks"], []
    for model, task in model_tasks(comparable):
        dense = dense_of(comparable, (model, task))
        quality, size = dense["quality"], dense["memory"]
        floor = "" if quality["floor"] is None else w.number(quality["floor"], quality["metric"])
        lines.append(
            [
                model,
                dense["family"],
                f"{size['parameters'] / 1e6:.1f} M" if size else "",
                f"{task}: {tasks[task]}" if task in tasks else task,
                w.plural(quality["n"], "example"),
                w.metric_name(quality["metric"])
                + (", higher is better" if quality["higher_is_better"] else ", lower is better"),
                floor,
            ]
        )
    header = ["Model", "Family", "Parameters", "Task", "Scored on", "By", "Knowing nothing gives"]
    return f"The models, and what they were asked:\n\n{w.table(header, lines)}" if lines else ""


def _scale(choices: dict, rows: list[dict]) -> str:
    """How large the models are, and what that leaves open."""
    comparable = decision.comparable_rows(rows)
    dense_rows = [dense for pair in choices if (dense := dense_of(comparable, pair))["memory"]]
    if not dense_rows:
        return ""
    sizes = [dense["memory"]["parameters"] / 1e6 for dense in dense_rows]
    low, high = (f"{end(sizes):,.1f}" for end in (min, max))
    span = low if low == high else f"{low} to {high}"
    half = [dense["model"] for dense in dense_rows if zeros.half_empty(dense["memory"]["formats"])]
    text = (
        f"The dense models have {span} million parameters. What larger ones bear was not measured here, and "
        "may well be more."
    )
    if half:
        text += (
            f" The dense {'file' if len(half) == 1 else 'files'} of {w.listing(half)} "
            f"{'holds' if len(half) == 1 else 'hold'} weights published in bf16, written as fp32 here: kept "
            "in bf16 and computed in fp32 they are the same model in half the bytes, by no technique. Of "
            "such a file take twice the shares of the dense bytes: 50 % is no saving. (*Half precision* "
            "computes in it, too.)"
        )
    return text


def _sentences(rows: list[dict], choices: dict, titles: dict[str, str]) -> list[str]:
    section = sections_of(rows, titles)
    home = {row["key"]: section.get(row["technique"], row["notebook"]) for row in rows}
    counts = Counter(
        option.verdict for options in choices.values() for option in options if not option.baseline
    )
    counted = w.listing(
        [
            f"{counts[word]} {option if counts[word] == 1 else many}"
            for word, (option, many) in VERDICTS.items()
            if counts[word]
        ]
        or ["none was compared with its dense model"]
    )
    undecided = [option for options in choices.values() for option in options if option.verdict == NO_CHANGE]
    lost = sum(option.loss_low > 0 for option in undecided)
    less = sum(option.loss_low <= 0 and bool(option.less_likely) for option in undecided)
    unproven = len(undecided) - lost - less - sum(option.safe for option in undecided)
    phrases = [
        f"{sum(option.safe for option in undecided)} can be relied on",
        f"{lost} show a loss in the score's own interval, which the correction over all comparisons forgives"
        if lost
        else "",
        f"to {less}{' more' if lost else ''} the right answers are less likely" if less else "",
        f"{unproven} may lose more than {w.percent(decision.TOLERATED)}" if unproven else "",
    ]
    split = (
        f" Of the {len(undecided)} scores that cannot be told: {'; '.join(filter(None, phrases))}."
        if undecided
        else ""
    )
    shrunk, sped, shapes, shares = Counter(), Counter(), 0, []
    for options in choices.values():
        small, fast = _answers(options, None)
        if small.chosen.bytes < options[0].bytes:
            shrunk.update([home[small.chosen.key]])
            shares.append(small.chosen.bytes / options[0].bytes)
        shapes += len(fast)
        won = [f.chosen for s, f in fast.items() if f.chosen.ms.get(s, options[0].ms[s]) < options[0].ms[s]]
        sped.update(option.name for option in won)
    ends = [w.percent(round(end(shares), 3)) for end in (min, max)] if shares else []
    span = f" Its share of the dense bytes: {' to '.join(dict.fromkeys(ends))}." if ends else ""
    cases = w.plural(len(choices), "pair") + " of model and task"
    return [
        f"Of {w.plural(counts.total(), 'compressed model')}, on {cases}: {counted}.{split}",
        f"The smallest file to rely on came from {_origins(shrunk, len(choices), 'smaller', cases)}.{span}",
        _speed(sped, shapes) + _backends(rows, choices, section, titles) if shapes else "",
        _scale(choices, rows),
    ]


def _speed(won: Counter, cases: int) -> str:
    """What was the fastest to rely on, by name, and in how many cases nothing was."""
    none = cases - won.total()
    winners = w.listing([f"{name} in {count}" for name, count in won.most_common()]) if won else ""
    text = f"The shortest time to rely on came from {winners} of {w.plural(cases, 'case')}" if won else ""
    if none:
        text += (
            f"{'; in' if won else 'In'} {none}{'' if won else f' of {cases}'} nothing faster than "
            f"dense could be relied on"
        )
    return f"{text}. A case is a model, a task, and a shape of work."


def _backends(rows: list[dict], choices: dict, section: dict[str, str], titles: dict[str, str]) -> str:
    """On how many models other number formats and backends were timed, where not on all."""
    if "05_quantization" not in titles:
        return ""
    timed = {
        model_task_of(row)
        for row in decision.comparable_rows(rows)
        if is_timed(row) and section.get(row["technique"]) == titles["05_quantization"]
    }
    count = sum(model_task in timed for model_task in choices)
    if count == len(choices):
        return ""
    return (
        f" Other number formats and backends were timed on {count or 'none'} of "
        f"{w.plural(len(choices), 'pair')}."
    )


def _origins(counts: Counter, total: int, gain: str, cases: str) -> str:
    """Return `quantization in 4 of 6 pairs, from combinations in 1; in 1 nothing smaller …`."""
    if not counts:
        return f"no technique: in {cases} nothing {gain} than dense could be relied on"
    (title, count), *remaining = counts.most_common()
    further = [f"from {_within(section)} in {n}" for section, n in remaining]
    none = total - counts.total()
    first = f"{_within(title)} in {count} of {cases}" + (f", {w.listing(further)}" if further else "")
    return first + (f"; in {none} nothing {gain} than dense could be relied on" if none else "")


VERDICTS = {
    "better": ("is measurably better than its dense model", "are measurably better than their dense model"),
    NO_CHANGE: (
        "has a score that cannot be told from its dense model's",
        "have scores that cannot be told from their dense model's",
    ),
    "worse": ("is worse", "are worse"),
    COLLAPSED: ("has collapsed", "have collapsed"),
}
