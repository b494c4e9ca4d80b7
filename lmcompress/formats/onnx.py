"""ONNX Runtime, the only place that knows it: traced graphs, as they are or quantized, written and run."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from lmcompress.formats import graphs, onnx_integers, tracing
from lmcompress.formats.graphs import Past, StoredMatrix
from lmcompress.formats.tracing import Traced
from lmcompress.paths import naming_write_errors, scratch_folder

OPSET = 18
LARGEST = 2**31 - 2**20  # bytes of weights that an ONNX file itself can hold, with room for the rest
DATA = ".data"  # suffix of the file beside a larger one

# How a model card opens a file and runs it.
LIBRARY, OPENED, CALLED = "onnxruntime", 'onnxruntime.InferenceSession("{}")', "{}.run(None, inputs)"
STATE = (
    "A call also takes the keys and values so far, `past_key_values.N….key` and `.value`, float32 `(batch, "
    "heads, seen, width)`: of `seen = 0` tokens at first, then the outputs `present.N….key` and `.value` of "
    "the call before."
)


def file_names(stem: str) -> tuple[str]:
    """Return the name of a graph's file."""
    return (f"{stem}.onnx",)


def session(file: Path, *, threads: int, cache: list) -> Callable:
    """Return `(inputs, past, keep) -> (results, past or None)` on `threads` threads; `past` holds arrays."""
    ort, _ = libraries()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Else its idle threads go on waiting at full load, and slow the others down.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    running = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    results = [port.name for port in running.get_outputs()]
    results, presents = results[: len(results) - len(cache)], results[len(results) - len(cache) :]
    # In the order of their outputs, whatever their names.
    pasts = [port.name for port in running.get_inputs() if _is_past(port.name)]

    def run(inputs: dict, past: Past | None, keep: bool) -> tuple[list[np.ndarray], Past | None]:
        batch, length = inputs["input_ids"].shape
        if past is None or past.state is None:
            before = {name: tracing.empty(batch, *shape) for name, shape in zip(pasts, cache)}
        else:
            before = past.state.arrays
        outputs = running.run([*results, *presents] if keep else results, inputs | before)
        if not keep:
            return outputs, None
        past = past if past is not None else Past()
        past.state = _Arrays(dict(zip(pasts, outputs[len(results) :])))
        past.length += length
        return outputs[: len(results)], past

    return run


class _Arrays:
    """Keys and values by the name of the graph's input."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def reorder(self, beams: np.ndarray) -> None:
        """Keep the rows `beams` `(batch,)`."""
        self.arrays = {name: array[beams] for name, array in self.arrays.items()}


def _is_past(name: str) -> bool:
    return name.startswith("past") and ".encoder." not in name


def stored_matrices(file: Path) -> list[StoredMatrix]:
    """Return a saved graph's integer matrices: initializers that are multiplied, or turned into weights."""
    _, onnx = libraries()
    parsed = onnx.load(file).graph
    initializers = {initializer.name: initializer for initializer in parsed.initializer}
    matrices: dict[str, StoredMatrix] = {}
    for node in parsed.node:
        place = {"DequantizeLinear": 0, "MatMulInteger": 1, "Gather": 0}.get(node.op_type)
        source = None if place is None else initializers.get(node.input[place])
        element = onnx.TensorProto.DataType.Name(source.data_type).lower() if source is not None else ""
        if not element.endswith("int8") or len(source.dims) < 2:
            continue
        values = onnx.numpy_helper.to_array(source)
        # Of a product and a table the scales stand elsewhere, under the name of the matrix.
        scales = f"{source.name.removesuffix('_quantized')}_scale"
        names = {name for name in (*node.input, scales) if name in initializers}
        nbytes = sum(onnx.numpy_helper.to_array(initializers[name]).nbytes for name in names)
        matrices[source.name] = StoredMatrix(element, values.size, nbytes, len(np.unique(values)))
    return [*matrices.values(), *onnx_integers.stored_matrices(parsed)]


def deployed(
    traces: Sequence[Traced], quantize: Callable[[Path, Path, Traced], None] | None = None, *, note: str = ""
) -> tuple[graphs.GraphModel, dict]:
    """Export each, `quantize(plain, done, traced)` from one file to another, and deploy what is saved.

    `note`: what the backend says beside the version.
    """
    ort, onnx = libraries()
    folder, files = graphs.GraphFolder(), []
    for traced in traces:
        (name,) = file_names(traced.stem)
        with naming_write_errors(folder.path), scratch_folder() as scratch:
            plain, done = (scratch / side / name for side in ("plain", "done"))
            for side in (plain, done):
                side.parent.mkdir()
            _export(traced, plain)
            if quantize:
                quantize(plain, done, traced)
            model = onnx.load(done if quantize else plain)
            files += _save(model, folder.path / name)
    backend = f"onnxruntime {ort.__version__}, CPU{note}"
    return graphs.deployed(__name__.rpartition(".")[2], backend, traces, folder, files)


def refusal(model: PreTrainedModel) -> str | None:
    """Return why the format cannot hold `model`, or None."""
    return graphs.refusal(model, "onnx")


def exported(model: PreTrainedModel) -> graphs.GraphModel:
    """Return `model` as graphs: its integers stay integers, weights of 16 bits are stored as such."""
    if isinstance(model, graphs.GraphModel):
        return model
    dtype, (dense, layers) = model.dtype, tracing.floating(model)

    def shorten(plain: Path, done: Path, _) -> None:
        _, onnx = libraries()
        graph = onnx.load(plain)
        if layers:
            onnx_integers.to_integers(graph, None, layers=layers)
        if dtype.itemsize == 2:
            onnx_integers.halve(graph, dtype)
        onnx.save(graph, done)

    changed = shorten if layers or dtype.itemsize == 2 else None
    return deployed(tracing.trace(dense), changed)[0]


def _export(traced: Traced, file: Path) -> None:
    """Write the model as a graph with batch and lengths left open."""
    free = {name: {0: "batch", 1: f"{name}.length"} for name in traced.names}
    free |= {name: {0: "batch", 2: "seen"} for name in traced.past}
    free |= {name: {0: "batch", 2: "source"} for name in traced.cross}
    names = {"input_names": traced.inputs, "output_names": traced.outputs, "opset_version": OPSET}
    # The exporter by tracing: the other one needs two packages more, and refuses some encoders.
    export = partial(torch.onnx.export, dynamo=False, dynamic_axes=free, **names)
    traced.export(lambda module: export(module, module.example, str(file)))


def _save(model, file: Path) -> list[str]:
    """Write a graph, its weights in a file beside it where one would be too large; return the names."""
    _, onnx = libraries()
    weights = sum(len(initializer.raw_data) for initializer in model.graph.initializer)
    if weights < LARGEST:
        onnx.save(model, file)
        return [file.name]
    beside = f"{file.name}{DATA}"
    onnx.save(model, file, save_as_external_data=True, location=beside)
    return [file.name, beside]


def libraries():
    """Return onnxruntime and onnx."""
    onnx, ort = graphs.imported("onnx"), graphs.imported("onnxruntime")
    ort.set_default_logger_severity(3)
    return ort, onnx
