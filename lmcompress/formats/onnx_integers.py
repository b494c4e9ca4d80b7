"""Matrices of an ONNX graph as integers of 4 or 8 bits, in groups that share a scale and a zero point.

ONNX Runtime multiplies them without making them floating-point first (MatMulNBits, which rounds the inputs to
8 bits), and looks rows of a table up in them (GatherBlockQuantized); both are operations of its own.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcompress.formats.graphs import StoredMatrix, imported
from lmcompress.formats.tracing import digest
from lmcompress.models import packed

DOMAIN = "com.microsoft"
INPUTS_IN_8_BITS = 4  # accuracy level of MatMulNBits
_MATRIX = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # which input of an operation is the matrix
Grid = Callable[[Tensor], packed.Packed]  # from a matrix `(rows, width)` to its integers


def rounded(*, bits: int, group_size: int) -> Grid:
    """Return the function that rounds a matrix to the nearest integers (see `packed.quantize`)."""

    def grid(matrix: Tensor) -> packed.Packed:
        integers, scales, zeros = packed.quantize(matrix, bits=bits, group_size=group_size)
        form = {"width": matrix.shape[1], "bits": bits, "group_size": group_size}
        return packed.Packed(packed.pack(integers, bits), scales, zeros, **form)

    return grid


def to_integers(model, grid: Grid | None, *, layers: Mapping[str, packed.Packed] | None = None) -> None:
    """Put integers in the place of the graph's stored matrices, in place.

    `grid` rounds a matrix, None leaves it; `layers`: those whose integers are there already, by the `digest`
    of the matrix that they stand for.
    """
    onnx, graph, layers = imported("onnx"), model.graph, layers or {}
    make, floats = onnx.helper.make_node, {t.name: t for t in graph.initializer if t.data_type == 1}
    nodes, tensors = [], {}

    def stored(name: str, array: np.ndarray) -> str:
        tensors[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    for node in graph.node:
        is_table = node.op_type == "Gather"
        source = floats.get(node.input[_MATRIX[node.op_type]]) if node.op_type in _MATRIX else None
        layer = None
        if source is not None and len(source.dims) == 2:
            matrix, is_turned = (
                onnx.numpy_helper.to_array(source),
                any(f.name == "transB" for f in node.attribute),
            )
            matrix = matrix if is_table or is_turned else matrix.T
            layer = layers.get(digest(matrix)) or (grid and grid(torch.from_numpy(matrix.copy())))
        if not layer:
            nodes.append(node)
            continue
        integers, scales, zeros, size = blocks(layer)
        side, form = f"{source.name}.{node.op_type}", {"bits": layer.bits, "block_size": size}
        further = [stored(f"{side}.scales", scales), stored(f"{side}.zeros", zeros)]
        if is_table:
            integers = integers.reshape(len(integers), -1)[:, : packed.row_bytes(layer.width, layer.bits)]
            inputs = [stored(f"{side}.integers", integers), node.input[1], *further]
            form |= {"gather_axis": 0, "quantize_axis": 1}
            nodes.append(make("GatherBlockQuantized", inputs, node.output, domain=DOMAIN, **form))
            continue
        argument, result = node.input[0], node.output[0]
        if layer.channel_scale is not None:
            scaled = [argument, stored(f"{side}.inputs", layer.channel_scale.float().numpy())]
            argument = f"{result}.scaled"
            nodes.append(make("Mul", scaled, [argument]))
        product = f"{result}.product" if node.op_type == "Gemm" else result
        inputs = [argument, stored(f"{side}.integers", integers), *further]
        form |= {"K": layer.width, "N": layer.rows, "accuracy_level": INPUTS_IN_8_BITS}
        nodes.append(make("MatMulNBits", inputs, [product], domain=DOMAIN, **form))
        if node.op_type == "Gemm":
            nodes.append(make("Add", [product, node.input[2]], [result]))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, content in ((graph.node, nodes), (graph.initializer, [*kept, *tensors.values()])):
        del field[:]
        field.extend(content)
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def halve(model, dtype: torch.dtype) -> None:
    """Store the graph's floating-point matrices in a 16-bit `dtype`, cast when the runtime reads them.

    Nothing is lost of a model that had this dtype.
    """
    onnx, graph = imported("onnx"), model.graph
    kind = onnx.TensorProto.BFLOAT16 if dtype is torch.bfloat16 else onnx.TensorProto.FLOAT16
    for tensor in [tensor for tensor in graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1]:
        values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).to(dtype)
        content, name = values.view(torch.int16).numpy().tobytes(), tensor.name
        short = onnx.helper.make_tensor(f"{name}.short", kind, tensor.dims, content, raw=True)
        graph.initializer.remove(tensor)
        graph.initializer.append(short)
        graph.node.insert(0, onnx.helper.make_node("Cast", [short.name], [name], to=onnx.TensorProto.FLOAT))


def blocks(layer: packed.Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return a layer's integers `(rows, groups, bytes)`, scales `(rows, groups)`, zero points, group size.

    A group of another size than the operations take, or a whole row, is divided into smaller ones.
    """
    width, half = layer.width, 2 ** (layer.bits - 1)
    size = min(max(width & -width, 32), 128)
    if layer.group_size:
        size = layer.group_size & -layer.group_size
    given = layer.group_size or -(-width // size) * size
    count, repeats = -(-width // size), given // size
    integers = F.pad(layer.integers, (0, count * size - width))
    scales = layer.scales.float().repeat_interleave(repeats, 1)[:, :count]
    zeros = torch.zeros_like(layer.scales) if layer.zeros is None else layer.zeros
    zeros = zeros.to(torch.int8).repeat_interleave(repeats, 1)[:, :count]
    as_bytes = [
        packed.pack(matrix, layer.bits) if layer.bits < 8 else (matrix.to(torch.int16) + half).to(torch.uint8)
        for matrix in (integers, zeros)
    ]
    whole, offsets = (matrix.numpy() for matrix in as_bytes)
    return whole.reshape(len(whole), count, -1), scales.numpy(), offsets, size


def stored_matrices(graph) -> list[StoredMatrix]:
    """Return the matrices that `to_integers` put into a graph."""
    onnx, matrices = imported("onnx"), []
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        form = {field.name: field.i for field in node.attribute}
        bits = form["bits"]
        names = [name for name in node.input if name in initializers]
        arrays = [onnx.numpy_helper.to_array(initializers[name]) for name in names]
        integers, nbytes = next(a for a in arrays if a.dtype == np.uint8), sum(a.nbytes for a in arrays)
        values = np.unique(integers)
        if bits == 4:
            values = np.unique(np.concatenate([values & 15, values >> 4]))
        count = form["K"] * form["N"] if "K" in form else integers.size * 8 // bits  # without padding
        matrices.append(StoredMatrix(f"uint{bits}", count, nbytes, len(values)))
    return matrices
