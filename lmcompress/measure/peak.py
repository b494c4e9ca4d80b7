"""Measures, in a process of its own, the most memory that loading a saved model and one call take.

`python -m lmcompress.measure.peak FOLDER SETTINGS` (JSON: kind, device, unpack, fields of `Shape`) prints a
line of JSON; the figure includes the libraries, whose own is given beside it.
"""

import json
import resource
import sys
from pathlib import Path

import torch

from lmcompress.measure.calls import Shape, prepared_calls
from lmcompress.models import storage


def main(folder: str, settings: str) -> None:
    """Load the folder, make one call, print {"peak_bytes", "baseline_bytes", "peak_kind"}."""
    shape = json.loads(settings)
    kind, device, unpack = (shape.pop(name) for name in ("kind", "device", "unpack"))
    baseline = peak_rss_bytes()
    with torch.no_grad():
        model, _ = storage.load(folder, device=device, unpack=unpack)
        call = prepared_calls({"model": model}, Shape(**shape), kind=kind)["model"]
        call.prepare()
        call.run()
    on_cuda = torch.device(device).type == "cuda"
    peak = {
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else peak_rss_bytes(),
        "baseline_bytes": 0 if on_cuda else baseline,
        "peak_kind": "cuda" if on_cuda else "rss",
    }
    print(json.dumps(peak))


def peak_rss_bytes() -> int:
    """Return the most resident memory this process has had.

    Linux's `ru_maxrss` survives exec, so that a child would report its parent's peak; `VmHWM` does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main(*sys.argv[1:])
