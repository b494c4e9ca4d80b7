"""Statistics: against scipy and hand-worked values, and by simulation that 95 % means about 95 %."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.signal
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lmcompress import stats
from lmcompress.errors import BadData, BadSetting
from lmcompress.stats import (
    LEAST_EXAMPLES,
    TOO_FEW_EXAMPLES,
    Difference,
    Interval,
    RatioOfSums,
    holm,
    mcnemar,
    noise_floor,
    paired_difference,
    statistic_interval,
    timing_ratio,
    verdict,
    wilson,
)

MEAN = RatioOfSums("x", None)


def mean_interval(scores, **how):
    return statistic_interval(RatioOfSums("scores", None), {"scores": scores}, **how)


def share(hits: list[bool]) -> float:
    """The share of simulations that hit: within three standard errors of 95 % at 500 of them is 92–98 %."""
    return float(np.mean(hits))


def autocorrelated(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """A first-order autoregressive series of mean 0, past its beginning."""
    return scipy.signal.lfilter([1], [1, -rho], rng.normal(size=n + 100))[100:]


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 1), (7, 10), (800, 872), (81, 263)])
def test_wilson_is_scipys(successes, n):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    got = wilson(successes, n)
    assert (got.value, got.low, got.high) == pytest.approx(
        (successes / n, expected.low, expected.high), abs=1e-12
    )
    assert got.low <= got.value <= got.high


def test_bootstrap_agrees_with_scipys_percentile_bootstrap():
    x = np.random.default_rng(3).exponential(size=400)
    expected = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    got = mean_interval(x, resamples=20_000)
    assert got.value == pytest.approx(x.mean())
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.005)


def test_fast_and_plain_statistics_agree_exactly():
    rng = np.random.default_rng(0)
    columns = {"numerator": rng.gamma(2, size=57), "denominator": rng.integers(1, 9, 57)}

    def plain(c):
        return c["numerator"].sum() / c["denominator"].sum()

    for block in (1, 5):
        fast = statistic_interval(RatioOfSums(), columns, block=block, resamples=300)
        slow = statistic_interval(plain, columns, block=block, resamples=300)
        assert fast.as_dict() == pytest.approx(slow.as_dict())
    perplexity = RatioOfSums("numerator", "denominator", np.exp)
    expected = np.exp(columns["numerator"].sum() / columns["denominator"].sum())
    assert perplexity(columns) == pytest.approx(expected)
    assert MEAN({"x": columns["numerator"]}) == pytest.approx(columns["numerator"].mean())


def test_results_are_fixed_by_the_seed_and_do_not_hang_on_the_chunk(monkeypatch):
    columns = {"x": np.random.default_rng(0).normal(size=50)}
    one = statistic_interval(MEAN, columns, seed=1)
    assert statistic_interval(MEAN, columns, seed=1) == one
    assert statistic_interval(MEAN, columns, seed=2) != one
    monkeypatch.setattr(stats, "_CHUNK", 70)
    assert statistic_interval(MEAN, columns, seed=1) == one


def test_columns_may_have_rows_of_numbers():
    """Corpus BLEU resamples rows of counts: whole rows must move together."""
    counts = np.random.default_rng(0).integers(1, 9, (40, 4))

    def statistic(c):
        assert {tuple(row) for row in c["counts"].tolist()} <= {tuple(row) for row in counts.tolist()}
        return float((c["counts"].sum(0)[:2] / c["counts"].sum(0)[2:]).prod())

    got = statistic_interval(statistic, {"counts": counts}, resamples=100)
    assert got.low < got.value < got.high


def test_intervals_of_few_examples_are_as_wide_as_students():
    x = np.random.default_rng(0).normal(size=20)
    got = mean_interval(x, resamples=20_000)
    low, high = scipy.stats.t.interval(0.95, 19, loc=x.mean(), scale=scipy.stats.sem(x))
    assert got.high - got.low == pytest.approx(high - low, rel=0.03)


def test_blocks_are_contiguous_and_every_example_counts_alike():
    matrix = np.concatenate(list(stats._resamples(16, 3, 4000, 0)))
    assert matrix.shape == (4000, 16)
    steps = np.diff(matrix, axis=1) % 16
    inside = np.arange(15) % 3 != 2
    assert (steps[:, inside] == 1).all() and not (steps[:, ~inside] == 1).all()
    np.testing.assert_allclose(np.bincount(matrix.ravel()) / 64_000, 1 / 16, atol=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_is_never_below_p_nor_above_bonferroni(p):
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and holm([]) == []
    adjusted = holm(p)
    for one, two in zip(p, adjusted):
        assert one <= two <= min(1, one * len(p)) + 1e-12
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
    rejected, step = set(), 0
    while step < len(p) and p[order[step]] * (len(p) - step) <= 0.05:  # Holm's procedure as he states it
        rejected.add(int(order[step]))
        step += 1
    assert rejected == {i for i, value in enumerate(adjusted) if value <= 0.05}


def paired_table(both: int, only_ours: int, only_theirs: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    cells = [both, only_ours, only_theirs, neither]
    return np.repeat([True, True, False, False], cells), np.repeat([True, False, True, False], cells)


def test_mcnemar_is_scipys_binomial_and_newcombes_interval():
    """Newcombe 1998 (Statistics in Medicine 17:2635), method 10: 36, 12, 2, 0 gives 0.0569 to 0.3404."""
    got = mcnemar(*paired_table(36, 12, 2, 0))
    assert got.p == pytest.approx(scipy.stats.binomtest(12, 14).pvalue)
    assert (got.value, got.n, got.test) == (pytest.approx(0.2), 50, "McNemar exact")
    assert (round(got.low, 4), round(got.high, 4)) == (0.0569, 0.3404)


def test_newcombes_interval_by_hand_where_the_models_agree_more_than_by_chance():
    """20, 12, 2, 16: φ = (20·16 - 12·2 - 50/2) / √(32·18·22·28), accuracies 0.64 and 0.44."""
    phi = 271 / np.sqrt(32 * 18 * 22 * 28)
    one = scipy.stats.binomtest(32, 50).proportion_ci(method="wilson")
    two = scipy.stats.binomtest(22, 50).proportion_ci(method="wilson")
    down, up = 0.64 - one.low, two.high - 0.44
    low = 0.2 - np.sqrt(down**2 - 2 * phi * down * up + up**2)
    down, up = 0.44 - two.low, one.high - 0.64
    high = 0.2 + np.sqrt(down**2 - 2 * phi * down * up + up**2)
    got = mcnemar(*paired_table(20, 12, 2, 16))
    assert (got.low, got.high) == pytest.approx((low, high))


def test_equal_and_opposite_models_have_the_extreme_p():
    x = np.random.default_rng(0).normal(size=50)
    alike = paired_difference(MEAN, {"x": x}, {"x": x})
    assert (alike.value, alike.low, alike.high, alike.p) == (0, 0, 0, 1)
    noisy = paired_difference(MEAN, {"x": x + 100 + np.sin(np.arange(50))}, {"x": x}, resamples=99)
    assert noisy.p == pytest.approx(1 / 100), "never zero"
    same = mcnemar(*paired_table(700, 0, 0, 172))
    assert (same.value, same.p) == (0, 1) and same.low < 0 < same.high
    perfect = mcnemar(*paired_table(50, 0, 0, 0))
    assert perfect.value == 0 and perfect.low <= 0 <= perfect.high
    opposite = mcnemar(*paired_table(0, 20, 0, 0))
    assert opposite.value == 1 and opposite.p == pytest.approx(2 * 0.5**20) and opposite.high == 1
    swapped = mcnemar(*paired_table(30, 2, 9, 5))
    straight = mcnemar(*paired_table(30, 9, 2, 5))
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (-straight.value, -straight.high, -straight.low)
    )
    assert swapped.p == straight.p


def test_coverage_of_a_ratio_of_sums():
    """Numerator and denominator vary together, as nats and tokens of a text do; the truth is 3."""
    rng = np.random.default_rng(0)
    hits = []
    for seed in range(500):
        tokens = rng.integers(5, 60, 120)
        columns = {"numerator": tokens * 3 + rng.normal(size=120) * tokens, "denominator": tokens}
        got = statistic_interval(RatioOfSums(), columns, resamples=400, seed=seed)
        hits.append(got.low <= 3 <= got.high)
    assert 0.92 <= share(hits) <= 0.98


def test_blocks_cover_dependent_examples_and_single_examples_do_not():
    rng = np.random.default_rng(0)
    blocked, single = [], []
    for seed in range(400):
        series = autocorrelated(rng, 1000, rho=0.6)
        for hits, block in ((blocked, 25), (single, 1)):
            got = mean_interval(series, block=block, resamples=300, seed=seed)
            hits.append(got.low <= 0 <= got.high)
    assert 0.92 <= share(blocked) <= 0.98
    assert share(single) < 0.80


@pytest.mark.parametrize("n", [20, 24])
def test_few_examples_have_shorter_blocks_that_still_cover_and_the_test_says_which(n):
    """Of 24 windows in blocks of 10 there would be two: an interval that covers little."""
    rng = np.random.default_rng(0)
    hits, false = [], []
    for seed in range(400):
        base = rng.normal(size=n)
        null = paired_difference(MEAN, {"x": base + rng.normal(size=n)}, {"x": base}, block=10, seed=seed)
        hits.append(null.low <= 0 <= null.high)
        false.append(null.p < 0.05)
    assert share(hits) >= 0.91 and share(false) <= 0.09
    assert null.test == f"paired bootstrap, blocks of {n // 5}"
    shifted = paired_difference(MEAN, {"x": base + 5 + rng.normal(size=n)}, {"x": base}, block=10)
    assert verdict(shifted, higher_is_better=True) == "better"


def test_fewer_than_twenty_examples_have_no_interval_and_no_p():
    """As benchmarks/interval_coverage.py shows: of two a 95 % interval would cover 53 %."""
    x = np.random.default_rng(0).normal(size=LEAST_EXAMPLES)
    for scores, enough in ((x, True), (x[1:], False)):
        got, test = mean_interval(scores), paired_difference(MEAN, {"x": scores}, {"x": scores - 1})
        assert np.isfinite([got.low, got.high, test.low, test.p]).tolist() == [enough] * 4
        assert got.value == pytest.approx(scores.mean()) and (test.test == TOO_FEW_EXAMPLES) != enough
    assert got.as_dict() == {"value": got.value, "low": None, "high": None}
    assert timing_ratio(x[:3], x[:3]) == Interval(1, 1, 1), "times say how many calls they are of"


def test_paired_difference_errs_in_five_percent_covers_and_finds_shifts():
    """Where the examples are normal, Student's paired test is exact: the bootstrap must keep up with it."""
    rng = np.random.default_rng(0)
    false, covered, student, found = [], [], [], []
    for seed in range(1000):
        base = rng.normal(size=60)
        ours = base + rng.normal(scale=0.5, size=60)  # the same examples, so strongly correlated
        null = paired_difference(MEAN, {"x": ours}, {"x": base}, resamples=400, seed=seed)
        false.append(null.p < 0.05)
        covered.append(null.low <= 0 <= null.high)
        student.append(scipy.stats.ttest_rel(ours, base).pvalue < 0.05)
        if seed < 200:
            real = paired_difference(MEAN, {"x": ours - 0.3}, {"x": base}, resamples=400, seed=seed)
            found.append(verdict(real, higher_is_better=True) == "worse")
    assert 0.03 <= share(false) <= 0.07
    assert 0.93 <= share(covered) <= 0.97
    assert share(false) == pytest.approx(share(student), abs=0.01)
    assert share(found) > 0.95


