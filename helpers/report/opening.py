"""The report's first screen: what to use per model, one figure, a few sentences, and what the words mean."""

from collections import Counter

from helpers import decision
from helpers.decision import Budget, Decision, Option
from helpers.plots import SHAPES, subject_of, subjects
from helpers.report import choice, zeros
from helpers.report import wording as w

UNTOLD = "no measurable change"
DEFINITIONS = {
    "Sparsification": (
        "makes many of a model's numbers exactly zero, weights or activations. The shape stays; a "
        "zero saves bytes only in "
        "a format that leaves it out, and time only in a kernel that skips it."
    ),
    "Pruning": (
        "removes what matters least. Unstructured pruning zeroes single weights and so sparsifies; "
        "structured pruning takes "
        "whole heads, channels, blocks or words away, and leaves a smaller dense model."
    ),
    "Quantization": (
        "stores weights, and sometimes activations, in fewer bits: rounded to a grid whose scale is "
        "kept per row or per "
        "group. The number of weights stays. It saves bytes at once, and time where the machine "
        "multiplies such numbers."
    ),
    "Distillation": (
        "trains a smaller model, the student, on the outputs of the large one, the teacher, rather "
        "than on the labels alone. "
        "What it gives is the difference to the same student trained on the labels."
    ),
    "MoEfication": (
        "splits a trained feed-forward into experts and computes, for each token, only those that a router picks. All "
        "weights stay; work per token falls."
    ),
}


NAMES = """\
In the names of what was done, *per row* and *groups of 32* say which weights share a scale, *embeddings too* that the token
table is rounded as well as the blocks. *Heads and FFN, first order* is structured pruning of attention heads and
feed-forward channels, by how fast the loss changes when one is switched off. Arrows are steps one after another. *Bitmask*
is a form of storing in which one bit per weight says whether it is zero, and zeros are left out; *CSR* lists the places of
the others instead."""
TASKS = {  # what is asked of a model, by the name of the task
    "pydocs-library": "which library a docstring's summary line documents",
    "pydocs-signature": "whether a docstring's summary line belongs to a signature",
    "pydocs-lm": "the next token of Python docstrings",
    "pydocs-summary": "a docstring's summary line, from its signature and body",
    "sst2": "whether a film review is good or bad (SST-2)",
    "stsb": "how alike two sentences are (STS-B)",
    "wikitext2": "the next token of Wikipedia (WikiText-2)",
    "tinystories": "the next token of children's stories (TinyStories)",
    "multi30k-en-de": "German for English captions (Multi30k)",
    "multi30k-en-fr": "French for English captions (Multi30k)",
}


def subject_options(rows: list[dict]) -> dict[tuple[str, str], list[Option]]:
    """What there is to choose from, per model and task."""
    kept = decision.measured(rows)
    return {
        pair: decision.options([row for row in kept if subject_of(row) == pair]) for pair in subjects(kept)
    }


def summary(rows: list[dict], titles: dict[str, str]) -> list[str]:
    """The table of the smallest and the fastest, and sentences on all that was measured.

    Args:
        titles: notebook to the title of its section.
    """
    choices = subject_options(rows)
    if not choices:
        return []
    lines, kept, home = [], decision.measured(rows), sections_of(rows, titles)
    for pair, own in choices.items():
        dense = decision.dense_of([row for row in kept if subject_of(row) == pair])
        allowed = decision.allowance(dense)
        value = w.with_interval(dense["quality"], dense["quality"]["metric"])
        metric = w.metric_name(dense["quality"]["metric"])
        place = f"{pair[0]}, {pair[1]}: {w.bytes_text(own[0].bytes)}, {metric} {value}"
        slow = _none_faster([row for row in kept if subject_of(row) == pair], home)
        small, fast = _answers(own, None)
        others = [row for row in kept if subject_of(row) == pair and row["technique"] != "dense"]
        tried = dict.fromkeys(home.get(row["technique"], row["notebook"]) for row in others)
        tried = w.listing([_within(one) for one in tried])
        first = [_smallest(small, own, tried), _fastest(fast, own[0]) or slow]
        more_to_say = _unproven(small.chosen, own) if small.chosen.bytes < own[0].bytes else ""
        lines.append([place, "none measurable", first[0] + more_to_say, first[1]])
        more = _answers(own, allowed)
        small = min(small, more[0], key=lambda found: found.chosen.bytes)
        fast = {
            s: min(fast[s], more[1][s], key=lambda f, s=s: f.chosen.ms.get(s, decision.NOTHING)) for s in fast
        }
        if (second := [_smallest(small, own, tried), _fastest(fast, own[0]) or slow]) != first:
            share = w.percent(decision.TOLERATED)
            lines.append(["", f"or at worst {allowed:.1f} {own[0].unit} ({share})", *second])
    fastest = "Fastest (time / dense time, slower end of the interval)"
    table = w.table(["Dense model, task", "Loss allowed", "Smallest", fastest], lines)
    return [table, "\n".join(f"- {one}" for one in _sentences(rows, choices, titles) if one)]


