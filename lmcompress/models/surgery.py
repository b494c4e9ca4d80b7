"""Surgery: physically smaller models, equal to dense ones with the removed heads or channels masked.

Takes a model and what to keep of its heads, feed-forward channels, hidden dimensions or blocks; gives a
sliced copy that runs, trains and generates with its KV cache, uneven widths included. What to keep is the
business of the pruning techniques.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families, resizing
from lmcompress.models.anatomy import Attention, Block, ModelAnatomy, anatomy, refuse_experts, spread
from lmcompress.models.slicing_check import (
    Hook,
    masked_inputs,
    masked_norm,
    refuse_difference,
    refuse_failure,
)


def keep_heads(model: nn.Module, keep: dict[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` in which the named attentions keep only the given query heads.

    Args:
        model: any known family; untouched.
        keep: block name (its self-attention) or attention name (`Attention.name`) -> heads kept. Blocks not
            named keep all. Under grouped-query attention, whole groups only.

    Raises:
        BadSetting: unknown name, a head that does not exist, none kept, or a group that is not whole.
        UnknownFamily: the result would not be the dense model with the heads masked.
    """
    dense, masks = model, []
    model = copy.deepcopy(model)
    structure, memo = anatomy(model), {}
    attentions = {block.name: block.attention for block in structure.blocks}
    attentions |= {attention.name: attention for block in structure.blocks for attention in block.attentions}
    for name, heads in keep.items():
        attention = _lookup(name, attentions, "attention")
        heads = _checked(heads, attention.heads, f"heads of {name}")
        _refuse_broken_groups(attention, heads, name)
        if hasattr(attention.module, "has_relative_attention_bias"):
            stacks = structure.stacks.values()
            resizing.own_biases(next(s for s in stacks if any(attention in block.attentions for block in s)))
        masks += _head_masks(dense, attention, heads.tolist())
        resizing.cut_attention(attention, heads, memo)
    resizing.settle_config(model)
    refuse_difference(dense, model, masks=masks)
    return model


def _head_masks(dense: nn.Module, attention: Attention, heads: list[int]) -> Iterator[Hook]:
    """Yield what masks all other heads of an attention of the dense model."""
    yield masked_inputs(dense.get_submodule(attention.o.name), attention.columns(heads))
    for leaf, owner, numbers, count in attention.owned(heads):
        if getattr(getattr(owner, "weight", None), "shape", None) == (count * attention.head_dim,):
            norm = dense.get_submodule(f"{attention.name}.{leaf}")
            yield masked_norm(norm, spread(numbers, attention.head_dim))


