"""The decision is the one that the rows and the stated rules lead to, by hand and over a grid of budgets."""

import itertools
import json
import re
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace

import pytest

from lmcompress.errors import BadSetting
from lmcompress.results.labels import label, label_of
from lmcompress.results.rows import by_model_task
from lmcompress.results.store import RowStore, published_rows
from lmcompress.study import apply, decision, recipes
from lmcompress.study.decision import Budget, Option, decide, excess, spares
from lmcompress.study.study import Study
from tests.synthetic_rows import SHAPE, pruning_rows, row

MB = 1_000_000


def option(
    name, size, bound, *, selected=None, ms=None, loss=0.0, verdict="n.s.", listed=True, **more
) -> Option:
    times = {} if ms is None else {"b1": ms}
    ends = {"loss": loss, "loss_low": loss - 1, "loss_high": loss + 1, "unit": "points"}
    return Option(
        key=name, name=name, baseline=False, bytes=size, **ends, bound=bound, selection_bound=selected,
        verdict=verdict, trained=False, listed=listed, ms=times, ratio=dict(times), **more,
    )  # fmt: skip


DENSE = replace(option("Dense", 100, 0.0, ms=10.0, verdict="baseline"), baseline=True)
OPTIONS = [
    DENSE,
    option("half", 50, 0.004, ms=6.0),
    option("quarter", 25, 0.02, ms=12.0),
    option("tenth", 10, 0.2, ms=5.0, verdict="worse"),
    option("dead", 1, 0.001, ms=1.0, verdict="collapsed"),
    option("untimed", 20, 0.03, listed=False),
    option("unmeasured", None, 0.001),
    option("unbounded", 2, None),
]


def chosen(budget, options=OPTIONS):
    decided = decide(options, budget).chosen
    return decided and decided.name


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(margin=0.01), "half"),
        (Budget(margin=0.05), "untimed"),
        (Budget(margin=0.05, listed=True), "quarter"),
        (Budget(margin=0.5), "tenth"),
        (Budget(margin=0.05, shape="b1"), "half"),
        (Budget(margin=0.5, shape="b1"), "tenth"),
        (Budget(margin=0.05, shape="b1", max_ms=20), "quarter"),  # within a time the smallest
        (Budget(), "Dense"),  # no margin: the least loss
        (Budget(max_bytes=60), "half"),
        (Budget(max_bytes=60, max_ms=5.5, shape="b1"), "tenth"),
        (Budget(max_bytes=10, margin=0.05), None),
    ],
)
def test_the_cheapest_inside_the_margin_or_without_one_the_least_loss(budget, name):
    assert chosen(budget) == name


def test_the_selection_set_chooses_and_the_report_set_confirms():
    apart = [
        DENSE,
        option("kept", 40, 0.008, selected=0.009),
        option("lucky", 20, 0.03, selected=0.005),
        option("unlucky", 10, 0.001, selected=0.03),
    ]
    assert chosen(Budget(margin=0.01), apart) == "lucky"
    kept, lucky = apart[1:3]
    assert (kept.confirmed(0.01), lucky.confirmed(0.01), OPTIONS[1].confirmed(0.01)) == (True, False, None)
    words = {o.name: decision.standing(o, 0.01) for o in (*apart, OPTIONS[1])}
    assert words["kept"] == "confirmed on the report set"
    assert words["lucky"] == "not confirmed on the report set"
    assert words["half"] == "selected and reported on the same examples" and words["Dense"] == ""
    assert decision.standing(kept, None) == ""  # no loss was asked for: nothing to confirm
    asked = Budget(margin=0.0)
    none = decide([option("lucky", 20, 0.03, selected=-0.01)], asked)
    assert "not confirmed" in decision.explain(none, asked, count=1)  # a margin of 0 is a margin


