"""What each linear layer sees: input norms and second moments over calibration text, block by block.

Pruning and quantization that look at activations need, for every block, the inputs that the already
compressed blocks before it give. So blocks run one at a time over all batches, and only the hidden states
between two blocks are kept: memory does not grow with the number of blocks. Masks, position embeddings and
biases differ between blocks in some families, and are passed on by others through the blocks' outputs: so the
calls of the blocks are recorded from a forward of the model, not rebuilt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import Block, LinearLayer, ModelAnatomy, anatomy, weighted
from lmcompress.train.batches import token_masks

Batch = dict[str, Tensor]
STATISTICS = ("norm", "gram", "rows")


@dataclass
class Stats:
    """Over the tokens that are not padding, X being `(tokens, in)`; accumulated in float32.

    `norm_sq` `(in,)`: sum of squares per input, diag(XᵀX). `gram` `(in, in)`: XᵀX. None if not collected.
    `rows`: X itself, in pieces; layers that read the same inputs hold the same tensors.
    """

    norm_sq: Tensor | None = None
    gram: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, moments: "Stats") -> None:
        """Add the sums of one more input; its tensors stay as they are, since several layers add them."""
        self.tokens += moments.tokens
        self.rows += moments.rows
        for name in ("norm_sq", "gram"):
            new, total = getattr(moments, name), getattr(self, name)
            if new is not None:
                setattr(self, name, new.clone() if total is None else total.add_(new))


@dataclass
class BlockStep:
    """One block whose turn it is, and the statistics of its layers by name."""

    block: Block
    stats: dict[str, Stats]


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Sequence[Batch], *, collect: Sequence[str] = ("norm", "gram")
) -> Iterator[BlockStep]:
    """Yield each block with the statistics of its inputs; go on from the block as the consumer leaves it.

    The consumer may change the block's weights, or replace layers inside it, before it asks for the next. A
    stack of an encoder-decoder starts when the one before is finished: the decoder reads what the changed
    encoder gives. Blocks that share a module run together: ALBERT's shared block is yielded once, its
    statistics summed over all its runs. A layer shared by several blocks comes with the first of them only.

    Args:
        model: any known family; put in eval mode meanwhile. Everything stays on its device.
        batches: keyword arguments of the model's forward, with `attention_mask` `(batch, seq)` where rows
            are padded. Decoder positions of an encoder-decoder count where `decoder_attention_mask`, else
            `labels` (not -100), says so.
        collect: some of `STATISTICS`; a gram takes `in * in * 4` bytes per layer of one block, rows take
            `tokens * in * 4` per input of one block.

    Raises:
        BadData: no batches, or no tokens in them.
        BadSetting: nothing or something unknown to collect.
        BadWeights: an activation is NaN or infinite.
    """
    if not collect or set(collect) - set(STATISTICS):
        raise BadSetting(f'collect is {list(collect)!r}; it takes some of "norm", "gram" and "rows"')
    device = next(model.parameters()).device
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    if not batches:
        raise BadData("no calibration batches: give at least one dictionary of tensors, such as input_ids")
    model_anatomy, training = anatomy(model), model.training
    model.eval()
    try:
        outputs: list[Any] = [None] * len(batches)
        for stack in model_anatomy.stacks:
            calls, states = [], []
            for batch, before in zip(batches, outputs, strict=True):
                recorded, state = record_calls(model, model_anatomy, stack, batch, before)
                calls.append(recorded)
                states.append(state)
            masks = [token_masks(batch, stack, model_anatomy.kind) for batch in batches]
            outputs = yield from _stack_steps(model_anatomy, stack, calls, states, masks, collect)
    finally:
        model.train(training)


def _stack_steps(
    model_anatomy: ModelAnatomy,
    stack: str,
    calls: list[list["Call"]],
    states: list[Any],
    masks: list[dict[str, Tensor | None]],
    collect: Sequence[str],
) -> Iterator[BlockStep]:
    """Yield the steps of one stack; return the last block's output per batch. `states` is used up."""
    by_module = {id(block.module): block for block in reversed(model_anatomy.stacks[stack])}
    layers = _layers_by_first_block(model_anatomy)
    for first, last in segments(calls[0]):
        blocks = [by_module[key] for key in dict.fromkeys(id(call.module) for call in calls[0][first:last])]
        stats = {layer.name: Stats() for block in blocks for layer in layers[block.name]}
        observed = [layer for block in blocks for layer in layers[block.name]]
        for batch_calls, state, mask in zip(calls, states, masks, strict=True):
            with _observed(observed, stats, mask, collect):
                run(batch_calls[first:last], state)
        for block in blocks:
            block_stats = {layer.name: stats.pop(layer.name) for layer in layers[block.name]}
            _check(block_stats)
            yield BlockStep(block, block_stats)
        for i, batch_calls in enumerate(calls):
            states[i] = run(batch_calls[first:last], states[i])
    return states


def _layers_by_first_block(model_anatomy: ModelAnatomy) -> dict[str, list[LinearLayer]]:
    """Return, by block name, its layers that have a matrix and belong to no block before it."""
    seen: set[int] = set()
    layers: dict[str, list[LinearLayer]] = {}
    for block in model_anatomy.blocks:
        layers[block.name] = []
        for layer in (inner for outer in block.linears for inner in weighted(outer)):
            if id(layer.module.weight) not in seen:
                seen.add(id(layer.module.weight))
                layers[block.name].append(layer)
    return layers


