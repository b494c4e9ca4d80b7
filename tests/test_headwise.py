"""The head-wise nonlinearity: LLaMA where φ is the identity; causal, cached, stored and compressed."""

import pytest
import torch
from accelerate import init_empty_weights
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lmcompress.errors import BadSetting
from lmcompress.experiments.architecture import config_of
from lmcompress.models import loading, storage
from lmcompress.models.anatomy import anatomy, count_parameters, prunable
from lmcompress.models.headwise import HeadwiseConfig, HeadwiseForCausalLM, HeadwisePhi
from lmcompress.models.surgery import keep_heads
from tests.tiny_models import inputs, tiny

KINDS = ["headwise", "headwise_per_head"]


@pytest.mark.parametrize("phi", ["none", "shared", "per-head"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_the_identity_for_phi_it_is_llama(phi, attention):
    llama = tiny("llama", attn_implementation=attention)
    fields = {k: v for k, v in llama.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = HeadwiseConfig(**fields, phi=phi, phi_activation="linear", attn_implementation=attention)
    ours = HeadwiseForCausalLM(config).eval()
    missing = ours.load_state_dict(llama.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(".phi." in name for name in missing.missing_keys)
    for module in ours.modules():
        if isinstance(module, HeadwisePhi):
            module.weight.data.copy_(torch.eye(config.head_dim).expand_as(module.weight))
            module.bias.data.zero_()
    given = inputs(llama, padded=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(**given).logits, llama(**given).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_phi_is_silu_of_an_affine_map_of_each_heads_output_before_they_are_joined(kind):
    model = tiny(kind)
    attention, seen = model.model.layers[0].self_attn, {}
    attention.phi.register_forward_hook(lambda _, given, out: seen.update(z=given[0], out=out))
    attention.o_proj.register_forward_hook(lambda _, given, out: seen.update(joined=given[0]))
    with torch.no_grad():
        model(**inputs(model))
    assert seen["z"].shape == (3, 9, 4, 8)
    for head in range(4):
        weight, bias = attention.phi.weight, attention.phi.bias
        if kind == "headwise_per_head":
            weight, bias = weight[head], bias[head]
        affine = seen["z"][:, :, head] @ weight.T + bias
        torch.testing.assert_close(seen["joined"][..., 8 * head : 8 * head + 8], F.silu(affine))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_tokens_up_to_theirs_and_on_no_later_one(kind):
    model, given = tiny(kind), torch.randint(3, 100, (1, 9))
    with torch.no_grad():
        base = model(given).logits[0]
        for place in range(9):
            changed = given.clone()
            changed[0, place] = (given[0, place] - 2) % 97 + 3
            differs = (model(changed).logits[0] - base).abs().amax(-1) > 1e-6
            assert not differs[:place].any() and differs[place:].all()


def test_the_loss_is_that_of_the_next_token():
    model, ids = tiny("headwise"), torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        found = model(ids, labels=ids)
    wanted = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_gives_what_no_cache_gives(kind):
    model, ids = tiny(kind), torch.randint(3, 100, (2, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **settings)
    assert cached.shape == (2, 11) and torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded_by_transformers_and_by_us(tmp_path, kind):
    model = tiny(kind)
    model.save_pretrained(tmp_path / "plain")
    storage.save(model, tmp_path / "ours")
    again = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain"),
        loading.load(tmp_path / "plain").model,
        storage.load(tmp_path / "ours")[0],
    ]
    given = inputs(model)
    for one in again:
        assert type(one) is HeadwiseForCausalLM and one.config.phi == model.config.phi
        with torch.no_grad():
            assert torch.equal(one.eval()(**given).logits, model(**given).logits)


@pytest.mark.parametrize("layers, wanted", [(5, 128_789_504), (8, 166_740_992)])
def test_parameters_at_full_scale_are_the_published_ones(layers, wanted):
    counts = {}
    for phi in ("none", "shared", "per-head"):
        with init_empty_weights():
            counts[phi] = count_parameters(HeadwiseForCausalLM(config_of("full", layers, phi)))
    with init_empty_weights():
        fields = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8}
        independent = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=32_000, **fields))
    assert counts["none"] == wanted == count_parameters(independent)
    assert counts["shared"] - wanted == layers * (128**2 + 128)
    assert counts["per-head"] - wanted == 8 * layers * (128**2 + 128)


@pytest.mark.parametrize("kind", KINDS)
def test_techniques_see_a_llamas_maps_and_leave_phi_alone(kind):
    model = tiny(kind)
    roles = [one.role for one in anatomy(model).blocks[0].linears]
    assert roles == [one.role for one in anatomy(tiny("llama")).blocks[0].linears]
    assert not any(".phi" in one.name for policy in ("blocks", "all") for one in prunable(model, policy))


def test_heads_take_their_own_phi_with_them():
    model = tiny("headwise_per_head")
    smaller = keep_heads(model, {"model.layers.0": [2, 3]})
    phi, was = smaller.model.layers[0].self_attn.phi, model.model.layers[0].self_attn.phi
    assert torch.equal(phi.weight, was.weight[2:]) and torch.equal(phi.bias, was.bias[2:])
    model.model.layers[0].self_attn.o_proj.weight.data[:, :16] = 0  # heads 0 and 1 are not heard
    with torch.no_grad():
        torch.testing.assert_close(smaller(**inputs(model)).logits, model(**inputs(model)).logits)


def test_an_unknown_phi_is_refused():
    with pytest.raises(BadSetting, match="none, shared, per-head"):
        HeadwiseConfig(phi="each")
    with pytest.raises(BadSetting, match="silu"):
        HeadwiseConfig(phi_activation="nothing")
