"""The distillation section says what its rows say, holds with a part of them, and draws every figure it
can.
"""

import itertools

import matplotlib.pyplot as plt
import pytest

from helpers.figures import distillation as p
from helpers.report import build, cards, comparison, distillation
from helpers.report import wording as w
from tests.synthetic_rows import distillation_rows, student_row


@pytest.fixture
def rows():
    return distillation_rows()


def text_of(rows):
    return "\n\n".join([*distillation.findings(rows), *cards.block(distillation.SECTION.cards(rows))])


def line_of(rows, title):
    return next(line for line in text_of(rows).splitlines() if line.startswith(f"- **{title}**"))


def test_a_student_is_said_each_way_with_its_seeds_and_tests(rows):
    line = line_of(rows, "Copied blocks")
    assert (
        "(3 blocks in the encoder, 60 % of the bytes; 1,600 samples/s against 800 at batch 8, time 0.50 "
        "[0.48, 0.53] of dense)" in line
    )
    assert "not trained afterwards, accuracy 70.0 % [68.0, 72.0] (1 seed)" in line
    assert "hard labels only, accuracy 84.0 % (mean of 2 seeds, 84.0 to 84.0)" in line
    assert "taught by the dense model, accuracy 87.0 % (mean of 2 seeds, 86.0 to 88.0)" in line
    assert "no measurable difference in 1 of 2 seeds, better in 1 (mean +3.00 points)" in line
    assert "Taught against the dense model: worse in 2 of 2 seeds (mean −3.00 points)" in line


def test_null_results_and_collapse_are_said(rows):
    random, pruned = line_of(rows, "Same shape, random weights"), line_of(rows, "Heads and channels pruned")
    assert "collapsed in 2 of 2" in random and "samples/s" not in random
    assert (
        "Taught against hard labels: no measurable difference in 2 of 2 seeds (mean +0.00 points)" in random
    )
    assert "Taught against the dense model: collapsed in 2 of 2 seeds" in random
    assert "Taught against the dense model: no measurable change in 2 of 2 seeds" in pruned


def test_one_seed_is_said_with_its_interval_and_missing_tests_too():
    line = line_of(distillation_rows(seeds=(0,)), "Copied blocks")
    assert "taught by the dense model, accuracy 86.0 % [84.0, 88.0] (1 seed)" in line
    assert (
        "Taught against hard labels: no measurable difference (+2.00 points [+0.00, +4.00], 1 seed)" in line
    )
    untested = [row for row in distillation_rows(seeds=(0,)) if row["technique"] != "paired-difference"]
    assert "Taught against hard labels: not tested." in line_of(untested, "Copied blocks")
    assert "not tested" in " ".join(distillation.summary(untested))


def test_other_losses_and_the_cache_are_said(rows):
    text = text_of(rows)
    assert "- temperature 8: no measurable difference (+1.00 points" in text
    assert "- 0.5 × soft + 0.5 × hard: no measurable" in text and "- hidden and attention matched: no" in text
    assert "that see each of 64 examples 4 times: 10.0 to 10.4 s with the teacher asked" in text
    assert "40 % less" in text and "differ by at most 1e-07" in text
    for row in rows:
        if row["technique"] == "teacher-cache":
            row["achieved"]["kept_s"] = [6.0, 10.2]
    assert "no measurable saving" in text_of(rows)


def test_the_published_share_is_judged_on_its_own_task_only(rows):
    assert "reproduced" not in text_of(rows)
    for row in rows:
        row["task"] = "sst2"
    assert "96.7 % of its teacher's" in text_of(rows) and "| reproduced |" in text_of(rows)  # 87.0 of 90.0
    for row in rows:
        if p.kind_of(row) == "copied":
            row["quality"]["value"] -= 0.2
    assert "| not reproduced |" in text_of(rows)


def test_the_summary_gives_all_three_numbers(rows):
    (said,) = distillation.summary(rows)
    assert "mean of 2 seeds, 86.0 to 88.0" in said and "on hard labels only, accuracy 84.0 %" in said
    assert "dense 90.0 %. Taught against hard labels: no measurable difference in 1" in said


def test_only_rows_of_the_settings_recorded_last_are_put_together(rows):
    longer = student_row("copied", 0.5, p=1e-6)
    longer["settings"] = longer["settings"] | {"training": {"steps": 999}}
    pair = ("some/encoder", "some-task")
    assert p.groups([longer, *rows], pair) == p.groups(rows, pair)
    assert p.groups([*rows, longer], pair)["copied", "taught"] == [longer]


def test_names_and_the_comparison_tell_the_control_from_the_taught(rows):
    names = {w.label_of(row) for row in rows if row["quality"]}
    assert {
        "Distilled, copied blocks, 50 % of the blocks",
        "Student, hard labels only, copied blocks, 50 % of the blocks",
        "Heads and FFN, first order, 50 % of the heads, 50 % of the channels, 4 iterations + recovery, "
        "taught by the dense model",
    } <= names
    kept = comparison.comparable_rows(rows)
    assert {row["seed"] for row in kept} == {0} and len(kept) == len(comparison.comparable_rows(kept))
    assert "Student, hard labels only" in comparison.verdict_table(kept)


@pytest.mark.parametrize(
    "missing", [None, "student", "distil", "heads-ffn", "paired-difference", "teacher-cache"]
)
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_every_figure_is_drawn_from_the_rows_there_are(missing, seeds):
    left = [row for row in distillation_rows(seeds) if row["technique"] != missing]
    assert text_of(left) and isinstance(distillation.summary(left), list)
    for drawing in build.drawable(distillation.SECTION, left):
        figure = drawing.draw(left)
        assert any(axis.lines or axis.containers for axis in figure.axes)
        plt.close(figure)


def test_partial_rows_hold_in_any_order(rows):
    for count in range(1, len(rows) + 1):
        assert isinstance(text_of(rows[:count]), str) and isinstance(distillation.summary(rows[:count]), list)
    for first, second in itertools.islice(itertools.permutations(rows, 2), 60):
        assert isinstance(text_of([first, second]), str)
