"""The report's opening, its challenges and its cards say what the rows say, and turn round with them."""

from collections import Counter

from helpers.report import build, cards, challenges, comparison, opening, structured, wording
from helpers.report.cards import Card, Figures
from lmcompress.results.verdicts import adjusted, less_likely, likelihood_of, without_loss
from lmcompress.study import decision
from tests.synthetic_rows import (
    SHAPE,
    compared,
    distillation_rows,
    key_of,
    moefication_rows,
    pruning_rows,
    row,
)

TITLES = {"02_pruning": "Unstructured pruning", "05_quantization": "Quantization"}


def fast_row(value=0.899, *, p=0.8, ratio=0.5, verdict="faster", notebook="05_quantization") -> dict:
    made = row("cast", value, p=p, notebook=notebook)
    shape = SHAPE | {"ratio": ratio, "ratio_low": ratio - 0.05, "ratio_high": ratio + 0.05}
    made["latency"] = made["latency"] | {"shapes": {"batch1": shape}}
    made["verdict"] = made["verdict"] | {"latency": {"batch1": verdict}}
    return made


def test_the_opening_names_the_smallest_and_the_fastest_and_where_they_came_from():
    table, said = opening.summary([*pruning_rows(), fast_row()], TITLES)
    line = table.splitlines()[2]
    assert line.startswith(
        "| some/encoder, some-task: 4.0 MB, accuracy 90.0 % [88.0, 92.0] | none measurable |"
    )
    assert "Magnitude, per layer, 90 % + recovery" in line and "Half precision: 0.55 (batch 1)" in line
    assert "Of 8 compressed models, on 1 pair of model and task: " in said and "1 has collapsed" in said
    assert "smallest file to rely on came from unstructured pruning in 1 of 1 pair of model" in said
    assert "shortest time to rely on came from Half precision in 1 of 1 case. A case" in said
    assert "Its share of the dense bytes: " in said and "The dense models have 1.0 million parameters" in said


def test_where_nothing_was_smaller_or_faster_the_opening_says_so_and_what_was_timed():
    slow = fast_row(ratio=1.4, verdict="slower")
    table, said = opening.summary([*pruning_rows(), slow], TITLES)
    assert "none faster than dense; timed: unstructured pruning and quantization only" in table
    assert "- In 1 of 1 nothing faster than dense could be relied on. A case is a model" in said
    assert "Other number formats" not in said  # they were timed on the one model there is
    assert "backends were timed on none of 1 pair." in opening.summary(pruning_rows(), TITLES)[1]
    many = opening._speed(Counter(A=3, B=1), 6)
    assert many.startswith(
        "The shortest time to rely on came from A in 3 and B in 1 of 6 cases; in 2 nothing faster"
    )
    mixed = opening._origins(Counter(A=3, B=1), 6, "smaller", "6 pairs")
    assert mixed == "a in 3 of 6 pairs, from b in 1; in 2 nothing smaller than dense could be relied on"


def test_a_technique_measured_again_by_a_later_notebook_counts_where_it_is_at_home():
    rows = [*pruning_rows(), fast_row(0.895), fast_row(0.899, notebook="10_combinations")]
    titles = TITLES | {"10_combinations": "Combinations"}
    assert opening.sections_of(rows, titles)["cast"] == "Quantization"
    rows[-1]["memory"] = rows[-1]["memory"] | {"formats": {"dense": 10}}
    assert "file to rely on came from quantization in 1 of 1" in opening.summary(rows, titles)[1]


def test_what_few_examples_cannot_show_is_not_relied_on_though_no_change_is_measurable():
    rows = pruning_rows()
    for one in rows:
        if one["technique"] != "dense" and one["quality"] and one["quality"]["difference"]:
            one["quality"]["difference"] |= {"value": 0.0, "low": -0.2, "high": 0.2, "p": 0.9}
    table, said = opening.summary(rows, TITLES)
    assert "none to rely on: of 6 smaller ways that cannot be told from dense" in table
    assert "came from no technique: in 1 pair of model and task nothing smaller than dense could be" in said


def with_likelihood(one: dict, value=0.31, *, rise=0.04, p=0.002) -> dict:
    """The row with the cross-entropy beside its accuracy, this much above the dense model's."""
    difference = {"value": rise, "low": rise - 0.01, "high": rise + 0.01, "p": p, "test": "exact", "n": 200}
    part = {"value": value, "low": value - 0.05, "high": value + 0.05, "difference": difference}
    one["quality"]["secondary"] = {"macro_f1": {"value": 0.9, "low": 0.8, "high": 1.0}, "cross_entropy": part}
    return one


