"""GGUF: one file with weights, shape and tokenizer, which llama.cpp runs and transformers reads.

For decoders shaped like LLaMA, Qwen 2 and 3, and GPT-2. Matrices are F16, or rounded anew in blocks of 32:
Q8_0 (8 bits) or Q4_0 (4 bits, token table and head in 8), each block with a scale in 16 bits. Integers of a
model that was quantized before are made floating-point first: no scheme of this package has these blocks.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import BadSetting
from lmcompress.formats.dense import dense_copy, read_back, undescribed
from lmcompress.models import storage
from lmcompress.models.anatomy import anatomy
from lmcompress.models.auto import auto_class

FILE = "model.gguf"
ENCODINGS = ("F16", "Q8_0", "Q4_0")
BLOCK = 32  # weights of a row that share a scale
# Family -> what llama.cpp takes for granted in it: fields of the config.
TAKEN_FOR_GRANTED = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "qwen3": {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
}


def refusal(model: PreTrainedModel, *, encoding: str) -> str | None:
    """Return why the format cannot hold `model`, or None."""
    config, family = model.config, model.config.model_type
    if family not in TAKEN_FOR_GRANTED or auto_class(type(model).__name__) != "AutoModelForCausalLM":
        return (
            f"GGUF is written for decoders of {', '.join(TAKEN_FOR_GRANTED)} with their language-model head, "
            f"and this is a {type(model).__name__}."
        )
    for field, value in TAKEN_FOR_GRANTED[family].items():
        if (other := getattr(config, field)) != value:
            return f"llama.cpp takes {field}={value} for granted in {family}, and this one has {other}."
    rotary = getattr(config, "rope_parameters", None) or {}
    if (kind := rotary.get("rope_type", "default")) != "default":
        return f"the rotary positions are scaled ({kind}), which is not written."
    return undescribed(model)


def write(model: PreTrainedModel, folder: Path, tokenizer, *, encoding: str) -> tuple[list[str], list[str]]:
    """Write the file; return its name and code to read it. `BadSetting`: a tokenizer GGUF does not know."""
    dense = dense_copy(model).float()
    family, blocks = dense.config.model_type, anatomy(dense).blocks
    writer = gguf.GGUFWriter(folder / FILE, family)
    _add_shape(writer, dense)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{encoding}"])
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, dense.config)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, len(blocks))
    transposed = {f"{name}.weight" for name, module in dense.named_modules() if isinstance(module, Conv1D)}
    tensors, _ = storage.tensors_of(dense)
    for name, tensor in tensors.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise BadSetting(f"GGUF has no name for the tensor {name} of {family}.")
        tensor = tensor.t() if name in transposed else tensor
        if family == "llama" and (".attn_q." in target or ".attn_k." in target):
            attention = blocks[int(target.split(".")[1])].attention
            tensor = _interleaved(tensor, attention.heads if ".attn_q." in target else attention.kv_heads)
        _add_tensor(writer, target, tensor.contiguous().numpy(), encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [FILE], [
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "",
        'config = AutoConfig.from_pretrained("this folder")  # llama.cpp needs none',
        f'model = AutoModelForCausalLM.from_pretrained("this folder", gguf_file="{FILE}", config=config)',
    ]


def load(folder: Path, *, device, dtype) -> tuple:
    """Return the model as transformers' own GGUF reader gives it, and its tokenizer or None."""
    # Read by itself the file loses some widths there: a Qwen3's head, a GPT-2's context and feed-forward.
    config = AutoConfig.from_pretrained(folder)
    return read_back(folder, device=device, dtype=dtype, gguf_file=FILE, config=config)


def _add_shape(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """Write what the config says about the shape, under llama.cpp's names."""
    config, block = model.config, anatomy(model).blocks[0]
    writer.add_name(Path(config.name_or_path or config.model_type).name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(block.ffn.width)
    writer.add_head_count(block.attention.heads)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(block.attention.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(block.attention.head_dim)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, encoding: str) -> None:
    """Write a tensor: vectors and positions in F32, matrices as asked (F16 if blocks divide no row)."""
    if values.ndim == 1 or name == "position_embd.weight":
        return writer.add_tensor(name, values)
    if encoding == "F16" or values.shape[-1] % BLOCK:
        return writer.add_tensor(name, values.astype(np.float16))
    if encoding == "Q4_0" and name in ("token_embd.weight", "output.weight"):
        encoding = "Q8_0"
    kind = gguf.GGMLQuantizationType[encoding]
    return writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows `(heads·width, …)` with the two halves of a head alternating, as llama.cpp rotates them."""
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer, config) -> None:
    """Write tokens, merges and special tokens of a byte-level BPE, as GPT-2, Qwen and LLaMA 3 have one."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _pre_tokenizer(spec.get("pre_tokenizer") or {})
    if (
        spec["model"]["type"] != "BPE"
        or kind is None
        or spec.get("normalizer", {}) not in (None, {"type": "NFC"})
    ):
        raise BadSetting(
            f"this {type(tokenizer).__name__} (model {spec['model']['type']}) is no byte-level BPE that "
            "splits text as GPT-2, LLaMA 3 or Qwen 2 do: leave it out, and give llama.cpp one of its own."
        )
    added = {token["id"]: token for token in spec["added_tokens"]}
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for number in range(config.vocab_size):
        tokens.append(names.get(number, f"[PAD{number}]"))
        entry = added.get(number)
        special = gguf.TokenType.CONTROL if entry and entry["special"] else gguf.TokenType.USER_DEFINED
        types.append(
            special if entry else gguf.TokenType.NORMAL if number in names else gguf.TokenType.UNUSED
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    for role in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    ids = tokenizer("a")["input_ids"]  # what the post-processor puts around a text
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(spec: dict) -> str | None:
    """Return llama.cpp's name for how a pre-tokenizer splits text, or None."""
    steps = spec.get("pretokenizers", [spec])
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return "gpt-2" if steps[0]["use_regex"] and not steps[0]["add_prefix_space"] else None
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    pattern = steps[0]["pattern"].get("Regex")
    return next((name for name in ("qwen2", "llama-bpe") if GGUF_PRE_TOKENIZER_SPLITS[name] == pattern), None)
