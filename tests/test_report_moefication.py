"""The MoEfication section says what its rows say, holds with a part of them, and draws every figure it
can.
"""

import itertools

import matplotlib.pyplot as plt
import pytest

from helpers.figures.moefication import timed_rows
from helpers.report import build, moefication
from tests.synthetic_rows import moefication_rows


@pytest.fixture
def rows():
    return moefication_rows()


def text_of(rows):
    return "\n\n".join(moefication.findings(rows))


def test_activations_and_relu_are_said_with_their_control(rows):
    text = text_of(rows)
    assert "0 % to 2 % are exactly 0; 90 % of a token's energy lies in 30 % to 40 % of the neurons" in text
    assert "exact zeros go from 1 % to 60 %, and after 20 steps of fine-tuning to 75 %" in text
    assert "The control, as many steps with its own activation: no measurable change (+1.00 points" in text
    without = [row for row in rows if not row["settings"].get("recovery")]
    assert "The control" not in text_of(without)


def test_every_setting_has_a_line_with_work_mass_and_verdict(rows):
    lines = [line for line in text_of(rows).splitlines() if line.startswith("| Experts")]
    assert len(lines) == 4
    assert "| Experts, 4 of 16, balanced-kmeans, router mlp | 27 % | 0.60 (0.65) | 0.80 |" in lines[1]
    assert lines[1].endswith("| worse |") and lines[0].endswith("| no measurable change |")
    assert "| Heads and FFN, first order, 50 % of the channels, 4 iterations | 50 % |  |  |" in text_of(rows)


def test_differences_are_tested_and_models_named_where_they_differ(rows):
    text = text_of(rows)
    assert "router mlp, against Experts, 8 of 16, random, router mlp: better (+5.00 points" in text
    assert "router oracle: no measurable difference (−1.00 points" in text
    found = rows[-1]["achieved"]
    found["first"]["model"], found["second"]["model"] = "one", "two"
    assert "router mlp (one), against Experts, 8 of 16, balanced-kmeans, router oracle (two)" in text_of(rows)


def test_a_slower_time_is_called_slower(rows):
    assert "| 52 % | batch 1 | 1.10 [1.06, 1.14] | slower |" in text_of(rows)
    assert "Of 1 time measured, 0 were faster than dense" in " ".join(moefication.summary(rows))


def test_the_summary_takes_the_least_unnoticed_work_of_a_usable_router(rows):
    assert (
        "without a measurable loss: 52 % of the dense FLOPs (Experts, 8 of 16" in moefication.summary(rows)[0]
    )
    bad = [
        row
        for row in rows
        if row["technique"] != "moefy"
        or row["settings"]["router"] == "oracle"
        or (row["quality"]["difference"] or {"p": 0})["p"] < 0.05
    ]
    assert (
        "tried shows a loss, if only in its own interval, even the largest: 52 %"
        in moefication.summary(bad)[0]
        and "random" in moefication.summary(bad)[0]
    )


@pytest.mark.parametrize(
    "missing", [None, "moefy", "relufy", "heads-ffn", "activation-sparsity", "paired-difference"]
)
def test_every_figure_is_drawn_from_the_rows_there_are(rows, missing):
    left = [row for row in rows if row["technique"] != missing]
    assert text_of(left) and isinstance(moefication.summary(left), list)
    drawn = build.drawable(moefication.SECTION, left)
    assert len(drawn) == {None: 3, "moefy": 1, "activation-sparsity": 2}.get(missing, 3)
    for drawing in drawn:
        figure = drawing.draw(left)
        assert figure.axes
        plt.close(figure)


def test_a_time_taken_over_from_another_row_is_not_drawn_twice(rows):
    rows[2]["latency"] = rows[1]["latency"] | {"measured_on": rows[1]["key"]}
    assert timed_rows(rows) == [rows[1]]


def test_partial_rows_hold_in_any_order(rows):
    for count in range(1, len(rows) + 1):
        assert isinstance(text_of(rows[:count]), str)
    for pair in itertools.permutations(rows, 2):
        assert isinstance(text_of([*pair]), str) and isinstance(moefication.summary([*pair]), list)
