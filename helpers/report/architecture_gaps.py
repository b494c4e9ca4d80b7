"""Compare architectures over seeds, at equal tokens, time or latency, with the tests."""

from collections.abc import Callable

import numpy as np

from helpers.report import rows_architecture as p
from helpers.report.seeds import tested

BASELINE_RATIO = 1.0  # of the first shape, which all others are timed against
Value = Callable[[dict], float]


def perplexity(run: dict) -> float:
    """What a run scored."""
    return run["quality"]["value"]


def loss_at(run: dict, tokens: float) -> float:
    """Held-out loss of a run when it had seen so many tokens, between the points of its curve."""
    _, losses, _, seen = np.array(run["achieved"]["validation"]).T
    return float(np.interp(tokens, seen, losses))


def opponents(shape: p.Shape) -> list[p.Shape]:
    """Return what a shape is compared with: no φ, one block less; a kind of φ, also a block more, linear."""
    layers, kind = shape
    if kind in ("none", "linear"):
        return [(layers - (kind == "none"), "none")]
    return [(layers, "none"), (layers + 1, "none"), (layers, "linear")]


def over_seeds(trained: dict[p.Shape, list[dict]], value: Value) -> list[dict]:
    """Compare every shape with its `opponents`: mean gap of `value` over seeds, with its test."""
    gaps_found = []
    for first in trained:
        for second in opponents(first):
            other = {run["seed"]: value(run) for run in trained.get(second, [])}
            gaps = {
                run["seed"]: value(run) - other[run["seed"]] for run in trained[first] if run["seed"] in other
            }
            if gaps:
                words = f"{p.name_of(first)}, against {p.name_of(second)}"
                gaps_found.append({"first": first, "second": second, "gaps": gaps, "words": words})
    return tested(gaps_found)


def over_depths(gaps_given: list[dict]) -> list[dict]:
    """Pool comparisons of `over_seeds` that differ in depth only: a seed's gap is its mean over depths."""
    groups: dict[tuple, list[dict]] = {}
    for gap in gaps_given:
        (layers, kind), (deep, other) = gap["first"], gap["second"]
        groups.setdefault((kind, other, deep - layers), []).append(gap)
    summed = []
    for (kind, other, more), alike in groups.items():
        seeds = set.intersection(*(set(gap["gaps"]) for gap in alike))
        if len(alike) > 1 and seeds:
            gaps = {seed: float(np.mean([gap["gaps"][seed] for gap in alike])) for seed in sorted(seeds)}
            deeper = {0: "", 1: " and one block more", -1: " and one block less"}[more]
            words = f"{p.STYLES[kind][2]}, against {p.STYLES[other][2]}{deeper}"
            summed.append(
                {"gaps": gaps, "words": f"{words}, mean of {len(alike)} depths", "more": more, "kind": kind}
            )
    return tested(summed)


def at_equal_latency(trained: dict[p.Shape, list[dict]]) -> list[dict]:
    """φ against a model without it that is as slow per token: between the two timed depths on either side, by
    a line.

    One that is faster than all timed models without φ is held against the fastest; one that is slower is left
    out.
    """
    ratios = {shape: p.ratio_of(runs) for shape, runs in trained.items()}
    ratios |= dict.fromkeys([shape for shape in [*trained][:1] if shape[1] == "none"], BASELINE_RATIO)
    plain = sorted((ratio, shape) for shape, ratio in ratios.items() if shape[1] == "none" and ratio)
    gaps_found = []
    for first, ratio in ratios.items():
        beside = list(zip(plain, plain[1:]))
        model_task = next(((low, high) for low, high in beside if ratio and ratio <= high[0]), None)
        if first[1] == "none" or model_task is None:
            continue
        scores = [{run["seed"]: perplexity(run) for run in trained[shape]} for _, shape in model_task]
        share = max(0.0, (ratio - model_task[0][0]) / (model_task[1][0] - model_task[0][0]))
        gaps = {
            run["seed"]: perplexity(run)
            - float(np.interp(share, (0, 1), [score[run["seed"]] for score in scores]))
            for run in trained[first]
            if all(run["seed"] in score for score in scores)
        }
        if gaps:
            depth = model_task[0][1][0] + share * (model_task[1][1][0] - model_task[0][1][0])
            words = (
                f"{p.name_of(first)} ({ratio:.2f} of the baseline's time), against {depth:.1f} layers without"
            )
            gaps_found.append({"first": first, "gaps": gaps, "words": words})
    return tested(gaps_found)


def spread(trained: dict[p.Shape, list[dict]]) -> float | None:
    """Return the deviation of perplexity between seeds of a shape, pooled; None with one seed each."""
    variances = [
        np.var([perplexity(run) for run in runs], ddof=1) for runs in trained.values() if len(runs) > 1
    ]
    return float(np.sqrt(np.mean(variances))) if variances else None
