"""The decision is the one that the rows and the stated rules lead to, by hand."""

import itertools
from dataclasses import replace

import pytest

from helpers.report import comparison
from lmcompress.errors import BadSetting
from lmcompress.results.store import RowStore
from lmcompress.study import decision, explain
from lmcompress.study.decision import Budget, Option, decide, excess, spares
from tests.synthetic_rows import SHAPE, pruning_rows, row

MB = 1_000_000


def way(name, size, loss, *, half=1.0, ms=None, safe=True, verdict="no measurable change") -> Option:
    return Option(
        key=name, name=name, baseline=False, bytes=size, form="dense", loss=loss, loss_low=loss - half,
        loss_high=loss + half, unit="points", verdict=verdict, safe=safe, ms={} if ms is None else {"b1": ms},
    )  # fmt: skip


DENSE = Option("dense", "Dense", True, 100, "dense", 0.0, 0.0, 0.0, "points", "baseline", True, {"b1": 10.0})
WAYS = [
    DENSE,
    way("half", 50, 0.1, ms=6.0),  # at worst 1.1
    way("quarter", 25, 0.8, ms=12.0),  # at worst 1.8
    way("tenth", 10, 3.5, ms=5.0, safe=False, verdict="worse"),  # at worst 4.5
    way("dead", 1, 40.0, ms=1.0, safe=False, verdict="collapsed"),
    way("untimed", 20, 0.9),
]


def names(options):
    return [option.name for option in options]


def test_what_cannot_be_told_from_the_best_goes_to_the_smallest():
    found = decide(WAYS, Budget())
    assert found.chosen.name == "untimed" and names(found.fitting) == ["Dense", "half", "quarter", "untimed"]
    assert names(found.tied) == names(found.fitting)  # 0.9 - 1.0 reaches the dense model's 0


def test_a_way_whose_whole_interval_is_worse_than_the_best_is_no_equal():
    sharp = [DENSE, way("small", 10, 0.5, half=0.1), way("half", 50, 0.0, half=0.1)]
    found = decide(sharp, Budget(max_bytes=100, max_loss=1.0))
    assert names(found.fitting) == ["Dense", "small", "half"] and found.chosen.name == "half"
    assert decide(sharp, Budget(max_bytes=20, max_loss=1.0)).chosen.name == "small"


def test_the_loss_counted_is_the_unfavourable_end_unless_the_estimate_is_asked_for():
    assert decide(WAYS, Budget(max_bytes=30, max_loss=1.0)).chosen is None
    assert decide(WAYS, Budget(max_bytes=30, max_loss=1.0, count="estimate")).chosen.name == "untimed"
    assert decide(WAYS, Budget(max_bytes=15, max_loss=4.5)).chosen.name == "tenth"


def test_memory_is_a_limit_of_its_own_and_what_was_not_weighed_never_fits_it():
    heavy, light = replace(WAYS[1], peak=900 * MB), replace(WAYS[2], peak=600 * MB)
    ways = [replace(DENSE, peak=1000 * MB), heavy, light, way("unweighed", 1, 0.0)]
    assert decide(ways, Budget(max_peak=950 * MB, max_loss=2.0)).chosen.name == "quarter"
    found = decide(ways, Budget(max_peak=950 * MB, max_loss=1.2))
    assert found.chosen.name == "half" and names(found.fitting) == ["half"]
    assert ", 900 MB of memory;" in explain.described(heavy, Budget(max_peak=950 * MB))
    assert "of memory" not in explain.described(heavy, Budget())
    nothing = decide(ways, Budget(max_peak=500 * MB, max_loss=2.0))
    assert nothing.chosen is None and nothing.least_cost.name == "quarter"
    assert excess(light, Budget(max_peak=0)) == excess(light, Budget(max_bytes=0)) == float("inf")


def test_of_time_alone_the_fastest_and_an_untimed_way_never_fits_it():
    assert decide(WAYS, Budget(shape="b1")).chosen.name == "half"
    found = decide(WAYS, Budget(max_ms=11.0, shape="b1"))
    assert names(found.fitting) == ["Dense", "half"] and found.chosen.name == "half"
    assert decide(WAYS, Budget(max_bytes=60, max_ms=20.0, shape="b1")).chosen.name == "quarter"


