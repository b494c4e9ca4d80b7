"""Perplexity and bits per byte of running text, in windows; and the token losses other tasks share.

The text is one stream of tokens, each but the given start token scored once. Documents are separated by the
tokenizer's end token, a target without bytes; parts of one document are joined by an empty line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lmcompress.errors import BadData, BadSetting
from lmcompress.tasks.base import Columns, Run, Task, subset_of
from lmcompress.tasks.batching import IGNORED, max_length, positions, said_cut
from lmcompress.tasks.capabilities import bare

LOSS_ROWS = 1024  # positions whose fp32 log-probabilities are held at once
LOGIT_NUMBERS = 1 << 27  # most logits of one batch: 512 MB in fp32
UNIGRAM_CHARACTERS = 1_000_000
CONTEXT_TOKENS = 2048  # of a prompt and what follows it, where tokenizer and model allow more
STRETCH_CHARACTERS = 2_000  # of a single text that is split into parts: about two windows


@dataclass(eq=False, kw_only=True)
class LanguageModelling(Task):
    """Examples `{"text", "document"}`: neighbours with the same document number are parts of one text."""

    kind: ClassVar[str] = "language-modelling"
    needs: ClassVar[str] = "language modelling"
    text_fields: ClassVar[tuple[str, ...]] = ("text",)
    metric: ClassVar[str] = "perplexity"  # exp(total NLL / total predicted tokens)
    further: ClassVar[tuple[str, ...]] = ("bits_per_byte",)  # compares models with different tokenizers
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "per token"

    window: int = 256
    stride: int | None = None
    block: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stride = self.stride or self.window
        if not 0 < self.stride <= self.window:
            raise BadSetting(
                f"{self.name}: stride {self.stride} must lie between 1 and the window {self.window}"
            )

    def metric_inputs(self, columns: Columns, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Return nats and tokens of each window."""
        return columns["nll"], columns["tokens"]

    def units(self) -> list[list[dict]]:
        """Return the documents; of a single one stretches of paragraphs, each from then on a document."""
        documents = _documents(self.examples)
        if len(documents) == 1:
            ends = np.cumsum([len(paragraph["text"]) for paragraph in documents[0]])
            numbers = ((ends - 1) // STRETCH_CHARACTERS).tolist()
            documents = _documents([e | {"document": n} for e, n in zip(documents[0], numbers)])
        return [[e | {"document": i} for e in document] for i, document in enumerate(documents)]

    def identity(self) -> dict:
        """Return window and stride."""
        return {"window": self.window, "stride": self.stride}

    def check(self, loaded: Any) -> None:
        """Also refuse a window longer than the model's positions."""
        super().check(loaded)
        most = positions(bare(loaded))
        if most and most < self.window:
            raise BadSetting(
                f"{self.name} has windows of {self.window} tokens, the model {most} positions: "
                f"load_task({self.name!r}, window={most})."
            )

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return, per window, columns `nll` (nats), `tokens` (targets), `bytes` (of the targets' text)."""
        make = lambda: windows(*stream(run.tokenizer, self.examples), **self.identity())  # noqa: E731
        items, sizes = self.cached(run.tokenizer, ("windows",), make)
        tokens = np.array([sum(t != IGNORED for t in item["labels"]) for item in items], dtype=np.float64)
        counts = {"windows": len(items), "tokens": int(tokens.sum()), "bytes": int(sizes.sum())}
        details = {**self.identity(), **counts, "unscored": "the given start token"}
        return {"nll": summed_nll(run, items), "tokens": tokens, "bytes": sizes}, details

    def check_collapsed(self, columns: Columns, value: float, run: Run) -> tuple[float, str | None, dict]:
        """Return as floor the perplexity of a unigram model with add-one smoothing over the vocabulary."""
        floor, counted = self.cached(run.tokenizer, ("unigram",), lambda: self._unigram(run.tokenizer))
        collapsed = None
        if not np.isfinite(value):
            collapsed = f"perplexity is {value}: the model's outputs are not finite, or its loss overflows"
        elif value >= floor:
            collapsed = f"perplexity {value:.1f} is not below the unigram model's {floor:.1f}"
        return floor, collapsed, {"floor": f"unigram model, counted on {counted}"}

    def features(
        self, tokenizer: Any, examples: list[dict], *, length: int | None = None, model=None
    ) -> list[dict]:
        """Return full windows of packed text; labels are the inputs themselves (the model shifts them)."""
        ids, _ = stream(tokenizer, examples)
        size = length or self.window
        size = min(size, positions(model) or size)
        rows = [ids[i : i + size].tolist() for i in range(0, len(ids) - size + 1, size)]
        return [{"input_ids": row, "labels": row} for row in rows]

    def training_features(
        self, tokenizer: Any, *, length=None, model=None, split="train", limit=None, seed=0, subset="all"
    ) -> list[dict]:
        """Return at most `limit` full windows of shuffled training documents.

        Raises:
            BadData: see `training_examples`; or they are shorter than one window.
        """
        documents = subset_of(_documents(self._kept_apart(split)), subset)
        order = np.random.default_rng(seed).permutation(len(documents))
        rows, taken, budget = [], 0, None
        while taken < len(order) and (limit is None or len(rows) < limit):
            # Tokenize only about what the limit asks for: a guess at first, then as many again.
            budget = len(order) if limit is None else (budget or max(8, limit // 4)) * 2
            taken = min(len(order), budget)
            paragraphs = [paragraph for i in order[:taken] for paragraph in documents[i]]
            rows = self.features(tokenizer, paragraphs, length=length, model=model)
        if not rows:
            size = length or self.window
            raise BadData(f"{self.name}: its {split} split is shorter than one window of {size} tokens.")
        return rows[:limit]

    def _unigram(self, tokenizer: Any) -> tuple[float, str]:
        targets = stream(tokenizer, self.examples)[0][1:]
        if not self.has_training():
            return unigram_perplexity(
                targets, targets, vocabulary=len(tokenizer)
            ), "the evaluated text itself"
        examples = self._kept_apart("train")
        ends = np.cumsum([len(example["text"]) for example in examples])
        count = min(len(ends), int(np.searchsorted(ends, UNIGRAM_CHARACTERS, side="right")) + 1)
        counted = stream(tokenizer, examples[:count])[0]
        source = f"{ends[count - 1]} characters of {self.training_source}"
        return unigram_perplexity(targets, counted, vocabulary=len(tokenizer)), source


def stream(tokenizer: Any, examples: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return all text as one row of tokens behind a start token, and the bytes of UTF-8 each stands for.

    Both are `(tokens,)`. Start and end tokens have no bytes; those of a document add up to its own.
    """
    texts = ["\n\n".join(paragraph["text"] for paragraph in document) for document in _documents(examples)]
    ids, sizes = [[start_token(tokenizer)]], [[0]]
    for number, (tokens, counts) in enumerate(tokens_and_bytes(tokenizer, texts)):
        ids += [[tokenizer.eos_token_id], tokens] if number else [tokens]
        sizes += [[0], counts] if number else [counts]
    return np.concatenate(ids).astype(np.int64), np.concatenate(sizes).astype(np.int64)


def start_token(tokenizer: Any) -> int:
    """Return the id of what stands before a text: the tokenizer's start token, or its end token."""
    if tokenizer.eos_token_id is None:
        raise BadSetting("the tokenizer has no end token to separate documents: set tokenizer.eos_token.")
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def tokens_and_bytes(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], np.ndarray]]:
    """Return the tokens of each text without special ones, and how many of its UTF-8 bytes each stands for.

    A character split over several tokens counts for the first of them; text the tokenizer drops (white space,
    say) counts for the next token, or the last. Without offsets (slow tokenizers) bytes are spread evenly.
    """
    fast = bool(tokenizer.is_fast)
    settings = {"add_special_tokens": False, "return_attention_mask": False, "return_offsets_mapping": fast}
    encoded = tokenizer(texts, verbose=False, **settings)
    encodings = []
    for number, (text, ids) in enumerate(zip(texts, encoded["input_ids"])):
        total = len(text.encode())
        if fast:
            ends = byte_ends(text, encoded["offset_mapping"][number])
        else:
            ends = np.linspace(0, total, len(ids) + 1).round().astype(np.int64)[1:]
        if len(ids):
            ends[-1] = total
        encodings.append((ids, np.diff(ends, prepend=0)))
    return encodings


def byte_ends(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Return how many UTF-8 bytes of text are covered once each token is read, from character offsets."""
    ends = np.maximum.accumulate(np.array([0, *(end for _, end in offsets)], dtype=np.int64))[1:]
    if text.isascii():
        return ends
    return np.cumsum([0, *(len(character.encode()) for character in text)])[ends]


def windows(ids: np.ndarray, sizes: np.ndarray, *, window: int, stride: int) -> tuple[list[dict], np.ndarray]:
    """Cut a stream into model inputs whose labels are aligned (already shifted), -100 for mere context.

    Window k scores the targets k·stride + 1 … (k + 1)·stride and sees the `window` tokens before the last of
    them. Returned are `input_ids` and `labels` of each, and the bytes `(windows,)` of their targets.
    """
    items, counts = [], []
    for first in range(0, len(ids) - 1, stride):
        last = min(first + stride, len(ids) - 1)
        begin = max(0, last - window)
        labels = np.full(last - begin, IGNORED, dtype=np.int64)
        labels[first - begin :] = ids[first + 1 : last + 1]
        items.append({"input_ids": ids[begin:last].tolist(), "labels": labels.tolist()})
        counts.append(sizes[first + 1 : last + 1].sum())
    return items, np.array(counts, dtype=np.float64)


def summed_nll(run: Run, items: list[dict]) -> np.ndarray:
    """Return each item's total negative log-likelihood `(items,)`, nats, of labels aligned, not shifted."""

    def score(batch: dict[str, torch.Tensor]) -> np.ndarray:
        labels = batch.pop("labels")
        return token_nll(run.model(**batch, use_cache=False).logits, labels).sum(dim=1).numpy()

    return np.array(run.batches(items, score, batch_tokens=lm_budget(run)))


def continuations(
    tokenizer: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    length: int | None = None,
    model: nn.Module | None = None,
    closed: bool = False,
) -> tuple[list[dict], np.ndarray, dict]:
    """Return `input_ids` and `labels` (aligned, -100 on the prompt) of prompts and what follows each.

    A start token comes first, a blank between the two, with `closed` the end token last; of what is longer
    than `length` tokens, or the model's positions, the prompt loses its beginning. Beside them are the bytes
    `(n,)` of the targets, and how many texts were cut.
    """
    limit = max_length(tokenizer, model, cap=length or CONTEXT_TOKENS)
    blanks = [" " * (not (p[-1:].isspace() or t[:1].isspace() or not p)) for p, t in zip(prompts, targets)]
    texts = [prompt + blank + target for prompt, blank, target in zip(prompts, blanks, targets)]
    fast = bool(tokenizer.is_fast)
    settings = {"add_special_tokens": False, "return_attention_mask": False, "return_offsets_mapping": fast}
    encoded = tokenizer(texts, verbose=False, **settings)
    start, end, items, cut = start_token(tokenizer), [tokenizer.eos_token_id] * closed, [], 0
    for number, (prompt, ids) in enumerate(zip(prompts, encoded["input_ids"])):
        if fast:
            prompt_tokens = sum(stop <= len(prompt) for _, stop in encoded["offset_mapping"][number])
        else:
            prompt_tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        labels, over = [*ids[prompt_tokens:], *end], len(ids) + closed - limit
        ids = [start, *ids, *end][:-1]
        labels = [IGNORED] * (len(ids) - len(labels)) + labels
        if over > 0:
            cut, ids, labels = cut + 1, [start, *ids[over + 1 :]], labels[over:]
        items.append({"input_ids": ids, "labels": labels})
    sizes = np.array([len(target.encode()) for target in targets], dtype=np.float64)
    return items, sizes, said_cut(cut, len(items), limit)


def for_training(items: Sequence[dict]) -> list[dict]:
    """Return aligned items as a model takes them that shifts labels itself."""
    return [
        {"input_ids": [*item["input_ids"], item["labels"][-1]], "labels": [IGNORED, *item["labels"]]}
        for item in items
    ]


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each label, float64 `(batch, seq)` on the CPU; of -100 it is 0.

    The log-softmax is taken in fp32 over a chunk of positions at a time, whatever the logits' dtype.
    """
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses = [
        F.cross_entropy(rows.float(), label, ignore_index=IGNORED, reduction="none")
        for rows, label in zip(flat.split(LOSS_ROWS), targets.split(LOSS_ROWS))
    ]
    return torch.cat(losses).cpu().double().reshape(labels.shape)  # on the CPU: not every device has float64


def lm_budget(run: Run) -> int:
    """Return the tokens per batch whose logits fit `LOGIT_NUMBERS`."""
    vocabulary = getattr(run.model.config, "vocab_size", 0) or 1
    return max(1, min(run.batch_tokens, LOGIT_NUMBERS // vocabulary))


def unigram_perplexity(targets: np.ndarray, counted: np.ndarray, *, vocabulary: int) -> float:
    """Return the perplexity of `targets` under the frequencies of `counted`, each token seen once more."""
    size = max(vocabulary, int(targets.max(initial=0)) + 1, int(counted.max(initial=0)) + 1)
    counts = np.bincount(counted, minlength=size) + 1.0
    return float(np.exp(-np.mean(np.log(counts[targets] / counts.sum()))))


def _documents(examples: list[dict]) -> list[list[dict]]:
    return [list(paragraphs) for _, paragraphs in groupby(examples, key=lambda example: example["document"])]
