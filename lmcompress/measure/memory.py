"""What a model weighs: parameters, bytes on disk, bytes per storage format, and peak memory when run."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn

from lmcompress.measure import fresh
from lmcompress.measure.bytes import bytes_by_format, file_bytes
from lmcompress.measure.calls import Shape
from lmcompress.models.anatomy import count_parameters
from lmcompress.models.families import integer_layers
from lmcompress.models.packed import Unpack


def memory(model: nn.Module, folder: Path | str | None) -> dict:
    """Return the row's "memory" but for the peak (see `peak_memory`); without `folder` no "file_bytes".

    Tied weights are counted once, packed integers as the weights they stand for.
    """
    nonzero, packed = None, integer_layers(model)
    if all(hasattr(layer, "dequantized") for layer in packed):  # a graph does not show its weights
        nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
        nonzero += sum(int(layer.dequantized().count_nonzero()) for layer in packed)
    return {
        "parameters": count_parameters(model),
        "nonzero_parameters": nonzero,
        "file_bytes": None if folder is None else file_bytes(folder),
        "formats": bytes_by_format(model),
        "peak_bytes": None,
        "peak_kind": None,
    }


def peak_memory(
    folder: Path | str,
    *,
    kind: str,
    shape: Shape,
    device: str = "cpu",
    unpack: Unpack = "auto",
    timeout_s: float = 1800.0,
) -> dict:
    """Return the peak memory of a fresh process that loads `folder` and makes one call of `shape`.

    {"peak_bytes", "baseline_bytes", "peak_kind"}: resident bytes ("rss") with the libraries, which alone take
    the baseline; or the most allocated by torch ("cuda"). `unpack` as for `storage.load`. A process that
    fails is a `StudyError`.
    """
    settings = json.dumps(asdict(shape) | {"kind": kind, "device": device, "unpack": unpack})
    return fresh.run(
        "lmcompress.measure.peak",
        str(Path(folder).resolve()),
        settings,
        doing=f"measuring the peak memory of {folder}",
        if_killed=", take a smaller batch or shorter length, or leave the peak out: timed=False, or `parts` "
        'without "peak"',
        timeout_s=timeout_s,
    )
