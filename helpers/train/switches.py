"""Switches of the forward pass while a model is trained: set for the run, and put back whatever happens."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn import functional as F

from helpers.errors import BadSetting
from helpers.layers import architecture
from helpers.train.spec import TrainSpec


@contextmanager
def applied(model: nn.Module, spec: TrainSpec) -> Iterator[None]:
    """Run `model` with the attention, the dropouts and the gradient checkpointing of `spec` while inside.

    Raises:
        BadSetting: the family has no such switch.
    """
    with ExitStack() as stack:
        if spec.attention is not None:
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            _attention(model, spec.attention)
        if spec.attention_dropout is not None or spec.hidden_dropout is not None:
            stack.callback(_undo, _dropouts(model, spec.attention_dropout, spec.hidden_dropout))
        if spec.gradient_checkpointing:
            _checkpointing(model, on=True)
            stack.callback(_checkpointing, model, on=False)
        yield


def _attention(model: nn.Module, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise BadSetting(f"attention={name!r}: {type(model).__name__} cannot run it ({error}).") from error


def _dropouts(model: nn.Module, attention: float | None, hidden: float | None) -> list:
    """Set the rates; returns what undoes it: (object, attribute, value before) or hooks.

    Dropouts in the module that holds q, k and v are attention's, but for one on its output; all others are hidden
    ones. Families without any in their blocks (LLaMA and its kin) get it on the outputs of attention and feed-forward.
    """
    found, undo, places = architecture(model), [], []
    attentions = [
        one.module for b in found.blocks for one in (b.attention, b.cross_attention) if one is not None
    ]
    for owner in model.modules():
        for name, value in [*vars(owner).items(), *owner.named_children()]:
            rate = value.p if isinstance(value, nn.Dropout) else value
            if (
                not isinstance(rate, float)
                or ("drop" not in name)
                or name in ("layerdrop", "activation_dropout")
            ):
                continue
            own = any(owner is one for one in attentions) and not name.startswith(("resid", "output"))
            target = (value, "p") if isinstance(value, nn.Dropout) else (owner, name)
            places.append((own, *target, rate))
    for wanted, own in ((attention, True), (hidden, False)):
        some = [place[1:] for place in places if place[0] is own] if wanted is not None else []
        undo += some
        for target, attribute, _ in some:
            setattr(target, attribute, wanted)
        if not some and wanted is not None and own:
            raise BadSetting(
                f"{type(model).__name__} has no attention dropout; leave attention_dropout at None."
            )
        if not some and wanted:

            def drop(module: nn.Module, _, output, rate=wanted):
                return F.dropout(output, rate, training=module.training)

            outputs = [(block.attention.o, block.ffn.output) for block in found.blocks if block.ffn]
            undo += [one.module.register_forward_hook(drop) for pair in outputs for one in pair]
    return undo


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
