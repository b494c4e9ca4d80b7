"""How families of transformers differ, as data: names that structure cannot tell, and their search.

`anatomy` turns the results into its dataclasses; `classify` places the tensors of a checkpoint by their names
alone, without a model. A new family usually needs one more name in a set below.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import UnknownFamily

# Last part of a module's dotted name (or the last two, where one is ambiguous) -> role. The output
# projection of an attention is not listed: it is the one layer beside q, k and v.
ROLE_NAMES: dict[str, set[str]] = {
    "q": {"query", "q_lin", "q_proj", "query_proj", "q"},
    "k": {"key", "k_lin", "k_proj", "key_proj", "k"},
    "v": {"value", "v_lin", "v_proj", "value_proj", "v"},
    "qkv": {"c_attn", "query_key_value", "qkv_proj", "Wqkv", "self.in_proj"},
    "per-head": {"pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj"}
    | {"query_global", "key_global", "value_global"},
    "gate": {"gate_proj", "wi_0"},
    "in": {"intermediate.dense", "lin1", "ffn", "c_fc", "dense_h_to_4h", "fc1", "up_proj", "wi", "wi_1"}
    | {"fc_in", "mlp.up_proj"},
    "gate-in": {"gate_up_proj", "Wi"},
    "out": {"output.dense", "lin2", "ffn_output", "c_proj", "dense_4h_to_h", "fc2", "down_proj", "wo"}
    | {"fc_out", "mlp.Wo"},
}

# Last parts of tensors' names in checkpoints of families whose modules `anatomy` does not read (Mixtral's
# experts, GPT-2's cross-attention): for statistics, not for surgery.
CHECKPOINT_ROLES = {"q_attn": "q", "qkv": "qkv", "w1": "gate", "w2": "out", "w3": "in"}

# How a fused q-k-v layer orders its rows, by the class of its attention, else by its own name: "stacked" has
# all of q, then k, then v (GPT-2); "interleaved" the queries, key and value of group 0, then of group 1, …
# (NeoX, a group being a head; Falcon); "chunked" q, v and k of each of `CHUNKS` equal shares of the heads.
FUSED_LAYOUT = {"c_attn": "stacked", "qkv_proj": "stacked", "Wqkv": "stacked"}
FUSED_LAYOUT |= {"query_key_value": "interleaved", "in_proj": "interleaved"}
FUSED_LAYOUT |= {"GPTBigCodeAttention": "interleaved", "CodeGenAttention": "chunked"}
CHUNKS = 4

# What heads own in an attention beside its linear layers, and whose heads ("q", or "k" for those of keys and
# values): norms of queries and keys, a head-wise nonlinearity, attention sinks, biases kept apart.
# Their matrices are no linear layers of the block, and are pruned and quantized by nobody.
HEAD_OWNED = {"q_norm": "q", "k_norm": "k", "q_layernorm": "q", "k_layernorm": "k", "phi": "q", "sinks": "q"}
HEAD_OWNED |= {"q_bias": "q", "v_bias": "q"}

# Layers beside experts that choose among them, or weigh one: left as they are.
EXPERT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts")  # of modules and configs
TOP_K = ("top_k", "num_experts_per_tok")
ROUTERS = ("gate", "router", "shared_expert_gate", "wg")
EXPERTS = (
    "the feed-forward of {block} is a mixture of experts ({experts}), whose channels cannot be cut here, "
    "unlike heads, blocks and whole experts (drop-experts). Their matrices can be pruned and quantized."
)

# A part of the dotted name that tells cross-attention from self-attention.
CROSS_ATTENTION_NAMES = ("cross", "encdec", "encoder_attn")

# Linear layers between a narrow embedding and the hidden size (ALBERT, ELECTRA, OPT-350m).
EMBEDDING_PROJECTIONS = ("embedding_hidden_mapping_in", "embeddings_project", "project_in", "project_out")

# Where an attention module keeps the width of one head; integer attributes that repeat a width, and follow
# when it is cut; config fields for the width of all feed-forwards (BART's are "<stack>_ffn_dim").
HEAD_DIM_ATTRIBUTES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
HEAD_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEAD_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads", "kv_heads")
GROUP_ATTRIBUTES = ("num_key_value_groups",)
INNER_ATTRIBUTES = ("all_head_size", "inner_dim", "split_size")
KV_INNER_ATTRIBUTES = ("kv_dim",)
# Of attentions that use as such what elsewhere is the hidden size.
INNER_OF_CLASS = dict.fromkeys(("GPTBigCodeAttention", "XGLMAttention", "TrOCRAttention"), ("embed_dim",))
READ_DIRECTLY = (
    "dt_proj",
)  # leaves whose weight a model multiplies itself (Mamba): no linear layer to replace
FFN_WIDTH_ATTRIBUTES = ("intermediate_size", "inner_dim")
HIDDEN_SIZE_ATTRIBUTES = ("hidden_size", "embed_dim", "d_model", "dim")
LAYER_NUMBER_ATTRIBUTES = ("layer_idx", "layer_id")
# Config fields with an entry for each block.
BLOCK_FIELDS = ("layer_types", "attention_layers", "attention_window", "no_rope_layers", "mlp_layer_types")
FFN_WIDTH_FIELDS = ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "hidden_dim", "ffn_hidden_size")

# Of tensors' names, for `classify`.
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_FEED_FORWARD = "mlp|ffn|feed_?forward|densereludense|intermediate|output|moe|expert"
_KINDS = {
    "cross-attention": re.compile(r"cross_?att|encdecatt|encoder_attn", re.IGNORECASE),
    "attention": re.compile(r"att(entio)?n", re.IGNORECASE),
    "feed-forward": re.compile(_FEED_FORWARD + r"|^fc\d?$|^lin\d$|^w[io123](_\d)?$", re.IGNORECASE),
}
_POSITION_BIAS = "relative_attention_bias"
_EMBEDDING = re.compile(rf"embed(?!_out)|^w[tp]e$|^shared$|^project_in$|{_POSITION_BIAS}", re.IGNORECASE)
# Parts of names that tell an encoder whose blocks' names do not say so (DistilBERT, ModernBERT).
_ENCODER_NAMES = ("transformer.layer.", ".q_lin.", ".mlp.Wi.")
_BUFFERS = {"masked_bias", "inv_freq", "position_ids", "token_type_ids", "final_logits_bias"}
_BUFFERS |= {"num_batches_tracked"}
_ATTENTION_OUTPUTS = {"out_proj", "o_proj", "o", "out_lin", "dense", "c_proj", "Wo"}


def role_of(name: str) -> str | None:
    """Return the role that a dotted name gives a linear layer (a key of `ROLE_NAMES`), or None."""
    path = name.split(".")
    path = path[:-1] if path[-1].isdigit() and len(path) > 1 else path  # one expert's of a list
    tails = (".".join(path[-2:]), path[-1])
    return next((role for tail in tails for role, names in ROLE_NAMES.items() if tail in names), None)


def layout_of(attention: nn.Module, name: str) -> str:
    """Return how the fused q-k-v layer called `name` orders its rows; see `FUSED_LAYOUT`."""
    return FUSED_LAYOUT.get(type(attention).__name__) or FUSED_LAYOUT[name.rpartition(".")[2]]


def inner_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes that say how wide all query heads of an attention are together."""
    return INNER_ATTRIBUTES + INNER_OF_CLASS.get(type(module).__name__, ())


