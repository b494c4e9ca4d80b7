"""Students: smaller models of a teacher's class, vocabulary and labels, with some of its blocks, or fresh."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models.anatomy import ModelAnatomy, anatomy
from lmcompress.models.families import FFN_WIDTH_FIELDS
from lmcompress.models.surgery import drop_blocks


def depths(model: nn.Module) -> dict[str, int]:
    """Return stack -> how many blocks run in it; ALBERT's shared block counts as often as it runs."""
    structure = anatomy(model)
    if structure.family == "albert":
        return {"encoder": model.config.num_hidden_layers}
    return {stack: len(blocks) for stack, blocks in structure.stacks.items()}


def spread(depth: int, count: int) -> list[int]:
    """Return `count` positions out of `depth`, evenly spaced, first and last among them.

    Of 12 these are 0, 2, 4, 7, 9, 11 for 6: the ones DistilBERT starts from (Sanh et al. 2019).
    """
    return [round(i * (depth - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]


def copied_blocks(model: nn.Module, keep: int | float | Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of the teacher with some of its blocks; embeddings, norms and head come along.

    `keep` is how many blocks of each stack, or which fraction (up to 1.0), evenly spaced (`spread`); or stack
    -> positions, a stack not named keeping all. What the model has not is a `BadSetting`.
    """
    depth, drop = depths(model), {}
    if not isinstance(keep, Mapping):
        keep = {stack: spread(count, _count(keep, count, stack)) for stack, count in depth.items()}
    for stack, positions in keep.items():
        if stack not in depth:
            raise BadSetting(f"no stack {stack!r}; this model has {', '.join(depth)}.")
        available = set(range(depth[stack]))
        if not positions or set(positions) - available:
            has = f"it has 0 to {depth[stack] - 1}, and one has to stay."
            raise BadSetting(f"cannot keep blocks {list(positions)} of the {stack}: {has}")
        drop[stack] = sorted(available - set(positions))
    return drop_blocks(model, drop)


def same_shape_random(model: nn.Module, blocks: int | float, *, seed: int = 0) -> nn.Module:
    """Return a model of the teacher's config with fewer blocks, and fresh weights (published: 3 of 24)."""
    return _fresh(model, copied_blocks(model, blocks).config, seed)


def narrower(
    model: nn.Module,
    *,
    hidden: float = 1.0,
    ffn: float = 1.0,
    heads: float = 1.0,
    blocks: int | float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a model with fresh weights of the teacher's config with smaller widths, and maybe fewer blocks.

    Args:
        hidden: fraction of the hidden size, rounded to a multiple of twice the heads (rotary heads are even).
        ffn: fraction of the feed-forward channels.
        heads: fraction of the heads, or of the groups where queries share keys.
        blocks: as `copied_blocks` takes them; None keeps all.
    """
    fractions = {"hidden": hidden, "ffn": ffn, "heads": heads}
    if wrong := [f"{name}={value!r}" for name, value in fractions.items() if not 0 < value <= 1]:
        raise BadSetting(f"out of range: {', '.join(wrong)}. Give fractions above 0 and up to 1.0.")
    config = copy.deepcopy(model.config if blocks is None else copied_blocks(model, blocks).config)
    widths = _widths(anatomy(model), **fractions)
    if getattr(config, "word_embed_proj_dim", None) == config.hidden_size:
        config.word_embed_proj_dim = widths["hidden"]  # OPT: else a projection would be put between
    config.hidden_size, config.num_attention_heads = widths["hidden"], widths["heads"]
    fields = dict.fromkeys((*FFN_WIDTH_FIELDS, "encoder_ffn_dim", "decoder_ffn_dim"), widths["ffn"])
    fields |= {"decoder_attention_heads": widths["heads"], "num_key_value_heads": widths["kv_heads"]}
    for name, width in fields.items():
        if hasattr(config, name):
            setattr(config, name, width)
    student = _fresh(model, config, seed)
    if (actual := _widths(anatomy(student))) != widths:
        raise UnknownFamily(
            f"a {type(model).__name__} of a narrower config came out as {actual}, not {widths}: its config "
            "names its widths otherwise; add the names to lmcompress/train/students.py."
        )
    return student


def _widths(
    structure: ModelAnatomy, *, hidden: float = 1.0, ffn: float = 1.0, heads: float = 1.0
) -> dict[str, int]:
    """Return the widths of the first block, each cut to its fraction."""
    block = structure.blocks[0]
    kv_heads = max(1, round(heads * block.attention.kv_heads))
    new = {"kv_heads": kv_heads, "heads": kv_heads * (block.attention.heads // block.attention.kv_heads)}
    new["hidden"] = structure.hidden_size
    if hidden < 1 or heads < 1:
        unit = 2 * new["heads"]
        new["hidden"] = max(1, round(hidden * structure.hidden_size / unit)) * unit
    return new | {"ffn": max(1, round(ffn * block.ffn.width))}


def _fresh(model: nn.Module, config, seed: int) -> nn.Module:
    """Return a new model like the teacher, on its device, in its dtype; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = type(model)(config)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(model.device, model.dtype).eval()


def _count(blocks: int | float, depth: int, stack: str) -> int:
    count = max(1, round(blocks * depth)) if isinstance(blocks, float) and 0 < blocks <= 1 else blocks
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= depth:
        raise BadSetting(
            f"blocks={blocks!r} of the {stack}, which has {depth}: give a whole number from 1 to {depth}, "
            "or a fraction above 0 and up to 1.0."
        )
    return count
