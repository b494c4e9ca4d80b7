"""Slicing against the dense model with the same parts masked: equal outputs, gradients and generation."""

import copy

import pytest
import torch
import transformers
from tiny_models import CASES, DECODERS, ENCODERS, FAMILIES, HEAD_OWNERS, HEADS, inputs, kind, tiny
from torch import nn

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families, surgery
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.models.surgery import drop_blocks, keep_ffn, keep_heads, keep_hidden


def attentions(model: nn.Module):
    return [attention for block in anatomy(model).blocks for attention in block.attentions]


def uneven_heads(model: nn.Module) -> dict[str, list[int]]:
    """A different number and choice of heads in each attention; whole groups under grouped queries."""
    keep = {}
    for i, attention in enumerate(attentions(model)):
        if attention.kv_heads < attention.heads:
            keep[attention.name] = [2, 3] if i % 2 == 0 else [0, 1, 2, 3]
        else:
            keep[attention.name] = [[1, 3], [0, 2, 3], [2]][i % 3]
    return keep


class OnlyOver(nn.Module):
    """A norm that works on some dimensions alone and gives zero elsewhere: what slicing makes of norms."""

    def __init__(self, norm: nn.Module, keep: list[int]):
        super().__init__()
        self.norm, self.keep = copy.deepcopy(norm), keep
        for leaf in ("weight", "bias"):
            if getattr(norm, leaf, None) is not None:
                setattr(self.norm, leaf, nn.Parameter(getattr(norm, leaf)[keep]))
        if hasattr(norm, "normalized_shape"):
            self.norm.normalized_shape = (len(keep),)

    def forward(self, x):
        out = torch.zeros_like(x)
        out[..., self.keep] = self.norm(x[..., self.keep])
        return out


@torch.no_grad()
def mask_heads(model: nn.Module, keep: dict[str, list[int]]) -> nn.Module:
    model = copy.deepcopy(model)
    for attention in attentions(model):
        every = range(attention.heads)
        gone = [head for head in every if head not in keep.get(attention.name, every)]
        if gone:
            attention.o.weight2d()[:, attention.columns(gone)] = 0
            rows = dict(zip(("q", "k"), (index for _, index in attention.rows(keep[attention.name]))))
            for role, index in rows.items():  # OLMo 2 norms over all heads: then over those that are left
                norm = getattr(attention.module, f"{role}_norm", None)
                if norm is not None and norm.weight.shape[0] > attention.head_dim:
                    setattr(attention.module, f"{role}_norm", OnlyOver(norm, index.tolist()))
    return model


def uneven_channels(model: nn.Module) -> dict[str, list[int]]:
    blocks = anatomy(model).blocks
    return {b.name: list(range(i % 3, b.ffn.width, 2 + i % 2)) for i, b in enumerate(blocks)}


@torch.no_grad()
def mask_channels(model: nn.Module, keep: dict[str, list[int]]) -> nn.Module:
    model = copy.deepcopy(model)
    for block in anatomy(model).blocks:
        gone = [c for c in range(block.ffn.width) if c not in keep[block.name]]
        block.ffn.output.weight2d()[:, gone] = 0
    return model


def first_output(model: nn.Module, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model, padded=True, **more))[0]


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest entry (T5's unscaled logits are in the tens)."""
    torch.testing.assert_close(got, want, atol=1e-5 * max(1.0, want.abs().max().item()), rtol=0)


def assert_same(sliced: nn.Module, masked: nn.Module) -> None:
    assert_close(first_output(sliced), first_output(masked))


def assert_trains(model: nn.Module) -> None:
    model.train()
    model(**inputs(model))[0].square().mean().backward()
    for layer in (layer for block in anatomy(model).blocks for layer in block.linears):
        assert layer.module.weight.grad is not None and layer.module.weight.grad.isfinite().all(), layer.name
    model.zero_grad()
    model.eval()


def assert_generates_like(model: nn.Module, reference: nn.Module, *, length: int = 9) -> None:
    """Greedy generation with a KV cache gives the reference's tokens, and those without a cache."""
    batch = {k: v for k, v in inputs(model, length=length).items() if k != "decoder_input_ids"}
    ask = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(**batch, **ask, use_cache=True)
    assert cached.tolist() == model.generate(**batch, **ask, use_cache=False).tolist()
    assert cached.tolist() == reference.generate(**batch, **ask, use_cache=True).tolist()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict, config: dict) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family, head", CASES)
@pytest.mark.parametrize(
    ("choose", "cut", "mask"),
    [(uneven_heads, keep_heads, mask_heads), (uneven_channels, keep_ffn, mask_channels)],
    ids=["heads", "channels"],
)
def test_sliced_models_equal_masked_ones(choose, cut, mask, family, head):
    model = tiny(family, head)
    before, config = snapshot(model), model.config.to_dict()
    keep = choose(model)
    sliced, masked = cut(model, keep), mask(model, keep)
    assert_untouched(model, before, config)
    assert count_parameters(sliced) < count_parameters(model)
    widths = {a.name: a.heads for a in attentions(sliced)}
    widths |= {b.name: b.ffn.width for b in anatomy(sliced).blocks}
    assert {name: widths[name] for name in keep} == {name: len(units) for name, units in keep.items()}
    assert_same(sliced, masked)
    assert (first_output(masked) - first_output(model)).abs().max() > 1e-2
    assert_trains(sliced)