def test_where_nothing_fits_the_nearest_are_named_and_the_dead_never_are():
    found = decide(WAYS, Budget(max_bytes=15))
    assert found.chosen is None and found.least_loss.name == "tenth" and found.least_cost.name == "untimed"
    text = explain.explain(found, Budget(max_bytes=15), count=len(WAYS))
    assert (
        "nothing measured fits, of 6 ways" in text
        and "tenth (0.0 MB; loses 3.50 points, at worst 4.50)" in text
    )
    none = decide(WAYS, Budget(max_bytes=5))
    assert none.least_loss is None and none.least_cost.name == "untimed"
    assert excess(none.least_cost, Budget(max_bytes=5)) == 4


@pytest.mark.parametrize(
    "size, loss, ms", itertools.product((None, 5, 20, 60), (None, 1.5, 5.0), (None, 7.0, 11.0))
)
def test_whatever_is_chosen_is_within_every_limit_and_no_smaller_equal_is(size, loss, ms):
    budget = Budget(size, ms, "b1" if ms else None, loss)
    found = decide(WAYS, budget)
    for option in found.fitting:
        assert excess(option, budget) <= 1 and spares(option, budget) and option.verdict != "collapsed"
    if found.chosen:
        assert found.chosen in found.tied and all(o in found.fitting for o in found.tied)
        mine = decision.cost(found.chosen, budget)
        assert all(mine <= decision.cost(option, budget) for option in found.tied)
    else:
        assert not any(excess(o, budget) <= 1 and spares(o, budget) for o in WAYS)


def test_a_time_at_a_shape_that_was_not_timed_is_an_error_that_lists_the_shapes():
    with pytest.raises(BadSetting, match="available: b1"):
        decide(WAYS, Budget(max_ms=1.0, shape="b9"))
    with pytest.raises(BadSetting, match="needs a shape .*timed: b1"):
        decide(WAYS, Budget(max_ms=1.0))


def test_a_shape_that_one_model_was_not_timed_at_does_not_stop_the_others():
    other = [one | {"latency": None, "model": "other/encoder"} for one in pruning_rows()]
    answers = dict(decision.answers(pruning_rows() + other, Budget(shape="batch1", max_ms=1e9)))
    assert answers["other/encoder on some-task: no time measured at 'batch1'; available: none"] is False
    assert sorted(answers.values()) == [False, True]
    with pytest.raises(BadSetting, match="no time measured at"):
        decision.answers(pruning_rows() + other, Budget(shape="batch9"))


def test_options_of_rows_by_hand():
    rows = pruning_rows()[:-3]
    fast = row("cast", 0.899, p=0.8)
    shape = SHAPE | {"ratio": 0.5, "ratio_low": 0.45, "ratio_high": 0.55, "dense_ms": 20.0}
    fast["latency"] = fast["latency"] | {"shapes": {"batch1": shape}}
    fast["verdict"] = fast["verdict"] | {"latency": {"batch1": "faster"}}
    made = {o.name: o for o in decision.options(decision.comparable_rows([*rows, fast]))}
    dense, magnitude, cast = made["Dense"], made["Magnitude, per layer, 50 %"], made["Half precision"]
    assert dense.baseline and dense.bytes == 4 * MB and dense.safe and dense.ms == {"batch1": 10.0}
    assert magnitude.loss == pytest.approx(0.3) and magnitude.safe  # 0.9 to 0.897
    assert (magnitude.loss_low, magnitude.loss_high) == pytest.approx((-1.7, 2.3))
    assert magnitude.ms == {"batch1": 10.0}  # 1.01 is no measurable change, and counts as 1
    assert cast.ms == pytest.approx(
        {"batch1": 5.5}
    )  # the slower end, times the dense median of many runs, not 20
    assert made["Random, 90 %"].verdict == "collapsed" and not made["Wanda, 2:4"].safe


def test_a_rise_of_perplexity_is_a_loss_in_its_own_unit():
    worse = row("wanda", 22.0, sparsity=0.5, p=0.001, metric="perplexity")
    worse["quality"]["difference"] |= {"value": 2.0, "low": 1.5, "high": 2.5}
    made = decision.options([row(value=20.0, metric="perplexity"), worse])[1]
    assert (made.loss, made.loss_low, made.loss_high) == (2.0, 1.5, 2.5)
    assert made.unit == "of perplexity" and not made.safe
    assert explain.loss_text(made) == "loses 2.00 of perplexity, at worst 2.50"


def test_a_loss_that_few_examples_cannot_show_is_safe_only_within_the_tolerated_share():
    wide, narrow = row("cast", 0.895, p=0.8), row("wanda", 0.895, sparsity=0.5, p=0.8)
    wide["quality"]["difference"] |= {"value": -0.005, "low": -0.06, "high": 0.05}  # 5 % of 0.9 is 4.5 points
    narrow["quality"]["difference"] |= {"value": -0.005, "low": -0.04, "high": 0.03}
    made = {one.name: one for one in decision.options([row(), wide, narrow])}
    assert made["Half precision"].verdict == "no measurable change" and not made["Half precision"].safe
    assert made["Wanda, 50 %"].safe


