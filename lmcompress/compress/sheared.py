"""A large model cut to a target shape and trained on: Sheared LLaMA, LoRAPrune, and their controls.

Sheared LLaMA (Xia et al. 2023): L0 masks on all units, drawn from hard concrete distributions (Louizos et al.
2018) while the model trains; Lagrange multipliers push the number of open ones to the target. LoRAPrune
(Zhang et al. 2023): units go a few at a time by what the gradients of adapters say of the frozen weights.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.pruning import sparsity_at
from lmcompress.compress.settings import Amount
from lmcompress.compress.target_shape import Masks, TargetShape, Units, both_sums, choose, cut, unit_scores
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import ModelAnatomy, anatomy, count_parameters
from lmcompress.train.lora import Lora, adapted
from lmcompress.train.trainer import History, TrainSpec, fit, validation_loss

# Temperature and stretch of the hard concrete distribution (Louizos et al. 2018, section 4).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
# Where every log α starts: a mask is 0 with a chance of 1.6 %, so that the model begins nearly whole.
INITIAL_LOG_ALPHA = 2.5
# Adam moves a parameter by up to its learning rate per step. Rates are set so that over all steps of pruning
# (with the linear decay) a log α and a multiplier can travel this far, however many steps there are.
LOG_ALPHA_TRAVEL, MULTIPLIER_TRAVEL = 20.0, 8.0
# With Adam's usual betas, masks and multipliers chase each other about the target for hundreds of steps.
CONSTRAINT_BETAS = (0.5, 0.9)
# Share of the pruning steps over which the target falls from everything to itself (Xia et al., appendix).
TARGET_WARMUP = 0.5
# The smallest mask folded into a unit that stays: at 0, a hidden dimension could never be learned again.
MIN_OPEN_MASK = 0.1
CURVE_POINTS = 20  # held-out losses along a run
Adapters = Literal["lora", "qlora"] | None
ADAPTERS = {None: None, "lora": Lora(rank=16, alpha=32.0), "qlora": Lora(rank=16, alpha=32.0, bits=4)}


def drawn(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return hard concrete samples (Louizos et al. 2018, eqs. 10, 11) for `uniform` numbers in (0, 1)."""
    return _stretched(torch.sigmoid((uniform.logit() + log_alpha) / BETA))


def open_chance(log_alpha: Tensor) -> Tensor:
    """Return P(mask > 0) = σ(log α − β log(−γ/ζ)); its sum is the expected L0 norm (eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def settled(log_alpha: Tensor) -> Tensor:
    """Return the mask without noise, for after training (eq. 13)."""
    return _stretched(torch.sigmoid(log_alpha))


def _stretched(probability: Tensor) -> Tensor:
    return (probability * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Constraint:
    """Log α of every unit, and two multipliers for each share that has a target: Σ λ₁(ŝ − t) + λ₂(ŝ − t)².

    ŝ is the expected open share of a kind: of the model's blocks and hidden dimensions, of every block's
    heads and channels. The masks descend, the multipliers ascend (Xia et al. 2023, eq. 2).
    """

    def __init__(self, start: Units, counts: dict[str, int], *, steps: int, seed: int):
        self.draw = torch.Generator().manual_seed(seed)
        self.goal = {kind: counts[kind] / mask.shape[-1] for kind, mask in start.items()}
        self.log_alpha, self.multipliers = {}, {}
        for kind, mask in start.items():
            noise = torch.randn(mask.shape, generator=self.draw).to(mask.device)
            self.log_alpha[kind] = (INITIAL_LOG_ALPHA + 0.01 * noise).requires_grad_()
            self.multipliers[kind] = mask.new_zeros(2, *mask.shape[:-1]).requires_grad_()
        groups = [
            {"params": [*self.log_alpha.values()], "lr": 2 * LOG_ALPHA_TRAVEL / steps},
            {"params": [*self.multipliers.values()], "lr": 2 * MULTIPLIER_TRAVEL / steps, "maximize": True},
        ]
        self.optimizer, self.steps = torch.optim.Adam(groups, betas=CONSTRAINT_BETAS), steps
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)
        self.masks, self.leaves = {}, {}

    def sample(self) -> Units:
        """Draw masks for a step; their gradients are collected by `update`."""
        for kind, log_alpha in self.log_alpha.items():
            uniform = torch.rand(log_alpha.shape, generator=self.draw).clamp(1e-6, 1 - 1e-6)
            self.masks[kind] = drawn(log_alpha, uniform.to(log_alpha.device))
        self.leaves = {kind: mask.detach().requires_grad_() for kind, mask in self.masks.items()}
        return self.leaves

    def shares(self) -> Units:
        """Return the expected open share of each kind: a number, or one per block."""
        return {kind: open_chance(log_alpha).mean(-1) for kind, log_alpha in self.log_alpha.items()}

    def penalty(self, step: int) -> Tensor:
        """Return the Lagrangian at a step, its target still on the way down from 1."""
        progress, total = min(1.0, step / (TARGET_WARMUP * self.steps)), 0.0
        for kind, share in self.shares().items():
            gap = share - (1 - progress * (1 - self.goal[kind]))
            linear, square = self.multipliers[kind]
            total = total + (linear * gap + square * gap.square()).sum()
        return total

    def update(self, step: int) -> None:
        """Step masks and multipliers, with the gradients that the model's loss left on the masks."""
        gradients = {kind: leaf.grad for kind, leaf in self.leaves.items() if leaf.grad is not None}
        loss = self.penalty(step) + sum((self.masks[kind] * grad).sum() for kind, grad in gradients.items())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


