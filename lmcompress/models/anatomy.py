"""The only place that knows how transformer families differ: blocks, linear maps, heads, feed-forwards.

Blocks are found by structure (a ModuleList of like modules, each with one self-attention), roles by a small
vocabulary of names (`families.py`) checked against the shapes; what does not fit is an error, never skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families


@dataclass(eq=False)
class LinearLayer:
    """One linear map `y = W x + b` (or an embedding, seen as its table).

    `kind`: "attention", "cross-attention", "feed-forward", "embedding" or "head"; `role`: "q", "k", "v",
    "qkv", "o", "in", "gate", "out", and "embedding" or "head" outside the blocks (where `block` is -1).
    """

    name: str
    module: nn.Module
    kind: str
    role: str
    stack: str
    block: int
    conv1d: bool

    def weight2d(self) -> Tensor:
        """The weight as `(out, in)`: the parameter itself, or its transposed view for a Conv1D."""
        return self.module.weight.t() if self.conv1d else self.module.weight

    @property
    def in_features(self) -> int:
        """Width of x."""
        return self.module.nx if self.conv1d else self.module.in_features

    @property
    def out_features(self) -> int:
        """Width of y."""
        return self.module.nf if self.conv1d else self.module.out_features


@dataclass(eq=False)
class Attention:
    """One attention: `name` and `module` are those of the module that holds q, k and v.

    Either `q`, `k`, `v` are set (layout "split") or `qkv` is (layout "stacked": all of q, then k, then v;
    "interleaved": q, k, v of head 0, then of head 1, ...). Query head i reads key/value head
    i // (heads // kv_heads).
    """

    name: str
    module: nn.Module
    o: LinearLayer
    heads: int
    kv_heads: int
    head_dim: int
    q: LinearLayer | None = None
    k: LinearLayer | None = None
    v: LinearLayer | None = None
    qkv: LinearLayer | None = None
    layout: str = "split"

    @property
    def maps(self) -> list[LinearLayer]:
        """Input maps, then the output projection."""
        return [one for one in (self.q, self.k, self.v, self.qkv) if one is not None] + [self.o]

    def columns(self, heads: int | Sequence[int]) -> Tensor:
        """Input columns of `o` that belong to query head(s), as a long tensor."""
        return _spread([heads] if isinstance(heads, int) else heads, self.head_dim)

    def rows(self, heads: Sequence[int]) -> list[tuple[LinearLayer, Tensor]]:
        """For each input map, the output rows that query heads `heads` (and their keys, values) own."""
        kv_heads = sorted({head // (self.heads // self.kv_heads) for head in heads})
        if self.layout == "split":
            chosen = ((self.q, heads), (self.k, kv_heads), (self.v, kv_heads))
            return [(one, _spread(some, self.head_dim)) for one, some in chosen]
        if self.layout == "interleaved":
            return [(self.qkv, _spread(heads, 3 * self.head_dim))]
        third = self.heads * self.head_dim
        return [(self.qkv, torch.cat([_spread(heads, self.head_dim) + part * third for part in range(3)]))]


@dataclass(eq=False)
class Ffn:
    """One feed-forward: `inputs` ("in", and "gate" where gated) map to `width` channels, `output` back."""

    inputs: list[LinearLayer]
    output: LinearLayer
    width: int


@dataclass(eq=False)
class Block:
    """One transformer block; `unmapped` names expert parameters that no technique here can treat."""

    stack: str
    index: int
    name: str
    module: nn.Module
    maps: list[LinearLayer]
    attention: Attention | None
    cross_attention: Attention | None = None
    ffn: Ffn | None = None
    unmapped: list[str] = field(default_factory=list)


@dataclass(eq=False)
class ModelAnatomy:
    """Where everything is. `kind`: "encoder", "decoder" or "encoder-decoder"; stacks in running order."""

    family: str
    kind: str
    stacks: dict[str, list[Block]]
    hidden_size: int
    embeddings: list[LinearLayer]
    heads: list[LinearLayer]

    @property
    def blocks(self) -> list[Block]:
        """Blocks of all stacks, encoder first. ALBERT's shared block is listed once."""
        return [block for blocks in self.stacks.values() for block in blocks]


