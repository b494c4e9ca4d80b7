"""Compression that ends in another runtime: OpenVINO and ONNX Runtime, with the integers they know."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

from lmcompress.compress import TechniqueResult, technique
from lmcompress.errors import BadSetting
from lmcompress.formats import onnx as onnx_graphs
from lmcompress.formats import onnx_integers
from lmcompress.formats import openvino as openvino_graphs
from lmcompress.formats.graphs import SMALLEST_GROUP, GraphModel
from lmcompress.formats.tracing import Traced, trace
from lmcompress.models.anatomy import prunable

_OPERATORS = ["MatMul", "Gemm", "Gather"]  # with stored weights; the rest costs little


@technique("openvino", 1, "OpenVINO", "#4477AA", "$O$")
def openvino(
    model,
    context,
    *,
    weights: Literal["default", "int8", "int4"] = "default",
    group_size: int | None = None,
    all_layers: bool = False,
):
    """Export the model as an OpenVINO graph; on request with NNCF's weight-only integers, no text looked at.

    With integer weights the CPU plugin rounds a linear layer's inputs to 8 bits too, as `backend` says.

    Args:
        weights: "default" (as they are), "int8", or "int4".
        group_size: only with "int4".
        all_layers: only with "int4": token table and head, too, which are int8 otherwise.
    """
    if weights != "int4" and (group_size is not None or all_layers):
        raise BadSetting(
            f"weights={weights!r} with group_size={group_size}, all_layers={all_layers}: "
            '"default" and "int8" take neither, "int4" may.'
        )

    def compressed(nncf, graph, _):
        mode = getattr(nncf.CompressWeightsMode, f"{weights.upper()}_ASYM")
        grid = {"group_size": group_size or -1, "all_layers": all_layers} if weights == "int4" else {}
        return _compressed(nncf, graph, mode=mode, **grid)

    integers = weights != "default"
    quantize = openvino_graphs.by_nncf(compressed) if integers else None
    return _result("openvino", openvino_graphs, trace(model), quantize, dynamic=integers)


@technique("openvino-int4", 1, "OpenVINO, calibrated INT4", "#66CCEE", "$I$", needs=("calibration",))
def openvino_int4(
    model,
    context,
    *,
    method: Literal["scale_estimation", "awq", "gptq"] = "scale_estimation",
    group_size: int = 128,
    all_layers: bool = True,
):
    """Take weights in 4 bits as NNCF chooses them by what the calibration text showed of their inputs.

    Args:
        method: scales that keep a layer's output (scale estimation), AWQ, or GPTQ; NNCF's own of each.
        group_size: inputs that share a scale.
        all_layers: token table and head in 4 bits, too, instead of 8.
    """
    traces = trace(model)
    feeds = {traced.stem: traced.feeds(context.calibration) for traced in traces}

    def quantize(nncf, graph, traced):
        text = {"dataset": nncf.Dataset(feeds[traced.stem]), "subset_size": len(feeds[traced.stem])}
        mode = nncf.CompressWeightsMode.INT4_ASYM
        form = {"mode": mode, "group_size": group_size, "all_layers": all_layers, method: True}
        return _compressed(nncf, graph, **form, **text)

    return _result("openvino-int4", openvino_graphs, traces, openvino_graphs.by_nncf(quantize), dynamic=True)


@technique("openvino-int8", 1, "OpenVINO, calibrated INT8", "#228833", "$Q$", needs=("calibration",))
def openvino_int8(model, context):
    """Take weights and activations in 8 bits with NNCF's post-training quantization of transformers.

    Scales of the activations are fixed, from what the calibration text showed.
    """
    traces = trace(model)
    feeds = {traced.stem: traced.feeds(context.calibration) for traced in traces}

    def quantize(nncf, graph, traced):
        text, kind = nncf.Dataset(feeds[traced.stem]), nncf.ModelType.TRANSFORMER
        return nncf.quantize(graph, text, model_type=kind, subset_size=len(feeds[traced.stem]))

    return _result("openvino-int8", openvino_graphs, traces, openvino_graphs.by_nncf(quantize))


@technique("onnxruntime", 1, "ONNX Runtime", "#EE8866", "$R$")
def onnxruntime(
    model,
    context,
    *,
    weights: Literal["default", "int8", "int4"] = "default",
    group_size: int | None = None,
):
    """Export the model as an ONNX graph: in fp32 what changing the library alone does; or with integers.

    Integers of weights are multiplied by inputs that are rounded to 8 bits in the same groups, as they come.

    Args:
        weights: "default" (as they are), or rounded to the nearest "int8" or "int4", token tables too.
        group_size: weights that share a scale, a power of two from 16 on; 128 if left out.
    """
    if group_size is not None and weights == "default":
        raise BadSetting('weights="default" takes no group_size: "int8" and "int4" do.')
    size = group_size or 128
    if size < SMALLEST_GROUP or size & (size - 1):
        raise BadSetting(f"group_size={size} is no power of two from {SMALLEST_GROUP} on.")

    def quantize(plain: Path, done: Path, _) -> None:
        _, onnx = onnx_graphs.libraries()
        graph = onnx.load(plain)
        onnx_integers.to_integers(graph, onnx_integers.rounded(bits=int(weights[3:]), group_size=size))
        onnx.save(graph, done)

    if weights == "default":
        return _result("onnxruntime", onnx_graphs, trace(model))
    return _result(
        "onnxruntime", onnx_graphs, trace(model), quantize, note=f", inputs rounded in groups of {size}"
    )


@technique("onnxruntime-dynamic", 1, "ONNX Runtime, dynamic INT8", "#CCBB44", "$D$")
def onnxruntime_dynamic(model, context):
    """Take weights of every stored matrix in 8 bits, a scale per row, and inputs with one per tensor.

    The inputs' scale is found in each call, so that what else is in the batch changes the result.
    """

    def quantize(plain: Path, done: Path, _) -> None:
        from onnxruntime import quantization as q

        kind = {"weight_type": q.QuantType.QInt8, "extra_options": {"MatMulConstBOnly": True}}
        q.quantize_dynamic(_prepared(plain), done, op_types_to_quantize=_OPERATORS, per_channel=True, **kind)

    return _result("onnxruntime-dynamic", onnx_graphs, trace(model), quantize)


@technique("onnxruntime-int8", 1, "ONNX Runtime, calibrated INT8", "#BB5566", "$S$", needs=("calibration",))
def onnxruntime_int8(model, context):
    """Take weights and inputs of every stored matrix in 8 bits, scales fixed by the calibration text (QDQ).

    A scale per row of weights; one per tensor of inputs, from their least and greatest. The products of
    attention, which have no weights, stay in fp32.
    """
    traces = trace(model)
    feeds = {traced.stem: traced.feeds(context.calibration) for traced in traces}

    def quantize(plain: Path, done: Path, traced) -> None:
        from onnxruntime import quantization as q

        q.quantize_static(
            _prepared(plain),
            done,
            # All that is read of a CalibrationDataReader.
            SimpleNamespace(get_next=partial(next, iter(feeds[traced.stem]), None)),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )

    return _result("onnxruntime-int8", onnx_graphs, traces, quantize)


def _compressed(nncf, graph, **settings):
    """Return what NNCF makes of a graph's weights, its refusal of a setting as a `BadSetting`."""
    try:
        return nncf.compress_weights(graph, **settings)
    except (nncf.errors.InvalidGroupSizeError, nncf.ValidationError) as error:
        sizes = {name: settings[name] for name in ("mode", "group_size") if name in settings}
        named = ", ".join(f"{name}={setting}" for name, setting in sizes.items())
        raise BadSetting(f"NNCF refuses {named}: {str(error).splitlines()[0]}") from error


def _prepared(plain: Path) -> Path:
    """Return a file beside the graph's, with shapes inferred and operations fused as ONNX Runtime asks."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = plain.with_name("ready.onnx")
    quant_pre_process(plain, ready, skip_symbolic_shape=True)
    return ready


def _result(
    name: str, runtime: ModuleType, traces: Sequence[Traced], quantize: Callable | None = None, **backend
) -> tuple[GraphModel, TechniqueResult]:
    """Deploy the traced model with `runtime`; the layers are integer matrices, or all linear layers."""
    model, figures = runtime.deployed(traces, quantize, **backend)
    matrices = sum(element["matrices"] for element in figures["stored"].values())
    return model, TechniqueResult(name, matrices if quantize else len(prunable(traces[0].model)), figures)