def test_what_makes_the_right_answers_less_likely_is_not_relied_on_though_the_accuracy_stands():
    rows = [*pruning_rows(), fast_row(0.9)]
    smallest = next(r for r in rows if r["settings"].get("sparsity") == 0.9 and r["settings"].get("recovery"))
    with_likelihood(rows[-1], rise=0.001, p=0.6)
    before, _ = opening.summary(rows, TITLES)
    with_likelihood(smallest)
    table, said = opening.summary(rows, TITLES)
    first, second = table.splitlines()[2:4]
    assert "90 % + recovery" in before.splitlines()[2] and "90 % + recovery" not in first
    assert "90 % + recovery" in second and "; cross-entropy from 0.270 to 0.310 |" in second
    assert "; to 1 the right answers are less likely" in said
    (told,) = found(rows, "A score that stands still can hide a loss")
    assert "less likely in 1 of 2 on some-task (some/encoder, cross-entropy beside accuracy)" in told
    assert "| 1 | 1 | 0 | 0 |" in comparison.verdict_table(
        decision.comparable_rows(rows)
    )  # 1 unmeasurable, of these 1 less likely
    assert (
        "no measurable change (−0.10 points [−2.10, +1.90]); cross-entropy from 0.270 to 0.310 |"
        in " ".join(comparison.findings(rows))
    )
    with_likelihood(smallest, rise=0.02, p=0.04)  # measurable alone, not among two
    rows[-1]["quality"]["secondary"]["cross_entropy"]["difference"]["p"] = 0.04
    assert opening.summary(rows, TITLES)[0].splitlines()[2] == first
    assert found(rows, "No loss was found under a score that stood still")
    with_likelihood(smallest, rise=-0.04)
    assert opening.summary(rows, TITLES)[0] == before


def test_the_fastest_says_what_it_costs_the_right_answers():
    rows = [*pruning_rows(), with_likelihood(fast_row(0.88, p=0.001))]
    second = opening.summary(rows, TITLES)[0].splitlines()[3]
    assert "Half precision: 0.55 (batch 1), cross-entropy from 0.270 to 0.310 |" in second


def test_a_loss_of_likelihood_counts_by_its_own_interval_and_is_measurable_within_a_model_and_task():
    rows = [with_likelihood(row("wanda", 0.899, sparsity=s, p=0.8), p=0.02) for s in (0.1, 0.2, 0.3)]
    verdicts = adjusted(rows)
    assert less_likely(rows) == set() and without_loss(rows, verdicts) == []
    alone = with_likelihood(row("wanda", 0.899, sparsity=0.1, p=0.8, model="another"), p=0.02)
    assert less_likely([*rows, alone]) == {alone["key"]}
    assert wording.likelihood_loss(alone) == "cross-entropy from 0.270 to 0.310"
    assert wording.if_only(rows, verdicts).endswith("or in how likely the right answers are")
    lost = with_likelihood(row("wanda", 0.7, sparsity=0.1, p=0.001))  # the score shows it, too
    assert wording.if_only([lost], adjusted([lost])) == "if only in its own interval"
    slight = with_likelihood(row("wanda", 0.899, sparsity=0.1, p=0.8), rise=0.005, p=0.4)
    assert without_loss([slight], adjusted([slight])) == [slight]
    slight["quality"]["secondary"]["cross_entropy"]["difference"] = None  # not finite: no proof of no loss
    assert wording.likelihood_loss(slight) == "cross-entropy not defined"
    assert less_likely([slight]) == {slight["key"]} and without_loss([slight], {}) == []
    unrecorded = row("wanda", 0.899, sparsity=0.1, p=0.8)
    assert likelihood_of(unrecorded) is None and wording.likelihood_loss(unrecorded) == ""


def test_the_table_of_all_rows_says_how_likely_the_right_answers_are_where_that_is_recorded():
    dense, same = row(), with_likelihood(row("wanda", 0.899, sparsity=0.1, p=0.8), 0.272, rise=0.002, p=0.6)
    worse, gone = (
        with_likelihood(row("wanda", 0.89, sparsity=0.5, p=0.8)),
        row("random", 0.5, sparsity=0.9, p=0.001),
    )
    gone["quality"]["secondary"] = {
        "cross_entropy": {"value": None, "low": None, "high": None, "difference": None}
    }
    dense["quality"]["secondary"] = {"cross_entropy": {"value": 0.27, "low": 0.2, "high": 0.3}}
    others = [same, worse, gone]
    lines = structured.rows_table(dense, others, adjusted(others)).splitlines()[2:-2]
    ends = [line.split(" | ")[-1] for line in lines]
    assert ends == ["cross-entropy |", "--- |", "0.270 |", "0.272 |", "0.310, worse |", "not defined |"]
    assert "cross-entropy" not in structured.rows_table(row(), [row("wanda", 0.8, p=0.1)], {})
    seeds = [
        with_likelihood(row("distil", 0.9, p=0.8, seed=n), 0.3 + 0.1 * n, p=p)
        for n, p in ((0, 0.001), (1, 0.9))
    ]
    seeds[1]["key"] += "1"
    assert wording.likelihood_column(dense, [seeds, [same]])[2:] == ["0.350, worse in 1 of 2", "0.272"]


