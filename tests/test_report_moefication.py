"""The MoEfication section: tested differences, times, the least unnoticed work."""

import pytest

from helpers.report import moefication
from helpers.report.rows_moefication import timed_rows
from tests.synthetic_rows import moefication_rows


@pytest.fixture
def rows():
    return moefication_rows()


def text_of(rows):
    return "\n\n".join(moefication.findings(rows))


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


def test_a_time_taken_over_from_another_row_is_not_drawn_twice(rows):
    rows[2]["latency"] = rows[1]["latency"] | {"measured_on": rows[1]["key"]}
    assert timed_rows(rows) == [rows[1]]
