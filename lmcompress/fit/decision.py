"""Every choice of the search as a function of measurements: who goes, who is confirmed and in which order.

Nothing here runs a model: the command hands in what it measured, a replay what was measured once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

FINALISTS = 5
RUNGS = (0.25, 0.5, 1.0)  # of the search part
WORTH = 0.98  # of the dense cost: what saves less is not worth a test
CHEAPER = 0.95  # of the cost of another: less of a difference is none, short runs cannot tell it
NEARER = 0.5  # of another's divergence, likewise at the same cost: it is known from few texts
LIKELY = 0.05  # a finalist less likely to pass than this is not worth its place


@dataclass(frozen=True)
class Contender:
    """A candidate by what rung 0 says: `cost` in what is asked for, dense being 1; KL to dense; bytes."""

    name: str
    cost: float
    divergence: float
    size: int = 0


def front(contenders: Iterable[Contender]) -> list[Contender]:
    """Return those cheaper than dense that no other beats, the cheapest first.

    Another beats one if it is cheaper and no further from dense, or as cheap and much nearer. Of two at the
    same cost, as times of short runs often are, the smaller file is the cheaper.
    """
    worthwhile = [c for c in contenders if c.cost <= WORTH]
    unbeaten = [c for c in worthwhile if not any(_beats(other, c) for other in worthwhile)]
    return sorted(unbeaten, key=lambda c: (c.cost, c.size, c.divergence, c.name))


def _beats(other: Contender, one: Contender) -> bool:
    """Return whether `other` is cheaper and no further from dense, or as cheap, no larger and much nearer."""
    share, is_larger = other.cost / one.cost, CHEAPER * other.size > one.size
    if share <= CHEAPER:
        return other.divergence <= one.divergence
    return CHEAPER * share < 1 and not is_larger and other.divergence < NEARER * one.divergence


def halving(
    contenders: Sequence[Contender],
    misses: Callable[[Contender, float], bool | None],
    *,
    rungs: Sequence[float] = RUNGS,
) -> list[Contender]:
    """Return the contenders that survive, the cheapest first.

    On each rung, a growing share of the search part, those of the front are scored. One that misses the
    margin goes, and those that only it was better than are in the race again.

    Args:
        misses: scores a contender on a share of the search part; whether the loss misses the margin even
            favourably, or None: there was no time.
    """
    remaining, unscored = list(contenders), set()
    for rung in rungs:
        scored: set[str] = set()
        while pending := [c for c in front(remaining) if c.name not in scored | unscored]:
            contender = pending[0]
            answer = misses(contender, rung)
            if answer is None:
                unscored.add(contender.name)
            elif answer:
                remaining.remove(contender)
            scored.add(contender.name)
    return front(remaining)


def finalists(
    contenders: Sequence[Contender], chances: Sequence[float], *, limit: int = FINALISTS
) -> list[Contender]:
    """Return at most `limit` contenders in the order of their tests, the safest first, the cheapest last.

    The tests stop at the first failure, so a contender gains something only if all before it pass. The first
    is the one most likely to pass. After it comes the sequence of the greatest expected gain, the logarithm
    of cost over cost, by the `chances` that each passes, as if these were independent.
    """
    pairs = sorted(zip(contenders, chances, strict=True), key=lambda entry: (-entry[1], entry[0].cost))
    if not pairs:
        return []
    safest = pairs[0][0]
    cheaper = sorted((entry for entry in pairs if entry[0].cost < safest.cost), key=lambda e: -e[0].cost)
    likely = [(safest, 1.0), *(entry for entry in cheaper if entry[1] >= LIKELY)]
    gains = [-np.log(max(contender.cost, 1e-9)) for contender, _ in likely]
    # Per contender: the greatest expected gain of what follows it, and that sequence; built up by its length.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * len(likely)
    for _ in range(limit - 1):
        longer = []
        for previous in range(len(likely)):
            tried = [
                (likely[i][1] * (gains[i] - gains[previous] + best[i][0]), (i, *best[i][1]))
                for i in range(previous + 1, len(likely))
                if likely[i][1] <= likely[previous][1]
            ]
            longer.append(max([(0.0, ()), *tried], key=lambda entry: entry[0]))
        best = longer
    return [safest, *(likely[i][0] for i in best[0][1])]


def confirm(order: Sequence[Contender], passes: Callable[[Contender], bool]) -> Contender | None:
    """Test contenders in a fixed order, stop at the first that fails, and return the last that passed.

    Each test is at the full level: that a later one is reached needs all before it, so that the chance of
    any false pass stays at the level of one test.
    """
    answer = None
    for contender in order:
        if not passes(contender):
            break
        answer = contender
    return answer
