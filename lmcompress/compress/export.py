"""Compression that ends in another runtime: OpenVINO and ONNX Runtime, with the integers they know."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

from lmcompress.compress import TechniqueResult, technique
from lmcompress.errors import BadSetting
from lmcompress.formats import onnx as onnx_graphs
from lmcompress.formats import openvino as openvino_graphs
from lmcompress.formats.graphs import GraphModel, Traced, trace
from lmcompress.models.anatomy import prunable

_OPERATORS = ["MatMul", "Gemm", "Gather"]  # with stored weights; the rest costs little


@technique("openvino", 1, "OpenVINO", "#4477AA", "$O$")
def openvino(
    model, context, *, weights: Literal["default", "int8", "int4"] = "default", group_size: int | None = None
):
    """Export the model as an OpenVINO graph; on request with NNCF's weight-only integers, no text looked at.

    With integer weights the CPU plugin rounds a linear layer's inputs to 8 bits too, as `backend` says.

    Args:
        weights: "default" (as they are), "int8", or "int4" (the token table and the head are then int8).
        group_size: only with "int4".
    """
    if group_size is not None and weights != "int4":
        raise BadSetting(
            f'weights={weights!r} with group_size={group_size}: "default" and "int8" take no group_size, '
            '"int4" may.'
        )

    def quantize(nncf, graph, _):
        mode = getattr(nncf.CompressWeightsMode, f"{weights.upper()}_ASYM")
        grid = {"group_size": group_size or -1} if weights == "int4" else {}
        try:
            return nncf.compress_weights(graph, mode=mode, **grid)
        except (nncf.errors.InvalidGroupSizeError, nncf.ValidationError) as error:
            raise BadSetting(
                f"NNCF refuses weights={weights!r} with group_size={group_size}: {str(error).splitlines()[0]}"
            ) from error

    integers = weights != "default"
    return _result(
        "openvino", openvino_graphs, trace(model), quantize if integers else None, dynamic=integers
    )


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

    return _result("openvino-int8", openvino_graphs, traces, quantize)


@technique("onnxruntime", 1, "ONNX Runtime", "#EE8866", "$R$")
def onnxruntime(model, context):
    """Export the model as an ONNX graph in fp32: what changing the library alone does."""
    return _result("onnxruntime", onnx_graphs, trace(model))


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
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready = plain.with_name("ready.onnx")
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        q.quantize_static(
            ready,
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


def _result(
    name: str, runtime: ModuleType, traces: Sequence[Traced], quantize: Callable | None = None, **backend
) -> tuple[GraphModel, TechniqueResult]:
    """Deploy the traced model with `runtime`; the layers are integer matrices, or all linear layers."""
    model, figures = runtime.deployed(traces, quantize, **backend)
    matrices = sum(element["matrices"] for element in figures["stored"].values())
    return model, TechniqueResult(name, matrices if quantize else len(prunable(traces[0].model)), figures)
