"""Classification and similarity: batching, scores as in scikit-learn and scipy, collapse, who may do what."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import AutoConfig, AutoModelForCausalLM

from lmcompress.errors import BadData, BadSetting, WrongTask
from lmcompress.stats import wilson
from lmcompress.tasks import batching, calibration, calibration_batches, evaluate
from lmcompress.tasks.batching import batches_by_length, pad_batch
from lmcompress.tasks.capabilities import capabilities, reads_ahead
from lmcompress.tasks.classification import Classification, Similarity
from lmcompress.tasks.metrics import STATISTICS
from lmcompress.tasks.minimal_pairs import MinimalPairs
from tests.synthetic_mirror import VOCABULARY, byte_tokenizer, sentences
from tests.tiny_models import DECODERS, ENCODERS, tiny

TOKENIZER = byte_tokenizer(encoder=True)
TEXTS = [*sentences(12), "short", "a", "émigré 🎉"]


def classification(texts=TEXTS, *, labels=("no", "yes"), **more) -> Classification:
    examples = [{"text": text, "label": len(text) % len(labels)} for text in texts]
    settings = {"name": "mine", "split": "test", "source": "made up", "labels": list(labels)} | more
    return Classification(**({"examples": examples} | settings))


def encoder(head="classification", **changes):
    return tiny("bert", head, vocab_size=VOCABULARY, max_position_embeddings=128, **changes)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_batches_hold_every_example_once_within_the_budget(lengths, batch_tokens):
    batches = batches_by_length(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert all(len(b) == 1 or len(b) * most <= batch_tokens for b, most in zip(batches, longest))


def test_a_batch_is_padded_to_its_own_longest():
    batch = pad_batch(
        [{"input_ids": [7, 8, 9], "labels": [1, 2, 3]}, {"input_ids": [5], "labels": [4]}], pad_id=6
    )
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 6, 6]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    scalars = pad_batch([{"input_ids": [1], "labels": 0.5}, {"input_ids": [1], "labels": 2.0}], pad_id=0)
    assert scalars["labels"].dtype == torch.float32 and scalars["labels"].tolist() == [0.5, 2.0]


def test_scores_are_those_of_scikit_learn_one_text_at_a_time():
    model, task = encoder(num_labels=3), classification(labels="abc")
    logits = []
    with torch.no_grad():
        for example in task.examples:
            ids = TOKENIZER(example["text"], return_tensors="pt")["input_ids"]
            logits.append(model(input_ids=ids).logits[0].numpy())
    label, said = [e["label"] for e in task.examples], np.argmax(logits, axis=1)
    found = evaluate(model, TOKENIZER, task)
    assert found.columns["prediction"].tolist() == said.tolist() and all(
        column.dtype == np.float64 for column in found.columns.values()
    )
    assert found.value == accuracy_score(label, said)
    assert found.secondary["macro_f1"] == pytest.approx(f1_score(label, said, average="macro"))
    p = torch.softmax(torch.tensor(np.array(logits)), -1).double().numpy()
    p /= p.sum(1, keepdims=True)
    assert found.secondary["cross_entropy"] == pytest.approx(log_loss(label, p, labels=range(3)), rel=1e-5)
    assert wilson(int(found.columns["correct"].sum()), len(label)).value == found.value


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(len(TEXTS))), st.integers(1, 400))
def test_order_and_batching_do_not_change_an_example(order, batch_tokens):
    model = _SHARED_MODEL
    plain = evaluate(model, TOKENIZER, classification())
    shuffled = evaluate(
        model, TOKENIZER, classification([TEXTS[i] for i in order]), batch_tokens=batch_tokens
    )
    for name in ("prediction", "cross_entropy"):
        np.testing.assert_allclose(
            shuffled.columns[name], plain.columns[name][list(order)], rtol=1e-4, atol=1e-5
        )


_SHARED_MODEL = encoder()


@pytest.mark.parametrize("family", ["distilbert", "roberta", "albert", "llama"])
def test_pairs_run_on_every_kind_of_head(family):
    model = tiny(family, "classification", vocab_size=VOCABULARY, max_position_embeddings=130)
    examples = [{"text": t, "pair": t[::-1], "label": i % 2} for i, t in enumerate(TEXTS)]
    tokenizer = TOKENIZER if family == "albert" else byte_tokenizer()
    assert 0 <= evaluate(model, tokenizer, classification(examples=examples)).value <= 1


def test_the_second_of_a_pair_is_in_its_own_segment():
    model = encoder()
    pair = [{"text": "ab", "pair": "cd", "label": 0}]
    ids = TOKENIZER("ab", "cd", return_tensors="pt")
    assert ids["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    with torch.no_grad():
        logits = model(**ids).logits.double()
    found = evaluate(model, TOKENIZER, classification(examples=pair))
    assert found.secondary["cross_entropy"] == pytest.approx(
        float(-torch.log_softmax(logits, -1)[0, 0]), rel=1e-5
    )
    [feature] = classification(examples=pair).features(TOKENIZER, pair, length=None)
    assert feature["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1] and feature["labels"] == 0


@pytest.mark.parametrize("family, held", [("bert", 66), ("roberta", 65), ("gpt2", 64)])
def test_texts_are_cut_at_what_the_model_can_hold_and_counted(family, held, monkeypatch):
    """Scored, trained and calibrated on: RoBERTa's first positions are taken, the tokenizer knows none."""
    said = []  # by the loggers themselves: what other tests and libraries do to logging does not matter
    for module in (batching, calibration):
        monkeypatch.setattr(module.log, "warning", lambda text, *values: said.append(text % values))
    model, tokenizer = tiny(family, "classification", vocab_size=VOCABULARY), byte_tokenizer(encoder=True)
    tokenizer.model_max_length = int(1e30)  # what transformers says where nothing is known
    rows = [{"text": f"{i} " + "many words " * 20 * (i % 2), "label": i % 2} for i in range(6)]
    task = classification(examples=rows, training=lambda _: [{**e, "text": "x" + e["text"]} for e in rows])
    found = evaluate(model, tokenizer, task)
    assert found.details["cut"] == {"texts": 3, "tokens": held} and "3 of 6 texts" in said[0]
    features = task.training_features(tokenizer, model=model)
    assert max(len(feature["input_ids"]) for feature in features) == held
    assert all(feature["input_ids"][-1] == tokenizer("")["input_ids"][-1] for feature in features)
    for batch in calibration_batches(task, tokenizer, n=6, model=model):
        assert batch["input_ids"].shape[1] <= held and model(**batch).logits.isfinite().all()
    assert any(f"sequences of {held} tokens, not 128" in text for text in said)
    said.clear()
    task.features(tokenizer, rows, length=20, model=model)  # a setting, which rows record
    assert not said