@contextmanager
def _observed(
    layers: list[LinearLayer],
    stats: dict[str, Stats],
    masks: dict[str, Tensor | None],
    collect: Sequence[str],
) -> Iterator[None]:
    """Add what enters `layers` to `stats` while inside."""
    last: dict[str, Any] = {"x": None}  # q, k and v (in and gate) read one tensor: its moments are taken once

    def observe(layer: LinearLayer):
        reads_encoder = layer.kind == "cross-attention" and layer.role in ("k", "v")

        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if last["x"] is not x:
                mask = masks["other" if reads_encoder else "own"]
                last.update(x=x, moments=_moments(x, mask, collect))
            stats[layer.name].add(last["moments"])

        return layer.module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [observe(layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(x: Tensor, mask: Tensor | None, collect: Sequence[str]) -> Stats:
    """Return the statistics of one input `(..., in)`, padding left out."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows[mask.reshape(-1).bool()]
    rows = rows.float()
    norm_sq = rows.square().sum(0) if "norm" in collect else None
    gram = rows.T @ rows if "gram" in collect else None
    return Stats(norm_sq, gram, [rows.clone()] if "rows" in collect else [], len(rows))


def _check(stats: dict[str, Stats]) -> None:
    for name, stat in stats.items():
        if not stat.tokens:
            raise BadData(
                f"no calibration token reached {name}: the batches are empty or all padding, or it is part "
                "of a product of matrices that is made before the tokens come (hadamard)"
            )
        if not all(total.isfinite().all() for total in (stat.norm_sq, stat.gram) if total is not None):
            raise BadWeights(
                f"the inputs of {name} hold NaN or infinity: load the model in float32 or bfloat16, and "
                "check the weights of the blocks before it"
            )


@dataclass
class Previous:
    """Stands in a recorded call for output number `index` of the block that ran before."""

    index: int


@dataclass
class Call:
    """One run of a block within the model's forward, with its inputs as the model passes them."""

    module: nn.Module
    args: list[Any]
    kwargs: dict[str, Any]

    def run(self, previous: Any) -> Any:
        """Return the block's output, given that of the block before."""

        def real(argument: Any) -> Any:
            if not isinstance(argument, Previous):
                return argument
            return previous[argument.index] if isinstance(previous, tuple) else previous

        return self.module(*map(real, self.args), **{name: real(a) for name, a in self.kwargs.items()})


def run(calls: list[Call], state: Any) -> Any:
    """Return the output of the last of `calls`, run one after the other from `state`."""
    for call in calls:
        state = call.run(state)
    return state


def segments(calls: list[Call]) -> Iterator[tuple[int, int]]:
    """Yield the shortest runs `[first, last)` of calls such that no module is called in two of them."""
    last_call = {id(call.module): i for i, call in enumerate(calls)}
    first = end = 0
    for i, call in enumerate(calls):
        end = max(end, last_call[id(call.module)])
        if i == end:
            yield first, i + 1
            first = i + 1


def record_calls(
    model: nn.Module, model_anatomy: ModelAnatomy, stack: str, batch: Batch, before: Any
) -> tuple[list[Call], Tensor]:
    """Return the calls of a stack's blocks for one batch, and the hidden states that enter the first.

    Runs the model with only the first block real: the others are handed its output and record their inputs.
    Blocks of a stack that is finished give `before`, its last output.
    """
    calls: list[Call] = []
    starts: list[Tensor] = []
    outputs: list[Any] = []

    def recorder(module: nn.Module, forward):
        def record(*args: Any, **kwargs: Any) -> Any:
            if calls:
                entries = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
            else:
                entries = (args[0] if args else kwargs["hidden_states"],)
                starts.append(entries[0])
                outputs.append(forward(*args, **kwargs))
            indices = {id(entry): i for i, entry in enumerate(entries) if entry is not None}

            def wire(argument: Any) -> Any:
                return Previous(indices[id(argument)]) if id(argument) in indices else argument

            calls.append(Call(module, [wire(a) for a in args], {name: wire(a) for name, a in kwargs.items()}))
            return outputs[0]

        return record

    forwards = {}
    for name, blocks in model_anatomy.stacks.items():
        if name == stack:
            forwards |= {block.module: recorder(block.module, block.module.forward) for block in blocks}
            break
        forwards |= {block.module: lambda *args, **kwargs: before for block in blocks}
    cache = {} if model_anatomy.kind == "encoder" else {"use_cache": False}
    with replaced_forwards(forwards), _ending_after(model, model_anatomy.stacks[stack][0].name):
        model(**batch, **cache)
    return calls, starts[0]


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Give modules other forwards for a while; one that had its own on the instance gets it back."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


class _Enough(Exception):
    """Ends a model's forward once the calls of a stack are recorded."""


@contextmanager
def _ending_after(model: nn.Module, block: str) -> Iterator[None]:
    """Let a forward end where the module that runs the list around `block` ends: no head, no loss."""
    names = block.split(".")
    prefixes = [".".join(names[: i + 1]) for i in range(len(names))]
    blocks = next(name for name in prefixes if isinstance(model.get_submodule(name), nn.ModuleList))

    def stop(*_: Any) -> None:
        raise _Enough

    handle = model.get_submodule(blocks.rpartition(".")[0]).register_forward_hook(stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()
