"""Reads weight files without building a model, and refuses those that are broken or unsafe.

Bytes of safetensors are read into a buffer that is reused, so memory is that of one chunk; those of a .bin
are mapped, which the system may count as memory of the process, but takes back when it is short of it.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from lmcompress.errors import AssetNotFound, CorruptCheckpoint, UnsafeCheckpoint
from lmcompress.models.assets import few, listing

_CODES = (
    "F64:float64 F32:float32 F16:float16 BF16:bfloat16 F8_E4M3:float8_e4m3fn F8_E4M3FNUZ:float8_e4m3fnuz "
    "F8_E5M2:float8_e5m2 F8_E5M2FNUZ:float8_e5m2fnuz F8_E8M0:float8_e8m0fnu C64:complex64 BOOL:bool "
    "I64:int64 I32:int32 I16:int16 I8:int8 U64:uint64 U32:uint32 U16:uint16 U8:uint8"
)
DTYPES = {code: getattr(torch, name) for code, name in (code.split(":") for code in _CODES.split())}
_LARGEST_JSON = 100 << 20  # bytes; the limit of a safetensors header
_NAMES = ("model.safetensors", "pytorch_model.bin")  # or as shards, with an index; in transformers' order
_NEEDED = (".json", ".safetensors", ".bin", ".model", ".txt")


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a checkpoint: `offset` is its first byte in `file`; of a .bin, `data` is the tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int = 0
    data: torch.Tensor | None = None

    @property
    def numel(self) -> int:
        """Return the number of elements; 1 for a scalar, 0 for an empty tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the dense tensor."""
        return self.numel * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Return the whole tensor, in memory of its own."""
        return self.read_range(0, self.numel, bytearray(self.nbytes)).reshape(self.shape)

    def chunks(self, max_bytes: int) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors of at most `max_bytes`, each valid until the next."""
        step = max(max_bytes // self.dtype.itemsize, 1)
        buffer = bytearray(min(step, self.numel) * self.dtype.itemsize)
        for start in range(0, self.numel, step):
            yield self.read_range(start, min(start + step, self.numel), buffer)

    def read_range(self, start: int, stop: int, buffer: bytearray) -> torch.Tensor:
        """Return elements `start` to `stop` as a flat tensor that lies in `buffer`."""
        if self.data is not None:
            return self.data.reshape(-1)[start:stop]
        if stop == start:
            return torch.empty(0, dtype=self.dtype)
        size = (stop - start) * self.dtype.itemsize
        with open(self.file, "rb") as stream:
            stream.seek(self.offset + start * self.dtype.itemsize)
            if (count := stream.readinto(memoryview(buffer)[:size])) < size:
                raise CorruptCheckpoint(
                    f"{self.file} ended {size - count} bytes before the end of {self.name!r}: it was cut "
                    "while being read. Fetch it again."
                )
        return torch.frombuffer(buffer, dtype=self.dtype, count=stop - start)


def tensors(path: Path | str) -> Iterator[TensorRef]:
    """Yield every tensor of a weight file or checkpoint folder, in its order; shared storage of a .bin once.

    Raises `AssetNotFound` (no weights there), `CorruptCheckpoint` (a file or a shard is missing or broken) or
    `UnsafeCheckpoint` (a .bin that needs arbitrary unpickling).
    """
    promised, files = _index(Path(path))
    seen: dict[str, Path] = {}
    for file in files:
        for ref in validate_safetensors(file) if file.suffix == ".safetensors" else _torch_refs(file):
            if ref.name in seen:
                raise CorruptCheckpoint(
                    f"{ref.name!r} is both in {seen[ref.name]} and in {file}; keep one of them."
                )
            seen[ref.name] = file
            yield ref
    # A .bin shard that shares storage lists the second name in the index, and only the first is yielded.
    missing = sorted(set(promised) - set(seen)) if files[0].suffix == ".safetensors" else []
    if missing:
        raise CorruptCheckpoint(
            f"the index of {path} promises {len(missing)} tensors that no shard holds: {few(missing)}. "
            "The shards belong to another version: fetch the folder again."
        )


def weight_files(path: Path | str) -> list[Path]:
    """Return the files that hold a checkpoint's weights, those that transformers would read of several."""
    return _index(Path(path))[1]


