"""Structured pruning: the attention heads and feed-forward channels of least importance go.

Importance is what the loss would be without each, to first order, read from one gradient (Michel et al. 2019;
Molchanov et al. 2017): one forward and one backward pass per batch and iteration.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import on_device, without_cache
from lmcompress.compress.masks import Scores, smallest
from lmcompress.compress.settings import Amount
from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import LinearLayer, ModelAnatomy, anatomy, count_parameters
from lmcompress.models.surgery import keep_ffn, keep_heads
from lmcompress.train.batches import Batch, binary, token_masks
from lmcompress.train.trainer import evaluating

MIN_CHANNELS = 4  # what uneven pruning leaves of any feed-forward


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
    multiple_of: int = 1,
):
    """Remove the attention heads and feed-forward channels of least `importance`, in any family.

    Grouped-query attention loses whole groups; a group's score is the sum over its heads. Cross-attention is
    pruned, too. ALBERT's shared block is one block.

    Args:
        context.calibration: text to score on, with labels for `loss="task"`.
        heads, ffn: heads each attention keeps (a number, or a fraction below 1), and channels; None: all.
        even: False: the same totals are kept, but the least important of all blocks go; every attention
            keeps a group, every feed-forward `MIN_CHANNELS`.
        n_iters: prune in so many equal steps, scoring anew before each.
        loss: see `importance`; the dense model is the one given.
        multiple_of: channels left in a feed-forward are a multiple of it, fractions rounded: kernels are
            faster at multiples of 16 or 32.
        context.seed: of sampled labels.
    """
    goals = goals_of(anatomy(model), heads, ffn, multiple_of)
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
    """Heads an attention has and shall keep, or a feed-forward's channels; in whole groups of `group`."""

    kind: str  # "heads" or "ffn"
    present: int
    keep: int
    group: int = 1


def goals_of(structure: ModelAnatomy, heads: Amount, ffn: Amount, multiple_of: int = 1) -> dict[str, Goal]:
    """Return for each attention name, and block name for its feed-forward, what it has and shall keep."""
    if heads is None and ffn is None:
        raise BadSetting("heads and ffn are both None: say how many to keep of one, such as heads=0.5.")
    if ffn is None and multiple_of > 1:
        raise BadSetting(f"multiple_of={multiple_of} is of the channels that ffn keeps: give ffn, too.")
    units = [("heads", a.name, a.heads, a.group) for a in attentions(structure)]
    cut = [block for block in structure.blocks if ffn is not None or "ffn" in block.parts]
    units += [("ffn", block.name, block.ffn.width, multiple_of) for block in cut]
    amounts, goals = {"heads": heads, "ffn": ffn}, {}
    for kind, name, present, group in units:
        goals[name] = Goal(kind, present, resolve_amount(amounts[kind], present, group, name), group)
    return goals


