"""ONNX Runtime, the only place that knows it: traced graphs, as they are or quantized, written and run."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lmcompress.errors import BadSetting
from lmcompress.formats import graphs
from lmcompress.formats.graphs import Past, StoredMatrix, Traced

OPSET = 18


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


def deployed(
    traced: Traced, quantize: Callable[[Path], Path] | None = None
) -> tuple[graphs.GraphModel, dict]:
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
    return graphs.deployed(library, backend, traced, graph, b"")


def _libraries():
    """Return onnxruntime and onnx."""
    onnx, ort = graphs.imported("onnx"), graphs.imported("onnxruntime")
    ort.set_default_logger_severity(3)
    return ort, onnx
