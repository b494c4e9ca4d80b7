"""How often a 95 % interval of a mean holds the true mean: this project's, BCa and the studentised bootstrap.

Run as `python benchmarks/interval_coverage.py [simulations]`. Data are normal, skewed (log-normal, as losses
of texts are), or a dependent series resampled in blocks of ten. "expanded" is what `lmcompress.stats` gives:
the percentile interval, widened for few examples (Hesterberg 2015). BCa (Efron 1987) is scipy's, for single
examples only. The studentised one resamples (mean* - mean) / standard error* (Efron and Tibshirani 1993,
section 12.5).
"""

import sys

import numpy as np
from scipy import stats as scipy_stats
from scipy.signal import lfilter

from lmcompress.stats import RatioOfSums, statistic_interval

SIZES = (2, 5, 10, 15, 20, 30, 50, 100, 200)
SKEWED_MEAN = float(np.exp(0.5))  # of a log-normal variable with σ = 1
MEAN = RatioOfSums("x", None)


def sample(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Return `n` draws of the `kind` of data, whose mean is 0, or `SKEWED_MEAN` of skewed data."""
    if kind == "dependent":
        return lfilter([1], [1, -0.5], rng.normal(size=n + 100))[100:]
    return rng.lognormal(size=n) if kind == "skewed" else rng.normal(size=n)


def bounds(method: str, x: np.ndarray, block: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `x` by `method`."""
    if method == "expanded":
        interval = statistic_interval(MEAN, {"x": x}, block=block, resamples=500, seed=seed, least=1)
        return interval.low, interval.high
    rng = np.random.default_rng(seed)
    if method == "BCa":
        interval = scipy_stats.bootstrap(
            (x,), np.mean, n_resamples=500, method="BCa", rng=rng
        ).confidence_interval
        return interval.low, interval.high
    resamples = x[rng.integers(0, len(x), (500, len(x)))]
    errors = resamples.std(axis=1, ddof=1) / np.sqrt(len(x))
    pivots = (resamples.mean(axis=1) - x.mean())[errors > 0] / errors[errors > 0]
    if not len(pivots):
        return np.nan, np.nan
    low, high = np.quantile(pivots, [0.025, 0.975])
    error = x.std(ddof=1) / np.sqrt(len(x))
    return x.mean() - high * error, x.mean() - low * error


def main(simulations: int = 1000) -> None:
    """Print the coverage of each method on each kind of data, by the number of examples."""
    print(f"share of {simulations} intervals that hold the true mean (nominal 0.95)")
    print(f"{'data':<10}{'method':<13}" + "".join(f"{f'n={n}':>8}" for n in SIZES))
    for kind, truth, methods in (
        ("normal", 0.0, ("expanded", "BCa", "studentised")),
        ("skewed", SKEWED_MEAN, ("expanded", "BCa", "studentised")),
        ("dependent", 0.0, ("expanded",)),
    ):
        for method in methods:
            shares = []
            for n in SIZES:
                rng, held = np.random.default_rng(n), 0
                for seed in range(simulations):
                    x = sample(kind, rng, n)
                    low, high = bounds(method, x, 10 if kind == "dependent" else 1, seed)
                    held += low <= truth <= high
                shares.append(held / simulations)
            print(f"{kind:<10}{method:<13}" + "".join(f"{share:>8.3f}" for share in shares), flush=True)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(*map(int, sys.argv[1:]))
