"""A LLaMA whose attention heads each end in a nonlinearity, as an architecture of its own for `transformers`.

Importing this module registers it with the Auto classes, so that it loads, generates and is compressed like
any other. Queries, keys, values and everything else are LLaMA's.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from lmcompress.errors import BadSetting

PHIS = ("none", "shared", "per-head")


@strict
class HeadwiseConfig(LlamaConfig):
    """A LLaMA's config with the kind of `phi` ("none", "shared" by a layer's heads, "per-head")."""

    model_type = "headwise-llama"
    phi: str = "shared"
    phi_activation: str = "silu"  # a name of transformers.activations; "linear" is the identity

    def __post_init__(self, **kwargs):
        if self.phi not in PHIS or self.phi_activation not in ACT2FN:
            raise BadSetting(
                f"phi={self.phi!r} with {self.phi_activation!r}: phi is one of {', '.join(PHIS)}, its "
                f"activation one of {', '.join(ACT2FN)}."
            )
        super().__post_init__(**kwargs)


class HeadwisePhi(nn.Module):
    """`φ(z) = activation(P z + p)` on the output z of every head, `(batch, seq, heads, head_dim)`.

    Not an `nn.Linear`, because P mixes the inside of a head only: it is no linear layer of the block that
    could be cut or quantized as one, and `anatomy` leaves it as it is.
    """

    def __init__(self, config: HeadwiseConfig):
        super().__init__()
        self.per_head = config.phi == "per-head"
        owners = (config.num_attention_heads,) if self.per_head else ()
        self.weight = nn.Parameter(torch.empty(*owners, config.head_dim, config.head_dim))
        self.bias = nn.Parameter(torch.empty(*owners, config.head_dim))
        self.activation = ACT2FN[config.phi_activation]

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.per_head:
            return self.activation(torch.einsum("bshi,hoi->bsho", z, self.weight) + self.bias)
        return self.activation(F.linear(z, self.weight, self.bias))


class HeadwiseAttention(llama.LlamaAttention):
    """LLaMA's attention with φ between the heads' outputs and their concatenation."""

    def __init__(self, config: HeadwiseConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.phi != "none":
            self.phi = HeadwisePhi(config)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (layer(hidden_states).view(shape).transpose(1, 2) for layer in layers)
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        settings = {"dropout": dropout, "scaling": self.scaling, **kwargs}
        heads, weights = attend(self, query, key, value, attention_mask, **settings)
        heads = self.phi(heads) if hasattr(self, "phi") else heads
        return self.o_proj(heads.flatten(2)), weights


class HeadwisePreTrainedModel(llama.LlamaPreTrainedModel):
    """P starts with spread 1/√head_dim, which keeps the width of z: 0.02, as elsewhere, would not."""

    config: HeadwiseConfig
    config_class = HeadwiseConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HeadwisePhi):
            init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
            init.zeros_(module.bias)


class HeadwiseModel(HeadwisePreTrainedModel, llama.LlamaModel):
    """The stack without a head."""

    def __init__(self, config: HeadwiseConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = HeadwiseAttention(config, index)
        self.post_init()


class HeadwiseForCausalLM(HeadwisePreTrainedModel, llama.LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: HeadwiseConfig):
        super().__init__(config)
        self.model = HeadwiseModel(config)
        self.post_init()


class HeadwiseForSequenceClassification(GenericForSequenceClassification, HeadwisePreTrainedModel):
    """The stack with a classifier on the last token."""


AutoConfig.register(HeadwiseConfig.model_type, HeadwiseConfig)
AutoModel.register(HeadwiseConfig, HeadwiseModel)
AutoModelForCausalLM.register(HeadwiseConfig, HeadwiseForCausalLM)
AutoModelForSequenceClassification.register(HeadwiseConfig, HeadwiseForSequenceClassification)