@pytest.mark.parametrize("family", [f for f in FAMILIES + HEAD_OWNERS if f not in ENCODERS])
def test_sliced_models_generate_with_a_cache_as_the_masked_ones(family):
    model = tiny(family)
    heads, channels = uneven_heads(model), uneven_channels(model)
    sliced = keep_ffn(keep_heads(model, heads), channels)
    assert_generates_like(sliced, mask_channels(mask_heads(model, heads), channels))


@torch.no_grad()
def without(model: nn.Module, stack: str, gone: list[int]) -> nn.Module:
    """The dense model in which the given blocks hand their input on."""
    model = copy.deepcopy(model)
    for i in gone:
        block = anatomy(model).stacks[stack][i].module
        forward = block.forward

        def skip(hidden_states, *args, forward=forward, **kwargs):
            out = forward(hidden_states, *args, **kwargs)
            return (hidden_states, *out[1:]) if isinstance(out, tuple) else hidden_states

        block.forward = skip
    return model


@pytest.mark.parametrize("family, head", [case for case in CASES if case[0] != "albert"])
def test_dropped_blocks_equal_skipped_blocks(family, head):
    gone = [0, 2]
    deeper = {
        "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
        "gemma3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "distilbert": {"n_layers": 4},
        "t5": {"num_layers": 4, "num_decoder_layers": 4},
        "bart": {"encoder_layers": 4, "decoder_layers": 4},
    }
    model = tiny(family, head, **deeper.get(family.split("_gated")[0], {"num_hidden_layers": 4}))
    before, config = snapshot(model), model.config.to_dict()
    for stack in anatomy(model).stacks:
        sliced, skipping = drop_blocks(model, {stack: gone}), without(model, stack, gone)
        assert_untouched(model, before, config)
        assert len(anatomy(sliced).stacks[stack]) == 4 - len(gone)
        assert_same(sliced, skipping)
        assert_trains(sliced)
        again = type(sliced)(type(sliced.config).from_dict(sliced.config.to_dict()))
        again.load_state_dict(sliced.state_dict())
        again.eval()
        assert_same(sliced, again)
        if head == "lm" and kind(family) != "encoder":
            assert_generates_like(sliced, again)


def test_albert_drops_runs_of_its_shared_block():
    model = tiny("albert", num_hidden_layers=5)
    sliced = drop_blocks(model, {"encoder": [1, 3]})
    shallow = tiny("albert", num_hidden_layers=3)
    shallow.load_state_dict(model.state_dict())
    assert_same(sliced, shallow)
    with pytest.raises(UnknownFamily, match="groups"):
        drop_blocks(tiny("albert", num_hidden_groups=2), {"encoder": [0]})


def test_t5_keeps_the_position_bias_of_each_head():
    """Without its rows of block 0's table a sliced block would take another head's biases."""
    model = tiny("t5")
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(8)
    keep = {b.name: [3] if b.index else [0, 2] for b in anatomy(model).blocks}
    sliced = keep_heads(model, keep)
    masked = mask_heads(model, {block.attention.name: keep[block.name] for block in anatomy(model).blocks})
    assert_same(sliced, masked)
    shapes = [tuple(b.attention.module.relative_attention_bias.weight.shape) for b in anatomy(sliced).blocks]
    assert shapes == [(8, 2), (8, 1), (8, 2), (8, 1)]


def test_whole_groups_only():
    model = tiny("llama")
    name = anatomy(model).blocks[0].name
    pytest.raises(BadSetting, keep_heads, model, {name: [0, 2, 3]}).match(r"whole groups.*\[0, 1\]")
    sliced = keep_heads(model, {name: [3, 2, 2]})
    attention = anatomy(sliced).blocks[0].attention
    assert (attention.heads, attention.kv_heads) == (2, 1)


@pytest.mark.parametrize(
    "cut, asked",
    [(keep_heads, asked) for asked in ({"nowhere": [0]}, {"FIRST": []}, {"FIRST": [4]}, {"FIRST": [-1]})]
    + [(keep_ffn, {"FIRST": [48]}), (keep_ffn, {"FIRST": []}), (keep_hidden, []), (keep_hidden, [32])]
    + [(drop_blocks, asked) for asked in ({"decoder": [0]}, {"encoder": [2]}, {"encoder": [0, 1]})],
)
def test_bad_requests_say_what_there_is(cut, asked):
    model = tiny("bert")
    if "FIRST" in asked:
        asked = {anatomy(model).blocks[0].name: asked["FIRST"]}
    pytest.raises(BadSetting, cut, model, asked).match("available|there are")


