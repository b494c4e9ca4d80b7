"""Where everything is in a model: blocks, linear layers, heads, feed-forwards, embeddings.

Blocks are found by structure (a ModuleList of like modules, each with one self-attention, else the largest
list of modules with linear layers), roles by a small vocabulary of names (`families.py`) checked against the
shapes. Every linear layer of a block counts; heads or channels that do not fit are an error when asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families, mixtures


@dataclass(eq=False)
class LinearLayer:
    """One linear layer `y = W x + b` (or an embedding, seen as its table).

    `kind`: "attention", "cross-attention", "feed-forward", "other", "embedding" or "head"; `role`: "q", "k",
    "v", "qkv", "per-head", "o", "in", "gate", "gate-in", "out" (its own name where none is known), and
    "embedding" or "head" outside the blocks (where `block` is -1).
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
    key/value head i // (heads // kv_heads). `per_head`: further layers that have rows for each query head, of
    relative positions (DeBERTa) or global attention (Longformer).
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
    per_head: list[LinearLayer] = field(default_factory=list)

    @property
    def linears(self) -> list[LinearLayer]:
        return [*filter(None, (self.q, self.k, self.v, self.qkv)), *self.per_head, self.o]

    @property
    def group(self) -> int:
        """Return how many query heads stay or go together: those of one key/value head, if there are several.

        Under multi-query attention every head reads the only key and value, which stay whatever goes.
        """
        return 1 if self.kv_heads == 1 else self.heads // self.kv_heads

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
        """Return per input layer the output rows that query heads `heads` (and their keys, values) own.

        In the order the layer needs them in once the others are gone.
        """
        groups, query_heads = self.groups(heads), list(heads)
        owners = [(layer, query_heads) for layer in self.per_head]
        if self.layout == "split":
            owners += [(self.q, query_heads), (self.k, groups), (self.v, groups)]
        else:
            owners.append((self.qkv, self._fused_order(query_heads, groups)))
        return [(layer, spread(numbers, self.head_dim)) for layer, numbers in owners]

    def _fused_order(self, heads: list[int], groups: list[int]) -> list[int]:
        """Return which of the heads that `qkv` holds (queries, keys and values) are those given."""
        if self.layout == "stacked":
            starts = (self.heads, self.heads + self.kv_heads)
            return heads + [start + group for start in starts for group in groups]
        if self.layout == "interleaved":
            size = self.heads // self.kv_heads  # of queries in a group, followed by their key and value
            of_group = {g: [head % size for head in heads if head // size == g] for g in groups}
            return [g * (size + 2) + i for g, queries in of_group.items() for i in (*queries, size, size + 1)]
        before, after = self.heads // families.CHUNKS, len(heads) // families.CHUNKS
        chunks = [heads[start * after : (start + 1) * after] for start in range(families.CHUNKS)]
        return [
            (3 * (head // before) + third) * before + head % before
            for chunk in chunks
            for third in range(3)
            for head in chunk
        ]


@dataclass(eq=False)
class Ffn:
    """One feed-forward: `inputs` map to `width` channels, `output` back.

    `inputs` are "in", and "gate" where gated; or one "gate-in" whose rows are those of both, one after the
    other.
    """

    inputs: list[LinearLayer]
    output: LinearLayer
    width: int

    @property
    def fused(self) -> bool:
        """Return whether gate and input are one layer."""
        return self.inputs[0].role == "gate-in"

    def rows(self, channels: Tensor) -> list[tuple[LinearLayer, Tensor]]:
        """Return per input layer the output rows of `channels`, a long tensor."""
        rows = torch.cat([channels, self.width + channels]) if self.fused else channels
        return [(layer, rows) for layer in self.inputs]

    @property
    def linears(self) -> list[LinearLayer]:
        return [*self.inputs, self.output]


@dataclass(eq=False)
class Block:
    """One transformer block; `linears` are all its linear layers, whatever the roles of some.

    `parts`: "attention", "cross-attention" and "ffn" as far as they were understood; `unknown`: for those
    that were not, the sentence that says why, which whoever asks for the part gets as an `UnknownFamily`.
    """

    stack: str
    index: int
    name: str
    module: nn.Module
    linears: list[LinearLayer] = field(default_factory=list)
    parts: dict[str, Attention | Ffn] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def _part(self, name: str) -> "Attention | Ffn | None":
        if name in self.unknown:
            raise UnknownFamily(self.unknown[name])
        return self.parts.get(name)

    @property
    def attention(self) -> Attention:
        return self._part("attention")

    @property
    def cross_attention(self) -> Attention | None:
        return self._part("cross-attention")

    @property
    def ffn(self) -> Ffn:
        return self._part("ffn")

    @property
    def attentions(self) -> list[Attention]:
        return [*filter(None, (self.attention, self.cross_attention))]

    def known(self) -> "list[Attention | Ffn]":
        """Return all parts; raise `UnknownFamily` if one was not understood."""
        return [*self.attentions, self.ffn]


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

    Raises `UnknownFamily` if no list of blocks was found; a part of a block that is not understood raises it
    when it is asked for.
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
    hidden_size = next(iter(stacks.values()))[0].linears[0].in_features
    structure = ModelAnatomy(family, "-".join(stacks), stacks, hidden_size, embeddings=[], heads=[])
    _add_layers_outside_blocks(structure, model)
    return structure


def prunable(model: nn.Module, policy: str = "blocks") -> list[LinearLayer]:
    """Return the linear layers a technique may change, each parameter once; of any model with blocks.

    "blocks": the linear layers inside them; "all": embeddings and untied heads as well. A layer that was
    replaced by several (low rank) gives its inner layers. Matrices of fused experts are layers whose weights
    are views of the parameters: to be read and changed in place, not replaced. Raises `UnknownFamily` where
    there are no blocks, and for experts that are no linear layers.
    """
    if policy not in ("blocks", "all"):
        raise BadSetting(f'policy {policy!r} is unknown; use "blocks" or "all"')
    structure = anatomy(model)
    mixtures.refuse_closed(model)
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


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once; packed integers count as what they stand for."""
    packed = sum(layer.weight_count for layer in families.integer_layers(model))
    return packed + sum(parameter.numel() for parameter in model.parameters())


def spread(indices: Sequence[int], width: int) -> Tensor:
    """Return the positions that `indices` have in a row of parts of `width` each, as a long tensor."""
    return (torch.as_tensor(list(indices))[:, None].long() * width + torch.arange(width)).reshape(-1)


def _parse_block(name: str, module: nn.Module, stack: str, index: int) -> Block:
    modules, block = dict(families.linear_layers(module, name)), Block(stack, index, name, module)
    experts = [f"{name}.{n}" for n, m in module.named_modules() if mixtures.is_mixture(m)]
    for mixture in experts:
        fused = module.get_submodule(mixture.removeprefix(f"{name}."))
        modules |= {f"{mixture}.{n}": layer for n, layer in mixtures.layers_of(fused)}
    if experts:
        modules = {n: m for n, m in modules.items() if n.rpartition(".")[2] not in families.ROUTERS}

    def linear(layer: str, kind: str, role: str) -> LinearLayer:
        return LinearLayer(layer, modules[layer], kind, role, stack, index)

    def part(key: str, understand: Callable[[], Attention | Ffn]) -> None:
        try:
            block.parts[key] = understand()
            block.linears += block.parts[key].linears
        except UnknownFamily as error:
            block.unknown[key] = str(error)

    groups = families.attention_groups(list(modules))
    for group, roles in groups.items():
        key = "cross-attention" if families.is_cross(group) else "attention"
        part(key, partial(_attention, block, group, roles, list(modules), partial(linear, kind=key)))
    if sum(not families.is_cross(group) for group in groups) != 1:
        block.unknown["attention"] = families.no_attention(name, list(modules))
    in_attention = [*groups, *(layer.name for layer in block.linears)]
    outside = [n for n in modules if not any(f"{n}.".startswith(f"{inside}.") for inside in in_attention)]
    rest = [linear(n, "feed-forward", families.role_of(n) or n.rpartition(".")[2]) for n in outside]
    part("ffn", partial(_ffn, block, rest, experts))
    claimed = {layer.name for layer in block.linears}
    for layer in (layer for layer in modules if layer not in claimed):
        kind = "feed-forward" if layer in outside and families.role_of(layer) else "other"
        block.linears.append(linear(layer, kind, families.role_of(layer) or layer.rpartition(".")[2]))
    if claimed != set(modules):
        places = {layer: number for number, layer in enumerate(modules)}
        block.linears.sort(key=lambda layer: places[layer.name])
    return block


def _attention(
    block: Block, group: str, roles: dict[str, str], names: list[str], linear: Callable
) -> Attention:
    output = families.output_projection(names, group, block.name)
    if output is None:
        found_names = ", ".join(name for name in names if name.startswith(f"{group}."))
        raise UnknownFamily(
            f"{group} has q, k and v layers, but not one layer beside them that is the output projection, so "
            f"its heads cannot be told apart; its linear layers are {found_names}"
        )
    layers = {role: linear(layer, role=role) for role, layer in (roles | {"o": output}).items()}
    module = block.module.get_submodule(group.removeprefix(f"{block.name}."))
    inner = layers["o"].in_features
    attributes = [vars(module).get(name) for name in families.HEAD_DIM_ATTRIBUTES]
    attributes += [inner // count for name in families.HEAD_ATTRIBUTES if (count := vars(module).get(name))]
    head_dim = next((width for width in attributes if isinstance(width, int)), None)
    if head_dim is None:
        looked_for = ", ".join((*families.HEAD_DIM_ATTRIBUTES, *families.HEAD_ATTRIBUTES))
        raise UnknownFamily(
            f"{group} ({type(module).__name__}) does not say how wide a head is, or how many there are; "
            f"looked for the attributes {looked_for}"
        )
    if "qkv" in layers:
        layout = families.layout_of(module, layers["qkv"].name)
        kv_inner = (layers["qkv"].out_features - inner) // 2
        fits = layers["qkv"].out_features == inner + 2 * kv_inner
    else:
        layout, kv_inner = "split", layers["k"].out_features
        fits = layers["q"].out_features == inner and layers["v"].out_features == kv_inner
    heads, kv_heads = inner // head_dim, kv_inner // head_dim
    if not fits or inner % head_dim or kv_inner % head_dim or not kv_heads or heads % kv_heads:
        shapes = {layer.name: (layer.out_features, layer.in_features) for layer in layers.values()}
        raise UnknownFamily(f"the layers of {group} do not fit {heads} heads of width {head_dim}: {shapes}")
    beside = [n for n in names if n.startswith(f"{group}.") and families.role_of(n) == "per-head"]
    per_head = [linear(layer, role="per-head") for layer in beside]
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return Attention(group, module, **sizes, layout=layout, per_head=per_head, **layers)


def _ffn(block: Block, layers: list[LinearLayer], experts: list[str]) -> Ffn:
    if experts:
        raise UnknownFamily(families.EXPERTS.format(block=block.name, experts=", ".join(experts)))
    inputs = [layer for layer in layers if layer.role in ("gate", "in", "gate-in")]
    outputs = [layer for layer in layers if layer.role == "out"]
    kinds = sorted(layer.role for layer in inputs)
    complete = len(outputs) == 1 and len(layers) == len(inputs) + 1
    complete = complete and kinds in (["in"], ["gate", "in"], ["gate-in"])
    ffn = Ffn(inputs, outputs[0], outputs[0].in_features) if complete else None
    width = ffn and ffn.width * (2 if ffn.fused else 1)
    loose = families.loose_matrices(block.name, block.module)
    if loose or ffn is None or {layer.out_features for layer in inputs} != {width}:
        shapes = {layer.name: (layer.role, layer.out_features, layer.in_features) for layer in layers}
        raise UnknownFamily(families.no_feed_forward(block.name, shapes, loose))
    return ffn


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