def test_what_the_selection_set_did_not_score_is_not_chosen_and_equals_go_by_its_bound(committed):
    rows = [row for row in committed if row["model"] == "reference/minilm-sst2"]
    best = decide(decision.options(rows), Budget(margin=0.01, listed=True)).chosen
    without = [row | {"selection": None} if row["key"] == best.key else row for row in rows]
    assert decide(decision.options(without), Budget(margin=0.01, listed=True)).chosen.key != best.key
    tied = [DENSE, option("lucky", 20, 0.001, selected=0.009), option("safe", 20, 0.002, selected=0.008)]
    assert chosen(Budget(margin=0.01), tied) == "safe"


def test_equals_go_to_the_dense_model():
    assert chosen(Budget(margin=0.01), [option("same", 100, 0.0), DENSE]) == "Dense"
    assert chosen(Budget(margin=0.01, shape="b1"), [option("same", 100, 0.0, ms=10.0), DENSE]) == "Dense"


def test_where_nothing_fits_the_nearest_are_named_and_never_a_collapsed_one():
    asked = Budget(max_bytes=15, margin=0.05)
    nearest = decide(OPTIONS, asked)
    assert (nearest.chosen, nearest.least_loss.name, nearest.least_cost.name) == (None, "tenth", "untimed")
    text = decision.explain(nearest, asked, count=8)
    assert "nothing measured fits, of 8 configurations. Least loss within the cost: tenth (0.0 MB" in text
    assert "Least cost within the loss: untimed" in text
    nothing = decide(OPTIONS, Budget(max_bytes=5, margin=0.05))
    assert nothing.least_loss is None and excess(nothing.least_cost, Budget(max_bytes=5)) == 4


def test_memory_is_a_limit_of_its_own_and_what_was_not_weighed_never_fits_it():
    heavy, light = replace(OPTIONS[1], peak=900 * MB), replace(OPTIONS[2], peak=600 * MB)
    weighed = [replace(DENSE, peak=1000 * MB), heavy, light, option("unweighed", 1, 0.0)]
    assert chosen(Budget(max_peak=950 * MB, margin=0.05), weighed) == "quarter"
    assert chosen(Budget(max_peak=950 * MB, margin=0.01), weighed) == "half"
    assert chosen(Budget(max_peak=500 * MB, margin=0.05), weighed) is None
    assert ", 900 MB of memory;" in decision.described(heavy, Budget(max_peak=950 * MB))
    assert excess(light, Budget(max_peak=0)) == excess(light, Budget(max_bytes=0)) == float("inf")


@pytest.mark.parametrize(
    ("size", "margin", "ms"), itertools.product((None, 5, 20, 60), (None, 0.0, 0.01, 0.5), (None, 7.0, 11.0))
)
def test_whatever_is_chosen_is_within_every_limit_and_nothing_that_fits_is_cheaper(size, margin, ms):
    budget = Budget(size, ms, "b1" if ms else None, margin)
    decided = decide(OPTIONS, budget)
    fitting = [o for o in OPTIONS if excess(o, budget) <= 1 and spares(o, budget)]
    assert decided.fitting == fitting and bool(decided.chosen) == bool(fitting)
    assert all(o.verdict != "collapsed" and o.bound is not None for o in fitting)
    if decided.chosen:
        assert decision.cost(decided.chosen, budget) == min(decision.cost(o, budget) for o in fitting)


def test_a_time_at_a_shape_that_was_not_timed_is_an_error_that_lists_the_shapes():
    with pytest.raises(BadSetting, match="available: b1"):
        decide(OPTIONS, Budget(max_ms=1.0, shape="b9"))
    with pytest.raises(BadSetting, match="needs a shape .*timed: b1"):
        decide(OPTIONS, Budget(max_ms=1.0))


def timed_row(technique="cast", *, speed="faster", machine="a cpu", ratio=0.5, dense_ms=20.0, **changed):
    changed = {"settings": {"dtype": "bfloat16"}, "p": 0.8} | changed
    fast = row(technique, 0.899, **changed, key=f"{technique} on {machine} {changed['settings']}")
    ends = {"ratio": ratio, "ratio_low": ratio - 0.05, "ratio_high": ratio + 0.05, "dense_ms": dense_ms}
    fast["latency"] = fast["latency"] | {"shapes": {"batch1": SHAPE | ends}}
    fast["verdict"] = fast["verdict"] | {"latency": {"batch1": speed}}
    on = fast["provenance"]["machine"] | {"cpu": machine}
    return fast | {"provenance": fast["provenance"] | {"machine": on}}


