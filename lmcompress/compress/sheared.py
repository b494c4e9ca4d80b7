"""A large model cut to a target shape and trained on: sheared by L0 masks (Xia et al. 2024), and its controls.

Masks on blocks, heads, hidden dimensions and channels are drawn from hard concrete distributions (Louizos et al. 2018)
while the model trains, and Lagrange multipliers push how many are open to the target. The controls take the same tokens:
the units of largest weights, and the target shape from random weights. `lora_pruning` chooses by adapters' gradients.
"""

import math
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.target_shape import (
    KINDS,
    Amount,
    Masks,
    Target,
    Units,
    both_sums,
    choose,
    cut,
    open_masks,
    target_of,
    unit_scores,
    units_of,
)
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.train.lora import Lora
from lmcompress.train.trainer import History, TrainSpec, fit, validation_loss

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as in the paper
OPEN = 2.5  # log α at first: a mask is 0 with a chance of 1.6 %
SPAN, PUSH = 20.0, 8.0  # how far Adam could move a log α, and a multiplier, over all steps of pruning
CALM = (0.5, 0.9)  # Adam's betas: with the usual ones masks swing about the target for hundreds of steps
RISE = 0.5  # share of the pruning steps over which the target comes down from everything to itself
AJAR = 0.1  # the least mask of a unit that stays: at 0, a hidden dimension could never be learned again
POINTS = 20  # of the curve of held-out losses
ADAPTERS = {None: None, "lora": Lora(rank=16, alpha=32.0), "qlora": Lora(rank=16, alpha=32.0, bits=4)}


