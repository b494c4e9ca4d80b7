"""Where a row comes from: what a reader needs to judge it or to make it again."""

from datetime import datetime

import torch

from lmcompress import device, measure


def provenance(
    *,
    model_hash: str,
    data_hash: str,
    technique_version: int,
    started: datetime,
    wall_s: float,
    on: str = "cpu",
    dtype: str = "float32",
    **more,
) -> dict:
    """Where a row comes from: code, packages, machine, hashes, when, and how long (seconds)."""
    return {
        "code": device.code_version(),
        "packages": device.versions(),
        "machine": device.machine(),
        "device": on,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "model_hash": model_hash,
        "data_hash": data_hash,
        "technique_version": technique_version,
        "measure_version": measure.MEASURE_VERSION,
        "started": started.isoformat(timespec="seconds"),
        "wall_s": round(wall_s, 3),
        **more,
    }
