"""Cut to a target shape by what adapters' gradients say of the frozen weights (LoRAPrune, Zhang et al. 2023).

The gradient of a weight is estimated from those of the two factors beside it, so that no gradient of the
weights is ever held, and the weights may be 4-bit integers. Units go a few at a time while the adapters
learn; then all is merged.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, technique
from lmcompress.compress.pruning import sparsity_at
from lmcompress.compress.sheared import Stages, held_out, old_numbers
from lmcompress.compress.structured import Amount
from lmcompress.compress.target_shape import Masks, TargetShape, Units, both_sums, choose, cut, unit_scores
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import ModelAnatomy, anatomy
from lmcompress.train.lora import Lora, adapted
from lmcompress.train.trainer import fit


@technique("lora-prune", 1, "Cut by adapters' gradients", "#E31A1C", "^", needs=("train",))
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

    What is kept comes down to the target along a cubic curve between a tenth and seven tenths of the pruning
    steps; what is gone stays gone.

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
    structure, shape = anatomy(model), TargetShape(layers, heads, hidden, ffn)
    stages = Stages.of(model, context.train, shape, share=share, min_rate=min_rate, adapters=adapters)
    if not 0 <= memory < 1:
        raise BadSetting(f"memory={memory} is no weight of what was seen before: give one from 0 to below 1.")
    rate = rate or context.train.learning_rate
    pruning = replace(stages.require_pruning(), learning_rate=rate, min_learning_rate=rate, micro_batches=1)
    source_loss, masks, average = held_out(model, context.train), Masks(structure), {}
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
    stays = choose(standing(), goal)
    figures = {"source_loss": source_loss} | old_numbers(stays)
    return stages.finish("lora-prune", cut(model, stays), history, figures)


def element_scores(a: Tensor, b: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """Return [(∇B·A + B·∇A − ∇B·∇A)ᵢⱼ · (W + s B A)ᵢⱼ]², `(out, in)` (Zhang et al. 2023, eqs. 8 and 10).

    Args:
        a, b: the factors `(rank, in)` and `(out, rank)`, with their gradients.
        weight: W `(out, in)`.
        scaling: s, what the product is multiplied by where it is added to W.
    """
    gradient = b.grad @ a + b @ a.grad - b.grad @ a.grad
    return (gradient * (weight + scaling * b @ a)).square()


@contextmanager
def scored(model: nn.Module, structure: ModelAnatomy, record: Callable[[Units], None]) -> Iterator[None]:
    """While inside, call `record` with all units' scores after every backward pass through an adapted
    `model`.

    Args:
        structure: of the model before its adapters took the places of its layers.
    """
    names, sums = [layer.name for block in structure.blocks for layer in block.linears], {}

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
            if len(sums) == len(names):
                record(unit_scores(structure, sums))
                sums.clear()

        return [factor.register_post_accumulate_grad_hook(arrived) for factor in (a, b)]

    with ExitStack() as stack:
        for name in names:
            for handle in watch(name):
                stack.callback(handle.remove)
        yield
