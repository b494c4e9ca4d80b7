"""LoRA (Hu et al. 2021) through peft, over floating-point or 4-bit weights (QLoRA, Dettmers et al. 2023)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models.anatomy import LinearLayer, prunable
from lmcompress.models.mixtures import close_experts, open_experts

_GROUP = 64  # inputs that share a scale, as in the paper


@dataclass(frozen=True)
class Lora:
    """y = W x + alpha / rank · B A x, with A `(rank, in)` random, B `(out, rank)` 0 at first, W frozen."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # on the adapters' input, while training
    bits: int | None = None  # 4 holds W as this project's NF4 integers meanwhile; None leaves it

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1 or self.bits not in (None, 4):
            raise BadSetting(f"{self}: rank is at least 1, alpha above 0, dropout below 1, bits None or 4.")


@contextmanager
def adapted(model: nn.Module, lora: Lora | None) -> Iterator[None]:
    """Train adapters on every linear layer of the blocks, nothing else, while inside; merge them into floats.

    Raises:
        NothingTouched, BadSetting: no floating-point layers; several processes, or layers that share weights.
    """
    if lora is None:
        yield
        return
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise BadSetting("lora is not done over several processes; train adapters in one.")
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers = prunable(model)
    if not layers:
        raise NothingTouched(f"the blocks of {type(model).__name__} hold no floating-point weights to adapt.")
    weights = {id(layer.module.weight) for layer in layers}
    everywhere = model.named_modules(remove_duplicate=False)
    if len(layers) < sum(id(getattr(module, "weight", None)) in weights for _, module in everywhere):
        raise BadSetting("some layers share their weights: adapters of one could not be merged into it.")
    open_experts(model)
    layers = prunable(model)
    conv1d = {layer.name: layer.conv1d for layer in layers}  # integers in a layer's place do not tell
    attach(model, layers, lora)
    try:
        yield
    finally:
        for name in conv1d:
            model.set_submodule(name, merged(model.get_submodule(name), conv1d=conv1d[name]))
        close_experts(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def attach(model: nn.Module, layers: list[LinearLayer], lora: Lora) -> None:
    """Put peft's layers in the place of `layers`; `bits` of 4 makes integers of their weights first."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    from lmcompress.models.packed import QuantizedLinear, quantize_nf4, set_unpacking, store_as_integers

    for layer in layers if lora.bits else ():
        integers, scales = quantize_nf4(layer.weight2d(), group_size=_GROUP)
        grid = {"bits": 4, "group_size": _GROUP, "nf4": True}
        store_as_integers(model, layer.module.weight, (integers, scales, None), **grid)
        layer.module = model.get_submodule(layer.name)  # the floats are free to go
        set_unpacking(layer.module, False)  # for good: validation makes none that stay
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[layer.name for layer in layers],
        fan_in_fan_out=layers[0].conv1d and not lora.bits,
    )
    config._register_custom_module({QuantizedLinear: Linear})
    with warnings.catch_warnings():  # ours have all that peft needs of a layer
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        inject_adapter_in_model(config, model)
    model.__dict__.pop("peft_config", None)


@torch.no_grad()
def merged(layer: nn.Module, *, conv1d: bool) -> nn.Module:
    """Return the layer under peft's, its weight W + alpha / rank · B A; floats in the place of integers."""
    from transformers.pytorch_utils import Conv1D

    base, name = layer.get_base_layer(), layer.active_adapter[0]
    change = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
    if base.weight is None:
        weight, bias = base.dequantized(), base.bias
        base = Conv1D(*weight.shape) if conv1d else nn.Linear(*weight.shape[::-1], bias=bias is not None)
        base.weight, base.bias = nn.Parameter(weight.t().contiguous() if conv1d else weight), bias
    base.weight += (change.t() if conv1d else change).to(base.weight.dtype)
    return base.train(layer.training)