def simulated_rounds(rng: np.random.Generator, ratio: float, slowing: float = 0.5) -> tuple[np.ndarray, ...]:
    """31 rounds on a machine that slows down over them, both halves of a round alike."""
    drift = np.linspace(1, 1 + slowing, 31) * np.exp(rng.normal(scale=0.1 * slowing, size=31))
    noise = np.exp(rng.normal(scale=0.02, size=(2, 31)))
    return ratio * drift * noise[0], drift * noise[1]


def test_drift_that_hits_both_is_covered_and_pairing_cancels_it():
    rng = np.random.default_rng(0)
    hits, paired, unpaired = [], [], []
    for seed in range(400):
        times, reference = simulated_rounds(rng, 0.8)
        got = timing_ratio(times, reference, resamples=400, seed=seed)
        other = timing_ratio(times, rng.permutation(reference), resamples=400, seed=seed)
        hits.append(got.low <= 0.8 <= got.high)
        paired.append(got.high - got.low)
        unpaired.append(other.high - other.low)
    assert share(hits) >= 0.92
    assert np.mean(paired) < 0.6 * np.mean(unpaired)


def test_a_copy_of_the_dense_model_is_hardly_ever_called_faster_or_slower():
    rng = np.random.default_rng(0)
    changed, found = [], []
    for seed in range(400):
        floor = noise_floor(timing_ratio(*simulated_rounds(rng, 1.0), resamples=300, seed=seed))
        copy = timing_ratio(*simulated_rounds(rng, 1.0), resamples=300, seed=seed)
        changed.append(verdict(copy, floor=floor, higher_is_better=False) != "no measurable change")
        quick = timing_ratio(*simulated_rounds(rng, 0.8), resamples=300, seed=seed)
        found.append(verdict(quick, floor=floor, higher_is_better=False) == "better")
    assert share(changed) <= 0.05
    assert share(found) > 0.95


