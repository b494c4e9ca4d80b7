"""Where everything is in a model: blocks, linear layers, heads, feed-forwards, embeddings.

Blocks are found by structure (a ModuleList of like modules, each with one self-attention), roles by a small
vocabulary of names (`families.py`) checked against the shapes; what does not fit is an error, never skipped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families


@dataclass(eq=False)
class LinearLayer:
    """One linear layer `y = W x + b` (or an embedding, seen as its table).

    `kind`: "attention", "cross-attention", "feed-forward", "embedding" or "head"; `role`: "q", "k", "v",
    "qkv", "o", "in", "gate", "out", and "embedding" or "head" outside the blocks (where `block` is -1).
    """

    name: str
    module: nn.Module
    kind: str
    role: str
    stack: str
    block: int

    @property
    def conv1d(self) -> bool:
        """Return whether the weight is stored as `(in, out)`."""
        return isinstance(self.module, Conv1D)

    def weight2d(self) -> Tensor:
        """Return the weight as `(out, in)`: the parameter itself, or its transposed view for a Conv1D."""
        return self.module.weight.t() if self.conv1d else self.module.weight

    @property
    def in_features(self) -> int:
        return self.module.nx if self.conv1d else self.module.in_features

    @property
    def out_features(self) -> int:
        return self.module.nf if self.conv1d else self.module.out_features


@dataclass(eq=False)
class Attention:
    """One attention: `name` and `module` are those of the module that holds q, k and v.

    Either `q`, `k`, `v` are set (layout "split") or `qkv` (see `families.FUSED_LAYOUT`). Query head i reads
    key/value head i // (heads // kv_heads).
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
    def linears(self) -> list[LinearLayer]:
        return [*filter(None, (self.q, self.k, self.v, self.qkv)), self.o]

    def columns(self, heads: int | Sequence[int]) -> Tensor:
        """Return the input columns of `o` that belong to query head(s), as a long tensor."""
        return spread([heads] if isinstance(heads, int) else heads, self.head_dim)

    def groups(self, heads: Sequence[int]) -> list[int]:
        """Return the key/value heads that query heads `heads` read."""
        return sorted({head // (self.heads // self.kv_heads) for head in heads})

    def owned(self, heads: Sequence[int]) -> Iterator[tuple[str, nn.Module | nn.Parameter, list[int], int]]:
        """Yield what these heads own beside the linear layers: name, module, its heads, how many it has."""
        for leaf, role in families.HEAD_OWNED.items():
            if (module := getattr(self.module, leaf, None)) is not None:
                numbers, count = (heads, self.heads) if role == "q" else (self.groups(heads), self.kv_heads)
                yield leaf, module, list(numbers), count

    def rows(self, heads: Sequence[int]) -> list[tuple[LinearLayer, Tensor]]:
        """Return per input layer the output rows that query heads `heads` (and their keys, values) own."""
        if self.layout == "split":
            owners = ((self.q, heads), (self.k, self.groups(heads)), (self.v, self.groups(heads)))
            return [(layer, spread(numbers, self.head_dim)) for layer, numbers in owners]
        if self.layout == "interleaved":
            return [(self.qkv, spread(heads, 3 * self.head_dim))]
        third = self.heads * self.head_dim
        return [(self.qkv, torch.cat([spread(heads, self.head_dim) + start * third for start in range(3)]))]


@dataclass(eq=False)
class Ffn:
    """One feed-forward: `inputs` ("in", and "gate" where gated) map to `width` channels, `output` back."""

    inputs: list[LinearLayer]
    output: LinearLayer
    width: int


@dataclass(eq=False)
class Block:
    """One transformer block; `experts` names parameters of a mixture that no technique here can treat."""

    stack: str
    index: int
    name: str
    module: nn.Module
    linears: list[LinearLayer]
    attention: Attention | None
    cross_attention: Attention | None = None
    ffn: Ffn | None = None
    experts: list[str] = field(default_factory=list)

    @property
    def attentions(self) -> list[Attention]:
        return [*filter(None, (self.attention, self.cross_attention))]


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
        """Return the blocks of all stacks, encoder first. ALBERT's shared block is listed once."""
        return [block for blocks in self.stacks.values() for block in blocks]


def anatomy(model: nn.Module) -> ModelAnatomy:
    """Find the blocks, attentions, feed-forwards, embeddings and heads of `model`.

    Raises `UnknownFamily` if no list of blocks was found, or a weight inside a block has no known role.
    """
    lists = families.block_lists(model)
    stack_of = {name: families.stack_by_name(name) for name, _ in lists}
    if set(stack_of.values()) != {"encoder", "decoder"}:
        only = families.kind_of_single_stack(model, lists[0][1][0], lists[0][0])
        stack_of = dict.fromkeys(stack_of, only)
    stacks: dict[str, list[Block]] = {}
    for name, modules in sorted(lists, key=lambda entry: stack_of[entry[0]] == "decoder"):
        blocks = stacks.setdefault(stack_of[name], [])
        for position, module in enumerate(modules):
            blocks.append(_parse_block(f"{name}.{position}", module, stack_of[name], len(blocks)))
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    hidden_size = next(iter(stacks.values()))[0].attention.linears[0].in_features
    structure = ModelAnatomy(family, "-".join(stacks), stacks, hidden_size, embeddings=[], heads=[])
    _add_layers_outside_blocks(structure, model)
    return structure


def prunable(model: nn.Module, policy: str = "blocks") -> list[LinearLayer]:
    """Return the linear layers a technique may change, each parameter once.

    "blocks": attention and feed-forward layers; "all": embeddings and untied heads as well. A layer that was
    replaced by several (low rank) gives its inner layers. Raises `UnknownFamily` for no known transformer and
    for a mixture of experts.
    """
    if policy not in ("blocks", "all"):
        raise BadSetting(f'policy {policy!r} is unknown; use "blocks" or "all"')
    structure = anatomy(model)
    for block in structure.blocks:
        refuse_experts(block)
    layers = [layer for block in structure.blocks for layer in block.linears]
    layers += structure.embeddings + structure.heads if policy == "all" else []
    unique: dict[int, LinearLayer] = {}
    for layer in (inner for outer in layers for inner in weighted(outer)):
        unique.setdefault(id(layer.module.weight), layer)
    return list(unique.values())


def weighted(layer: LinearLayer) -> list[LinearLayer]:
    """Return `[layer]` if it has a floating-point matrix itself, else the linear layers inside its module."""
    if _has_matrix(layer.module):
        return [layer]
    inner = [(name, m) for name, m in families.linear_layers(layer.module, layer.name) if _has_matrix(m)]
    return [replace(layer, name=name, module=module) for name, module in inner]


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def refuse_experts(block: Block) -> None:
    """Raise `UnknownFamily` if the feed-forward of `block` is a mixture of experts."""
    if block.experts:
        raise UnknownFamily(
            f"the feed-forward of {block.name} is a mixture of experts ({', '.join(block.experts)}: fused "
            "3-D parameters and routers), which cannot be compressed here, unlike its attention "
            "(anatomy(model).blocks[i].attention). Use a model with a dense feed-forward."
        )


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once; packed integers count as what they stand for."""
    packed = sum(layer.weight_count for layer in families.integer_layers(model))
    return packed + sum(parameter.numel() for parameter in model.parameters())


def spread(indices: Sequence[int], width: int) -> Tensor:
    """Return the positions that `indices` have in a row of parts of `width` each, as a long tensor."""
    return (torch.as_tensor(list(indices))[:, None].long() * width + torch.arange(width)).reshape(-1)


def _parse_block(name: str, module: nn.Module, stack: str, index: int) -> Block:
    modules = dict(families.linear_layers(module, name))
    attentions: dict[str, Attention] = {}

    def linear(layer: str, kind: str, role: str) -> LinearLayer:
        return LinearLayer(layer, modules[layer], kind, role, stack, index)

    for group, roles in families.attention_groups(list(modules)).items():
        output = families.output_projection(list(modules), group, name)
        if output is None:
            raise UnknownFamily(f"{group} has q, k and v layers, but no single output projection beside them")
        kind = "cross-attention" if families.is_cross(group) else "attention"
        layers = {role: linear(layer, kind, role) for role, layer in (roles | {"o": output}).items()}
        attentions[kind] = _attention(group, module.get_submodule(group.removeprefix(f"{name}.")), layers)
    linears = [layer for attention in attentions.values() for layer in attention.linears]
    outside_attention = [layer for layer in modules if layer not in {used.name for used in linears}]
    experts = families.expert_parameters(name, module, set(modules), outside_attention)
    block = Block(stack, index, name, module, linears, attentions["attention"], experts=experts)
    block.cross_attention = attentions.get("cross-attention")
    if not experts:
        rest = [linear(layer, "feed-forward", families.role_of(layer)) for layer in outside_attention]
        block.ffn = _ffn(name, rest)
        block.linears += [*block.ffn.inputs, block.ffn.output]
    return block


def _attention(name: str, module: nn.Module, layers: dict[str, LinearLayer]) -> Attention:
    widths = [getattr(module, attribute, None) for attribute in families.HEAD_DIM_ATTRIBUTES]
    head_dim = next((width for width in widths if isinstance(width, int)), None)
    if head_dim is None:
        raise UnknownFamily(
            f"{name} ({type(module).__name__}) does not say how wide a head is; looked for the attributes "
            f"{', '.join(families.HEAD_DIM_ATTRIBUTES)}"
        )
    inner = layers["o"].in_features
    if "qkv" in layers:
        by_name = families.FUSED_LAYOUT[layers["qkv"].name.rpartition(".")[2]]
        layout = families.FUSED_LAYOUT.get(type(module).__name__, by_name)
        kv_inner, fits = inner, layers["qkv"].out_features == 3 * inner
    else:
        layout, kv_inner = "split", layers["k"].out_features
        fits = layers["q"].out_features == inner and layers["v"].out_features == kv_inner
    heads, kv_heads = inner // head_dim, kv_inner // head_dim
    if not fits or inner % head_dim or kv_inner % head_dim or heads % max(kv_heads, 1):
        shapes = {layer.name: (layer.out_features, layer.in_features) for layer in layers.values()}
        raise UnknownFamily(f"the layers of {name} do not fit {heads} heads of width {head_dim}: {shapes}")
    return Attention(name, module, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layout=layout, **layers)


def _ffn(name: str, layers: list[LinearLayer]) -> Ffn:
    inputs = [layer for layer in layers if layer.role in ("gate", "in")]
    outputs = [layer for layer in layers if layer.role == "out"]
    kinds = sorted(layer.role for layer in inputs)
    complete = len(outputs) == 1 and len(layers) == len(inputs) + 1 and kinds in (["in"], ["gate", "in"])
    if not complete or {layer.out_features for layer in inputs} != {outputs[0].in_features}:
        shapes = {layer.name: (layer.role, layer.out_features, layer.in_features) for layer in layers}
        named = {role: sorted(families.ROLE_NAMES[role]) for role in ("in", "out", "gate")}
        raise UnknownFamily(
            f"the layers of {name} beside its attention are not a feed-forward: {shapes}. Looked for one "
            f"input layer (named like {named['in']}), one output layer (like {named['out']}) and at most one "
            f"gate (like {named['gate']})"
        )
    return Ffn(inputs, outputs[0], outputs[0].in_features)


def _add_layers_outside_blocks(structure: ModelAnatomy, model: nn.Module) -> None:
    """Add embeddings (with the layers between a narrow one and the hidden size) and heads to `structure`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            structure.embeddings.append(LinearLayer(name, module, "embedding", "embedding", "", -1))
    blocks = tuple(f"{block.name}." for block in structure.blocks)
    for name, module in families.linear_layers(model, ""):
        if name.rpartition(".")[2] in families.EMBEDDING_PROJECTIONS:
            structure.embeddings.append(LinearLayer(name, module, "embedding", "in", "", -1))
        elif not name.startswith(blocks):
            structure.heads.append(LinearLayer(name, module, "head", "head", "", -1))
