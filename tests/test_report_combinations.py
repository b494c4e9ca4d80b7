"""The combinations section: orders, ablation, budgets."""

import matplotlib.pyplot as plt
import pytest

from helpers.report import build, cards, check, combinations, comparison, wording
from helpers.report import rows_combinations as combinations_figures
from lmcompress.results.labels import look_of
from lmcompress.results.rows import is_recovered
from tests.synthetic_rows import EMPTY, compared, key_of, row

HOME = {"notebook": "10_combinations"}
PAIR = ("some/encoder", "some-task")
P = {"technique": "sparsegpt", "version": 1, "sparsity": 0.5}
D = {"recovery": {"steps": 20, "teacher": True}}
Q = {"technique": "gptq", "version": 1, "bits": 4}


def made(steps, value, *, p=0.5, share=0.5, seed=0, ratio=None) -> dict:
    """A row of these steps, at `share` of the dense bytes: a chain, or what one technique does."""
    one = row("chain", value, p=p, seed=seed, **HOME)
    if len(steps) == 1 and "technique" in steps[0]:
        settings = {name: steps[0][name] for name in steps[0] if name not in ("technique", "version")}
        one |= {"technique": steps[0]["technique"], "settings": settings}
    elif len(steps) == 1:
        one |= {"technique": "dense", "settings": dict(D)}
    else:
        zeros = [{"technique": s.get("technique", "recovery"), "sparsity": 0.5 * (P in steps)} for s in steps]
        one |= {"settings": {"steps": steps}, "achieved": {"layers": 4, "steps": zeros, "sparsity": 0.5}}
    formats = {"dense": int(4_000_000 * share), "dense_zstd": 1}
    one["memory"] = one["memory"] | {"formats": formats, "file_bytes": formats["dense"]}
    one["latency"] = None
    if ratio:
        shape = row()["latency"]["shapes"]["batch1"] | {"ratio": ratio}
        one["latency"] = row()["latency"] | {"shapes": {"batch1": shape}}
        one["verdict"] = one["verdict"] | {"latency": {"batch1": "faster"}}
    return one | {"key": key_of(steps, seed)}


def difference_row(first, second, difference, *, p) -> dict:
    one = compared(
        *(r["technique"] for r in (first, second)), difference, first["settings"], second["settings"], p=p
    )
    keys = {"first": first["key"], "second": second["key"]}
    return one | HOME | {"settings": keys, "key": key_of(keys)}


def rows_of(seeds=(0, 1, 2)) -> list[dict]:
    single, pruned, control = (
        made([Q], 0.88, share=0.14),
        made([P], 0.89, share=0.7),
        made([D], 0.9, share=1.0),
    )
    coarse = made([Q | {"bits": 3}], 0.80, share=0.12, ratio=0.4)
    both = made([P, Q], 0.86, share=0.12)
    rows = [row(**HOME), single, pruned, control, coarse, both]
    for seed in seeds:
        taught, best, late = (
            made([P, D], 0.895, share=0.7, seed=seed),
            made([P, D, Q], 0.885 + seed / 1000, share=0.12, seed=seed, ratio=0.45),
            made([P, Q, D], 0.84, share=0.12, seed=seed),
        )
        rows += [
            taught,
            best,
            late,
            difference_row(best, late, 0.045, p=1e-6),
            difference_row(best, both, 0.02, p=0.4),
        ]
        rows += [
            difference_row(best, taught, -0.01, p=0.5),
            difference_row(best, coarse, 0.08, p=1e-5),
            difference_row(best, single, 0.0, p=0.9),
        ]
    refused = {"steps": ["gptq", "sparsegpt"]}
    rows.append(
        row("refused", settings=refused, achieved={"reason": "it cannot"}, key="f" * 16, **EMPTY, **HOME)
    )
    return rows


@pytest.fixture
def text():
    return "\n".join([*combinations.findings(rows_of()), *cards.block(combinations.SECTION.cards(rows_of()))])


def test_orders_are_compared_seed_by_seed(text):
    asked = "- SparseGPT 50% → distil → GPTQ 4, against SparseGPT 50% → GPTQ 4 → distil: "
    line = next(one for one in text.splitlines() if one.startswith(asked))
    assert line.startswith(asked + "better in 3 of 3 seeds (+4.50 points")


def test_a_step_that_buys_nothing_is_said_to_buy_nothing(text):
    for step in ("distil", "GPTQ 4"):
        assert (
            f"| SparseGPT 50% → distil → GPTQ 4 | {step} | no measurable difference in 3 of 3 seeds" in text
        )


def test_budgets_by_hand(text):
    single, chain = combinations_figures.best_under_budget(rows_of(), PAIR, 0.14)
    assert combinations_figures.label(combinations_figures.path_of(single[0])) == "GPTQ 4"
    assert (
        len(chain) == 3
        and combinations_figures.label(combinations_figures.path_of(chain[0]))
        == "SparseGPT 50% → distil → GPTQ 4"
    )
    single, _ = combinations_figures.best_under_budget(rows_of(), PAIR, 0.125)
    assert single[0]["settings"]["bits"] == 3
    single, chain = combinations_figures.best_under_budget(
        rows_of(), PAIR, 0.5, combinations_figures.first_ratio
    )
    assert single[0]["settings"]["bits"] == 3 and len(chain) == 3
    assert combinations_figures.best_under_budget(rows_of(), PAIR, 0.01) == ([], [])
    table = [line for line in text.splitlines() if line.startswith("| 12.5 %")]
    assert "GPTQ 3" in table[0] and "better in 3 of 3 seeds" in table[0]
    assert (
        next(line for line in text.splitlines() if line.startswith("| 14 %")).count(
            "no measurable difference"
        )
        == 1
    )


def test_the_same_steps_are_one_family_and_pairs_inside_it_are_left_out():
    rows = rows_of((0,)) + [made([D, P], 0.89, share=0.7), made([P, P | {"technique": "wanda"}], 0.8)]
    (family,) = combinations_figures.families(rows, PAIR)
    assert len(family) == 3 and sorted(family) == list(family)


def test_figures_draw_every_way_and_the_report_builds():
    rows = rows_of()
    figure = combinations.SECTION.drawings[0].draw(rows)
    names = [one.get_text() for one in figure.axes[0].get_yticklabels()]
    assert "SparseGPT 50% → distil → GPTQ 4-bit" in names and len(names) == 7
    plt.close("all")
    page = build.render(rows, images="images", notebooks="notebooks")
    assert "combinations-orders.png" in page and "**some/encoder on some-task.** Chains of techniques" in page


def test_a_chain_has_a_readable_name_and_one_colour_in_the_comparison():
    chain = made([P, D, Q], 0.9)
    assert wording.label_of(chain) == "SparseGPT, 50 % → distillation (20 steps) → GPTQ, 4 bits, per row"
    assert look_of("chain").title == "Chain of techniques" and is_recovered(chain)
    assert "Chain of techniques" in comparison.verdict_table(rows_of())


def test_a_newer_step_makes_a_chain_out_of_date():
    chain = made([P, D, Q | {"version": 0}], 0.9)
    (found,) = check.stale_rows([chain])
    assert "its step gptq has version 0, not 1" in found
    assert check.stale_rows([made([P, D, Q], 0.9)]) == []