def test_an_undefined_statistic_has_no_interval_and_undefined_resamples_are_left_out():
    def correlation(c):
        if np.ptp(c["x"]) == 0 or np.ptp(c["y"]) == 0:
            return float("nan")
        return float(scipy.stats.spearmanr(c["x"], c["y"]).statistic)

    x = (np.arange(20) == 0).astype(float)  # constant in a third of the resamples
    got = statistic_interval(correlation, {"x": x, "y": x + np.arange(20) / 9}, resamples=200)
    assert np.isfinite([got.value, got.low, got.high]).all()
    collapsed = statistic_interval(correlation, {"x": np.zeros(20), "y": x})
    assert np.isnan([collapsed.value, collapsed.low, collapsed.high]).all()
    difference = paired_difference(correlation, {"x": np.zeros(20), "y": x}, {"x": x, "y": x})
    assert np.isnan(difference.p)
    pytest.raises(BadData, verdict, difference, higher_is_better=True).match("collapsed")


def test_bad_columns_and_settings_are_named():
    for bad in [(1, 0), (3, 2), (-1, 2)]:
        pytest.raises(BadData, wilson, *bad)
    for columns in ({}, {"x": np.array([])}, {"x": np.ones(3), "y": np.ones(4)}):
        pytest.raises(BadData, statistic_interval, MEAN, columns).match("columns")
    with pytest.raises(BadData, match="not the same"):
        paired_difference(MEAN, {"x": np.ones(3)}, {"x": np.ones(4)})
    pytest.raises(BadData, mcnemar, np.ones(3, bool), np.ones(4, bool)).match("not the same")
    pytest.raises(BadSetting, mean_interval, np.ones(40), block=0).match("block=0")
    assert mean_interval(np.arange(1.0, 21), block=100).low >= 1