def test_the_dense_model_trained_further_is_no_compression():
    rows = pruning_rows()
    control = [r for r in rows if r["technique"] == "dense" and r["settings"].get("recovery")]
    assert control and not [r for r in decision.comparable_rows(rows) if r["key"] == control[0]["key"]]


def test_the_table_says_what_to_use_and_where_nothing_fits():
    rows = decision.comparable_rows(pruning_rows())
    text = comparison.decision_table(rows)
    half = next(line for line in text.splitlines() if line.startswith("| 50 % of the bytes (2.0 MB)"))
    assert (
        "Magnitude, per layer, 90 % + recovery" in half
        and "CSR, int32" in half
        and "89.9 % [87.9, 91.9]" in half
    )
    assert "of the time" not in text  # nothing timed is faster than dense
    sparse = next(one for one in rows if one["settings"].get("recovery") and one["technique"] != "dense")
    sparse["quality"]["difference"] |= {"low": -0.9, "p": 0.001}  # far too uncertain for any budget
    text = comparison.decision_table(rows)
    assert "15 % of the bytes (0.6 MB) | nothing measured fits; the lowest cost at the loss allowed: " in text
    assert "(1.0 MB) | nothing measured fits; the least loss at this cost: " in text
    assert "\n| ″ | the lowest cost at the loss allowed: " in text
    for one in rows:
        if one["technique"] != "dense":
            one["quality"]["difference"] |= {"low": -0.9, "high": 0.9, "p": 0.9}  # nothing can be relied on
            one["memory"]["formats"] = {"dense": 4 * MB}
    assert "nothing measured fits, and nothing comes near" in comparison.decision_table(rows)


def test_costs_with_the_same_answer_share_a_line():
    a, b = [["a", "1"]], [["b", "2"], ["c", "3"]]
    asked = [("50 %", a), ("25 %", a), ("15 %", b), ("time", a)]
    assert comparison._merged(asked) == [("50 %<br>25 %", a), ("15 %", b), ("time", a)]


def test_where_only_a_measurable_loss_fits_one_within_the_tolerated_share_is_named():
    small = row("cast", 0.88, p=0.001)  # worse by 2 points, at worst 4; 5 % of 0.9 is 4.5 points
    small["memory"]["formats"] = {"dense": 1_000_000}
    own = decision.comparable_rows([row(), row("random", 0.6, p=1e-9, sparsity=0.5), small])
    (_, found, budget), *_ = comparison.answers(own)
    assert found.chosen.name == "Half precision" and budget.max_loss == pytest.approx(4.5)
    small["quality"]["difference"]["low"] = -0.05
    assert comparison.answers(own)[0][1].chosen is None


def test_the_command_line_answers_from_rows_on_disk(tmp_path, capsys):
    store = RowStore(tmp_path)
    for one in pruning_rows():
        store.append(one)
    asked = ["--results", str(tmp_path), "--model", "encoder"]
    assert decision.main([*asked, "--max-mb", "2"]) == 0
    assert "some/encoder on some-task: use Magnitude, per layer, 90 % + recovery" in capsys.readouterr().out
    assert decision.main([*asked, "--max-mb", "0.01"]) == 1
    assert "nothing measured fits" in capsys.readouterr().out
    assert decision.main(["--results", str(tmp_path), "--model", "nobody"]) == 2
    assert "available: some/encoder on some-task" in capsys.readouterr().err


def test_a_loss_allowed_without_a_limit_of_cost_buys_the_cheapest():
    sharp = [DENSE, way("small", 10, 0.5, half=0.1), way("half", 50, 0.0, half=0.1)]
    assert decide(sharp, Budget(max_loss=1.0)).chosen.name == "small"
    assert (
        decide(sharp, Budget(max_bytes=60, max_loss=1.0)).chosen.name == "half"
    )  # best first, then the smaller equal


def test_losses_in_words():
    words = explain.loss_text
    assert words(way("a", 1, 0.5, half=1.0)) == "loses 0.50 points, at worst 1.50"
    assert words(way("a", 1, -0.5, half=1.0)) == "is better by 0.50 points, at worst loses 0.50"
    assert words(way("a", 1, -2.0, half=1.0)) == "is better by 2.00 points, at worst 1.00"
    assert words(DENSE) == "the dense model itself"
