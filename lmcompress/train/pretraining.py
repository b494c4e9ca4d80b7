"""What training from scratch needs before the first step: a tokenizer, packed windows, corrupted spans.

And what its result has to beat: n-gram models of the same tokens, in the same bits per byte.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmcompress.errors import BadData

SENTINELS = 32  # more than 15 % of a window of 256 in spans of 3 can need
PAD, END = "<pad>", "</s>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (no text is unknown): `<pad>` 0, `</s>` 1, T5's sentinels, bytes and merges."""
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *sentinels],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        bos_token=END,
        additional_special_tokens=sentinels,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def closing_with_end(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the same vocabulary with `</s>` after every text, the habit of T5's tokenizers."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), **tokenizer.init_kwargs
    )
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    return copy


def windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int) -> np.ndarray:
    """Join texts with `</s>` between, cut them into `(windows, length)`, at least one; drop the remainder."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    stream = np.fromiter((token for ids in encoded for token in [*ids, *end]), dtype=np.int32)
    if len(stream) < length:
        raise BadData(f"{len(texts)} texts give {len(stream)} tokens, less than one window of {length}.")
    return stream[: len(stream) // length * length].reshape(-1, length)


def causal_features(rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Return a feature of every window, which is its own target."""
    return [{"input_ids": row, "labels": row} for row in rows]


def span_corruption(
    rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, *, seed: int, rate: float = 0.15
) -> list[dict[str, np.ndarray]]:
    """Return features of T5's pretraining: sentinels replace spans of 3, the target is what stood there.

    `rows` are ids, `(windows, length)`; a fraction `rate` of them is hidden (Raffel et al. 2020, §3.1.4).
    """
    rng = np.random.default_rng(seed)
    first, end = tokenizer.convert_tokens_to_ids("<extra_id_0>"), tokenizer.eos_token_id
    features = []
    for row in rows:
        hidden = round(len(row) * rate)
        spans = min(max(1, round(hidden / 3)), SENTINELS - 1)
        hidden_lengths = _random_lengths(hidden, spans, rng)
        shown_lengths = _random_lengths(len(row) - hidden, spans, rng)
        source, target, at = [], [], 0
        for index, (shown, masked) in enumerate(zip(shown_lengths, hidden_lengths)):
            source += [row[at : at + shown], [first + index]]
            target += [[first + index], row[at + shown : at + shown + masked]]
            at += shown + masked
        ends = {"input_ids": [*source, [end]], "labels": [*target, [end]]}
        features.append({name: np.concatenate(pieces).astype(np.int32) for name, pieces in ends.items()})
    return features


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return how many UTF-8 bytes each id stands for, `(vocab,)`; special tokens stand for none."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))  # of one character per byte
    return np.array([0 if i in special else len(token) for i, token in enumerate(tokens)])


def ngram_baselines(
    train: Sequence[np.ndarray], rows: Sequence[np.ndarray], *, vocab_size: int
) -> dict[str, float]:
    """Return the mean nats per token on `rows` of a unigram and an interpolated bigram model of `train`.

    Unigram: add-one. Bigram: Witten-Bell (1991), which weighs the bigram by c(a) / (c(a) + T(a)), T(a) the
    number of distinct successors. Both arguments hold ids by row; predicted are the tokens after its first.
    """
    counts = np.bincount(np.concatenate(train), minlength=vocab_size).astype(np.float64)
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    pairs, pair_counts = np.unique(_pair_codes(train, vocab_size), return_counts=True)
    before = pairs // vocab_size
    seen_after = np.bincount(before, weights=pair_counts, minlength=vocab_size)
    kinds_after = np.bincount(before, minlength=vocab_size)

    scored = _pair_codes(rows, vocab_size)
    nearest = np.minimum(np.searchsorted(pairs, scored), len(pairs) - 1)
    seen = np.where(pairs[nearest] == scored, pair_counts[nearest], 0)
    a, b = scored // vocab_size, scored % vocab_size
    weight = seen_after[a] + kinds_after[a]
    backed = np.where(weight > 0, (seen + kinds_after[a] * unigram[b]) / np.maximum(weight, 1), unigram[b])
    return {"unigram": float(-np.log(unigram[b]).mean()), "bigram": float(-np.log(backed).mean())}


def _pair_codes(rows: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    return np.concatenate([row[:-1].astype(np.int64) * vocab_size + row[1:] for row in rows])


def _random_lengths(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Cut `total` into `count` positive lengths, all cuts equally likely."""
    cuts = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))
