"""Whether a sliced model does what the dense one does with the same parts masked, by block, on 8 tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lmcompress.errors import UnknownFamily
from lmcompress.models.anatomy import ModelAnatomy, anatomy
from lmcompress.models.families import is_linear

TOKENS = 8
# Of what a block adds to the hidden state, and (times the type's rounding) of that state itself.
TOLERANCE, HALF_TOLERANCE, ROUNDINGS = 1e-4, 0.05, 16
_ADVICE = (
    "something in it belongs to what was cut and is not known here (lmcompress/models/families.py lists what "
    "heads own). Nothing was changed; use a technique that does not cut shapes, such as pruning or "
    "quantization."
)
_REPLACED = (
    "it uses a linear layer otherwise than by calling it. Nothing was changed; use a technique that keeps "
    "the layers, such as pruning of single weights."
)

Mask = tuple[nn.Module, Tensor]  # a linear layer, or an RMS norm over all heads, and the inputs it keeps
Run = tuple[str, Tensor, Tensor]  # name of a block, what entered and left it `(1, seq, hidden)`


@torch.no_grad()
def refuse_difference(
    dense: nn.Module,
    sliced: nn.Module,
    *,
    masks: Sequence[Mask] = (),
    skipped: Mapping[str, Sequence[int]] | None = None,
    routed: Mapping[Tensor, Tensor] | None = None,
) -> None:
    """Raise `UnknownFamily` naming the first block of `sliced` that differs from the masked dense model's.

    Both models run as they are, one after the other; each sliced block is given what entered the dense one,
    so that a difference lies in the block it is found in. `skipped`: stack -> numbers of the runs of blocks
    that hand their input on, in the dense model; `routed`: what a router scores by -> experts it may choose.
    """
    structure = anatomy(dense)
    with _as_it_was(dense):
        for module, positions in masks:
            _lay(module, positions)
        runs = _record(structure, skipped=skipped or {})
        with _Among(routed or {}):
            _run(dense, structure, "The dense model")
    with _as_it_was(sliced):
        narrow = _record(anatomy(sliced), entering=[before for _, before, _ in runs])
        _run(sliced, structure, "The sliced model", runs=narrow)
    if len(runs) != len(narrow):
        raise UnknownFamily(
            f"the sliced model runs {len(narrow)} blocks where {len(runs)} were kept: {_ADVICE}"
        )
    for (_, before, masked), (name, _, after) in zip(runs, narrow, strict=True):
        limit = TOLERANCE if masked.dtype.itemsize >= 4 else HALF_TOLERANCE
        limit *= float((masked - before).abs().max())
        limit += ROUNDINGS * torch.finfo(masked.dtype).eps * float(masked.abs().max())
        if after.shape != masked.shape or not (error := float((after - masked).abs().max())) <= limit:
            seen = "another shape" if after.shape != masked.shape else f"a difference of {error:.2g}"
            raise UnknownFamily(
                f"{name} of this {structure.family} model, sliced, gives {seen} (allowed: {limit:.2g}) from "
                f"the dense block with the same parts masked: {_ADVICE}"
            )


class _Among(TorchFunctionMode):
    """Gives experts that were not kept a score of −∞ where a router's weight or correction is used."""

    casts = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float)
    scores = (F.linear, torch.add, torch.Tensor.add, torch.Tensor.__add__)

    def __init__(self, routed: Mapping[Tensor, Tensor]):
        super().__init__()
        self.routed, self.tensors = {id(tensor): index for tensor, index in routed.items()}, [*routed]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        index = next((self.routed[id(x)] for x in args if id(x) in self.routed), None)
        if index is not None and func in self.casts:
            self.routed[id(output)] = index
            self.tensors.append(output)  # held, so that its id stays its own
        if index is None or func not in self.scores:
            return output
        closed, index = torch.full_like(output, -torch.inf), index.to(output.device)
        return closed.index_copy(-1, index, output[..., index])


def refuse_failure(model: nn.Module, *, replaced: bool = False) -> None:
    """Raise `UnknownFamily` if a model whose hidden states were cut, or layers `replaced`, does not run."""
    who, advice = ("The compressed model", _REPLACED) if replaced else ("The sliced model", _ADVICE)
    with torch.no_grad(), _as_it_was(model):
        _run(model, anatomy(model), who, advice=advice)


def _record(
    structure: ModelAnatomy,
    *,
    skipped: Mapping[str, Sequence[int]] | None = None,
    entering: Sequence[Tensor] = (),
) -> list[Run]:
    """Return a list that every run of a block will be put on; `entering`: what each is given instead."""
    runs: list[Run] = []
    counts = dict.fromkeys(structure.stacks, 0)

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if len(runs) >= len(entering):
            return None
        states = entering[len(runs)]
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    def after(name: str, which: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output):
            states = args[0] if args else kwargs["hidden_states"]
            number, counts[which] = counts[which], counts[which] + 1
            if number in (skipped or {}).get(which, ()):
                return (states, *output[1:]) if isinstance(output, (tuple, list)) else states
            left = output[0] if isinstance(output, (tuple, list)) else output
            runs.append((name, states.clone(), left.clone()))
            return None

        return hook

    for block in structure.blocks:
        block.module.register_forward_pre_hook(before, with_kwargs=True)
        block.module.register_forward_hook(after(block.name, block.stack), with_kwargs=True)
    return runs


def _lay(module: nn.Module, positions: Tensor) -> None:
    """Zero the inputs of a linear layer but for `positions`, or let a norm take its mean over them alone."""
    scale = 1.0 if is_linear(module) else (module.weight.shape[0] / len(positions)) ** 0.5

    def only(_: nn.Module, args: tuple) -> tuple:
        mask = torch.zeros(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
        return (args[0] * mask.index_fill(0, positions.to(mask.device), 1) * scale, *args[1:])

    module.register_forward_pre_hook(only)
    if scale != 1:
        module.register_forward_hook(lambda _module, _args, y: y / scale)


def _run(
    model: nn.Module,
    structure: ModelAnatomy,
    who: str,
    runs: list[Run] | None = None,
    *,
    advice: str = _ADVICE,
) -> None:
    """Run the model without its head (which may ask for an end token) on 8 tokens."""
    model.eval()
    base = getattr(model, "base_model", model)
    table = next((layer.module for layer in structure.embeddings if layer.role == "embedding"), None)
    if table is None:
        raise UnknownFamily(f"{who} ({structure.family}) has no nn.Embedding, so that it cannot be tried.")
    ids = (torch.arange(TOKENS) * 7 % table.num_embeddings)[None].to(next(model.parameters()).device)
    if isinstance(pad := getattr(getattr(model, "config", None), "pad_token_id", None), int):
        ids = torch.where(ids == pad, (ids + 1) % table.num_embeddings, ids)  # transformers warns of padding
    more = {} if structure.kind == "encoder" else {"use_cache": False}
    if structure.kind == "encoder-decoder":
        more["decoder_input_ids"] = ids
    try:
        base(input_ids=ids, **more)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        where = "" if runs is None else f" after {len(runs)} of its blocks"
        raise UnknownFamily(
            f"{who} ({structure.family}) fails{where} on {TOKENS} tokens ({error}): {advice}"
        ) from error


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Give `model` back as it was: modes, hooks, what a forward replaces (BigBird's attention)."""
    before = [
        (module, name, value, dict(value) if isinstance(value, dict) else None)
        for module in model.modules()
        for name, value in vars(module).items()
    ]
    try:
        yield
    finally:
        for module, name, value, entries in before:
            vars(module)[name] = value
            if entries is not None:
                value.clear()
                value.update(entries)
