"""Reads weight files without building a model, and refuses those that are broken or unsafe.

A checkpoint is a sequence of `TensorRef`s: name, shape, dtype and where the bytes lie. Bytes of safetensors
are read into a buffer that is reused, so memory is that of one chunk whatever the size of the file; those of
a .bin are mapped, which the system may count as memory of the process, but takes back when it is short of it.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lmcompress.errors import AssetNotFound, CorruptCheckpoint, UnsafeCheckpoint

_CODES = (
    "F64:float64 F32:float32 F16:float16 BF16:bfloat16 F8_E4M3:float8_e4m3fn F8_E4M3FNUZ:float8_e4m3fnuz "
    "F8_E5M2:float8_e5m2 F8_E5M2FNUZ:float8_e5m2fnuz F8_E8M0:float8_e8m0fnu C64:complex64 BOOL:bool "
    "I64:int64 I32:int32 I16:int16 I8:int8 U64:uint64 U32:uint32 U16:uint16 U8:uint8"
)
DTYPES = {code: getattr(torch, name) for code, name in (code.split(":") for code in _CODES.split())}
_LONGEST_HEADER = 100 << 20  # bytes; the format's own limit
_LAYOUTS = (("model", "safetensors"), ("pytorch_model", "bin"))


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a checkpoint: `offset` is its first byte in `file`.

    `data` is the tensor itself, of a .bin.
    """

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
        """Yield the elements in order as flat tensors of at most `max_bytes`.

        Each is a view of one buffer, so it is valid only until the next is asked for.
        """
        step = max(max_bytes // self.dtype.itemsize, 1)
        buffer = bytearray(min(step, self.numel) * self.dtype.itemsize)
        for start in range(0, self.numel, step):
            yield self.read_range(start, min(start + step, self.numel), buffer)

    def read_range(self, start: int, stop: int, buffer: bytearray) -> torch.Tensor:
        """Return elements `start` to `stop` as a flat tensor `(stop - start,)` that lies in `buffer`.

        Raises:
            CorruptCheckpoint: the file has become shorter than its header says.
        """
        if self.data is not None:
            return self.data.reshape(-1)[start:stop]
        if stop == start:
            return torch.empty(0, dtype=self.dtype)
        size = (stop - start) * self.dtype.itemsize
        view, done = memoryview(buffer)[:size], 0
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset + start * self.dtype.itemsize)
            while done < size:
                count = stream.readinto(view[done:])
                if not count:
                    raise CorruptCheckpoint(
                        f"{self.file} ended {size - done} bytes before the end of {self.name!r}: it was cut "
                        "while being read. Fetch it again."
                    )
                done += count
        return torch.frombuffer(buffer, dtype=self.dtype, count=stop - start)


def tensors(path: Path | str) -> Iterator[TensorRef]:
    """Yield every tensor of a weight file or a checkpoint folder, in file order.

    Storage shared in a .bin once.

    Raises:
        AssetNotFound: no weights there. CorruptCheckpoint: a file or a shard is missing or broken.
        UnsafeCheckpoint: a .bin that needs arbitrary unpickling.
    """
    expected, files = _index(Path(path))
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
    missing = sorted(set(expected) - set(seen)) if files[0].suffix == ".safetensors" else []
    if missing:
        raise CorruptCheckpoint(
            f"the index of {path} promises {len(missing)} tensors that no shard holds: {_few(missing)}. "
            "The shards belong to another version: fetch the folder again."
        )


def weight_files(path: Path | str) -> list[Path]:
    """Return the files that hold a checkpoint's weights: safetensors if there are any, else .bin.

    Errors as `tensors`.
    """
    return _index(Path(path))[1]


def validate_safetensors(file: Path | str) -> list[TensorRef]:
    """Parse the header of a safetensors file and check that it covers the file exactly.

    Source: the format's specification (8-byte little-endian length, JSON, contiguous data).

    Raises:
        CorruptCheckpoint: truncated, malformed, overlapping, with gaps, or of an unknown dtype.
    """
    file = Path(file)
    header, start = _header(file)
    refs = sorted(
        (_entry(file, name, entry, start) for name, entry in header.items() if name != "__metadata__"),
        key=lambda ref: (ref.offset, ref.nbytes),
    )
    position = 0
    for ref in refs:
        begin = ref.offset - start
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise _broken(
                file, f"{ref.name!r} starts at byte {begin} of the data, expected {position}: it {fault}"
            )
        position = begin + ref.nbytes
    data_bytes = file.stat().st_size - start
    if position != data_bytes:
        fault = "it is truncated" if data_bytes < position else "it has trailing bytes"
        raise _broken(
            file, f"the header describes {position} bytes of data and the file holds {data_bytes}: {fault}"
        )
    return refs


