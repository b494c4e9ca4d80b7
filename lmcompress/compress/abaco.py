"""Techniques that train a low-rank map beside a dense one: ABACO, which fades the dense one out, and MASS's recoveries."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.low_rank import chosen_maps, rank_for, weight_figures
from lmcompress.compress.low_rank_layers import Adapted, Factorised, linear, replace_maps
from lmcompress.compress.sharing import share_means
from lmcompress.errors import BadSetting
from lmcompress.train.trainer import TrainSpec, curve, fit, validation_loss

RECOVERIES = ("shared", "all", "lora", "lora-per-block")
HALVINGS = 5  # of alpha over an exponential schedule


def alpha_at(done: float, *, start: float, schedule: str) -> float:
    """What is left of the dense map after the share `done` (0-1) of the steps."""
    return start * (1 - done) if schedule == "linear" else start * 2 ** (-HALVINGS * done)


@technique(name="abaco", version=1, title="ABACO", colour="#CC79A7", marker="X", needs=("train",))
def abaco(
    model: nn.Module,
    context: Context,
    *,
    rank: int | float,
    schedule: str = "linear",
    start: float = 1.0,
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
):
    """y = α(t) W x + b + 2 B A x: only A and B are trained while α falls to 0; then W is gone.

    `achieved` has "final_jump", the α that is left when the last step is done (0 if linear, start/32 if
    exponential) and drops to 0 at once; where there is held-out text, its loss with and without that rest as well.

    Args:
        context.train: data, steps and rate.
        rank, kinds, blocks: as for "low-rank".
        schedule: "linear", or "exponential": start · 2^(-5t/H) over H steps.
        start: α at first, above 0.
    """
    if schedule not in ("linear", "exponential") or not start > 0:
        raise BadSetting(f'schedule={schedule!r} is "linear" or "exponential", start={start!r} above 0.')
    maps = chosen_maps(model, kinds, blocks)
    originals = {one.name: one.weight2d().detach() for one in maps}
    ranks = [rank_for(rank, one.out_features, one.in_features) for one in maps]
    draw = torch.Generator().manual_seed(context.train.seed)
    faded = []
    for one, wanted in zip(maps, ranks, strict=True):
        layer = Adapted(linear(originals[one.name], one.module.bias), rank=wanted, scale=2.0, draw=draw)
        faded.append(_put(model, one.module, layer))

    def before_step(step: int, _: list[dict]) -> None:
        for layer in faded:
            layer.alpha = alpha_at(step / context.train.steps, start=start, schedule=schedule)

    history = _fit_only(model, [p for one in faded for p in _beside(one)], context.train, before_step)
    jump = {"alpha": alpha_at(1.0, start=start, schedule=schedule)}
    before_step(context.train.steps, [])
    if context.train.evaluate:
        jump["loss_before"] = validation_loss(model, context.train.evaluate, spec=context.train)["loss"]
    for layer in faded:
        parts = layer.first.weight.detach(), (layer.scale * layer.second.weight).detach()
        _put(model, layer, Factorised(*parts, layer.base.bias))
    if context.train.evaluate:
        jump["loss_after"] = validation_loss(model, context.train.evaluate, spec=context.train)["loss"]
    figures = weight_figures(model, originals) | {"final_jump": jump, "curve": curve(history)}
    return model, TechniqueResult("abaco", len(maps), figures)


@technique(
    name="mass-trained",
    version=1,
    title="Shared mean layers, recovered",
    colour="#882255",
    marker="d",
    needs=("train",),
)
def mass_trained(
    model: nn.Module,
    context: Context,
    *,
    recover: str = "shared",
    rank: int = 16,
    dropout: float = 0.05,
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
):
    """One map per series, the mean over the blocks ("mass"), and then training.

    Args:
        context.train: data, steps and rate.
        recover: what is trained: "shared", the shared maps; "all", every weight; "lora", one low-rank change of each
            shared map, folded into it at the end; "lora-per-block", one of each block's own, kept beside the map.
        rank: of the low-rank changes, which are scaled by 2.
        dropout: of what they read, in training.
        kinds, blocks: as for "mass".
    """
    if recover not in RECOVERIES:
        raise BadSetting(f"recover={recover!r}; it takes {', '.join(map(repr, RECOVERIES))}")
    originals, shared = share_means(model, kinds, blocks)
    names = {one: [n for n in originals if model.get_submodule(n) is one] for one in shared}
    draw, adapted = torch.Generator().manual_seed(context.train.seed), []
    for one in shared:
        rank_for(rank, one.out_features, one.in_features)
    for one in shared if recover.startswith("lora") else ():
        if recover == "lora":
            adapted.append(_put(model, one, Adapted(one, rank=rank, scale=2.0, dropout=dropout, draw=draw)))
            continue
        for name in names[one]:
            layer = Adapted(one, rank=rank, scale=2.0, dropout=dropout, draw=draw)
            model.set_submodule(name, layer.train(model.training))
            adapted.append(layer)
    trained = {
        "shared": [p for one in shared for p in one.parameters()],
        "all": [p for p in model.parameters() if p.requires_grad],
    }
    history = _fit_only(
        model, trained.get(recover) or [p for one in adapted for p in _beside(one)], context.train
    )
    for layer in adapted if recover == "lora" else ():
        _put(model, layer, linear(layer.matrix().detach(), layer.base.bias))
    figures = weight_figures(model, originals) | {"maps": len(shared), "curve": curve(history)}
    return model, TechniqueResult("mass-trained", len(originals), figures)


def _beside(layer: Adapted) -> list[nn.Parameter]:
    return [layer.first.weight, layer.second.weight]


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` wherever `model` has the module `old`."""
    replace_maps(model, old, lambda _: new)
    return new


def _fit_only(model: nn.Module, wanted: Sequence[Tensor], train: TrainSpec, before_step=None):
    """Train `wanted` alone; which parameters may be trained is as before afterwards."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(one) for one in wanted}
    try:
        for parameter in asked:
            parameter.requires_grad_(id(parameter) in chosen)
        return fit(model, train, before_step=before_step)
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
