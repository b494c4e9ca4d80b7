"""Which part of a transformer each tensor of a checkpoint is, by its name alone: `anatomy` without a model.

Weight statistics see checkpoints, not models. Roles come from the same table as the anatomy's (`families`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmcompress.models import families

_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_CROSS = re.compile(r"cross_?att|encdecatt|encoder_attn", re.IGNORECASE)
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_?forward|densereludense|intermediate|output|moe|expert|^fc\d?$|^lin\d$|^w[io123](_\d)?$",
    re.IGNORECASE,
)
_POSITION_BIAS = "relative_attention_bias"
_EMBEDDING = re.compile(rf"embed(?!_out)|^w[tp]e$|^shared$|^project_in$|{_POSITION_BIAS}", re.IGNORECASE)
_BUFFERS = frozenset({"masked_bias", "inv_freq", "position_ids", "token_type_ids", "final_logits_bias"})
_BUFFERS |= {"num_batches_tracked"}
_ATTENTION_OUTPUTS = frozenset({"out_proj", "o_proj", "o", "out_lin", "dense", "c_proj"})


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor sits: `stack` encoder, decoder or shared; `block` None outside the blocks.

    `kind` is attention, cross-attention, feed-forward, norm, embedding, head or other; `role` says which
    linear layer of a block (q, k, v, qkv, o, gate, in, out), and is the module's own name for everything
    else.
    """

    stack: str
    kind: str
    role: str
    is_bias: bool
    block: int | None


def classify(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[TensorPlace]:
    """Place each tensor of one checkpoint; names of no stack get the only one there is, or "shared"."""
    places = [_place(name, shape) for name, shape in zip(names, shapes, strict=True)]
    stacks = {position.stack for position in places if position.stack and position.block is not None}
    if not stacks:
        # DistilBERT is the one encoder whose block names do not say so; all others of one stack decode.
        distilbert = any("transformer.layer." in name or ".q_lin." in name for name in names)
        stacks = {"encoder" if distilbert else "decoder"}
    default = stacks.pop() if len(stacks) == 1 else "shared"
    return [position if position.stack else replace(position, stack=default) for position in places]


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is no parameter: position ids, 4-D masks ("bias"), rotary frequencies."""
    last = name.rpartition(".")[2]
    return last in _BUFFERS or (last == "bias" and len(shape) == 4)


def is_position_bias(name: str) -> bool:
    """Return whether a tensor is a table of relative position biases (to `classify` an embedding)."""
    return _POSITION_BIAS in name


def _place(name: str, shape: tuple[int, ...]) -> TensorPlace:
    path = name.split(".")
    last = path[-1]
    is_bias = last in ("bias", "beta") or last.endswith("_bias")
    modules = path[:-1] if last in ("weight", "bias", "gamma", "beta") and len(path) > 1 else path
    # The first number is the block; a leading one is a container's (sentence-transformers saves
    # "0.auto_model…").
    number = next((i for i, word in enumerate(path) if word.isdigit() and i), None)
    kind = _kind(modules, shape, inside=number is not None)
    block = int(path[number]) if number is not None and kind not in ("head", "embedding") else None
    stack = "" if kind == "head" else families.stack_by_name(".".join(path[:number])) or ""
    return TensorPlace(stack, kind, _role(modules, kind), is_bias, block)


def _kind(modules: list[str], shape: tuple[int, ...], *, inside: bool) -> str:
    owner = modules[-1]
    if _NORM.search(owner) and len(shape) <= 1:
        return "norm"
    if _EMBEDDING.search(owner) or (not inside and any(_EMBEDDING.search(module) for module in modules)):
        return "embedding"
    if not inside or any(module in ("classifier", "score", "lm_head", "cls") for module in modules):
        return "head"
    if any(_CROSS.search(module) for module in modules):
        return "cross-attention"
    if any(_ATTENTION.search(module) for module in modules):
        return "attention"
    return "feed-forward" if any(_FEED_FORWARD.search(module) for module in modules) else "other"


def _role(modules: list[str], kind: str) -> str:
    owner = modules[-1]
    if kind.endswith("attention") and owner in _ATTENTION_OUTPUTS:
        return "o"
    if not kind.endswith(("attention", "feed-forward")):
        return owner
    return families.role_of(".".join(modules)) or families.CHECKPOINT_ROLES.get(owner, owner)
