"""OpenVINO, the only place that knows it: traced graphs, as they are or quantized, written and run.

Runs on the CPU in the plugin's own choice of precision (bfloat16 where the processor has it), which `backend`
names.
"""

import copy
import io
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.formats import graphs, tracing
from lmcompress.formats.graphs import Past, StoredMatrix
from lmcompress.formats.tracing import Traced
from lmcompress.models.packed import Packed
from lmcompress.paths import naming_write_errors

_INTEGERS = ("i8", "u8", "i4", "u4")
_CHAIN = ("Convert", "Subtract", "Multiply")  # from a stored integer to the weight
BEAMS = "beam_idx"  # a decoder's input: which row of the keys and values each row goes on from
CACHE_PRECISION = "f16"  # of keys and values; the plugin's own choice, u8, would be another rounding

# How a model card opens a file and runs it.
LIBRARY, OPENED, CALLED = "openvino", 'openvino.compile_model("{}", "CPU")', "{}(inputs)"
STATE = (
    "The request keeps keys and values: `request = model.create_infer_request()`, and "
    "`request.reset_state()` before each new text. A call also takes `beam_idx`, int32 `(batch,)`: the rows "
    "that the new tokens go on from, `numpy.arange(batch)` without beam search."
)


def file_names(stem: str) -> tuple[str, str]:
    """Return the names of a graph's files: the operations, and their weights."""
    return f"openvino_{stem}.xml", f"openvino_{stem}.bin"


def session(file: Path, *, threads: int, cache: list) -> Callable:
    """Return `(inputs, past, keep) -> (results, past or None)` on `threads` threads.

    A decoder's keys and values live in an inference request, which a kept `Past` owns.
    """
    compiled = _compiled(_openvino().Core().read_model(file), threads)
    has_beams = any(BEAMS in port.get_names() for port in compiled.inputs)
    idle: list = []  # requests, with their memory, that serve the next texts

    def started(batch: int) -> _Request:
        request = _Request(compiled, idle)
        if cache and has_beams:
            request.reset()
        elif cache:  # a graph of earlier, whose states do not know the batch they begin with
            for state in request.states():
                number = int(state.name.partition("present")[0].partition(".")[2])
                state.state = _openvino().Tensor(tracing.empty(batch, *cache[number]))
        return request

    def run(inputs: dict, past: Past | None, keep: bool) -> tuple[list[np.ndarray], Past | None]:
        batch, length = inputs["input_ids"].shape
        if past is None or past.state is None:
            request = started(batch)
        else:
            request = past.state if keep else copy.deepcopy(past.state)
        beams = {BEAMS: request.beams(batch)} if has_beams else {}
        outputs = list(request.infer(inputs | beams, share_inputs=True).values())
        if not keep:
            return outputs, None
        past = past if past is not None else Past()
        past.state, past.length = request, past.length + length
        return outputs, past

    return run


def stored_matrices(file: Path) -> list[StoredMatrix]:
    """Return the integer matrices in a saved graph: constants that a scale turns back into weights."""
    matrices = []
    for node in _openvino().Core().read_model(file).get_ops():
        element = node.get_element_type().get_type_name() if node.get_type_name() == "Constant" else ""
        if element not in _INTEGERS or len(node.shape) < 2:
            continue
        user = next(iter(node.output(0).get_target_inputs())).get_node()
        nbytes, scaled = node.get_byte_size(), False
        while (users := list(user.output(0).get_target_inputs())) and user.get_type_name() in _CHAIN:
            user = users[0].get_node()
            if user.get_type_name() not in ("Subtract", "Multiply") or users[0].get_index() != 0:
                break
            operand = user.input_value(1).get_node()  # a constant, perhaps through a Convert
            if operand.get_type_name() == "Convert":
                operand = operand.input_value(0).get_node()
            nbytes += operand.get_byte_size()
            scaled = scaled or user.get_type_name() == "Multiply"
        if scaled:
            values = len(np.unique(node.get_data(dtype=np.int16)))
            matrices.append(StoredMatrix(element, int(np.prod(node.shape)), nbytes, values))
    return matrices


