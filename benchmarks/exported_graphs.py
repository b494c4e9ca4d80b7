"""Exported graphs against the same engine called directly on the same file, in one interleaved run.

`python benchmarks/exported_graphs.py [--small] [--calls 30]`: an encoder of BERT-base's shape and a decoder
of GPT-2 small's, random weights, batch 1 and 8, 128 tokens. "Here" is the model that `load_compressed` gives;
"direct" is the runtime on raw arrays, as its own documentation calls it. A ratio is time here over direct.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lmcompress import compress, device
from lmcompress.compress import Context
from lmcompress.measure.calls import Call, Shape, default_shapes, prepared_calls
from lmcompress.measure.latency import interleave
from lmcompress.models import storage
from lmcompress.stats import timing_ratio
from lmcompress.timing_lock import timing_lock

LENGTH = 128
VARIANTS = {
    "OpenVINO": ("openvino", {}),
    "OpenVINO int4": ("openvino", {"weights": "int4", "group_size": 128}),
    "OpenVINO calibrated int8": ("openvino-int8", {}),
    "ONNX Runtime": ("onnxruntime", {}),
    "ONNX Runtime int4": ("onnxruntime", {"weights": "int4"}),
    "ONNX Runtime calibrated int8": ("onnxruntime-int8", {}),
}


def main() -> None:
    """Print a table per model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--small", action="store_true", help="two blocks instead of twelve")
    parser.add_argument("--only", default="", help="variants whose name holds this")
    options = parser.parse_args()
    depth = 2 if options.small else 12
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(BertConfig(num_hidden_layers=depth))
    models = {"encoder": encoder, "decoder": GPT2LMHeadModel(GPT2Config(n_layer=depth))}
    print(f"{device.machine()['cpu']}, {torch.get_num_threads()} thread(s); {depth} blocks")
    with torch.no_grad(), timing_lock():
        for kind, model in models.items():
            shapes = default_shapes(kind, length=LENGTH)
            print(f"\n| {kind} | {' | '.join(shape.name for shape in shapes)} |")
            print("|---|" + "---|" * len(shapes))
            for title in (title for title in VARIANTS if options.only in title):
                print(
                    f"| {title} | {' | '.join(ratios(model, kind, title, shapes, options.calls))} |",
                    flush=True,
                )


def ratios(model: torch.nn.Module, kind: str, title: str, shapes: list[Shape], calls: int) -> list[str]:
    """Return per shape the milliseconds of the direct call, and the ratio with its interval."""
    name, settings = VARIANTS[title]
    text = [
        {"input_ids": torch.randint(1000, (4, LENGTH)), "attention_mask": torch.ones(4, LENGTH).long()}
    ] * 2
    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        exported, _ = compress.get(name)(model.eval(), Context(calibration=text), **settings)
        folder = storage.save(exported, Path(scratch) / "model")
        loaded, _ = storage.load(folder)
        for shape in shapes:
            here = prepared_calls({"here": loaded}, shape, kind=kind)["here"]
            work = {"here": here, "direct": (onnx if "ONNX" in title else openvino)(folder, shape, kind)}
            times = interleave(work, calls=calls)
            ratio, median = timing_ratio(times["here"], times["direct"]), np.median(times["direct"])
            cells.append(f"{1e3 * median:.2f} ms, {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    return cells


def arrays(shape: Shape, kind: str, *, seen: int = 0, new: int = 0) -> dict[str, np.ndarray]:
    """Return the inputs of a call on `new` tokens (default all) after `seen` ones."""
    ids = np.random.default_rng(0).integers(1000, size=(shape.batch, new or shape.length))
    mask = np.ones((shape.batch, seen + ids.shape[1]), dtype=np.int64)
    if kind == "encoder":
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    positions = np.tile(np.arange(seen, seen + ids.shape[1]), (shape.batch, 1))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def openvino(folder: Path, shape: Shape, kind: str) -> Call:
    """Return the call of a compiled model, states in its request."""
    import openvino as ov

    threads = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", threads)
    beams = {} if kind == "encoder" else {"beam_idx": np.arange(shape.batch, dtype=np.int32)}
    request = compiled.create_infer_request()
    first = arrays(shape, kind) | beams

    def prefill() -> None:
        request.reset_state()
        request.infer(first)

    return _call(shape, prefill, lambda seen: request.infer(arrays(shape, kind, seen=seen, new=1) | beams))


def onnx(folder: Path, shape: Shape, kind: str) -> Call:
    """Return the call of a session, keys and values handed on as arrays."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    pasts = [port for port in session.get_inputs() if port.name.startswith("past")]
    empty = {p.name: np.zeros((shape.batch, p.shape[1], 0, p.shape[3]), np.float32) for p in pasts}
    first, held = arrays(shape, kind), {"start": empty, "now": empty}

    def run(inputs: dict) -> dict:
        _, *present = session.run(None, inputs)
        return {port.name: array for port, array in zip(pasts, present)}

    def prefill() -> None:
        held["now"] = run(first | empty)

    def step(seen: int) -> None:
        held["now"] = run(arrays(shape, kind, seen=seen, new=1) | held["now"])

    return _call(shape, prefill, step)


def _call(shape: Shape, prefill: Callable, step: Callable) -> Call:
    """Return the call that is timed: all tokens at once, or single ones after them."""
    if shape.part != "decode":
        return Call(prefill)

    def run() -> None:
        for number in range(shape.tokens):
            step(shape.length + number)

    return Call(run, prefill, shape.tokens)


if __name__ == "__main__":
    main()
