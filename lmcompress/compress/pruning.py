"""Unstructured pruning: which single weights of a model's linear layers become zero.

A criterion is a score per weight; the smallest scores go, compared within a layer, over all prunable weights,
or within every M neighbours of a row (N:M patterns). The shape of the model stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import Stats, calibrate
from lmcompress.compress.masks import achieved, layer_levels, layer_mask, level_of, lowest, n_of_m, over_all
from lmcompress.compress.second_order import FactorCache, prune_matrix
from lmcompress.models.anatomy import LinearLayer, prunable
from lmcompress.train.trainer import fit

WARMUP, SETTLE = 0.1, 0.3  # of movement: shares of the steps before the first weight goes, and after the last
Sparsity, Pattern, Allocation = float | None, str | None, dict[str, float] | None
Policy = Literal["blocks", "all"]


@technique("random", 1, "Random", "#8C6D31", "x", needs=("seed",), masked=True)
def random(model, context, *, sparsity: Sparsity = None, pattern: Pattern = None, policy: Policy = "blocks"):
    """Zero a uniformly random `sparsity` of each layer's weights: the control every criterion has to beat."""
    generator = torch.Generator().manual_seed(context.seed)

    def uniform(weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=generator).to(weight.device)

    return _within_layers(model, "random", uniform, (sparsity, pattern), policy)


@technique("magnitude-layer", 1, "Magnitude, per layer", "#0072B2", "o", masked=True)
def magnitude_layer(
    model,
    context,
    *,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    allocation: Allocation = None,
    policy: Policy = "blocks",
):
    """Zero the smallest |W| of each layer (Han et al. 2015), or of every M neighbours; see `layer_levels`."""
    return _within_layers(model, "magnitude-layer", torch.abs, (sparsity, pattern, allocation), policy)


@technique("magnitude-global", 1, "Magnitude, global", "#D55E00", "s", masked=True)
@torch.no_grad()
def magnitude_global(model, context, *, sparsity: float, policy: Policy = "blocks"):
    """Zero the smallest |W| over all prunable weights together, so that layers differ in sparsity."""
    layers = prunable(model, policy)
    if layers and sparsity:
        masks = over_all({layer.name: layer.weight2d().abs() for layer in layers}, sparsity)
        for layer in layers:
            layer.weight2d().masked_fill_(masks[layer.name], 0.0)
    return model, TechniqueResult("magnitude-global", len(layers), achieved(layers))


@torch.no_grad()
def _within_layers(
    model: nn.Module, name: str, criterion: Callable[[Tensor], Tensor], amounts: tuple, policy: str
):
    """Zero each layer's smallest scores; `criterion` turns weights `(out, in)` into scores of that shape."""
    layers = prunable(model, policy)
    levels = layer_levels(layers, *amounts)
    masks = {
        layer.name: layer_mask(criterion(layer.weight2d()), levels[layer.name], amounts[1], name=layer.name)
        for layer in layers
        if any(levels.values())
    }
    for layer in layers if masks else ():  # after the last mask is made: a pattern may not fit
        layer.weight2d().masked_fill_(masks[layer.name], 0.0)
    return model, TechniqueResult(name, len(layers), achieved(layers))


@technique("wanda", 1, "Wanda", "#009E73", "^", needs=("calibration",), masked=True)
def wanda(
    model, context, *, sparsity: Sparsity = None, pattern: Pattern = None, allocation: Allocation = None
):
    """Zero the smallest |W_ij|·‖X_j‖ of every output row, or of every M neighbours (Sun et al. 2024)."""

    def prune(layer: LinearLayer, stats: Stats, level: float) -> Tensor:
        scores = wanda_scores(layer.weight2d(), stats.norm_sq)
        mask = layer_mask(scores, level, pattern, name=layer.name, by_row=True)
        return layer.weight2d().masked_fill(mask, 0)

    return _block_by_block(model, context, "wanda", ("norm",), prune, (sparsity, pattern, allocation))


def wanda_scores(weight: Tensor, norm_sq: Tensor) -> Tensor:
    """Return |W_ij| · ‖X_j‖₂, `(out, in)` (Sun et al. 2024, eq. 1), for the inputs' squared norms `(in,)`."""
    return weight.detach().abs().float() * norm_sq.sqrt()


