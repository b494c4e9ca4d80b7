"""The architecture section says what its rows say, tests over seeds, and holds with one seed."""

import matplotlib.pyplot as plt
import pytest
from scipy.stats import t

from helpers import plots_architecture
from helpers.report import architecture, build, comparison, seeds
from tests.synthetic_rows import architecture_rows, row


@pytest.fixture
def rows():
    return architecture_rows()


def text_of(rows):
    return "\n\n".join(architecture.SECTION.findings(rows))


def test_a_difference_is_tested_over_seeds(rows):
    same, deeper = architecture.over_seeds(plots_architecture.trained(rows), architecture.perplexity)
    assert same["gaps"] == [-10.0, -9.5, -10.5] and deeper["gaps"] == [0.0, 2.5, -2.5]
    half = t.ppf(0.975, 2) * 0.5 / 3**0.5  # the three gaps spread by 0.5
    assert (same["low"], same["high"]) == pytest.approx((-10 - half, -10 + half))
    assert same["p"] == pytest.approx(2 * 2 * t.sf(10 / (0.5 / 3**0.5), 2)) and deeper["p"] == pytest.approx(
        1.0
    )
    assert seeds.verdict(same) == "better" and seeds.verdict(deeper) == "no measurable difference"


def test_equal_tokens_and_equal_time_are_said_apart(rows):
    text = text_of(rows)
    tokens, time = text.split("**At equal time**")
    assert "5 layers, φ, against 5 layers, no φ: better (−10.0 [" in tokens and "over 3 seeds" in tokens
    assert "held-out loss after 10.00 s" in time
    # after 10 s the run of six layers (12 s for ten points) is between the eighth and the ninth
    assert architecture.loss_at(rows[7], 10.0) == pytest.approx(6 - 0.2 * 10 / 1.2)
    assert "against 6 layers, no φ: lower in 3 of 3 pairs, which is no test (−0.33)" in time


def test_counts_pairs_and_the_summary_are_said(rows):
    text = text_of(rows)
    assert "128,789,504 (φ adds 82,560)" in text and "in 1 of 4" in text
    assert "(φ against none, same seed, same windows of text, Holm's correction) 1 better" in text
    assert "| 5 layers, no φ | 180,000 | 100.0 [99.00, 101.0] |" in text
    assert architecture.summary(rows) == [
        "**A nonlinearity on every head, against a block more**: 5 layers, φ, against 6 layers, no φ: "
        "no measurable difference."
    ]


def test_one_seed_decides_nothing(rows):
    text = text_of([one for one in rows if one["seed"] == 0])
    assert "5 layers, φ, against 5 layers, no φ: lower in 1 of 1 pairs, which is no test (−10.0)" in text
    assert "p = " not in text.split("At equal tokens")[1].split("\n\n")[1]


def test_any_part_of_the_rows_is_enough(rows):
    for gone in range(len(rows)):
        text_of(rows[:gone] + rows[gone + 1 :])
        architecture.summary(rows[:gone])
    assert architecture.SECTION.findings(rows[:1]) == [] == architecture.summary(rows[:1])


def test_the_figure_has_a_line_per_run_and_a_point_per_run(rows):
    figure = architecture.SECTION.drawings[0].draw(rows)
    by_tokens, _, by_size, _ = figure.axes
    assert len(by_tokens.lines) == len(by_size.lines) == 9
    assert [label.get_text() for label in figure.legends[0].get_texts()] == [
        "5 layers, no φ",
        "5 layers, φ",
        "6 layers, no φ",
    ]
    plt.close(figure)


def test_models_from_scratch_are_left_out_of_the_comparison_of_compressions(rows):
    scratch = [one | {"model": "pocket-5-none-seed0"} for one in rows]
    assert comparison.measured(scratch) == []
    others = [row(model="some/other"), *(row("rtn", model="some/other", key=key) for key in "ab")]
    for place, one in enumerate(others[1:]):
        one["settings"] = {"bits": place}
    assert comparison.measured([*scratch, *others]) == others
    assert comparison.measured(others[:2]) == []  # nothing to choose from
    assert "## 1. A nonlinearity on every head" in build.render(
        scratch, images="images", notebooks="notebooks"
    )
