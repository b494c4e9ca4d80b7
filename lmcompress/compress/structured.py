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

LEAST_CHANNELS = 4  # what uneven pruning leaves of any feed-forward

Amount = int | float | None


@technique(
    name="heads-ffn",
    version=1,
    title="Heads and FFN, first order",
    colour="#56B4E9",
    marker="D",
    needs=("calibration", "seed"),
)
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
        even: False: the same totals are kept, but the least important of all blocks go. Scores are compared as
            they are; every attention keeps a group, every feed-forward `LEAST_CHANNELS`.
        n_iters: prune in so many equal steps, scoring anew before each.
        loss: see `importance`; the dense model is the one given.
        context.seed: of sampled labels.

    Raises:
        BadSetting: an amount that is not there, part of a group, or neither heads nor ffn.
        UnknownFamily: `ffn` of a mixture of experts.
    """
    wanted = goals(anatomy(model), heads, ffn)
    check_iterations(n_iters)
    pruned, left = model, {name: list(range(goal.there)) for name, goal in wanted.items()}
    for step in range(1, n_iters + 1):
        dense = model if step > 1 else None
        scores = importance(pruned, context.calibration, loss=loss, even=even, dense=dense, seed=context.seed)
        kept = choose(scores, wanted, even=even, done=step, of=n_iters)
        kept = {name: indices for name, indices in kept.items() if len(indices) < len(left[name])}
        for kind, cut in (("heads", keep_heads), ("ffn", keep_ffn)):
            pruned = cut(pruned, {name: ones for name, ones in kept.items() if wanted[name].kind == kind})
        left |= {name: [left[name][i] for i in indices] for name, indices in kept.items()}
    return pruned, TechniqueResult(
        "heads-ffn", len(wanted), achieved(left, wanted, count_parameters(model), pruned)
    )


@dataclass(frozen=True)
class Goal:
    """How many heads an attention has and shall keep (in whole groups of `group`), or channels a feed-forward."""

    kind: str  # "heads" or "ffn"
    there: int
    kept: int
    group: int = 1

    @property
    def gone(self) -> int:
        """Groups (or channels) that shall go."""
        return (self.there - self.kept) // self.group


def goals(found: ModelAnatomy, heads: Amount, ffn: Amount) -> dict[str, Goal]:
    """Attention name, and block name for its feed-forward -> what it has and what it shall keep.

    Raises:
        BadSetting: neither is asked for, or an amount is not there.
        UnknownFamily: `ffn` of a mixture of experts.
    """
    if heads is None and ffn is None:
        raise BadSetting("heads and ffn are both None: say how many to keep of one, such as heads=0.5.")
    wanted = {}
    for one in attentions(found):
        group = one.heads // one.kv_heads
        wanted[one.name] = Goal("heads", one.heads, kept_of(heads, one.heads, group, one.name), group)
    for block in found.blocks:
        if ffn is not None:
            refuse_experts(block)
        if block.ffn:
            wanted[block.name] = Goal("ffn", block.ffn.width, kept_of(ffn, block.ffn.width, 1, block.name))
    return wanted


def kept_of(asked: Amount, there: int, group: int, name: str) -> int:
    """How many of what is `there` are asked for; see `heads_ffn` for amounts and errors."""
    if asked is None:
        return there
    if isinstance(asked, float) and 0 < asked <= 1:
        return max(1, round(asked * (there // group))) * group
    if isinstance(asked, bool) or not isinstance(asked, int) or not 0 < asked <= there or asked % group:
        whole = f" in whole groups of {group}" if group > 1 else ""
        raise BadSetting(
            f"cannot keep {asked!r} of {name}, which has {there}: give a whole number from 1 to {there}{whole}, or a "
            "fraction above 0 and up to 1.0. To remove whole blocks use drop-blocks."
        )
    return asked


def check_iterations(n_iters: int) -> None:
    """Raise `BadSetting` unless `n_iters` is a whole number of at least 1."""
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < 1:
        raise BadSetting(f"n_iters={n_iters!r} is no number of steps: give a whole number, 1 for one shot.")


def choose(
    scores: Scores, wanted: dict[str, Goal], *, even: bool, done: int = 1, of: int = 1
) -> dict[str, list[int]]:
    """Name -> heads or channels, numbered as in the scored model, that stay after step `done` of `of`."""
    kept = {}
    for kind, least in (("heads", 1), ("ffn", LEAST_CHANNELS)):
        ours = {name: goal for name, goal in wanted.items() if goal.kind == kind}
        units = {name: scores[name].reshape(-1, goal.group).sum(1) for name, goal in ours.items()}
        sizes = [len(score) for score in units.values()]
        total = sum(goal.gone for goal in ours.values())
        so_far = done * (total // of) + min(done, total % of)  # the first steps take what does not divide
        if even:
            left = {
                name: g.there // g.group - math.ceil(g.gone * so_far / max(total, 1))
                for name, g in ours.items()
            }
            gone = {name: smallest(score, len(score) - left[name]) for name, score in units.items()}
        elif ours:
            for name, goal in ours.items():  # the best of each are beyond comparison
                floor = min(least, goal.kept // goal.group)
                units[name][~smallest(units[name], len(units[name]) - floor)] = torch.inf
            still = sum(sizes) - sum(g.there // g.group for g in ours.values()) + so_far
            gone = dict(zip(units, smallest(torch.cat([*units.values()]), still).split(sizes)))
        for name, goal in ours.items():
            firsts = (~gone[name]).nonzero().flatten() * goal.group
            kept[name] = [first + i for first in firsts.tolist() for i in range(goal.group)]
    return kept


def achieved(left: dict[str, list[int]], wanted: dict[str, Goal], parameters: int, pruned: nn.Module) -> dict:
    """The heads that are left of each attention by their old numbers, channels, share of the `parameters` before."""
    return {
        "heads_kept": {name: ones for name, ones in left.items() if wanted[name].kind == "heads"},
        "ffn_kept": {name: len(ones) for name, ones in left.items() if wanted[name].kind == "ffn"},
        "parameters_share": count_parameters(pruned) / parameters,
    }
