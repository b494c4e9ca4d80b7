"""Surgery: physically smaller models, equal to dense ones with the removed heads or channels masked.

Gives a sliced copy that runs, trains and generates with its KV cache, uneven widths included; what to keep
is the business of the pruning techniques. Parameters are replaced by their kept rows or columns (a tied one
once, still tied afterwards), attributes that repeat a width follow, and the config where it can.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomConfig
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconConfig
from transformers.models.mpnet.modeling_mpnet import MPNetConfig, MPNetSelfAttention
from transformers.models.mpt.modeling_mpt import MptAttention, MptConfig
from transformers.models.mt5.modeling_mt5 import MT5Attention, MT5Config
from transformers.models.t5.modeling_t5 import T5Attention, T5Config
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families, mixtures, serialization
from lmcompress.models.anatomy import (
    Attention,
    Block,
    LinearLayer,
    ModelAnatomy,
    anatomy,
    spread,
)
from lmcompress.models.slicing_check import refuse_difference, refuse_failure

# (id of the parameter, dimension) -> (old parameter, index, new parameter): what keeps ties tied; and
# (id of the module, parameter name, dimension) -> index: what keeps a shared module from being cut twice.
Memo = dict[tuple, tuple]


def keep_heads(model: nn.Module, keep: dict[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` whose attentions keep only the given query heads; groups stay or go whole.

    `keep`: name of a block (its self-attention) or of an attention -> heads; what is not named keeps all.
    Raises `BadSetting` for a name, a head or a part of a group that does not exist, and `UnknownFamily` if
    the result would not be the dense model with the heads masked.
    """
    dense, model, masks = model, copy.deepcopy(model), []
    structure, memo = anatomy(model), {}
    attentions = {block.name: block.attention for block in structure.blocks}
    attentions |= {attention.name: attention for block in structure.blocks for attention in block.attentions}
    for name, heads in keep.items():
        attention = _lookup(name, attentions, "attention")
        index = _checked(heads, attention.heads, f"heads of {name}")
        size, kept_heads = attention.group, index.tolist()
        groups = [range(size * group, size * group + size) for group in {head // size for head in kept_heads}]
        if broken := [list(group) for group in groups if not set(kept_heads).issuperset(group)]:
            raise BadSetting(
                f"{name} shares each key/value head among {size} query heads, so whole groups stay or go; "
                f"{kept_heads} keeps only a part of the groups {broken}"
            )
        if attention.layout == "chunked" and len(kept_heads) % families.CHUNKS:
            raise BadSetting(
                f"{name} computes its heads in {families.CHUNKS} equal shares, so a multiple of "
                f"{families.CHUNKS} stays; {len(kept_heads)} of {attention.heads} were asked for"
            )
        if hasattr(attention.module, "has_relative_attention_bias"):
            stacks = structure.stacks.values()
            _own_biases(next(s for s in stacks if any(attention in block.attentions for block in s)))
        masks.append((dense.get_submodule(attention.o.name), attention.columns(kept_heads)))
        for leaf, owner, numbers, count in attention.owned(kept_heads):
            if getattr(getattr(owner, "weight", None), "shape", None) == (count * attention.head_dim,):
                norm = dense.get_submodule(f"{attention.name}.{leaf}")
                masks.append((norm, spread(numbers, attention.head_dim)))
        cut_attention(attention, index, memo)
    settle_config(model)
    refuse_difference(dense, model, masks=masks)
    return model


def keep_ffn(model: nn.Module, keep: dict[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` whose feed-forwards keep only the given channels, of both matrices if gated.

    `keep`: block name -> channels; others keep all. Raises `BadSetting` for a block or channel that does not
    exist, and `UnknownFamily` for a mixture of experts, or if the result would not be the dense model with
    the channels masked.
    """
    dense, model, masks = model, copy.deepcopy(model), []
    blocks, memo = {block.name: block for block in anatomy(model).blocks}, {}
    for name, channels in keep.items():
        block = _lookup(name, blocks, "block")
        index = _checked(channels, block.ffn.width, f"feed-forward channels of {name}")
        masks.append((dense.get_submodule(block.ffn.output.name), index))
        for layer, rows in block.ffn.rows(index):
            cut_linear(layer, memo, rows=rows)
        cut_linear(block.ffn.output, memo, columns=index)
        for owner in (block.module, model.get_submodule(block.ffn.output.name.rpartition(".")[0])):
            set_ints(owner, families.FFN_WIDTH_ATTRIBUTES, len(index))
    settle_config(model)
    refuse_difference(dense, model, masks=masks)
    return model


def keep_experts(model: nn.Module, keep: dict[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` whose mixtures of experts keep only those given; tokens choose among them.

    `keep`: block name -> experts; others keep all. Raises `BadSetting` for a block or expert that does not
    exist, or fewer experts than a token uses, and `UnknownFamily` for a block without a mixture, or if the
    result would not be the dense model whose routers see the kept experts alone.
    """
    dense, model, memo, routed = model, copy.deepcopy(model), {}, {}
    blocks = {block.name: block for block in anatomy(model).blocks}
    for name, numbers in keep.items():
        experts_name, experts = mixtures.experts_in(_lookup(name, blocks, "block").module, name)
        count, owner = experts.num_experts, model.get_submodule(experts_name.rpartition(".")[0])
        used = [value for m in owner.modules() for leaf in families.TOP_K if (value := vars(m).get(leaf))]
        index = _checked(numbers, count, f"experts of {name}", minimum=max(used, default=1))
        inside = set(experts.modules())
        for router_name, module in [(n, m) for n, m in owner.named_modules() if m not in inside]:
            if count in [vars(module).get(leaf) for leaf in families.EXPERT_ATTRIBUTES]:
                where = f"{experts_name.rpartition('.')[0]}.{router_name}".rstrip(".")
                router = dense.get_submodule(where)
                for weight_name, tensor in [*module.named_parameters(recurse=False)]:
                    if len(tensor) == count:
                        routed[router.get_parameter(weight_name)] = index
                        cut(module, weight_name, 0, index, memo)
                for buffer_name, tensor in [*module.named_buffers(recurse=False)]:  # DeepSeek's corrections
                    if len(tensor) == count:
                        routed[router.get_buffer(buffer_name)] = index
                        setattr(module, buffer_name, tensor[index.to(tensor.device)])
        mixtures.keep(experts, index, partial(cut, memo=memo))
        for module in owner.modules():
            set_ints(module, families.EXPERT_ATTRIBUTES, len(index), old=count)
    if len(counts := _expert_counts(model)) == 1:
        for module in model.modules():  # the model itself has the number for its loss
            set_ints(module, families.EXPERT_ATTRIBUTES, *counts)
    settle_config(model)
    refuse_difference(dense, model, routed=routed)
    return model


def keep_hidden(model: nn.Module, keep: Sequence[int]) -> nn.Module:
    """Return a copy of `model` whose hidden states keep only the dimensions `keep`, everywhere.

    Norms then take their mean and variance over the kept dimensions: the result equals a dense model whose
    norms do the same, not the dense model with zeros. Scales derived from the old width (T5's logits, Gemma's
    embedding) are kept, and with them `config.hidden_size` where the config could not describe the result.
    Raises `BadSetting` for a dimension that does not exist, and `UnknownFamily` for an embedding projection
    as wide as the hidden size, or a result that does not run because something keeps to the old width.
    """
    model = copy.deepcopy(model)
    structure, memo = anatomy(model), {}
    index = _checked(keep, structure.hidden_size, "hidden dimensions")
    for layer in (layer for block in structure.blocks for part in block.known() for layer in part.linears):
        cut_linear(layer, memo, **{"rows" if layer.role in ("o", "out") else "columns": index})
    _cut_outside_blocks(model, structure, index, memo)
    for name, module in model.named_modules():
        if families.is_norm(name, module) and families.norm_width(module) == structure.hidden_size:
            cut_norm(module, index, memo)
        set_ints(module, families.hidden_attributes(module), len(index), old=structure.hidden_size)
    settle_config(model)
    refuse_failure(model)
    return model


def drop_blocks(model: nn.Module, drop: dict[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` without the blocks at the given positions of each stack.

    `drop`: "encoder" or "decoder" -> positions, in running order. ALBERT runs one shared block
    `num_hidden_layers` times: any position dropped is one run less. Raises `BadSetting` for a stack or
    position that does not exist, or if no block is left, and `UnknownFamily` for ALBERT with several groups
    of layers, or if the result would not be the dense model with the blocks skipped.
    """
    dense, model = model, copy.deepcopy(model)
    structure = anatomy(model)
    shared = structure.family == "albert"
    for stack, positions in drop.items():
        blocks = _lookup(stack, structure.stacks, "stack")
        depth = model.config.num_hidden_layers if shared else len(blocks)
        _checked(positions, depth, f"blocks of the {stack}", minimum=0)
        kept_positions = [i for i in range(depth) if i not in set(positions)]
        _checked(kept_positions, depth, f"blocks left in the {stack}")
        if shared and model.config.num_hidden_groups > 1:
            raise UnknownFamily("ALBERT with several groups maps runs to groups by depth: cannot drop blocks")
        lists = dict.fromkeys(block.name.rpartition(".")[0] for block in blocks)
        if len(lists) > 1 and not shared:
            raise UnknownFamily(
                f"the layers of the {stack} are in several lists ({', '.join(lists)}), so that no module is "
                "a block that could be dropped."
            )
        if not shared:
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


class _OwnBias:
    """T5-like attention that computes its own position bias instead of taking that of block 0.

    Once blocks keep different heads, each needs the rows of its own: a sliced model has one bias table per
    block.
    """

    config_class: type[PreTrainedConfig]

    def forward(self, hidden_states: Tensor, *, position_bias: Tensor | None = None, **kwargs) -> tuple:
        output, _, *weights = super().forward(hidden_states, position_bias=None, **kwargs)
        return output, None, *weights

    def spec(self) -> dict:  # other attributes are compared and stored one by one
        names = ("d_model", "relative_attention_num_buckets", "has_relative_attention_bias")
        widths = {"d_kv": self.key_value_proj_dim, "num_heads": self.n_heads}
        spec = {name: getattr(self, name) for name in names} | widths
        return spec | {"attn_implementation": self.config._attn_implementation}

    @classmethod
    def from_spec(cls, spec: dict) -> "_OwnBias":
        fields = dict(spec)
        has_bias, attn = fields.pop("has_relative_attention_bias"), fields.pop("attn_implementation")
        config = cls.config_class(**fields)
        config._attn_implementation = attn
        return cls(config, has_relative_attention_bias=has_bias, layer_idx=0)


@serialization.register_module
class OwnBiasAttention(_OwnBias, T5Attention):
    """T5's."""

    config_class = T5Config


@serialization.register_module
class OwnBiasMT5(_OwnBias, MT5Attention):
    """mT5's."""

    config_class = MT5Config


_BIASED = {T5Attention: OwnBiasAttention, MT5Attention: OwnBiasMT5}


class _OwnHeads:
    """Attention that keeps some heads of those for which the model computes biases: `kept_heads`."""

    config_class: type[PreTrainedConfig]
    options: ClassVar[dict] = {"layer_idx": 0}
    kept_heads: list[int]

    def spec(self) -> dict:  # widths and heads are compared and stored one by one
        config = getattr(self, "config", None)  # BLOOM's has none
        return {"attn_implementation": None if config is None else config._attn_implementation}

    @classmethod
    def from_spec(cls, spec: dict) -> "_OwnHeads":
        config = cls.config_class()
        config._attn_implementation = spec["attn_implementation"]
        return cls(config, **cls.options)


class _OwnSlopes(_OwnHeads):
    """Attention with ALiBi's biases."""

    def forward(self, hidden_states: Tensor, *args, alibi: Tensor, attention_mask: Tensor, **kwargs) -> tuple:
        alibi = alibi.unflatten(0, (len(hidden_states), -1)) if alibi.dim() == 3 else alibi
        if attention_mask is not None and attention_mask.shape[1] > 1:  # Falcon: the biases are in the mask
            attention_mask = attention_mask[:, self.kept_heads]
        alibi = alibi[:, self.kept_heads].flatten(0, 1)
        return super().forward(hidden_states, *args, alibi=alibi, attention_mask=attention_mask, **kwargs)


@serialization.register_module
class OwnSlopesBloom(_OwnSlopes, BloomAttention):
    """BLOOM's."""

    config_class = BloomConfig


@serialization.register_module
class OwnSlopesFalcon(_OwnSlopes, FalconAttention):
    """Falcon's."""

    config_class = FalconConfig


@serialization.register_module
class OwnSlopesMpt(_OwnHeads, MptAttention):
    """MPT's."""

    config_class = MptConfig

    def forward(self, hidden_states: Tensor, position_bias: Tensor, *args, **kwargs) -> tuple:
        return super().forward(hidden_states, position_bias[self.kept_heads], *args, **kwargs)


@serialization.register_module
class OwnBiasMPNet(_OwnHeads, MPNetSelfAttention):
    """MPNet's, whose encoder computes relative position biases from one table for all blocks."""

    config_class, options = MPNetConfig, {}

    def forward(self, hidden_states: Tensor, attention_mask=None, position_bias=None, **kwargs) -> tuple:
        if position_bias is not None:
            position_bias = position_bias[:, self.kept_heads]
        return super().forward(hidden_states, attention_mask, position_bias, **kwargs)


_HANDED = {BloomAttention: OwnSlopesBloom, FalconAttention: OwnSlopesFalcon}
_HANDED |= {MptAttention: OwnSlopesMpt, MPNetSelfAttention: OwnBiasMPNet}


def cut(module: nn.Module, leaf: str, dim: int, index: Tensor, memo: Memo) -> None:
    """Keep `index` along `dim` of the parameter `module.leaf`, once however often it is shared."""
    parameter, mark = getattr(module, leaf), (id(module), leaf, dim)
    if parameter is None:
        return
    seen = memo.get(mark) or memo.get((id(parameter), dim))
    if seen and not torch.equal(seen[1], index):
        raise BadSetting(
            f"a {type(module).__name__} shared by several blocks was asked to keep different parts; "
            "ask for the same in all of them"
        )
    if mark in memo:
        return
    if not seen:
        narrow = parameter.detach().index_select(dim, index.to(parameter.device))
        seen = (parameter, index, nn.Parameter(narrow, requires_grad=parameter.requires_grad))
        memo[(id(parameter), dim)] = seen
    memo[mark] = seen
    setattr(module, leaf, seen[2])


def cut_linear(
    layer: LinearLayer, memo: Memo, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Keep the given rows (outputs, with their bias) and columns (inputs) of a linear layer."""
    module = layer.module
    if not isinstance(module, (nn.Linear, Conv1D)) or not isinstance(module.weight, nn.Parameter):
        raise BadSetting(
            f"{layer.name} is a {type(module).__name__} and cannot be sliced: slice heads, channels and "
            "hidden dimensions before factorizing or quantizing"
        )
    if rows is not None:
        cut(module, "weight", 1 if layer.conv1d else 0, rows, memo)
        cut(module, "bias", 0, rows, memo)
    if columns is not None:
        cut(module, "weight", 0 if layer.conv1d else 1, columns, memo)
    attributes = ("nf", "nx") if layer.conv1d else ("out_features", "in_features")
    for attribute, width in zip(attributes, layer.weight2d().shape):
        setattr(module, attribute, width)


def cut_embedding(module: nn.Embedding, index: Tensor, memo: Memo) -> None:
    """Keep columns of an embedding table."""
    cut(module, "weight", 1, index, memo)
    module.embedding_dim = module.weight.shape[1]


def cut_norm(module: nn.Module, index: Tensor, memo: Memo) -> None:
    """Keep dimensions of a LayerNorm or RMSNorm, which then takes its statistics over them."""
    for leaf in ("weight", "bias"):
        if isinstance(getattr(module, leaf, None), nn.Parameter):
            cut(module, leaf, 0, index, memo)
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (len(index),)


def cut_attention(attention: Attention, heads: Tensor, memo: Memo) -> None:
    """Keep the given query heads, with their keys and values, position biases and columns of `o`."""
    module, kept_heads = attention.module, heads.tolist()
    for layer, rows in attention.rows(kept_heads):
        cut_linear(layer, memo, rows=rows)
    cut_linear(attention.o, memo, columns=attention.columns(kept_heads))
    if (table := getattr(module, "relative_attention_bias", None)) is not None:
        cut_embedding(table, heads, memo)
    for leaf, owner, numbers, count in attention.owned(kept_heads):
        _cut_owned(attention, leaf, owner, torch.tensor(numbers), count, memo)
    _keep_biases(attention, kept_heads, memo)
    kv_heads = len(attention.groups(kept_heads))
    set_ints(module, families.HEAD_ATTRIBUTES, len(kept_heads))
    set_ints(module, families.KV_HEAD_ATTRIBUTES, kv_heads)
    set_ints(module, families.GROUP_ATTRIBUTES, len(kept_heads) // kv_heads)
    set_ints(module, families.inner_attributes(module), len(kept_heads) * attention.head_dim)
    set_ints(module, families.KV_INNER_ATTRIBUTES, kv_heads * attention.head_dim)


def _cut_owned(
    attention: Attention, leaf: str, owner: nn.Module | nn.Parameter, heads: Tensor, count: int, memo: Memo
) -> None:
    """Keep the heads' part of a norm, nonlinearity or parameter that has one for each of `count` heads."""
    if isinstance(owner, nn.Parameter):
        cut(attention.module, leaf, 0, _rows_of(owner, attention, heads, count), memo)
    elif isinstance(norms := getattr(owner, "norms", None), nn.ModuleList):  # StableLM: a norm for each head
        if len(norms) == count:
            owner.norms = nn.ModuleList(norms[i] for i in heads)
            set_ints(owner, families.HEAD_ATTRIBUTES, len(heads))
    else:
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if leaf == "phi" and not owner.per_head or parameter.shape == (attention.head_dim,):
                continue  # one for all heads
            cut(owner, name, 0, _rows_of(parameter, attention, heads, count), memo)


def _rows_of(parameter: Tensor, attention: Attention, heads: Tensor, count: int) -> Tensor:
    """Return the heads' rows of a parameter with one, or with `head_dim` (OLMo 2), for each of `count`."""
    whole = parameter.shape == (count * attention.head_dim,)
    return spread(heads, attention.head_dim) if whole else heads


def _keep_biases(attention: Attention, heads: list[int], memo: Memo) -> None:
    """Let an attention take the biases of its heads from those that the model makes for all."""
    module = attention.module
    with_biases = getattr(getattr(module, "config", None), "alibi", True)  # Falcon's are rotary without
    if type(module) in _HANDED and with_biases:
        module.kept_heads = list(range(attention.heads))
        module.__class__ = _HANDED[type(module)]
    if isinstance(module, _OwnHeads) and (id(module), "biases") not in memo:
        memo[(id(module), "biases")] = (module,)
        module.kept_heads = [module.kept_heads[i] for i in heads]


def _own_biases(blocks: list[Block]) -> None:
    """Let all attentions of a T5-like stack compute their position bias, from copies of block 0's table."""
    table = blocks[0].attention.module.relative_attention_bias
    if all(block.attention.module.has_relative_attention_bias for block in blocks):
        return  # each computes its own already
    for block in blocks:
        for attention in block.attentions:
            if type(attention.module) not in _BIASED:
                raise UnknownFamily(
                    f"{attention.name} ({type(attention.module).__name__}) takes its position bias from "
                    "another block; which heads' rows to hand it is known for T5 and mT5 only"
                )
            attention.module.__class__ = _BIASED[type(attention.module)]
        if not block.attention.module.has_relative_attention_bias:
            _give_bias(block.attention.module, copy.deepcopy(table))


def _give_bias(module: nn.Module, table: nn.Embedding) -> None:
    module.relative_attention_bias, module.has_relative_attention_bias = table, True


def set_ints(module: nn.Module, names: tuple[str, ...], value: int, *, old: int | None = None) -> None:
    """Set those of the integer attributes `names` that the module has (and that equal `old`, if given)."""
    for name in names:
        if isinstance(vars(module).get(name), int) and old in (None, vars(module)[name]):
            setattr(module, name, value)


def settle_config(model: nn.Module) -> None:
    """Put the model's widths into its config where a model built from that would differ less from this one.

    A width that varies between blocks, or from which the config derives another (a head's width, a scale),
    stays as it was: `storage` keeps what the config cannot express.
    """
    if not isinstance(model, PreTrainedModel):
        return
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    for fields in _width_fields(model):
        fields = {name: value for name, value in fields.items() if hasattr(model.config, name)}
        if all(getattr(model.config, name) == value for name, value in fields.items()):
            continue
        attention = anatomy(model).blocks[0].parts.get("attention")
        if attention and "num_key_value_heads" in vars(model.config):  # where a head's width is as given
            fields["head_dim"] = attention.head_dim
        better = copy.deepcopy(model.config)
        better.update(fields)
        if _unlike(model, better) < _unlike(model, model.config):
            for config in configs:
                config.update(fields)


def _width_fields(model: nn.Module) -> Iterator[dict[str, int]]:
    """Yield config fields and values for what all blocks (of a stack) share: heads, channels, hidden size."""
    structure = anatomy(model)
    parts = [part for block in structure.blocks for part in block.parts.values()]
    heads = {(part.heads, part.kv_heads) for part in parts if isinstance(part, Attention)}
    if len(heads) == 1:
        yield dict(zip(("num_attention_heads", "num_key_value_heads"), *heads))
    widths = {
        stack: {block.parts["ffn"].width for block in blocks if "ffn" in block.parts}
        for stack, blocks in structure.stacks.items()
    }
    common = {f"{stack}_ffn_dim": min(values) for stack, values in widths.items() if len(values) == 1}
    if len(set.union(*widths.values())) == 1:
        common |= dict.fromkeys(families.FFN_WIDTH_FIELDS, min(set.union(*widths.values())))
    yield common
    yield {"hidden_size": structure.hidden_size}
    if len(counts := _expert_counts(model)) == 1:
        yield dict.fromkeys(families.EXPERT_ATTRIBUTES, *counts)


def _expert_counts(model: nn.Module) -> set[int]:
    return {module.num_experts for module in model.modules() if mixtures.is_mixture(module)}


def _unlike(model: PreTrainedModel, config: PreTrainedConfig) -> set[tuple]:
    """Return what differs between `model` and a new model of `config`, as a set of places."""
    try:
        again = type(config).from_dict(config.to_dict())
        again._attn_implementation = config._attn_implementation
        with init_empty_weights(include_buffers=False):
            twin = type(model)(again)
        differences = serialization.differences(model, twin)
    except (ValueError, StrictDataclassError):
        return {("cannot be built",)}
    attributes = differences.pop("attributes", {})
    places = {(kind, name) for kind, entries in differences.items() for name in entries}
    places |= {("attribute", name, attribute) for name, values in attributes.items() for attribute in values}
    fresh = dict(twin.named_buffers())
    return places | {
        ("buffer", name)
        for name, buffer in model.named_buffers()
        if name not in fresh or not torch.equal(fresh[name].cpu().to(buffer.dtype), buffer.cpu())
    }


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


def _cut_outside_blocks(model: nn.Module, structure: ModelAnatomy, index: Tensor, memo: dict) -> None:
    """Cut embeddings, the projections between a narrow embedding and the hidden size, and heads."""
    width = structure.hidden_size
    for layer in structure.embeddings:
        if isinstance(layer.module, nn.Embedding):
            if layer.module.embedding_dim == width:
                cut_embedding(layer.module, index, memo)
        elif layer.in_features == layer.out_features:
            raise UnknownFamily(
                f"{layer.name} maps {width} to {width}: which side is the hidden state is unclear"
            )
        else:
            cut_linear(layer, memo, **{"rows" if layer.out_features == width else "columns": index})
    logits = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    square = [head for head in structure.heads if head.in_features == head.out_features == width]
    for head in structure.heads:
        # A pooler or a classifier's dense layer has an output space of its own, which stays. Before logits
        # the output has to fit the embeddings (tied or not), and goes through a norm as hidden states do.
        writes_hidden = logits not in (None, head.module) and head.out_features == width
        reads_hidden = head.in_features == width and (logits is not None or not square or head in square)
        rows, columns = (index if hidden else None for hidden in (writes_hidden, reads_hidden))
        cut_linear(head, memo, rows=rows, columns=columns)


def _keep_modules(model: nn.Module, blocks: list[Block], positions: list[int]) -> None:
    """Put a ModuleList of the kept blocks in the place of the old one, numbered anew for the KV cache."""
    kept_modules = nn.ModuleList([blocks[i].module for i in positions])
    model.set_submodule(blocks[0].name.rpartition(".")[0], kept_modules)
    for number, block in enumerate(kept_modules):
        for module in block.modules():
            set_ints(module, families.LAYER_NUMBER_ATTRIBUTES, number)
    attentions = [block.parts.get("attention") for block in (blocks[positions[0]], blocks[0])]
    first, was_first = (getattr(attention, "module", None) for attention in attentions)
    if getattr(was_first, "has_relative_attention_bias", False) and not first.has_relative_attention_bias:
        _give_bias(first, was_first.relative_attention_bias)


def _set_depth(model: nn.Module, structure: ModelAnatomy, stack: str, positions: list[int]) -> None:
    """Tell the config, and a stack's own copy of it, how many blocks there are and of which types."""
    fields = ("num_hidden_layers",)
    if structure.kind == "encoder-decoder":
        fields = (f"{stack}_layers", "num_decoder_layers" if stack == "decoder" else "num_layers")
    config = model.config
    config.update({name: len(positions) for name in fields if hasattr(config, name)})
    if hasattr(config, "num_decoder_layers"):
        # T5: else `generate` makes a KV cache with as many layers as the encoder has.
        config.decoder_layers = config.num_decoder_layers
    for name in families.BLOCK_FIELDS:
        if isinstance(vars(config).get(name), list):
            setattr(config, name, [getattr(config, name)[i] for i in positions])
    if hasattr(config, "attention_types"):
        config.attention_types = [[config.attention_layers, 1]]
    inside = structure.stacks[stack][0].module.modules()
    stack_config = next((module.config for module in inside if hasattr(module, "config")), config)
    if stack_config is not config:
        stack_config.num_hidden_layers = len(positions)
    for name, module in list(model.named_modules()):
        set_ints(module, ("n_layers",), len(positions))
        if isinstance(getattr(module, "attention_layers", None), list):  # GPT-Neo
            module.attention_layers = config.attention_layers
        types = getattr(module, "layer_types", None)  # Gemma 3's rotary tables, one for each
        if isinstance(types, list) and set(types) != set(config.layer_types):
            model.set_submodule(
                name, type(module)(config, device=structure.stacks[stack][0].linears[0].module.weight.device)
            )