def anatomy(model: nn.Module) -> ModelAnatomy:
    """Find the blocks, attentions, feed-forwards, embeddings and heads of `model`.

    Raises:
        UnknownFamily: no list of blocks was found, or a weight inside a block has no known role.
    """
    lists = families.block_lists(model)
    stack_of = {name: families.stack_by_name(name) for name, _ in lists}
    if set(stack_of.values()) != {"encoder", "decoder"}:
        only = families.kind_of_single_stack(model, lists[0][1][0], lists[0][0])
        stack_of = dict.fromkeys(stack_of, only)
    stacks: dict[str, list[Block]] = {}
    for stack in ("encoder", "decoder"):
        for name, modules in lists:
            for position, module in enumerate(modules):
                if stack_of[name] == stack:
                    blocks = stacks.setdefault(stack, [])
                    blocks.append(_parse_block(f"{name}.{position}", module, stack, len(blocks)))
    blocks = [block for ones in stacks.values() for block in ones]
    embeddings, heads = _outside_blocks(model, blocks)
    first = blocks[0].attention
    return ModelAnatomy(
        family=getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        kind="-".join(stacks),
        stacks=stacks,
        hidden_size=(first.q or first.qkv).in_features,
        embeddings=embeddings,
        heads=heads,
    )


def prunable(model: nn.Module, policy: str = "blocks") -> list[LinearLayer]:
    """The linear maps a technique may change, each parameter once.

    "blocks": attention and feed-forward maps. "all": embeddings and heads as well (untied ones; older
    studies pruned these too). A map that was replaced by several (low rank) gives its inner maps.

    Raises:
        UnknownFamily: not a known transformer, or its feed-forward is a mixture of fused experts.
        BadSetting: no such policy.
    """
    if policy not in ("blocks", "all"):
        raise BadSetting(f'policy {policy!r} is unknown; use "blocks" or "all"')
    found = anatomy(model)
    for block in found.blocks:
        refuse_experts(block)
    maps = [one for block in found.blocks for one in block.maps]
    maps += found.embeddings + found.heads if policy == "all" else []
    unique: dict[int, LinearLayer] = {}
    for one in (inner for outer in maps for inner in weighted(outer)):
        unique.setdefault(id(one.module.weight), one)
    return list(unique.values())


def weighted(one: LinearLayer) -> list[LinearLayer]:
    """`one` if it has a floating-point matrix of its own, else the linear maps inside its module."""
    if _has_matrix(one.module):
        return [one]
    inner = [(name, m) for name, m in families.linear_maps(one.module, one.name) if _has_matrix(m)]
    return [replace(one, name=name, module=m, conv1d=isinstance(m, Conv1D)) for name, m in inner]


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def refuse_experts(block: Block) -> None:
    """Raise `UnknownFamily` if the feed-forward of `block` is a mixture of experts."""
    if block.unmapped:
        raise UnknownFamily(
            f"the feed-forward of {block.name} is a mixture of experts ({', '.join(block.unmapped)}: fused 3-D "
            "parameters and routers, not linear maps), which cannot be compressed here. Its attention maps are "
            "known (anatomy(model).blocks[i].attention). Use a model with a dense feed-forward."
        )


def unique_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, a tied parameter once, under its first name."""
    return dict(model.named_parameters(remove_duplicate=True))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once; packed integers count as the weights they stand for."""
    packed = sum(one.weight_count for one in families.integer_layers(model))
    return packed + sum(parameter.numel() for parameter in unique_parameters(model).values())


def _spread(indices: Sequence[int], width: int) -> Tensor:
    return (torch.as_tensor(list(indices))[:, None].long() * width + torch.arange(width)).reshape(-1)