def _header(file: Path) -> tuple[dict, int]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _broken(
                file,
                f"it has {size} bytes and claims a header of {length}: it is truncated or no safetensors file"
                + (" (it is a Git LFS pointer: run `git lfs pull`)" if _is_pointer(file) else ""),
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(file, f"its header is a {type(header).__name__}, expected an object")
    return header, 8 + length


def _entry(file: Path, name: str, entry: object, start: int) -> TensorRef:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(file, f"{name!r} lacks dtype, shape or data_offsets in the header: {entry}") from error
    if not whole:
        raise _broken(file, f"{name!r} has a shape or offsets that are no whole numbers ≥ 0: {entry}")
    if kind not in DTYPES:
        raise _broken(file, f"{name!r} has the unknown dtype {kind!r}; known are {', '.join(DTYPES)}")
    ref = TensorRef(name, shape, DTYPES[kind], file, start + begin)
    if end - begin != ref.nbytes:
        raise _broken(
            file, f"{name!r} of shape {shape} and {kind} needs {ref.nbytes} bytes, not {end - begin}"
        )
    return ref


def _index(path: Path) -> tuple[list[str], list[Path]]:
    """Return names promised by an index (empty without one) and the weight files, which exist."""
    if path.is_file():
        if not path.name.endswith(".index.json"):
            return [], [path]
        return _read_index(path)
    for stem, suffix in _LAYOUTS:
        if (path / f"{stem}.{suffix}").is_file():
            return [], [path / f"{stem}.{suffix}"]
        if (path / f"{stem}.{suffix}.index.json").is_file():
            return _read_index(path / f"{stem}.{suffix}.index.json")
        if files := sorted(path.glob(f"*.{suffix}")):
            return [], files
    listing = sorted(child.name for child in path.glob("*"))
    raise AssetNotFound(
        f"no weights in {path}: looked for model.safetensors, a sharded index, *.safetensors, "
        f"pytorch_model.bin; it holds {_few(listing) or 'nothing'}. Give the folder of a model as `hf "
        f"download` makes it."
    )


def _read_index(file: Path) -> tuple[list[str], list[Path]]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        files = [file.parent / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(file, f"it is no index with a weight_map ({error!r})") from error
    missing = [shard.name for shard in files if not shard.is_file()]
    if missing or not files:
        raise CorruptCheckpoint(
            f"{len(missing)} of {len(files)} shards named by {file} are missing: {_few(missing)}. "
            "The download is incomplete: run the same `hf download` again."
        )
    return list(weight_map), files


def _torch_refs(file: Path) -> list[TensorRef]:
    """Return refs of a .bin, mapped: bytes are read when asked for (before torch 1.6: held in memory)."""
    try:
        mapped = zipfile.is_zipfile(file)
        state = _state_dict(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped), file)
    except pickle.UnpicklingError as error:
        cause = next((line for line in str(error).splitlines() if "GLOBAL" in line), _first_sentence(error))
        raise UnsafeCheckpoint(
            f"{file} cannot be read without running code it carries ({cause.strip().rstrip('.')}). Ask its "
            "author for safetensors, or, if you trust it, convert it yourself on a machine that holds "
            "nothing of value: `safetensors.torch.save_model(model, 'model.safetensors')`, and give that "
            "folder."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if isinstance(error, CorruptCheckpoint | FileNotFoundError | PermissionError):
            raise
        raise _broken(file, f"torch.load says: {_first_sentence(error)}") from error
    refs: dict[tuple, TensorRef] = {}
    for name, tensor in state.items():
        # Names of one tensor share its memory; empty tensors share none.
        memory = (tensor.data_ptr() or name, tensor.shape, tensor.stride())
        refs.setdefault(memory, TensorRef(name, tuple(tensor.shape), tensor.dtype, file, data=tensor))
    return list(refs.values())


def _state_dict(state: object, file: Path) -> dict[str, torch.Tensor]:
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _broken(
            file, "it holds no dictionary of tensors; save `model.state_dict()` instead of the model"
        )
    return state


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    merged = dict(pairs)
    if len(merged) != len(pairs):
        raise ValueError("a name occurs twice")
    return merged


def _is_pointer(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(16) == b"version https://"


def _broken(file: Path, fault: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{file} is damaged: {fault}. Fetch or save it again.")


def _first_sentence(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0].rstrip(".")


def _few(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
