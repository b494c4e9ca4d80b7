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
    "q": {"query", "q_lin", "q_proj", "q"},
    "k": {"key", "k_lin", "k_proj", "k"},
    "v": {"value", "v_lin", "v_proj", "v"},
    "qkv": {"c_attn", "query_key_value"},
    "gate": {"gate_proj", "wi_0"},
    "in": {"intermediate.dense", "lin1", "ffn", "c_fc", "dense_h_to_4h", "fc1", "up_proj", "wi", "wi_1"},
    "out": {"output.dense", "lin2", "ffn_output", "c_proj", "dense_4h_to_h", "fc2", "down_proj", "wo"},
}

# Last parts of tensors' names in checkpoints of families whose modules `anatomy` does not read (fused
# grouped-query maps, Mixtral's experts, GPT-2's cross-attention): for statistics, not for surgery.
CHECKPOINT_ROLES = {"q_attn": "q", "qkv_proj": "qkv", "qkv": "qkv", "Wqkv": "qkv"}
CHECKPOINT_ROLES |= {"w1": "gate", "w2": "out", "w3": "in"}

# How a fused q-k-v layer orders its rows, by the class of its attention, else by its own name: "stacked"
# has all of q, then k, then v (GPT-2); "interleaved" q, k, v of head 0, then of head 1, … (NeoX).
FUSED_LAYOUT = {"c_attn": "stacked", "query_key_value": "interleaved", "GPTBigCodeAttention": "interleaved"}

# What heads own in an attention beside its linear layers, and whose heads ("q", or "k" for those of keys and
# values): norms of queries and keys, a head-wise nonlinearity, attention sinks. Their matrices are no linear
# layers of the block, and are pruned and quantized by nobody.
HEAD_OWNED = {"q_norm": "q", "k_norm": "k", "q_layernorm": "q", "k_layernorm": "k", "phi": "q", "sinks": "q"}

# A part of the dotted name that tells cross-attention from self-attention.
CROSS_ATTENTION_NAMES = ("cross", "encdec", "encoder_attn")

# Linear layers between a narrow embedding and the hidden size (ALBERT, ELECTRA, OPT-350m).
EMBEDDING_PROJECTIONS = ("embedding_hidden_mapping_in", "embeddings_project", "project_in", "project_out")

# Where an attention module keeps the width of one head; integer attributes that repeat a width, and follow
# when it is cut; config fields for the width of all feed-forwards (BART's are "<stack>_ffn_dim").
HEAD_DIM_ATTRIBUTES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
HEAD_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads")
KV_HEAD_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads", "kv_heads")
INNER_ATTRIBUTES = ("all_head_size", "inner_dim", "split_size", "kv_dim")
FFN_WIDTH_ATTRIBUTES = ("intermediate_size", "inner_dim")
HIDDEN_SIZE_ATTRIBUTES = ("hidden_size", "embed_dim", "d_model", "dim")
LAYER_NUMBER_ATTRIBUTES = ("layer_idx", "layer_id")
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
_BUFFERS = {"masked_bias", "inv_freq", "position_ids", "token_type_ids", "final_logits_bias"}
_BUFFERS |= {"num_batches_tracked"}
_ATTENTION_OUTPUTS = {"out_proj", "o_proj", "o", "out_lin", "dense", "c_proj"}


def role_of(name: str) -> str | None:
    """Return the role that a dotted name gives a linear layer (a key of `ROLE_NAMES`), or None."""
    path = name.split(".")
    tails = (".".join(path[-2:]), path[-1])
    return next((role for tail in tails for role, names in ROLE_NAMES.items() if tail in names), None)


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer: Linear, Conv1D, or a replacement with the same widths."""
    replaced = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
    return isinstance(module, (nn.Linear, Conv1D)) or replaced


def linear_layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield linear layers under `module` in definition order, a shared one under each of its names."""
    for child_name, child in module._modules.items():
        path = f"{name}.{child_name}" if name else child_name
        if child is not None and is_linear(child):
            yield path, child
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
        beside = [n for n in names if n.startswith(f"{group}.") and role_of(n) not in ("q", "k", "v", "qkv")]
        if beside:
            return beside[0] if len(beside) == 1 else None
        group = group.rpartition(".")[0]
    return None


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return every ModuleList of like modules that each hold exactly one self-attention, innermost ones."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    alike = [(n, m) for n, m in lists if len(set(map(type, m))) == 1 and all(map(_is_block, m))]
    # ALBERT's groups of one layer would qualify as blocks beside the layers in them.
    blocks = [(n, m) for n, m in alike if not any(other.startswith(f"{n}.") for other, _ in alike)]
    if not blocks:
        tails = sorted({name.rpartition(".")[2] for name, _ in linear_layers(model, "")})
        raise UnknownFamily(
            f"{type(model).__name__} was not recognised as a transformer. Looked for: an nn.ModuleList of "
            "modules of one class, each with one self-attention whose linear layers are named like "
            f"{sorted(ROLE_NAMES['q'])}, or fused like {sorted(ROLE_NAMES['qkv'])}. "
            f"Found: ModuleLists {[n for n, _ in lists]}, linear layers named {tails[:20]}. "
            "If these are its layers, add their names to lmcompress/models/families.py."
        )
    return blocks


def expert_parameters(
    name: str, module: nn.Module, layers: set[str], outside_attention: list[str]
) -> list[str]:
    """Return the names of matrices in a mixture of experts; [] if all of the block are linear layers."""
    tables = tuple(f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Embedding))
    known = tuple(f"{layer}." for layer in layers)
    loose = {
        f"{name}.{n}": parameter
        for n, parameter in module.named_parameters()
        if parameter.dim() > 1
        and not HEAD_OWNED.keys() & set(n.split("."))
        and n not in tables
        and not f"{name}.{n}".startswith(known)
    }
    if loose and not any(parameter.dim() > 2 for parameter in loose.values()):
        raise UnknownFamily(f"{name} holds matrices that are not known linear layers: {sorted(loose)}")
    return sorted(loose) + sorted(outside_attention) if loose else []


def is_norm(name: str, module: nn.Module) -> bool:
    """Return whether `module` norms hidden states (and not the queries or keys of heads)."""
    return "norm" in type(module).__name__.lower() and not HEAD_OWNED.keys() & set(name.split("."))


def norm_width(module: nn.Module) -> int:
    """Return the number of dimensions a norm works on."""
    weight = getattr(module, "weight", None)
    return module.normalized_shape[0] if weight is None else weight.shape[0]


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