def _parse_block(name: str, module: nn.Module, stack: str, index: int) -> Block:
    found = dict(families.linear_maps(module, name))
    attentions: dict[str, Attention] = {}

    def linear(one: str, kind: str, role: str) -> LinearLayer:
        return LinearLayer(one, found[one], kind, role, stack, index, isinstance(found[one], Conv1D))

    for group, roles in families.attention_groups(list(found)).items():
        output = families.output_projection(list(found), group, name)
        if output is None:
            raise UnknownFamily(f"{group} has q, k and v maps, but no single output projection beside them")
        kind = "cross-attention" if families.is_cross(group) else "attention"
        maps = {role: linear(one, kind, role) for role, one in (roles | {"o": output}).items()}
        attentions[kind] = _attention(group, module.get_submodule(group[len(name) + 1 :]), maps)
    maps = [one for attention in attentions.values() for one in attention.maps]
    rest = [one for one in found if one not in {used.name for used in maps}]
    unmapped = families.expert_parameters(name, module, set(found), rest)
    ffn = None
    if not unmapped:
        ffn = _ffn(name, [linear(one, "feed-forward", families.role_of(one)) for one in rest])
        maps += [*ffn.inputs, ffn.output]
    cross = attentions.get("cross-attention")
    return Block(stack, index, name, module, maps, attentions["attention"], cross, ffn, unmapped)


def _attention(name: str, module: nn.Module, maps: dict[str, LinearLayer]) -> Attention:
    widths = [getattr(module, attribute, None) for attribute in families.HEAD_DIM_ATTRIBUTES]
    head_dim = next((width for width in widths if isinstance(width, int)), None)
    if head_dim is None:
        raise UnknownFamily(
            f"{name} ({type(module).__name__}) does not say how wide a head is; looked for the attributes "
            f"{', '.join(families.HEAD_DIM_ATTRIBUTES)}"
        )
    inner = maps["o"].in_features
    if "qkv" in maps:
        layout = families.FUSED_LAYOUT[maps["qkv"].name.rpartition(".")[2]]
        kv_inner, fits = inner, maps["qkv"].out_features == 3 * inner
    else:
        layout, kv_inner = "split", maps["k"].out_features
        fits = maps["q"].out_features == inner and maps["v"].out_features == kv_inner
    heads, kv_heads = inner // head_dim, kv_inner // head_dim
    if not fits or inner % head_dim or kv_inner % head_dim or heads % max(kv_heads, 1):
        shapes = {one.name: (one.out_features, one.in_features) for one in maps.values()}
        raise UnknownFamily(f"the maps of {name} do not fit {heads} heads of width {head_dim}: {shapes}")
    return Attention(name, module, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layout=layout, **maps)


def _ffn(name: str, maps: list[LinearLayer]) -> Ffn:
    inputs, outputs = ([one for one in maps if one.role in roles] for roles in (("gate", "in"), ("out",)))
    kinds = sorted(one.role for one in inputs)
    whole = len(outputs) == 1 and len(maps) == len(inputs) + 1 and kinds in (["in"], ["gate", "in"])
    if not whole or {one.out_features for one in inputs} != {outputs[0].in_features}:
        raise UnknownFamily(
            f"the maps of {name} beside its attention are not a feed-forward: "
            f"{ {one.name: (one.role, one.out_features, one.in_features) for one in maps} }. Looked for one input "
            f"map (named like {sorted(families.ROLE_NAMES['in'])}), one output map (like "
            f"{sorted(families.ROLE_NAMES['out'])}) and at most one gate (like {sorted(families.ROLE_NAMES['gate'])})"
        )
    return Ffn(inputs, outputs[0], outputs[0].in_features)


def _outside_blocks(model: nn.Module, blocks: list[Block]) -> tuple[list[LinearLayer], list[LinearLayer]]:
    """Embeddings (with the maps between a narrow embedding and the hidden size), and heads."""
    prefixes = tuple(f"{block.name}." for block in blocks)
    embeddings = [
        LinearLayer(name, module, "embedding", "embedding", "", -1, False)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    heads = []
    for name, module in families.linear_maps(model, ""):
        conv1d = isinstance(module, Conv1D)
        if name.rpartition(".")[2] in families.EMBEDDING_PROJECTIONS:
            embeddings.append(LinearLayer(name, module, "embedding", "in", "", -1, conv1d))
        elif not name.startswith(prefixes):
            heads.append(LinearLayer(name, module, "head", "head", "", -1, conv1d))
    return embeddings, heads