def test_a_shared_map_is_cut_once_and_only_one_way():
    model = tiny("bert")
    first, second = model.bert.encoder.layer
    second.intermediate, second.output.dense = first.intermediate, first.output.dense
    names = [block.name for block in anatomy(model).blocks]
    sliced = keep_ffn(model, dict.fromkeys(names, [1, 5, 7]))
    assert sliced.bert.encoder.layer[1].output.dense is sliced.bert.encoder.layer[0].output.dense
    assert_same(sliced, mask_channels(model, dict.fromkeys(names, [1, 5, 7])))
    pytest.raises(BadSetting, keep_ffn, model, {names[0]: [1, 2], names[1]: [3, 4]}).match("shared")


def test_replaced_maps_and_experts_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Bilinear(1, 1, 32)
    mlp.down_proj.in_features, mlp.down_proj.out_features = 48, 32
    pytest.raises(BadSetting, keep_ffn, model, {"model.layers.0": [0, 1]}).match("before factorizing")
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    mixture = MixtralForCausalLM(MixtralConfig(**shape, **heads))
    pytest.raises(UnknownFamily, keep_ffn, mixture, {"model.layers.0": [0, 1]}).match("mixture of experts")
    assert anatomy(keep_heads(mixture, {"model.layers.0": [2, 3]})).blocks[0].attention.heads == 2


NORMED = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
NORMED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    "name, more", [("Cohere", {"use_qk_norm": True}), ("Olmo3", {}), ("GptOss", {"head_dim": 8})]
)
def test_further_things_that_heads_own(name, more):
    """A norm with a row for each head, one over all heads beside windowed attention, and sinks."""
    more |= {"num_local_experts": 2, "num_experts_per_tok": 1} if name == "GptOss" else {}
    config = getattr(transformers, f"{name}Config")(**NORMED, **more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    keep = {attention.name: [2, 3] for attention in attentions(model)}
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert_close(keep_heads(model, keep)(ids).logits, mask_heads(model, keep)(ids).logits)


@pytest.mark.parametrize(
    "family, forgotten",
    [("stablelm", ("HEAD_OWNED", {})), ("gpt_bigcode", ("FUSED_LAYOUT", {"c_attn": "stacked"}))]
    + [("olmo2", ("HEAD_OWNED", {})), ("falcon", ("KV_HEAD_ATTRIBUTES", ()))],
)
def test_what_is_cut_wrongly_is_refused_with_the_name_of_the_block(family, forgotten, monkeypatch):
    """Each family without what `families` knows of it; the first two would give wrong numbers, not errors."""
    model = tiny(family).train()
    before, config = snapshot(model), model.config.to_dict()
    monkeypatch.setattr(families, *forgotten)
    first = anatomy(model).blocks[0].name
    silent = family in ("stablelm", "gpt_bigcode")
    message = rf"{first} .*difference" if silent else "fails after 0 of its blocks"
    with pytest.raises(UnknownFamily, match=message):
        keep_heads(model, {attention.name: [2, 3] for attention in attentions(model)})
    assert_untouched(model, before, config)
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_the_check_sees_channels_blocks_and_hidden_dimensions(monkeypatch):
    model = tiny("llama")
    first = anatomy(model).blocks[0].name
    monkeypatch.setattr(surgery, "set_ints", lambda *_, **__: None)
    real = surgery.cut_linear
    wrong = {"columns": lambda layer, memo, columns: real(layer, memo, columns=(columns + 1) % 48)}

    def off_by_one(layer, memo, **sides):
        return wrong["columns"](layer, memo, **sides) if "columns" in sides else real(layer, memo, **sides)

    monkeypatch.setattr(surgery, "cut_linear", off_by_one)
    with pytest.raises(UnknownFamily, match=f"{first} .*difference"):
        keep_ffn(model, {block.name: range(10) for block in anatomy(model).blocks})
    monkeypatch.undo()

    def keep_first(model, blocks, kept):
        model.model.layers = nn.ModuleList([blocks[0].module])

    monkeypatch.setattr(surgery, "_keep_modules", keep_first)
    pytest.raises(UnknownFamily, drop_blocks, model, {"decoder": [0]}).match(f"{first} .*difference")
    monkeypatch.undo()
    monkeypatch.setattr(surgery, "cut_norm", lambda *_: None)
    pytest.raises(UnknownFamily, keep_hidden, model, range(8)).match("fails")


def test_the_check_leaves_a_model_that_changes_itself_as_it_was():
    """BigBird puts another attention in place of its own for short inputs."""
    shape = {key: value for key, value in NORMED.items() if key != "num_key_value_heads"}
    model = transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(**shape, max_position_embeddings=256))
    before = [type(module) for module in model.modules()]
    keep_ffn(model, {anatomy(model).blocks[0].name: range(7)})
    assert [type(module) for module in model.modules()] == before and model.training


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
        wide = "Norm" in type(module).__name__ and not of_heads and families.norm_width(module) == 32
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
