"""Switches of the forward pass while a model is trained: set for the run, and put back whatever happens."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import ModelAnatomy, anatomy
from lmcompress.train.spec import TrainSpec


@contextmanager
def applied(model: nn.Module, spec: TrainSpec, found: ModelAnatomy | None = None) -> Iterator[None]:
    """Run `model` with the attention, the dropouts and the gradient checkpointing of `spec` while inside.

    Args:
        found: of the model before adapters took the places of its maps, where they did.

    Raises:
        BadSetting: the family has no such switch.
    """
    with ExitStack() as stack:
        if getattr(model.config, "use_cache", False):  # keys and values are kept for generation only
            stack.callback(setattr, model.config, "use_cache", True)
            model.config.use_cache = False
        if spec.attention is not None:
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            try:
                model.set_attn_implementation(spec.attention)
            except ValueError as error:
                raise BadSetting(f"attention={spec.attention!r} is not for this family ({error}).") from error
        if spec.attention_dropout is not None or spec.hidden_dropout is not None:
            changes = _dropouts(model, found or anatomy(model), spec)
            stack.callback(_undo, changes)
        if spec.gradient_checkpointing:
            _checkpointing(model, on=True)
            stack.callback(_checkpointing, model, on=False)
        if spec.compile:
            stack.callback(_undo, _compile(model, found or anatomy(model)))
        yield


def _compile(model: nn.Module, found: ModelAnatomy) -> list:
    """Compile every block, not the whole model: equal blocks share one compilation, whatever the depth.

    The loss as well, because over a large vocabulary its passes over the logits cost as much as a block.
    Returns what undoes it.
    """
    undo: list = []
    for block in found.blocks:
        undo.append((block.module, "_compiled_call_impl", None))
        block.module.compile()
    loss = model.loss_function
    undo.append((model, "loss_function", loss))
    model.loss_function = torch.compile(loss)
    return undo


def _dropouts(model: nn.Module, found: ModelAnatomy, spec: TrainSpec) -> list:
    """Set the rates; returns what undoes it: (object, attribute, value before) or hooks.

    Dropouts in the module that holds q, k and v are attention's, but for one on its output; all others are hidden
    ones. Families without any in their blocks (LLaMA and its kin) get it on the outputs of attention and feed-forward.
    """
    both = [one for block in found.blocks for one in (block.attention, block.cross_attention)]
    attentions = [one.module for one in both if one is not None]
    inside = {id(module) for block in found.blocks for module in block.module.modules()}
    places: dict[str, list] = {"attention": [], "hidden": []}
    depths = {"attention": False, "hidden": False}
    for owner in model.modules():
        for name, value in [*vars(owner).items(), *owner.named_children()]:
            place = (value, "p", value.p) if isinstance(value, nn.Dropout) else (owner, name, value)
            rate = isinstance(place[2], int | float) and "drop" in name
            if rate and name not in ("layerdrop", "activation_dropout"):
                own = owner in attentions and not name.startswith(("resid", "output"))
                kind = "attention" if own else "hidden"
                places[kind].append(place)
                depths[kind] |= id(owner) in inside
    undo: list = []
    if spec.attention_dropout is not None:
        if not depths["attention"]:
            raise BadSetting(
                f"{type(model).__name__} has no attention dropout; leave attention_dropout at None."
            )
        undo += _set(places["attention"], spec.attention_dropout)
    if spec.hidden_dropout is not None:
        undo += _set(places["hidden"], spec.hidden_dropout)
        drop = partial(_drop, spec.hidden_dropout)
        for block in found.blocks if spec.hidden_dropout and not depths["hidden"] else ():
            for one in (block.attention.o, *([block.ffn.output] if block.ffn else [])):
                undo.append(model.get_submodule(one.name).register_forward_hook(drop))
    return undo


def _set(places: list, rate: float) -> list:
    for target, name, _ in places:
        setattr(target, name, rate)
    return places


def _drop(rate: float, module: nn.Module, _, output: Tensor) -> Tensor:
    return F.dropout(output, rate, training=module.training)


def _undo(changes: list) -> None:
    for change in changes:
        setattr(*change) if isinstance(change, tuple) else change.remove()


def _checkpointing(model: nn.Module, *, on: bool) -> None:
    """Chen et al. 2016, by transformers, which puts hooks on the embeddings for it."""
    if not model.supports_gradient_checkpointing:
        raise BadSetting(
            f"{type(model).__name__} has no gradient checkpointing in transformers; switch it off."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed, but not yet in 5.17
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
