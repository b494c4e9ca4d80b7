import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr

from lmcompress.measure.quality import quality, quality_verdict
from lmcompress.stats import RatioOfSums, paired_difference


def evaluation(
    columns, *, metric, statistic, block=1, higher=True, secondary=None, collapsed=None, floor=None,
    likelihood=None,
):  # fmt: skip
    task = SimpleNamespace(
        metric=metric, statistic=statistic, secondary=secondary or {}, block=block, higher_is_better=higher,
        likelihood=likelihood,
    )  # fmt: skip
    return SimpleNamespace(
        task=task, columns=columns, metric=metric, value=statistic(columns), floor=floor, collapsed=collapsed,
        details={"window": 8},
    )  # fmt: skip


def accuracy(correct, **more):
    return evaluation(
        {"correct": np.asarray(correct, float)},
        metric="accuracy",
        statistic=RatioOfSums("correct", None),
        **more,
    )


def test_accuracy_has_wilsons_interval_and_mcnemars_test():
    ours, theirs = np.zeros(100), np.zeros(100)
    ours[:80], theirs[:72], theirs[98:] = 1, 1, 1  # 8 gained, 2 lost
    found = quality(accuracy(ours), {"correct": theirs})
    reference = binomtest(80, 100).proportion_ci(method="wilson")
    assert (found["value"], found["n"]) == (0.8, 100)
    assert (found["low"], found["high"]) == pytest.approx((reference.low, reference.high))
    assert found["difference"]["value"] == pytest.approx(0.06)
    assert found["difference"]["p"] == pytest.approx(binomtest(8, 10).pvalue)
    assert quality_verdict(found, baseline=False) == "no measurable change"


def labels(correct, nats):
    columns = {"correct": np.asarray(correct, float), "cross_entropy": nats}
    right, surprise = RatioOfSums("correct", None), RatioOfSums("cross_entropy", None)
    return evaluation(
        columns, metric="accuracy", statistic=right, likelihood="cross_entropy",
        secondary={"cross_entropy": surprise, "other": right},
    )  # fmt: skip


def test_the_likelihood_is_compared_in_pairs_and_sees_what_the_accuracy_does_not():
    rng = np.random.default_rng(0)
    correct, nats = rng.random(200) < 0.9, rng.exponential(0.3, 200)
    dense = {"correct": correct.astype(float), "cross_entropy": nats}
    found = quality(labels(correct, nats + rng.normal(0.02, 0.05, 200)), dense)
    assert (
        found["difference"]["value"] == 0 and quality_verdict(found, baseline=False) == "no measurable change"
    )
    part = found["secondary"]["cross_entropy"]
    shuffled = {"cross_entropy": rng.permutation(nats)}  # the same numbers, without their pairs
    apart = paired_difference(RatioOfSums("cross_entropy", None), {"cross_entropy": nats + 0.02}, shuffled)
    assert part["difference"]["p"] < 0.01 and apart.p > 0.1
    assert (
        part["difference"]["value"] == pytest.approx(part["value"] - nats.mean())
        and part["difference"]["low"] > 0
    )
    assert "difference" not in found["secondary"]["other"]
    assert (
        "difference" not in quality(labels(correct, nats))["secondary"]["cross_entropy"]
    )  # the dense model's own
    broken = quality(labels(correct, np.full(200, np.nan)), dense)
    assert broken["secondary"]["cross_entropy"]["difference"] is None and broken["difference"] is not None


def perplexity(nll, tokens):
    return evaluation(
        {"nll": nll, "tokens": tokens}, metric="perplexity", statistic=RatioOfSums("nll", "tokens", np.exp),
        block=10, higher=False, secondary={"nats": RatioOfSums("nll", "tokens")},
    )  # fmt: skip


def test_perplexity_is_bootstrapped_in_blocks_and_lower_is_better():
    rng = np.random.default_rng(0)
    tokens = rng.integers(200, 256, 120).astype(float)
    drift = np.repeat(rng.normal(0, 0.4, 12), 10)  # neighbouring windows are alike
    dense, worse = (3 + drift) * tokens, (3.1 + drift) * tokens
    found = quality(perplexity(worse, tokens), {"nll": dense, "tokens": tokens})
    assert found["value"] == pytest.approx(math.exp(worse.sum() / tokens.sum()))
    assert found["difference"]["low"] > 0 and found["difference"]["test"] == "paired bootstrap, blocks of 10"
    assert quality_verdict(found, baseline=False) == "worse"
    assert (
        quality_verdict(quality(perplexity(dense, tokens), {"nll": worse, "tokens": tokens}), baseline=False)
        == "better"
    )
    single = perplexity(worse, tokens)
    single.task.block = 1
    assert quality(single)["high"] - quality(single)["low"] < 0.6 * (found["high"] - found["low"])
    assert (
        found["secondary"]["nats"]["low"]
        < found["secondary"]["nats"]["value"]
        < found["secondary"]["nats"]["high"]
    )
    assert found["details"] == {"window": 8}


def test_the_same_scores_are_no_measurable_change_and_seeds_repeat():
    rng = np.random.default_rng(1)
    columns = {"score": rng.normal(size=200), "label": rng.normal(size=200)}
    one = evaluation(
        columns, metric="spearman", statistic=lambda c: float(spearmanr(c["score"], c["label"])[0])
    )
    found = quality(one, columns, resamples=200)
    assert (
        found["difference"]["value"] == 0 and quality_verdict(found, baseline=False) == "no measurable change"
    )
    assert found == quality(one, columns, resamples=200)


def test_what_is_not_a_number_is_null_and_collapsed():
    columns = {"score": np.ones(20), "label": np.arange(20.0)}
    one = evaluation(
        columns, metric="spearman", statistic=lambda c: float("nan"), collapsed="the scores are the same"
    )
    found = quality(one, columns)
    assert found["value"] is None and found["low"] is None and found["difference"] is None
    assert quality_verdict(found, baseline=False) == "collapsed"


def test_baseline_collapsed_and_uncompared():
    found = quality(accuracy([1, 0, 1, 1], floor=0.75, collapsed="no better than the majority class"))
    assert found["difference"] is None and found["floor"] == 0.75
    assert quality_verdict(found, baseline=True) == "baseline"
    assert quality_verdict(found, baseline=False) == "collapsed"
    assert quality_verdict(quality(accuracy([1, 0, 1, 1])), baseline=False) is None
