"""Mixtures of experts: what a model keeps as one `(experts, out, in)` parameter, as linear layers and back.

transformers holds the matrices of all experts in two 3-D parameters, which nothing that looks for linear
layers sees. Techniques get them as layers; a result whose layers are plain ones gets its parameters again.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmcompress.errors import UnknownFamily
from lmcompress.models.serialization import register_module

INPUTS, OUTPUT = ("gate_up_proj", "up_proj"), "down_proj"  # one of the inputs: gated, or not


def is_fused(module: nn.Module) -> bool:
    """Return whether `module` holds the matrices of experts in 3-D parameters, as transformers names them."""
    output = module._parameters.get(OUTPUT)
    counted = isinstance(vars(module).get("num_experts"), int)
    return (
        counted and output is not None and output.dim() == 3 and any(n in module._parameters for n in INPUTS)
    )


def is_mixture(module: nn.Module) -> bool:
    """Return whether `module` holds experts, in 3-D parameters or as layers."""
    return is_fused(module) or isinstance(module, OpenExperts)


def experts_in(block: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return name and module of the experts of a block called `name`; `UnknownFamily` if it has none."""
    for inner, module in block.named_modules():
        if is_mixture(module):
            return f"{name}.{inner}", module
    raise UnknownFamily(
        f"{name} has no mixture of experts. Looked for a module with 3-D parameters named {OUTPUT} and "
        f"{' or '.join(INPUTS)}."
    )


def keep(experts: nn.Module, index: Tensor, cut: Callable[..., None]) -> None:
    """Keep the experts `index`; `cut(module, leaf, dim, index)` cuts a parameter."""
    for leaf in (*INPUTS, OUTPUT):
        if isinstance(layers := getattr(experts, leaf, None), nn.ModuleList):
            setattr(experts, leaf, nn.ModuleList(layers[number] for number in index.tolist()))
        for parameter in (leaf, f"{leaf}_bias"):
            if parameter in experts._parameters:
                cut(experts, parameter, 0, index)
    if originals := getattr(experts, "_origin", ()):
        originals[0].num_experts = len(index)