class _Request:
    """An inference request with its state, which `copy.deepcopy` copies; `idle` when nobody holds it."""

    def __init__(self, compiled, idle: list):
        self.compiled, self.idle = compiled, idle
        self.request = idle.pop() if idle else compiled.create_infer_request()
        self.infer, self.states, self.reset = (
            getattr(self.request, name) for name in ("infer", "query_state", "reset_state")
        )
        self.order: np.ndarray | None = None  # of the rows, which the next call is told

    def __del__(self):
        self.idle.append(self.request)

    def beams(self, batch: int) -> np.ndarray:
        """Return the rows of the state `(batch,)` that the next call's rows go on from."""
        order, self.order = self.order, None
        return np.arange(batch, dtype=np.int32) if order is None else order

    def reorder(self, beams: np.ndarray) -> None:
        """Let the next call go on from the rows `beams` `(batch,)`."""
        self.order = (beams if self.order is None else self.order[beams]).astype(np.int32)

    def __deepcopy__(self, memo: dict) -> "_Request":
        new = _Request(self.compiled, self.idle)
        for mine, original in zip(new.states(), self.states(), strict=True):
            mine.state = original.state
        new.order = self.order
        return new


def deployed(
    traces: Sequence[Traced], quantize: Callable | None = None, *, dynamic: bool = False, short: bool = False
) -> tuple[graphs.GraphModel, dict]:
    """Convert each, `quantize(graph, traced)`, and deploy what is saved.

    `dynamic`: the plugin rounds the inputs of quantized weights as it runs, which the backend then says.
    `short`: weights that are left in floating point are stored in 16 bits.
    """
    ov, folder = _openvino(), graphs.GraphFolder()
    for traced in traces:
        graph = _converted(traced)
        if quantize:
            graph = quantize(graph, traced)
        if traced.cache:
            _make_stateful(graph, traced)
        with naming_write_errors(folder.path):
            ov.save_model(graph, folder.path / file_names(traced.stem)[0], compress_to_fp16=short)
    compiled = _compiled(
        ov.Core().read_model(folder.path / file_names(traces[-1].stem)[0]), torch.get_num_threads()
    )
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    backend = f"openvino {ov.get_version().partition('-')[0]}, CPU, {precision}"
    if dynamic:
        backend += f", inputs rounded in groups of {compiled.get_property('DYNAMIC_QUANTIZATION_GROUP_SIZE')}"
    files = [name for traced in traces for name in file_names(traced.stem)]
    return graphs.deployed(__name__.rpartition(".")[2], backend, traces, folder, files)


def by_nncf(function: Callable) -> Callable:
    """Return `function(nncf, graph, traced)` without its first argument, and without what NNCF prints."""

    def quiet(graph, traced: Traced):
        nncf = graphs.imported("nncf")
        nncf.set_log_level(logging.ERROR)
        with redirect_stdout(io.StringIO()):  # its progress bars
            return function(nncf, graph, traced)

    return quiet


def refusal(model: PreTrainedModel) -> str | None:
    """Return why the format cannot hold `model`, or None."""
    return graphs.refusal(model, "openvino")


def exported(model: PreTrainedModel) -> graphs.GraphModel:
    """Return `model` as graphs: its integers stay integers, weights of 16 bits are stored as such."""
    if isinstance(model, graphs.GraphModel):
        return model
    short, (dense, layers) = model.dtype.itemsize == 2, tracing.floating(model)
    quantize = (lambda graph, _: _to_integers(graph, layers)) if layers else None
    return deployed(tracing.trace(dense), quantize, dynamic=bool(layers), short=short)[0]


def _to_integers(graph, layers: Mapping[str, Packed]):
    """Put the integers of `layers` in the place of the matrices that they stand for, and return the graph."""
    ops = graphs.imported("openvino.opset13")
    for node in graph.get_ops():
        if (
            node.get_type_name() != "Constant"
            or len(node.shape) != 2
            or node.get_element_type() != _openvino().Type.f32
        ):
            continue
        for is_turned, matrix in enumerate((node.data, node.data.T)):
            layer = layers.get(tracing.digest(matrix))
            if layer is None:
                continue
            users = list(node.output(0).get_target_inputs())
            weights = _weights(layer)
            weights = ops.transpose(weights, ops.constant(np.array([1, 0]))) if is_turned else weights
            for user in users:
                user.replace_source_output(weights.output(0))
                if layer.channel_scale is not None:  # what the inputs are multiplied by
                    inputs = user.get_node().input(0)
                    factors = ops.constant(layer.channel_scale.float().numpy())
                    scaled = ops.multiply(inputs.get_source_output(), factors)
                    inputs.replace_source_output(scaled.output(0))
            break
    graph.validate_nodes_and_infer_types()
    return graph