def hidden_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes that say how wide a module's hidden state is."""
    return tuple(n for n in HIDDEN_SIZE_ATTRIBUTES if n not in INNER_OF_CLASS.get(type(module).__name__, ()))


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer: Linear, Conv1D, or a replacement with the same widths."""
    replaced = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
    replaced = replaced and not type(module).__module__.startswith("transformers.")  # I-BERT's do more
    return isinstance(module, (nn.Linear, Conv1D)) or replaced


def linear_layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield linear layers under `module` in definition order, a shared one under each of its names."""
    for child_name, child in module._modules.items():
        path = f"{name}.{child_name}" if name else child_name
        if child is not None and is_linear(child):
            yield from [(path, child)] if child_name not in READ_DIRECTLY else []
        elif child is not None:
            yield from linear_layers(child, path)


def integer_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that hold weights as packed integers (they have a `weight_count`), tied ones once."""
    layers = [module for module in model.modules() if hasattr(module, "weight_count")]
    return list({id(layer.packed): layer for layer in layers}.values())


def is_cross(name: str) -> bool:
    """Return whether a dotted name is that of a cross-attention."""
    return any(fragment in name.lower() for fragment in CROSS_ATTENTION_NAMES)


def attention_groups(names: list[str]) -> dict[str, dict[str, str]]:
    """Return for each module holding q, k, v (or qkv): role -> name of the layer."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        role = role_of(name)
        if role in ("q", "k", "v", "qkv"):
            groups.setdefault(name.rpartition(".")[0], {})[role] = name
    return {name: roles for name, roles in groups.items() if set(roles) in ({"q", "k", "v"}, {"qkv"})}


