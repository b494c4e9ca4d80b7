"""The section on other text: what is known nowhere, and what compression cost."""

import pytest

from helpers.report import other_text
from tests.synthetic_rows import row

HOME = {"notebook": "12_other_text", "model": "pocket/gpt2-pydocs"}


def perplexity(technique, value, task, *, floor, collapsed=None, **changed):
    made = row(technique, value, task=task, metric="perplexity", collapsed=collapsed, **HOME, **changed)
    made["quality"] |= {"floor": floor, "details": {"floor": "unigram model, counted on it"}}
    made["quality"]["secondary"] = {"bits_per_byte": {"value": 2.5, "low": 2.4, "high": 2.6}}
    return made


def pairs(technique, value, fields, **changed):
    made = row(technique, value, task="blimp", **HOME, **changed)
    made["quality"]["secondary"] = {
        f"accuracy_{name}": {"value": v, "low": v - 0.04, "high": v + 0.04} for name, v in fields.items()
    }
    return made


def other_text_rows():
    said = "perplexity 848.6 is not below the unigram model's 550.1"
    return [
        perplexity("dense", 45.0, "pydocs-lm", floor=500.0),
        perplexity("magnitude-layer", 60.0, "pydocs-lm", floor=500.0, sparsity=0.5, p=0.001),
        perplexity("dense", 848.6, "wikitext2", floor=550.1, collapsed=said),
        pairs("dense", 0.60, {"morphology": 0.70, "syntax_semantics": 0.52}),
        pairs("magnitude-layer", 0.59, {"morphology": 0.68, "syntax_semantics": 0.51}, sparsity=0.5, p=0.4),
    ]


@pytest.fixture
def rows():
    return other_text_rows()


def test_a_text_that_the_dense_model_does_not_know_is_named_and_its_own_text_is_not(rows):
    text = "\n\n".join(other_text.findings(rows))
    assert "On **wikitext2** the dense model is collapsed before anything is done to it" in text
    assert "848.6 is not below the unigram model's 550.1 (unigram model, counted on it)" in text
    assert "On **pydocs-lm**" not in text and "On **blimp**" not in text
    assert (
        "| pydocs-lm (the text it was made for) | Dense | perplexity 45.00 [44.00, 46.00] | 2.50 [2.40, 2.60]"
        in text
    )
    line = next(line for line in text.splitlines() if line.startswith("| wikitext2 (out of domain) | Dense"))
    assert line.endswith("| 550.1 |  |  | collapsed |")
    line = next(line for line in text.splitlines() if line.startswith("| blimp (out of domain) | Magnitude"))
    assert "p = 0.400 | no measurable change |" in line


def test_the_summary_counts_verdicts_elsewhere_only(rows):
    (said,) = other_text.summary(rows)
    assert "no better than a model that knows nothing on wikitext2" in said and "pydocs-lm" not in said
    assert (
        "[58.0, 62.0] on blimp, where knowing nothing gives 50.0 %; of its compressions there: 1 no meas"
        in said
    )
    assert said.endswith("; on its own text 1 of 1 are worse.")
    assert "none was scored here" in other_text.summary(rows[:2])[0]
