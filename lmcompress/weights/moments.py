"""First floor: the arithmetic of weight statistics, one chunk of one tensor at a time.

`scan` runs it on threads and merges the chunks of each tensor; `quantiles` reads the histogram of |x|.
Nothing here knows of names, groups or tables: that is `weight_stats`.
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
from lmcompress.weights import kernel

THRESHOLDS = {"n_above_0_1": 0.1, "n_above_1": 1.0}
QUANTILES = {f"abs_q{round(100 * p):02d}": p for p in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
QUANTILE_RESOLUTION = 2.0**-7  # relative width of a histogram bin: 7 mantissa bits are kept

_SAMPLE = 4096  # elements whose mean is near enough to that of a chunk …
_LONGEST = 1 << 20  # … of at most so many


@dataclass
class Part:
    """Statistics of n elements: mean, sums of powers about it (m2, m3, m4), range, counts, histogram of |x|.

    The range is NaN if any element is NaN or infinite.
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


def scan(refs: Sequence[TensorRef], *, chunk_bytes: int) -> Iterator[Part]:
    """Yield the statistics of each tensor in order, read in chunks by as many threads as torch would use.

    Each thread has a buffer of `chunk_bytes` and one core: threads of torch's own would only wait for each other.
    """
    if chunk_bytes < 8:
        raise BadSetting(
            f"chunk_bytes={chunk_bytes} holds no element; give at least 8, better some megabytes."
        )
    workers, buffers = torch.get_num_threads(), SimpleQueue()
    for _ in range(workers):
        buffers.put(bytearray(chunk_bytes))

    def work(task: tuple[TensorRef, int, int]) -> Part:
        ref, start, stop = task
        buffer = buffers.get()
        try:
            return part_of(ref.read_range(start, stop, buffer))
        finally:
            buffers.put(buffer)

    tasks = [_chunks(ref, chunk_bytes) for ref in refs]
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            parts = pool.map(work, [task for chunks in tasks for task in chunks])
            for chunks in tasks:
                yield merge([next(parts) for _ in chunks])
        finally:
            torch.set_num_threads(workers)


def part_of(elements: torch.Tensor) -> Part:
    """Statistics of a flat tensor of any float format, from power sums about a shift near the mean.

    The shift is the mean of 4,096 of the n elements, so it lies within √(n/4096) standard deviations of the mean:
    16 for the largest chunk, which costs five of float64's sixteen digits at worst (Chan, Golub, LeVeque 1983).
    """
    x = (elements if elements.dtype == torch.float64 else elements.to(torch.float32)).numpy()
    n = x.size
    (low, high), counts, histogram = kernel.tally(x, tuple(THRESHOLDS.values()))
    if histogram[kernel.first_infinite() :].any() and not np.isfinite(x).all():
        return Part(n, *[math.nan] * 6, counts, histogram)
    shift = float(x[:_SAMPLE].mean(dtype=np.float64))
    s1, s2, s3, s4 = kernel.power_sums(x, shift) / n
    m2 = s2 - s1**2
    m3 = s3 - 3 * s1 * s2 + 2 * s1**3
    m4 = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
    return Part(n, shift + s1, n * m2, n * m3, n * m4, float(low), float(high), counts, histogram)


def merge(parts: Sequence[Part]) -> Part:
    """Merge any number of parts at once: Pébay (2008), eq. 2.1, summed over parts instead of pairwise."""
    if not parts:
        return Part(0, *[math.nan] * 6, np.zeros(3, dtype=np.int64), np.zeros(kernel.BINS, dtype=np.int64))
    n, mean, m2, m3, m4 = np.array([(part.n, part.mean, part.m2, part.m3, part.m4) for part in parts]).T
    centre = math.fsum(n * mean) / n.sum()
    d = mean - centre
    return Part(
        sum(part.n for part in parts),
        centre,
        math.fsum(m2 + n * d**2),
        math.fsum(m3 + 3 * d * m2 + n * d**3),
        math.fsum(m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4),
        float(np.min([part.low for part in parts])),  # numpy's minimum keeps a NaN
        float(np.max([part.high for part in parts])),
        sum(part.counts for part in parts),
        sum(part.histogram for part in parts),
    )


def quantiles(part: Part) -> dict[str, float]:
    """Quantiles of |x| as numpy defines them, each order statistic taken by its place within its bin."""
    if not part.n or not math.isfinite(part.low + part.high):
        return dict.fromkeys(QUANTILES, math.nan)
    used = np.flatnonzero(part.histogram)
    count = part.histogram[used]
    below = np.cumsum(count) - count
    # The last bin has no upper edge of its own where a float64 lies beyond float32; the maximum is one.
    edges = np.minimum(kernel.lower_edges(np.stack([used, used + 1])), max(-part.low, part.high))
    values = {}
    for name, p in QUANTILES.items():
        rank = p * (part.n - 1)
        neighbours = np.array([math.floor(rank), math.ceil(rank)])
        i = np.searchsorted(below, neighbours, side="right") - 1
        lower, upper = edges[0, i] + (neighbours - below[i] + 0.5) / count[i] * (edges[1, i] - edges[0, i])
        values[name] = float(lower + (rank - neighbours[0]) * (upper - lower))
    return values


def _chunks(ref: TensorRef, max_bytes: int) -> list[tuple[TensorRef, int, int]]:
    # Narrower formats are widened to float32.
    step = min(max(max_bytes // max(ref.dtype.itemsize, 4), 1), _LONGEST)
    return [(ref, start, min(start + step, ref.numel)) for start in range(0, ref.numel, step)]
