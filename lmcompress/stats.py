"""Intervals, paired tests and verdicts: what turns two numbers into "better", "worse" or neither.

Takes arrays, returns small frozen records, knows nothing of models, tasks or rows. Every interval is a 95 %
one, every resampling is fixed by its seed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t

from lmcompress.errors import BadData, BadSetting

Columns = dict[str, np.ndarray]
Statistic = Callable[[Columns], float]

CONFIDENCE = 0.95
_Z = float(norm.ppf(0.5 + CONFIDENCE / 2))
_ONE_SIDED_Z = float(norm.ppf(CONFIDENCE))
RESAMPLES = 10_000  # behind a paired difference, whose p goes into corrections over dozens of comparisons
_CHUNK = 1 << 22  # resampled indices held at once, 32 MB
LEAST_BLOCKS = 5  # blocks are shortened rather than fewer of them resampled
# A bootstrap's 95 % interval of fewer examples covers as little as 53 % (two), or 85 % (twenty, skewed): see
# benchmarks/interval_coverage.py. From ten timed calls on, noise is called a change in under 1 % of trials.
LEAST_EXAMPLES, LEAST_CALLS = 20, 10
TOO_FEW_EXAMPLES, TOO_FEW_CALLS = "too few examples", "too few calls"


def finite(value: float | str) -> float | str | None:
    """Return `value`, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Interval:
    """A number and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | str | None]:
        """Return the fields by name, as a row records them: None for a number that is not finite."""
        return {name: finite(field) for name, field in asdict(self).items()}


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference, compressed minus baseline, with its two-sided p and the `n` examples behind it.

    `bound` is the upper one-sided 95 % bound of the loss, in the unit of the value; of a bootstrap
    `resamples` is the number. Either is None where it does not apply, and is then not recorded.
    """

    p: float
    test: str
    n: int
    bound: float | None = None
    resamples: int | None = None

    def as_dict(self) -> dict[str, float | str | None]:
        """Return the fields as a row records them."""
        fields = super().as_dict()
        left_out = [name for name in ("bound", "resamples") if fields[name] is None]
        return {name: field for name, field in fields.items() if name not in left_out}


@dataclass(frozen=True)
class RatioOfSums:
    """The statistic `transform(Σ numerator / Σ denominator)` over two named columns, resampled fast.

    Without a denominator it is the mean of the numerator. `transform` takes arrays (`np.exp` makes
    perplexity).
    """

    numerator: str = "numerator"
    denominator: str | None = "denominator"
    transform: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, columns: Columns) -> float:
        return float(self.resampled(columns, np.arange(len(columns[self.numerator]))[None])[0])

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        """Return the statistic of each resample: indices `(resamples, n)` to values `(resamples,)`."""
        names = [name for name in (self.numerator, self.denominator) if name is not None]
        sums = [np.asarray(columns[name], dtype=np.float64)[indices].sum(axis=1) for name in names]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = sums[0] / (indices.shape[1] if self.denominator is None else sums[1])
            return ratio if self.transform is None else self.transform(ratio)


@dataclass(frozen=True)
class Median:
    """The median of one column, for all resamples at once."""

    column: str

    def __call__(self, columns: Columns) -> float:
        return float(np.median(columns[self.column]))

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        return np.median(columns[self.column][indices], axis=1)


def statistic_interval(
    statistic: Statistic,
    columns: Columns,
    *,
    block: int = 1,
    resamples: int = 1000,
    seed: int = 0,
    least: int = LEAST_EXAMPLES,
) -> Interval:
    """Return `statistic(columns)` with its expanded percentile bootstrap interval over whole examples.

    Args:
        statistic: takes columns and returns a number. One that also has `resampled(columns, indices)`, as
            `RatioOfSums` has, is computed for all resamples at once.
        columns: per-example arrays `(n, ...)`, one entry per example along the first axis.
        block: examples per resampled block, above 1 where neighbours are dependent (windows of one text):
            contiguous, random starts, wrapping at the end (Politis and Romano 1992). At most a fifth of the
            examples: intervals from two or three blocks cover too little, and their tests find nothing.
        least: fewer examples have no interval.

    A statistic that is not finite, or of too few examples, has NaN for both bounds. Resamples on which it is
    undefined (a correlation of constants) are left out. Raises `BadData` for no examples or columns of
    different lengths, and `BadSetting` for `block` or `resamples` below 1.
    """
    n, value = _length(columns), float(statistic(columns))
    chunks = _resamples(n, block, resamples, seed) if n >= least else ()
    low, high, _ = _bootstrap(value, (_evaluate(statistic, columns, c) for c in chunks), n, block)
    return Interval(value, low, high)


