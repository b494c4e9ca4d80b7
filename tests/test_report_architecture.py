"""The architecture section says what its rows say, tests over seeds, and holds with one seed."""

import matplotlib.pyplot as plt
import pytest
from scipy.stats import t, ttest_1samp

from helpers.report import architecture, architecture_gaps, build, comparison, seeds
from helpers.report import rows_architecture as architecture_figures
from tests.synthetic_rows import architecture_rows, row, trained


@pytest.fixture
def rows():
    return architecture_rows()


def shapes(ratio):
    return {"shapes": {"decode_b1": {"ratio": ratio}}}


def text_of(rows):
    return "\n\n".join(architecture.SECTION.findings(rows))


def test_a_difference_is_tested_over_seeds(rows):
    found = architecture_gaps.over_seeds(architecture_figures.trained(rows), architecture_gaps.perplexity)
    same, deeper, linear, control, block = found
    assert [[*one["gaps"].values()] for one in (same, deeper)] == [[-10.0, -9.5, -10.5], [0.0, 2.5, -2.5]]
    assert (linear["second"], control["first"], control["second"]) == (
        (5, "linear"),
        (5, "linear"),
        (5, "none"),
    )
    assert [*block["gaps"].values()] == [-10.0, -12.0, -8.0] and block["second"] == (5, "none")
    half = t.ppf(0.975, 2) * 0.5 / 3**0.5  # the three gaps spread by 0.5
    assert (same["low"], same["high"]) == pytest.approx((-10 - half, -10 + half))
    assert same["p"] == pytest.approx(5 * 2 * t.sf(10 / (0.5 / 3**0.5), 2)) and deeper["p"] == pytest.approx(
        1.0
    )
    assert seeds.verdict(same) == "better" and seeds.verdict(deeper) == "no measurable difference"


def test_depths_are_pooled_within_a_seed(rows):
    more = [trained(6, "shared", seed, 85.0 - seed, p=0.01) for seed in range(3)]
    single = architecture_gaps.over_seeds(
        architecture_figures.trained([*rows, *more]), architecture_gaps.perplexity
    )
    pooled, *_ = architecture_gaps.over_depths(single)
    assert pooled["words"] == "φ, against no φ, mean of 2 depths" and pooled["more"] == 0
    gaps = [(-10.0 - 5.0) / 2, (-9.5 - 5.0) / 2, (-10.5 - 8.0) / 2]
    assert [*pooled["gaps"].values()] == pytest.approx(gaps)
    assert pooled["p"] == pytest.approx(ttest_1samp(gaps, 0).pvalue)
    text = text_of([*rows, *more]).split("**At equal tokens**")[1].split("**At equal training time**")[0]
    shown, folded = text.split("<details><summary>Shape by shape: 5 more comparisons</summary>")
    assert "mean of 2 depths" in shown and "5 layers, φ, against 5 layers, linear φ" in shown
    assert "5 layers, φ, against 6 layers, no φ" in folded
    alone = text_of([one for one in [*rows, *more] if one["seed"] == 0]).split("**At equal training time**")[
        0
    ]
    assert "Shape by shape" not in alone and "5 layers, φ, against 6 layers, no φ" not in alone


def test_equal_latency_lies_between_two_depths(rows):
    (linear, phi) = sorted(
        architecture_gaps.at_equal_latency(architecture_figures.trained(rows)), key=lambda one: one["first"]
    )
    # φ takes 1.1 of the baseline's time, half way to six layers' 1.2: against the mean of 100 and 90, 101 and
    # 89, …
    assert [*phi["gaps"].values()] == pytest.approx([90 - 95, 91.5 - 95, 88.5 - 95])
    assert [*linear["gaps"].values()] == pytest.approx([91 - 97.5, 90 - 98, 89 - 97])
    assert "5 layers, φ (1.10 of the baseline's time), against 5.5 layers without: " in text_of(rows)
    slow, fast = (
        [one | {"latency": shapes(ratio)} if one["settings"].get("phi") == "shared" else one for one in rows]
        for ratio in (1.3, 0.9)
    )
    assert [
        one["first"][1] for one in architecture_gaps.at_equal_latency(architecture_figures.trained(slow))
    ] == ["linear"]
    assert [*architecture_gaps.at_equal_latency(architecture_figures.trained(fast))[0]["gaps"].values()] == [
        -10,
        -9.5,
        -10.5,
    ]
    untimed = [one | {"latency": None} if one["settings"].get("layers") == 6 else one for one in rows]
    assert architecture_gaps.at_equal_latency(architecture_figures.trained(untimed)) == []


def test_one_seed_decides_nothing(rows):
    text = text_of([one for one in rows if one["seed"] == 0])
    assert "5 layers, φ, against 5 layers, linear φ: lower, one run of each (−1.00)" in text
    assert "which decides nothing" in text
    assert "p = " not in text.split("At equal tokens")[1].split("\n\n")[1]


def test_scales_are_told_apart(rows):
    fast = {
        "matmul_share": 0.485,
        "matmul_ceiling_gflops": 800e3,
        "step_tokens_per_s": 450e3,
        "device": "a GPU",
    }
    large = []
    for one in (each for each in rows if each["technique"] == "architecture" and each["seed"] == 0):
        made = one["achieved"] | fast | {"parameters": 10**8, "dtype": "bfloat16", "compiled": True}
        large.append(
            one | {"settings": one["settings"] | {"scale": "full"}, "achieved": made, "key": one["key"] + "f"}
        )
    assert architecture_figures.scales([*rows, *large]) == ["pocket", "full"]
    text = text_of([*rows, *large])
    small, full = text.split("### Scale `full`: 100.0 to 100.0 million parameters")
    assert "### Scale `pocket`" in small and "One seed only at this scale" in full
    assert "matrix products" not in small and "over 3 seeds" not in full
    assert "450,000 tokens a second on a GPU in bfloat16, compiled: 48.5 % of the 800.0 TFLOP/s" in full
    assert [one.split(":")[0] for one in architecture.summary([*rows, *large])] == [
        f"**A nonlinearity on every head, against a block more** (scale `{name}`), by perplexity"
        for name in ("pocket", "full")
    ]
    figure = architecture.SECTION.drawings[0].draw([*rows, *large])
    assert len(figure.axes) == 4
    plt.close(figure)


def test_models_from_scratch_are_left_out_of_the_comparison_of_compressions(rows):
    scratch = [one | {"model": "pocket-5-none-seed0"} for one in rows]
    assert comparison.comparable_rows(scratch) == []
    others = [row(model="some/other"), *(row("rtn", model="some/other", key=key) for key in "ab")]
    for place, one in enumerate(others[1:]):
        one["settings"] = {"bits": place}
    assert comparison.comparable_rows([*scratch, *others]) == others
    assert comparison.comparable_rows(others[:2]) == []  # nothing to choose from
    assert "## 1. A nonlinearity on every head" in build.render(
        scratch, images="images", notebooks="notebooks"
    )
