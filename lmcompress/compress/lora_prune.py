"""Cut to a target shape by what adapters' gradients say of the frozen weights (LoRAPrune, Zhang et al. 2023).

The gradient of a weight is estimated from those of the two factors beside it, so that no gradient of the weights is ever
held, and the weights may be 4-bit integers. Units go a few at a time while the adapters learn; then all is merged.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, technique
from lmcompress.compress.pruning import sparsity_at
from lmcompress.compress.sheared import finished, held_out, prepared, refuse_no_steps, what_stayed
from lmcompress.compress.target_shape import (
    Amount,
    Masks,
    Units,
    both_sums,
    choose,
    cut,
    unit_scores,
    units_of,
)
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import ModelAnatomy, anatomy
from lmcompress.train.lora import Lora, adapted
from lmcompress.train.trainer import fit


@technique(
    name="lora-prune",
    version=1,
    title="Cut by adapters' gradients",
    colour="#E31A1C",
    marker="^",
    needs=("train",),
)
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
    adapters: str | None = None,
):
    """Train adapters, take away what their gradients call unimportant along the way, merge, cut, train on.

    What is kept comes down to the target along a cubic curve between a tenth and seven tenths of the pruning steps; what
    is gone stays gone.

    Args:
        context.train, layers, heads, hidden, ffn, share, min_rate, adapters: as for "sheared".
        rank: of the adapters while pruning; α is twice that.
        bits: 4 holds the weights as NF4 integers meanwhile.
        rate: learning rate of the adapters; None takes that of `train`.
        memory: λ of the moving average of scores, λ Ḡ + (1 − λ) G.

    Raises:
        BadSetting: an amount or share that cannot be, or no steps to prune in.
        UnknownFamily: not a LLaMA-like decoder.
    """
    found = anatomy(model)
    target, first, rest = prepared(
        model, context.train, share, adapters, layers=layers, heads=heads, hidden=hidden, ffn=ffn
    )
    refuse_no_steps(first, share)
    if not 0 <= memory < 1:
        raise BadSetting(f"memory={memory} is no weight of what was seen before: give one from 0 to below 1.")
    rate = rate or context.train.learning_rate
    first = replace(first, learning_rate=rate, min_learning_rate=rate, micro_batches=1)
    source, masks, average = held_out(model, context.train), Masks(found), {}
    there, goal = units_of(found), units_of(found, target)

    def record(scores: Units) -> None:
        for kind, score in scores.items():
            average[kind] = memory * average[kind] + (1 - memory) * score if kind in average else score

    def standing() -> Units:
        return {kind: score.where(masks.current[kind] > 0, -1.0) for kind, score in average.items()}

    def between(step: int, _: list[dict]) -> None:
        if average:
            done = sparsity_at(step / first.steps, 1.0)
            now = {kind: there[kind] - round(done * (there[kind] - goal[kind])) for kind in there}
            masks.current = {kind: kept.float() for kind, kept in choose(standing(), now).items()}

    lora = Lora(rank=rank, alpha=2.0 * rank, bits=bits)
    with adapted(model, lora), masks.on(model), scored(model, found, record):
        history = fit(model, first, before_step=between)
    kept = choose(standing(), goal)
    more = {"source_loss": source} | what_stayed(kept)
    return finished("lora-prune", cut(model, kept), rest, history, min_rate, adapters, more)


def element_scores(a: Tensor, b: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """[(∇B·A + B·∇A − ∇B·∇A)ᵢⱼ · (W + s B A)ᵢⱼ]², `(out, in)`, as in the paper.

    Args:
        a, b: the factors `(rank, in)` and `(out, rank)`, with their gradients.
        weight: W `(out, in)`.
        scaling: s, what the product is multiplied by where it is added to W.
    """
    gradient = b.grad @ a + b @ a.grad - b.grad @ a.grad
    return (gradient * (weight + scaling * b @ a)).square()


@contextmanager
def scored(model: nn.Module, found: ModelAnatomy, record: Callable[[Units], None]) -> Iterator[None]:
    """Call `record` with the scores of all units after every backward pass through an adapted `model`, while inside.

    Args:
        found: of the model before its adapters took the places of its maps.
    """
    maps, sums = [one for block in found.blocks for one in block.linears], {}

    def watch(name: str) -> list:
        layer = model.get_submodule(name)
        adapter, base = layer.active_adapter[0], layer.get_base_layer()
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

        @torch.no_grad()
        def arrived(_: Tensor) -> None:
            if a.grad is None or b.grad is None:
                return
            weight = base.dequantized() if base.weight is None else base.weight
            sums[name] = both_sums(element_scores(a, b, weight, layer.scaling[adapter]))
            if len(sums) == len(maps):
                record(unit_scores(found, sums))
                sums.clear()

        return [one.register_post_accumulate_grad_hook(arrived) for one in (a, b)]

    with ExitStack() as stack:
        for one in maps:
            for handle in watch(one.name):
                stack.callback(handle.remove)
        yield