def validate_safetensors(file: Path) -> list[TensorRef]:
    """Return the tensors of a safetensors file in order of their bytes, if its header covers it exactly."""
    try:
        # Checks types, shapes, overlaps, gaps, the end of the file; "pt" would map it.
        with safe_open(file, "np"):
            pass
    except SafetensorError as error:
        fault = str(error).removeprefix("Error while deserializing header: ")
        if "header too" in fault or "not fully covered" in fault:
            fault += f" ({file.stat().st_size} bytes: cut, with trailing bytes, or another format)"
        elif "invalid offset" in fault:
            fault += ": it overlaps the tensor before it, or leaves a gap"
        with open(file, "rb") as stream:
            if stream.read(16) == b"version https://":
                fault += "; it is a Git LFS pointer: run `git lfs pull`"
        raise _broken(file, fault) from error
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    refs = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise _broken(file, f"{name!r} has the dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
        offset = 8 + length + entry["data_offsets"][0]
        refs.append(TensorRef(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], file, offset))
    return sorted(refs, key=lambda ref: (ref.offset, ref.nbytes))


def read_json(file: Path) -> dict:
    """Return the object that a JSON file of a checkpoint holds, or say what keeps it from being one."""
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{file.stat().st_size} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"it is not a JSON object ({error})") from error
    return content


def check_files(folder: Path) -> None:
    """Refuse what would block or mislead whoever opens it: pipes, devices, links that lead nowhere."""
    odd = (file for file in sorted(folder.glob("*")) if not (file.is_file() or file.is_dir()))
    for file in odd:
        if not file.is_symlink():
            raise CorruptCheckpoint(f"{file} is a pipe, a socket or a device, no file: remove it.")
        if file.suffix in _NEEDED:
            raise CorruptCheckpoint(
                f"{file} is a link that leads nowhere or in a circle ({file.readlink()}): the download is "
                "incomplete, or its cache was cleaned. Fetch the folder again."
            )


def _index(path: Path) -> tuple[list[str], list[Path]]:
    """Return names promised by an index (empty without one) and the weight files, which exist."""
    if path.is_file():
        return _read_index(path) if path.name.endswith(".index.json") else ([], [path])
    check_files(path)
    for name in _NAMES:
        if (path / name).is_file():
            return [], [path / name]
        if (path / f"{name}.index.json").is_file():
            return _read_index(path / f"{name}.index.json")
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(path.glob(pattern)):
            return [], files
    raise AssetNotFound(
        f"no weights in {path}: looked for model.safetensors, a sharded index, pytorch_model.bin, "
        f"*.safetensors, *.bin; it holds {listing(path)}. Give a model's folder as `hf download` makes it."
    )


def _read_index(file: Path) -> tuple[list[str], list[Path]]:
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _broken(file, "it is no index with a weight_map")
    names = sorted(set(weight_map.values()))
    paths = {name: PurePosixPath(name) for name in names}
    if outside := [name for name, path in paths.items() if path.is_absolute() or ".." in path.parts]:
        raise UnsafeCheckpoint(
            f"{file} names shards outside its folder: {few(outside)}. Put every shard beside the index and "
            "name it without a path, or fetch the model from its source."
        )
    files = [file.parent / name for name in names]
    missing = [shard.name for shard in files if not shard.is_file()]
    if missing or not files:
        raise CorruptCheckpoint(
            f"{len(missing)} of {len(files)} shards named by {file} are missing: {few(missing)}. "
            "The download is incomplete: run the same `hf download` again."
        )
    return list(weight_map), files


def _torch_refs(file: Path) -> list[TensorRef]:
    """Return refs of a .bin, mapped: bytes are read when asked for (before torch 1.6: held in memory)."""
    try:
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        cause = next((line for line in str(error).splitlines() if "GLOBAL" in line), _first_sentence(error))
        raise UnsafeCheckpoint(
            f"{file} cannot be read without running code it carries ({cause.strip().rstrip('.')}). Ask its "
            "author for safetensors, or, if you trust it, convert it yourself on a machine that holds "
            "nothing of value: `safetensors.torch.save_model(model, 'model.safetensors')`, and give that "
            "folder."
        ) from error
    except (FileNotFoundError, PermissionError):
        raise
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _broken(file, f"torch.load says: {_first_sentence(error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _broken(file, "it holds no dictionary of tensors; save `model.state_dict()`, not the model")
    refs: dict[tuple, TensorRef] = {}
    for name, tensor in state.items():
        # Names of one tensor share its memory; empty tensors share none.
        memory = (tensor.data_ptr() or name, tensor.shape, tensor.stride())
        refs.setdefault(memory, TensorRef(name, tuple(tensor.shape), tensor.dtype, file, data=tensor))
    return list(refs.values())


def _broken(file: Path, fault: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{file} is damaged: {fault}. Fetch or save it again.")


def _first_sentence(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0].rstrip(".")