def _answers(own: list[Option], loss: float | None) -> tuple[Decision, dict[str, Decision]]:
    """The smallest, and the fastest at every shape."""
    fast = {shape: decision.decide(own, Budget(shape=shape, max_loss=loss)) for shape in own[0].ms}
    return decision.decide(own, Budget(max_loss=loss)), fast


def _smallest(found: Decision, own: list[Option], tried: str) -> str:
    one, dense = found.chosen, own[0]
    if one is None or one.bytes >= dense.bytes:
        untold = [o for o in own[1:] if o.bytes and o.bytes < dense.bytes and o.verdict == UNTOLD]
        if untold:
            return (
                f"none to rely on: of {w.plural(len(untold), 'smaller way')} that cannot be told from dense, every interval "
                f"shows a loss or reaches beyond {w.percent(decision.TOLERATED)}, or the right answers are less likely"
                f"{_unproven(dense, own)}"
            )
        return f"none to rely on; tried: {tried}"
    return f"{one.name}: {_cost(one, dense)}, {choice.loss_text(one)}"


def _cost(one: Option, dense: Option) -> str:
    return f"{choice.size_text(one)} ({w.percent(round(one.bytes / dense.bytes, 3))})"


def _unproven(than: Option, own: list[Option]) -> str:
    """The smallest below `than` whose interval reaches no loss, but is too wide to rely on."""
    smaller = [o for o in own if o.bytes and o.bytes < than.bytes and not o.safe and not o.less_likely]
    smaller = [o for o in smaller if o.verdict == UNTOLD and o.loss_low <= 0]
    if not smaller:
        return ""
    one = min(smaller, key=lambda o: (o.bytes, o.key))
    return f"; unproven: {one.name}, {_cost(one, own[0])}, {choice.loss_text(one)}"


def _fastest(found: dict[str, Decision], dense: Option) -> str:
    """The fastest at every shape, shapes with the same answer together; nothing where none is faster than dense."""
    places: dict[tuple[str, str], list[str]] = {}
    for shape, one in ((shape, answer.chosen) for shape, answer in found.items()):
        if one is not None and one.ms.get(shape, dense.ms[shape]) < dense.ms[shape]:
            ratio = f"{one.ms[shape] / dense.ms[shape]:.2f} ({SHAPES.get(shape, shape)})"
            places.setdefault((one.name, one.less_likely), []).append(ratio)
    return "; ".join(
        f"{name}: {', '.join(said)}{lost and f', {lost}'}" for (name, lost), said in places.items()
    )


def sections_of(rows: list[dict], titles: dict[str, str]) -> dict[str, str]:
    """Per technique the title of the first section that records it: where it is at home, whoever measures it again."""
    home: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["notebook"]):
        if row["notebook"] in titles:
            home.setdefault(row["technique"], titles[row["notebook"]])
    return home


def _none_faster(own: list[dict], home: dict[str, str]) -> str:
    """That nothing was faster, with the sections whose models were timed: what was not timed may well be faster."""
    timed = [
        home.get(row["technique"], row["notebook"])
        for row in own
        if row["technique"] != "dense" and row["latency"] and not row["latency"].get("measured_on")
    ]
    if not timed:
        return "none was timed"
    faster = any(
        word == "faster"
        for row in own
        if row["latency"] and row["technique"] != "dense"
        for word in row["verdict"]["latency"].values()
    )
    said = w.listing([_within(one) for one in dict.fromkeys(timed)])
    return f"{'none to rely on that is faster' if faster else 'none faster than dense'}; timed: {said} only"


def _within(title: str) -> str:
    """A title within a sentence."""
    return title[0].lower() + title[1:]


def subjects_table(rows: list[dict]) -> str:
    """The models that were compressed and what they were asked: how large they are, on what and how they are scored."""
    kept, lines = decision.measured(rows), []
    for model, task in subjects(kept):
        dense = decision.dense_of([row for row in kept if subject_of(row) == (model, task)])
        quality, size = dense["quality"], dense["memory"]
        floor = "" if quality["floor"] is None else w.number(quality["floor"], quality["metric"])
        lines.append([
            model, dense["family"], f"{size['parameters'] / 1e6:.1f} M" if size else "",
            f"{task}: {TASKS[task]}" if task in TASKS else task, w.plural(quality["n"], "example"),
            w.metric_name(quality["metric"]) + (", higher is better" if quality["higher_is_better"] else ", lower is better"),
            floor,
        ])  # fmt: skip
    header = ["Model", "Family", "Parameters", "Task", "Scored on", "By", "Knowing nothing gives"]
    return f"The models, and what they were asked:\n\n{w.table(header, lines)}" if lines else ""