def test_collapse_is_named():
    model = encoder()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0]))
    task = classification()
    found = evaluate(model, TOKENIZER, task)
    assert found.collapsed == "predicts one class (yes) for every example"
    share = np.mean([e["label"] for e in task.examples])
    assert found.floor == max(share, 1 - share)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    found = evaluate(model, TOKENIZER, task)
    assert "not finite" in found.collapsed and found.value == 0
    wrong = {"label": np.array([0, 0, 1.0]), "prediction": np.array([1, 0, 0.0])}
    run = SimpleNamespace(model=model)
    assert "majority" in task.check_collapsed(wrong, 1 / 3, run)[1]
    right = {"label": np.array([0, 0, 1.0]), "prediction": np.array([0, 0, 1.0])}
    assert task.check_collapsed(right, 1.0, run)[1] is None


def test_a_head_that_does_not_fit_is_refused():
    with pytest.raises(WrongTask, match="3 labels .*head 2.*num_labels=3"):
        evaluate(encoder(), TOKENIZER, classification(labels="abc"))
    for pad in (None, -1, VOCABULARY):
        last_token = tiny("gpt2", "classification", vocab_size=VOCABULARY, pad_token_id=None)
        last_token.config.pad_token_id = pad
        with pytest.raises(BadSetting, match=f"pad_token_id, which is {pad} .*eos_token_id"):
            evaluate(last_token, byte_tokenizer(), classification(["abc"]))