def paired_difference(
    statistic: Statistic,
    columns: Columns,
    baseline_columns: Columns,
    *,
    block: int = 1,
    resamples: int = 1000,
    seed: int = 0,
    higher_is_better: bool | None = None,
    relative: bool = False,
) -> Difference:
    """Return `statistic(columns) - statistic(baseline_columns)`, both resampled by the same indices.

    p is the share of resamples whose distance from the observed difference is at least that difference, (1 +
    count) / (1 + resamples) (Efron and Tibshirani 1993, §16.4), distances widened for few examples as the
    interval is. Arguments as for `statistic_interval`, of the same examples in the same order. Of fewer than
    `LEAST_EXAMPLES` there is no interval and no p, and `test` says so. With `higher_is_better` there is the
    one-sided bound of the loss, too; with `relative` it is that of the loss as a share of the baseline's
    value in the same resample, times its value.
    """
    n = _length(columns)
    if _length(baseline_columns) != n:
        raise BadData(f"{n} examples against {_length(baseline_columns)} of the baseline: not the same ones")
    reference = float(statistic(baseline_columns))
    value = float(statistic(columns)) - reference
    size = fitted_block(block, n)
    test = "paired bootstrap" if size == 1 else f"paired bootstrap, blocks of {size}"
    test, chunks = (
        (TOO_FEW_EXAMPLES, ()) if n < LEAST_EXAMPLES else (test, _resamples(n, block, resamples, seed))
    )
    references, drawn = [], []
    for chunk in chunks:
        references.append(_evaluate(statistic, baseline_columns, chunk))
        drawn.append(_evaluate(statistic, columns, chunk) - references[-1])
    bound = None
    if higher_is_better is not None and drawn:
        losses = np.concatenate(drawn) * (-1 if higher_is_better else 1)
        losses = losses * (reference / np.concatenate(references)) if relative else losses
        bound = finite(_quantile(losses, CONFIDENCE, n, block))
    return Difference(
        value, *_bootstrap(value, drawn, n, block), test, n, bound, resamples if drawn else None
    )


def wilson(successes: int, n: int) -> Interval:
    """Return a proportion with its score interval (Wilson 1927, eq. for p₁ and p₂), right even at 0 and 1."""
    if not 0 <= successes <= n or n == 0:
        raise BadData(f"{successes} successes of {n} is no proportion: need 0 <= successes <= n and n >= 1")
    p, z2n = successes / n, _Z**2 / n
    centre = (p + z2n / 2) / (1 + z2n)
    half = _Z * np.sqrt(p * (1 - p) / n + z2n / (4 * n)) / (1 + z2n)
    return Interval(p, min(p, max(0.0, float(centre - half))), max(p, min(1.0, float(centre + half))))


