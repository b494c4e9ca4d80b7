"""The distillation section: null results, published shares, settings kept apart."""

import pytest

from helpers.report import cards, comparison, distillation
from helpers.report import rows_distillation as p
from helpers.report import wording as w
from tests.synthetic_rows import distillation_rows, student_row


@pytest.fixture
def rows():
    return distillation_rows()


def text_of(rows):
    return "\n\n".join([*distillation.findings(rows), *cards.block(distillation.SECTION.cards(rows))])


def line_of(rows, title):
    return next(line for line in text_of(rows).splitlines() if line.startswith(f"- **{title}**"))


def test_null_results_and_collapse_are_said(rows):
    random, pruned = line_of(rows, "Same shape, random weights"), line_of(rows, "Heads and channels pruned")
    assert "collapsed in 2 of 2" in random and "samples/s" not in random
    assert (
        "Taught against hard labels: no measurable difference in 2 of 2 seeds (mean +0.00 points)" in random
    )
    assert "Taught against the dense model: collapsed in 2 of 2 seeds" in random
    assert "Taught against the dense model: no measurable change in 2 of 2 seeds" in pruned


def test_the_published_share_is_judged_on_its_own_task_only(rows):
    assert "reproduced" not in text_of(rows)
    for row in rows:
        row["task"] = "sst2"
    assert "96.7 % of its teacher's" in text_of(rows) and "| reproduced |" in text_of(rows)  # 87.0 of 90.0
    for row in rows:
        if p.kind_of(row) == "copied":
            row["quality"]["value"] -= 0.2
    assert "| not reproduced |" in text_of(rows)


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
