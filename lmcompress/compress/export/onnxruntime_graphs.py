"""ONNX Runtime, the only place that knows it: the model in fp32 as a control, or in calibrated int8."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmcompress.compress import TechniqueResult, technique
from lmcompress.compress.export import graphs
from lmcompress.compress.export.graphs import Past, StoredMatrix, Traced
from lmcompress.errors import BadData, BadSetting
from lmcompress.models.anatomy import prunable

OPSET = 18
_OPERATORS = ["MatMul", "Gemm", "Gather"]  # with stored weights; the rest costs little


@technique(name="onnxruntime", version=1, title="ONNX Runtime", colour="#EE8866", marker="$R$")
def onnxruntime(model, context):
    """The model as an ONNX graph in fp32: what changing the library alone does."""
    traced = Traced(model)
    with tempfile.TemporaryDirectory() as folder:
        replacement, _, figures = _deployed(traced, _exported(traced, Path(folder)))
    return replacement, TechniqueResult("onnxruntime", len(prunable(traced.model)), figures)


@technique(
    name="onnxruntime-int8",
    version=1,
    title="ONNX Runtime, int8 calibrated",
    colour="#BB5566",
    marker="$S$",
    needs=("calibration",),
)
def onnxruntime_int8(model, context):
    """Weights and inputs of every stored matrix in 8 bits, with scales fixed by the calibration text (QDQ).

    A scale per row of weights; one per tensor of inputs, from their least and greatest. The products of
    attention, which have no weights, stay in fp32.
    """
    if not context.calibration:
        raise BadData("onnxruntime-int8 needs at least one batch of calibration text.")
    _libraries()
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Feeds(q.CalibrationDataReader):
        def __init__(self, feeds):
            self.feeds = iter(feeds)

        def get_next(self):
            return next(self.feeds, None)

    traced = Traced(model)
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "done"))
        _exported(traced, Path(folder))
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        q.quantize_static(
            ready,
            done,
            Feeds(traced.feeds(context.calibration)),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        replacement, stored, figures = _deployed(traced, done)
    return replacement, TechniqueResult("onnxruntime-int8", len(stored), figures)


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


def stored_matrices(graph: np.ndarray) -> list[StoredMatrix]:
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


def _deployed(traced: Traced, file: Path) -> tuple[graphs.GraphModel, list[StoredMatrix], dict]:
    """The runnable model, the integers read back from it, and what the report says."""
    replacement = graphs.graph_model(__name__.rpartition(".")[2], traced, file.read_bytes())
    stored = stored_matrices(replacement.graph.numpy())
    backend = f"onnxruntime {_libraries()[0].__version__}, CPU"
    return replacement, stored, graphs.achieved(traced, stored, backend)


def _exported(traced: Traced, folder: Path) -> Path:
    """The traced model as `plain.onnx` in `folder`, batch and length left open.

    Raises:
        BadSetting: the model is larger than the 2 GB that one ONNX file holds.
    """
    import torch

    _libraries()
    if sum(parameter.nbytes for parameter in traced.model.parameters()) >= 2**31:
        raise BadSetting('an ONNX file holds at most 2 GB, and this model has more: use "openvino".')
    file, free = folder / "plain.onnx", {name: {0: "batch", 1: f"{name}.length"} for name in traced.names}
    free |= {name: {0: "batch", 2: "seen"} for name in traced.inputs[len(traced.names) :]}
    names = {"input_names": traced.inputs, "output_names": traced.outputs, "opset_version": OPSET}
    # The exporter by tracing: the other one needs two packages more, and refuses some encoders.
    traced.export(
        lambda module: torch.onnx.export(
            module, module.example, str(file), dynamo=False, dynamic_axes=free, **names
        )
    )
    return file


def _libraries():
    """onnxruntime and onnx."""
    onnx, ort = graphs.imported("onnx"), graphs.imported("onnxruntime")
    ort.set_default_logger_severity(3)
    return ort, onnx
