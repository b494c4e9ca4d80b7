"""Switches of the forward pass while a model is trained: set for the run, and put back whatever happens."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import ModelAnatomy, anatomy
from lmcompress.models.serialization import attention_of
from lmcompress.train.spec import TrainSpec

_OTHER_RATES = ("layerdrop", "activation_dropout")  # of whole layers, and inside the feed-forward


@contextmanager
def applied(model: nn.Module, spec: TrainSpec, dense: ModelAnatomy | None = None) -> Iterator[None]:
    """Run `model` with the switches of `spec` while inside; one its family has not is a `BadSetting`.

    `dense` is the anatomy before adapters took the places of linear layers, where they did.
    """
    with ExitStack() as stack:
        if getattr(model.config, "use_cache", False):  # keys and values are kept for generation only
            _set(stack, model.config, "use_cache", False)
        if spec.attention is not None:
            stack.enter_context(attention(model, spec.attention))
        if spec.attention_dropout is not None or spec.hidden_dropout is not None:
            _dropouts(stack, model, dense or anatomy(model), spec)
        if spec.gradient_checkpointing:
            _checkpoint(stack, model)
        if spec.compile:
            _compile(stack, model, dense or anatomy(model))
        yield


@contextmanager
def attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Run `model` with another attention implementation, "sdpa" or "eager", while inside."""
    before = attention_of(model)
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:
        raise BadSetting(f"attention={implementation!r} is not for this family ({error}).") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `stack` closes."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _compile(stack: ExitStack, model: nn.Module, dense: ModelAnatomy) -> None:
    """Compile every block (equal ones share one compilation), and the loss, which can cost as much as one."""
    for block in dense.blocks:
        # `Module.compile` has no public way back; deleting this attribute uncovers the class's method again.
        stack.callback(delattr, block.module, "forward")
        block.module.forward = torch.compile(block.module.forward)
    _set(stack, model, "loss_function", torch.compile(model.loss_function))


def _dropouts(stack: ExitStack, model: nn.Module, dense: ModelAnatomy, spec: TrainSpec) -> None:
    """Set the rates until `stack` closes.

    Families without dropouts in their blocks (LLaMA and its kin) get hidden ones on the outputs of attention
    and feed-forward.
    """
    rates = list(_dropout_rates(model, dense))
    in_blocks = {id(module) for block in dense.blocks for module in block.module.modules()}
    has = {kind for kind, owner, _, _ in rates if id(owner) in in_blocks}
    if spec.attention_dropout is not None and "attention" not in has:
        raise BadSetting(f"{type(model).__name__} has no attention dropout; leave attention_dropout at None.")
    new_rates = {"attention": spec.attention_dropout, "hidden": spec.hidden_dropout}
    for kind, _, holder, name in rates:
        if new_rates[kind] is not None:
            _set(stack, holder, name, new_rates[kind])
    if spec.hidden_dropout and "hidden" not in has:

        def drop(module: nn.Module, _, output: Tensor) -> Tensor:
            return F.dropout(output, spec.hidden_dropout, training=module.training)

        for block in dense.blocks:
            for layer in (block.attention.o, *([block.ffn.output] if "ffn" in block.parts else [])):
                stack.callback(model.get_submodule(layer.name).register_forward_hook(drop).remove)


def _dropout_rates(model: nn.Module, dense: ModelAnatomy) -> Iterator[tuple[str, nn.Module, nn.Module, str]]:
    """Yield each rate's kind, the module using it, the number's holder and name.

    The kind is "attention" in the module that holds q, k and v, but for one on its output, and else "hidden".
    """
    parts = [entry for block in dense.blocks for entry in block.parts.items()]
    attentions = [part.module for name, part in parts if name != "ffn"]
    for owner in model.modules():
        for name, value in [*vars(owner).items(), *owner.named_children()]:
            holder, attribute = (value, "p") if isinstance(value, nn.Dropout) else (owner, name)
            is_rate = isinstance(getattr(holder, attribute, None), int | float)
            if is_rate and "drop" in name and name not in _OTHER_RATES:
                inside = owner in attentions and not name.startswith(("resid", "output"))
                yield ("attention" if inside else "hidden"), owner, holder, attribute


def _checkpoint(stack: ExitStack, model: nn.Module) -> None:
    """Keep the blocks' inputs only (Chen et al. 2016); transformers hooks the embeddings."""
    if not model.supports_gradient_checkpointing:
        raise BadSetting(
            f"{type(model).__name__} has no gradient checkpointing in transformers; switch it off."
        )

    def quietly(method: Callable, *settings: dict) -> None:
        # Both methods are to be renamed, but are not yet in 5.17.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            method(*settings)

    quietly(model.gradient_checkpointing_enable, {"use_reentrant": False})
    stack.callback(model.disable_input_require_grads)
    stack.callback(quietly, model.gradient_checkpointing_disable)