def _weights(layer: Packed):
    """Return what makes a layer's matrix `(rows, width)` of its integers, as the plugin fuses it."""
    ov, ops = _openvino(), graphs.imported("openvino.opset13")
    rows, width, half = layer.rows, layer.width, 2 ** (layer.bits - 1)
    groups = layer.scales.shape[1]
    zeros = torch.zeros_like(layer.scales) if layer.zeros is None else layer.zeros

    def constant(integers: Tensor, shape: list[int]):
        whole = (integers.to(torch.int16) + half).to(torch.uint8).numpy().flatten()
        if layer.bits == 4:  # two in a byte, across rows
            whole = np.pad(whole, (0, len(whole) % 2))
            whole = whole[::2] | whole[1::2] << 4
        kind = ov.Type.u4 if layer.bits == 4 else ov.Type.u8
        tensor = ov.Tensor(kind, ov.Shape(shape))  # with memory of its own: it outlives the array
        tensor.data.reshape(-1)[:] = whole
        return ops.convert(ops.constant(tensor), "f32")

    offset = constant(zeros, [rows, groups, 1])
    difference = ops.subtract(constant(layer.integers, [rows, groups, width // groups]), offset)
    scales = ops.constant(layer.scales.float().numpy()[..., None])
    return ops.reshape(ops.multiply(difference, scales), ops.constant(np.array([rows, width])), False)


def _converted(traced: Traced):
    """Return the model as a graph with named ends, batch and lengths left open."""
    ov, root = _openvino(), logging.getLogger()
    level, filters = root.level, list(root.filters)
    try:
        graph = traced.export(lambda module: ov.convert_model(module, example_input=module.example))
    finally:  # it silences the whole process below errors, and puts that back only where it succeeds
        root.setLevel(level)
        root.filters = filters
    for ports, names in ((graph.inputs, traced.inputs), (graph.outputs, traced.outputs)):
        for port, port_name in zip(ports, names, strict=True):
            port.get_tensor().set_names({port_name})
    shapes = {name: [-1, -1] for name in traced.names}
    sizes = zip([*traced.past, *traced.cross], [*traced.cache, *traced.widths])
    graph.reshape(shapes | {name: [-1, heads, -1, width] for name, (heads, width) in sizes})
    return graph


def _make_stateful(graph, traced: Traced) -> None:
    """Let the graph keep keys and values itself: none at first, reordered by `beam_idx` in each call.

    The plugin fuses attention with such a state into one operation.
    """
    passes, operations = (graphs.imported(f"openvino.{name}") for name in ("passes", "opset13"))
    beams = operations.parameter([-1], np.int32, name=BEAMS)
    beams.output(0).get_tensor().set_names({BEAMS})
    graph.add_parameters([beams])
    axis = operations.constant(np.int64(0))
    for name in traced.past:
        port = graph.input(name)
        users = list(port.get_target_inputs())
        ordered = operations.gather(port.get_node(), beams, axis)
        for user in users:
            user.replace_source_output(ordered.output(0))
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(dict(zip(traced.past, traced.outputs[-len(traced.past) :]))))
    manager.run_passes(graph)
    shape = operations.shape_of(graph.input("input_ids").get_node(), output_type="i64")
    batch = operations.gather(shape, operations.constant(np.array([0])), axis)
    sizes = dict(zip(traced.past, traced.cache))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            heads, width = sizes[node.get_variable_id().partition("present")[0]]
            start = operations.concat([batch, operations.constant(np.array([heads, 0, width]))], 0)
            node.set_arguments([operations.broadcast(operations.constant(np.float32(0)), start).output(0)])
    graph.validate_nodes_and_infer_types()
    graph.set_rt_info(CACHE_PRECISION, ["runtime_options", "KV_CACHE_PRECISION"])


def _compiled(graph, threads: int):
    """Compile for threads that are not pinned: the dense model takes its turns on the same cores.

    A gated feed-forward network runs in float32 on a single thread: in bfloat16, on a processor with AMX, the
    plugin then divides by zero and takes the process with it (openvinotoolkit/openvino, issue 33300).
    """
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    if threads == 1 and any(map(_is_gate, graph.get_ops())):
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    return _openvino().Core().compile_model(graph, "CPU", settings)


def _is_gate(node) -> bool:
    """Return whether it multiplies an activation by what is computed, too: no scale."""
    sources = [source.get_node().get_type_name() for source in node.input_values()]
    is_product = node.get_type_name() == "Multiply" and not {"Constant", "Convert"} & {*sources}
    return is_product and bool({"Gelu", "Swish"} & {*sources})


def _openvino():
    """Return the package, kept from sending usage statistics, which it does by default."""
    sys.modules["openvino_telemetry"] = None
    return graphs.imported("openvino")