def keep_ffn(model: nn.Module, keep: dict[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` in which the named blocks keep only the given feed-forward channels.

    Args:
        model: any known family with dense feed-forwards; untouched.
        keep: block name -> channels kept, of both matrices of a gated feed-forward. Others keep all.

    Raises:
        BadSetting: unknown block, a channel that does not exist, or none kept.
        UnknownFamily: the feed-forward is a mixture of experts, or the result would not be the dense model
            with the channels masked.
    """
    dense, masks = model, []
    model = copy.deepcopy(model)
    blocks, memo = {block.name: block for block in anatomy(model).blocks}, {}
    for name, channels in keep.items():
        block = _lookup(name, blocks, "block")
        refuse_experts(block)
        index = _checked(channels, block.ffn.width, f"feed-forward channels of {name}")
        masks.append(masked_inputs(dense.get_submodule(block.ffn.output.name), index))
        for layer in block.ffn.inputs:
            resizing.cut_linear(layer, memo, rows=index)
        resizing.cut_linear(block.ffn.output, memo, columns=index)
        owner = model.get_submodule(block.ffn.output.name.rpartition(".")[0])
        resizing.set_ints(owner, families.FFN_WIDTH_ATTRIBUTES, len(index))
    resizing.settle_config(model)
    refuse_difference(dense, model, masks=masks)
    return model


def keep_hidden(model: nn.Module, keep: Sequence[int]) -> nn.Module:
    """Return a copy of `model` whose hidden states keep only the dimensions `keep`, everywhere.

    Embeddings, norms, the layers into and out of every block, and heads are cut. Norms then take their mean
    and variance over the kept dimensions, so the result equals a dense model whose norms do the same, not the
    dense model with zeros. Scales derived from the old width (T5's logits, Gemma's embedding) are kept, and
    with them `config.hidden_size` where the config alone could not describe the result.

    Raises:
        BadSetting: a dimension that does not exist, or none kept.
        UnknownFamily: an embedding projection as wide as the hidden size, whose two sides look alike; or the
            result does not run, because something keeps to the old width.
    """
    model = copy.deepcopy(model)
    structure, memo = anatomy(model), {}
    index = _checked(keep, structure.hidden_size, "hidden dimensions")
    for block in structure.blocks:
        refuse_experts(block)
        for layer in block.linears:
            side = "rows" if layer.role in ("o", "out") else "columns"
            resizing.cut_linear(layer, memo, **{side: index})
    _cut_outside_blocks(model, structure, index, memo)
    for name, module in model.named_modules():
        if families.is_norm(name, module) and families.norm_width(module) == structure.hidden_size:
            resizing.cut_norm(module, index, memo)
        resizing.set_ints(module, families.HIDDEN_SIZE_ATTRIBUTES, len(index), old=structure.hidden_size)
    resizing.settle_config(model)
    refuse_failure(model)
    return model


def drop_blocks(model: nn.Module, drop: dict[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` without the blocks at the given positions of each stack.

    Args:
        model: any known family; untouched.
        drop: stack ("encoder", "decoder") -> positions dropped, in running order. ALBERT runs one shared
            block `num_hidden_layers` times: any position dropped is one run less.

    Raises:
        BadSetting: unknown stack, a position that does not exist, or no block left.
        UnknownFamily: ALBERT with several groups of layers, or the result would not be the dense model with
            the blocks skipped.
    """
    dense = model
    model = copy.deepcopy(model)
    structure = anatomy(model)
    shared = structure.family == "albert"
    for stack, positions in drop.items():
        blocks = _lookup(stack, structure.stacks, "stack")
        depth = model.config.num_hidden_layers if shared else len(blocks)
        _checked(positions, depth, f"blocks of the {stack}", minimum=0)
        kept_positions = [i for i in range(depth) if i not in set(positions)]
        _checked(kept_positions, depth, f"blocks left in the {stack}")
        if shared:
            if model.config.num_hidden_groups > 1:
                raise UnknownFamily(
                    "ALBERT with several groups maps runs to groups by depth: cannot drop blocks"
                )
        else:
            _keep_modules(model, blocks, kept_positions)
        _set_depth(model, structure, stack, kept_positions)
    refuse_difference(dense, model, skipped=drop)
    return model


def replace_modules(
    model: nn.Module, matches: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> None:
    """Put `make(module)` in place of every module that `matches`, in place; what was one stays one."""
    new: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and matches(module):
            if module not in new:
                new[module] = make(module)
            model.set_submodule(name, new[module])


def _lookup(name: str, table: dict, noun: str):
    if name not in table:
        raise BadSetting(f"no {noun} named {name!r}; available: {', '.join(table)}")
    return table[name]


def _checked(indices: Sequence[int], width: int, noun: str, *, minimum: int = 1) -> Tensor:
    """Return sorted distinct `indices`, all in [0, width), as a long tensor."""
    index = sorted({int(i) for i in indices})
    wrong = [i for i in index if not 0 <= i < width]
    if wrong or len(index) < minimum:
        raise BadSetting(
            f"{noun}: {f'{wrong} do not exist' if wrong else 'none kept'}; there are {width} (0 to "
            f"{width - 1}) and at least {minimum} must stay. To remove a whole block use drop_blocks."
        )
    return torch.tensor(index, dtype=torch.long)


def _refuse_broken_groups(attention: Attention, heads: Tensor, name: str) -> None:
    size = attention.heads // attention.kv_heads
    kept_heads = set(heads.tolist())
    groups = [set(range(first, first + size)) for first in range(0, attention.heads, size)]
    if broken := [sorted(group) for group in groups if 0 < len(group & kept_heads) < size]:
        raise BadSetting(
            f"{name} shares each key/value head among {size} query heads, so whole groups stay or go; "
            f"{sorted(kept_heads)} keeps only a part of the groups {broken}"
        )


def _cut_outside_blocks(model: nn.Module, structure: ModelAnatomy, index: Tensor, memo: dict) -> None:
    """Cut embeddings, the projections between a narrow embedding and the hidden size, and heads."""
    width = structure.hidden_size
    for layer in structure.embeddings:
        if isinstance(layer.module, nn.Embedding):
            if layer.module.embedding_dim == width:
                resizing.cut_embedding(layer.module, index, memo)
        elif layer.in_features == layer.out_features:
            raise UnknownFamily(
                f"{layer.name} maps {width} to {width}: which side is the hidden state is unclear"
            )
        else:
            side = "rows" if layer.out_features == width else "columns"
            resizing.cut_linear(layer, memo, **{side: index})
    logits = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    square = [head for head in structure.heads if head.in_features == head.out_features == width]
    for head in structure.heads:
        # A pooler or a classifier's dense layer has an output space of its own, which stays. Before logits
        # the output has to fit the embeddings (tied or not), and goes through a norm as hidden states do.
        writes_hidden = logits not in (None, head.module) and head.out_features == width
        reads_hidden = head.in_features == width and (logits is not None or not square or head in square)
        rows, columns = (index if hidden else None for hidden in (writes_hidden, reads_hidden))
        resizing.cut_linear(head, memo, rows=rows, columns=columns)


def _keep_modules(model: nn.Module, blocks: list[Block], positions: list[int]) -> None:
    """Put a ModuleList of the kept blocks in the place of the old one, numbered anew for the KV cache."""
    name = blocks[0].name.rpartition(".")[0]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([blocks[i].module for i in positions]))
    for number, i in enumerate(positions):
        for module in blocks[i].module.modules():
            resizing.set_ints(module, families.LAYER_NUMBER_ATTRIBUTES, number)
    first, was_first = blocks[positions[0]].attention.module, blocks[0].attention.module
    if getattr(was_first, "has_relative_attention_bias", False) and not first.has_relative_attention_bias:
        first.relative_attention_bias = was_first.relative_attention_bias
        first.has_relative_attention_bias = True


def _set_depth(model: nn.Module, structure: ModelAnatomy, stack: str, positions: list[int]) -> None:
    """Tell the config, and a stack's own copy of it, how many blocks there are and of which types."""
    fields = ("num_hidden_layers",)
    if structure.kind == "encoder-decoder":
        fields = (f"{stack}_layers", "num_decoder_layers" if stack == "decoder" else "num_layers")
    config = model.config
    for name in fields:
        if hasattr(config, name):
            setattr(config, name, len(positions))
    if hasattr(config, "num_decoder_layers"):
        # T5: else `generate` makes a KV cache with as many layers as the encoder has.
        config.decoder_layers = config.num_decoder_layers
    for name in ("layer_types", "attention_layers"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, [getattr(config, name)[i] for i in positions])
    if hasattr(config, "attention_types"):
        config.attention_types = [[config.attention_layers, 1]]
    stack_config = getattr(structure.stacks[stack][0].attention.module, "config", config)
    if stack_config is not config:
        stack_config.num_hidden_layers = len(positions)
    for module in model.modules():
        resizing.set_ints(module, ("n_layers",), len(positions))