def drawn(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """A hard concrete sample, in [0, 1] with mass at both ends (Louizos et al. 2018, eqs. 10 and 11).

    Args:
        uniform: numbers in (0, 1), as many as `log_alpha` has.
    """
    return _stretched(torch.sigmoid((uniform.logit() + log_alpha) / BETA))


def open_chance(log_alpha: Tensor) -> Tensor:
    """P(mask > 0) = σ(log α − β log(−γ/ζ)); its sum is the expected L0 norm (eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def settled(log_alpha: Tensor) -> Tensor:
    """The mask without noise, for after training (eq. 13)."""
    return _stretched(torch.sigmoid(log_alpha))


def _stretched(value: Tensor) -> Tensor:
    return (value * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Constraint:
    """Log α of every unit, and two multipliers for each share that has a target: Σ λ₁(ŝ − t) + λ₂(ŝ − t)².

    ŝ is the expected open share of a kind: of the model's blocks and hidden dimensions, of every block's heads and channels.
    The masks descend, the multipliers ascend (Xia et al. 2024).
    """

    def __init__(self, start: Units, kept: dict[str, int], *, steps: int, seed: int):
        self.draw = torch.Generator().manual_seed(seed)
        self.goal = {kind: kept[kind] / start[kind].shape[-1] for kind in KINDS}
        noise = {kind: torch.randn(one.shape, generator=self.draw) for kind, one in start.items()}
        self.log_alpha = {
            kind: (OPEN + 0.01 * noise[kind].to(one.device)).requires_grad_() for kind, one in start.items()
        }
        self.multipliers = {
            kind: torch.zeros(2, *one.shape[:-1], device=one.device, requires_grad=True)
            for kind, one in start.items()
        }
        groups = [
            {"params": [*self.log_alpha.values()], "lr": 2 * SPAN / steps},
            {"params": [*self.multipliers.values()], "lr": 2 * PUSH / steps, "maximize": True},
        ]
        self.optimizer, self.steps = torch.optim.Adam(groups, betas=CALM), steps
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)
        self.masks: Units = {}
        self.leaves: Units = {}

    def sample(self) -> Units:
        """Masks for a step; their gradients are collected by `update`."""
        uniform = {kind: torch.rand(one.shape, generator=self.draw) for kind, one in self.log_alpha.items()}
        self.masks = {
            kind: drawn(one, uniform[kind].clamp(1e-6, 1 - 1e-6).to(one.device))
            for kind, one in self.log_alpha.items()
        }
        self.leaves = {kind: mask.detach().requires_grad_() for kind, mask in self.masks.items()}
        return self.leaves

    def shares(self) -> Units:
        """Expected open share of each kind: a number, or one per block."""
        return {kind: open_chance(one).mean(-1) for kind, one in self.log_alpha.items()}

    def penalty(self, step: int) -> Tensor:
        """The Lagrangian at a step, its target still on the way down from 1."""
        done, total = min(1.0, step / (RISE * self.steps)), 0.0
        for kind, share in self.shares().items():
            gap = share - (1 - done * (1 - self.goal[kind]))
            linear, square = self.multipliers[kind]
            total = total + (linear * gap + square * gap.square()).sum()
        return total

    def update(self, step: int) -> None:
        """One step of masks and multipliers, with the gradients that the model's loss left on the masks."""
        reached = {kind: leaf.grad for kind, leaf in self.leaves.items() if leaf.grad is not None}
        loss = self.penalty(step) + sum((self.masks[kind] * grad).sum() for kind, grad in reached.items())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


@technique(
    name="sheared",
    version=1,
    title="Sheared by L0 masks",
    colour="#1F78B4",
    marker="o",
    needs=("train", "seed"),
)
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
        context.train: data, steps and rate of both parts; held-out losses are recorded if it has data to evaluate.
        layers, heads, hidden, ffn: what is kept: whole numbers, or fractions; None keeps all.
        share: of the steps that prune; 1.0 leaves recovery to others.
        min_rate: the learning rate at the end of recovery over the peak rate; at 1.0 a curve may be read anywhere.
        adapters: None trains all weights in recovery; "lora"; "qlora", over 4-bit weights.
        context.seed: of the masks.

    Raises:
        BadSetting: an amount or share that cannot be.
        UnknownFamily: not a LLaMA-like decoder.
    """
    found = anatomy(model)
    target, first, rest = prepared(
        model, context.train, share, adapters, layers=layers, heads=heads, hidden=hidden, ffn=ffn
    )
    refuse_no_steps(first, share)
    source, masks = held_out(model, context.train), Masks(found)
    constraint = Constraint(open_masks(found), units_of(found, target), steps=first.steps, seed=context.seed)

    def between(step: int, _: list[dict]) -> None:
        if step > 1:
            constraint.update(step - 1)
        masks.current = constraint.sample()

    with masks.on(model):
        history = fit(model, first, before_step=between)
        constraint.update(first.steps)
    with torch.no_grad():
        kept = choose(constraint.log_alpha, units_of(found, target))
        masks.current = {
            kind: settled(one).clamp(min=AJAR) * kept[kind] for kind, one in constraint.log_alpha.items()
        }
        masks.fold(model)
        reached = {kind: float(one.mean()) for kind, one in constraint.shares().items()}
    more = {"source_loss": source, "open_shares": reached, "target_shares": constraint.goal}
    return finished("sheared", cut(model, kept), rest, history, min_rate, adapters, more | what_stayed(kept))


@technique(
    name="magnitude-shape",
    version=1,
    title="Largest weights kept",
    colour="#33A02C",
    marker="s",
    needs=("train",),
)
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
    """The control: keep the units of largest Σ W², then train all steps. Arguments as for "sheared"."""
    target, _, rest = prepared(
        model, context.train, 0.0, adapters, layers=layers, heads=heads, hidden=hidden, ffn=ffn
    )
    kept = largest(model, target)
    more = {"source_loss": held_out(model, context.train)} | what_stayed(kept)
    return finished("magnitude-shape", cut(model, kept), rest, History(), min_rate, adapters, more)


@technique(
    name="scratch-shape",
    version=1,
    title="Target shape from scratch",
    colour="#555555",
    marker="8",
    needs=("train", "seed"),
)
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
    """The control: random weights of the target shape, trained on the same text. Arguments as for "sheared"."""
    found = anatomy(model)
    target, _, rest = prepared(
        model, context.train, 0.0, None, layers=layers, heads=heads, hidden=hidden, ffn=ffn
    )
    config = cut(model, choose(open_masks(found), units_of(found, target))).config
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        fresh = type(model)(config).to(next(model.parameters()).device)
    more = {"source_loss": held_out(model, context.train)}
    return finished("scratch-shape", fresh, rest, History(), min_rate, None, more)


def largest(model: nn.Module, target: Target) -> Units:
    """The units of largest Σ W², as many as the target has."""
    found = anatomy(model)
    maps = [one for block in found.blocks for one in block.linears] + found.embeddings
    scores = unit_scores(found, {one.name: both_sums(one.module.weight.detach().square()) for one in maps})
    return choose(scores, units_of(found, target))


def prepared(
    model: nn.Module, train: TrainSpec, share: float, adapters: str | None, **asked: Amount
) -> tuple[Target, TrainSpec | None, TrainSpec | None]:
    """The target, and the run cut in two: what prunes, at a constant rate, and what recovers, on the rest of the text.

    The first part is not checkpointed, since the masks are not either; of the second only what `train` says is kept.
    """
    if not 0 <= share <= 1 or adapters not in ADAPTERS:
        raise BadSetting(
            f"share={share}, adapters={adapters!r}: share is from 0 to 1, adapters None, lora or qlora."
        )
    steps = min(train.steps, max(1, round(share * train.steps))) if share else 0
    target, at = target_of(anatomy(model), **asked), round(len(train.features) * steps / train.steps)
    warmup = {"warmup_steps": min(train.warmup_steps, max(1, steps // 10))}
    quiet = {"checkpoint": None, "evaluate": None, "min_learning_rate": train.learning_rate}
    first = replace(train, steps=steps, features=train.features[:at], **quiet, **warmup) if steps else None
    left = train.steps - steps
    warmup = {"warmup_steps": min(train.warmup_steps, left), "evaluate_every": max(1, train.steps // POINTS)}
    return target, first, replace(train, steps=left, features=train.features[at:], **warmup) if left else None


def refuse_no_steps(first: TrainSpec | None, share: float) -> None:
    """Raise `BadSetting` where nothing is left to prune in."""
    if first is None:
        raise BadSetting(
            f"share={share} leaves no steps to learn in which units to keep: give a share above 0."
        )


def finished(
    name: str, model: nn.Module, rest: TrainSpec | None, pruned: History, min_rate: float, adapters: str | None,
    more: dict,
) -> tuple[nn.Module, TechniqueResult]:  # fmt: skip
    """Train the cut model on, and say how it went.

    `achieved` has "shape" and "parameters"; "curve", points `[tokens, held-out loss]` from the cut on, the tokens that pruning
    saw counted; "pruning_tokens", "tokens", "seconds", "tokens_per_s" (of recovery).
    """
    so_far = pruned.steps[-1] if pruned.steps else {"tokens": 0, "seconds": 0.0}
    found = {"parameters": count_parameters(model), "shape": asdict(target_of(anatomy(model)))}
    found |= {"pruning_tokens": so_far["tokens"], "tokens": so_far["tokens"], "seconds": so_far["seconds"]}
    if rest:
        rest = replace(rest, min_learning_rate=min_rate * rest.learning_rate, lora=ADAPTERS[adapters])
        start = held_out(model, rest)
        steps, points = (history := fit(model, rest)).steps, history.validation
        tokens = {step["step"]: so_far["tokens"] + step["tokens"] for step in steps}
        curve = [[so_far["tokens"], start], *([tokens[one["step"]], one["loss"]] for one in points)]
        found |= {"tokens": tokens[steps[-1]["step"]], "seconds": so_far["seconds"] + steps[-1]["seconds"]}
        found |= {"tokens_per_s": steps[-1]["tokens"] / steps[-1]["seconds"]}
        found |= {"curve": [[t, round(loss, 5)] for t, loss in curve]} if rest.evaluate else {}
    return model, TechniqueResult(name, found["shape"]["layers"], found | more)


def held_out(model: nn.Module, spec: TrainSpec) -> float | None:
    """Loss on the data that `spec` evaluates, in nats per token; None without any."""
    return validation_loss(model, spec.evaluate, spec=spec)["loss"] if spec.evaluate else None


def what_stayed(kept: Units) -> dict[str, list]:
    """Blocks that stay, and groups of heads of each, by their old numbers."""
    return {
        "blocks_kept": kept["layers"].nonzero().flatten().tolist(),
        "groups_kept": [row.nonzero().flatten().tolist() for row in kept["heads"]],
    }
