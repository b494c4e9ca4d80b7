"""Second floor: what the numbers in a checkpoint look like, without building the model.

One streaming pass gives the moments, counts and quantiles of every tensor, in memory that does not depend on the
size of the checkpoint. Whole matrices (spectra, similarity between blocks) are the business of `weight_spectra`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from lmcompress.errors import BadWeights
from lmcompress.models import assets
from lmcompress.models.checkpoints import TensorRef
from lmcompress.weights import names
from lmcompress.weights.moments import QUANTILE_RESOLUTION, QUANTILES, THRESHOLDS, Part, quantiles, scan
from lmcompress.weights.spectra import cosine_tables, effective_rank, similarity, spectra, spectrum_curves

VERSION = 1
__all__ = [
    "QUANTILES",
    "QUANTILE_RESOLUTION",
    "THRESHOLDS",
    "VERSION",
    "by_group",
    "effective_rank",
    "moments",
]
__all__ += ["overall", "similarity", "spectra", "summary"]

_MEANS = ("mean", "std", "skewness", "excess_kurtosis")


def moments(path_or_id: str | Path, *, chunk_bytes: int = 4 << 20) -> pd.DataFrame:
    """Statistics of every parameter tensor of a checkpoint, one row each, from one pass over its bytes.

    Columns: name, shape, dtype, n; mean, std (population), skewness E[z³], excess_kurtosis E[z⁴]−3 (NaN for constant
    tensors); min, max; counts n_above_0_1, n_above_1 (|x| > 0.1, > 1) and n_zero; quantiles of |x| abs_q01 …
    abs_q99, exact to a bin of relative width `QUANTILE_RESOLUTION`; stack, kind, role, is_bias, block.
    `frame.attrs` names what was left out: "skipped" (buffers, integers) and "tied" (name → the tensor it repeats).

    Args:
        path_or_id: a model id, folder, or weight file.
        chunk_bytes: size of the read buffer that each thread has.

    Raises:
        BadWeights: NaN or infinity, naming the tensors. NothingTouched: no floating-point parameter at all.
    """
    refs, where, attrs = names.parameters(assets.resolve(path_or_id, kind="models"))
    rows, bad = [], []
    for ref, part in zip(refs, scan(refs, chunk_bytes=chunk_bytes), strict=True):
        rows.append(_row(ref, part))
        if ref.numel and not math.isfinite(part.low + part.high):
            bad.append(ref.name)
    if bad:
        raise BadWeights(f"{len(bad)} tensors of {path_or_id} hold NaN or infinity: {', '.join(bad[:5])}.")
    frame = pd.concat([pd.DataFrame(rows), pd.DataFrame([asdict(place) for place in where])], axis=1)
    frame["block"] = frame["block"].astype("Int64")
    frame.attrs = attrs
    return frame


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


def _row(ref: TensorRef, part: Part) -> dict[str, object]:
    n, m2 = part.n, part.m2
    varies = m2 > 0
    row = {"name": ref.name, "shape": ref.shape, "dtype": str(ref.dtype).removeprefix("torch."), "n": n}
    row |= {"mean": part.mean, "std": math.sqrt(m2 / n) if n else math.nan}
    row["skewness"] = (part.m3 / n) / (m2 / n) ** 1.5 if varies else math.nan
    row["excess_kurtosis"] = n * part.m4 / m2**2 - 3 if varies else math.nan
    row |= {"min": part.low, "max": part.high}
    row |= dict(zip((*THRESHOLDS, "n_zero"), part.counts.tolist(), strict=True))
    return row | quantiles(part)


def summary(path_or_id: str | Path, *, energy: float = 0.90) -> dict:
    """Everything the figures need of one model, small enough for a row: plain JSON, unknown values null.

    Keys: family; tensors, tied, skipped; overall; groups and layers (records of `by_group`, layers by stack, kind
    and block without biases); spectra (per role and kind of matrix: effective rank as mean, low and high over
    blocks, mean curve of cumulated energy on an even grid of ranks); similarity (per role: blocks and cosines).
    """
    path = assets.resolve(path_or_id, kind="models")
    frame = moments(path)
    inside = frame[frame["block"].notna() & ~frame["is_bias"]]
    return {
        "family": json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"],
        "tensors": len(frame),
        "tied": frame.attrs["tied"],
        "skipped": frame.attrs["skipped"],
        "overall": overall(frame),
        "groups": _records(by_group(frame)),
        "layers": _records(by_group(inside, by=("stack", "kind", "block"))),
        "spectra": _records(spectrum_curves(spectra(path, energy=energy))),
        "similarity": _records(cosine_tables(similarity(path))),
    }


def _records(frame: pd.DataFrame) -> list[dict]:
    return json.loads(frame.to_json(orient="records", double_precision=15))
