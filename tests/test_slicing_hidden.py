"""Slicing the hidden size, everything together, and the config afterwards."""

import copy

import pytest
import torch
from test_slicing import (
    OnlyOver,
    assert_close,
    assert_generates_like,
    assert_same,
    assert_trains,
    assert_untouched,
    attentions,
    first_output,
    snapshot,
    uneven_channels,
    uneven_heads,
)
from tiny_models import DECODERS, FAMILIES, HEAD_OWNERS, HEADS, kind, tiny
from torch import nn

from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.models.surgery import drop_blocks, keep_ffn, keep_heads, keep_hidden

KEPT_HIDDEN = [0, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14, 17, 18, 20, 21, 23, 25, 26, 28, 29, 30, 31]


@torch.no_grad()
def restrict_hidden(model: nn.Module, keep: list[int]) -> nn.Module:
    """The dense model whose hidden states are zero, and whose norms blind, outside `keep`."""
    model = copy.deepcopy(model)
    gone = [i for i in range(32) if i not in keep]
    structure = anatomy(model)
    projections = [layer for layer in structure.embeddings if layer.role == "in"]
    linears = [layer for block in structure.blocks for layer in block.linears]
    for layer in [layer for layer in linears if layer.role in ("o", "out")] + projections:
        layer.weight2d()[gone] = 0
        if layer.module.bias is not None:
            layer.module.bias[gone] = 0
    for table in structure.embeddings if not projections else ():
        if table.module.weight.shape[1] == 32:
            table.module.weight[:, gone] = 0
    for name, module in list(model.named_modules()):
        of_heads = (
            name.rpartition(".")[2] in ("q_norm", "k_norm") or "q_layernorm" in name or "k_layernorm" in name
        )
        wide = "Norm" in type(module).__name__ and not of_heads and module.weight.shape[0] == 32
        if wide:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, OnlyOver(module, keep))
    return model


@pytest.mark.parametrize(
    "family, head", [(f, h) for f in FAMILIES for h in HEADS] + [(f, "lm") for f in HEAD_OWNERS]
)
def test_sliced_hidden_size_equals_a_model_blind_to_the_rest(family, head):
    model = tiny(family, head)
    before, config = snapshot(model), model.config.to_dict()
    sliced, reference = keep_hidden(model, KEPT_HIDDEN), restrict_hidden(model, KEPT_HIDDEN)
    assert_untouched(model, before, config)
    assert anatomy(sliced).hidden_size == len(KEPT_HIDDEN)
    assert count_parameters(sliced) < count_parameters(model)
    got, want = first_output(sliced), first_output(reference)
    if want.shape != got.shape:
        assert want[..., [i for i in range(32) if i not in KEPT_HIDDEN]].abs().max() == 0
        want = want[..., KEPT_HIDDEN]
    assert_close(got, want)
    assert_trains(sliced)
    if head == "lm":
        table = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is table
        assert (sliced.get_output_embeddings().weight is sliced.get_input_embeddings().weight) == tied
        if kind(family) != "encoder":
            assert_generates_like(sliced, reference)


@pytest.mark.parametrize("family", DECODERS + HEAD_OWNERS + ["t5", "t5_gated", "bart", "bert"])
def test_slicing_everything_at_once_still_generates(family):
    model = tiny(family)
    stack = list(anatomy(model).stacks)[-1]
    sliced = drop_blocks(keep_heads(model, uneven_heads(model)), {stack: [0]})
    sliced = keep_hidden(keep_ffn(sliced, uneven_channels(sliced)), KEPT_HIDDEN[:16])
    again = keep_heads(sliced, {a.name: range(a.heads) for a in attentions(sliced)})
    assert_same(sliced, again)
    assert_trains(sliced)
    if kind(family) != "encoder":
        assert_generates_like(sliced, again)


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5", "gpt2", "bert", "opt", "bart"])
def test_uniform_widths_reach_the_config_where_it_can_say_them(family):
    model = tiny(family)
    sliced = keep_ffn(model, {b.name: range(20) for b in anatomy(model).blocks})
    again = type(sliced)(type(sliced.config).from_dict(sliced.config.to_dict()))
    again.load_state_dict(sliced.state_dict())
    assert_same(sliced, again.eval())
    halved = keep_heads(model, {a.name: [0, 1] for a in attentions(model)})
    if family in ("llama", "qwen2"):
        assert (halved.config.num_attention_heads, halved.config.num_key_value_heads) == (2, 1)
        narrow = keep_hidden(halved, range(24))
        again = type(narrow)(type(narrow.config).from_dict(narrow.config.to_dict()))
        again.load_state_dict(narrow.state_dict())
        assert_same(narrow, again.eval())
    else:
        assert halved.config.num_attention_heads == 4, "the width of a head would follow from it"


def test_gemma_keeps_the_scale_of_its_embedding():
    sliced = keep_hidden(tiny("gemma"), range(16))
    assert float(sliced.model.embed_tokens.embed_scale) == pytest.approx(32**0.5)
    assert sliced.config.hidden_size == 32
