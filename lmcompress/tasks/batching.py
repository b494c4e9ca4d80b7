"""Examples of like length share a batch, as many as fit a budget of tokens, padded to the longest of them."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

IGNORED = -100  # the label torch's cross-entropy leaves out
MAX_TOKENS = 512  # of a text, where tokenizer and model allow more

log = logging.getLogger(__name__)

Item = Mapping[str, Sequence[int]]


def batches_by_length(
    lengths: Sequence[int], batch_tokens: int, batch_size: int | None = None
) -> list[np.ndarray]:
    """Return the indices of each batch of at most `batch_tokens`, padding included, or of one longer example.

    With `batch_size` each but the last has so many examples instead. Longest examples come first, so that the
    first batch shows the memory needed.
    """
    order, batches, start = np.argsort(-np.asarray(lengths), kind="stable"), [], 0
    while start < len(order):
        size = batch_size or max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def pad_batch(
    items: Sequence[Item], *, pad_id: int, device: torch.device | str = "cpu", left: bool = False
) -> dict[str, torch.Tensor]:
    """Pad on the right, or the `left`, to the longest item: `(batch, seq)` integers.

    They get an `attention_mask` if they have none.
    Labels are padded with -100; scalar labels become `(batch,)`, lists of floats `(batch, classes)`, both
    float32 where they are floats.
    """
    fill = {"input_ids": pad_id, "labels": IGNORED, "decoder_input_ids": pad_id}
    if "attention_mask" not in items[0]:
        items = [{**item, "attention_mask": [1] * len(item["input_ids"])} for item in items]
    batch = {name: _stack([item[name] for item in items], fill.get(name, 0), left) for name in items[0]}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _stack(values: list, fill: int, left: bool) -> torch.Tensor:
    if np.ndim(values[0]) == 0:
        scalars = np.asarray(values)
        return torch.as_tensor(scalars, dtype=torch.float32 if scalars.dtype.kind == "f" else torch.long)
    if len(values[0]) and isinstance(values[0][0], float):  # several labels an example: as many for each
        return torch.tensor(values, dtype=torch.float32)
    padded = np.full((len(values), max(map(len, values))), fill, dtype=np.int64)
    for row, value in zip(padded, values):
        row[len(row) - len(value) if left else 0 :][: len(value)] = value
    return torch.from_numpy(padded)


def pad_id(tokenizer: Any, model: nn.Module | None = None) -> int:
    """Return the id to pad with: the model's own first; some count positions or find the last token by it.

    An id without a row in the embedding table (-1, or of a token added without resizing) is passed over.
    """
    config = getattr(model, "config", None)
    for owner, name in ((config, "pad_token_id"), (tokenizer, "pad_token_id"), (tokenizer, "eos_token_id")):
        if is_token(getattr(owner, name, None), config):
            return getattr(owner, name)
    return 0


def is_token(token_id: Any, config: Any) -> bool:
    """Return whether `token_id` is a row of the embedding table that `config` describes."""
    return isinstance(token_id, int) and 0 <= token_id < (getattr(config, "vocab_size", None) or math.inf)


def positions(model: nn.Module | None) -> int | None:
    """Return the tokens a model has positions for; None where no table bounds them (ALiBi, T5's buckets).

    RoBERTa and its kin count positions from their padding's id + 1, which their table leaves room for.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 0
    if limit <= 0:  # XLNet says -1
        return None
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = [getattr(table, "padding_idx", None) for table in tables]
    return limit - max((index + 1 for index in padding if index is not None), default=0)


def max_length(tokenizer: Any, model: nn.Module | None = None, *, cap: int = MAX_TOKENS) -> int:
    """Return the most tokens of a text: what tokenizer and model allow, at most `cap`."""
    return int(min(cap, tokenizer.model_max_length, positions(model) or cap))


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    length: int | None = None,
    model: nn.Module | None = None,
) -> tuple[list[dict], dict]:
    """Return items of texts or pairs, cut to `length` tokens and to what tokenizer and model can hold.

    They have `input_ids`, and `token_type_ids` where a pair has them. Beside them is `{"cut": {"texts",
    "tokens"}}` where texts were cut for another reason than `length`, which is logged, too.
    """
    limit = max_length(tokenizer, model)
    settings = {"truncation": True, "max_length": min(length or limit, limit), "return_attention_mask": False}
    encoded = tokenizer(list(texts), pairs, **settings)
    names = ["input_ids"]
    if any(any(row) for row in encoded.get("token_type_ids", [])):
        names.append("token_type_ids")
    items = [dict(zip(names, values)) for values in zip(*(encoded[name] for name in names))]
    if length and length <= limit:
        return items, {}
    if encoded.encodings:
        cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    else:  # a slow tokenizer does not tell: at most so many
        cut = sum(len(item["input_ids"]) >= limit for item in items)
    return items, said_cut(cut, len(items), limit)


def said_cut(cut: int, texts: int, tokens: int, name: str = "cut") -> dict:
    """Return `{name: {"texts", "tokens"}}`, and log it, if any of `texts` were cut to `tokens`; else {}."""
    if not cut:
        return {}
    log.warning("%d of %d texts are longer than %d tokens and were cut to them", cut, texts, tokens)
    return {name: {"texts": cut, "tokens": tokens}}
