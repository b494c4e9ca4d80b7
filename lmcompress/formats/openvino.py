"""OpenVINO, the only place that knows it: traced graphs, as they are or quantized, written and run.

Runs on the CPU in the plugin's own choice of precision (bfloat16 where the processor has it), which `backend`
names.
"""

import copy
import io
import logging
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from lmcompress.formats import graphs
from lmcompress.formats.graphs import Past, StoredMatrix, Traced

_INTEGERS = ("i8", "u8", "i4", "u4")
_CHAIN = ("Convert", "Subtract", "Multiply")  # from a stored integer to the weight


def session(graph: np.ndarray, packed: np.ndarray, *, threads: int, cache: list) -> Callable:
    """Return `(inputs, past, keep) -> (result, past or None)` on `threads` threads.

    A decoder's keys and values live in an inference request, which a kept `Past` owns.
    """
    compiled = _compiled(_read(graph, packed), threads)
    spare: list = []  # a request whose state nobody kept serves the next call

    def run(inputs: dict, past: Past | None, keep: bool, alive=packed) -> tuple[np.ndarray, Past | None]:
        batch, length = inputs["input_ids"].shape
        if past:
            request = past.state if keep else copy.deepcopy(past.state)
        else:
            request = spare.pop() if spare else compiled.create_infer_request()
        if past is None and cache:
            empty = graphs.empty_past(cache, batch)
            for state in request.query_state():
                state.state = _openvino().Tensor(empty[state.name.partition("present")[0]])
        output = request.infer(inputs, share_inputs=True)[0]
        if keep:
            past = past or Past(0, _Request(request, compiled))
            past.length += length
        elif past is None:
            spare.append(request)
        return output, past if keep else None

    return run


def stored_matrices(graph: np.ndarray, packed: np.ndarray) -> list[StoredMatrix]:
    """Return the integer matrices in a stored graph: constants that a scale turns back into weights."""
    matrices = []
    for node in _read(graph, packed).get_ops():
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
    """An inference request with its state, which `copy.deepcopy` copies."""

    def __init__(self, request, compiled):
        self.request, self.compiled = request, compiled
        self.infer = request.infer

    def __deepcopy__(self, memo: dict) -> "_Request":
        new = self.compiled.create_infer_request()
        for mine, original in zip(new.query_state(), self.request.query_state(), strict=True):
            mine.state = original.state
        return _Request(new, self.compiled)


def deployed(
    traced: Traced, quantize: Callable | None = None, *, dynamic: bool = False
) -> tuple[graphs.GraphModel, dict]:
    """Convert with named ends, batch and length left open; `quantize(nncf, graph)`; deploy what is saved.

    `dynamic`: the plugin rounds the inputs of quantized weights as it runs, which the backend then says.
    """
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
    shapes = {inputs: [-1, -1] for inputs in traced.names}
    graph.reshape(shapes | {f"past.{i}": [-1, h, -1, w] for i, (h, w) in enumerate(traced.cache)})
    if quantize:
        nncf = graphs.imported("nncf")
        nncf.set_log_level(logging.ERROR)
        with redirect_stdout(io.StringIO()):  # its progress bars
            graph = quantize(nncf, graph)
    if traced.cache:
        passes = graphs.imported("openvino.passes")
        manager = passes.Manager()
        manager.register_pass(
            passes.MakeStateful({f"past.{i}": f"present.{i}" for i in range(len(traced.cache))})
        )
        manager.run_passes(graph)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.xml"
        ov.save_model(graph, file, compress_to_fp16=False)
        files = file.read_bytes(), file.with_suffix(".bin").read_bytes()
        compiled = _compiled(ov.Core().read_model(file), 1)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    backend = f"openvino {ov.get_version().partition('-')[0]}, CPU, {precision}"
    if dynamic:
        backend += f", inputs rounded in groups of {compiled.get_property('DYNAMIC_QUANTIZATION_GROUP_SIZE')}"
    library = __name__.rpartition(".")[2]
    return graphs.deployed(library, backend, traced, *files)


def _compiled(graph, threads: int):
    """Compile for threads that are not pinned: the dense model takes its turns on the same cores."""
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    return _openvino().Core().compile_model(graph, "CPU", settings)


def _read(graph: np.ndarray, packed: np.ndarray):
    ov = _openvino()
    return ov.Core().read_model(graph.tobytes(), ov.Tensor(packed, shared_memory=True))


def _openvino():
    """Return the package, kept from sending usage statistics, which it does by default."""
    sys.modules["openvino_telemetry"] = None
    return graphs.imported("openvino")
