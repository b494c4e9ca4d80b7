"""Runs a model's blocks one at a time, with exactly the inputs that the model itself would pass them.

Masks, position embeddings and biases differ between blocks in some families, and are passed on by others
through the blocks' outputs: so they are recorded from a forward of the model, not rebuilt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lmcompress.models.anatomy import ModelAnatomy


@dataclass
class Previous:
    """Stands in a recorded call for output number `place` of the block that ran before."""

    place: int


@dataclass
class Call:
    """One run of a block within the model's forward, with its inputs as the model passes them."""

    module: nn.Module
    args: list[Any]
    kwargs: dict[str, Any]

    def run(self, previous: Any) -> Any:
        """The block's output, given that of the block before."""

        def real(value: Any) -> Any:
            if not isinstance(value, Previous):
                return value
            return previous[value.place] if isinstance(previous, tuple) else previous

        return self.module(*map(real, self.args), **{name: real(v) for name, v in self.kwargs.items()})


class _Enough(Exception):
    """Ends a model's forward once the calls of a stack are recorded."""


def run(calls: list[Call], state: Any) -> Any:
    """Output of the last of `calls`, run one after the other from `state`."""
    for call in calls:
        state = call.run(state)
    return state


def segments(calls: list[Call]) -> Iterator[tuple[int, int]]:
    """Shortest runs `[first, last)` of calls such that no module is called in two of them."""
    last_call = {id(call.module): i for i, call in enumerate(calls)}
    first = end = 0
    for i, call in enumerate(calls):
        end = max(end, last_call[id(call.module)])
        if i == end:
            yield first, i + 1
            first = i + 1


def record_calls(
    model: nn.Module, found: ModelAnatomy, stack: str, batch: dict[str, Tensor], before: Any
) -> tuple[list[Call], Tensor]:
    """The calls of a stack's blocks for one batch, and the hidden states that enter the first.

    Runs the model with only the first block real: the others are handed its output and record their inputs
    (masks and position embeddings differ between blocks in some families). Blocks of a stack that is
    finished give `before`, its last output.
    """
    calls: list[Call] = []
    outputs: list[Any] = []
    starts: list[Tensor] = []

    def recorder(module: nn.Module, forward):
        def record(*args: Any, **kwargs: Any) -> Any:
            if not calls:
                starts.append(args[0] if args else kwargs["hidden_states"])
                outputs.append(forward(*args, **kwargs))
                known = {id(starts[0]): 0}
            else:
                entries = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
                known = {id(one): i for i, one in enumerate(entries) if one is not None}

            def wire(value: Any) -> Any:
                return Previous(known[id(value)]) if id(value) in known else value

            calls.append(Call(module, [wire(v) for v in args], {n: wire(v) for n, v in kwargs.items()}))
            return outputs[0]

        return record

    replaced = {}
    for name, blocks in found.stacks.items():
        if name == stack:
            replaced |= {block.module: recorder(block.module, block.module.forward) for block in blocks}
            break
        replaced |= {block.module: lambda *args, **kwargs: before for block in blocks}
    with _forwards(replaced), _ending_after(model, found.stacks[stack][0].name):
        model(**batch, **({} if found.kind == "encoder" else {"use_cache": False}))
    return calls, starts[0]


@contextmanager
def _forwards(replaced: dict[nn.Module, Any]) -> Iterator[None]:
    """Give modules other forwards for a while; one that had its own on the instance gets it back."""
    own = {module: vars(module).get("forward") for module in replaced}
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def _ending_after(model: nn.Module, block: str) -> Iterator[None]:
    """Let a forward end where the module that runs the list around `block` ends: no head, no loss."""
    parts = block.split(".")
    length = next(
        i
        for i in range(len(parts))
        if isinstance(model.get_submodule(".".join(parts[: i + 1])), nn.ModuleList)
    )

    def stop(*_: Any) -> None:
        raise _Enough

    handle = model.get_submodule(".".join(parts[:length])).register_forward_hook(stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()
