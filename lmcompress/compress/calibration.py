"""What each linear map sees: input norms and second moments over calibration text, block by block.

Pruning and quantization that look at activations need, for every block, the inputs that the already
compressed blocks before it give. So blocks run one at a time over all batches, and only the hidden states
between two blocks are kept: memory does not grow with the number of blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.compress.replay import Call, record_calls, run, segments
from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import Block, LinearLayer, ModelAnatomy, anatomy, weighted
from lmcompress.train.batches import token_masks

Batch = dict[str, Tensor]


@dataclass
class Stats:
    """Over the tokens that are not padding, X being `(tokens, in)`; accumulated in float32.

    `norm_sq` `(in,)`: sum of squares per input, diag(XᵀX). `gram` `(in, in)`: XᵀX. None if not collected.
    `rows`: X itself, in pieces; maps that read the same inputs hold the same tensors.
    """

    norm_sq: Tensor | None = None
    gram: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    tokens: int = 0


@dataclass
class BlockStep:
    """One block whose turn it is, and the statistics of its maps by name."""

    block: Block
    stats: dict[str, Stats]


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Sequence[Batch], *, collect: Sequence[str] = ("norm", "gram")
) -> Iterator[BlockStep]:
    """Yield each block with the statistics of its inputs; go on from the block as the consumer leaves it.

    The consumer may change the block's weights, or replace maps inside it, before it asks for the next. A
    stack of an encoder-decoder starts when the one before is finished: the decoder reads what the changed
    encoder gives. Blocks that share a module run together: ALBERT's shared block is yielded once, its
    statistics summed over all its runs. A map shared by several blocks comes with the first of them only.

    Args:
        model: any known family; put in eval mode meanwhile. Everything stays on its device.
        batches: keyword arguments of the model's forward, with `attention_mask` `(batch, seq)` where rows
            are padded. Decoder positions of an encoder-decoder count where `decoder_attention_mask`, else
            `labels` (not -100), says so.
        collect: some of "norm", "gram" and "rows"; a gram takes `in * in * 4` bytes per map of one block, rows take
            `tokens * in * 4` per input of one block.

    Raises:
        BadData: no batches, or no tokens in them.
        BadSetting: nothing or something unknown to collect.
        BadWeights: an activation is NaN or infinite.
    """
    if not collect or set(collect) - {"norm", "gram", "rows"}:
        raise BadSetting(f'collect is {list(collect)!r}; it takes some of "norm", "gram" and "rows"')
    device = next(model.parameters()).device
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    if not batches:
        raise BadData("no calibration batches: give at least one dictionary of tensors, such as input_ids")
    found, training = anatomy(model), model.training
    model.eval()
    try:
        before: list[Any] = [None] * len(batches)
        for stack in found.stacks:
            tapes = [
                record_calls(model, found, stack, one, done)
                for one, done in zip(batches, before, strict=True)
            ]
            masks = [token_masks(batch, stack, found.kind) for batch in batches]
            before = yield from _stack_steps(found, stack, tapes, masks, collect)
    finally:
        model.train(training)


def _stack_steps(
    found: ModelAnatomy,
    stack: str,
    tapes: list[tuple[list[Call], Tensor]],
    masks: list,
    collect: Sequence[str],
) -> Iterator[BlockStep]:
    """Yield the steps of one stack; return the last block's output per batch."""
    calls, states = [tape for tape, _ in tapes], [start for _, start in tapes]
    tapes.clear()  # the first hidden states are not needed longer than any others
    by_module = {id(block.module): block for block in reversed(found.stacks[stack])}
    owned = _maps_by_first_block(found)
    for first, last in segments(calls[0]):
        turn = dict.fromkeys(id(call.module) for call in calls[0][first:last])
        blocks = [by_module[one] for one in turn]
        stats = {block.name: {one.name: Stats() for one in owned[block.name]} for block in blocks}
        for tape, state, mask in zip(calls, states, masks, strict=True):
            with _observed(blocks, owned, stats, mask, collect):
                run(tape[first:last], state)
        for block in blocks:
            _check(stats[block.name])
            yield BlockStep(block, stats.pop(block.name))
        for i, tape in enumerate(calls):
            states[i] = run(tape[first:last], states[i])
    return states


def _maps_by_first_block(found: ModelAnatomy) -> dict[str, list[LinearLayer]]:
    """Block name -> its maps that have a matrix and belong to no block before it."""
    seen: set[int] = set()
    owned: dict[str, list[LinearLayer]] = {}
    for block in found.blocks:
        owned[block.name] = []
        for one in (inner for outer in block.linears for inner in weighted(outer)):
            if id(one.module.weight) not in seen:
                seen.add(id(one.module.weight))
                owned[block.name].append(one)
    return owned


@contextmanager
def _observed(
    blocks: list[Block], owned: dict, stats: dict[str, dict[str, Stats]], masks: dict, collect: Sequence[str]
) -> Iterator[None]:
    """Add what enters the maps of `blocks` to `stats` while inside."""
    last: dict[str, Any] = {}  # q, k and v (in and gate) read one tensor: count it once

    def observe(one: LinearLayer, stat: Stats):
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if last.get("x") is not x:
                other = one.kind == "cross-attention" and one.role in ("k", "v")
                last.update(x=x, **_moments(x, masks["other" if other else "own"], collect))
            stat.tokens += last["tokens"]
            stat.rows += last["rows"]
            for name in ("norm_sq", "gram"):
                if last[name] is not None:
                    sum_so_far = getattr(stat, name)
                    setattr(
                        stat, name, last[name].clone() if sum_so_far is None else sum_so_far.add_(last[name])
                    )

        return hook

    handles = [
        one.module.register_forward_pre_hook(observe(one, stats[block.name][one.name]), with_kwargs=True)
        for block in blocks
        for one in owned[block.name]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(x: Tensor, mask: Tensor | None, collect: Sequence[str]) -> dict[str, Any]:
    """Number of tokens, sums of squares, gram and rows of one input `(..., in)`, padding left out."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows[mask.reshape(-1).bool()]
    rows = rows.float()
    return {
        "tokens": len(rows),
        "rows": [rows.clone()] if "rows" in collect else [],
        "norm_sq": rows.square().sum(0) if "norm" in collect else None,
        "gram": rows.T @ rows if "gram" in collect else None,
    }


def _check(stats: dict[str, Stats]) -> None:
    for name, stat in stats.items():
        sums = [one for one in (stat.norm_sq, stat.gram) if one is not None]
        if not stat.tokens:
            raise BadData(
                f"no calibration token reached {name}: the batches are empty or all padding, or it is part of a "
                "product of matrices that is made before the tokens come (hadamard)"
            )
        if not all(one.isfinite().all() for one in sums):
            raise BadWeights(
                f"the inputs of {name} hold NaN or infinity: load the model in float32 or bfloat16, and check "
                "the weights of the blocks before it"
            )