def named(*names, **changes):
    id2label = dict(enumerate(names))
    return encoder(id2label=id2label, label2id={name: i for i, name in id2label.items()}, **changes)


@pytest.mark.parametrize(
    "names, labels, given, outputs",
    [
        (("no", "yes"), ("no", "yes"), False, [0, 1]),
        (("YES", "No"), ("no", "yes"), False, [1, 0]),  # by name, in any case
        (("a", "A"), ("A", "a"), False, [1, 0]),
        (("1 star", "2 star", "3 star"), ("3 star", "1 star"), False, [2, 0]),  # classes that do not occur
        (("LABEL_0", "LABEL_1"), ("neg", "pos"), False, [0, 1]),  # no names: by order
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "2"), False, [0, 2]),  # no names: by number
        (("0", "1"), ("1", "2"), False, [0, 1]),
        (("positive", "negative"), ("pos", "neg"), True, [0, 1]),  # the user knows
        (("positive", "negative"), ("neg", "pos"), False, None),
        (("positive", "negative"), ("0", "1"), False, None),
        (("x", "y", "z"), ("a", "b"), True, None),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("a", "b"), False, None),
    ],
)
def test_classes_are_matched_by_name_and_never_guessed(names, labels, given, outputs):
    task = classification(labels=labels, labels_ordered=given)
    model = named(*names)
    if outputs is None:
        with pytest.raises(
            WrongTask, match=rf"{labels[0]}, {labels[1]}.*(no names|{names[0]}).*labels={labels[0]}="
        ):
            task.check(model)
        return
    assert task.outputs(model.config) == outputs
    found = evaluate(model, TOKENIZER, task)
    assert found.columns["label"].tolist() == [outputs[e["label"]] for e in task.examples]
    features = task.features(TOKENIZER, task.examples, model=model)
    assert [feature["labels"] for feature in features] == found.columns["label"].tolist()
    with torch.no_grad():
        logits = [model(**TOKENIZER(e["text"], return_tensors="pt")).logits[0] for e in task.examples]
    right = [names[int(row.argmax())].lower() == labels[e["label"]] for row, e in zip(logits, task.examples)]
    if set(labels) <= set(map(str.lower, names)):
        assert found.value == np.mean(right)


@pytest.mark.parametrize(
    "problem, outputs, able",
    [
        ("multi_label_classification", 3, {"multi-label"}),
        ("regression", 3, set()),
        ("single_label_classification", 3, {"classification"}),
        ("regression", 1, {"similarity", "regression"}),
        (None, 1, {"similarity", "regression"}),
        (None, 3, {"classification", "multi-label"}),
    ],
)
def test_the_loss_of_a_head_is_what_its_config_says(problem, outputs, able):
    model = tiny("gpt2", "classification", num_labels=outputs, problem_type=problem)
    assert capabilities(model) == able
    if not able:
        with pytest.raises(WrongTask, match=f"trained as {problem} with {outputs} outputs"):
            classification(labels="abc").check(model)


