"""Perplexity, windows, bytes and minimal pairs, against hand computation and transformers' own loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmcompress.errors import BadSetting, WrongTask
from lmcompress.tasks import evaluate
from lmcompress.tasks.language_modelling import (
    LanguageModelling,
    stream,
    token_nll,
    tokens_and_bytes,
    unigram_perplexity,
    windows,
)
from lmcompress.tasks.minimal_pairs import MinimalPairs
from tests.synthetic_mirror import VOCABULARY, byte_tokenizer, sentences
from tests.tiny_models import tiny

TOKENIZER = byte_tokenizer()
START, END = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


class Bigram(nn.Module):
    """Next-token logits that depend on the last token alone, so every sum can be done by hand."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(
            architectures=["BigramForCausalLM"], vocab_size=len(table), model_type="bigram"
        )
        self.shapes = []

    def forward(self, input_ids, attention_mask, use_cache):
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])

    def nll(self, ids) -> float:
        log_p = torch.log_softmax(self.table.detach().double(), -1)
        return -float(sum(log_p[a, b] for a, b in zip(ids, ids[1:])))


def bigram(seed: int = 0) -> Bigram:
    return Bigram(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)))


def task_of(texts: list[str], **settings) -> LanguageModelling:
    examples = [{"text": text, "document": i} for i, text in enumerate(texts)]
    return LanguageModelling(name="mine", split="test", examples=examples, source="made up", **settings)


def ids_of(*texts: str) -> list[int]:
    """Start token, then the texts' bytes with an end token between, as the stream should be."""
    plain = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [START, *[token for i, ids in enumerate(plain) for token in ([END] if i else []) + ids]]


def test_perplexity_of_fixed_logits_by_hand():
    table = torch.zeros(VOCABULARY, VOCABULARY)
    a, b = ids_of("ab")[1:]
    table[:, a] = 2.0  # P(a) = e² / (e² + e + 298), P(b) = e / (…), whatever came before
    table[:, b] = 1.0
    found = evaluate(Bigram(table), TOKENIZER, task_of(["aab"]))
    total = np.exp(2) + np.exp(1) + VOCABULARY - 2
    nll = -(2 * np.log(np.exp(2) / total) + np.log(np.exp(1) / total))
    assert found.value == pytest.approx(np.exp(nll / 3), rel=1e-6)
    assert found.secondary["bits_per_byte"] == pytest.approx(nll / np.log(2) / 3, rel=1e-6)
    assert found.columns["tokens"].tolist() == [3] and found.columns["bytes"].tolist() == [3]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=4),
    window=st.integers(1, 12),
    data=st.data(),
)
def test_every_token_is_scored_once_whatever_window_and_stride(texts, window, data):
    stride = data.draw(st.integers(1, window))
    expected = ids_of(*texts)
    ids, sizes = stream(TOKENIZER, task_of(texts).examples)
    assert ids.tolist() == expected
    assert sizes.sum() == sum(len(text.encode()) for text in texts)
    items, counts = windows(ids, sizes, window=window, stride=stride)
    targets = [t for item in items for t in item["labels"] if t != -100]
    assert targets == expected[1:]
    assert all(0 < len(item["input_ids"]) == len(item["labels"]) <= window for item in items)
    assert counts.sum() == sizes.sum()


@settings(max_examples=15, deadline=None)
@given(window=st.integers(2, 40), share=st.floats(0.1, 1), batch_tokens=st.integers(1, 200))
def test_window_stride_and_batching_do_not_change_a_bigram_model(window, share, batch_tokens):
    texts, model = sentences(4), bigram()
    task = task_of(texts, window=window, stride=max(1, int(window * share)))
    found = evaluate(model, TOKENIZER, task, batch_tokens=batch_tokens)
    assert found.columns["nll"].sum() == pytest.approx(model.nll(ids_of(*texts)), rel=1e-6)
    assert found.columns["tokens"].sum() == len(ids_of(*texts)) - 1
    sizes = model.shapes[1:]  # after the check
    assert all(rows * length <= max(batch_tokens, length) for rows, length in sizes)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_agrees_with_transformers_own_loss(family):
    model = tiny(family, vocab_size=VOCABULARY)
    text = "a naïve film, ending early"
    ids = torch.tensor([ids_of(text)])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    found = evaluate(model, TOKENIZER, task_of([text], window=64))
    assert np.log(found.value) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_padding_of_the_short_last_window_counts_for_nothing(family):
    model, texts = tiny(family, vocab_size=VOCABULARY), sentences(3)
    together = evaluate(model, TOKENIZER, task_of(texts, window=15), batch_tokens=4096)
    alone = evaluate(model, TOKENIZER, task_of(texts, window=15), batch_tokens=1)
    assert together.columns["tokens"][-1] < 15  # the last window is shorter
    np.testing.assert_allclose(together.columns["nll"], alone.columns["nll"], rtol=1e-5)


