"""The arithmetic of weight statistics: moments, counts and a histogram, one chunk of one tensor at a time.

`scan` runs it on threads and merges the chunks of each tensor; `quantiles` reads the histogram of |x|.
Nothing here knows names, groups or tables: that is `statistics`.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch

from lmcompress.errors import BadSetting
from lmcompress.models.checkpoints import TensorRef

THRESHOLDS = {"n_above_0_1": 0.1, "n_above_1": 1.0}
QUANTILES = {f"abs_q{round(100 * p):02d}": p for p in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
# A bin is numbered by the upper 16 bits of |x| as float32 (8 of exponent, 7 of mantissa): bits grow with
# magnitude.
BINS, _BIN_SHIFT, _INFINITE = 1 << 15, 16, 0x7F800000 >> 16
QUANTILE_RESOLUTION = 2.0**-7  # relative width of a bin: 7 mantissa bits are kept

_SAMPLE = 4096  # elements whose mean is near enough to that of a chunk …
_LONGEST = 1 << 20  # … of at most so many
_CACHED = (
    1 << 16
)  # elements whose float64 temporaries stay in a second-level cache: 3 times as fast as whole chunks


@dataclass
class Moments:
    """Statistics of n elements: mean, sums of powers about it (m2, m3, m4), range, counts, histogram of |x|.

    Mean, sums and range are NaN if any element is NaN or infinite.
    """

    n: int
    mean: float
    m2: float
    m3: float
    m4: float
    low: float
    high: float
    counts: np.ndarray
    histogram: np.ndarray


def scan(refs: Sequence[TensorRef], *, chunk_bytes: int) -> Iterator[Moments]:
    """Yield the statistics of each tensor in order, read in chunks by as many threads as torch would use.

    Each thread has a buffer of `chunk_bytes` and one core: threads of torch's own would only wait for each
    other.
    """
    if chunk_bytes < 8:
        raise BadSetting(
            f"chunk_bytes={chunk_bytes} holds no element; give at least 8, better some megabytes."
        )
    workers, buffers = torch.get_num_threads(), SimpleQueue()
    for _ in range(workers):
        buffers.put(bytearray(chunk_bytes))

    def work(task: tuple[TensorRef, int, int]) -> Moments:
        ref, start, stop = task
        buffer = buffers.get()
        try:
            return moments_of(ref.read_range(start, stop, buffer))
        finally:
            buffers.put(buffer)

    tasks = [_chunks(ref, chunk_bytes) for ref in refs]
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            results = pool.map(work, [task for chunks in tasks for task in chunks])
            for chunks in tasks:
                yield merge([next(results) for _ in chunks])
        finally:
            torch.set_num_threads(workers)


def moments_of(elements: torch.Tensor) -> Moments:
    """Return the statistics of a flat tensor of any float format: power sums about a shift near the mean.

    The shift is the mean of 4,096 of the n elements, so it lies within √(n/4096) standard deviations of the
    mean: 16 for the largest chunk, which costs five of float64's sixteen digits at worst (Chan, Golub,
    LeVeque 1983).
    """
    x = elements if elements.dtype == torch.float64 else elements.to(torch.float32)
    n, limits = len(x), [_at_most(threshold, x.dtype) for threshold in THRESHOLDS.values()]
    shift = float(x[:_SAMPLE].mean(dtype=torch.float64))
    sums, ranges, counts = torch.zeros(4, dtype=torch.float64), [], np.zeros(3, dtype=np.int64)
    histogram = torch.zeros(BINS, dtype=torch.int64)
    # Temporaries are allocated once: a fresh half megabyte per operation would cost more than the arithmetic.
    size, v, w = x.new_empty(_CACHED), sums.new_empty(_CACHED), sums.new_empty(_CACHED)
    for piece in x.split(_CACHED):
        m = len(piece)
        ranges.append(torch.stack(piece.aminmax()))  # aminmax passes NaN on
        torch.abs(piece, out=size[:m])
        # numpy counts True several times as fast as torch does.
        hits = (*(size[:m] > limit for limit in limits), piece == 0)
        counts += [np.count_nonzero(hit.numpy()) for hit in hits]
        bins = size[:m].to(torch.float32).view(torch.int32) >> _BIN_SHIFT
        histogram += torch.bincount(bins, minlength=BINS)
        v[:m].copy_(piece).sub_(shift)
        torch.mul(v[:m], v[:m], out=w[:m])
        sums += torch.stack([v[:m].sum(), w[:m].sum(), v[:m] @ w[:m], w[:m] @ w[:m]])
    low, high = float(torch.stack(ranges).min()), float(torch.stack(ranges).max())
    if not math.isfinite(low + high):
        return Moments(n, *[math.nan] * 6, counts, histogram.numpy())
    s1, s2, s3, s4 = (sums / n).tolist()
    m2 = s2 - s1**2
    m3 = s3 - 3 * s1 * s2 + 2 * s1**3
    m4 = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
    return Moments(n, shift + s1, n * m2, n * m3, n * m4, low, high, counts, histogram.numpy())


def merge(moments: Sequence[Moments]) -> Moments:
    """Return the statistics of all elements of several tensors or chunks together."""
    if not moments:
        return Moments(0, *[math.nan] * 6, np.zeros(3, dtype=np.int64), np.zeros(BINS, dtype=np.int64))
    powers = np.array([(m.n, m.mean, m.m2, m.m3, m.m4) for m in moments]).T
    return Moments(
        sum(m.n for m in moments),
        *merge_powers(*powers),
        float(np.min([m.low for m in moments])),  # numpy's minimum keeps a NaN
        float(np.max([m.high for m in moments])),
        sum(m.counts for m in moments),
        sum(m.histogram for m in moments),
    )


def merge_powers(
    n: np.ndarray, mean: np.ndarray, m2: np.ndarray, m3: np.ndarray, m4: np.ndarray
) -> tuple[float, float, float, float]:
    """Pool counts, means and sums of powers about the means `(groups,)`: Pébay (2008), eq.

    2.1, over all at once.

    Returns:
        Mean, m2, m3 and m4 of the union. Sums are exact (`math.fsum`), so the order of groups does not
        matter.
    """
    centre = math.fsum(n * mean) / n.sum()
    d = mean - centre
    return (
        centre,
        math.fsum(m2 + n * d**2),
        math.fsum(m3 + 3 * d * m2 + n * d**3),
        math.fsum(m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4),
    )


def shape_of(n: float, m2: float, m3: float, m4: float) -> dict[str, float]:
    """Return std (population), skewness E[z³] and excess kurtosis E[z⁴] − 3; the two are NaN of constants."""
    return {
        "std": math.sqrt(m2 / n) if n else math.nan,
        "skewness": (m3 / n) / (m2 / n) ** 1.5 if m2 > 0 else math.nan,
        "excess_kurtosis": n * m4 / m2**2 - 3 if m2 > 0 else math.nan,
    }


def quantiles(moments: Moments) -> dict[str, float]:
    """Return quantiles of |x| as numpy defines them, each order statistic by its place within its bin."""
    if not moments.n or not math.isfinite(moments.low + moments.high):
        return dict.fromkeys(QUANTILES, math.nan)
    used = np.flatnonzero(moments.histogram)
    count = moments.histogram[used]
    below = np.cumsum(count) - count
    # The last bin has no upper edge of its own where a float64 lies beyond float32; the maximum is one.
    edges = np.minimum(_lower_edges(np.stack([used, used + 1])), max(-moments.low, moments.high))
    values = {}
    for name, p in QUANTILES.items():
        rank = p * (moments.n - 1)
        neighbours = np.array([math.floor(rank), math.ceil(rank)])
        i = np.searchsorted(below, neighbours, side="right") - 1
        lower, upper = edges[0, i] + (neighbours - below[i] + 0.5) / count[i] * (edges[1, i] - edges[0, i])
        values[name] = float(lower + (rank - neighbours[0]) * (upper - lower))
    return values


def _lower_edges(bins: np.ndarray) -> np.ndarray:
    """Return the smallest |x| of each histogram bin; infinity for bins beyond float32."""
    bits = np.minimum(bins, _INFINITE).astype(np.int32) << _BIN_SHIFT
    return bits.view(np.float32).astype(np.float64)


def _at_most(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest number of `dtype` not above `threshold` (0.1 is no float32): comparison is exact."""
    nearest = torch.tensor(threshold, dtype=dtype)
    return float(nearest if float(nearest) <= threshold else nearest.nextafter(torch.zeros((), dtype=dtype)))


def _chunks(ref: TensorRef, max_bytes: int) -> list[tuple[TensorRef, int, int]]:
    # Narrower formats are widened to float32.
    step = min(max(max_bytes // max(ref.dtype.itemsize, 4), 1), _LONGEST)
    return [(ref, start, min(start + step, ref.numel)) for start in range(0, ref.numel, step)]
