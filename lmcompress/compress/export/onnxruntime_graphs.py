"""ONNX Runtime, the only place that knows it: the model in fp32 as a control, or in calibrated int8."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from lmcompress.compress import TechniqueResult, technique
from lmcompress.compress.export import graphs
from lmcompress.compress.export.graphs import Past, StoredMatrix, Traced
from lmcompress.errors import BadSetting

OPSET = 18
_OPERATORS = ["MatMul", "Gemm", "Gather"]  # with stored weights; the rest costs little


@technique("onnxruntime", 1, "ONNX Runtime", "#EE8866", "$R$")
def onnxruntime(model, context):
    """Export the model as an ONNX graph in fp32: what changing the library alone does."""
    return _deployed("onnxruntime", Traced(model))


@technique("onnxruntime-int8", 1, "ONNX Runtime, calibrated INT8", "#BB5566", "$S$", needs=("calibration",))
def onnxruntime_int8(model, context):
    """Take weights and inputs of every stored matrix in 8 bits, scales fixed by the calibration text (QDQ).

    A scale per row of weights; one per tensor of inputs, from their least and greatest. The products of
    attention, which have no weights, stay in fp32.
    """
    traced = Traced(model)
    feeds = traced.feeds(context.calibration)

    def quantize(plain: Path) -> Path:
        from onnxruntime import quantization as q
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready, done = (plain.with_name(f"{name}.onnx") for name in ("ready", "done"))
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        q.quantize_static(
            ready,
            done,
            SimpleNamespace(
                get_next=partial(next, iter(feeds), None)
            ),  # all that is read of a CalibrationDataReader
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return done

    return _deployed("onnxruntime-int8", traced, quantize)


def session(graph: np.ndarray, packed: np.ndarray, *, threads: int, cache: list) -> Callable:
    """Return `(inputs, past, keep) -> (result, past or None)` on `threads` threads; `past` holds arrays."""
    ort, _ = _libraries()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Else its idle threads go on waiting at full load, and slow the others down.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    running = ort.InferenceSession(graph.tobytes(), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in running.get_outputs()]

    def run(inputs: dict, past: Past | None, keep: bool) -> tuple[np.ndarray, Past | None]:
        batch, length = inputs["input_ids"].shape
        before = past.state if past else graphs.empty_past(cache, batch)
        output, *after = running.run(names if keep else names[:1], inputs | before)
        if not keep:
            return output, None
        seen = past.length if past else 0
        return output, Past(seen + length, {f"past.{i}": tensor for i, tensor in enumerate(after)})

    return run


def stored_matrices(graph: np.ndarray, _: np.ndarray | None = None) -> list[StoredMatrix]:
    """Return a stored graph's integer matrices: initializers that a DequantizeLinear turns into weights."""
    _, onnx = _libraries()
    parsed = onnx.load_from_string(graph.tobytes()).graph
    initializers = {initializer.name: initializer for initializer in parsed.initializer}
    matrices: dict[str, StoredMatrix] = {}
    for node in parsed.node:
        source = initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is None or len(source.dims) < 2:
            continue
        values = onnx.numpy_helper.to_array(source)
        element = onnx.TensorProto.DataType.Name(source.data_type).lower()
        stored = (initializers[name] for name in node.input if name in initializers)
        nbytes = sum(onnx.numpy_helper.to_array(initializer).nbytes for initializer in stored)
        matrices[source.name] = StoredMatrix(element, values.size, nbytes, len(np.unique(values)))
    return list(matrices.values())


def _deployed(
    name: str, traced: Traced, quantize: Callable[[Path], Path] | None = None
) -> tuple[graphs.GraphModel, TechniqueResult]:
    """Export with batch and length left open, `quantize` the file, and deploy what it holds."""
    ort, _ = _libraries()
    if sum(parameter.nbytes for parameter in traced.model.parameters()) >= 2**31:
        raise BadSetting('an ONNX file holds at most 2 GB, and this model has more: use "openvino".')
    free = {name: {0: "batch", 1: f"{name}.length"} for name in traced.names}
    free |= {name: {0: "batch", 2: "seen"} for name in traced.inputs[len(traced.names) :]}
    names = {"input_names": traced.inputs, "output_names": traced.outputs, "opset_version": OPSET}
    # The exporter by tracing: the other one needs two packages more, and refuses some encoders.
    export = partial(torch.onnx.export, dynamo=False, dynamic_axes=free, **names)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plain.onnx"
        traced.export(lambda module: export(module, module.example, str(file)))
        graph = (quantize(file) if quantize else file).read_bytes()
    backend = f"onnxruntime {ort.__version__}, CPU"
    library = __name__.rpartition(".")[2]
    return graphs.deployed(name, library, backend, traced, graph, b"", quantized=quantize is not None)


def _libraries():
    """Return onnxruntime and onnx."""
    onnx, ort = graphs.imported("onnx"), graphs.imported("onnxruntime")
    ort.set_default_logger_severity(3)
    return ort, onnx