def layers_of(experts: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and layer of each matrix of fused experts; their weights are views of the parameters."""
    for leaf in (*INPUTS, OUTPUT):
        parameter = experts._parameters.get(leaf)
        bias = experts._parameters.get(f"{leaf}_bias")
        for number in range(0 if parameter is None else len(parameter)):
            weight = parameter.data[number]
            weight = weight.t() if getattr(experts, "is_transposed", False) else weight
            layer = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.data[number], requires_grad=bias.requires_grad)
            yield f"{leaf}.{number}", layer


@register_module
class OpenExperts(nn.Module):
    """Experts as linear layers: a token goes through those that its router chose, and their outputs add up.

    Gate and input are one layer, as in the parameters: its first rows are the gate's.
    """

    def __init__(self, experts: int, hidden: int, width: int, *, gated: bool, bias: bool):
        super().__init__()
        self.num_experts, self.hidden, self.width = experts, hidden, width
        self.gated, self.has_bias = gated, bias
        self.inputs = INPUTS[0 if gated else 1]
        shapes = {self.inputs: (hidden, width * (2 if gated else 1)), OUTPUT: (width, hidden)}
        for leaf, shape in shapes.items():
            setattr(self, leaf, nn.ModuleList(nn.Linear(*shape, bias=bias) for _ in range(experts)))
        self.act_fn: nn.Module = nn.Identity()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return `(tokens, hidden)` for tokens `(tokens, hidden)` and their experts `(tokens, k)`."""
        total = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            token, rank = torch.where(top_k_index == number)
            states = getattr(self, self.inputs)[number](hidden_states[token])
            if self.gated:
                gate, states = states.chunk(2, dim=-1)
                states = self.act_fn(gate) * states
            else:
                states = self.act_fn(states)
            outputs = self.down_proj[number](states) * top_k_weights[token, rank, None]
            total.index_add_(0, token, outputs.to(total.dtype))
        return total

    def spec(self) -> dict:  # the activation is compared as any other module
        sizes = {"experts": self.num_experts, "hidden": self.hidden, "width": self.width}
        return sizes | {"gated": self.gated, "bias": self.has_bias}

    @classmethod
    def from_spec(cls, spec: dict) -> "OpenExperts":
        return cls(**spec)


def as_layers(experts: nn.Module) -> OpenExperts | None:
    """Return fused experts as layers whose weights are views; None if that would compute something else.

    Some gate otherwise than by act(gate)·input, or interleave the two: two tokens tell.
    """
    layers = dict(layers_of(experts))
    output = layers[f"{OUTPUT}.0"]
    sizes = len(layers) // 2, output.out_features, output.in_features
    with torch.device("meta"):
        opened = OpenExperts(*sizes, gated=INPUTS[0] in experts._parameters, bias=output.bias is not None)
    for name, layer in layers.items():
        opened.set_submodule(name, layer)
    opened.act_fn = getattr(experts, "act_fn", opened.act_fn)
    states = torch.randn(2, output.out_features, generator=torch.Generator().manual_seed(0)).to(output.weight)
    tokens = states, torch.tensor([[0], [sizes[0] - 1]]).to(states.device), torch.ones_like(states[:, :1])
    try:
        with torch.no_grad():
            same = torch.allclose(experts(*tokens).float(), opened(*tokens).float(), rtol=0.02, atol=1e-4)
    except (RuntimeError, TypeError, AttributeError):  # it takes other arguments, or its widths are others
        same = False
    return opened.train(experts.training) if same else None


def refuse_closed(model: nn.Module) -> None:
    """Raise `UnknownFamily` for experts whose matrices cannot be had as linear layers."""
    for name, experts in model.named_modules():
        if is_fused(experts) and as_layers(experts) is None:
            raise UnknownFamily(
                f"the experts of {name} ({type(experts).__name__}) keep their matrices in 3-D parameters "
                "and compute otherwise than act(gate)·input: they cannot be treated as linear layers. Cut "
                "the heads or blocks of this model, or use one with a dense feed-forward."
            )


def open_experts(model: nn.Module) -> None:
    """Put linear layers in the place of fused experts, in place and in the same memory.

    Experts that compute otherwise stay as they are.
    """
    for name, experts in [(name, module) for name, module in model.named_modules() if is_fused(module)]:
        if (layers := as_layers(experts)) is not None:
            for leaf in [*experts._parameters]:
                setattr(experts, leaf, None)
            layers._origin = (experts,)  # in a tuple, so that it is no part of the model
            model.set_submodule(name, layers)


@torch.no_grad()
def close_experts(model: nn.Module) -> None:
    """Give opened experts their 3-D parameters again, in place, where all their layers still are plain."""
    for name, layers in [(n, m) for n, m in model.named_modules() if getattr(m, "_origin", None)]:
        (experts,) = layers._origin
        linears = [*getattr(layers, layers.inputs), *layers.down_proj]
        if all(type(linear) is nn.Linear and not parametrize.is_parametrized(linear) for linear in linears):
            for leaf in (layers.inputs, OUTPUT):
                of_leaf = getattr(layers, leaf)
                weights = torch.stack([linear.weight for linear in of_leaf])
                weights = weights.mT.contiguous() if getattr(experts, "is_transposed", False) else weights
                tensors = {leaf: weights}
                if layers.has_bias:
                    tensors[f"{leaf}_bias"] = torch.stack([linear.bias for linear in of_leaf])
                for parameter, tensor in tensors.items():
                    trained = of_leaf[0].weight.requires_grad
                    setattr(experts, parameter, nn.Parameter(tensor, requires_grad=trained))
            model.set_submodule(name, experts.train(layers.training))
