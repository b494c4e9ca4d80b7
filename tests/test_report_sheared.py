"""The sheared section says what its rows say: gaps over seeds, crossovers, switches, longer texts."""

import pytest
from scipy.stats import t

from helpers.report import build, comparison, sheared, wording
from helpers.report import rows_sheared as sheared_figures
from tests.synthetic_rows import sheared_rows, sheared_run


@pytest.fixture
def rows():
    return sheared_rows()


def text_of(rows):
    return "\n\n".join(sheared.SECTION.findings(rows))


def line_of(text, beginning):
    return next(line for line in text.splitlines() if line.startswith(beginning))


def test_losses_are_read_between_points_and_marks_begin_where_all_recover(rows):
    found = sheared_figures.runs(rows)
    assert list(found) == ["sheared", "lora-prune", "magnitude-shape", "scratch-shape"]
    assert [run["seed"] for run in found["sheared"]] == [0, 1, 2]
    assert sheared.loss_at(found["sheared"][0], 400) == pytest.approx(5.5)
    assert sheared.marks(found) == [250, 500, 750, 1000]
    late = {"sheared": [sheared_run("sheared", 0, [[300, 6.0], [1000, 5.0]])]}
    assert sheared.marks(found | late) == [500, 750, 1000]


def test_gaps_are_tested_over_seeds(rows):
    made = sheared.compared(sheared_figures.runs(rows), [("sheared", "scratch-shape")])
    last = made[-1]
    assert last["tokens"] == 1000 and last["gaps"] == pytest.approx([-0.5, -0.51, -0.52])
    half = t.ppf(0.975, 2) * 0.01 / 3**0.5
    assert (last["low"], last["high"]) == pytest.approx((-0.51 - half, -0.51 + half))
    assert last["p"] < 0.01


@pytest.mark.parametrize(
    "curve, other, expected",
    [
        ([[0, 5], [10, 4]], [[0, 9], [10, 5]], None),  # always behind
        ([[0, 5], [10, 4]], [[0, 9], [10, 3]], 8.0),  # 5 - 0.1 t against 9 - 0.6 t
        ([[4, 9], [10, 8]], [[0, 5], [10, 4]], 4.0),  # never behind: from the cut on
        ([[0, 5], [5, 5], [10, 5]], [[0, 4], [5, 6], [10, 4]], 7.5),  # the last time it catches up
    ],
)
def test_crossovers_by_hand(curve, other, expected):
    found = sheared.crossover(sheared_run("sheared", 0, curve), sheared_run("scratch-shape", 0, other))
    assert found == (expected if expected is None else pytest.approx(expected))


def test_a_model_from_scratch_that_has_collapsed_is_called_so(rows):
    assert "(collapsed" not in text_of(rows) and "says little yet" not in text_of(rows)
    for one in rows:
        if one["technique"] == "scratch-shape" and one["quality"]:
            one["quality"]["collapsed"] = "no better than the unigram model"
    text = text_of(rows)
    assert "(collapsed) |" in line_of(text, "| Target shape from scratch")
    assert "word counts at the end (collapsed): being ahead of it says little yet" in text
    assert "The model from scratch knows no more than word counts" in sheared.summary(rows)[0]


def test_a_way_that_is_never_ahead_is_behind_from_the_cut_on():
    several = [sheared_run("sheared", seed, [[4, 9], [10, 8]]) for seed in (0, 1)]
    others = [sheared_run("scratch-shape", seed, [[0, 5], [10, 4]]) for seed in (0, 1)]
    assert sheared.crossover_text(several, others) == "behind from scratch from the cut on in 2 of 2 seeds"


def test_one_seed_is_no_test(rows):
    text = text_of(sheared_rows((0,)))
    assert "after 1,000 tokens lower, one run of each (−0.50)" in line_of(text, "- Sheared by L0 masks")
    assert "in 1 of 1 seed" in text and "one seed, no test" in line_of(text, "| QLoRA")


def test_the_summary_says_first_and_last(rows):
    (said,) = sheared.summary(rows)
    assert (
        "By held-out loss, sheared by L0 masks: after 250 tokens better (−" in said
        and ", no crossover" in said
    )
    assert sheared.summary([row for row in rows if row["technique"] != "scratch-shape"]) == []


def test_a_target_shape_is_named_whole(rows):
    settings = {"layers": 3, "heads": 4, "hidden": 192, "ffn": 352, "adapters": "qlora"}
    assert wording.label("lora-prune", settings) == (
        "Cut by adapters' gradients, 4 of the heads, 352 of the channels, 192 of the hidden dimensions, 3 of "
        "the blocks, recovered by QLoRA"
    )


def test_the_comparison_leaves_out_models_from_scratch_and_the_report_holds_the_section(rows):
    kept = comparison.comparable_rows(rows)
    assert {row["technique"] for row in kept} == {"dense", "sheared", "lora-prune", "magnitude-shape"}
    assert {row["seed"] for row in kept} == {0} and len(kept) == 5
    assert "## 1. Sheared to a target shape" in build.render(rows, images="images", notebooks="notebooks")
