"""int8 on this machine: this project's fastest path against the same libraries called directly, in one run.

`python benchmarks/int8_backends.py [--model NAME] [--calls 30]`: an encoder and a decoder of random weights
(or NAME, an encoder), batch 1 and 8, 128 tokens, each path in turns with the dense torch model and with
nothing else, because a library's idle threads spin for a while and would be charged to whatever is called
next. A ratio is time over dense. The direct paths see only tensors: no model, no output class, no key/value
cache. Times depend on shapes only.
"""

import argparse
import copy
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.formats.tracing import Traced, trace
from lmcompress.measure.calls import Call, Shape, default_shapes, prepared_calls
from lmcompress.measure.latency import interleave
from lmcompress.models import loading
from lmcompress.stats import timing_ratio
from lmcompress.timing_lock import timing_lock

LENGTH = 128
OURS = ("int8-dynamic", "openvino", "openvino-int8", "onnxruntime-int8")


def main() -> None:
    """Print a table per model, and how the best path here stands to the fastest direct one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="an encoder's name or folder instead of one of BERT-base's shape")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument(
        "--small", action="store_true", help="two blocks instead of twelve, to try the script"
    )
    options = parser.parse_args()
    depth = 2 if options.small else 12
    torch.manual_seed(0)
    encoder = loading.load(options.model).model if options.model else bert(depth)
    with torch.no_grad(), timing_lock():
        for kind, model in (("encoder", encoder), ("decoder", gpt2(depth))):
            table(kind, model.eval(), options.calls)


def bert(depth: int) -> torch.nn.Module:
    """BERT-base's shape with a classifier."""
    return BertForSequenceClassification(BertConfig(num_hidden_layers=depth))


def gpt2(depth: int) -> torch.nn.Module:
    """GPT-2 small's shape."""
    return GPT2LMHeadModel(GPT2Config(n_layer=depth))


def table(kind: str, model: torch.nn.Module, calls: int) -> None:
    """Time every path of one model at every shape."""
    text = [
        {"input_ids": torch.randint(1000, (8, LENGTH)), "attention_mask": torch.ones(8, LENGTH).long()}
    ] * 4
    project_paths = {"dense": model} | {name: make(name, model, text) for name in OURS}
    direct = {} if kind == "decoder" else directly(model, text)
    print(f"\n{type(model).__name__}, {kind}: time over dense")
    for shape in default_shapes(kind, length=LENGTH):
        work = prepared_calls(project_paths, shape, kind=kind) | calls_of(direct, model, shape)
        print(f"  {shape.name}")
        over = {}
        for name in [name for name in work if name != "dense"]:
            times = interleave({"dense": work["dense"], name: work[name]}, calls=calls)
            over[name] = timing_ratio(times[name], times["dense"])
            print(
                f"    {name:<26} {over[name].value:.3f} [{over[name].low:.3f}, {over[name].high:.3f}]",
                flush=True,
            )
        if direct:
            best, fastest = (min(names, key=lambda name: over[name].value) for names in (OURS, direct))
            print(f"    {best} over {fastest}: {over[best].value / over[fastest].value:.3f}")


def make(name: str, model: torch.nn.Module, text: list) -> torch.nn.Module:
    """The model after a technique of this project (OpenVINO by itself with int8 weights)."""
    settings = {"weights": "int8"} if name == "openvino" else {}
    return compress.get(name)(model, Context(calibration=text), **settings)[0]


def directly(model: torch.nn.Module, text: list) -> dict:
    """The libraries as their own documentation calls them: name -> function of ids and mask."""
    (traced,) = trace(copy.deepcopy(model))
    feeds = traced.feeds(text)
    paths = {
        "direct: openvino": openvino_int8(traced, feeds),
        "direct: onnxruntime": onnxruntime_int8(traced, feeds),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, torch.qint8)
    return {
        "direct: torch.ao": lambda inputs: dynamic(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    } | paths


def openvino_int8(traced: Traced, feeds: list):
    """NNCF's post-training quantization, compiled as it comes."""
    import nncf
    import openvino as ov

    graph = traced.export(lambda module: ov.convert_model(module, example_input=module.example))
    text = nncf.Dataset([list(feed.values()) for feed in feeds])
    graph = nncf.quantize(graph, text, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = ov.Core().compile_model(graph, "CPU", config)
    return lambda inputs: compiled(list(inputs.values()))


def onnxruntime_int8(traced: Traced, feeds: list):
    """Static QDQ quantization with per-channel weights, everything else as it comes."""
    import onnxruntime as ort
    from onnxruntime import quantization as q

    class Feeds(q.CalibrationDataReader):
        def __init__(self):
            self.feeds = iter(feeds)

        def get_next(self):
            return next(self.feeds, None)

    free = {name: {0: "batch", 1: "length"} for name in traced.names}
    names = {"input_names": traced.inputs, "output_names": traced.outputs, "dynamic_axes": free}
    with tempfile.TemporaryDirectory() as folder:
        plain, done = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "done"))
        traced.export(lambda module: torch.onnx.export(module, module.example, plain, dynamo=False, **names))
        q.quantize_static(plain, done, Feeds(), per_channel=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(done, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def calls_of(direct: dict, model: torch.nn.Module, shape: Shape) -> dict[str, Call]:
    """Timed calls of the direct paths, on ids of the same shape."""
    ids = torch.randint(1000, (shape.batch, shape.length)).numpy()
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: Call(lambda run=run: run(inputs)) for name, run in direct.items()}


if __name__ == "__main__":
    main()
