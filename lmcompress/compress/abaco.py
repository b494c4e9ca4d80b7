"""Low-rank layers trained with dense ones: ABACO, which fades the dense out, and MASS's recoveries."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.low_rank import rank_for, select_layers, weight_figures
from lmcompress.compress.low_rank_layers import Adapted, Factorised, linear, replace_linear
from lmcompress.compress.sharing import share_means
from lmcompress.compress.sheared import held_out
from lmcompress.compress.structured import trainable
from lmcompress.train.trainer import curve, fit

HALVINGS = 5  # of alpha over an exponential schedule


def alpha_at(done: float, *, start: float, schedule: str) -> float:
    """Return what is left of the dense layer after the share `done` (0-1) of the steps."""
    return start * (1 - done) if schedule == "linear" else start * 2 ** (-HALVINGS * done)


@technique("abaco", 1, "ABACO", "#CC79A7", "X", needs=("train",))
def abaco(
    model: nn.Module,
    context: Context,
    *,
    rank: int | float,
    schedule: Literal["linear", "exponential"] = "linear",
    start: float = 1.0,
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
):
    """Train A and B of y = α(t) W x + b + 2 B A x while α falls to 0; then remove W.

    `achieved` has "final_jump": the α that is left after the last step (0 if linear, start/32 if exponential)
    and drops to 0 at once, and the loss on held-out text, where there is any, with and without it.

    Args:
        rank, kinds, blocks: as for "low-rank".
        schedule: "linear", or "exponential": start · 2^(-5t/H) over H steps.
        start: α at first, above 0.
    """
    layers = select_layers(model, kinds, blocks)
    originals = {layer.name: layer.weight2d().detach() for layer in layers}
    ranks = {layer.name: rank_for(rank, layer.out_features, layer.in_features) for layer in layers}
    draw, fading = torch.Generator().manual_seed(context.train.seed), []
    for layer in layers:
        dense = linear(originals[layer.name], layer.module.bias)
        fading.append(_put(model, layer.module, Adapted(dense, rank=ranks[layer.name], scale=2.0, draw=draw)))

    def before_step(step: int, _: list[dict]) -> None:
        for layer in fading:
            layer.alpha = alpha_at(step / context.train.steps, start=start, schedule=schedule)

    with trainable(_factors(fading), frozen=model.parameters()):
        history = fit(model, context.train, before_step=before_step)
    before_step(context.train.steps, [])
    jump = {
        "alpha": alpha_at(1.0, start=start, schedule=schedule),
        "loss_before": held_out(model, context.train),
    }
    for layer in fading:
        factors = layer.first.weight.detach(), (layer.scale * layer.second.weight).detach()
        _put(model, layer, Factorised(*factors, layer.base.bias))
    jump["loss_after"] = held_out(model, context.train)
    jump = {name: figure for name, figure in jump.items() if figure is not None}
    figures = weight_figures(model, originals) | {"final_jump": jump, "curve": curve(history)}
    return model, TechniqueResult("abaco", len(layers), figures)


@technique("mass-trained", 1, "Shared mean layers, recovered", "#882255", "d", needs=("train",))
def mass_trained(
    model: nn.Module,
    context: Context,
    *,
    recover: Literal["shared", "all", "lora", "lora-per-block"] = "shared",
    rank: int = 16,
    dropout: float = 0.05,
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
):
    """Share one layer per series, the mean over the blocks ("mass"), and then train.

    Args:
        recover: what is trained: the shared layers; every weight; one low-rank change of each shared layer,
            folded into it at the end; or one for each block, kept with the layer.
        rank, dropout: of the low-rank changes, which are scaled by 2, and of what they read, in training.
        kinds, blocks: as for "mass".
    """
    originals, shared = share_means(model, kinds, blocks)
    users = {layer: [n for n in originals if model.get_submodule(n) is layer] for layer in shared}
    draw, adapted = torch.Generator().manual_seed(context.train.seed), []
    lora = {"rank": rank, "scale": 2.0, "dropout": dropout, "draw": draw}
    for layer in shared:
        rank_for(rank, layer.out_features, layer.in_features)  # refuses a rank above the full one
    if recover == "lora":
        adapted = [_put(model, layer, Adapted(layer, **lora)) for layer in users]
    elif recover == "lora-per-block":
        for name, layer in ((name, layer) for layer, names in users.items() for name in names):
            adapted.append(Adapted(layer, **lora).train(model.training))
            model.set_submodule(name, adapted[-1])
    trained = {
        "shared": [p for layer in shared for p in layer.parameters()],
        "all": [p for p in model.parameters() if p.requires_grad],
    }
    with trainable(trained.get(recover) or _factors(adapted), frozen=model.parameters()):
        history = fit(model, context.train)
    for layer in adapted if recover == "lora" else ():
        _put(model, layer, linear(layer.matrix().detach(), layer.base.bias))
    figures = weight_figures(model, originals) | {"maps": len(shared), "curve": curve(history)}
    return model, TechniqueResult("mass-trained", len(originals), figures)


def _factors(layers: Sequence[Adapted]) -> list[nn.Parameter]:
    return [factor.weight for layer in layers for factor in (layer.first, layer.second)]


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `model` has the module `old`."""
    replace_linear(model, old, lambda _: new)
    return new