def test_a_loss_allowed_has_a_line_of_its_own_only_where_it_buys_something():
    rows = [*pruning_rows(), fast_row(0.88, p=0.001)]  # 2 points worse, at worst 4: within 5 % of 90
    table, _ = opening.summary(rows, TITLES)
    first, second = table.splitlines()[2:4]
    assert "none to rely on that is faster" in first
    assert "or at worst 4.5 points" in second and "Half precision: 0.55" in second
    assert len(opening.summary(pruning_rows(), TITLES)[0].splitlines()) == 3


def test_without_anything_to_choose_from_the_opening_is_empty():
    assert opening.summary([row()], TITLES) == []


def found(rows, start):
    return [one for one in challenges.sentences(rows) if one.startswith(f"**{start}")]


def test_zeros_that_do_not_help_and_zeros_that_do():
    rows = pruning_rows()
    assert "faster in 0 of 7 shapes" in found(rows, "A zero is not skipped")[0]
    for one in rows:
        if one["technique"] in challenges.ZEROING and one["latency"]:
            one["verdict"] = one["verdict"] | {"latency": {"batch1": "faster"}}
    assert found(rows, "Zeros were skipped") and not found(rows, "A zero is not skipped")
    again = [
        *rows,
        *({**one, "notebook": "00_start_here", "key": f"again-{i}"} for i, one in enumerate(rows)),
    ]
    assert "faster in 7 of 7 shapes" in found(again, "Zeros were skipped")[0]  # recorded twice, counted once
    assert not found([row(), fast_row()], "A zero") + found([row(), fast_row()], "Zeros")


def test_students_from_random_weights_that_collapse_and_that_do_not():
    rows = distillation_rows()
    (said,) = found(rows, "A student did better from its teacher's weights")
    assert "copied blocks 0 of" in said and "random weights 2 of 2" in said
    for one in rows:
        one["quality"] = one["quality"] and one["quality"] | {"collapsed": None}
    assert found(rows, "A student can start from nothing")
    assert found(rows, "A teacher rarely beats the labels")
    other, third = ([one | {"model": name} for one in distillation_rows()] for name in ("other", "third"))
    for own, value in ((other, 0.05), (third, -0.05)):
        for one in (one for one in own if one["technique"] == "paired-difference"):
            one["achieved"]["difference"] |= {
                "value": value,
                "low": value - 0.01,
                "high": value + 0.01,
                "p": 1e-6,
            }
    (said,) = found([*other, *third], "Whether a teacher beats the labels depends on the model")
    assert "better with other" in said and "worse with third" in said
    assert found(other, "A teacher beats the labels")
    assert found(
        [*rows, *third], "A teacher rarely beats the labels"
    )  # undecided here, worse there: no order


def test_experts_slower_and_faster_than_dense():
    rows = moefication_rows()
    assert "slower than dense in 1 of 1 time: " in found(rows, "Work left out is not time saved")[0]
    for one in rows:
        if one["technique"] == "moefy" and one["latency"]:
            one["verdict"]["latency"] = {"batch1": "faster"}
    assert found(rows, "Work left out was time saved")


def test_quantized_models_that_are_slower_are_named_with_their_ratio():
    slow = fast_row(ratio=1.4, verdict="slower")
    (said,) = found([*pruning_rows(), slow], "Fewer bytes are not always")
    assert "1 was slower than dense: Half precision (some/encoder) took 1.40 (batch 1)" in said
    assert found([*pruning_rows(), fast_row()], "Fewer bytes were fewer milliseconds")


def test_what_the_examples_cannot_show_is_the_median_half_width():
    (said,) = found(pruning_rows(), "Small losses hide")
    assert "2 points on some-task (some/encoder, 200 examples, 3 ways)" in said


def test_training_that_does_harm_is_counted():
    rows = pruning_rows()
    (control,) = [r for r in rows if r["technique"] == "dense" and r["settings"].get("recovery")]
    recovered = next(r for r in rows if r["settings"].get("recovery") and r["technique"] != "dense")
    assert not found(rows, "Training does not")
    control["quality"]["difference"] |= {"value": -0.1, "low": -0.12, "high": -0.08, "p": 0.001}
    recovered["quality"]["difference"] |= {"value": -0.4, "low": -0.42, "high": -0.38}
    (said,) = found(rows, "Training does not")
    assert "trained on as controls, became measurably worse in 1 of 1" in said
    assert "worse than in one shot in 1 of 1 (counted, not tested)" in said


