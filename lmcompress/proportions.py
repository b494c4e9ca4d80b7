"""Accuracies: the interval of one, and the paired test of two on the same examples."""

import numpy as np
from scipy.stats import binomtest, norm

from lmcompress.errors import BadData
from lmcompress.stats import CONFIDENCE, Difference, Interval

_Z = float(norm.ppf(0.5 + CONFIDENCE / 2))


def wilson(successes: int, n: int) -> Interval:
    """Return a proportion with its score interval (Wilson 1927, eq. for p₁ and p₂), right even at 0 and 1."""
    if not 0 <= successes <= n or n == 0:
        raise BadData(f"{successes} successes of {n} is no proportion: need 0 <= successes <= n and n >= 1")
    p, z2n = successes / n, _Z**2 / n
    centre = (p + z2n / 2) / (1 + z2n)
    half = _Z * np.sqrt(p * (1 - p) / n + z2n / (4 * n)) / (1 + z2n)
    return Interval(p, min(p, max(0.0, float(centre - half))), max(p, min(1.0, float(centre + half))))


def mcnemar(correct: np.ndarray, baseline_correct: np.ndarray) -> Difference:
    """Compare two accuracies on the same examples by the exact McNemar test.

    Args:
        correct: booleans `(n,)` of the compressed model.
        baseline_correct: booleans `(n,)` of the baseline on the same examples.

    The p-value is the two-sided binomial one over the examples the two disagree on (McNemar 1947); the
    interval is Newcombe's score interval for paired proportions (Newcombe 1998, method 10).
    """
    ours, theirs = np.asarray(correct, dtype=bool), np.asarray(baseline_correct, dtype=bool)
    n = len(ours)
    if theirs.shape != ours.shape or not n:
        raise BadData(f"{n} examples against {len(theirs)} of the baseline: not the same ones, or none")
    both, only_ours = int((ours & theirs).sum()), int((ours & ~theirs).sum())
    only_theirs, neither = int((~ours & theirs).sum()), int((~ours & ~theirs).sum())
    disagreements = only_ours + only_theirs
    p = binomtest(only_ours, disagreements).pvalue if disagreements else 1.0
    a, b = wilson(both + only_ours, n), wilson(both + only_theirs, n)
    cross = both * neither - only_ours * only_theirs
    scale = np.sqrt(
        float(both + only_ours) * (only_theirs + neither) * (both + only_theirs) * (only_ours + neither)
    )
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / scale if scale else 0.0

    def half(up: float, down: float) -> float:
        return float(np.sqrt(max(up**2 - 2 * phi * up * down + down**2, 0.0)))

    value = (only_ours - only_theirs) / n
    low = value - half(a.value - a.low, b.high - b.value)
    high = value + half(a.high - a.value, b.value - b.low)
    return Difference(value, low, high, float(p), "McNemar exact", n)