def output_projection(names: list[str], group: str, block: str) -> str | None:
    """Return the one layer beside q, k, v in the smallest module of `block` that holds them and another."""
    while group != block:
        inputs = ("q", "k", "v", "qkv", "per-head")
        beside = [n for n in names if n.startswith(f"{group}.") and role_of(n) not in inputs]
        if beside:
            return beside[0] if len(beside) == 1 else None
        group = group.rpartition(".")[0]
    return None


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return every ModuleList of like modules with exactly one self-attention each, and the lists beside it.

    If there is none, the outermost ModuleList of modules with linear layers that has most parameters in its
    stack: enough for techniques that need linear layers only.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    alike = [(n, m) for n, m in lists if len(set(map(type, m))) == 1 and all(map(_is_block, m))]
    # ALBERT's groups of one layer would qualify as blocks beside the layers in them.
    blocks = [(n, m) for n, m in alike if not any(other.startswith(f"{n}.") for other, _ in alike)]
    with_layers = [(n, m) for n, m in lists if all(next(linear_layers(b, ""), None) for b in m)]
    if blocks:  # and the lists beside them, where XLM has its feed-forwards
        places = {(n.rpartition(".")[0], len(m)) for n, m in blocks}
        return [e for e in with_layers if e in blocks or (e[0].rpartition(".")[0], len(e[1])) in places]
    largest: dict[str | None, tuple[str, nn.ModuleList]] = {}
    for name, modules in sorted(
        with_layers, key=lambda entry: -sum(p.numel() for p in entry[1].parameters())
    ):
        largest.setdefault(
            stack_by_name(name), (name, modules)
        )  # of two equal ones the outer, which is first
    names = [name for name, _ in largest.values()]
    outermost = [
        entry for entry in largest.values() if not entry[0].startswith(tuple(f"{n}." for n in names))
    ]
    if not outermost:
        tails = sorted({name.rpartition(".")[2] for name, _ in linear_layers(model, "")})
        raise UnknownFamily(
            f"{type(model).__name__} has no repeated blocks to compress. Looked for an nn.ModuleList of "
            f"modules with linear layers (nn.Linear or Conv1D). Found: ModuleLists {[n for n, _ in lists]}, "
            f"linear layers named {tails[:20]}."
        )
    return outermost


def no_attention(name: str, layers: list[str]) -> str:
    """Return the sentence for a block without a self-attention that was recognised."""
    names = ", ".join(layer.removeprefix(f"{name}.") for layer in layers)
    return (
        f"{name} has no self-attention that is known here, so its heads cannot be told apart. Looked for one "
        f"module with linear layers named like {sorted(ROLE_NAMES['q'])} for q (k and v likewise), or fused "
        f"like {sorted(ROLE_NAMES['qkv'])}; its linear layers are {names}. If these are its roles, add their "
        "names to lmcompress/models/families.py. Techniques that need no heads, such as pruning of single "
        "weights, quantization and low rank, work on it."
    )