def test_rules_that_nobody_notices_are_no_proof_and_blocks_are_counted_one_shot_and_after_recovery():
    rows = pruning_rows()
    other = [
        {**one, "model": "other", "key": f"other-{one['key']}"}
        for one in rows
        if one["technique"] != "paired-difference"
    ]
    (said,) = found([*rows, *other], "No rule was noticed")
    assert "0 of 2 rules on other (some-task)" in said and "how small a change the examples can show" in said
    dropped = [row("drop-blocks", 0.899, p=0.8, recovery=5), row("drop-blocks", 0.7, p=0.001)]
    (said,) = found([*rows, *dropped], "Small models have no block to spare")
    assert "without a measurable loss: one shot in 0 of 1 case, after recovery in 1 of 1 case." in said


FIGURES = Figures("dense .9", "a paper", "encoder", "some-task", (("dense", {}, 0.9),), "make this")


def test_published_figures_are_judged_where_their_rows_are_and_else_have_a_command():
    assert cards.figures(FIGURES, [row(value=0.91)]).verdict == "reproduced"  # within 2 %
    near = cards.figures(FIGURES, [row(value=0.8)])
    assert near.verdict == "not reproduced" and near.ours == "0.8 (0.9 published)" and near.tolerance == "2 %"
    other = cards.figures(FIGURES, [row(value=0.9, model="another")])
    assert other.verdict == cards.CANNOT and other.ours == "`make this`"
    several = Figures(
        "two", "p", "encoder", "some-task", (("dense", {}, 0.9), ("wanda", {"sparsity": 0.5}, 0.5)), "x"
    )
    assert cards.figures(several, pruning_rows()).verdict == "not reproduced"  # one of the two is far


def test_settings_of_a_published_figure_must_be_those_asked_but_for_calibration():
    asked = Figures("w", "p", "encoder", "some-task", (("wanda", {"sparsity": 0.5}, 0.9),), "x")
    calibrated = row("wanda", 0.9, sparsity=0.5, p=0.5)
    calibrated["settings"]["calibration"] = {"n": 4}
    assert cards.figures(asked, [calibrated]).verdict == "reproduced"
    recovered = row("wanda", 0.9, sparsity=0.5, p=0.5, recovery=10)
    assert cards.figures(asked, [recovered]).verdict == cards.CANNOT


def test_gathered_cards_are_counted_by_verdict_with_links():
    made = [Card("a", "b", "c", "ordering reproduced"), Card("a", "b", "c", "not reproduced (no difference)")]
    text = "\n".join(cards.gathered([("One", "1-one", made), ("Two", "2-two", made[:1]), ("Three", "3", [])]))
    assert "| [One](#1-one) |  | 1 |  | 1 |  |  |" in text and "[Three]" not in text
    assert "| **All** |  | 2 |  | 1 |  |  |" in text


def test_the_report_has_its_parts_in_order_and_a_command_per_notebook():
    text = build.render(pruning_rows(), images="images", notebooks="notebooks")
    parts = [
        "| Dense model, task |",
        "comparison-overview.png",
        "## Contents",
        "## How to read it",
        "## The words",
        "## The challenges",
        "## 1. Unstructured pruning",
        "Published findings, gathered",
        "Conditions",
    ]
    places = [text.index(part) for part in parts[:7]] + [text.rindex(f". {part}\n") for part in parts[7:]]
    assert places == sorted(places) and text.count("comparison-overview.png") == 1
    assert "`python -m helpers.run.runner --profile pocket --only 02`" in text
    assert "(#3-published-findings-gathered)" in text and "## 3. Published findings, gathered" in text
    assert text.index("**some/encoder on some-task.** One shot") > text.index("## 1. Unstructured pruning")


def test_a_shared_basis_that_loses_is_an_order_reproduced():
    from helpers.report import low_rank

    pair = ("global-basis", {"rank": 0.5}), ("low-rank", {"rank": 0.5})
    lost = compared(pair[0][0], pair[1][0], -0.2, pair[0][1], pair[1][1], p=1e-6)
    rows = [row(), lost | {"notebook": "06_low_rank_and_sharing", "key": key_of("lost")}]
    (card,) = low_rank.SECTION.cards(rows)
    assert card.verdict == "ordering reproduced" and card.differences == "some/encoder on some-task"
