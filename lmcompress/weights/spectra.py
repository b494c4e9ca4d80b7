"""How much rank the matrices of a checkpoint need, and how much the blocks resemble each other.

One or two whole matrices are in memory at a time, plus a mean. The blocks' matrices of one role, say every
query projection of the encoder, form a series.
"""

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lmcompress.errors import NothingTouched
from lmcompress.models import assets
from lmcompress.models.checkpoints import TensorRef
from lmcompress.registry import analysis
from lmcompress.weights.moments import parameters

VERSION = analysis(1, "redundancy")
KINDS = ("original", "consecutive difference", "difference to the mean", "Gaussian of the same shape")
_WORTH_THREADS = 1024  # below this side threads gain little, and lose much on a machine that is busy
_KEY = ["stack", "kind", "role"]  # of a series
_Series = list[tuple[int, TensorRef]]


def effective_rank(singular_values: np.ndarray, *, energy: float = 0.90) -> float:
    """Return the smallest k with Σ_{i≤k} σ² ≥ energy · Σ σ², over the number of singular values (0–1).

    A zero matrix needs no rank: 0.
    """
    cumulated = np.cumsum(np.sort(np.asarray(singular_values, dtype=np.float64))[::-1] ** 2)
    if not len(cumulated) or cumulated[-1] == 0:
        return 0.0
    # The tolerance keeps ten equal values at nine, whichever way 0.9 is rounded.
    return float(np.searchsorted(cumulated, energy * cumulated[-1] * (1 - 1e-12)) + 1) / len(cumulated)


def spectra(path_or_id: str | Path, *, energy: float = 0.90) -> pd.DataFrame:
    """Return singular values and effective rank of the blocks' matrices and of differences between blocks.

    One row per matrix: of (one of `KINDS`), stack, kind, role, block, effective_rank, singular_values
    (descending). The consecutive difference of block l is W_{l+1} − W_l; the Gaussian (one per series, seed
    0) is what a matrix without structure needs. Blocks of unequal shape have no differences.
    """
    rows = []
    for place, series in _series(path_or_id):
        for kind, block, matrix in _matrices(series):
            values = _singular_values(matrix)
            ranks = {"effective_rank": effective_rank(values, energy=energy), "singular_values": values}
            rows.append({"of": kind, **place, "block": block, **ranks})
    frame = pd.DataFrame(rows)
    frame["block"] = frame["block"].astype("Int64")
    return frame


def shared_ranks(path_or_id: str | Path, *, energy: float = 0.90) -> list[dict]:
    """Return how much rank a series of matrices needs together: what one basis for all blocks could save.

    Per series {"stack", "kind", "role", "blocks", "out", "in", "ranks"}; "ranks" are the numbers of
    directions that hold `energy` of the squares: "each" (mean over blocks), "mean" (of the mean matrix),
    "stacked" `(blocks·out, in)`, "concatenated" `(out, blocks·in)`, and "differences stacked", to the mean.
    Series of one block or of unequal shapes are left out.
    """

    def rank(matrix: torch.Tensor) -> int:
        values = _singular_values(matrix)
        return round(effective_rank(values, energy=energy) * len(values))

    rows = []
    for place, series in _series(path_or_id):
        if len(series) < 2 or len({ref.shape for _, ref in series}) > 1:
            continue
        whole = torch.stack([ref.read().to(torch.float64) for _, ref in series])
        ranks = {
            "each": sum(map(rank, whole)) / len(whole),
            "mean": rank(whole.mean(0)),
            "stacked": rank(whole.flatten(0, 1)),
            "concatenated": rank(whole.permute(1, 0, 2).flatten(1)),
            "differences stacked": rank((whole - whole.mean(0)).flatten(0, 1)),
        }
        shape = {"blocks": len(whole), "out": whole.shape[1], "in": whole.shape[2]}
        rows.append({**place, **shape, "ranks": ranks})
    return rows


def redundancy(path_or_id: str | Path, *, energy: float = 0.90) -> dict:
    """Return what blocks could share: "series" of `shared_ranks`, "similarity" of `cosine_tables`."""
    tables = cosine_tables(similarity(path_or_id)).to_dict("records")
    return {"series": shared_ranks(path_or_id, energy=energy), "similarity": tables}