def made_of(rows):
    return {o.name: o for o in decision.options(decision.comparable_rows(rows))}


def test_options_of_rows_by_hand():
    made = made_of([*pruning_rows(), timed_row()])
    dense, magnitude, cast = made["Dense"], made["Magnitude, per layer, 50 %"], made["BF16"]
    assert dense.baseline and dense.bytes == 4_000_100 and dense.bound == 0 and dense.ms == {"batch1": 10.0}
    assert magnitude.loss == pytest.approx(0.3)  # 0.9 to 0.897
    assert (magnitude.loss_low, magnitude.loss_high) == pytest.approx((-1.7, 2.3))
    assert magnitude.bound == pytest.approx((0.003 + 0.02 * 1.644854 / 1.959964) / 0.9, rel=1e-5)
    assert magnitude.ms == {"batch1": 10.0}  # 1.01 is no measurable change, and counts as 1
    # The slower end, times the dense median of many runs, not the 20 ms of its own.
    assert cast.ratio == pytest.approx({"batch1": 0.55}) and cast.ms == pytest.approx({"batch1": 5.5})
    assert (magnitude.listed, made["Random, 50 %"].listed, cast.listed) == (True, False, True)
    assert made["Random, 90 %"].verdict == "collapsed" and made["Random, 90 %"].bound is None
    # The control, dense trained further, compresses nothing.
    assert "Dense + recovery (30 steps)" not in made


def test_sizes_are_those_of_written_files_and_never_of_a_counted_encoding():
    rows = pruning_rows()
    for scored in rows:
        if scored["memory"]:
            scored["memory"]["formats"]["bitmask"] = 1
    assert {o.bytes for o in made_of(rows).values()} == {4_000_100}


def test_times_taken_on_another_machine_do_not_count():
    rows = [r for r in pruning_rows() if not (r["latency"] and r["technique"] != "dense")]
    home = [timed_row(settings={"dtype": kind}, ratio=0.9) for kind in ("bfloat16", "float16")]
    away = timed_row("nf4", settings={}, machine="another cpu", ratio=0.1, dense_ms=99.0)
    made = made_of([*rows, *home, away])
    assert made["NF4"].ms == made["NF4"].ratio == {} and made["NF4"].machine == "another cpu"
    assert made["NF4"].other_ratio == {"batch1": pytest.approx(0.15)}
    assert made["BF16"].machine == "a cpu" and made["Dense"].ms == {"batch1": 20.0}
    unlisted = [timed_row("rtn", settings={"bits": bits}, machine="another cpu") for bits in (2, 3, 5)]
    made = made_of([*rows, home[0], *unlisted])  # most of the listed ones decide, not most of all
    assert made["BF16"].ms and not made["RTN, 3 bits, per-channel"].ms


def test_a_rise_of_perplexity_is_a_loss_in_its_own_unit():
    worse = row("wanda", 22.0, sparsity=0.5, p=0.001, metric="perplexity")
    worse["quality"]["difference"] |= {"value": 2.0, "low": 1.5, "high": 2.5}
    made = decision.options([row(value=20.0, metric="perplexity"), worse])[1]
    assert (made.loss, made.loss_low, made.loss_high, made.unit) == (2.0, 1.5, 2.5, "of perplexity")
    assert decision.loss_text(made) == "+2.00 PPL [+1.50, +2.50]"
    points = option("a", 1, 0.0, loss=0.5)
    assert decision.loss_text(points) == "−0.50 pp [−1.50, +0.50]" and decision.loss_text(DENSE) == "dense"


