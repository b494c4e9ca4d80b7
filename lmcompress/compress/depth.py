"""Depth: which blocks change hidden states least, and a model without them or with others in their place.

A block is scored by its influence, 1 - cos between the hidden states that enter and leave it (Men et al.
2024, ShortGPT, eq. 1): one forward over calibration text, no gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import permutations, zip_longest

import torch
from torch import nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import on_device, without_cache
from lmcompress.errors import BadData, BadSetting, UnknownFamily
from lmcompress.models.anatomy import Block, anatomy
from lmcompress.models.surgery import drop_blocks
from lmcompress.train.batches import Batch, token_masks
from lmcompress.train.trainer import evaluating


@torch.no_grad()
def block_influence(model: nn.Module, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """Return stack -> mean of 1 - cos(h_in, h_out) over tokens (not padding) for each run of a block.

    ALBERT's shared block has a figure for each of its runs, as `surgery.drop_blocks` counts them. `batches`
    are as `calibration.calibrate` takes them; `BadData` is raised where they hold no tokens.
    """
    structure = anatomy(model)
    totals = dict.fromkeys(structure.stacks, (0,))  # tokens, and the sum of distances of each run

    def observe(stack: str, _: nn.Module, args: tuple, kwargs: dict, output) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        distance = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)
        mask = torch.ones_like(distance) if masks[stack] is None else masks[stack]
        sums.setdefault(stack, [int(mask.sum())]).append(float((distance * mask).sum()))

    with ExitStack() as hooks, evaluating(model):
        for block in structure.blocks:
            hook = partial(observe, block.stack)
            hooks.enter_context(block.module.register_forward_hook(hook, with_kwargs=True))
        for batch in on_device(model, batches):
            masks = {stack: token_masks(batch, stack, structure.kind)["own"] for stack in totals}
            sums: dict[str, list[float]] = {}
            model(**batch, **without_cache(structure.kind))
            for stack, runs in sums.items():
                totals[stack] = [a + b for a, b in zip_longest(totals[stack], runs, fillvalue=0.0)]
    if empty := [stack for stack, (tokens, *_) in totals.items() if not tokens]:
        stacks = ", ".join(empty)
        raise BadData(f"no calibration token reached the {stacks}: the batches are empty or all padding")
    return {stack: [total / tokens for total in runs] for stack, (tokens, *runs) in totals.items()}


@technique("drop-blocks", 1, "Blocks dropped", "#332288", "<", needs=("calibration",))
def drop_least_influential(
    model: nn.Module,
    context: Context,
    *,
    blocks: float | None = None,
    stack: str = "both",
    which: dict[str, list[int]] | None = None,
):
    """Drop the blocks of least influence, or those named.

    Args:
        context.calibration: text for `block_influence`; a decoder's input may come from its labels.
        blocks: how many of each chosen stack go, or which fraction of it (below 1).
        stack: of an encoder-decoder, "encoder", "decoder" or "both".
        which: stack -> positions that go, whatever their influence; then `blocks` is left out.
    """
    influence = block_influence(model, context.calibration)
    if which is None:
        if stack not in ("both", *influence):
            raise BadSetting(f'no stack {stack!r}; this model has {", ".join(influence)}, or say "both".')
        stacks = influence if stack == "both" else {stack: influence[stack]}
        which = {name: _lowest(figures, blocks, name) for name, figures in stacks.items()}
    smaller = drop_blocks(model, which)
    dropped = {name: sorted(set(positions)) for name, positions in which.items()}
    blocks_left = {name: len(runs) - len(dropped.get(name, ())) for name, runs in influence.items()}
    figures = {"dropped": dropped, "influence": influence, "blocks_left": blocks_left}
    return smaller, TechniqueResult("drop-blocks", sum(map(len, dropped.values())), figures)


def _lowest(influence: list[float], blocks: float, stack: str) -> list[int]:
    """Return positions of the `blocks` (number, or fraction below 1) lowest figures."""
    depth = len(influence)
    count = round(blocks * depth) if isinstance(blocks, float) and 0 < blocks < 1 else blocks
    if count != int(count) or not 0 < count < depth:
        legal = "at least one goes and one stays; give a whole number, or a fraction below 1"
        raise BadSetting(f"blocks={blocks!r} would drop {count} of {depth} blocks of the {stack}: {legal}.")
    return sorted(sorted(range(depth), key=influence.__getitem__)[: int(count)])


def replacement_matrix(
    model: nn.Module, score: Callable[[nn.Module], float], *, stack: str
) -> dict[str, float | list]:
    """Return what `score` gives with block j in place of block i, for every i and j, and without block i.

    A block keeps its own weights and takes masks and positions from the place it is put; T5's blocks use the
    position bias of block 0 wherever they are. The model is as before afterwards.

    Args:
        model: any known family whose blocks are modules of their own; ALBERT is an `UnknownFamily`.
        score: of a model, without a KV cache (its layer numbers would clash); called n² times for n blocks.
        stack: "encoder" or "decoder"; `BadSetting` is raised where the model has no such stack.

    Returns:
        {"dense": score, "replaced": [[score of j in place of i for j] for i], "null": [score without i
        for i]}; the diagonal of "replaced" is the dense score.
    """
    structure = anatomy(model)
    if stack not in structure.stacks:
        raise BadSetting(f"no stack {stack!r}; available: {', '.join(structure.stacks)}")
    blocks = structure.stacks[stack]
    if len({id(block.module) for block in blocks}) < 2:
        raise UnknownFamily(
            f"the {stack} of this {structure.family} model has one block module: none could take its place."
        )
    modules = model.get_submodule(blocks[0].name.rpartition(".")[0])
    dense = float(score(model))
    replaced = [[dense] * len(blocks) for _ in blocks]
    with _shared_bias(blocks):
        for i, j in permutations(range(len(blocks)), 2):
            modules[i] = blocks[j].module
            try:
                replaced[i][j] = float(score(model))
            finally:
                modules[i] = blocks[i].module
    null = [float(score(drop_blocks(model, {stack: [i]}))) for i in range(len(blocks))]
    return {"dense": dense, "replaced": replaced, "null": null}


@contextmanager
def _shared_bias(blocks: list[Block]) -> Iterator[None]:
    """Lend T5's position bias, which block 0 computes for all, to the blocks that may stand in its place."""
    first, *others = (block.attention.module for block in blocks)
    lent = [module for module in others if not getattr(module, "has_relative_attention_bias", True)]
    for module in lent:
        module.relative_attention_bias = first.relative_attention_bias
        module.has_relative_attention_bias = True
    try:
        yield
    finally:
        for module in lent:
            del module.relative_attention_bias
            module.has_relative_attention_bias = False


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the model's own loss in nats, mean over examples: a score for `replacement_matrix`."""
    options, batches = without_cache(anatomy(model).kind), on_device(model, batches)
    losses = [float(model(**batch, **options).loss) * len(batch["input_ids"]) for batch in batches]
    return sum(losses) / sum(len(batch["input_ids"]) for batch in batches)