def test_noise_floor_covers_the_interval_on_both_sides():
    assert noise_floor(Interval(1.0, 0.97, 1.02)) == pytest.approx(0.03)
    assert noise_floor(Interval(1.03, 1.01, 1.05)) == pytest.approx(0.05)


DROP = Difference(-0.02, -0.03, -0.01, p=0.001, test="", n=100)


@pytest.mark.parametrize(
    ("result", "floor", "higher_is_better", "expected"),
    [
        (DROP, 0, True, "worse"),
        (DROP, 0, False, "better"),
        (DROP, 0.025, True, "no measurable change"),
        (replace(DROP, p=0.2), 0, True, "no measurable change"),
        (replace(DROP, high=0.001), 0, True, "no measurable change"),
        (replace(DROP, value=0.02, low=0.01, high=0.03), 0, True, "better"),
        (Interval(0.8, 0.78, 0.82), 0.05, False, "better"),
        (Interval(1.2, 1.1, 1.3), 0.05, False, "worse"),
        (Interval(1.2, 0.99, 1.3), 0.05, False, "no measurable change"),
        (Interval(0.97, 0.96, 0.98), 0.05, False, "no measurable change"),
        (Interval(1.0, 1.0, 1.0), 0, False, "no measurable change"),
    ],
)
def test_verdicts(result, floor, higher_is_better, expected):
    assert verdict(result, floor=floor, higher_is_better=higher_is_better) == expected


def test_the_bound_of_a_lost_accuracy_inverts_the_score_test():
    z2 = scipy.stats.norm.ppf(0.95) ** 2
    assert stats.tango_bound(0, 0, 100) == pytest.approx(z2 / (100 + z2))  # Wilson's of 0 in 100
    assert stats.tango_bound(50, 0, 50) == 1.0
    assert stats.tango_bound(0, 50, 50) < -0.85
    lost, gained, n = 200, 120, 10_000  # many: as the normal curve has it
    spread = np.sqrt(lost + gained - (lost - gained) ** 2 / n) / n
    bound = 0.008 + scipy.stats.norm.ppf(0.95) * spread
    assert stats.tango_bound(lost, gained, n) == pytest.approx(bound, rel=0.01)


def test_the_bound_of_a_lost_accuracy_holds_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(400, [0.03, 0.02, 0.95], size=1000)
    held = [stats.tango_bound(int(lost), int(gained), 400) >= 0.01 for lost, gained, _ in counts]
    assert 0.93 < np.mean(held) < 0.975


@pytest.mark.parametrize("higher", [True, False])
def test_the_bound_of_a_bootstrap_is_its_one_sided_quantile(higher):
    rng = np.random.default_rng(0)
    base = {"x": 5 + rng.normal(size=400)}
    ours = {"x": base["x"] + rng.normal(0.1, 1, 400)}
    drawn = {"resamples": stats.RESAMPLES, "higher_is_better": higher}
    found = paired_difference(MEAN, ours, base, **drawn)
    spread = np.std(ours["x"] - base["x"]) / 20
    loss = -found.value if higher else found.value
    expected = loss + scipy.stats.norm.ppf(0.95) * spread
    assert found.bound == pytest.approx(expected, abs=0.05 * spread)
    assert found.resamples == 10_000 and found.as_dict()["bound"] == found.bound
    ratio = paired_difference(MEAN, ours, base, relative=True, **drawn)
    share = stats.paired_loss_bounds(MEAN, ours, base, confidence=0.95, relative=True, **drawn)[1]
    assert ratio.bound == pytest.approx(share * base["x"].mean()) and ratio.bound != found.bound
    assert "bound" not in paired_difference(MEAN, ours, base).as_dict()
