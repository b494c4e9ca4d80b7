"""Generation: BLEU, chrF and ROUGE against their own packages, teacher forcing against transformers' loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from torch import nn

from lmcompress.errors import BadData, WrongTask
from lmcompress.tasks import evaluate, metrics
from lmcompress.tasks.generation import Continuation, Generation
from tests.synthetic_mirror import VOCABULARY, byte_tokenizer, sentences
from tests.tiny_models import tiny

TOKENIZER = byte_tokenizer(closing=True)
SOURCES = sentences(8, seed=1)
TARGETS = [
    text.replace("the", "a").replace("drags", "is long") + (" 🎉" if i % 3 else "")
    for i, text in enumerate(SOURCES)
]


class Copier(nn.Module):
    """Generates its input; finds every token equally likely."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            architectures=["CopierForConditionalGeneration"], vocab_size=VOCABULARY, is_encoder_decoder=True
        )
        self.sources = 0

    def forward(self, input_ids, attention_mask, labels, use_cache):
        return SimpleNamespace(logits=torch.zeros(*labels.shape, VOCABULARY))

    def generate(self, input_ids, attention_mask, generation_config):
        assert generation_config.num_beams == 1 and not generation_config.do_sample
        self.sources += len(input_ids)
        return input_ids


def task_of(sources=SOURCES, targets=TARGETS, **more) -> Generation:
    examples = [{"text": s, "target": t} for s, t in zip(sources, targets)]
    return Generation(**({"name": "mine", "split": "test", "examples": examples, "source": "made up"} | more))


def test_corpus_scores_are_sacrebleus_own_on_the_same_outputs():
    model = Copier()
    found = evaluate(model, TOKENIZER, task_of(metric="bleu", english=True), batch_tokens=100)
    assert model.sources == len(SOURCES)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(SOURCES, [TARGETS]).score)
    assert 20 < found.value < 100
    assert found.secondary["chrf"] == pytest.approx(sacrebleu.corpus_chrf(SOURCES, [TARGETS]).score)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = np.mean([scorer.score(t, s)["rougeL"].fmeasure for s, t in zip(SOURCES, TARGETS)])
    assert found.secondary["rougeL"] == pytest.approx(expected)
    each = [sacrebleu.sentence_chrf(s, [t]).score for s, t in zip(SOURCES, TARGETS)]
    np.testing.assert_allclose(found.columns["sentence_chrf"], each)
    assert found.collapsed is None and "tok:13a" in found.details["signatures"]["bleu"]
    assert [s["output"] for s in found.details["samples"]] == SOURCES[: len(found.details["samples"])]


def test_bits_per_byte_of_the_reference_by_hand():
    found = evaluate(Copier(), TOKENIZER, task_of(["x"], ["né"]))
    # Three bytes and the end token, each at 1/VOCABULARY, over three bytes.
    assert found.secondary["bits_per_byte"] == pytest.approx(4 * np.log2(VOCABULARY) / 3)


_words = st.lists(st.sampled_from(["the", "a", "cat", "sat", "on", "mat", ".", ",", "été"]), max_size=12).map(
    " ".join
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(_words, _words), min_size=1, max_size=6), st.randoms())
def test_summed_counts_give_sacrebleus_score_on_any_resample(rows, random):
    hypotheses, references = map(list, zip(*rows))
    columns = metrics.bleu.columns(hypotheses, references) | metrics.chrf.columns(hypotheses, references)
    picks = np.array([[random.randrange(len(rows)) for _ in rows] for _ in range(2)])
    for score, reference in ((metrics.bleu, sacrebleu.corpus_bleu), (metrics.chrf, sacrebleu.corpus_chrf)):
        assert score(columns) == pytest.approx(reference(hypotheses, [references]).score, abs=1e-9)
        again = [reference([hypotheses[i] for i in p], [[references[i] for i in p]]).score for p in picks]
        np.testing.assert_allclose(score.resampled(columns, picks), again, atol=1e-9)


@pytest.mark.parametrize("family", ["t5", "t5_gated", "bart"])
def test_teacher_forcing_is_transformers_own_loss(family):
    model = tiny(family, vocab_size=VOCABULARY)
    found = evaluate(
        model, TOKENIZER, task_of([s[:30] for s in SOURCES], [t[:30] for t in TARGETS]), batch_tokens=150
    )
    losses = []
    for source, target in zip(SOURCES, TARGETS):
        ids = TOKENIZER(source[:30], return_tensors="pt")["input_ids"]
        labels = TOKENIZER(target[:30], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss) * labels.shape[1])
    np.testing.assert_allclose(found.columns["nll"], losses, rtol=1e-4)
    assert found.columns["bytes"].tolist() == [len(t[:30].encode()) for t in TARGETS]


