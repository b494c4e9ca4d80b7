"""Verdicts count a loss by its corrected test and its own interval, of the score and of the likelihood."""

import pytest
from scipy.stats import norm

from lmcompress.results import verdicts
from lmcompress.results.labels import likelihood_loss
from lmcompress.results.verdicts import adjusted, less_likely, without_loss
from tests.synthetic_rows import row


def test_a_bootstrap_p_at_its_floor_is_taken_from_the_interval():
    part = {"value": -2.0, "low": -3.0, "high": -1.0, "p": 0.001, "test": "paired bootstrap", "n": 200}
    spread = 2 / (2 * 1.959964)
    assert verdicts.tested_p(part) == pytest.approx(2 * norm.sf(2 / spread), rel=1e-4)
    assert verdicts.tested_p(part | {"p": 0.03}) == 0.03  # enough resamples to count
    assert verdicts.tested_p(part | {"test": "McNemar exact"}) == 0.001  # exact as it is
    assert verdicts.tested_p(part | {"resamples": 10_000}) == 0.001
    assert verdicts.tested_p(part | {"low": -2.0, "high": -2.0}) == 0.001  # no width to go by


def test_holm_is_applied_over_the_family_of_comparisons():
    rows = [row("magnitude-layer", 0.88, sparsity=s, p=0.02) for s in (0.1, 0.2, 0.3)]
    assert {verdict for _, verdict in adjusted(rows).values()} == {"n.s."}
    assert adjusted(rows[:1])[rows[0]["key"]] == (0.02, "worse")


def test_a_lower_perplexity_is_better():
    better = row("magnitude-layer", 20.0, sparsity=0.5, p=0.001, metric="perplexity")
    better["quality"]["difference"]["value"] = -3.0
    assert adjusted([better])[better["key"]][1] == "better"


def with_likelihood(scored: dict, *, rise=0.04, p=0.002) -> dict:
    """The row with a cross-entropy of 0.31 beside its accuracy, this much above the dense model's."""
    difference = {"value": rise, "low": rise - 0.01, "high": rise + 0.01, "p": p, "test": "exact", "n": 200}
    part = {"value": 0.31, "low": 0.26, "high": 0.36, "difference": difference}
    scored["quality"]["secondary"] = {
        "macro_f1": {"value": 0.9, "low": 0.8, "high": 1.0},
        "cross_entropy": part,
    }
    return scored


def test_a_loss_of_likelihood_counts_by_its_own_interval_and_is_measurable_within_a_model_and_task():
    rows = [with_likelihood(row("wanda", 0.899, sparsity=s, p=0.8), p=0.02) for s in (0.1, 0.2, 0.3)]
    assert less_likely(rows) == set() and without_loss(rows, adjusted(rows)) == []
    alone = with_likelihood(row("wanda", 0.899, sparsity=0.1, p=0.8, model="another"), p=0.02)
    assert less_likely([*rows, alone]) == {alone["key"]}
    assert likelihood_loss(alone) == "cross-entropy from 0.270 to 0.310"


def test_what_shows_no_loss_in_score_and_likelihood_is_without_loss():
    slight = with_likelihood(row("wanda", 0.899, sparsity=0.1, p=0.8), rise=0.005, p=0.4)
    assert without_loss([slight], adjusted([slight])) == [slight]
    slight["quality"]["secondary"]["cross_entropy"]["difference"] = None  # not finite: no proof of no loss
    assert likelihood_loss(slight) == "cross-entropy not defined"
    assert less_likely([slight]) == {slight["key"]} and without_loss([slight], {}) == []
    unrecorded = row("wanda", 0.899, sparsity=0.1, p=0.8)
    assert verdicts.likelihood_of(unrecorded) is None and likelihood_loss(unrecorded) == ""
