"""Movement pruning: while fine-tuning, the weights that move towards zero go (Sanh, Wolf & Rush 2020)."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.pruning import Amount, achieved, amount, layer_mask
from lmcompress.models.anatomy import LinearLayer, prunable
from lmcompress.train.trainer import fit

WARMUP, SETTLE = 0.1, 0.3  # shares of the steps before the first weight goes, and after the last one went


class _Gate(nn.Module):
    """Passes W ∘ mask on, and sums −∂L/∂W · W as gradients come back: masked weights are scored, too."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("kept", torch.ones_like(weight), persistent=False)
        self.register_buffer("score", torch.zeros_like(weight), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weights that are left, `(as weight)`."""
        used = weight * self.kept
        if used.requires_grad:
            underlying = weight.detach()

            def add(gradient: Tensor) -> None:
                self.score -= gradient * underlying

            used.register_hook(add)
        return used


@technique(
    name="movement", version=1, title="Movement", colour="#E69F00", marker="P", needs=("train",), masked=True
)
def movement(model: nn.Module, context: Context, *, sparsity: Amount = None, pattern: str | None = None):
    """Fine-tune, and zero the lowest −Σ (∂L/∂W)·W of each layer, or of every M neighbours, along the way.

    The sparsity rises from 0 to its target along a cubic curve (Zhu & Gupta 2018) between a tenth and seven tenths
    of the steps; an N:M pattern is laid on at a tenth, and again at every step with the scores so far.

    Args:
        context.train: data, steps and rate; the run is not checkpointed, since the scores are not either.
        sparsity: fraction of each layer at the end.
        pattern: "2:4", "4:8" instead.
    """
    target = amount(sparsity, pattern)
    maps = prunable(model)
    gates = {one.name: _gate(one) for one in maps}
    step = 0

    def advance(module: nn.Module, *_) -> None:
        nonlocal step
        if module.training:
            level = (
                target
                if pattern and step >= WARMUP * context.train.steps
                else sparsity_at(step / context.train.steps, target)
            )
            _mask(maps, gates, level, pattern)
            step += 1

    handle = model.register_forward_pre_hook(advance)
    try:
        fit(model, replace(context.train, checkpoint=None, micro_batches=1))
    finally:
        handle.remove()
        _mask(maps, gates, target, pattern)
        for one in maps:
            parametrize.remove_parametrizations(one.module, "weight", leave_parametrized=True)
    return model, TechniqueResult("movement", len(maps), achieved(maps) if maps else {})


def sparsity_at(done: float, target: float) -> float:
    """The cubic schedule: 0 until `WARMUP`, `target` from 1 − `SETTLE` on; `done` is the share of steps so far."""
    left = 1 - (done - WARMUP) / (1 - WARMUP - SETTLE)
    return target * (1 - min(1.0, max(0.0, left)) ** 3)


def _gate(one: LinearLayer) -> _Gate:
    gate = _Gate(one.module.weight.detach())
    parametrize.register_parametrization(one.module, "weight", gate)
    return gate


@torch.no_grad()
def _mask(maps: list[LinearLayer], gates: dict[str, _Gate], level: float, pattern: str | None) -> None:
    if not level:
        return
    for one in maps:
        gate = gates[one.name]
        score = gate.score.t() if one.conv1d else gate.score
        mask = layer_mask(score, level, pattern, name=one.name)
        gate.kept.copy_(~(mask.t() if one.conv1d else mask))
