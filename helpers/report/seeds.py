"""Differences over seeds: their test, and what may be said of it."""

import numpy as np
from scipy.stats import ttest_1samp

from helpers.report import wording as w
from lmcompress.results.verdicts import ALPHA, NO_DIFFERENCE
from lmcompress.stats import holm

PRINTED = 0.01  # the last digit that a gap is printed with


def tested(entries: list[dict]) -> list[dict]:
    """Add "value", "low", "high" and "p" to entries that hold "gaps", a difference per seed (a list, or a
    dict by seed).

    Student's t, and Holm over all entries; those of one seed, or of the same gap in all, get the mean "value"
    alone.
    """
    for entry in entries:
        entry["value"] = float(np.mean(_gaps(entry)))
    testable = [entry for entry in entries if len(entry["gaps"]) > 1 and np.ptp(_gaps(entry))]
    results = [ttest_1samp(_gaps(entry), 0.0) for entry in testable]
    for entry, result, p_value in zip(
        testable, results, holm([float(r.pvalue) for r in results]), strict=True
    ):
        low, high = map(float, result.confidence_interval())
        entry |= {"low": low, "high": high, "p": p_value}
    return entries


def verdict(entry: dict) -> str:
    """An entry of `tested`, of something where lower is better, in words."""
    if "p" not in entry and len(entry["gaps"]) == 1:
        alike = abs(entry["value"]) < PRINTED / 2
        return f"{'the same' if alike else 'lower' if entry['value'] < 0 else 'higher'}, one run of each"
    if "p" not in entry:
        return (
            f"lower in {sum(gap < 0 for gap in _gaps(entry))} of {len(entry['gaps'])} pairs, which is no test"
        )
    if entry["p"] >= ALPHA:
        return NO_DIFFERENCE
    return "better" if entry["value"] < 0 else "worse"


def gap_text(entry: dict) -> str:
    """`−0.52 [−0.60, −0.44] over 3 seeds, p = 0.010`; of one seed the gap alone."""
    text = w.difference_text({"low": 0.0, "high": 0.0} | entry, "")
    return (
        f"{text} over {len(entry['gaps'])} seeds, {w.p_text(entry['p'])}"
        if "p" in entry
        else text.split(" ")[0]
    )


def _gaps(entry: dict) -> list[float]:
    return list(entry["gaps"].values()) if isinstance(entry["gaps"], dict) else entry["gaps"]
