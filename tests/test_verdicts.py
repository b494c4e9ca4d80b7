"""Verdicts are corrected over their family, with a p as fine as the correction asks."""

import pytest
from scipy.stats import norm

from lmcompress.results import verdicts
from lmcompress.results.rows import model_task_of
from lmcompress.results.verdicts import adjusted
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


def test_two_compressed_models_compared_are_of_one_family_and_seeds_count_once():
    def pair(key, p, sparsity, notebook):
        gap = {"value": 0.1, "low": 0.05, "high": 0.15, "p": p, "test": "McNemar exact", "n": 100}
        sides = {
            side: {"technique": side, "settings": {"sparsity": sparsity}} for side in ("first", "second")
        }
        achieved = sides | {"difference": gap, "higher_is_better": True}
        return row("paired-difference", notebook=notebook) | {"key": key, "achieved": achieved}

    pairs = [pair("a", 0.02, 0.5, "02"), pair("b", 0.03, 0.9, "03"), pair("c", 0.0001, 0.5, "02")]
    tested = {r["key"]: (p, word) for r, p, word in verdicts.comparisons(pairs, model_task_of(pairs[0]))}
    assert tested == {"a": (0.04, "better"), "b": (0.04, "better"), "c": (None, "repeat")}
    assert verdicts.comparisons(pairs[:1], model_task_of(pairs[0]))[0][1] == 0.02
