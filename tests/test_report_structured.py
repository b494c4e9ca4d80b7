"""The structured section says what its rows say, holds with a part of them, and draws every figure it can."""

import pytest

from helpers.report import cards, structured
from helpers.report import rows_structured as structured_figures
from tests.synthetic_rows import structured_rows


@pytest.fixture
def rows():
    return structured_rows()


def text_of(rows):
    return "\n\n".join([*structured.findings(rows), *cards.block(structured.SECTION.cards(rows))])


def test_the_sweep_is_said_per_part_with_size_verdict_and_difference(rows):
    text = text_of(rows)
    heads = next(line for line in text.splitlines() if line.startswith("- **Heads** kept in each block"))
    assert "with 2 heads, 80 % of the bytes, no measurable change" in heads and "p = 1.000" in heads
    channels = next(line for line in text.splitlines() if line.startswith("- **Channels**"))
    assert "with 24 channels, 75 % of the bytes, worse (−20.0 points" in channels and "p < 0.001" in channels
    both = next(line for line in text.splitlines() if line.startswith("- **Heads and channels**"))
    assert "2 heads and 24 channels, 60 %" in both and "scored" not in both and "collapsed" not in both


def test_time_beyond_the_flops_is_explained_and_within_them_confirmed(rows):
    text = text_of(rows)
    assert "time 0.60 [0.58, 0.63] of dense, FLOPs 0.50: 20 % more than the FLOPs say" in text
    assert "Matrix products take 80 % of the dense model's time and 70 % of the pruned one's" in text
    for row in rows:
        if row["technique"] == "time-shares":
            row["achieved"]["flops"] = [100, 58]
    assert "FLOPs 0.58: within 15 %" in text_of(rows)


def test_the_published_order_is_judged_by_the_tested_difference(rows):
    text = text_of(rows)
    assert "1 iteration 93.30, 16 iterations 94.25" in text and "ordering reproduced" in text
    assert "1 finding that cannot be judged here" in text


def test_the_summary_names_the_smallest_unnoticed_model_and_counts_times(rows):
    said = " ".join(structured.summary(rows))
    assert "Vocabulary pruned, 50 % of the dense file" in said
    assert "to within 15 % in 0 of 1 model timed" in said
    worse = [
        row
        for row in rows
        if row["technique"] in ("dense", "drop-blocks") and not row["settings"].get("recovery")
    ]
    assert "shows a loss, if only in its own interval, even the largest measured, 55 %" in " ".join(
        structured.summary(worse)
    )


def test_the_sweep_leaves_out_other_ways_of_choosing(rows):
    asked = [row["settings"] for row in structured_figures.sweep_rows(rows)]
    assert len(asked) == 3 and all(
        one["n_iters"] == 4 and "scored" not in one["calibration"] for one in asked
    )