def mcnemar(correct: np.ndarray, baseline_correct: np.ndarray) -> Difference:
    """Compare two accuracies, booleans `(n,)` of the same examples, by the exact McNemar test.

    p is the two-sided binomial one over the examples the two disagree on (McNemar 1947); the interval is
    Newcombe's score interval for paired proportions (Newcombe 1998, method 10), the bound Tango's (1998).
    """
    right, baseline_right = np.asarray(correct, dtype=bool), np.asarray(baseline_correct, dtype=bool)
    n = len(right)
    if baseline_right.shape != right.shape or not n:
        raise BadData(
            f"{n} examples against {len(baseline_right)} of the baseline: not the same ones, or none"
        )
    both_right, neither = int((right & baseline_right).sum()), int((~right & ~baseline_right).sum())
    gained, lost = int((right & ~baseline_right).sum()), int((~right & baseline_right).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    a, b = wilson(both_right + gained, n), wilson(both_right + lost, n)
    cross = both_right * neither - gained * lost
    margins = (both_right + gained, lost + neither, both_right + lost, gained + neither)
    scale = np.sqrt(math.prod(map(float, margins)))
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / scale if scale else 0.0

    def half(up: float, down: float) -> float:
        return float(np.sqrt(max(up**2 - 2 * phi * up * down + down**2, 0.0)))

    value = (gained - lost) / n
    low = value - half(a.value - a.low, b.high - b.value)
    high = value + half(a.high - a.value, b.value - b.low)
    return Difference(value, low, high, float(p), "McNemar exact", n, bound=tango_bound(lost, gained, n))


def tango_score(loss: np.ndarray, lost: np.ndarray, gained: np.ndarray, n: int) -> np.ndarray:
    """Return the score statistic of the hypothesis that a paired proportion loses `loss`, standard normal.

    Below `-1.645` the loss is less than that at a one-sided 5 % (Tango 1998, the test of non-inferiority for
    paired samples): the variance is the one that the data have at that loss, so that it holds where few
    examples or none changed. Scalars or arrays of one shape; `lost` and `gained` of `n` examples changed.
    """
    linear = (2 * n + gained - lost) * loss - lost - gained
    root = np.sqrt(np.maximum(linear**2 + 8 * n * gained * loss * (1 - loss), 0.0))
    gained_share = (root - linear) / (4 * n)  # its most likely value, were the loss this one
    return (lost - gained - n * loss) / np.sqrt(n * (2 * gained_share + loss * (1 - loss)))


def tango_bound(lost: float, gained: float, n: int, confidence: float = CONFIDENCE) -> float:
    """Return the upper one-sided bound of the loss `(lost - gained) / n` of a paired proportion.

    It inverts the test of `tango_score`. The lower bound is minus that of the loss turned round.
    """
    critical = _ONE_SIDED_Z if confidence == CONFIDENCE else float(norm.ppf(confidence))

    def score(loss: float) -> float:
        return float(tango_score(loss, lost, gained, n)) + critical

    edge = 1 - 1e-12
    least = max((lost - gained) / n, -edge) + 1e-12
    return 1.0 if lost == n else float(brentq(score, least, edge))


def paired_loss_bounds(
    statistic: Statistic,
    columns: Columns,
    baseline_columns: Columns,
    *,
    confidence: float,
    higher_is_better: bool,
    relative: bool = False,
    block: int = 1,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return lower and upper one-sided bounds of the loss, each at `confidence`, by a paired bootstrap.

    With `relative` the loss is a share of the baseline's value in the same resample; where that is not above
    0 in any of them, nothing is bounded. Nor is it by fewer than `LEAST_EXAMPLES`. Other arguments as for
    `paired_difference`.
    """
    n = _length(columns)
    if n < LEAST_EXAMPLES:
        return -np.inf, np.inf
    sign, draws = -1 if higher_is_better else 1, []
    for indices in _resamples(n, block, resamples, seed):
        reference = _evaluate(statistic, baseline_columns, indices)
        if relative and (reference <= 0).any():
            return -np.inf, np.inf
        loss = sign * (_evaluate(statistic, columns, indices) - reference)
        draws.append(loss / reference if relative else loss)
    losses = np.concatenate(draws)
    return -_quantile(-losses, confidence, n, block), _quantile(losses, confidence, n, block)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being one family (Holm 1979), in the order given."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def timing_ratio(
    times: np.ndarray, reference_times: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return the median over rounds `(rounds,)` of time / reference with its interval; below 1 is faster.

    The ratio is formed within a round before the median is taken: drift hits both halves of a round and
    cancels, and the interval is about half as wide as that of a ratio of medians.
    """
    columns = {"ratio": np.asarray(times, float) / np.asarray(reference_times, float)}
    return statistic_interval(Median("ratio"), columns, resamples=resamples, seed=seed, least=1)


def noise_floor(aa_ratio: Interval) -> float:
    """Return the half-width around 1 that covers the A/A interval: ratios nearer 1 than this say nothing."""
    return max(abs(aa_ratio.low - 1), abs(aa_ratio.high - 1))


def verdict(result: Interval, *, floor: float = 0.0, higher_is_better: bool) -> str:
    """Return "better", "worse" or "no measurable change".

    A `Difference` is measured from 0 and needs p < 0.05 (Holm's, for a family); any other `Interval` is a
    ratio and is measured from 1. Either must lie further than `floor` from there, and its interval must leave
    that point out. Raises `BadData` for NaN: such a model has "collapsed".
    """
    centre = 0.0 if isinstance(result, Difference) else 1.0
    if np.isnan([result.value, result.low, result.high]).any():
        raise BadData(
            f"no verdict on {result}: it holds NaN. A model without a score has collapsed; say that."
        )
    significant = not isinstance(result, Difference) or result.p < 1 - CONFIDENCE
    excluded = result.low > centre or result.high < centre
    if not (significant and excluded and abs(result.value - centre) > floor):
        return "no measurable change"
    return "better" if (result.value > centre) == higher_is_better else "worse"


def _length(columns: Columns) -> int:
    lengths = {name: len(values) for name, values in columns.items()}
    if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
        raise BadData(f"columns need one entry per example, the same number in each, at least one: {lengths}")
    return next(iter(lengths.values()))


def _resamples(n: int, block: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield index matrices `(some, n)`, `resamples` rows in all, the same for the same arguments."""
    if block < 1 or resamples < 1:
        raise BadSetting(f"block={block}, resamples={resamples}: both must be at least 1")
    block = fitted_block(block, n)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    for done in range(0, resamples, rows):
        count = min(rows, resamples - done)
        starts = rng.integers(0, n, (count, -(-n // block), 1))
        within = starts if block == 1 else (starts + np.arange(block)) % n
        yield within.reshape(count, -1)[:, :n]


def times_drawn(indices: np.ndarray) -> np.ndarray:
    """Return how often each resample holds each example: indices to counts, both `(resamples, n)`."""
    offsets = np.arange(len(indices))[:, None] * indices.shape[1]
    return np.bincount((indices + offsets).ravel(), minlength=indices.size).reshape(indices.shape)


def fitted_block(block: int, n: int) -> int:
    """Return how many examples a block really holds where `block` are asked for and there are `n`."""
    return min(block, max(1, n // LEAST_BLOCKS))


def _evaluate(statistic: Statistic, columns: Columns, indices: np.ndarray) -> np.ndarray:
    """Return the statistic of each row of `indices`, vectorised where the statistic can."""
    if hasattr(statistic, "resampled"):
        return statistic.resampled(columns, indices)
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    return np.array([statistic({name: a[row] for name, a in arrays.items()}) for row in indices], dtype=float)


def _bootstrap(value: float, draws: Iterable[np.ndarray], n: int, block: int) -> tuple[float, float, float]:
    """Return the bounds of the interval of `value`, and the share p of draws as far from it as it is from 0.

    All are NaN without draws, or for a `value` that is not finite.
    """
    if not np.isfinite(value) or not (chunks := list(draws)):
        return np.nan, np.nan, np.nan
    draws = np.concatenate(chunks)
    draws = draws[np.isfinite(draws)]
    level = 0.5 + CONFIDENCE / 2
    widening = _widened(level, n, block) / _Z
    # The tolerance keeps rounding from splitting draws that equal the observed difference.
    extreme = np.abs(draws - value) >= abs(value) / widening * (1 - 1e-9)
    low, high = -_quantile(-draws, level, n, block), _quantile(draws, level, n, block)
    return low, high, (1 + int(extreme.sum())) / (1 + len(draws))


def _widened(level: float, n: int, block: int) -> float:
    """Return how many standard errors of a bootstrap a quantile of few independent units lies out.

    Resampling m units understates their spread by √((m-1)/m) and knows nothing of Student's t: the factor to
    the normal quantile, that of the expanded percentile interval (Hesterberg 2015), is 1.06 at 30 units,
    1.003 at 500.
    """
    units = n // fitted_block(block, n)
    return float(np.sqrt(units / (units - 1)) * t.ppf(level, units - 1)) if units > 1 else np.inf


def _quantile(draws: np.ndarray, level: float, n: int, block: int) -> float:
    """Return the upper bound of `draws` at a one-sided `level`; NaN without finite ones."""
    draws = draws[np.isfinite(draws)]
    return float(np.quantile(draws, norm.cdf(_widened(level, n, block)))) if len(draws) else np.nan
