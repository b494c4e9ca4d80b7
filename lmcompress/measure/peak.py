"""Measures, in a process of its own, the most memory that loading a saved model and one call take.

`python -m lmcompress.measure.peak FOLDER …` prints a line of JSON; the figure includes the libraries,
whose own is given beside it.
"""

import argparse
import json
import resource
import sys
from pathlib import Path

import torch

from lmcompress.measure.calls import Shape, prepared_calls
from lmcompress.models import storage


def main(arguments: list[str] | None = None) -> None:
    """Load the folder, make one call, print {"peak_bytes", "baseline_bytes", "peak_kind"}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="as storage.save wrote it")
    parser.add_argument("--kind", required=True, choices=("encoder", "decoder", "encoder-decoder"))
    parser.add_argument("--part", required=True, choices=("forward", "prefill", "encode", "decode"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    baseline = peak_rss_bytes()
    with torch.no_grad():
        model, _ = storage.load(options.folder, device=options.device)
        shape = Shape(options.part, options.batch, options.length)
        call = prepared_calls({"model": model}, shape, kind=options.kind)["model"]
        call.prepare()
        call.run()
    on_cuda = torch.device(options.device).type == "cuda"
    peak = {
        "peak_bytes": torch.cuda.max_memory_allocated(options.device) if on_cuda else peak_rss_bytes(),
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
    main()
