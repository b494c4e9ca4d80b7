"""Which tensors of a checkpoint are parameters, and the moments, counts and histogram of each, streamed.

`scan` takes chunks of tensors on threads and merges them; `quantiles` reads the histogram of |x|. Groups and
tables are the business of `statistics`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models import families
from lmcompress.models.checkpoints import TensorRef, tensors
from lmcompress.models.families import TensorPlace

THRESHOLDS = {"n_above_0_1": 0.1, "n_above_1": 1.0}
QUANTILES = {f"abs_q{round(100 * p):02d}": p for p in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
# A bin is numbered by the upper 16 bits of |x| as float32: bits grow with magnitude.
BINS, _BIN_SHIFT, _INFINITE = 1 << 15, 16, 0x7F800000 >> 16
QUANTILE_RESOLUTION = 2.0**-7  # relative width of a bin: 7 mantissa bits are kept

_SAMPLE = 4096  # elements whose mean is near enough to that of a chunk …
_LONGEST = 1 << 20  # … of at most so many
_CACHED = 1 << 16  # elements whose float64 temporaries stay in a second-level cache: three times as fast


def parameters(path: Path) -> tuple[list[TensorRef], list[TensorPlace], dict[str, object]]:
    """Return parameter tensors of a checkpoint, tied ones once; their places; what was left out.

    Raises:
        NothingTouched: the checkpoint holds no floating-point parameter. BadSetting: it is only a difference.
    """
    record = path / "compression.json"
    if record.is_file() and (base := json.loads(record.read_text(encoding="utf-8")).get("base")):
        raise BadSetting(
            f"{path} holds only the tensors that differ from {base}: ask for the statistics of {base}."
        )

    def same_bytes(ref: TensorRef, other: TensorRef) -> bool:
        chunks = zip(ref.chunks(1 << 20), other.chunks(1 << 20), strict=True)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in chunks)

    refs, places, skipped, tied, matrices = [], [], [], {}, {}
    everything = list(tensors(path))
    everywhere = families.classify([ref.name for ref in everything], [ref.shape for ref in everything])
    for ref, position in zip(everything, everywhere, strict=True):
        if not ref.dtype.is_floating_point or families.is_buffer(ref.name, ref.shape):
            skipped.append(ref.name)
            continue
        # Only vocabulary matrices are ever tied, and a file that stores both copies does not say so.
        if position.kind in ("embedding", "head") and len(ref.shape) == 2 and ref.numel:
            twins = matrices.setdefault((ref.shape, ref.dtype), [])
            original = next((twin for twin in twins if same_bytes(ref, twin)), None)
            if original is not None:
                tied[ref.name] = original.name
                continue
            twins.append(ref)
        refs.append(ref)
        places.append(position)
    if not refs:
        raise NothingTouched(
            f"{path} holds no floating-point parameter; it holds {', '.join(skipped[:5]) or 'nothing'}."
        )
    return refs, places, {"skipped": skipped, "tied": tied}


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

    Each has a buffer of `chunk_bytes` and one core: threads of torch's own would only wait for each other.
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

    tasks = []
    for ref in refs:
        step = min(max(chunk_bytes // max(ref.dtype.itemsize, 4), 1), _LONGEST)  # narrower ones are widened
        tasks.append([(ref, start, min(start + step, ref.numel)) for start in range(0, ref.numel, step)])
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            results = pool.map(work, [task for chunks in tasks for task in chunks])
            for chunks in tasks:
                yield merge([next(results) for _ in chunks])
        finally:
            torch.set_num_threads(workers)


def moments_of(elements: torch.Tensor) -> Moments:
    """Return the statistics of a flat tensor of any float format: power sums about a shift near the mean.

    The mean of 4,096 of n elements lies within √(n/4096) standard deviations of the mean: 16 for the largest
    chunk, which costs five of float64's sixteen digits at worst (Chan, Golub, LeVeque 1983).
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
    low, high = np.min([m.low for m in moments]), np.max([m.high for m in moments])  # these keep a NaN
    counts, histogram = sum(m.counts for m in moments), sum(m.histogram for m in moments)
    n = sum(m.n for m in moments)
    return Moments(n, *merge_powers(*powers), float(low), float(high), counts, histogram)


def merge_powers(n, mean, m2, m3, m4: np.ndarray) -> tuple[float, float, float, float]:
    """Return mean, m2, m3 and m4 of the union of groups, each `(groups,)` (Pébay 2008, eq. 2.1).

    Sums are exact (`math.fsum`), so the order of groups does not matter.
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
    bits = np.minimum(np.stack([used, used + 1]), _INFINITE).astype(np.int32) << _BIN_SHIFT
    edges = np.minimum(bits.view(np.float32).astype(np.float64), max(-moments.low, moments.high))
    values = {}
    for name, p in QUANTILES.items():
        rank = p * (moments.n - 1)
        neighbours = np.array([math.floor(rank), math.ceil(rank)])
        i = np.searchsorted(below, neighbours, side="right") - 1
        lower, upper = edges[0, i] + (neighbours - below[i] + 0.5) / count[i] * (edges[1, i] - edges[0, i])
        values[name] = float(lower + (rank - neighbours[0]) * (upper - lower))
    return values


def _at_most(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest number of `dtype` not above `threshold` (0.1 is no float32): comparison is exact."""
    nearest = torch.tensor(threshold, dtype=dtype)
    return float(nearest if float(nearest) <= threshold else nearest.nextafter(torch.zeros((), dtype=dtype)))
