"""The report's first screen: what to use per model, one figure, a few sentences, and what the words mean."""

from collections import Counter

from helpers import decision
from helpers.decision import Budget, Decision, Option
from helpers.plots import SHAPES, subject_of, subjects
from helpers.report import comparison
from helpers.report import wording as w

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
    lines, kept = [], decision.measured(rows)
    for pair, own in choices.items():
        dense = decision.dense_of([row for row in kept if subject_of(row) == pair])
        allowed = comparison.allowance(own[0], dense["quality"]["value"])
        value = w.with_interval(dense["quality"], dense["quality"]["metric"])
        place = f"{pair[0]}, {pair[1]}: {w.bytes_text(own[0].bytes)}, {dense['quality']['metric']} {value}"
        small, fast = _answers(own, None)
        lines.append(
            [place, "none measurable", *(first := [_smallest(small, own[0]), _fastest(fast, own[0])])]
        )
        more = _answers(own, allowed)
        small = min(small, more[0], key=lambda found: found.chosen.bytes)
        fast = {
            s: min(fast[s], more[1][s], key=lambda f, s=s: f.chosen.ms.get(s, decision.NOTHING)) for s in fast
        }
        if (second := [_smallest(small, own[0]), _fastest(fast, own[0])]) != first:
            lines.append(["", f"or at worst {allowed:.1f} {own[0].unit}", *second])
    table = w.table(["Dense model, task", "Loss allowed", "Smallest", "Fastest (time / dense time)"], lines)
    return [table, "\n".join(f"- {one}" for one in _sentences(rows, choices, titles))]


def _answers(own: list[Option], loss: float | None) -> tuple[Decision, dict[str, Decision]]:
    """The smallest, and the fastest at every shape."""
    fast = {shape: decision.decide(own, Budget(shape=shape, max_loss=loss)) for shape in own[0].ms}
    return decision.decide(own, Budget(max_loss=loss)), fast


def _smallest(found: Decision, dense: Option) -> str:
    one = found.chosen
    if one is None or one.bytes >= dense.bytes:
        return "none smaller than dense"
    return (
        f"{one.name}: {decision.size_text(one)} ({w.percent(round(one.bytes / dense.bytes, 3))}), "
        f"{decision.loss_text(one)}"
    )


def _fastest(found: dict[str, Decision], dense: Option) -> str:
    """The fastest at every shape, shapes with the same answer together."""
    places: dict[str, list[str]] = {}
    for shape, one in ((shape, answer.chosen) for shape, answer in found.items()):
        if one is not None and one.ms.get(shape, dense.ms[shape]) < dense.ms[shape]:
            ratio = f"{one.ms[shape] / dense.ms[shape]:.2f} ({SHAPES.get(shape, shape)})"
            places.setdefault(one.name, []).append(ratio)
    return (
        "; ".join(f"{name}: {', '.join(said)}" for name, said in places.items()) or "none faster than dense"
    )


def _sentences(rows: list[dict], choices: dict, titles: dict[str, str]) -> list[str]:
    home = {row["key"]: titles.get(row["notebook"], row["notebook"]) for row in rows}
    counts = Counter(one.verdict for own in choices.values() for one in own if not one.baseline)
    said = w.listing([f"{counts[word]} {words}" for word, words in VERDICTS.items() if counts[word]])
    shrunk, sped, shapes = Counter(), Counter(), 0
    for own in choices.values():
        small, fast = _answers(own, None)
        shrunk.update([home[small.chosen.key]] if small.chosen.bytes < own[0].bytes else [])
        shapes += len(fast)
        won = [f.chosen for s, f in fast.items() if f.chosen.ms.get(s, own[0].ms[s]) < own[0].ms[s]]
        sped.update(home[one.key] for one in won)
    ways = [
        w.listing([f"{n} {title}" for title, n in found.most_common()] or ["none"])
        for found in (shrunk, sped)
    ]
    return [
        f"Of {counts.total()} compressed models, on {len(choices)} pairs of model and task: {said}.",
        f"Where the smallest file without a measurable loss came from, of {len(choices)} pairs: {ways[0]}.",
        f"Where the shortest time without a measurable loss came from, of {shapes} pairs and shapes timed: {ways[1]}.",
    ]


VERDICTS = {
    "better": "are measurably better than their dense model",
    "no measurable change": "cannot be told from theirs",
    "worse": "are worse",
    "collapsed": "have collapsed",
}


def definitions() -> str:
    """The five words that the sections use, a short paragraph each."""
    return "\n\n".join(f"**{word}** {text}" for word, text in DEFINITIONS.items())
