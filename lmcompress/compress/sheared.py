"""A large model cut to a target shape and trained on: Sheared LLaMA (Xia et al. 2023), and its controls.

L0 masks on blocks, heads, hidden dimensions and channels are drawn from hard concrete distributions (Louizos
et al. 2018) while the model trains; Lagrange multipliers push the number of open ones to the target. The
controls take the same tokens: the units of largest weights, and the target shape from random weights.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.structured import Amount
from lmcompress.compress.target_shape import (
    KINDS,
    Masks,
    TargetShape,
    Units,
    both_sums,
    choose,
    cut,
    open_masks,
    unit_scores,
)
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.train.lora import Lora
from lmcompress.train.trainer import History, TrainSpec, fit, validation_loss

# Temperature and stretch of the hard concrete distribution (Louizos et al. 2018, section 4).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
# Where every log α starts: a mask is 0 with a chance of 1.6 %, so that the model begins nearly whole.
INITIAL_LOG_ALPHA = 2.5
# Adam moves a parameter by up to its learning rate per step. Rates are set so that over all steps of pruning
# (with the linear decay) a log α can travel this far, and a multiplier this far, however many steps there
# are.
LOG_ALPHA_TRAVEL, MULTIPLIER_TRAVEL = 20.0, 8.0
# With Adam's usual betas, masks and multipliers chase each other about the target for hundreds of steps.
CONSTRAINT_BETAS = (0.5, 0.9)
# Share of the pruning steps over which the target falls from everything to itself (Xia et al. 2023,
# appendix).
TARGET_WARMUP = 0.5
# The smallest mask folded into a unit that stays: at 0, a hidden dimension could never be learned again.
MIN_OPEN_MASK = 0.1
CURVE_POINTS = 20  # held-out losses along a run
ADAPTERS = {None: None, "lora": Lora(rank=16, alpha=32.0), "qlora": Lora(rank=16, alpha=32.0, bits=4)}


def drawn(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return hard concrete samples, in [0, 1] with mass at both ends (Louizos et al. 2018, eqs. 10 and 11).

    Args:
        uniform: numbers in (0, 1), as many as `log_alpha` has.
    """
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
        self.goal = {kind: counts[kind] / start[kind].shape[-1] for kind in KINDS}
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
        self.masks: Units = {}
        self.leaves: Units = {}

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
    """A target shape, and a run cut in two: `prune` at a constant rate, `recover` on the text that is left.

    A stage without steps is None. Pruning is not checkpointed, since its masks are not either.
    """

    target: TargetShape
    prune: TrainSpec | None
    recover: TrainSpec | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        train: TrainSpec,
        shape: TargetShape,
        *,
        share: float = 0.0,
        min_rate: float = 0.1,
        adapters: str | None = None,
    ) -> "Stages":
        """Cut `train`; see "sheared" for the arguments.

        Raises:
            BadSetting: an amount, share or kind of adapters that cannot be.
            UnknownFamily: not a LLaMA-like decoder.
        """
        if not 0 <= share <= 1 or adapters not in ADAPTERS:
            raise BadSetting(
                f"share={share}, adapters={adapters!r}: share is from 0 to 1, adapters None, lora or qlora."
            )
        target = shape.resolve(anatomy(model))
        steps = min(train.steps, max(1, round(share * train.steps))) if share else 0
        recovery_steps, split = train.steps - steps, round(len(train.features) * steps / train.steps)
        prune = recover = None
        if steps:
            warmup_steps = min(train.warmup_steps, max(1, steps // 10))
            prune = replace(train, steps=steps, features=train.features[:split], warmup_steps=warmup_steps)
            prune = replace(prune, checkpoint=None, evaluate=None, min_learning_rate=train.learning_rate)
        if recovery_steps:
            warmup_steps = min(train.warmup_steps, recovery_steps)
            recover = replace(
                train, steps=recovery_steps, features=train.features[split:], warmup_steps=warmup_steps
            )
            last_rate, every = min_rate * train.learning_rate, max(1, train.steps // CURVE_POINTS)
            recover = replace(
                recover, min_learning_rate=last_rate, evaluate_every=every, lora=ADAPTERS[adapters]
            )
        return cls(target, prune, recover)

    def require_pruning(self) -> TrainSpec:
        """Return the first stage; raise `BadSetting` where nothing is left to prune in."""
        if self.prune is None:
            raise BadSetting("share=0 leaves no steps to learn in which units to keep: give a share above 0.")
        return self.prune

    def finish(
        self, name: str, model: nn.Module, pruning: History, figures: dict
    ) -> tuple[nn.Module, TechniqueResult]:
        """Train the cut model on, and report.

        `achieved` has "shape" and "parameters"; "curve", points `[tokens, held-out loss]` from the cut on,
        the tokens that pruning saw counted; "pruning_tokens", "tokens", "seconds", "tokens_per_s" (of
        recovery); and `figures`.
        """
        before = pruning.steps[-1] if pruning.steps else {"tokens": 0, "seconds": 0.0}
        structure = anatomy(model)
        achieved = {"parameters": count_parameters(model), "shape": asdict(TargetShape.of(structure))}
        achieved |= {"pruning_tokens": before["tokens"], "tokens": before["tokens"]}
        achieved["seconds"] = before["seconds"]
        if self.recover:
            start = held_out(model, self.recover)
            history = fit(model, self.recover)
            tokens = {step["step"]: before["tokens"] + step["tokens"] for step in history.steps}
            last = history.steps[-1]
            achieved |= {"tokens": tokens[last["step"]], "seconds": before["seconds"] + last["seconds"]}
            achieved["tokens_per_s"] = last["tokens"] / last["seconds"]
            if self.recover.evaluate:
                curve = [[before["tokens"], start]]
                curve += [[tokens[point["step"]], point["loss"]] for point in history.validation]
                achieved["curve"] = [[count, round(loss, 5)] for count, loss in curve]
        return model, TechniqueResult(name, achieved["shape"]["layers"], achieved | figures)


@technique("sheared", 1, "Sheared by L0 masks", "#1F78B4", "o", needs=("train", "seed"))
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
    adapters: str | None = None,
):
    """Train with L0 masks under a constraint, cut to the target shape, train on.

    Args:
        context.train: data, steps and rate of both stages; held-out losses are recorded if it has data to
        evaluate.
        layers, heads, hidden, ffn: what is kept: whole numbers, or fractions; None keeps all.
        share: of the steps that prune; 1.0 leaves recovery to others.
        min_rate: the learning rate at the end of recovery over the peak rate; at 1.0 a curve may be read
            anywhere.
        adapters: None trains all weights in recovery; "lora"; "qlora", over 4-bit weights.
        context.seed: of the masks.

    Raises:
        BadSetting: an amount or share that cannot be.
        UnknownFamily: not a LLaMA-like decoder.
    """
    structure, shape = anatomy(model), TargetShape(layers, heads, hidden, ffn)
    stages = Stages.of(model, context.train, shape, share=share, min_rate=min_rate, adapters=adapters)
    pruning, counts = stages.require_pruning(), stages.target.units(structure)
    source_loss, masks = held_out(model, context.train), Masks(structure)
    constraint = Constraint(open_masks(structure), counts, steps=pruning.steps, seed=context.seed)

    def between(step: int, _: list[dict]) -> None:
        if step > 1:
            constraint.update(step - 1)
        masks.current = constraint.sample()

    with masks.on(model):
        history = fit(model, pruning, before_step=between)
        constraint.update(pruning.steps)
    with torch.no_grad():
        stays = choose(constraint.log_alpha, counts)
        masks.current = {
            kind: settled(log_alpha).clamp(min=MIN_OPEN_MASK) * stays[kind]
            for kind, log_alpha in constraint.log_alpha.items()
        }
        masks.fold(model)
        open_shares = {kind: float(share.mean()) for kind, share in constraint.shares().items()}
    figures = {"source_loss": source_loss, "open_shares": open_shares, "target_shares": constraint.goal}
    return stages.finish("sheared", cut(model, stays), history, figures | old_numbers(stays))


@technique("magnitude-shape", 1, "Largest weights kept", "#33A02C", "s", needs=("train",))
def magnitude_shape(
    model: nn.Module,
    context: Context,
    *,
    layers: Amount = None,
    heads: Amount = None,
    hidden: Amount = None,
    ffn: Amount = None,
    min_rate: float = 0.1,
    adapters: str | None = None,
):
    """Keep the units of largest Σ W², then train all steps: the control. Arguments as for "sheared"."""
    shape = TargetShape(layers, heads, hidden, ffn)
    stages = Stages.of(model, context.train, shape, min_rate=min_rate, adapters=adapters)
    stays = largest(model, stages.target)
    figures = {"source_loss": held_out(model, context.train)} | old_numbers(stays)
    return stages.finish("magnitude-shape", cut(model, stays), History(), figures)


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
):
    """Train random weights of the target shape on the same text: the control. Arguments as for "sheared"."""
    structure, shape = anatomy(model), TargetShape(layers, heads, hidden, ffn)
    stages = Stages.of(model, context.train, shape, min_rate=min_rate)
    config = cut(model, choose(open_masks(structure), stages.target.units(structure))).config
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        fresh = type(model)(config).to(next(model.parameters()).device)
    return stages.finish("scratch-shape", fresh, History(), {"source_loss": held_out(model, context.train)})


def largest(model: nn.Module, target: TargetShape) -> Units:
    """Return the units of largest Σ W², as many as the target has."""
    structure = anatomy(model)
    layers = [layer for block in structure.blocks for layer in block.linears] + structure.embeddings
    sums = {layer.name: both_sums(layer.module.weight.detach().square()) for layer in layers}
    return choose(unit_scores(structure, sums), target.units(structure))


def held_out(model: nn.Module, spec: TrainSpec) -> float | None:
    """Return the loss on the data that `spec` evaluates, in nats per token; None without any."""
    return validation_loss(model, spec.evaluate, spec=spec)["loss"] if spec.evaluate else None


def old_numbers(stays: Units) -> dict[str, list]:
    """Return the blocks that stay, and groups of heads of each, as they were numbered before the cut."""
    return {
        "blocks_kept": stays["layers"].nonzero().flatten().tolist(),
        "groups_kept": [row.nonzero().flatten().tolist() for row in stays["heads"]],
    }
