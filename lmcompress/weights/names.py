"""First floor: which tensors of a checkpoint are parameters, and which part of a transformer each one is.

Weight statistics see checkpoints, not models, so they cannot ask `layers`; this is the same question answered
from names and shapes alone, for the families the project knows.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models.checkpoints import TensorRef, tensors

_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_CROSS = re.compile(r"cross_?att|encdecatt|encoder_attn", re.IGNORECASE)
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_?forward|densereludense|intermediate|output|moe|expert|^fc\d?$|^lin\d$|^w[io123](_\d)?$",
    re.IGNORECASE,
)
_EMBEDDING = re.compile(
    r"embed(?!_out)|^w[tp]e$|^shared$|^project_in$|relative_attention_bias", re.IGNORECASE
)
_BUFFERS = {
    "masked_bias",
    "inv_freq",
    "position_ids",
    "token_type_ids",
    "final_logits_bias",
    "num_batches_tracked",
}
_ROLES = {
    "q": {"query", "q_proj", "q", "q_lin", "q_attn"},
    "k": {"key", "k_proj", "k", "k_lin"},
    "v": {"value", "v_proj", "v", "v_lin"},
    "qkv": {"c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv"},
    "gate": {"gate_proj", "wi_0", "w1"},
    "in": {"fc1", "c_fc", "wi", "wi_1", "up_proj", "lin1", "dense_h_to_4h", "ffn", "w3"},
    "out": {"fc2", "wo", "down_proj", "lin2", "dense_4h_to_h", "ffn_output", "w2"},
    "o": {"out_proj", "o_proj", "o", "out_lin"},
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}


@dataclass(frozen=True)
class Place:
    """Where a tensor sits: `stack` encoder, decoder or shared; `block` None outside the blocks.

    `kind` is attention, cross-attention, feed-forward, norm, embedding, head or other; `role` says which linear
    map of a block (q, k, v, qkv, o, gate, in, out), and is the module's own name for everything else.
    """

    stack: str
    kind: str
    role: str
    is_bias: bool
    block: int | None


def places(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Place]:
    """Place each tensor of one checkpoint; names that tell no stack get the only one there is, or "shared"."""
    found = [_place(name, shape) for name, shape in zip(names, shapes, strict=True)]
    stacks = {place.stack for place in found if place.stack and place.block is not None}
    if not stacks:
        # DistilBERT is the one encoder whose block names do not say so; the rest are decoders.
        stacks = {
            "encoder"
            if any("transformer.layer." in name or ".q_lin." in name for name in names)
            else "decoder"
        }
    rest = stacks.pop() if len(stacks) == 1 else "shared"
    return [place if place.stack else replace(place, stack=rest) for place in found]


def parameters(path: Path) -> tuple[list[TensorRef], list[Place], dict[str, object]]:
    """Parameter tensors of a checkpoint, tied ones once; their places; what was left out ("skipped", "tied").

    Raises:
        NothingTouched: the checkpoint holds no floating-point parameter. BadSetting: it is only a difference.
    """
    record = path / "compression.json"
    if record.is_file() and (base := json.loads(record.read_text(encoding="utf-8")).get("base")):
        raise BadSetting(
            f"{path} holds only the tensors that differ from {base}: ask for the statistics of {base}."
        )
    kept, skipped, tied = [], [], {}
    matrices: dict[tuple, list[TensorRef]] = {}
    everything = list(tensors(path))
    where = places([ref.name for ref in everything], [ref.shape for ref in everything])
    for ref, place in zip(everything, where, strict=True):
        if not ref.dtype.is_floating_point or is_buffer(ref.name, ref.shape):
            skipped.append(ref.name)
            continue
        # Only vocabulary matrices are ever tied, and a file that stores both copies does not say so.
        if place.kind in ("embedding", "head") and len(ref.shape) == 2 and ref.numel:
            twins = matrices.setdefault((ref.shape, ref.dtype), [])
            original = next((twin for twin in twins if _same(ref, twin)), None)
            if original is not None:
                tied[ref.name] = original.name
                continue
            twins.append(ref)
        kept.append((ref, place))
    if not kept:
        raise NothingTouched(
            f"{path} holds no floating-point parameter; it holds {', '.join(skipped[:5]) or 'nothing'}."
        )
    refs, where = (list(column) for column in zip(*kept, strict=True))
    return refs, where, {"skipped": skipped, "tied": tied}


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor in a checkpoint is no parameter: position ids, causal masks (4-D "bias"), frequencies."""
    last = name.rpartition(".")[2]
    return last in _BUFFERS or (last == "bias" and len(shape) == 4)


def _same(one: TensorRef, other: TensorRef) -> bool:
    pairs = zip(one.chunks(1 << 20), other.chunks(1 << 20), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _place(name: str, shape: tuple[int, ...]) -> Place:
    parts = name.split(".")
    last = parts[-1]
    is_bias = last in ("bias", "beta") or last.endswith("_bias")
    modules = parts[:-1] if last in ("weight", "bias", "gamma", "beta") and len(parts) > 1 else parts
    # The first number is the block; a leading one is a container's (sentence-transformers saves "0.auto_model…").
    number = next((i for i, part in enumerate(parts) if part.isdigit() and i), None)
    kind = _kind(modules, shape, inside=number is not None)
    block = int(parts[number]) if number is not None and kind not in ("head", "embedding") else None
    before = [] if kind == "head" else parts[:number]
    stack = next((part for part in before if part in ("encoder", "decoder")), "")
    return Place(stack, kind, _role(modules, kind), is_bias, block)


def _kind(modules: list[str], shape: tuple[int, ...], *, inside: bool) -> str:
    owner = modules[-1]
    if _NORM.search(owner) and len(shape) <= 1:
        return "norm"
    if _EMBEDDING.search(owner) or (not inside and any(_EMBEDDING.search(part) for part in modules)):
        return "embedding"
    if not inside or any(part in ("classifier", "score", "lm_head", "cls") for part in modules):
        return "head"
    if any(_CROSS.search(part) for part in modules):
        return "cross-attention"
    if any(_ATTENTION.search(part) for part in modules):
        return "attention"
    return "feed-forward" if any(_FEED_FORWARD.search(part) for part in modules) else "other"


def _role(modules: list[str], kind: str) -> str:
    owner = modules[-1]
    if owner in ("dense", "c_proj"):  # the name BERT and GPT-2 give to more than one map of a block
        if kind == "feed-forward":
            return "in" if "intermediate" in modules else "out"
        return "o" if kind.endswith("attention") else owner
    return _ROLE_OF.get(owner, owner) if kind.endswith(("attention", "feed-forward")) else owner
