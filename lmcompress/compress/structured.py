"""Structured pruning: whole attention heads and feed-forward channels go, and the model is really smaller.

What goes is what `importance` scores lowest. Scoring costs one forward and one backward pass per batch and
iteration; a loss made from the dense model's output costs one forward more, from the second iteration on.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.importance import Scores, attentions, importance
from lmcompress.compress.masks import smallest
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import ModelAnatomy, anatomy, count_parameters, refuse_experts
from lmcompress.models.surgery import keep_ffn, keep_heads

MIN_CHANNELS = 4  # what uneven pruning leaves of any feed-forward

Amount = int | float | None


@technique("heads-ffn", 1, "Heads and FFN, first order", "#56B4E9", "D", needs=("calibration", "seed"))
def heads_ffn(
    model: nn.Module,
    context: Context,
    *,
    heads: Amount = None,
    ffn: Amount = None,
    even: bool = True,
    n_iters: int = 1,
    loss: str = "task",
):
    """Remove the attention heads and feed-forward channels of least `importance`, in any family.

    Grouped-query attention loses whole groups; a group's score is the sum over its heads. All attentions are
    pruned alike, cross-attention included. ALBERT's shared block is one block.

    Args:
        context.calibration: text to score on, with labels for `loss="task"`.
        heads: heads each attention keeps (whole number, or a fraction up to 1); None keeps all.
        ffn: channels each block keeps, likewise.
        even: False: the same totals are kept, but the least important of all blocks go. Scores are compared
            as they are; every attention keeps a group, every feed-forward `MIN_CHANNELS`.
        n_iters: prune in so many equal steps, scoring anew before each.
        loss: see `importance`; the dense model is the one given.
        context.seed: of sampled labels.

    Raises:
        BadSetting: an amount that is not there, part of a group, or neither heads nor ffn.
        UnknownFamily: `ffn` of a mixture of experts.
    """
    goals = goals_of(anatomy(model), heads, ffn)
    check_iterations(n_iters)
    pruned, old_numbers = model, {name: list(range(goal.present)) for name, goal in goals.items()}
    for step in range(1, n_iters + 1):
        dense = model if step > 1 else None
        scores = importance(pruned, context.calibration, loss=loss, even=even, dense=dense, seed=context.seed)
        keep = choose(scores, goals, even=even, step=step, steps=n_iters)
        keep = {name: units for name, units in keep.items() if len(units) < len(old_numbers[name])}
        for kind, cut in (("heads", keep_heads), ("ffn", keep_ffn)):
            pruned = cut(pruned, {name: units for name, units in keep.items() if goals[name].kind == kind})
        old_numbers |= {name: [old_numbers[name][i] for i in units] for name, units in keep.items()}
    figures = units_left(old_numbers, goals, count_parameters(model), pruned)
    return pruned, TechniqueResult("heads-ffn", len(goals), figures)


@dataclass(frozen=True)
class Goal:
    """Heads an attention has and shall keep (in whole groups of `group`), or a feed-forward's channels."""

    kind: str  # "heads" or "ffn"
    present: int
    keep: int
    group: int = 1

    @property
    def removed(self) -> int:
        """Return how many groups (or channels) shall go."""
        return (self.present - self.keep) // self.group


def goals_of(structure: ModelAnatomy, heads: Amount, ffn: Amount) -> dict[str, Goal]:
    """Return for each attention name, and block name for its feed-forward, what it has and shall keep.

    Raises:
        BadSetting: neither is asked for, or an amount is not there.
        UnknownFamily: `ffn` of a mixture of experts.
    """
    if heads is None and ffn is None:
        raise BadSetting("heads and ffn are both None: say how many to keep of one, such as heads=0.5.")
    goals = {}
    for attention in attentions(structure):
        group, present = attention.heads // attention.kv_heads, attention.heads
        keep = resolve_amount(heads, present, group, attention.name)
        goals[attention.name] = Goal("heads", present, keep, group)
    for block in structure.blocks:
        if ffn is not None:
            refuse_experts(block)
        if block.ffn:
            keep = resolve_amount(ffn, block.ffn.width, 1, block.name)
            goals[block.name] = Goal("ffn", block.ffn.width, keep)
    return goals


def resolve_amount(amount: Amount, present: int, group: int, name: str) -> int:
    """Return the number of units that `amount` keeps of those `present`.

    See `heads_ffn` for amounts and errors.
    """
    if amount is None:
        return present
    if isinstance(amount, float) and 0 < amount <= 1:
        return max(1, round(amount * (present // group))) * group
    number = isinstance(amount, int) and not isinstance(amount, bool)
    if not number or not 0 < amount <= present or amount % group:
        whole = f" in whole groups of {group}" if group > 1 else ""
        raise BadSetting(
            f"cannot keep {amount!r} of {name}, which has {present}: give a whole number from 1 to "
            f"{present}{whole}, or a fraction above 0 and up to 1.0. To remove whole blocks use drop-blocks."
        )
    return amount


def check_iterations(n_iters: int) -> None:
    """Raise `BadSetting` unless `n_iters` is a whole number of at least 1."""
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < 1:
        raise BadSetting(f"n_iters={n_iters!r} is no number of steps: give a whole number, 1 for one shot.")


def choose(
    scores: Scores, goals: dict[str, Goal], *, even: bool, step: int = 1, steps: int = 1
) -> dict[str, list[int]]:
    """Return name -> heads or channels that stay after `step` of `steps`, numbered as in the scored model."""
    keep = {}
    for kind, minimum in (("heads", 1), ("ffn", MIN_CHANNELS)):
        of_kind = {name: goal for name, goal in goals.items() if goal.kind == kind}
        if not of_kind:
            continue
        units = {name: scores[name].reshape(-1, goal.group).sum(1) for name, goal in of_kind.items()}
        sizes = [len(score) for score in units.values()]
        present = {name: goal.present // goal.group for name, goal in of_kind.items()}
        total = sum(goal.removed for goal in of_kind.values())
        until_now = step * (total // steps) + min(step, total % steps)  # the first steps take the remainder
        removed = {}
        if even:
            for name, goal in of_kind.items():
                stay = present[name] - math.ceil(goal.removed * until_now / max(total, 1))
                removed[name] = smallest(units[name], len(units[name]) - stay)
        else:
            for name, goal in of_kind.items():  # the best of each are beyond comparison
                protected = min(minimum, goal.keep // goal.group)
                units[name][~smallest(units[name], len(units[name]) - protected)] = torch.inf
            to_remove = sum(sizes) - sum(present.values()) + until_now
            lowest = smallest(torch.cat([*units.values()]), to_remove)
            removed = dict(zip(units, lowest.split(sizes)))
        for name, goal in of_kind.items():
            firsts = (~removed[name]).nonzero().flatten() * goal.group
            keep[name] = [first + i for first in firsts.tolist() for i in range(goal.group)]
    return keep


def units_left(
    old_numbers: dict[str, list[int]], goals: dict[str, Goal], parameters: int, pruned: nn.Module
) -> dict:
    """Return the heads left by their old numbers, the channels left, and the share of `parameters`."""
    return {
        "heads_kept": {name: units for name, units in old_numbers.items() if goals[name].kind == "heads"},
        "ffn_kept": {name: len(units) for name, units in old_numbers.items() if goals[name].kind == "ffn"},
        "parameters_share": count_parameters(pruned) / parameters,
    }
