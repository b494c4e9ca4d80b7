"""Second floor: what the numbers in a checkpoint look like, without building the model.

One streaming pass gives the moments, counts and quantiles of every tensor, in memory that does not depend on the
size of the checkpoint. Whole matrices (spectra, similarity between blocks) are the business of `weight_spectra`.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pandas as pd
import torch

from helpers import assets, weight_names
from helpers.checkpoints import TensorRef, tensors
from helpers.errors import BadSetting, BadWeights, NothingTouched

THRESHOLDS = {"n_above_0_1": 0.1, "n_above_1": 1.0}
QUANTILES = {f"abs_q{round(100 * p):02d}": p for p in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
QUANTILE_RESOLUTION = 2.0**-7  # relative width of a histogram bin: 7 mantissa bits are kept

_MEANS = ("mean", "std", "skewness", "kurtosis")
_MANTISSA_SHIFT = 16
_BINS = (0x7F800000 >> _MANTISSA_SHIFT) + 1  # up to the bits of infinity, which a large float64 becomes
# Cache-sized, and below the 32,768 elements from which torch splits an operation over threads of its own.
_PIECE = 32_000


@dataclass
class _Workspace:
    """Scratch memory of one worker, reused for every piece."""

    buffer: bytearray
    centred: torch.Tensor
    power: torch.Tensor
    magnitude: torch.Tensor
    keys: torch.Tensor
    flags: torch.Tensor

    @classmethod
    def make(cls, buffer_bytes: int) -> "_Workspace":
        wide = [torch.empty(_PIECE, dtype=torch.float64) for _ in range(2)]
        magnitude = torch.empty(_PIECE, dtype=torch.float32)
        keys = torch.empty(_PIECE, dtype=torch.int32)
        return cls(bytearray(buffer_bytes), *wide, magnitude, keys, torch.empty(_PIECE, dtype=torch.bool))


@dataclass
class _Part:
    """Statistics of some elements: rows (n, mean, M2, M3, M4), range, counts and the histogram of |x|."""

    moments: np.ndarray
    low: float
    high: float
    counts: np.ndarray
    histogram: np.ndarray


def moments(path_or_id: str | Path, *, chunk_bytes: int = 64 << 20) -> pd.DataFrame:
    """Statistics of every parameter tensor of a checkpoint, one row each, from one pass over its bytes.

    Columns: name, shape, dtype, n; mean, std (population), skewness E[z³], kurtosis E[z⁴]−3 (NaN for constant
    tensors); min, max; counts n_above_0_1, n_above_1 (|x| > 0.1, > 1) and n_zero; quantiles of |x| abs_q01 …
    abs_q99, exact to a bin of relative width `QUANTILE_RESOLUTION`; stack, kind, role, is_bias, block.
    `frame.attrs` names what was left out: "skipped" (buffers, integers) and "tied" (name → the tensor it repeats).

    Args:
        path_or_id: a model id, folder, or weight file.
        chunk_bytes: memory of all read buffers together.

    Raises:
        BadWeights: NaN or infinity, naming the tensors. NothingTouched: no floating-point parameter at all.
    """
    workers = torch.get_num_threads()
    share = chunk_bytes // workers
    if share < 8:
        raise BadSetting(
            f"chunk_bytes={chunk_bytes} is too small for {workers} threads; give at least {8 * workers}."
        )
    refs, attrs = parameters(assets.resolve(path_or_id, kind="models"))
    free: SimpleQueue[_Workspace] = SimpleQueue()
    for _ in range(workers):
        free.put(_Workspace.make(share))

    def scan(task: tuple[TensorRef, int, int]) -> _Part:
        workspace = free.get()
        try:
            return _scan(*task, workspace)
        finally:
            free.put(workspace)

    rows, bad = [], []
    with ThreadPoolExecutor(workers) as pool:
        chunks = [_chunks(ref, share) for ref in refs]
        parts = pool.map(scan, [task for tasks in chunks for task in tasks])
        for ref, tasks in zip(refs, chunks, strict=True):
            part = _merge([next(parts) for _ in tasks])
            rows.append(_row(ref, part))
            if ref.numel and not math.isfinite(part.low + part.high):
                bad.append(ref.name)
    if bad:
        raise BadWeights(f"{len(bad)} tensors of {path_or_id} hold NaN or infinity: {', '.join(bad[:5])}.")
    where = weight_names.places([ref.name for ref in refs], [ref.shape for ref in refs])
    frame = pd.concat([pd.DataFrame(rows), pd.DataFrame([asdict(place) for place in where])], axis=1)
    frame["block"] = frame["block"].astype("Int64")
    frame.attrs = attrs
    return frame


def parameters(path: Path) -> tuple[list[TensorRef], dict[str, object]]:
    """Parameter tensors of a checkpoint, tied ones once, and what was left out ("skipped", "tied").

    Raises:
        NothingTouched: the checkpoint holds no floating-point parameter.
    """
    refs, skipped, tied = [], [], {}
    matrices: dict[tuple, list[TensorRef]] = {}
    everything = list(tensors(path))
    where = weight_names.places([ref.name for ref in everything], [ref.shape for ref in everything])
    for ref, place in zip(everything, where, strict=True):
        if not ref.dtype.is_floating_point or weight_names.is_buffer(ref.name, ref.shape):
            skipped.append(ref.name)
            continue
        # Only vocabulary matrices are ever tied, and a file that stores both copies does not say so.
        if place.kind in ("embedding", "head") and len(ref.shape) == 2 and ref.numel:
            twins = matrices.setdefault((ref.shape, ref.dtype), [])
            original = next((twin for twin in twins if _same(ref, twin)), None)
            if original is not None:
                tied[ref.name] = original.name
                continue
            twins.append(ref)
        refs.append(ref)
    if not refs:
        raise NothingTouched(
            f"{path} holds no floating-point parameter; it holds {', '.join(skipped[:5]) or 'nothing'}."
        )
    return refs, {"skipped": skipped, "tied": tied}


def overall(frame: pd.DataFrame) -> dict[str, float]:
    """Element count and fractions of a whole checkpoint: sums of counts over sums of elements."""
    n = int(frame["n"].sum())
    counts = {name: int(frame[name].sum()) for name in (*THRESHOLDS, "n_zero")}
    return {"n": n, **{_fraction(name): count / n for name, count in counts.items()}}


def by_group(frame: pd.DataFrame, by: Sequence[str] = ("stack", "kind", "is_bias")) -> pd.DataFrame:
    """Group figures: means weighted by elements, unweighted means over tensors (`…_unweighted`), and fractions.

    The unweighted column exists because published figures used it: there a norm's 768 gains weigh as much as a
    matrix of 2 million. Constant tensors have no skewness and are left out of its mean.
    """
    rows = []
    for key, group in frame[frame["n"] > 0].groupby(list(by), dropna=False, sort=True):
        row = dict(zip(by, key, strict=True)) | {"tensors": len(group)} | overall(group)
        for name in _MEANS:
            known = group[group[name].notna()]
            weighted = np.average(known[name], weights=known["n"]) if len(known) else math.nan
            row |= {name: float(weighted), f"{name}_unweighted": float(known[name].mean())}
        rows.append(row)
    return pd.DataFrame(rows)


def _fraction(count_name: str) -> str:
    return count_name.replace("n_", "fraction_", 1)


def _chunks(ref: TensorRef, max_bytes: int) -> list[tuple[TensorRef, int, int]]:
    step = max(max_bytes // ref.dtype.itemsize, 1)
    return [(ref, start, min(start + step, ref.numel)) for start in range(0, ref.numel, step)]


def _same(one: TensorRef, other: TensorRef) -> bool:
    pairs = zip(one.chunks(1 << 20), other.chunks(1 << 20), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _scan(ref: TensorRef, start: int, stop: int, workspace: _Workspace) -> _Part:
    elements = ref.read_range(start, stop, workspace.buffer)
    histogram = torch.zeros(_BINS, dtype=torch.int64)
    rows, low, high, counts = [], math.inf, -math.inf, np.zeros(3, dtype=np.int64)
    for piece in elements.split(_PIECE):
        if piece.dtype.itemsize < 4:
            piece = piece.to(torch.float32)
        smallest, largest = (bound.item() for bound in piece.aminmax())
        low, high = min(low, smallest), max(high, largest)
        if not math.isfinite(smallest + largest):
            return _Part(np.zeros((1, 5)), math.nan, math.nan, counts, histogram)
        rows.append(_central(piece, workspace))
        counts += _count(piece, max(-smallest, largest), workspace, histogram)
    return _Part(np.array(rows), low, high, counts, histogram)


def _central(piece: torch.Tensor, workspace: _Workspace) -> tuple[float, ...]:
    """(n, mean, M2, M3, M4) of one piece by the corrected two-pass algorithm (Chan, Golub, LeVeque 1983)."""
    n = len(piece)
    centred, power = workspace.centred[:n], workspace.power[:n]
    centred.copy_(piece)
    shift = centred.sum().item() / n
    centred.sub_(shift)
    rest = centred.sum().item() / n  # what rounding left of the mean
    torch.mul(centred, centred, out=power)
    s2 = power.sum().item()
    s3 = centred.mul_(power).sum().item()
    s4 = power.mul_(power).sum().item()
    m2 = s2 - n * rest**2
    m3 = s3 - 3 * rest * s2 + 2 * n * rest**3
    m4 = s4 - 4 * rest * s3 + 6 * rest**2 * s2 - 3 * n * rest**4
    return n, shift + rest, m2, m3, m4


def _count(
    piece: torch.Tensor, largest: float, workspace: _Workspace, histogram: torch.Tensor
) -> tuple[int, int, int]:
    """Elements above each threshold and exact zeros; adds |x| to the histogram.

    A float's bits grow with its magnitude, so exponent and leading mantissa bits number the bins for nothing.
    """
    n = len(piece)
    flags, keys = workspace.flags[:n], workspace.keys[:n]
    magnitude = torch.abs(piece, out=workspace.magnitude[:n]) if piece.dtype == torch.float32 else piece.abs()
    counts = []
    for threshold in THRESHOLDS.values():
        if largest > threshold:
            torch.gt(magnitude, _at_most(threshold, magnitude.dtype), out=flags)
        counts.append(np.count_nonzero(flags.numpy()) if largest > threshold else 0)
    torch.eq(magnitude, 0, out=flags)
    counts.append(np.count_nonzero(flags.numpy()))
    single = magnitude.to(torch.float32).view(torch.int32)
    added = torch.bincount(torch.bitwise_right_shift(single, _MANTISSA_SHIFT, out=keys))
    histogram[: len(added)] += added
    return tuple(counts)


def _at_most(threshold: float, dtype: torch.dtype) -> float:
    """Largest number of `dtype` not above `threshold`, so that comparing with it is exact (0.1 is no float32)."""
    if dtype == torch.float64 or float(np.float32(threshold)) <= threshold:
        return threshold
    return float(np.nextafter(np.float32(threshold), np.float32(0)))


def _merge(parts: Iterable[_Part]) -> _Part:
    """Merge any number of parts at once: Pébay (2008), eq. 2.1, summed over parts instead of pairwise."""
    parts = list(parts)
    if not parts:
        return _Part(
            np.zeros((1, 5)), math.nan, math.nan, np.zeros(3, dtype=np.int64), np.zeros(1, dtype=np.int64)
        )
    n, mean, m2, m3, m4 = np.concatenate([part.moments for part in parts]).T
    total = n.sum()
    centre = math.fsum(n * mean) / total if total else math.nan
    d = mean - centre
    merged = [
        total,
        centre,
        math.fsum(m2 + n * d**2),
        math.fsum(m3 + 3 * d * m2 + n * d**3),
        math.fsum(m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4),
    ]
    bounds = np.array([(part.low, part.high) for part in parts])
    counts, histogram = sum(part.counts for part in parts), sum(part.histogram for part in parts)
    return _Part(np.array([merged]), bounds[:, 0].min(), bounds[:, 1].max(), counts, np.asarray(histogram))


def _row(ref: TensorRef, part: _Part) -> dict[str, object]:
    _, mean, m2, m3, m4 = part.moments[0]
    n = ref.numel
    varies = n > 0 and m2 > 0
    row = {"name": ref.name, "shape": ref.shape, "dtype": str(ref.dtype).removeprefix("torch."), "n": n}
    row["mean"] = mean if n else math.nan
    row["std"] = math.sqrt(m2 / n) if n else math.nan
    row["skewness"] = (m3 / n) / (m2 / n) ** 1.5 if varies else math.nan
    row["kurtosis"] = n * m4 / m2**2 - 3 if varies else math.nan
    row |= {"min": part.low, "max": part.high}
    row |= dict(zip((*THRESHOLDS, "n_zero"), (int(count) for count in part.counts), strict=True))
    return row | _quantiles(part, n)


def _quantiles(part: _Part, n: int) -> dict[str, float]:
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


def _edges(keys: np.ndarray) -> np.ndarray:
    bits = np.minimum(keys, _BINS - 1).astype(np.int32) << _MANTISSA_SHIFT
    return bits.view(np.float32).astype(np.float64)
