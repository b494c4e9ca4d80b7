"""How a layer, a norm or a config is made narrower in place: the mechanics under `surgery`.

Parameters are replaced by their kept rows or columns (a tied one once, still tied afterwards) and the
attributes that repeat a width follow. The config is changed only where it then describes the model better.
"""

import copy
from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.bloom.configuration_bloom import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.configuration_falcon import FalconConfig
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families, serialization
from lmcompress.models.anatomy import Attention, Block, LinearLayer, anatomy, spread

# (id of the parameter, dimension) -> (old parameter, index, new parameter): what keeps ties tied; and
# (id of the module, parameter name, dimension) -> index: what keeps a shared module from being cut twice.
Memo = dict[tuple, tuple]


@serialization.register_module
class OwnBiasAttention(T5Attention):
    """T5 attention that computes its own position bias instead of taking block 0's.

    T5 computes the bias of every head in block 0 and hands it on; once blocks keep different heads, each
    needs the rows of its own. Bias tables are copied, so a sliced T5 has one per block.
    """

    def forward(self, hidden_states: Tensor, *, position_bias: Tensor | None = None, **kwargs) -> tuple:
        """Return what T5's attention does, but read no position bias and hand none on."""
        output, _, *weights = super().forward(hidden_states, position_bias=None, **kwargs)
        return output, None, *weights

    def spec(self) -> dict:
        """Return what `from_spec` needs; other attributes are compared and stored one by one."""
        return {
            "d_model": self.d_model,
            "d_kv": self.key_value_proj_dim,
            "num_heads": self.n_heads,
            "relative_attention_num_buckets": self.relative_attention_num_buckets,
            "has_relative_attention_bias": self.has_relative_attention_bias,
            "attn_implementation": self.config._attn_implementation,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> "OwnBiasAttention":
        """Return an attention with the shapes of the one `spec` was taken from."""
        fields = dict(spec)
        has_bias, attn = fields.pop("has_relative_attention_bias"), fields.pop("attn_implementation")
        config = T5Config(**fields)
        config._attn_implementation = attn
        return cls(config, has_relative_attention_bias=has_bias, layer_idx=0)


class _OwnSlopes:
    """Attention that keeps some of the heads for which the model makes ALiBi's biases (BLOOM, Falcon-RW).

    `kept_heads`: the numbers of its heads among all for which there are biases.
    """

    config_class: type[PreTrainedConfig]
    kept_heads: list[int]

    def forward(self, hidden_states: Tensor, *args, alibi: Tensor, attention_mask: Tensor, **kwargs) -> tuple:
        """Return what the family's attention does, with the biases of its own heads."""
        alibi = alibi.unflatten(0, (len(hidden_states), -1)) if alibi.dim() == 3 else alibi
        if attention_mask is not None and attention_mask.shape[1] > 1:  # Falcon: the biases are in the mask
            attention_mask = attention_mask[:, self.kept_heads]
        alibi = alibi[:, self.kept_heads].flatten(0, 1)
        return super().forward(hidden_states, *args, alibi=alibi, attention_mask=attention_mask, **kwargs)

    def spec(self) -> dict:
        """Return what `from_spec` needs; widths and heads are compared and stored one by one."""
        config = getattr(self, "config", None)  # BLOOM's has none
        return {"attn_implementation": None if config is None else config._attn_implementation}

    @classmethod
    def from_spec(cls, spec: dict) -> "_OwnSlopes":
        """Return an attention of the family, whatever its widths."""
        config = cls.config_class()
        config._attn_implementation = spec["attn_implementation"]
        return cls(config, layer_idx=0)


@serialization.register_module
class OwnSlopesBloom(_OwnSlopes, BloomAttention):
    """BLOOM's."""

    config_class = BloomConfig


@serialization.register_module
class OwnSlopesFalcon(_OwnSlopes, FalconAttention):
    """Falcon's."""

    config_class = FalconConfig


_SLOPED = {BloomAttention: OwnSlopesBloom, FalconAttention: OwnSlopesFalcon}


def cut(module: nn.Module, leaf: str, dim: int, index: Tensor, memo: Memo) -> None:
    """Keep `index` along `dim` of the parameter `module.leaf`, once however often it is shared.

    Raises:
        BadSetting: it is shared, and was cut otherwise before.
    """
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
    """Keep the given rows (outputs, with their bias) and columns (inputs) of a linear layer.

    Raises:
        BadSetting: the layer was replaced by something that has no matrix to slice.
    """
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
    kept_heads = heads.tolist()
    for layer, rows in attention.rows(kept_heads):
        cut_linear(layer, memo, rows=rows)
    cut_linear(attention.o, memo, columns=attention.columns(kept_heads))
    table = getattr(attention.module, "relative_attention_bias", None)
    if table is not None:
        cut_embedding(table, heads, memo)
    for leaf, owner, numbers, count in attention.owned(kept_heads):
        _cut_owned(attention, leaf, owner, torch.tensor(numbers), count, memo)
    _keep_slopes(attention.module, kept_heads, memo)
    per_group = attention.heads // attention.kv_heads
    set_ints(attention.module, families.HEAD_ATTRIBUTES, len(kept_heads))
    set_ints(attention.module, families.KV_HEAD_ATTRIBUTES, len(kept_heads) // per_group)
    set_ints(attention.module, families.INNER_ATTRIBUTES, len(kept_heads) * attention.head_dim)


def _cut_owned(
    attention: Attention, leaf: str, owner: nn.Module | nn.Parameter, heads: Tensor, count: int, memo: Memo
) -> None:
    """Keep the heads' part of a norm, nonlinearity or parameter that has one for each of `count` heads."""
    if isinstance(owner, nn.Parameter):
        cut(attention.module, leaf, 0, heads, memo)
    elif isinstance(norms := getattr(owner, "norms", None), nn.ModuleList):  # StableLM: a norm for each head
        if len(norms) == count:
            owner.norms = nn.ModuleList(norms[i] for i in heads)
            set_ints(owner, families.HEAD_ATTRIBUTES, len(heads))
    else:
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if leaf == "phi" and not owner.per_head or parameter.shape == (attention.head_dim,):
                continue  # one for all heads
            whole = parameter.shape == (count * attention.head_dim,)  # OLMo 2
            cut(owner, name, 0, spread(heads, attention.head_dim) if whole else heads, memo)


def _keep_slopes(module: nn.Module, heads: list[int], memo: Memo) -> None:
    """Let an attention take the ALiBi biases of its heads from those that the model makes for all."""
    with_biases = getattr(getattr(module, "config", None), "alibi", True)  # Falcon's are rotary without
    if type(module) in _SLOPED and with_biases:
        module.kept_heads = list(range(module.num_heads))
        module.__class__ = _SLOPED[type(module)]
    if isinstance(module, _OwnSlopes) and memo.setdefault((id(module), "slopes"), ()) == ():
        memo[(id(module), "slopes")] = (module,)
        module.kept_heads = [module.kept_heads[i] for i in heads]


def own_biases(blocks: list[Block]) -> None:
    """Let every T5 attention of a stack compute its own position bias, from a copy of block 0's table."""
    table = blocks[0].attention.module.relative_attention_bias
    for block in blocks:
        for attention in block.attentions:
            if not isinstance(attention.module, T5Attention):
                raise UnknownFamily(
                    f"{attention.name} ({type(attention.module).__name__}) takes its position bias from "
                    "another block; which heads' rows to hand it is known for T5 only"
                )
            attention.module.__class__ = OwnBiasAttention
        if not block.attention.module.has_relative_attention_bias:
            block.attention.module.relative_attention_bias = copy.deepcopy(table)
            block.attention.module.has_relative_attention_bias = True


def set_ints(module: nn.Module, names: tuple[str, ...], value: int, *, old: int | None = None) -> None:
    """Set those of the integer attributes `names` that the module has (and that equal `old`, if given)."""
    for name in names:
        if isinstance(vars(module).get(name), int) and old in (None, vars(module)[name]):
            setattr(module, name, value)


def settle_config(model: nn.Module) -> None:
    """Put the model's widths into its config where a model built from that would differ less from this one.

    A width that varies between blocks, or from which the config derives another (the width of a head, a
    scale), stays as it was: `storage` keeps what the config cannot express.
    """
    if not isinstance(model, PreTrainedModel):
        return
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    for fields in _width_fields(model):
        fields = {name: value for name, value in fields.items() if hasattr(model.config, name)}
        if all(getattr(model.config, name) == value for name, value in fields.items()):
            continue
        if "num_key_value_heads" in vars(model.config):  # these configs take the width of a head as given
            fields["head_dim"] = anatomy(model).blocks[0].attention.head_dim
        better = copy.deepcopy(model.config)
        _set_fields(better, fields)
        if _unlike(model, better) < _unlike(model, model.config):
            for config in configs:
                _set_fields(config, fields)


def _set_fields(config: PreTrainedConfig, fields: dict[str, int]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)


def _width_fields(model: nn.Module) -> Iterator[dict[str, int]]:
    """Config fields and values for what all blocks (of a stack) have in common: heads, channels, hidden."""
    structure = anatomy(model)
    attentions = [attention for block in structure.blocks for attention in block.attentions]
    if len({(attention.heads, attention.kv_heads) for attention in attentions}) == 1:
        yield {"num_attention_heads": attentions[0].heads, "num_key_value_heads": attentions[0].kv_heads}
    widths = {stack: {b.ffn.width for b in blocks if b.ffn} for stack, blocks in structure.stacks.items()}
    common = {f"{stack}_ffn_dim": min(values) for stack, values in widths.items() if len(values) == 1}
    if len(set.union(*widths.values())) == 1:
        common |= dict.fromkeys(families.FFN_WIDTH_FIELDS, min(set.union(*widths.values())))
    yield common
    yield {"hidden_size": structure.hidden_size}


def _unlike(model: PreTrainedModel, config: PreTrainedConfig) -> set[tuple]:
    """What differs between `model` and a new model of `config`, as a set of places."""
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