def no_feed_forward(name: str, shapes: dict[str, tuple], loose: list[str]) -> str:
    """Return the sentence for a block whose layers beside attention are no feed-forward."""
    named = {role: sorted(ROLE_NAMES[role]) for role in ("in", "out", "gate", "gate-in")}
    also = f" Matrices that are no linear layers: {', '.join(loose)}." if loose else ""
    return (
        f"the layers of {name} beside its attention are not a feed-forward: {shapes}.{also} Looked for one "
        f"input layer (named like {named['in']}), one output layer (like {named['out']}) and at most one "
        f"gate (like {named['gate']}), or one layer for both (like {named['gate-in']})."
    )


def loose_matrices(name: str, module: nn.Module) -> list[str]:
    """Return the matrices of a block that are in no linear layer, table or part of heads."""
    tables = tuple(f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Embedding))
    known = tuple(f"{layer}." for layer, _ in linear_layers(module, ""))
    return [
        f"{name}.{n}"
        for n, parameter in module.named_parameters()
        if parameter.dim() > 1
        and not HEAD_OWNED.keys() & set(n.split("."))
        and n not in tables
        and not n.startswith(known)
    ]


def is_norm(name: str, module: nn.Module) -> bool:
    """Return whether `module` norms hidden states (and not the queries or keys of heads)."""
    named = "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
    return named and not HEAD_OWNED.keys() & set(name.split("."))


def norm_width(module: nn.Module) -> int | None:
    """Return the number of dimensions a norm works on; None if any will do."""
    weight = getattr(module, "weight", None)
    return getattr(module, "normalized_shape", [None])[0] if weight is None else weight.shape[0]


def stack_by_name(name: str) -> str | None:
    """Return "encoder" or "decoder" if the dotted name holds it, else None."""
    return next((word for word in name.split(".") if word in ("encoder", "decoder")), None)


def kind_of_single_stack(model: nn.Module, block: nn.Module, name: str) -> str:
    """Return "decoder" if the self-attention is causal, else "encoder"; by config or name if it is silent."""
    causal = [m.is_causal for m in block.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if causal:
        return "decoder" if causal[0] else "encoder"
    is_decoder = getattr(getattr(model, "config", None), "is_decoder", False)
    return "decoder" if is_decoder else stack_by_name(name) or "decoder"


def _is_block(module: nn.Module) -> bool:
    groups = attention_groups([name for name, _ in linear_layers(module, "block")])
    return sum(not is_cross(name) for name in groups) == 1


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor sits: `stack` encoder, decoder or shared; `block` None outside the blocks.

    `kind`: attention, cross-attention, feed-forward, norm, embedding, head or other; `role`: which linear
    layer of a block (q, k, v, qkv, o, gate, in, out), else the module's own name.
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
        encodes = any(part in name for name in names for part in _ENCODER_NAMES)
        stacks = {"encoder" if encodes else "decoder"}
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
    stack = "" if kind == "head" else stack_by_name(".".join(path[:number])) or ""
    role = owner = modules[-1]
    if kind.endswith("attention") and owner in _ATTENTION_OUTPUTS:
        role = "o"
    elif kind.endswith(("attention", "feed-forward")):
        role = role_of(".".join(modules)) or CHECKPOINT_ROLES.get(owner, owner)
    return TensorPlace(stack, kind, role, is_bias, block)


def _kind(modules: list[str], shape: tuple[int, ...], *, inside: bool) -> str:
    owner = modules[-1]
    if _NORM.search(owner) and len(shape) <= 1:
        return "norm"
    if _EMBEDDING.search(owner) or (not inside and any(_EMBEDDING.search(module) for module in modules)):
        return "embedding"
    if not inside or any(module in ("classifier", "score", "lm_head", "cls") for module in modules):
        return "head"
    return next((kind for kind, pattern in _KINDS.items() if any(map(pattern.search, modules))), "other")