def test_a_loss_asked_for_is_a_share_or_in_the_unit_of_the_metric():
    accuracy, perplexity = row(), row(value=20.0, metric="perplexity")
    assert decision.margin_of("1%", accuracy) == decision.margin_of(" 1 %", perplexity) == 0.01
    assert decision.margin_of("0.9", accuracy) == pytest.approx(0.01)  # points of 90
    assert (
        decision.margin_of("0.2", perplexity) == pytest.approx(0.01) and decision.margin_of(None, {}) is None
    )
    for wrong in ("-1", "much", "nan", "inf", "%"):
        with pytest.raises(BadSetting, match="1%, or a number in the metric's unit"):
            decision.margin_of(wrong, accuracy)
    with pytest.raises(BadSetting, match="not above 0"):
        decision.margin_of("1%", row(value=0.0, metric="bleu"))


def test_a_shape_that_one_model_was_not_timed_at_does_not_stop_the_others():
    other = [scored | {"latency": None, "model": "other/encoder"} for scored in pruning_rows()]
    answers = dict(decision.answers(pruning_rows() + other, Budget(shape="batch1", max_ms=1e9)))
    assert answers["other/encoder on some-task: no time measured at 'batch1'; available: none"] is False
    assert sorted(answers.values()) == [False, True]
    with pytest.raises(BadSetting, match="no time measured at"):
        decision.answers(pruning_rows() + other, Budget(shape="batch9"))


def test_the_command_line_answers_from_rows_on_disk(tmp_path, capsys):
    rows, store = pruning_rows(), RowStore(tmp_path)
    small = row("nf4", 0.899, p=0.8)
    small["memory"]["file_bytes"] = MB
    small["quality"]["difference"] |= {"low": -0.003, "high": 0.001}
    for scored in [*rows, small]:
        store.append(scored)
    asked = ["--results", str(tmp_path), "--model", "encoder"]
    assert decision.main([*asked, "--max-mb", "2", "--max-loss", "1%"]) == 0
    assert "some/encoder on some-task: use NF4 (1.0 MB; −0.10 pp" in capsys.readouterr().out
    assert decision.main([*asked, "--max-loss", "1%"]) == 0
    assert "of 4 measured configurations fit" in capsys.readouterr().out  # those listed, and the dense one
    assert decision.main([*asked, "--max-loss", "1%", "--all"]) == 0
    count = len(decision.options(decision.comparable_rows(RowStore(tmp_path).rows())))
    assert count > 4 and f"of {count} measured configurations fit" in capsys.readouterr().out
    assert decision.main([*asked, "--max-mb", "0.01"]) == 1
    assert "nothing measured fits" in capsys.readouterr().out
    assert decision.main(["--results", str(tmp_path), "--model", "nobody"]) == 2
    assert "available: some/encoder on some-task" in capsys.readouterr().err


# The committed rows.


@pytest.fixture(scope="module")
def committed():
    return decision.comparable_rows(published_rows())


@pytest.fixture(scope="module")
def grouped(committed):
    return {pair: (rows, decision.options(rows)) for pair, rows in by_model_task(committed).items()}


def test_the_bound_of_every_committed_option_by_hand(grouped):
    normal, compared = NormalDist(), 0
    for rows, options in grouped.values():
        by_key = {scored["key"]: scored for scored in rows}
        dense = by_key[options[0].key]["quality"]["value"]
        for made in options[1:]:
            quality = by_key[made.key]["quality"]
            sign = -1 if quality["higher_is_better"] else 1
            change = quality["difference"]
            selected = by_key[made.key].get("selection")
            apart = any(row.get("selection") for row in rows if row["technique"] != "dense")
            if quality["collapsed"] or (selected or quality)["collapsed"] or (apart and not selected):
                assert made.bound is None and made.chosen_by is None
                continue
            worst = change["low"] if sign == -1 else change["high"]
            errors = abs(worst - change["value"]) / normal.inv_cdf(0.975)
            bound = change.get("bound", sign * change["value"] + normal.inv_cdf(0.95) * errors)
            assert made.bound == pytest.approx(bound / dense, rel=1e-9, abs=1e-12)
            assert made.bytes == by_key[made.key]["memory"]["file_bytes"]
            compared += 1
    assert compared > 300


