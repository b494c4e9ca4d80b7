"""Tiny random models of every supported family, so that tests need neither network nor time.

All have hidden size 32, two blocks per stack, four heads and a vocabulary of 100; weights are drawn
with a spread wide enough that attention is not uniform and every head matters.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import lmcompress.models.headwise  # noqa: F401 - registers the architecture
from lmcompress.models import storage
from lmcompress.models.anatomy import count_parameters

VOCAB = 100
_ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_FALCON |= {"multi_query": False, "new_decoder_architecture": False} | _ENDS
_SHAPES: dict[str, dict] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    | {"max_position_embeddings": 66, "pad_token_id": 0},
    "albert": _BERT | {"embedding_size": 16},
    "electra": _BERT | {"embedding_size": 16},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | _ENDS,
    "gpt_neo": {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
    | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}
    | _ENDS,
    "gpt_neox": {k: v for k, v in _ROPE.items() if k not in ("num_key_value_heads", "head_dim")},
    "opt": {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    | _ENDS,
    "llama": _ROPE,
    "headwise": _ROPE | {"phi": "shared"},
    "headwise_per_head": _ROPE | {"phi": "per-head"},
    "mistral": _ROPE | {"sliding_window": 6},
    "qwen2": _ROPE,
    "qwen3": _ROPE,
    "gemma": _ROPE,
    "gemma2": _ROPE | {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3": _ROPE
    | {"sliding_window": 6, "query_pre_attn_scalar": 8}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "stablelm": {k: v for k, v in _ROPE.items() if k != "head_dim"} | {"qk_layernorm": True},
    "olmo2": {k: v for k, v in _ROPE.items() if k != "head_dim"},
    "gpt_bigcode": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | {"multi_query": False}
    | _ENDS,
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4} | _ENDS,
    "falcon": _FALCON | {"alibi": False},
    "falcon_rw": _FALCON | {"alibi": True, "bias": True, "parallel_attn": False},
    "t5": _T5 | {"feed_forward_proj": "relu"},
    "t5_gated": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
    | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    | {"forced_eos_token_id": None}
    | _ENDS,
}
_ROPE_ALONE = {k: v for k, v in _ROPE.items() if k != "head_dim"}
_BART = _SHAPES["bart"]
# Further families, each tried once for each technique (family_grid.py), and not in the tests of every family.
_WIDER: dict[str, dict] = {
    "xlm-roberta": _BERT,
    "mpnet": _BERT,
    "deberta": _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "deberta-v2": _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v3": _BERT
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "modernbert": _BERT
    | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    | _ENDS,
    "gptj": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | {"rotary_dim": 4}
    | _ENDS,
    "codegen": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64}
    | {"rotary_dim": 4}
    | _ENDS,
    "gpt_bigcode_mq": _SHAPES["gpt_bigcode"] | {"multi_query": True},
    "falcon_mq": _FALCON | {"multi_query": True, "alibi": False},
    "falcon_grouped": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64} | _ENDS,
    "phi": _ROPE_ALONE | {"partial_rotary_factor": 0.5},
    "phi3": _ROPE_ALONE,
    "olmo": _ROPE_ALONE,
    "cohere": _ROPE_ALONE | {"use_qk_norm": True},
    "smollm3": _ROPE_ALONE | {"no_rope_layers": [1, 0]},
    "glm4": _ROPE | {"head_dim": 16},
    "mixtral": _ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _ROPE_ALONE
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": _ROPE
    | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mt5": _T5 | {"feed_forward_proj": "gated-gelu", "d_kv": 12},
    "mbart": _BART,
    "pegasus": _BART,
    "marian": _BART | {"decoder_start_token_id": 0},
}
_MODEL_TYPE = {
    "gemma3": "gemma3_text",
    "deberta-v3": "deberta-v2",
    "gpt_bigcode_mq": "gpt_bigcode",
    "falcon_mq": "falcon",
    "falcon_grouped": "falcon",
    "t5_gated": "t5",
    "falcon_rw": "falcon",
    "headwise": "headwise-llama",
    "headwise_per_head": "headwise-llama",
}

# Families whose heads own more than rows of q, k and v; slicing is tried on them, too.
HEAD_OWNERS = ["stablelm", "olmo2", "gpt_bigcode", "bloom", "falcon", "falcon_rw"]
FAMILIES = [name for name in _SHAPES if name not in HEAD_OWNERS]
WIDER = [*_WIDER]
ENCODERS = ["bert", "roberta", "distilbert", "albert", "electra"]
ENCODER_DECODERS = ["t5", "t5_gated", "bart"]
DECODERS = [name for name in FAMILIES if name not in ENCODERS + ENCODER_DECODERS]
_WIDER_ENCODERS = ["xlm-roberta", "mpnet", "deberta", "deberta-v2", "deberta-v3", "modernbert"]
_WIDER_ENCODER_DECODERS = ["mt5", "mbart", "pegasus", "marian"]
HEADS = ["lm", "classification", None]
# Every family with the head it is made for; other heads, of which blocks know nothing, in five of them.
CASES = [(family, "lm") for family in FAMILIES + HEAD_OWNERS]
CASES += [(family, head) for family in ("bert", "gpt2", "llama", "t5", "bart") for head in HEADS[1:]]


def kind(family: str) -> str:
    """ "encoder", "decoder" or "encoder-decoder"."""
    if family in ENCODERS + _WIDER_ENCODERS:
        return "encoder"
    return "encoder-decoder" if family in ENCODER_DECODERS + _WIDER_ENCODER_DECODERS else "decoder"


def tiny(family: str, head: str | None = "lm", *, seed: int = 0, **changes) -> nn.Module:
    """A random model of `family` in eval mode, fp32; sdpa attention where the family has it.

    Args:
        family: one of `FAMILIES`, `HEAD_OWNERS` or `WIDER`.
        head: "lm" (masked, causal or sequence-to-sequence, as the family has it), "classification",
            or None for the bare stack.
        seed: of the weights.
        changes: overrides of config fields.
    """
    shape = _SHAPES.get(family) or _WIDER[family]
    config = AutoConfig.for_model(_MODEL_TYPE.get(family, family), **(shape | changes))
    language = {
        "encoder": AutoModelForMaskedLM,
        "decoder": AutoModelForCausalLM,
        "encoder-decoder": AutoModelForSeq2SeqLM,
    }[kind(family)]
    build = {None: AutoModel, "classification": AutoModelForSequenceClassification, "lm": language}[head]
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = build.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.25 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    torch.random.set_rng_state(generator_state)
    return model


def inputs(
    model: nn.Module, *, batch: int = 3, length: int = 9, padded: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random ids `(batch, length)` and an attention mask; encoder-decoders get decoder ids as well.

    With `padded`, row i ends in i padding tokens (right padding, id 0).
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=draw)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):
            ids[row, -row:] = 0
            mask[row, -row:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        if "Classification" in type(model).__name__:
            # These heads read the state at the last end token.
            ids[torch.arange(batch), mask.sum(1) - 1] = model.config.eos_token_id
        else:
            found["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, length - 2), generator=draw)
    return found


def calibration_batches(
    kind: str = "decoder", count: int = 2, *, rows: int = 3, length: int = 10
) -> list[dict[str, torch.Tensor]]:
    """Ids with the last positions of the first row padded and, but for an encoder, the ids as labels."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(5, VOCAB, (rows, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, length // 2 + index :] = 0
        batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
        if kind != "encoder":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        made.append(batch)
    return made


@torch.no_grad()
def logits(model: nn.Module, batch: dict | None = None) -> torch.Tensor:
    """The logits, or the last hidden state, of a batch, by default of padded `inputs`."""
    out = model(**(batch or inputs(model, padded=True)))
    return out.logits if "logits" in out else out[0]


def reloaded(
    model: nn.Module, folder: Path, batch: dict | None = None, *, tolerance=0.0, **more
) -> nn.Module:
    """Save a model and load it again; check that it has the same outputs and as many parameters."""
    again, _ = storage.load(storage.save(model, folder, **more))
    torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=tolerance, rtol=tolerance)
    assert count_parameters(again) == count_parameters(model)
    return again