def test_greedy_whatever_the_model_was_published_with():
    model = tiny("t5", vocab_size=VOCABULARY)
    plain = evaluate(model, TOKENIZER, task_of(max_new_tokens=8))
    model.generation_config.num_beams = 3
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.max_length = 3
    again = evaluate(model, TOKENIZER, task_of(max_new_tokens=8))
    assert [s["output"] for s in again.details["samples"]] == [s["output"] for s in plain.details["samples"]]
    assert model.generation_config.num_beams == 3


def test_the_end_token_closes_a_target_and_bytes_are_those_that_are_scored():
    plain = byte_tokenizer()
    [feature] = task_of(["ab"], ["é" * 100]).features(
        plain, [{"text": "ab", "target": "é" * 100}], length=None
    )
    assert len(feature["labels"]) == 64 and feature["labels"][-1] == plain.eos_token_id
    plain.model_max_length = 8  # seven tokens of target: three and a half letters, the fourth counted whole
    found = evaluate(Copier(), plain, task_of(["ab"], ["é" * 100]))
    assert found.columns["bytes"].tolist() == [8]
    assert found.columns["nll"][0] == pytest.approx(8 * np.log(VOCABULARY))


@pytest.mark.parametrize(
    "outputs, broken",
    [
        (["la la la la la la la la", "x y z", ""], 2),
        (["a b c a b c d e f g h", "one two three"], 0),
        (["the same"] * 9 + ["other"], 9),
        (["the same"] * 4, 0),
    ],
)
def test_degenerate_outputs_are_counted(outputs, broken):
    found = evaluate(
        Copier(), byte_tokenizer(), task_of(outputs, [f"reference {i}" for i in range(len(outputs))])
    )
    assert found.columns["degenerate"].sum() == broken
    assert (found.collapsed is not None) == (broken > len(outputs) / 2)


def continued(**more) -> Continuation:
    examples = [{"text": s * 3, "target": " " + t} for s, t in zip(SOURCES, TARGETS)]
    made = {"name": "on", "split": "test", "examples": examples, "source": "made up", "metric": "bleu"}
    return Continuation(**(made | {"english": True, "prompt_tokens": 12, "max_new_tokens": 6} | more))


def test_a_decoder_continues_the_end_of_each_prompt():
    model, task, plain = tiny("llama", vocab_size=VOCABULARY), continued(), byte_tokenizer()
    found = evaluate(model, plain, task)
    for place, example in enumerate(task.examples):
        prompt = plain(example["text"], add_special_tokens=False)["input_ids"][-12:]
        target = plain(example["target"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        wanted = -sum(logits[11 + i, token].item() for i, token in enumerate(target))
        assert found.columns["nll"][place] == pytest.approx(wanted, rel=1e-4)
        assert found.columns["bytes"][place] == len(example["target"].encode())
        ids = torch.tensor([prompt])
        for _ in range(6):  # greedy, one token after the other
            with torch.no_grad():
                scores = model(ids).logits[0, -1]
            scores[plain.eos_token_id] = -torch.inf
            ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
        if place < len(found.details["samples"]):
            text = plain.decode(ids[0, 12:], skip_special_tokens=True).strip()
            assert found.details["samples"][place]["output"] == text
    outputs = [sample["output"] for sample in found.details["samples"]]
    assert found.metric == "bleu" and {"rougeL", "chrf", "bits_per_byte"} <= set(found.secondary) and outputs


def test_a_prompt_that_is_too_short_and_an_encoder_decoder_are_refused():
    with pytest.raises(BadData, match="fewer than 4000 tokens"):
        evaluate(tiny("llama", vocab_size=VOCABULARY), byte_tokenizer(), continued(prompt_tokens=4000))
    for family in ("bert", "gpt2"):
        pytest.raises(WrongTask, evaluate, tiny(family), TOKENIZER, task_of()).match("encoder-decoder")
    with pytest.raises(WrongTask, match="needs a decoder"):
        evaluate(tiny("t5", vocab_size=VOCABULARY), TOKENIZER, continued())
