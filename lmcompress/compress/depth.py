"""Depth: which blocks change hidden states least, and a model without them or with others in their place.

A block is scored by its influence, 1 - cos between the hidden states that enter and leave it (Men et al.
2024, ShortGPT, eq. 1): one forward over calibration text, no gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import Batch
from lmcompress.errors import BadData, BadSetting, UnknownFamily
from lmcompress.models.anatomy import Block, ModelAnatomy, anatomy
from lmcompress.models.surgery import drop_blocks
from lmcompress.train.batches import token_masks


@torch.no_grad()
def block_influence(model: nn.Module, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """Return stack -> mean of 1 - cos(h_in, h_out) over tokens (not padding) for each run of a block.

    ALBERT's shared block has a figure for each of its runs, as `surgery.drop_blocks` counts them.

    Args:
        model: any known family; put in eval mode meanwhile.
        batches: as `calibration.calibrate` takes them.

    Raises:
        BadData: no batches, or no tokens in them.
    """
    structure, training = anatomy(model), model.training
    device = next(model.parameters()).device
    sums: dict[str, list[float]] = {stack: [] for stack in structure.stacks}
    tokens = dict.fromkeys(structure.stacks, 0)
    model.eval()
    try:
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            masks = {stack: token_masks(batch, stack, structure.kind)["own"] for stack in structure.stacks}
            for stack, runs in _distances(model, structure, batch).items():
                mask = torch.ones_like(runs[0]) if masks[stack] is None else masks[stack]
                tokens[stack] += int(mask.sum())
                new = [float((run * mask).sum()) for run in runs]
                sums[stack] = [a + b for a, b in zip(sums[stack] or [0.0] * len(new), new, strict=True)]
    finally:
        model.train(training)
    if empty := [stack for stack, count in tokens.items() if not count]:
        raise BadData(
            f"no calibration token reached the {', '.join(empty)}: the batches are empty or all padding"
        )
    return {stack: [total / tokens[stack] for total in runs] for stack, runs in sums.items()}


def _distances(model: nn.Module, structure: ModelAnatomy, batch: Batch) -> dict[str, list[Tensor]]:
    """Return stack -> 1 - cos of input and output, `(batch, seq)` in float64, for each run of a block."""
    runs: dict[str, list[Tensor]] = {stack: [] for stack in structure.stacks}

    def observe(stack: str):
        def hook(_: nn.Module, args: tuple, kwargs: dict, output) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            runs[stack].append(1 - torch.cosine_similarity(before.double(), after.double(), dim=-1))

        return hook

    handles = [
        block.module.register_forward_hook(observe(block.stack), with_kwargs=True)
        for block in structure.blocks
    ]
    try:
        model(**batch, **({} if structure.kind == "encoder" else {"use_cache": False}))
    finally:
        for handle in handles:
            handle.remove()
    return runs


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
        context.calibration: text for `block_influence`; labels are not read, but a decoder's input may come
        from them.
        blocks: how many of each chosen stack go, or which fraction of it (below 1).
        stack: of an encoder-decoder, "encoder", "decoder" or "both".
        which: stack -> positions that go, whatever their influence; then `blocks` is left out.

    Raises:
        BadSetting: both or neither of `blocks` and `which`, no block gone or none left, or an unknown stack.
    """
    influence = block_influence(model, context.calibration)
    if (blocks is None) == (which is None):
        raise BadSetting(f"blocks={blocks!r} and which={which!r}: give one of them, such as blocks=1.")
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
    if isinstance(count, bool) or count != int(count) or not 0 < count < depth:
        raise BadSetting(
            f"blocks={blocks!r} would drop {count} of the {depth} blocks of the {stack}: at least one goes "
            "and one stays; give a whole number, or a fraction below 1."
        )
    return sorted(sorted(range(depth), key=influence.__getitem__)[: int(count)])


def replacement_matrix(
    model: nn.Module, score: Callable[[nn.Module], float], *, stack: str
) -> dict[str, float | list]:
    """Return what `score` gives with block j in place of block i, for every i and j, and without block i.

    A block keeps its own weights and takes masks and positions from the place it is put; T5's blocks use the
    position bias of block 0 wherever they are. The model is as before afterwards, whatever `score` raises.

    Args:
        model: any known family whose blocks are modules of their own.
        score: of a model, without a KV cache (its layer numbers would clash); called n² times for n blocks.
        stack: "encoder" or "decoder".

    Returns:
        {"dense": score, "replaced": [[score of j in place of i for j] for i], "null": [score without i for
        i]}; the diagonal of "replaced" is the dense score.

    Raises:
        BadSetting: the model has no such stack.
        UnknownFamily: fewer than two modules: ALBERT runs one block over and over.
    """
    structure = anatomy(model)
    if stack not in structure.stacks:
        raise BadSetting(f"no stack {stack!r}; available: {', '.join(structure.stacks)}")
    blocks = structure.stacks[stack]
    if len({id(block.module) for block in blocks}) < 2:
        raise UnknownFamily(
            f"the {stack} of this {structure.family} model has one block module: there is nothing to put in "
            f"its place."
        )
    modules = model.get_submodule(blocks[0].name.rpartition(".")[0])
    dense = float(score(model))
    replaced = [[dense] * len(blocks) for _ in blocks]
    with _shared_bias(blocks):
        for i, j in ((i, j) for i in range(len(blocks)) for j in range(len(blocks)) if i != j):
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
    first = blocks[0].attention.module
    lent = [
        b.attention.module
        for b in blocks
        if not getattr(b.attention.module, "has_relative_attention_bias", True)
    ]
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
    device = next(model.parameters()).device
    options = {} if anatomy(model).kind == "encoder" else {"use_cache": False}
    total = 0.0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        total += float(model(**batch, **options).loss) * len(batch["input_ids"])
    return total / sum(len(batch["input_ids"]) for batch in batches)
