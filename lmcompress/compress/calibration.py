"""What each linear layer sees: input norms and second moments over calibration text, block by block.

A block is seen with the inputs that the compressed blocks before it give. Families pass masks, positions and
biases in different ways: so the calls of blocks are recorded from a forward of the model, not rebuilt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import Block, LinearLayer, ModelAnatomy, anatomy, weighted
from lmcompress.train.batches import Batch, token_masks
from lmcompress.train.trainer import evaluating

STATISTICS = ("norm", "gram", "rows")
Masks = dict[str, Tensor | None]  # as `token_masks` gives them


@dataclass
class Stats:
    """Sums over the tokens X `(tokens, in)` that are not padding, in float32; None if not collected."""

    norm_sq: Tensor | None = None  # diag(XᵀX), `(in,)`
    gram: Tensor | None = None  # XᵀX, `(in, in)`
    rows: list[Tensor] = field(default_factory=list)  # X in pieces, which other layers may hold, too
    tokens: int = 0

    def add(self, moments: "Stats") -> None:
        """Add the sums of one more input; its tensors stay as they are, since several layers add them."""
        self.tokens += moments.tokens
        self.rows += moments.rows
        for name in ("norm_sq", "gram"):
            new, total = getattr(moments, name), getattr(self, name)
            if new is not None:
                setattr(self, name, new.clone() if total is None else total.add_(new))


def on_device(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """Return `batches` on the device of `model`; raise `BadData` if there are none."""
    if not batches:
        raise BadData("no calibration batches: give at least one dictionary of tensors, such as input_ids")
    device = next(model.parameters()).device
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def without_cache(kind: str) -> dict[str, bool]:
    """Return the arguments of a forward that keeps no keys and values, for a kind of `ModelAnatomy`."""
    return {} if kind == "encoder" else {"use_cache": False}


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

    The consumer may change the block's weights, or replace layers inside it, before it asks for the next; a
    decoder reads what the changed encoder gives. Blocks that share a module run together: ALBERT's is yielded
    once, its statistics summed over all runs. A layer shared by several blocks comes with the first of them.

    Args:
        model: any known family; put in eval mode meanwhile. Everything stays on its device.
        batches: keyword arguments of the model's forward, with `attention_mask` `(batch, seq)` where rows are
            padded. A decoder after an encoder counts `decoder_attention_mask`, else `labels` (not -100).
        collect: some of `STATISTICS`; a gram takes `in * in * 4` bytes per layer of one block, rows take
            `tokens * in * 4` per input of one block.

    Raises:
        BadData: no batches, or no tokens in them.
        BadWeights: an activation is NaN or infinite.
    """
    if not collect or set(collect) - set(STATISTICS):
        raise BadSetting(f'collect is {list(collect)!r}; it takes some of "norm", "gram" and "rows"')
    batches, model_anatomy = on_device(model, batches), anatomy(model)
    with evaluating(model), _without_cache(model):
        outputs: list[Any] = [None] * len(batches)
        for stack in model_anatomy.stacks:
            recordings = _recordings(model, model_anatomy, stack, batches, outputs)
            if not recordings:
                yield from _whole_runs(model, model_anatomy, batches, collect)
                return
            yield from _stack_steps(model_anatomy, stack, recordings, collect)
            outputs = [recording.state for recording in recordings]


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Let models keep no keys and values that take no word for it, or whose kind is not known."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before


def _recordings(
    model: nn.Module, model_anatomy: ModelAnatomy, stack: str, batches: list[Batch], outputs: list[Any]
) -> list["Recording"]:
    """Return each batch's recording; [] if a block needs anything but what the one before it gave."""
    recordings = []
    for batch, before in zip(batches, outputs, strict=True):
        try:
            recordings.append(record_calls(model, model_anatomy, stack, batch, before))
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            return []  # blocks that cannot do with another's output; a run of the whole tells other errors
        for call in recordings[-1].calls[1:]:
            if not any(isinstance(argument, Previous) for argument in (*call.args, *call.kwargs.values())):
                return []
    return recordings


