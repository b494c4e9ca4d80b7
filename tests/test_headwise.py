"""The head-wise nonlinearity: LLaMA where φ is the identity; causal, cached, stored and compressed."""

import pytest
import torch
from accelerate import init_empty_weights
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lmcompress.errors import BadSetting
from lmcompress.experiments.architecture import config_of
from lmcompress.models.anatomy import count_parameters
from lmcompress.models.headwise import HeadwiseConfig, HeadwiseForCausalLM, HeadwisePhi
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


def test_an_unknown_phi_is_refused():
    pytest.raises(BadSetting, HeadwiseConfig, phi="each").match("none, shared, per-head")
    pytest.raises(BadSetting, HeadwiseConfig, phi_activation="nothing").match("silu")
