"""What the numbers in a checkpoint look like, without building the model.

One streaming pass gives the moments, counts and quantiles of every tensor, in memory that does not depend on
the size of the checkpoint. Whole matrices (spectra, similarity between blocks) are the business of `spectra`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from lmcompress.errors import BadWeights
from lmcompress.models import assets, families
from lmcompress.registry import analysis
from lmcompress.weights.moments import THRESHOLDS, merge_powers, parameters, quantiles, scan, shape_of
from lmcompress.weights.spectra import cosine_tables, similarity, spectra, spectrum_curves
from lmcompress.weights.spectra import effective_rank as effective_rank  # beside the others, for the reader

VERSION = analysis(2, "weight-statistics")
POSITION_BIAS = "position-bias"  # the kind that `split_position_biases` gives to relative position biases
_COUNTS = (*THRESHOLDS, "n_zero")
_MEANS = ("mean", "std", "skewness", "excess_kurtosis")


def moments(path_or_id: str | Path, *, chunk_bytes: int = 4 << 20) -> pd.DataFrame:
    """Return statistics of every parameter of a checkpoint, a row each, from one pass over its bytes.

    Columns: name, shape, dtype, n; mean, std (population), skewness E[z³], excess_kurtosis E[z⁴]−3 (NaN for
    constant tensors); min, max; counts n_above_0_1, n_above_1 (|x| > 0.1, > 1) and n_zero; quantiles of |x|
    abs_q01 … abs_q99, exact to a bin of relative width `QUANTILE_RESOLUTION`; stack, kind, role, is_bias,
    block. `frame.attrs` names what was left out: "skipped" (buffers, integers) and "tied" (name → the tensor
    it repeats). Each thread reads through a buffer of `chunk_bytes`.

    Raises:
        BadWeights: NaN or infinity, naming the tensors. NothingTouched: no floating-point parameter at all.
    """
    refs, places, attrs = parameters(assets.resolve(path_or_id, kind="models"))
    rows = []
    for ref, tensor in zip(refs, scan(refs, chunk_bytes=chunk_bytes), strict=True):
        row = {"name": ref.name, "shape": ref.shape, "dtype": str(ref.dtype).removeprefix("torch.")}
        row |= {"n": tensor.n, "mean": tensor.mean} | shape_of(tensor.n, tensor.m2, tensor.m3, tensor.m4)
        row |= {"min": tensor.low, "max": tensor.high}
        rows.append(row | dict(zip(_COUNTS, tensor.counts.tolist(), strict=True)) | quantiles(tensor))
    bad = [row["name"] for row in rows if row["n"] and not math.isfinite(row["min"] + row["max"])]
    if bad:
        raise BadWeights(f"{len(bad)} tensors of {path_or_id} hold NaN or infinity: {', '.join(bad[:5])}.")
    frame = pd.concat([pd.DataFrame(rows), pd.DataFrame([asdict(position) for position in places])], axis=1)
    frame["block"] = frame["block"].astype("Int64")
    frame.attrs = attrs
    return frame


def overall(frame: pd.DataFrame) -> dict[str, float]:
    """Return element count and fractions of a whole checkpoint: sums of counts over sums of elements."""
    n = int(frame["n"].sum())
    return {"n": n} | {name.replace("n_", "fraction_", 1): int(frame[name].sum()) / n for name in _COUNTS}


def by_group(frame: pd.DataFrame, by: Sequence[str] = ("stack", "kind", "is_bias")) -> pd.DataFrame:
    """Return a row per group: moments of its pooled elements, means over its tensors, and fractions.

    The means over tensors, `…_unweighted`, exist because published figures used them: there a norm's 768
    gains weigh as much as a matrix of 2 million. Constant tensors have no skewness and are left out of it.
    """
    rows = []
    for key, group in frame[frame["n"] > 0].groupby(list(by), dropna=False, sort=True):
        row = dict(zip(by, key, strict=True)) | {"tensors": len(group)} | overall(group)
        unweighted = {f"{name}_unweighted": float(group[name].mean()) for name in _MEANS}
        rows.append(row | pooled_moments(group) | unweighted)
    return pd.DataFrame(rows)


def pooled_moments(frame: pd.DataFrame) -> dict[str, float]:
    """Return mean, std, skewness and excess kurtosis of all elements of the tensors in `frame` together."""
    n, mean, std = (frame[name].to_numpy(dtype=np.float64) for name in ("n", "mean", "std"))
    # A constant tensor has no skewness or kurtosis, and contributes nothing to the sums about its own mean.
    skewness, kurtosis = (frame[name].fillna(0).to_numpy() for name in ("skewness", "excess_kurtosis"))
    centre, *powers = merge_powers(n, mean, n * std**2, n * skewness * std**3, n * (kurtosis + 3) * std**4)
    return {"mean": centre} | shape_of(n.sum(), *powers)


def split_position_biases(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with relative position biases as a kind of their own: they are no embeddings."""
    is_bias = frame["name"].map(families.is_position_bias)
    return frame.assign(kind=frame["kind"].mask(is_bias, POSITION_BIAS))


def summary(path_or_id: str | Path, *, energy: float = 0.90) -> dict:
    """Return all that the figures need of one model, small enough for a row: JSON, unknown values null.

    Keys: family; tensors, tied, skipped; overall; groups and layers (records of `by_group`, layers by stack,
    kind and block without biases); spectra (`spectrum_curves`); similarity (`cosine_tables`).
    """
    path = assets.resolve(path_or_id, kind="models")
    frame = split_position_biases(moments(path))
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
