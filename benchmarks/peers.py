"""What a user would pick instead, beside this project's own: bytes, paired difference, its bound, times.

The encoder on SST-2's 2,000 held-out sentences (`$ASSET_MIRROR` or the Hub), the decoder on harvested text.
The peers' files are made by NNCF's and ONNX Runtime's own functions with the settings named; but for the
4-bit MatMul and Gather, whose integers are rounded to nearest here. Each is written, read again, scored on
the same examples, and timed in turns with the dense model and a copy of it.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from lmcompress import Study, device, frame

NNCF, RUNTIME = "NNCF", "ONNX Runtime"
FOUR_BITS = {"bits": 4, "group_size": 128, "embeddings": True}
PEERS = {
    f"{NNCF} int8 weights": [{"technique": "openvino", "weights": "int8"}],
    f"{NNCF} int4, group 128, all layers": [
        {"technique": "openvino", "weights": "int4", "group_size": 128, "all_layers": True}
    ],
    f"{NNCF} int8, calibrated": [{"technique": "openvino-int8"}],
    f"{RUNTIME} dynamic int8": [{"technique": "onnxruntime-dynamic"}],
    f"{RUNTIME} 4-bit MatMul and Gather, group 128": [
        {"technique": "onnxruntime", "weights": "int4", "group_size": 128}
    ],
}
OURS = {
    "BF16": [{"technique": "cast", "dtype": "bfloat16"}],
    "dynamic int8": [{"technique": "int8-dynamic"}],
    "GPTQ, 4 bits, incl. embeddings, BF16": [
        {"technique": "gptq", **FOUR_BITS},
        {"technique": "cast", "dtype": "bfloat16"},
    ],
    "NNCF's scale estimation at int4, all layers": [{"technique": "openvino-int4"}],
}
MODELS = {"encoder": ("reference/minilm-sst2", "sst2"), "decoder": ("pocket/gpt2-pydocs", "pydocs-lm")}


def main() -> None:
    """Print a table per model: peers first, then what this project makes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=MODELS, help="one of the two models")
    parser.add_argument("--examples", type=int, help="score so many only")
    parser.add_argument("--folder", type=Path, help="keep the rows here, and go on from those that are there")
    options = parser.parse_args()
    print(f"{device.machine()['cpu']}, {torch.get_num_threads()} thread(s)")
    with tempfile.TemporaryDirectory() as folder:
        for kind, (model, task) in MODELS.items():
            if options.only in (None, kind):
                study = Study("peers", profile="benchmark", folder=options.folder or folder)
                baseline = study.baseline(model, task, limit=options.examples)
                rows = [baseline.measure_recipe(recipe) for recipe in (PEERS | OURS).values()]
                show(kind, [baseline.dense, *rows])


def show(kind: str, rows: list[dict]) -> None:
    """Print what was measured of the dense model and the candidates, a line each."""
    table = frame(rows, details=False)
    table.insert(0, kind, ["dense", *PEERS, *(f"ours: {name}" for name in OURS)])
    ratios = sorted(name for name in table if name.startswith("ratio."))
    shown = table[[kind, "size_mb", "value", "delta", "delta_low", "delta_high", "bound_share", *ratios]]
    print(f"\n{shown.to_markdown(index=False, floatfmt='.4g')}")


if __name__ == "__main__":
    main()