def pairs(n: int = 7) -> Similarity:
    texts = sentences(2 * n, seed=5)
    examples = [
        {"text": texts[i], "pair": texts[(3 * i) % n + n // 2], "label": float(i % 4)} for i in range(n)
    ]
    return Similarity(name="pairs", split="test", examples=examples, source="made up")


def test_similarity_is_the_cosine_of_mean_pooled_sentences():
    model, task = encoder(head=None), pairs()

    def embedding(text: str) -> np.ndarray:
        with torch.no_grad():
            return model(**TOKENIZER(text, return_tensors="pt")).last_hidden_state[0].double().numpy().mean(0)

    vectors = [(embedding(e["text"]), embedding(e["pair"])) for e in task.examples]
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in vectors]
    label = [e["label"] for e in task.examples]
    found = evaluate(model, TOKENIZER, task, batch_tokens=100)
    np.testing.assert_allclose(found.columns["score"], cosine, rtol=1e-4)
    assert found.value == pytest.approx(spearmanr(cosine, label).statistic)
    assert found.secondary["pearson"] == pytest.approx(pearsonr(cosine, label).statistic, rel=1e-3)
    with_head = evaluate(
        tiny("bert", "lm", vocab_size=VOCABULARY, max_position_embeddings=128), TOKENIZER, task
    )
    assert len(with_head.columns["score"]) == len(label)


def test_a_regression_head_reads_the_pair():
    model, task = encoder(num_labels=1), pairs()
    first = task.examples[0]
    with torch.no_grad():
        expected = float(model(**TOKENIZER(first["text"], first["pair"], return_tensors="pt")).logits)
    found = evaluate(model, TOKENIZER, task)
    assert found.columns["score"][0] == pytest.approx(expected, rel=1e-4)
    assert found.details["score"] == "regression head"


def test_a_constant_model_has_no_correlation_and_is_named():
    model = encoder(num_labels=1)
    with torch.no_grad():
        model.classifier.weight.zero_()
    found = evaluate(model, TOKENIZER, pairs())
    assert np.isnan(found.value) and "NaN" in found.collapsed


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_correlations_are_scipys_with_ties(rows):
    columns = {"score": np.array([a for a, _ in rows], float), "label": np.array([b for _, b in rows], float)}
    if np.ptp(columns["score"]) == 0 or np.ptp(columns["label"]) == 0:
        assert np.isnan(STATISTICS["spearman"](columns)) and np.isnan(STATISTICS["pearson"](columns))
        return
    expected = spearmanr(columns["score"], columns["label"]).statistic
    assert STATISTICS["spearman"](columns) == pytest.approx(expected, abs=1e-12)
    assert STATISTICS["pearson"](columns) == pytest.approx(
        pearsonr(columns["score"], columns["label"]).statistic, abs=1e-9
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=30))
def test_macro_f1_is_scikit_learns(rows):
    label, said = np.array(rows).T
    expected = f1_score(label, said, average="macro", zero_division=0)
    assert STATISTICS["macro_f1"]({"label": label * 1.0, "prediction": said * 1.0}) == pytest.approx(expected)


ABLE = dict.fromkeys(ENCODERS, ("similarity", "similarity", "similarity classification multi-label"))
ABLE |= dict.fromkeys(DECODERS, ("", "language_modelling writing", "classification multi-label"))
ABLE |= dict.fromkeys(("t5", "bart"), ("", "generation writing", None))


@pytest.mark.parametrize("family", ABLE)
def test_what_every_family_can_do_with_every_head(family):
    for head, able in zip((None, "lm", "classification"), ABLE[family], strict=True):
        expected = {word.replace("_", " ") for word in able.split()} if able is not None else None
        assert expected is None or capabilities(tiny(family, head)) == expected
    if family == "bert":  # a language model only as a decoder
        for decoder in (False, True):
            config = tiny("bert", None, is_decoder=decoder).config
            expected = {"language modelling", "writing"} if decoder else {"similarity"}
            assert capabilities(AutoModelForCausalLM.from_config(config)) == expected


@pytest.mark.parametrize("family", DECODERS)
def test_what_reads_ahead_is_found_by_running_it(family):
    assert not reads_ahead(tiny(family)) and not reads_ahead(tiny(family).bfloat16().train())


def test_a_class_called_lm_that_reads_ahead_has_no_perplexity():
    shape = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("xlnet", **shape)).train()
    pairs = [{"good": "a b", "bad": "b a", "field": "x", "paradigm": "y"}]
    with pytest.raises(WrongTask, match="XLNetLMHeadModel lets a token change the logits before it"):
        MinimalPairs(name="p", split="test", examples=pairs, source="made up").check(model)
    assert model.training


def test_the_refusal_says_what_the_model_can_do():
    pytest.raises(BadData, classification, []).match("no usable example")
    with pytest.raises(
        WrongTask, match=r"needs a model with a classification head.*GPT2LMHeadModel.*perplexity.*finetune="
    ):
        evaluate(tiny("gpt2"), TOKENIZER, classification())
    with pytest.raises(WrongTask, match=r"GPT2Model.*A head is loaded with"):
        classification().check(SimpleNamespace(model=tiny("gpt2", None)))
    classification().check(SimpleNamespace(model=encoder()))
