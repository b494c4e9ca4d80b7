"""What so many examples can decide, before any is scored: of accuracies, by the test that will be used."""

import numpy as np
from scipy.stats import binom, norm

from lmcompress.stats import CONFIDENCE, LEAST_EXAMPLES, tango_bound, tango_score

USUAL_CHANGES = 0.02  # share of answers that a candidate without loss changes: half of them to the right one
POWER = 0.8
MOST_EXAMPLES = 1 << 24


def certifiable_loss(n: int, changed: float = USUAL_CHANGES) -> float:
    """Return the loss, a fraction, that `n` examples certify of a candidate that loses as much as it gains.

    `changed` is the share of answers that differ from the dense model's.
    """
    return tango_bound(changed * n / 2, changed * n / 2, n)


def chance(n: int, margin: float, *, changed: float = USUAL_CHANGES, loss: float = 0.0) -> float:
    """Return how probable it is that `n` examples certify at most `margin` of a candidate that loses `loss`.

    The number of changed answers is binomial, and so is the number of those that turn wrong; the test is
    Tango's at a one-sided 5 %.
    """
    low, high = binom.interval(1 - 1e-6, n, changed)
    counts = np.arange(int(low), int(high) + 1)
    turned_wrong = min(max((1 + loss / changed) / 2, 0.0), 1.0) if changed else 0.0
    passing = binom.cdf(_most_lost(counts, n, margin), counts, turned_wrong)
    return float(binom.pmf(counts, n, changed) @ passing)


def examples_needed(
    margin: float, *, changed: float = USUAL_CHANGES, loss: float = 0.0, power: float = POWER
) -> int | None:
    """Return how many examples certify `margin` with `power`; None where no number does.

    Above a hundred rounded up to two digits: whether a number is enough turns on single examples.
    """
    if loss >= margin:
        return None
    enough = LEAST_EXAMPLES
    if chance(enough, margin, changed=changed, loss=loss) >= power:
        return enough
    while chance(enough, margin, changed=changed, loss=loss) < power:
        enough *= 2
        if enough > MOST_EXAMPLES:
            return None
    low = enough // 2
    while enough - low > max(1, enough // 200):
        middle = (low + enough) // 2
        if chance(middle, margin, changed=changed, loss=loss) < power:
            low = middle
        else:
            enough = middle
    digits = 10 ** max(0, len(str(enough)) - 2)
    return -(-enough // digits) * digits


def predicted_chance(loss: float, error: float, margin: float, *, scored: int, n: int) -> float:
    """Return how probable it is that `n` new examples certify `margin`, given the loss of `scored` others.

    `error` is the standard error of that loss. Normal in both: what the first say of the true loss, and what
    the new ones will show of it.
    """
    if not np.isfinite([loss, error]).all():
        return 0.0
    new_error = error * np.sqrt(scored / n)
    needed = margin - norm.ppf(CONFIDENCE) * new_error - loss
    return float(norm.cdf(needed / max(np.hypot(error, new_error), 1e-12)))


def _most_lost(changed: np.ndarray, n: int, margin: float) -> np.ndarray:
    """Return, per number of changed answers, how many may have turned wrong for a pass; -1: none may."""
    critical = norm.ppf(1 - CONFIDENCE)
    low, high = np.full(len(changed), -1), changed.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        passes = tango_score(margin, middle, changed - middle, n) <= critical
        low, high = np.where(passes, middle, low), np.where(passes, high, middle - 1)
    return low


def examples_by_error(
    loss: float, error: float, margin: float, *, scored: int, power: float = POWER
) -> int | None:
    """Return how many examples certify `margin`, given the `error` of any metric's loss on `scored` ones."""
    if loss >= margin or not np.isfinite(error):
        return None
    return int(np.ceil(scored * ((norm.ppf(CONFIDENCE) + norm.ppf(power)) * error / (margin - loss)) ** 2))