def _scale(choices: dict, rows: list[dict]) -> str:
    """How large the models are, and what that leaves open."""
    kept = decision.measured(rows)
    found = [decision.dense_of([row for row in kept if subject_of(row) == pair]) for pair in choices]
    found = [dense["memory"] for dense in found if dense["memory"]]
    if not found:
        return ""
    sizes = [memory["parameters"] / 1e6 for memory in found]
    low, high = (f"{end(sizes):,.1f}" for end in (min, max))
    span = low if low == high else f"{low} to {high}"
    half = sum(zeros.half_empty(memory["formats"]) for memory in found)
    return (
        f"The dense models have {span} million parameters. What larger ones bear was not measured here, and may well be "
        "more."
        + (
            f" {half} of the {len(found)} dense files {'holds' if half == 1 else 'hold'} weights published in bf16, written "
            "as fp32 here: kept in bf16 and computed in fp32 they are the same model in half the bytes, by no technique, and "
            "shares of the dense bytes are to be read so. (*Half precision* computes in it, too.)"
            if half
            else ""
        )
    )


def _sentences(rows: list[dict], choices: dict, titles: dict[str, str]) -> list[str]:
    section = sections_of(rows, titles)
    home = {row["key"]: section.get(row["technique"], row["notebook"]) for row in rows}
    counts = Counter(one.verdict for own in choices.values() for one in own if not one.baseline)
    said = w.listing([
        f"{counts[word]} {one if counts[word] == 1 else many}" for word, (one, many) in VERDICTS.items() if counts[word]
    ])  # fmt: skip
    still = [one for own in choices.values() for one in own if one.verdict == UNTOLD]
    lost = sum(one.loss_low > 0 for one in still)
    less = sum(one.loss_low <= 0 and bool(one.less_likely) for one in still)
    rest = len(still) - lost - less - sum(one.safe for one in still)
    parts = [
        f"{sum(one.safe for one in still)} can be relied on",
        f"{lost} show a loss in the score's own interval, which the correction over all comparisons forgives"
        if lost
        else "",
        f"to {less}{' more' if lost else ''} the right answers are less likely" if less else "",
        f"{rest} may lose more than {w.percent(decision.TOLERATED)}" if rest else "",
    ]
    split = (
        f" Of the {len(still)} scores that cannot be told: {'; '.join(filter(None, parts))}." if still else ""
    )
    shrunk, sped, shapes, shares = Counter(), Counter(), 0, []
    for own in choices.values():
        small, fast = _answers(own, None)
        if small.chosen.bytes < own[0].bytes:
            shrunk.update([home[small.chosen.key]])
            shares.append(small.chosen.bytes / own[0].bytes)
        shapes += len(fast)
        won = [f.chosen for s, f in fast.items() if f.chosen.ms.get(s, own[0].ms[s]) < own[0].ms[s]]
        sped.update(home[one.key] for one in won)
    ends = [w.percent(round(end(shares), 3)) for end in (min, max)] if shares else []
    span = f" Its share of the dense bytes: {' to '.join(dict.fromkeys(ends))}." if ends else ""
    asked, timed = w.plural(len(choices), "pair") + " of model and task", w.plural(shapes, "case")
    return [
        f"Of {w.plural(counts.total(), 'compressed model')}, on {asked}: {said}.{split}",
        f"The smallest file to rely on came from {_origins(shrunk, len(choices), 'smaller', asked)}.{span}",
        f"The shortest time to rely on came from {_origins(sped, shapes, 'faster', timed)}. A case is "
        "a model, a task, and a shape of work."
        if shapes
        else "",
        _scale(choices, rows),
    ]


def _origins(found: Counter, total: int, what: str, asked: str) -> str:
    """`quantization in 4 of 6 pairs, from combinations in 1; in 1 nothing smaller than dense could be relied on`."""
    if not found:
        return f"no technique: in {asked} nothing {what} than dense could be relied on"
    (title, count), *rest = found.most_common()
    others = [f"from {_within(one)} in {n}" for one, n in rest]
    none = total - found.total()
    told = f"{_within(title)} in {count} of {asked}" + (f", {w.listing(others)}" if others else "")
    return told + (f"; in {none} nothing {what} than dense could be relied on" if none else "")


VERDICTS = {
    "better": ("is measurably better than its dense model", "are measurably better than their dense model"),
    "no measurable change": (
        "has a score that cannot be told from its dense model's",
        "have scores that cannot be told from their dense model's",
    ),
    "worse": ("is worse", "are worse"),
    "collapsed": ("has collapsed", "have collapsed"),
}


def definitions() -> str:
    """The five words that the sections use, a short paragraph each."""
    return "\n\n".join(f"**{word}** {text}" for word, text in DEFINITIONS.items())