def _whole_runs(
    model: nn.Module, model_anatomy: ModelAnatomy, batches: list[Batch], collect: Sequence[str]
) -> Iterator[BlockStep]:
    """Yield the steps of all blocks from runs of the whole model, one for each block and batch."""
    unique = _layers_once(model_anatomy)
    for block in model_anatomy.blocks:
        layers = [layer for layer in unique if (layer.stack, layer.block) == (block.stack, block.index)]
        stats = {layer.name: Stats() for layer in layers}
        for batch in batches:
            with _observed(layers, stats, token_masks(batch, block.stack, model_anatomy.kind), collect):
                model(**batch, **without_cache(model_anatomy.kind))
        _refuse_unseen(stats)
        yield BlockStep(block, stats)


def _layers_once(model_anatomy: ModelAnatomy) -> list[LinearLayer]:
    """Return the layers of all blocks; one that several blocks share comes with the first of them."""
    unique: dict[int, LinearLayer] = {}
    linears = [layer for block in model_anatomy.blocks for layer in block.linears]
    for layer in (inner for outer in linears for inner in weighted(outer)):
        unique.setdefault(id(layer.module.weight), layer)
    return [*unique.values()]


def _stack_steps(
    model_anatomy: ModelAnatomy, stack: str, recordings: list["Recording"], collect: Sequence[str]
) -> Iterator[BlockStep]:
    """Yield the steps of one stack; the recordings' states become the last block's outputs."""
    by_module = {block.module: block for block in reversed(model_anatomy.stacks[stack])}
    unique = _layers_once(model_anatomy)
    calls = recordings[0].calls
    for first, last in _segments(calls):
        blocks = {by_module[call.module].index: by_module[call.module] for call in calls[first:last]}
        layers = [layer for layer in unique if layer.stack == stack and layer.block in blocks]
        stats = {layer.name: Stats() for layer in layers}
        for recording in recordings:
            with _observed(layers, stats, recording.masks, collect):
                run(recording.calls[first:last], recording.state)
        for index, block in blocks.items():
            block_stats = {layer.name: stats.pop(layer.name) for layer in layers if layer.block == index}
            _refuse_unseen(block_stats)
            yield BlockStep(block, block_stats)
        for recording in recordings:
            recording.state = run(recording.calls[first:last], recording.state)