def resolve_amount(amount: Amount, present: int, group: int, name: str) -> int:
    """Return the number of units that `amount` keeps of those `present`; see `heads_ffn` for both."""
    if amount is None:
        return present
    if isinstance(amount, float) and 0 < amount <= 1 and group <= present:
        return max(1, round(amount * (present // group))) * group
    if not isinstance(amount, int) or not 0 < amount <= present or amount % group:
        whole = f" in whole groups of {group}" if group > 1 else ""
        raise BadSetting(
            f"cannot keep {amount!r} of {name}, which has {present}: give a whole number from 1 to "
            f"{present}{whole}, or a fraction above 0 and up to 1.0. To remove whole blocks use drop-blocks."
        )
    return amount


def choose(
    scores: Scores, goals: dict[str, Goal], *, even: bool, step: int = 1, steps: int = 1
) -> dict[str, list[int]]:
    """Return name -> heads or channels that stay after `step` of `steps`, numbered as in the scored model."""
    keep = {}
    for kind, minimum in (("heads", 1), ("ffn", MIN_CHANNELS)):
        of_kind = {name: goal for name, goal in goals.items() if goal.kind == kind}
        if not of_kind:
            continue
        groups = {name: _groups(scores[name], goal) for name, goal in of_kind.items()}
        units = {name: scores[name][members].sum(1) for name, members in groups.items()}
        gone = {name: goal.present // goal.group - len(units[name]) for name, goal in of_kind.items()}
        to_go = {name: goal.present // goal.group - goal.keep // goal.group for name, goal in of_kind.items()}
        total = sum(to_go.values())
        until_now = step * (total // steps) + min(step, total % steps)  # the first steps take the remainder
        if even:
            removed = {
                name: smallest(units[name], math.ceil(count * until_now / max(total, 1)) - gone[name])
                for name, count in to_go.items()
            }
        else:
            for name, goal in of_kind.items():  # the best of each are beyond comparison
                protected = min(max(1, minimum // goal.group), goal.keep // goal.group)
                units[name][~smallest(units[name], len(units[name]) - protected)] = torch.inf
            lowest = smallest(torch.cat([*units.values()]), until_now - sum(gone.values()))
            removed = dict(zip(units, lowest.split([len(score) for score in units.values()])))
        for name, members in groups.items():
            keep[name] = members[~removed[name]].flatten().sort().values.tolist()
    return keep


def _groups(scores: Tensor, goal: Goal) -> Tensor:
    """Return the units that go together, `(groups, goal.group)`: neighbouring heads, channels by their rank.

    Channels that fill no whole group are those of least importance, and are left out.
    """
    by_rank = goal.kind == "ffn" and goal.group > 1
    units = scores.argsort(descending=True, stable=True) if by_rank else torch.arange(len(scores))
    return units[: len(units) // goal.group * goal.group].view(-1, goal.group)


def units_left(
    old_numbers: dict[str, list[int]], goals: dict[str, Goal], parameters: int, pruned: nn.Module
) -> dict:
    """Return the heads left by their old numbers, the channels left, and the share of `parameters`."""
    return {
        "heads_kept": {name: units for name, units in old_numbers.items() if goals[name].kind == "heads"},
        "ffn_kept": {name: len(units) for name, units in old_numbers.items() if goals[name].kind == "ffn"},
        "parameters_share": count_parameters(pruned) / parameters,
    }


@torch.enable_grad()
def importance(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    loss: str = "task",
    even: bool = True,
    dense: nn.Module | None = None,
    seed: int = 0,
) -> Scores:
    """Return how much the loss changes, to first order, without each head and each feed-forward channel.

    With g the gradient of one batch's loss, a head scores |Σ g∘W_O| over its columns of the output projection
    (the derivative of the loss by a factor on its output), a channel |Σ g∘W_out| over its column; if `even`,
    each input layer of the feed-forward adds |Σ g∘W_in + g_b b| over the channel's row (so does the gate of a
    gated one). The absolute value is taken per batch, then averaged.

    Args:
        model: any known family; put in eval mode meanwhile, on its device.
        batches: keyword arguments of the model's forward. `loss="task"` needs `labels`, -100 where none is.
        loss: "task": the model's own; "soft": cross-entropy to the output of `dense`, default `model`, whose
            gradient there is rounding noise; "sampled": to labels drawn once from that output by `seed`. The
            last two need no labels and leave padding out.
        even: with the terms of the input layers, which are left out where blocks are compared.

    Returns:
        Attention name -> `(heads,)` and block name -> `(channels,)`, float32 on the CPU. Cross-attentions
        count; blocks of experts have no channels.

    Raises:
        BadData: no batches, or no labels where they are needed.
        BadSetting: no logits to draw labels from, or a layer without a matrix.
        BadWeights: a loss or a score is NaN or infinite.
    """
    if loss not in ("task", "soft", "sampled"):
        raise BadSetting(f'loss {loss!r} is unknown; use "task", "soft" or "sampled".')
    require_labels(batches, needed=loss == "task")
    structure, generator = anatomy(model), torch.Generator().manual_seed(seed)
    terms, total = _terms(structure, even), {}
    parameters = _scored_parameters(terms)

    def loss_of(batch: Batch) -> Tensor:
        inputs = batch | without_cache(structure.kind)
        output = model(**inputs)
        if loss == "task":
            return output.loss
        logits = _logits(model, output)
        with torch.no_grad():
            reference = logits.detach() if dense is None else _logits(dense, dense(**inputs))
        mask = token_masks(batch, list(structure.stacks)[-1], structure.kind)["own"]
        if logits.dim() == 3 and mask is not None:
            logits, reference = logits[mask.bool()], reference[mask.bool()]
        target = reference.flatten(0, -2).float().softmax(-1)
        if loss == "sampled":
            target = torch.multinomial(target.cpu(), 1, generator=generator).squeeze(1).to(logits.device)
        return cross_entropy(logits.flatten(0, -2).float(), target)

    with evaluating(model), evaluating(dense or model), trainable(parameters):
        for batch in on_device(model, batches):
            batch_loss, scores = loss_of(batch), {}
            _refuse_infinite(set() if batch_loss.isfinite() else {"a calibration batch"})
            gradients = dict(zip(parameters, torch.autograd.grad(batch_loss, parameters)))
            for name, layer, dim, width in terms:
                score = _summed(layer, gradients, dim).view(-1, width).sum(1).abs()
                if layer.role == "gate-in":  # one matrix for two layers: a channel has a row in each half
                    score = score.view(2, -1).sum(0)
                scores[name] = scores.get(name, 0) + score
            total = {name: total.get(name, 0) + score / len(batches) for name, score in scores.items()}
    _refuse_infinite({name for name, score in total.items() if not score.isfinite().all()})
    return {name: score.cpu() for name, score in total.items()}


def require_labels(batches: Sequence[Batch], *, needed: bool) -> None:
    """Raise `BadData` if labels are `needed` and missing."""
    if needed and any("labels" not in batch for batch in batches):
        raise BadData(
            "the calibration batches have no labels, so there is no task loss: this model or task has none, "
            'or documents stand in for its texts. Use loss="sampled", which draws labels from the output.'
        )


def _refuse_infinite(names: set[str]) -> None:
    if names:
        raise BadWeights(
            f"the loss of, or the importance in, {', '.join(sorted(names)[:3])} is NaN or infinite: load the "
            "model in float32 or bfloat16, and see that every batch has a label that is not -100"
        )


def attentions(structure: ModelAnatomy) -> list:
    """Return the `Attention`s of all blocks, in order; self- and cross-attentions."""
    return [attention for block in structure.blocks for attention in block.attentions]


def _terms(structure: ModelAnatomy, even: bool) -> list[tuple[str, LinearLayer, int, int]]:
    """Return the terms of each score: its name, a layer, the side of its matrix, and a unit's width there."""
    terms = [(attention.name, attention.o, 0, attention.head_dim) for attention in attentions(structure)]
    for block in structure.blocks:
        if ffn := block.parts.get("ffn"):
            terms += [(block.name, layer, 1, 1) for layer in ffn.inputs if even]
            terms.append((block.name, ffn.output, 0, 1))
    return terms


def _scored_parameters(terms: list[tuple[str, LinearLayer, int, int]]) -> list[nn.Parameter]:
    """Return weights and biases whose gradients the scores read, each once."""
    parameters: list[nn.Parameter | None] = []
    for _, layer, dim, _ in terms:
        if not isinstance(getattr(layer.module, "weight", None), nn.Parameter):
            raise BadSetting(
                f"{layer.name} is a {type(layer.module).__name__} without a weight matrix: prune heads and "
                "channels before factorizing or quantizing"
            )
        parameters += [layer.module.weight, layer.module.bias if dim else None]
    return [parameter for parameter in dict.fromkeys(parameters) if parameter is not None]


@contextmanager
def trainable(parameters: Sequence[nn.Parameter], *, frozen: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Let `parameters` have gradients, and others that are `frozen` none, while inside."""
    chosen = set(parameters)
    before = {parameter: parameter.requires_grad for parameter in (*frozen, *chosen)}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)


def _logits(model: nn.Module, output) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[-1] == 1:
        raise BadSetting(
            f"a {type(output).__name__} has no distribution over labels (a regression, or a model without a "
            'head): use loss="task"'
        )
    problem = getattr(model.config, "problem_type", None)
    return binary(logits) if problem == "multi_label_classification" else logits


def _summed(layer: LinearLayer, gradients: dict[nn.Parameter, Tensor], dim: int) -> Tensor:
    """Return Σ g∘W of a layer, by input (`dim` 0) or by output (1, with its bias), in float32."""
    weight, bias = layer.module.weight, layer.module.bias
    product = weight.detach().float() * gradients[weight].float()
    sums = (product.t() if layer.conv1d else product).sum(dim)
    return sums if not dim or bias is None else sums + bias.detach().float() * gradients[bias].float()
