"""First floor: the arithmetic of weight statistics, one chunk of one tensor at a time.

`scan` runs it on threads and merges the chunks of each tensor; `quantiles` reads the histogram of |x|.
Nothing here knows of names, groups or tables: that is `weight_stats`.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue

import numpy as np
import torch

from helpers.checkpoints import TensorRef
from helpers.errors import BadSetting

THRESHOLDS = {"n_above_0_1": 0.1, "n_above_1": 1.0}
QUANTILES = {f"abs_q{round(100 * p):02d}": p for p in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
QUANTILE_RESOLUTION = 2.0**-7  # relative width of a histogram bin: 7 mantissa bits are kept

_MANTISSA_SHIFT = 16
_BINS = (0x7F800000 >> _MANTISSA_SHIFT) + 1  # up to the bits of infinity, which a large float64 becomes
# Cache-sized, and below the 32,768 elements from which torch splits an operation over threads of its own.
_PIECE = 32_000


@dataclass
class _Workspace:
    """Scratch memory of one worker, reused for every piece."""

    buffer: bytearray
    values: torch.Tensor
    squares: torch.Tensor
    magnitude: np.ndarray
    keys: np.ndarray
    flags: np.ndarray

    @classmethod
    def make(cls, buffer_bytes: int) -> "_Workspace":
        wide = [torch.empty(_PIECE, dtype=torch.float64) for _ in range(2)]
        narrow = [np.empty(_PIECE, dtype=dtype) for dtype in (np.float32, np.int32, bool)]
        return cls(bytearray(buffer_bytes), *wide, *narrow)


@dataclass
class Part:
    """Statistics of some elements: (n, mean, M2, M3, M4) of its pieces, range, counts, histogram of |x|."""

    moments: list[tuple[float, ...]]
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
    workers, free = torch.get_num_threads(), SimpleQueue()
    for _ in range(workers):
        free.put(_Workspace.make(chunk_bytes))

    def work(task: tuple[TensorRef, int, int]) -> Part:
        workspace = free.get()
        try:
            return _scan(*task, workspace)
        finally:
            free.put(workspace)

    tasks = [_chunks(ref, chunk_bytes) for ref in refs]
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            parts = pool.map(work, [task for chunks in tasks for task in chunks])
            for chunks in tasks:
                yield merge([next(parts) for _ in chunks])
        finally:
            torch.set_num_threads(workers)


def _chunks(ref: TensorRef, max_bytes: int) -> list[tuple[TensorRef, int, int]]:
    step = max(max_bytes // ref.dtype.itemsize, 1)
    return [(ref, start, min(start + step, ref.numel)) for start in range(0, ref.numel, step)]


def _scan(ref: TensorRef, start: int, stop: int, workspace: _Workspace) -> Part:
    part = Part([], math.inf, -math.inf, np.zeros(3, dtype=np.int64), np.zeros(_BINS, dtype=np.int64))
    elements = ref.read_range(start, stop, workspace.buffer)
    if elements.dtype.itemsize < 4:
        return _scan_patterns(elements, part)
    for piece in elements.split(_PIECE):
        array = piece.numpy()
        magnitude = np.abs(
            array, out=workspace.magnitude[: len(array)] if array.dtype == np.float32 else None
        )
        added = _bin(magnitude, workspace)
        if len(added) >= _BINS and not np.isfinite(array).all():
            part.low = part.high = math.nan
            return part
        # A piece whose largest magnitude lies inside the range so far cannot widen it: most need no search.
        if _edges(len(added)) >= min(-part.low, part.high):
            part.low, part.high = min(part.low, float(array.min())), max(part.high, float(array.max()))
        part.histogram[: len(added)] += added
        part.counts += _count(magnitude, added, workspace)
        part.moments.append(_central(piece, workspace))
    return part


def _scan_patterns(elements: torch.Tensor, part: Part) -> Part:
    """The same for 16-bit floats (8-bit ones are widened): counting their 65,536 values says everything."""
    half = elements if elements.dtype.itemsize == 2 else elements.to(torch.bfloat16)
    count = torch.bincount(
        half.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF), minlength=1 << 16
    ).numpy()
    used = np.flatnonzero(count)
    values = torch.from_numpy(used.astype(np.uint16)).view(half.dtype).to(torch.float64).numpy()
    count, magnitude = count[used], np.abs(values)
    if not np.isfinite(values).all():
        part.low = part.high = math.nan
        return part
    n = int(count.sum())
    mean = float(values @ count) / n
    powers = [float(((values - mean) ** k) @ count) for k in (2, 3, 4)]
    above = [count[magnitude > threshold].sum() for threshold in THRESHOLDS.values()]
    keys = magnitude.astype(np.float32).view(np.int32) >> _MANTISSA_SHIFT
    np.add.at(part.histogram, keys, count)
    counts = np.array([*above, count[magnitude == 0].sum()], dtype=np.int64)
    return Part([(n, mean, *powers)], float(values.min()), float(values.max()), counts, part.histogram)


def _bin(magnitude: np.ndarray, workspace: _Workspace) -> np.ndarray:
    """Histogram of |x| up to its last used bin.

    A float's bits grow with its magnitude, so exponent and leading mantissa bits number the bins for nothing.
    """
    bits = magnitude.astype(np.float32, copy=False).view(np.int32)
    keys = np.right_shift(bits, _MANTISSA_SHIFT, out=workspace.keys[: len(magnitude)])
    return torch.bincount(torch.from_numpy(keys)).numpy()  # numpy's would widen the keys first


def _count(magnitude: np.ndarray, added: np.ndarray, workspace: _Workspace) -> np.ndarray:
    """Elements above each threshold and exact zeros; the histogram tells when there can be none."""
    flags = workspace.flags[: len(magnitude)]
    counts = np.zeros(len(THRESHOLDS) + 1, dtype=np.int64)
    for i, threshold in enumerate(THRESHOLDS.values()):
        if _edges(len(added)) > threshold:
            counts[i] = np.count_nonzero(
                np.greater(magnitude, _at_most(threshold, magnitude.dtype), out=flags)
            )
    counts[-1] = len(magnitude) - np.count_nonzero(magnitude) if added[0] else 0
    return counts


def _central(piece: torch.Tensor, workspace: _Workspace) -> tuple[float, ...]:
    """(n, mean, M2, M3, M4) of one piece from its power sums, about its mean if that is not small.

    Sums about zero save two passes, and lose nothing while the mean is within a standard deviation of it;
    beyond, the corrected two-pass algorithm of Chan, Golub and LeVeque (1983) is used.
    """
    n = len(piece)
    values, squares = workspace.values[:n], workspace.squares[:n]
    values.copy_(piece)
    shift = 0.0
    for _ in range(2):
        mean = values.sum().item() / n
        s2 = torch.mul(values, values, out=squares).sum().item() / n
        if mean**2 <= s2 / 2:
            break
        values.sub_(mean)
        shift += mean
    # Products and sums, not dot products: those start threads of their own at this size.
    s3 = values.mul_(squares).sum().item() / n
    s4 = squares.mul_(squares).sum().item() / n
    m2 = s2 - mean**2
    m3 = s3 - 3 * mean * s2 + 2 * mean**3
    m4 = s4 - 4 * mean * s3 + 6 * mean**2 * s2 - 3 * mean**4
    return n, shift + mean, n * m2, n * m3, n * m4


def _at_most(threshold: float, dtype: np.dtype) -> np.floating:
    """Largest number of `dtype` not above `threshold`, so that comparing with it is exact (0.1 is no float32)."""
    nearest = dtype.type(threshold)
    return nearest if float(nearest) <= threshold else np.nextafter(nearest, dtype.type(0))


def merge(parts: Sequence[Part]) -> Part:
    """Merge any number of parts at once: Pébay (2008), eq. 2.1, summed over parts instead of pairwise."""
    pieces = [piece for part in parts for piece in part.moments]
    if not pieces:
        return Part([(0, *[math.nan] * 4)], math.nan, math.nan, np.zeros(3, dtype=np.int64), np.zeros(0))
    n, mean, m2, m3, m4 = np.array(pieces).T
    total = n.sum()
    centre = math.fsum(n * mean) / total
    d = mean - centre
    merged = (
        total,
        centre,
        math.fsum(m2 + n * d**2),
        math.fsum(m3 + 3 * d * m2 + n * d**3),
        math.fsum(m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4),
    )
    low, high = np.array([(part.low, part.high) for part in parts]).T
    return Part(
        [merged],
        low.min(),
        high.max(),
        sum(part.counts for part in parts),
        sum(part.histogram for part in parts),
    )


def quantiles(part: Part, n: int) -> dict[str, float]:
    """Quantiles of |x| as numpy defines them, each order statistic taken by its place within its bin."""
    if not n or not math.isfinite(part.low + part.high):
        return dict.fromkeys(QUANTILES, math.nan)
    used = np.flatnonzero(part.histogram)
    count = part.histogram[used]
    below = np.cumsum(count) - count
    # The bin above the last is infinity, which only the magnitude's own maximum can stand in for.
    edges = np.minimum(_edges(np.stack([used, used + 1])), max(-part.low, part.high))
    values = {}
    for name, p in QUANTILES.items():
        rank = p * (n - 1)
        neighbours = np.array([math.floor(rank), math.ceil(rank)])
        i = np.searchsorted(below, neighbours, side="right") - 1
        lower, upper = edges[0, i] + (neighbours - below[i] + 0.5) / count[i] * (edges[1, i] - edges[0, i])
        values[name] = float(lower + (rank - neighbours[0]) * (upper - lower))
    return values


def _edges(keys: np.ndarray | int) -> np.ndarray:
    """Lower edge of the bins `keys`, infinity beyond the last finite one."""
    return _all_edges()[np.minimum(keys, _BINS - 1)]


@cache
def _all_edges() -> np.ndarray:
    return (np.arange(_BINS, dtype=np.int32) << _MANTISSA_SHIFT).view(np.float32).astype(np.float64)