@contextmanager
def _observed(
    layers: list[LinearLayer], stats: dict[str, Stats], masks: Masks, collect: Sequence[str]
) -> Iterator[None]:
    """Add what enters `layers` to `stats` while inside."""
    last: dict[str, Any] = {"x": None}  # q, k and v (in and gate) read one tensor: its moments are taken once

    def observe(layer: LinearLayer, _: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if last["x"] is not x:
            reads_encoder = layer.kind == "cross-attention" and layer.role in ("k", "v")
            last.update(x=x, moments=_moments(x, masks["other" if reads_encoder else "own"], collect))
        stats[layer.name].add(last["moments"])

    with ExitStack() as hooks:
        for layer in layers:
            hook = partial(observe, layer)
            hooks.enter_context(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _moments(x: Tensor, mask: Tensor | None, collect: Sequence[str]) -> Stats:
    """Return the statistics of one input `(..., in)`, padding left out."""
    rows = x.detach().reshape(-1, x.shape[-1])
    # DeBERTa's relative positions go through its linear layers, too, and are no tokens: all of them count.
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.reshape(-1).bool()]
    rows = rows.float()
    norm_sq = rows.square().sum(0) if "norm" in collect else None
    gram = rows.T @ rows if "gram" in collect else None
    return Stats(norm_sq, gram, [rows.clone()] if "rows" in collect else [], len(rows))


def _refuse_unseen(stats: dict[str, Stats]) -> None:
    for name, stat in stats.items():
        if not stat.tokens:
            raise BadData(
                f"no calibration token reached {name}: the batches are empty or all padding, or it is part "
                "of a product of matrices that is made before the tokens come (hadamard)"
            )
        if not all(total.isfinite().all() for total in (stat.norm_sq, stat.gram) if total is not None):
            advice = "load the model in float32 or bfloat16, check the weights of the blocks before it"
            raise BadWeights(f"the inputs of {name} hold NaN or infinity: {advice}")


class Previous(int):
    """Stands in a recorded call for the output of this number of the block that ran before."""


@dataclass
class Call:
    """One run of a block within the model's forward, with its inputs as the model passes them."""

    module: nn.Module
    args: list[Any]
    kwargs: dict[str, Any]

    def mapped(self, function: Callable[[Any], Any]) -> "Call":
        """Return the call with `function` of every argument."""
        kwargs = {name: function(argument) for name, argument in self.kwargs.items()}
        return Call(self.module, list(map(function, self.args)), kwargs)


@dataclass
class Recording:
    """The calls of a stack's blocks for one batch, what enters the next of them, and which tokens count."""

    calls: list[Call]
    state: Any
    masks: Masks


def run(calls: list[Call], state: Any) -> Any:
    """Return the output of the last of `calls`, run one after the other from `state`."""
    for call in calls:
        entries = _entries(state)
        call = call.mapped(lambda x, entries=entries: entries[x] if isinstance(x, Previous) else x)
        state = call.module(*call.args, **call.kwargs)
    return state


def _entries(output: Any) -> tuple:
    return output if isinstance(output, tuple) else (output,)


def _segments(calls: list[Call]) -> Iterator[tuple[int, int]]:
    """Yield the shortest runs `[first, last)` of calls such that no module is called in two of them."""
    last_call = {call.module: i for i, call in enumerate(calls)}
    first = end = 0
    for i, call in enumerate(calls):
        end = max(end, last_call[call.module])
        if i == end:
            yield first, i + 1
            first = i + 1


class _Enough(Exception):
    """Ends a model's forward once the calls of a stack are recorded."""


def record_calls(
    model: nn.Module, model_anatomy: ModelAnatomy, stack: str, batch: Batch, before: Any
) -> Recording:
    """Record the calls of a stack's blocks for one batch.

    Runs the model with only the first block real: the others are handed its output and record their inputs.
    Blocks of a stack that is finished give `before`, its last output.
    """
    calls: list[Call] = []
    starts: list[Tensor] = []
    outputs: list[Any] = []

    def recorder(module: nn.Module, forward):
        def record(*args: Any, **kwargs: Any) -> Any:
            if not calls:
                starts.append(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()))))
                outputs.append(forward(*args, **kwargs))
            entries = _entries(outputs[0] if calls else starts[0])
            indices = {id(entry): i for i, entry in enumerate(entries) if entry is not None}

            def wire(argument: Any) -> Any:
                return Previous(indices[id(argument)]) if id(argument) in indices else argument

            calls.append(Call(module, args, kwargs).mapped(wire))
            return outputs[0]

        return record

    forwards: dict[nn.Module, Callable] = {}
    for block in model_anatomy.blocks:
        if block.stack == stack:
            forwards[block.module] = recorder(block.module, block.module.forward)
        elif stack == "decoder":
            forwards[block.module] = lambda *args, **kwargs: before
    # No head, no loss: the forward ends where the module that runs the list of blocks does.
    prefixes = accumulate(model_anatomy.stacks[stack][0].name.split("."), "{}.{}".format)
    blocks = next(name for name in prefixes if isinstance(model.get_submodule(name), nn.ModuleList))
    owner = model.get_submodule(blocks.rpartition(".")[0])

    def ending(*args: Any, forward=owner.forward, **kwargs: Any) -> None:
        forward(*args, **kwargs)
        raise _Enough

    with replaced_forwards(forwards | {owner: ending}), suppress(_Enough):
        model(**batch, **without_cache(model_anatomy.kind))
    return Recording(calls, starts[0], token_masks(batch, stack, model_anatomy.kind))


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