def test_a_smaller_stride_gives_every_target_all_the_context_the_window_has():
    model, text = tiny("gpt2", vocab_size=VOCABULARY), "forty letters of text, read in one piece"
    assert len(ids_of(text)) <= 64
    whole = evaluate(model, TOKENIZER, task_of([text], window=64))
    strided = evaluate(model, TOKENIZER, task_of([text], window=64, stride=4))
    assert len(whole.columns["nll"]) == 1 and len(strided.columns["nll"]) == 10
    assert strided.value == pytest.approx(whole.value, rel=1e-5)
    short = evaluate(model, TOKENIZER, task_of([text], window=4))
    assert short.value != pytest.approx(whole.value, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_nll_is_fp32_in_chunks(dtype, monkeypatch):
    monkeypatch.setattr("lmcompress.tasks.language_modelling.LOSS_ROWS", 3)
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([[1, 2, -100, 4, 5], [0, -100, -100, 10, 3]])
    expected = -torch.log_softmax(logits.double(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    found = token_nll(logits, labels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected * (labels != -100), rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(st.text(), st.integers(0, 20))
def test_bytes_add_up_for_any_text(text, merges):
    [(ids, sizes)] = tokens_and_bytes(byte_tokenizer(merges=merges), [text])
    assert len(ids) == len(sizes) and (sizes >= 0).all()
    assert sizes.sum() == len(text.encode())


def test_bytes_without_offsets_are_spread_evenly():
    class Slow:
        is_fast = False

        def __call__(self, texts, **_):
            return {"input_ids": [[1, 2, 3] for _ in texts]}

    [(_, sizes)] = tokens_and_bytes(byte_tokenizer(merges=20), ["né🎉an"])
    assert sizes.tolist() == [1, 2, 0, 4, 0, 0, 0, 2]  # n, é in two, 🎉 in four, "an" merged
    [(_, sizes)] = tokens_and_bytes(Slow(), ["naïve"])
    assert sizes.tolist() == [2, 2, 2]


def test_parts_of_a_document_are_joined_by_an_empty_line():
    examples = [{"text": "a", "document": 0}, {"text": "b", "document": 0}, {"text": "c", "document": 1}]
    ids, sizes = stream(TOKENIZER, examples)
    assert ids.tolist() == ids_of("a\n\nb", "c")
    assert sizes.sum() == 5


def test_unigram_floor_by_hand_and_its_collapse():
    # Counts a: 2 + 1, b: 1 + 1, of 3 + vocabulary; the targets are "ab".
    targets, counted = np.array([0, 1]), np.array([0, 0, 1])
    assert unigram_perplexity(targets, counted, vocabulary=4) == pytest.approx(1 / np.sqrt(3 / 7 * 2 / 7))
    ignorant = evaluate(Bigram(torch.zeros(VOCABULARY, VOCABULARY)), TOKENIZER, task_of(["aaab" * 20]))
    assert ignorant.value == pytest.approx(VOCABULARY, rel=1e-5)
    broken = torch.full((VOCABULARY, VOCABULARY), float("nan"))
    assert "not finite" in evaluate(Bigram(broken), TOKENIZER, task_of(["abc"])).collapsed
    assert "unigram" in ignorant.collapsed and "evaluated text itself" in ignorant.details["floor"]
    ids = ids_of("aaab" * 20)
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, ids[1]] = 9.0
    assert evaluate(Bigram(table), TOKENIZER, task_of(["aaaaaaab" * 20])).collapsed is None


def test_unigram_is_counted_on_training_text_where_there_is_some():
    examples = [{"text": "bbbb", "document": 0}]
    task = task_of(["ab"], training=lambda split: examples, training_source="other text")
    found = evaluate(bigram(), TOKENIZER, task)
    assert found.details["floor"] == "unigram model, counted on 4 characters of other text"
    b = ids_of("b")[1]
    counts = {b: 5, START: 2, ids_of("a")[1]: 1}
    total = 5 + len(TOKENIZER)
    expected = 1 / np.sqrt(counts[ids_of("a")[1]] / total * counts[b] / total)
    assert found.floor == pytest.approx(expected)


def test_a_window_or_model_that_does_not_fit_is_refused():
    for family in ("bert", "t5"):
        with pytest.raises(WrongTask, match="bidirectional encoder has no perplexity.*can do"):
            evaluate(tiny(family), TOKENIZER, task_of(["abc"]))
    with pytest.raises(BadSetting, match="64 positions"):
        evaluate(tiny("gpt2", vocab_size=VOCABULARY), TOKENIZER, task_of(["abc"], window=65))
    pytest.raises(BadSetting, task_of, ["abc"], window=8, stride=9).match("stride 9")


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny("gpt2", vocab_size=VOCABULARY).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = evaluate(model, TOKENIZER, task_of(["abcdef"], window=8))
    assert model.training
    assert evaluate(model, TOKENIZER, task_of(["abcdef"], window=8)).value == first.value  # dropout was off
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


def test_minimal_pairs_by_hand():
    model = bigram(3)
    rows = [("he sings", "he sing", "x"), ("a cat", "an cat", "y"), ("é b", "b é", "y")]
    rows.append(("same", "same", "x"))
    examples = [{"good": g, "bad": b, "field": f, "paradigm": f"{f}{i}"} for i, (g, b, f) in enumerate(rows)]
    task = MinimalPairs(name="pairs", split="train", examples=examples, source="made up")
    found = evaluate(model, TOKENIZER, task, batch_tokens=20)
    margin = [model.nll(ids_of(b)) - model.nll(ids_of(g)) for g, b, _ in rows]
    np.testing.assert_allclose(found.columns["margin"], margin, rtol=1e-5, atol=1e-6)
    correct = np.array(margin) > 1e-9
    assert not correct[3] and found.columns["correct"].tolist() == correct.tolist()
    assert found.value == correct.mean()
    assert found.secondary == {"accuracy_x": correct[[0, 3]].mean(), "accuracy_y": correct[[1, 2]].mean()}
    each = {f"{f}{i}": float(right) for i, ((*_, f), right) in enumerate(zip(rows, correct))}
    assert found.details["accuracy_by_paradigm"] == each
    assert found.floor == 0.5
    examples = [examples[1], examples[1] | {"good": examples[1]["bad"], "bad": examples[1]["good"]}]
    task = MinimalPairs(name="pairs", split="train", examples=examples, source="made up")
    assert "chance" in evaluate(model, TOKENIZER, task).collapsed
