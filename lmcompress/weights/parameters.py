"""Which tensors of a checkpoint are parameters, tied ones once, and where in the transformer each sits."""

import json
from pathlib import Path

import torch

from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models import tensor_names
from lmcompress.models.checkpoints import TensorRef, tensors
from lmcompress.models.tensor_names import TensorPlace


def parameters(path: Path) -> tuple[list[TensorRef], list[TensorPlace], dict[str, object]]:
    """Return parameter tensors of a checkpoint, tied ones once; their places.

    What was left out ("skipped", "tied").

    Raises:
        NothingTouched: the checkpoint holds no floating-point parameter. BadSetting: it is only a difference.
    """
    record = path / "compression.json"
    if record.is_file() and (base := json.loads(record.read_text(encoding="utf-8")).get("base")):
        raise BadSetting(
            f"{path} holds only the tensors that differ from {base}: ask for the statistics of {base}."
        )
    refs, places, skipped, tied = [], [], [], {}
    matrices: dict[tuple, list[TensorRef]] = {}
    everything = list(tensors(path))
    everywhere = tensor_names.classify([ref.name for ref in everything], [ref.shape for ref in everything])
    for ref, position in zip(everything, everywhere, strict=True):
        if not ref.dtype.is_floating_point or tensor_names.is_buffer(ref.name, ref.shape):
            skipped.append(ref.name)
            continue
        # Only vocabulary matrices are ever tied, and a file that stores both copies does not say so.
        if position.kind in ("embedding", "head") and len(ref.shape) == 2 and ref.numel:
            twins = matrices.setdefault((ref.shape, ref.dtype), [])
            original = next((twin for twin in twins if _same_bytes(ref, twin)), None)
            if original is not None:
                tied[ref.name] = original.name
                continue
            twins.append(ref)
        refs.append(ref)
        places.append(position)
    if not refs:
        raise NothingTouched(
            f"{path} holds no floating-point parameter; it holds {', '.join(skipped[:5]) or 'nothing'}."
        )
    return refs, places, {"skipped": skipped, "tied": tied}


def _same_bytes(ref: TensorRef, other: TensorRef) -> bool:
    chunks = zip(ref.chunks(1 << 20), other.chunks(1 << 20), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in chunks)
