"""Counts the bytes a model takes: of the files saved, and in each form its weights could be stored in."""

import math
from pathlib import Path

import numpy as np
import torch
import zstandard
from torch import nn

from lmcompress.errors import UnknownFamily
from lmcompress.models import anatomy, families, serialization

_WEIGHT_FILES = (".safetensors", ".bin", ".xml", ".onnx", ".data", ".gguf")


def file_bytes(folder: str | Path) -> int:
    """Return the bytes of weight files in `folder` and below (safetensors, bin, OpenVINO, ONNX, GGUF)."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.suffix in _WEIGHT_FILES)


def bytes_by_format(model: nn.Module) -> dict[str, int]:
    """Return the bytes the whole model takes in each encoding, at the dtype its weights have.

    The prunable matrices (`anatomy.prunable`) are encoded; everything else stays dense, and is compressed in
    the zstd formats; so is all of a model whose layers a technique replaced. Tied tensors count once; file
    headers (some kB) are left out.

    Returns:
        "dense"; "bitmask" (one bit per weight + the nonzero values); both with "_zstd" (level 3);
        "csr_int32" and "csr_int64" (nonzero values, their column indices, row pointers). Where matrices are
        packed integers also "bitmask_integers": each as one bit per weight and its nonzero integers, if that
        is smaller.
    """
    try:
        matrices = [m.weight2d().detach() for m in anatomy.prunable(model)]
    except UnknownFamily:  # layers were replaced, and are stored the way their technique stores them
        matrices = []
    encoded = {matrix.data_ptr() for matrix in matrices}
    unique = {serialization.place_of(tensor): tensor for tensor in model.state_dict().values()}
    others_dense = [tensor for tensor in unique.values() if tensor.data_ptr() not in encoded]
    size = dict.fromkeys(("dense", "bitmask", "csr_int32", "csr_int64"), sum(t.nbytes for t in others_dense))
    names = ("rest", "dense", "bitmask")
    zstd = {name: zstandard.ZstdCompressor(level=3, threads=-1).compressobj() for name in names}
    compressed = dict.fromkeys(names, 0)

    def compress(name: str, tensor: torch.Tensor) -> None:
        if tensor.numel():  # torch cannot view an empty tensor as bytes
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            compressed[name] += len(zstd[name].compress(raw))

    for tensor in others_dense:
        compress("rest", tensor)
    for matrix in matrices:
        nonzero = (matrix != 0).cpu().numpy()
        values = torch.from_numpy(_as_integers(matrix)[nonzero])
        for tensor in (torch.from_numpy(np.packbits(nonzero)), values):
            compress("bitmask", tensor)
            size["bitmask"] += tensor.nbytes
        compress("dense", matrix)
        size["dense"] += matrix.nbytes
        for name, width in (("csr_int32", 4), ("csr_int64", 8)):
            size[name] += values.nbytes + width * (values.numel() + matrix.shape[0] + 1)
    closed = {name: compressed[name] + len(stream.flush()) for name, stream in zstd.items()}
    if packed := [layer for layer in families.integer_layers(model) if hasattr(layer, "integers")]:
        saved = 0
        for layer in packed:
            nonzero = int((layer.dequantized() != 0).sum())
            sparse = math.ceil(layer.weight_count / 8) + math.ceil(nonzero * layer.bits / 8)
            saved += max(0, layer.packed.nbytes - sparse)
        size["bitmask_integers"] = min(size["dense"], size["bitmask"]) - saved
    return size | {f"{name}_zstd": closed["rest"] + closed[name] for name in ("dense", "bitmask")}


def _as_integers(tensor: torch.Tensor) -> np.ndarray:
    """Return the same bits as numpy integers: numpy masks several times faster, but has no bfloat16."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.cpu().contiguous().view(kinds[tensor.element_size()]).numpy()