def similarity(path_or_id: str | Path, *, chunk_bytes: int = 4 << 20) -> pd.DataFrame:
    """Return cosines between each two blocks' matrices: stack, kind, role, block_a, block_b, cosine.

    Inner products are added up over chunks of all blocks of a series, so one pass over the bytes is enough.
    """
    rows = []
    for place, series in _series(path_or_id):
        if len({ref.shape for _, ref in series}) > 1:
            continue
        gram = torch.zeros(len(series), len(series), dtype=torch.float64)
        streams = [ref.chunks(max(chunk_bytes // len(series), 8)) for _, ref in series]
        for chunks in zip(*streams, strict=True):
            stacked = torch.stack([chunk.to(torch.float64) for chunk in chunks])
            gram += stacked @ stacked.T
        norms = gram.diagonal().sqrt()
        cosine = gram / torch.outer(norms, norms).clamp_min(torch.finfo(norms.dtype).tiny)  # 0 of zeros
        for i, (block, _) in enumerate(series):
            for j, (other, _) in enumerate(series):
                rows.append({**place, "block_a": block, "block_b": other, "cosine": float(cosine[i, j])})
    return pd.DataFrame(rows)


def _series(path_or_id: str | Path) -> Iterator[tuple[dict[str, str], _Series]]:
    """Yield each series' stack, kind and role, and its blocks' numbers and matrices."""
    path = assets.resolve(path_or_id, kind="models")
    series: dict[tuple, _Series] = {}
    for ref, position in zip(*parameters(path)[:2], strict=True):
        inside = position.block is not None and position.kind.endswith(("attention", "feed-forward"))
        if inside and len(ref.shape) == 2:
            # The name without its block number: two may share a role, as the experts of a mixture do.
            template = re.sub(r"\.\d+\.", ".*.", ref.name, count=1)
            key = position.stack, position.kind, position.role, template
            series.setdefault(key, []).append((position.block, ref))
    if not series:
        raise NothingTouched(f"{path} has no attention or feed-forward matrix inside a numbered block.")
    for key, members in series.items():
        yield dict(zip(_KEY, key)), sorted(members, key=lambda member: member[0])


def _matrices(series: _Series) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """Yield each matrix whose spectrum is wanted, made when it is asked for."""
    for block, ref in series:
        yield KINDS[0], block, ref.read()
    shape = series[0][1].shape
    if len(series) > 1 and all(ref.shape == shape for _, ref in series):
        for (block, ref), (_, following) in pairwise(series):
            yield KINDS[1], block, following.read().to(torch.float64) - ref.read().to(torch.float64)
        mean = torch.zeros(shape, dtype=torch.float64)
        for _, ref in series:
            mean += ref.read().to(torch.float64) / len(series)
        for block, ref in series:
            yield KINDS[2], block, ref.read().to(torch.float64) - mean
    yield KINDS[3], None, torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _singular_values(matrix: torch.Tensor) -> np.ndarray:
    """Return them descending, from the smaller Gram matrix's eigenvalues in float64: faster than an SVD.

    Absolute errors are about 1e-8 of the largest.
    """
    wide = matrix.to(torch.float64)
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    if math.prod(wide.shape) == 0:
        return np.zeros(0)
    threads = torch.get_num_threads()
    try:
        if len(wide) < _WORTH_THREADS:
            torch.set_num_threads(1)
        return torch.linalg.eigvalsh(wide @ wide.T).clamp_(min=0).sqrt_().flip(0).numpy()
    finally:
        torch.set_num_threads(threads)


def spectrum_curves(frame: pd.DataFrame, *, points: int = 33) -> pd.DataFrame:
    """Return effective rank (mean, low, high over blocks) and mean energy curve by series and kind.

    The curve is the share of Σσ² held by the largest values, at `points` even fractions of the rank.
    """
    rows = []
    grid = np.linspace(0, 1, points)
    for key, group in frame.groupby([*_KEY, "of"], sort=False):
        curves = []
        for values in group["singular_values"]:
            energy = np.concatenate([[0.0], np.cumsum(values**2)])
            curves.append(np.interp(grid, np.linspace(0, 1, len(energy)), energy / (energy[-1] or 1.0)))
        ranks = group["effective_rank"]
        row = dict(zip((*_KEY, "of"), key, strict=True))
        row |= {"effective_rank": ranks.mean(), "low": ranks.min(), "high": ranks.max()}
        rows.append(row | {"curve": np.mean(curves, axis=0).round(5).tolist()})
    return pd.DataFrame(rows)


def cosine_tables(frame: pd.DataFrame) -> pd.DataFrame:
    """Return per series the block numbers and the square table of cosines between them."""
    rows = []
    for key, group in frame.groupby(_KEY, sort=False):
        table = group.pivot_table(index="block_a", columns="block_b", values="cosine")
        row = dict(zip(_KEY, key, strict=True))
        rows.append(row | {"blocks": table.index.tolist(), "cosine": table.to_numpy().round(6).tolist()})
    return pd.DataFrame(rows)
