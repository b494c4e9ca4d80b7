"""Differences over seeds: their test, and what may be said of it."""

import numpy as np
from scipy.stats import ttest_1samp

from helpers.report import wording as w
from lmcompress.results.verdicts import ALPHA
from lmcompress.stats import holm

PRINTED = 0.01  # the last digit that a gap is printed with


def tested(made: list[dict]) -> list[dict]:
    """Add "value", "low", "high" and "p" to entries that hold "gaps", a difference per seed (a list, or a dict by seed).

    Student's t, and Holm over all entries; those of one seed, or of the same gap in all, get the mean "value" alone.
    """
    for one in made:
        one["value"] = float(np.mean(_gaps(one)))
    found = [one for one in made if len(one["gaps"]) > 1 and np.ptp(_gaps(one))]
    results = [ttest_1samp(_gaps(one), 0.0) for one in found]
    for one, result, p_value in zip(found, results, holm([float(r.pvalue) for r in results]), strict=True):
        low, high = map(float, result.confidence_interval())
        one |= {"low": low, "high": high, "p": p_value}
    return made


def verdict(one: dict) -> str:
    """An entry of `tested`, of something where lower is better, in words."""
    if "p" not in one and len(one["gaps"]) == 1:
        alike = abs(one["value"]) < PRINTED / 2
        return f"{'the same' if alike else 'lower' if one['value'] < 0 else 'higher'}, one run of each"
    if "p" not in one:
        return f"lower in {sum(gap < 0 for gap in _gaps(one))} of {len(one['gaps'])} pairs, which is no test"
    if one["p"] >= ALPHA:
        return "no measurable difference"
    return "better" if one["value"] < 0 else "worse"


def gap_text(one: dict) -> str:
    """`−0.52 [−0.60, −0.44] over 3 seeds, p = 0.010`; of one seed the gap alone."""
    text = w.difference_text({"low": 0.0, "high": 0.0} | one, "")
    return f"{text} over {len(one['gaps'])} seeds, {w.p_text(one['p'])}" if "p" in one else text.split(" ")[0]


def _gaps(one: dict) -> list[float]:
    return list(one["gaps"].values()) if isinstance(one["gaps"], dict) else one["gaps"]