@dataclass(frozen=True)
class Stages:
    """A target shape, and a run cut in two; a stage without steps is None."""

    target: TargetShape
    source_loss: float | None  # held-out, of the model before
    prune: TrainSpec | None  # at a constant rate, without checkpoints, since masks have none either
    recover: TrainSpec | None  # on the text that is left

    @classmethod
    def of(
        cls,
        model: nn.Module,
        train: TrainSpec,
        target: TargetShape,
        min_rate: float,
        adapters: Adapters = None,
        *,
        share: float | None = None,
        multiple_of: int = 1,
    ) -> "Stages":
        """Cut `train`; see "sheared" for the arguments. A `share` of None leaves nothing to prune in."""
        target = target.resolve(anatomy(model), multiple_of)
        if share == 0:
            raise BadSetting("share=0 leaves no steps to learn in which units to keep: give a share above 0.")
        steps = 0 if share is None else min(train.steps, max(1, round(share * train.steps)))
        recovery_steps, split = train.steps - steps, round(len(train.features) * steps / train.steps)
        prune = recover = None
        if steps:
            warmup_steps = min(train.warmup_steps, max(1, steps // 10))
            prune = replace(train, steps=steps, features=train.features[:split], warmup_steps=warmup_steps)
            prune = replace(prune, checkpoint=None, evaluate=None, min_learning_rate=train.learning_rate)
        if recovery_steps:
            changes = {"steps": recovery_steps, "features": train.features[split:]}
            changes["warmup_steps"] = min(train.warmup_steps, recovery_steps)
            changes |= {"evaluate_every": max(1, train.steps // CURVE_POINTS), "lora": ADAPTERS[adapters]}
            recover = replace(train, min_learning_rate=min_rate * train.learning_rate, **changes)
        return cls(target, held_out(model, train), prune, recover)

    def finish(
        self, name: str, model: nn.Module, stays: Units | None, pruning: History | None = None, **figures
    ) -> tuple[nn.Module, TechniqueResult]:
        """Cut the model to the units in `stays` (None: it has the shape), train it on, and report.

        `achieved` has "shape" and "parameters"; "curve", points `[tokens, held-out loss]` from the cut on,
        the tokens that pruning saw counted; "pruning_tokens", "tokens", "seconds", "tokens_per_s" (of
        recovery); "source_loss", `figures`, and blocks and groups of heads that stay, numbered as before.
        """
        if stays is not None:
            model = cut(model, stays)
            figures["blocks_kept"] = stays["layers"].nonzero().flatten().tolist()
            figures["groups_kept"] = [row.nonzero().flatten().tolist() for row in stays["heads"]]
        before = pruning.steps[-1] if pruning else {"tokens": 0, "seconds": 0.0}
        shape = asdict(TargetShape.of(anatomy(model)))
        achieved = {"parameters": count_parameters(model), "shape": shape}
        achieved |= {
            "pruning_tokens": before["tokens"],
            "tokens": before["tokens"],
            "seconds": before["seconds"],
        }
        if self.recover:
            start = held_out(model, self.recover)
            history = fit(model, self.recover)
            tokens = {step["step"]: before["tokens"] + step["tokens"] for step in history.steps}
            last = history.steps[-1]
            achieved |= {"tokens": tokens[last["step"]], "seconds": before["seconds"] + last["seconds"]}
            achieved["tokens_per_s"] = last["tokens"] / last["seconds"]
            if self.recover.evaluate:
                curve = [(tokens[point["step"]], point["loss"]) for point in history.validation]
                curve = [(before["tokens"], start), *curve]
                achieved["curve"] = [[count, round(loss, 5)] for count, loss in curve]
        achieved |= {"source_loss": self.source_loss} | figures
        return model, TechniqueResult(name, shape["layers"], achieved)


@technique("sheared", 1, "Sheared LLaMA (L0 masks)", "#1F78B4", "o", needs=("train", "seed"))
def sheared(
    model: nn.Module,
    context: Context,
    *,
    layers: Amount = None,
    heads: Amount = None,
    hidden: Amount = None,
    ffn: Amount = None,
    share: float = 0.2,
    min_rate: float = 0.1,
    adapters: Adapters = None,
    multiple_of: int = 1,
):
    """Train with L0 masks under a constraint, cut to the target shape, train on.

    Args:
        context.train: data, steps and rate of both stages; held-out losses if it has data to evaluate.
        layers, heads, hidden, ffn: what is kept: whole numbers, or fractions; None keeps all.
        share: of the steps that prune; 1.0 leaves recovery to others.
        min_rate: the learning rate at the end over the peak rate; at 1.0 a curve may be read anywhere.
        adapters: None trains all weights in recovery; "lora"; "qlora", over 4-bit weights.
        multiple_of: hidden dimensions and channels that are cut are a multiple of it, fractions rounded.
        context.seed: of the masks.
    """
    structure, shape = anatomy(model), TargetShape(layers, heads, hidden, ffn)
    how = {"share": share, "multiple_of": multiple_of}
    stages = Stages.of(model, context.train, shape, min_rate, adapters, **how)
    counts, masks = stages.target.units(structure), Masks(structure)
    constraint = Constraint(masks.current, counts, steps=stages.prune.steps, seed=context.seed)

    def between(step: int, _: list[dict]) -> None:
        if step > 1:
            constraint.update(step - 1)
        masks.current = constraint.sample()

    with masks.on(model):
        history = fit(model, stages.prune, before_step=between)
        constraint.update(stages.prune.steps)
    with torch.no_grad():
        stays = choose(constraint.log_alpha, counts)
        masks.current = {
            kind: settled(log_alpha).clamp(min=MIN_OPEN_MASK) * stays[kind]
            for kind, log_alpha in constraint.log_alpha.items()
        }
        masks.fold(model)
        open_shares = {kind: float(share.mean()) for kind, share in constraint.shares().items()}
    figures = {"open_shares": open_shares, "target_shares": constraint.goal}
    return stages.finish("sheared", model, stays, history, **figures)


@technique("magnitude-shape", 1, "Magnitude structured pruning", "#33A02C", "s", needs=("train",))
def magnitude_shape(
    model: nn.Module,
    context: Context,
    *,
    layers: Amount = None,
    heads: Amount = None,
    hidden: Amount = None,
    ffn: Amount = None,
    min_rate: float = 0.1,
    adapters: Adapters = None,
    multiple_of: int = 1,
):
    """Keep the units of largest Σ W², then train all steps: the control. Arguments as for "sheared"."""
    shape = TargetShape(layers, heads, hidden, ffn)
    stages = Stages.of(model, context.train, shape, min_rate, adapters, multiple_of=multiple_of)
    return stages.finish("magnitude-shape", model, largest(model, stages.target))


@technique("scratch-shape", 1, "Target shape from scratch", "#555555", "8", needs=("train", "seed"))
def scratch_shape(
    model: nn.Module,
    context: Context,
    *,
    layers: Amount = None,
    heads: Amount = None,
    hidden: Amount = None,
    ffn: Amount = None,
    min_rate: float = 0.1,
    multiple_of: int = 1,
):
    """Train random weights of the target shape on the same text: the control. Arguments as for "sheared"."""
    structure, shape = anatomy(model), TargetShape(layers, heads, hidden, ffn)
    stages = Stages.of(model, context.train, shape, min_rate, multiple_of=multiple_of)
    config = cut(model, choose(Masks(structure).current, stages.target.units(structure))).config
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        fresh = type(model)(config).to(next(model.parameters()).device)
    return stages.finish("scratch-shape", fresh, None)


def largest(model: nn.Module, target: TargetShape) -> Units:
    """Return the units of largest Σ W², as many as the target has."""
    structure = anatomy(model)
    layers = [layer for block in structure.blocks for layer in block.linears] + structure.embeddings
    sums = {layer.name: both_sums(layer.module.weight.detach().square()) for layer in layers}
    return choose(unit_scores(structure, sums), target.units(structure))


def held_out(model: nn.Module, spec: TrainSpec) -> float | None:
    """Return the loss on the data that `spec` evaluates, in nats per token; None without any."""
    return validation_loss(model, spec.evaluate, spec=spec)["loss"] if spec.evaluate else None


@technique("lora-prune", 1, "LoRAPrune", "#E31A1C", "^", needs=("train",))
def lora_prune(
    model: nn.Module,
    context: Context,
    *,
    layers: Amount = None,
    heads: Amount = None,
    hidden: Amount = None,
    ffn: Amount = None,
    share: float = 0.2,
    rank: int = 16,
    bits: int | None = None,
    rate: float | None = None,
    memory: float = 0.9,
    min_rate: float = 0.1,
    adapters: Adapters = None,
    multiple_of: int = 1,
):
    """Train adapters, take away what their gradients call unimportant along the way, merge, cut, train on.

    The gradient of a weight is estimated from those of the two factors beside it: none of the weights is ever
    held, and they may be 4-bit integers. What is kept comes down to the target along a cubic curve between a
    tenth and seven tenths of the pruning steps; what is gone stays gone.

    Args:
        context.train, layers, heads, hidden, ffn, share, min_rate, adapters, multiple_of: as for "sheared".
        rank: of the adapters while pruning; α is twice that.
        bits: 4 holds the weights as NF4 integers meanwhile.
        rate: learning rate of the adapters; None takes that of `train`.
        memory: λ of the moving average of scores, λ Ḡ + (1 − λ) G.
    """
    structure, shape = anatomy(model), TargetShape(layers, heads, hidden, ffn)
    how = {"share": share, "multiple_of": multiple_of}
    stages = Stages.of(model, context.train, shape, min_rate, adapters, **how)
    rate = rate or context.train.learning_rate
    pruning = replace(stages.prune, learning_rate=rate, min_learning_rate=rate, micro_batches=1)
    masks, average = Masks(structure), {}
    full, goal = TargetShape.of(structure).units(structure), stages.target.units(structure)

    def record(scores: Units) -> None:
        for kind, score in scores.items():
            average[kind] = memory * average[kind] + (1 - memory) * score if kind in average else score

    def standing() -> Units:
        return {kind: score.where(masks.current[kind] > 0, -1.0) for kind, score in average.items()}

    def between(step: int, _: list[dict]) -> None:
        if average:
            progress = sparsity_at(step / pruning.steps, 1.0)
            counts = {kind: full[kind] - round(progress * (full[kind] - goal[kind])) for kind in full}
            masks.current = {kind: stays.float() for kind, stays in choose(standing(), counts).items()}

    lora = Lora(rank=rank, alpha=2.0 * rank, bits=bits)
    with adapted(model, lora), masks.on(model), scored(model, structure, record):
        history = fit(model, pruning, before_step=between)
    return stages.finish("lora-prune", model, choose(standing(), goal), history)


def element_scores(a: Tensor, b: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """Return [(∇B·A + B·∇A − ∇B·∇A)ᵢⱼ · (W + s B A)ᵢⱼ]², `(out, in)` (Zhang et al. 2023, eqs. 8 and 10).

    The factors A `(rank, in)` and B `(out, rank)` have gradients; s is `scaling`.
    """
    gradient = b.grad @ a + b @ a.grad - b.grad @ a.grad
    return (gradient * (weight + scaling * b @ a)).square()


@contextmanager
def scored(model: nn.Module, structure: ModelAnatomy, record: Callable[[Units], None]) -> Iterator[None]:
    """Call `record` with all units' scores after every backward pass through an adapted model while inside.

    `structure` is that of the model before adapters took the places of its layers.
    """
    names, sums = [layer.name for block in structure.blocks for layer in block.linears], {}

    @torch.no_grad()
    def arrived(name: str, a: Tensor, b: Tensor, _: Tensor) -> None:
        if a.grad is None or b.grad is None:
            return
        layer = model.get_submodule(name)
        base, scaling = layer.get_base_layer(), layer.scaling[layer.active_adapter[0]]
        weight = base.dequantized() if base.weight is None else base.weight
        sums[name] = both_sums(element_scores(a, b, weight, scaling))
        if len(sums) == len(names):
            record(unit_scores(structure, sums))
            sums.clear()

    with ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            factors = [side[layer.active_adapter[0]].weight for side in (layer.lora_A, layer.lora_B)]
            for factor in factors:
                hook = partial(arrived, name, *factors)
                hooks.enter_context(factor.register_post_accumulate_grad_hook(hook))
        yield