@technique("sparsegpt", 1, "SparseGPT", "#CC79A7", "v", needs=("calibration",), masked=True)
def sparsegpt(
    model,
    context,
    *,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    allocation: Allocation = None,
    damping: float = 0.01,
):
    """Zero by W² / U_jj² and move the remaining weights to make up for it (Frantar & Alistarh 2023)."""
    factors = FactorCache(damping)

    def prune(layer: LinearLayer, stats: Stats, level: float) -> Tensor:
        factor = factors.of(stats.gram)
        return prune_matrix(layer.weight2d(), stats.gram, sparsity=level, pattern=pattern, factor=factor)

    return _block_by_block(model, context, "sparsegpt", ("gram",), prune, (sparsity, pattern, allocation))


@torch.no_grad()
def _block_by_block(
    model: nn.Module,
    context: Context,
    name: str,
    collect: Sequence[str],
    prune: Callable[[LinearLayer, Stats, float], Tensor],
    amounts: tuple[Sparsity, Pattern, Allocation],
):
    """Give every layer the weights of `prune`, with the inputs that the pruned blocks before it give."""
    layers = {layer.name: layer for layer in prunable(model)}
    levels = layer_levels([*layers.values()], *amounts)
    if pattern := amounts[1]:  # refuse before an hour of work, not in the middle of it
        for layer in layers.values():
            n_of_m(layer.weight2d()[:1], pattern, name=layer.name)
    if any(levels.values()):
        for step in calibrate(model, context.calibration, collect=collect):
            for layer_name, stats in step.stats.items():
                layer = layers[layer_name]
                layer.weight2d().copy_(prune(layer, stats, levels[layer_name]))
    return model, TechniqueResult(name, len(layers), achieved(list(layers.values())))


class MovementGate(nn.Module):
    """Pass W ∘ mask on, and sum −∂L/∂W · W as gradients come back: masked weights are scored, too."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("kept", torch.ones_like(weight), persistent=False)
        self.register_buffer("score", torch.zeros_like(weight), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weights that are left, shaped as `weight`."""
        masked = weight * self.kept
        if masked.requires_grad:
            underlying = weight.detach()

            def add(gradient: Tensor) -> None:
                self.score -= gradient * underlying  # Sanh, Wolf & Rush 2020, eq. 5: summed over the steps

            masked.register_hook(add)
        return masked


@technique("movement", 1, "Movement", "#E69F00", "P", needs=("train",), masked=True)
def movement(model, context, *, sparsity: Sparsity = None, pattern: Pattern = None):
    """Fine-tune, and zero the lowest −Σ (∂L/∂W)·W of each layer, or of every M neighbours, along the way.

    The weights that move towards zero go (Sanh, Wolf & Rush 2020). The sparsity rises along `sparsity_at`; an
    N:M pattern is laid on after `WARMUP`, and again at every step. No checkpoints: the scores have none.
    """
    target, steps, step = level_of(sparsity, pattern), context.train.steps, 0
    layers = prunable(model)
    gates = {layer.name: MovementGate(layer.module.weight.detach()) for layer in layers}
    for layer in layers:
        parametrize.register_parametrization(layer.module, "weight", gates[layer.name])

    def lay_masks(level: float, *, last: bool = False) -> None:
        for layer in layers if level else ():
            gate = gates[layer.name]
            score = gate.score.t() if layer.conv1d else gate.score
            if pattern or last:
                mask = layer_mask(score, level, pattern, name=layer.name)
            else:
                mask = lowest(score, round(level * score.numel()))
            gate.kept.copy_(~(mask.t() if layer.conv1d else mask))

    def before_forward(module: nn.Module, *_) -> None:
        nonlocal step
        if module.training:
            full = pattern and step >= WARMUP * steps
            lay_masks(target if full else sparsity_at(step / steps, target))
            step += 1

    try:
        with model.register_forward_pre_hook(before_forward):
            fit(model, replace(context.train, checkpoint=None, micro_batches=1))
    finally:
        lay_masks(target, last=True)
        for layer in layers:
            parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=True)
    return model, TechniqueResult("movement", len(layers), achieved(layers))


def sparsity_at(done: float, target: float) -> float:
    """Return the sparsity of the cubic schedule (Zhu & Gupta 2018) after the share `done` of the steps."""
    remaining = 1 - (done - WARMUP) / (1 - WARMUP - SETTLE)
    return target * (1 - min(1.0, max(0.0, remaining)) ** 3)