def test_the_command_and_the_options_agree_on_every_committed_model(committed, grouped):
    names = {name for _, options in grouped.values() for o in options for name in o.ms}
    for size, margin, shape in itertools.product((None, 4e6, 20e6), (0, 1, 5), (None, *sorted(names)[:3])):
        budget = Budget(max_bytes=size, shape=shape, listed=True)
        sentences = dict(decision.answers(committed, budget, max_loss=f"{margin}%"))
        assert len(sentences) == len(grouped)
        for (pair, (_, options)), (sentence, fits) in zip(grouped.items(), sentences.items()):
            if shape and shape not in options[0].ms:
                assert "no time measured" in sentence and not fits
                continue
            asked = replace(budget, margin=margin / 100)
            best = decide(options, asked).chosen
            assert fits == (best is not None) and sentence.startswith(f"{pair[0]} on {pair[1]}: ")
            assert best is None or f"use {decision.described(best, asked)}" in sentence


def test_a_listed_row_is_what_the_list_says(committed):
    def named(steps):
        if len(steps) > 1:
            given = [
                step | {"recovery": {"steps": 9, **step["recovery"]}} if "recovery" in step else step
                for step in steps
            ]
            return untrained(label("chain", {"steps": given}))
        settings = {name: setting for name, setting in steps[0].items() if name != "recovery"}
        return label(settings["technique"], settings)

    def untrained(text):
        return re.sub(r"( \+ recovery)? \([\d,]+ steps?\)", "", text)

    places = [(decision.configuration_of(scored), scored) for scored in committed]
    listed = [(place, scored) for place, scored in places if place is not None]
    assert len({place for place, _ in listed}) == len(decision.configurations())
    names = [named(steps) for steps in decision.configurations()]
    assert [label_of(scored) for place, scored in listed if untrained(label_of(scored)) != names[place]] == []
    asked_once = [
        (r["model"], place) for place, r in listed if not {"recovery", "training"} & {*r["settings"]}
    ]
    assert len(set(asked_once)) == len(asked_once)
    # Of training each budget (its rates, too) and each seed is a row of its own
    budgets = [(r["model"], r["technique"], str(r["settings"]), r["seed"]) for _, r in listed]
    assert len(set(budgets)) == len(budgets) > len(asked_once)


def test_every_committed_configuration_applies_by_its_key(committed):
    """Its recipe, measured again, has the settings that the key is made of."""
    for scored in committed:
        if scored["technique"] == "dense":
            continue
        steps = recipes.of_row(scored)
        alone = recipes.as_one(steps)
        if scored["technique"] == "chain":
            assert alone is None and steps == json.loads(json.dumps(scored["settings"]["steps"]))
            continue
        settings = {
            n: s if isinstance(s, dict | list) or not hasattr(s, "settings") else s.settings()
            for n, s in alone.items()
        }
        assert settings.pop("technique") == scored["technique"]
        assert settings == scored["settings"]


def test_a_key_that_no_row_has_is_refused(tmp_path, capsys):
    RowStore(tmp_path).append(row())
    asked = ["0" * 16, "--results", str(tmp_path), "--save", str(tmp_path / "made")]
    assert apply.main(asked) == 1
    assert f"no row has the key {'0' * 16}" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "seed"), [([], 3), (["--seed", "0"], 0)])
def test_a_key_is_applied_with_its_rows_seed_unless_another_is_given(
    options, seed, tmp_path, capsys, monkeypatch
):
    def measured(steps, *, seed, **how):
        raise BadSetting(f"measured with seed {seed}")

    monkeypatch.setattr(Study, "baseline", lambda *_, **how: SimpleNamespace(measure_recipe=measured))
    RowStore(tmp_path).append(published := row("magnitude-layer", sparsity=0.5, p=0.1, seed=3))
    places = ["--results", str(tmp_path), "--save", str(tmp_path / "m"), "--output", str(tmp_path / "o")]
    assert apply.main([published["key"], *places, *options]) == 1
    assert f"measured with seed {seed}" in capsys.readouterr().err
