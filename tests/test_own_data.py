"""A user's own files: how they are read, what kind of task they are, and what is refused with which words."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoConfig, AutoModelForSequenceClassification

from lmcompress.errors import BadData, BadSetting, StudyError, WrongTask
from lmcompress.tasks import calibration_batches, calibration_source, evaluate, load_task
from lmcompress.tasks.batching import IGNORED
from lmcompress.tasks.data import read_file
from lmcompress.tasks.language_modelling import continuations, for_training
from lmcompress.tasks.multiple_choice import answer_indices
from tests.synthetic_mirror import VOCABULARY, byte_tokenizer, sentences
from tests.tiny_models import tiny

ENCODER, DECODER, CLOSING = byte_tokenizer(encoder=True), byte_tokenizer(), byte_tokenizer(closing=True)


def headed(outputs=2, problem=None, family="bert", **config):
    config = {"vocab_size": VOCABULARY, "num_labels": outputs, "problem_type": problem} | config
    return tiny(family, "classification", **config)


def gpt2(**config):
    return tiny("gpt2", vocab_size=VOCABULARY, **({"n_positions": 256} | config))


def write(path, content):
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text": "x", "label": 1.50}, {"text": "2024-05-01", "label": true}]'),
        ("b.JSON", '\ufeff{"text": ["x", "2024-05-01"],\n "label": [1.50, true]}'),
        ("c.jsonl", '{"text": "x", "label": 1.50}\r\n\n{"label": true, "text": "2024-05-01"}\r\n'),
        (
            "d.Jsonl",
            '{"text": "x", "label": "1.50", "more": {"deep": 1}}\n{"text": "2024-05-01", "label": true}',
        ),
        ("e.csv", '\ufefftext;label\r\n"x";1.50\r\n2024-05-01;true\r\n'),
        ("f.csv", "text|label\nx|1.50\n2024-05-01|true\n"),
        ("g.TSV", "label\ttext\n1.50\tx\ntrue\t2024-05-01\n"),
        ("h.csv", ",text,label\n0,x,1.50\n1,2024-05-01,true\n"),
    ],
)
def test_every_value_is_the_text_that_stands_in_the_file(tmp_path, name, content):
    rows = read_file(write(tmp_path / name, content)).select(["text", "label"]).rows()
    assert rows == [("x", "1.50"), ("2024-05-01", "true")]


def test_nested_values_are_columns_of_their_own(tmp_path):
    rows = [
        {"id": 1, "translation": {"en": "one", "de": "eins"}},
        {"id": 2, "translation": {"en": "two", "de": "zwei"}},
    ]
    expected = [("one", "eins"), ("two", "zwei")]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        task = load_task(path, source_column="translation.en", target_column="translation.de")
        assert [(e["text"], e["target"]) for e in task.examples] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "x"},\n {"text" 1}]', "line 2, is no .json: Expecting ':'"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 3, is no .jsonl"),
        ("a.jsonl", '{"text": "x"}\n"y"\n', 'row 2 is no object with named values, such as {"text"'),
        ("a.jsonl", '{"label": "x"}\n{"label": ["y"]}\n', "a column holds values of several kinds"),
        ("a.json", "[]", "is empty"),
        ("a.txt", "", "is empty"),
        ("a.txt", "ä".encode("latin-1"), "is not UTF-8"),
        (
            "a.jsonl",
            [{"text": "x", "label": "a"}, {"text": "y"}],
            r"row 2 lacks a label \(1 blank or missing",
        ),
        ("a.csv", "text,label\nx,a\n,b\n ,b\n", r"row 2 lacks a text \(2 blank or missing"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000, "row 2 is nested too deeply"),
        ("a.json", '[{"text": "\\ud800"}]', r"half of a character \(surrogates not allowed"),
        (f"{'a' * 300}.csv", None, "there is no file"),
    ],
)
def test_a_bad_file_is_named_with_its_line_or_row(tmp_path, name, content, message):
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    pytest.raises(BadData, load_task, path).match(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": "ten"}, "limit='ten': give a whole number of at least 1"),
        ({"limit": True}, "limit=True"),
        ({"window": 0}, "window=0"),
        ({"stride": 0}, "stride=0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"metric": 3}, "no metric '3'"),
        ({"higher_is_better": "no"}, "higher_is_better='no': give true or false"),
    ],
)
def test_settings_of_a_wrong_kind_are_refused(tmp_path, settings, message):
    path = write(tmp_path / "a.csv", "text,label\nx,1\ny,2\n")
    pytest.raises(BadSetting, load_task, path, **settings).match(message)


def test_numbers_of_a_command_line_name_columns_and_prompts(tmp_path):
    path = write(tmp_path / "a.csv", "1,2\nx,0\ny,1\n")
    assert [e["text"] for e in load_task(path, text_column=1, label_column=2).examples] == ["x", "y"]
    path = write(tmp_path / "b.csv", "source,target\na,b\n")
    pytest.raises(BadSetting, load_task, path, prompt=3).match("prompt='3' lacks")


# ---------------------------------------------------------------- which kind

CLASSES = "text,label\nx,1\ny,2\n"
MODELS = {
    "classes": headed(),
    "number": headed(1),
    "several": headed(2, "multi_label_classification"),
    "decoder": gpt2(),
    "encoder": tiny("bert", None, vocab_size=VOCABULARY),
}


@pytest.mark.parametrize(
    ("content", "model", "settings", "kind"),
    [
        (CLASSES, None, {}, "classification"),
        (CLASSES, "number", {}, "regression"),
        (CLASSES, "several", {}, "multi-label"),
        (CLASSES, None, {"kind": "regression"}, "regression"),
        ("text,label\nx,1.5\ny,2\n", None, {}, "regression"),
        ("text,label\nx,1.5\ny,2\n", "classes", {}, "classification"),
        ("text,label\nx,1.0\ny,2.0\n", None, {}, ["classification", "regression"]),
        ("text,label\nx,1.0\ny,2.0\n", "classes", {}, "classification"),
        ("text,label\nx,a;b\ny,b\n", None, {}, ["classification", "multi-label"]),
        ("text,label\nx,a;b\ny,b\n", "several", {}, "multi-label"),
        ("sentence1,sentence2,score\nx,y,4\nz,w,1\n", "encoder", {}, "regression"),
        ("text_a,text_b,label\nx,y,4.2\nz,w,1\n", "classes", {}, "classification"),
        ("text,a,b\nx,0,1\ny,1,1\n", None, {"label_column": "a,b"}, "multi-label"),
        ("text\nx\ny\n", None, {}, "language-modelling"),
        ("id,text\n1,x\n2,y\n", "decoder", {}, "language-modelling"),
        ("source,target\nx,y\n", None, {}, "generation"),
        ("source,target,text,label\nx,y,z,a\nx,y,z,b\n", None, {}, ["classification", "generation"]),
        ("source,target,text,label\nx,y,z,a\nx,y,z,b\n", "decoder", {}, "generation"),
        ("question,choices,answer\nx,y;z,A\n", None, {}, "multiple-choice"),
    ],
)
def test_columns_labels_and_head_tell_the_kind(tmp_path, content, model, settings, kind):
    path = write(tmp_path / "own.csv", content)
    if isinstance(kind, list):
        with pytest.raises(BadSetting, match=f"fits the kinds .*{kind[0]}.*{kind[1]}.*kind="):
            load_task(path)
        assert load_task(path, kind=kind[1]).kind == kind[1]
    else:
        assert load_task(path, model=MODELS.get(model), **settings).kind == kind


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("id,text\n1,x\n", {}, "no column 'label'; its columns are id, text.*kind="),
        ("a,b\n1,x\n", {}, "no column 'text'"),
        ("source,b\n1,x\n", {}, "no column 'target'"),
        (CLASSES, {"label_column": "stars"}, "no column 'stars'; its columns are text, label"),
        (CLASSES, {"kind": "generation"}, "no column 'source', 'target'"),
        (CLASSES, {"kind": "regresion"}, "no kind 'regresion' of own data: expected one of classification"),
        (CLASSES, {"window": 8}, "is classification: no setting window; it has metric"),
        (CLASSES, {"split": "0.2,0.8"}, "expected the share to report on, or those to train"),
        (CLASSES, {"split": 0.5, "selection_path": "none.csv"}, "no file selection_path"),
        ("source,target\nx,y\n", {"prompt": "say {text}"}, "lacks {source}, the place of the text"),
        ("source,target\nx, \n", {}, "row 1 lacks a target"),
        ('text,label\nx,1.5\ny,"2,5"\n', {"kind": "regression"}, r"row 2 has '2,5', expected a number"),
        ("text,label\nx,nan\n", {"kind": "regression"}, "row 1 has 'nan', expected a number"),
        (
            "text,a,b\nx,0,1\ny,1,maybe\n",
            {"label_column": "a,b"},
            "row 2 has 'maybe', expected 0 or 1 in each of a, b",
        ),
        ("text,a,b\nx,0,\ny,1,1\n", {"label_column": "a,b"}, "row 1 has '', expected 0 or 1"),
        (
            "text,label\nx,a;b\ny,c\n",
            {"kind": "multi-label", "labels": "a,b"},
            r"labels \['c'\], which are not",
        ),
        ("question,choices,answer\nx,y,A\n", {}, r"row 1 has \['y'\], expected two choices or more"),
        ("question,choices,answer\nx,y;z,B\nw,y;z,C\n", {}, "row 2 has 'C', expected a letter from A to B"),
        ("question,choices,answer\nx,y;z,C\n", {}, "row 1 has 'C', expected one of its choices, its"),
        ("question,choices,answer\nx,y;z;w,1\n", {}, "row 1 has '1', expected a letter or a choice's text"),
    ],
)
def test_what_does_not_fit_its_kind_is_refused(tmp_path, content, settings, message):
    pytest.raises(StudyError, load_task, write(tmp_path / "own.csv", content), **settings).match(message)


def test_a_list_is_no_class(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"text": "x", "label": ["a"]}, {"text": "y", "label": ["b"]}])
    pytest.raises(BadData, load_task, path, kind="classification").match("row 1 has a list in 'label'")


# ------------------------------------------------------------------- labels


def test_a_number_beside_a_text_is_regressed_on(tmp_path):
    rows = "".join(f"{text},{len(text) / 9:.3f}\n" for text in sentences(40, seed=1))
    task = load_task(write(tmp_path / "own.csv", "text,label\n" + rows), metric="rmse")
    model = headed(1)
    scored = evaluate(model, ENCODER, task)
    with torch.no_grad():
        said = [model(**ENCODER(e["text"], return_tensors="pt")).logits.item() for e in task.examples]
    error = np.array(said) - [e["label"] for e in task.examples]
    assert scored.value == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5) and not task.higher_is_better
    assert scored.secondary["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert scored.floor == pytest.approx(np.std([e["label"] for e in task.examples]))
    assert scored.collapsed == f"rmse {scored.value:.4g} is not below {scored.floor:.4g}, that of always " + (
        f"{np.mean([e['label'] for e in task.examples]):.4g}"
    )
    assert task.features(ENCODER, task.examples[:1], model=model)[0]["labels"] == task.examples[0]["label"]
    pytest.raises(WrongTask, task.check, MODELS["encoder"]).match("needs a regression head")
    pytest.raises(WrongTask, task.check, headed()).match("needs a regression head")
    decoder = headed(1, family="gpt2", pad_token_id=None)
    pytest.raises(BadSetting, task.check, decoder).match(
        "finds the last token of a text by config.pad_token_id"
    )
    xlnet = AutoConfig.for_model(
        "xlnet", num_labels=1, d_model=8, n_head=2, n_layer=1, d_inner=8, vocab_size=9
    )
    xlnet = AutoModelForSequenceClassification.from_config(xlnet)
    pytest.raises(BadSetting, task.check, xlnet).match("reads the last position")


@pytest.mark.parametrize("form", ["lists", "separated", "columns", "json"])
def test_several_labels_meet_the_models_by_name(tmp_path, form):
    texts = sentences(30, seed=2)
    sets = [[name for i, name in enumerate(("dull", "long", "new")) if (len(t) >> i) & 1] for t in texts]
    settings, path = {}, tmp_path / "own.csv"
    if form == "lists":
        path = write(tmp_path / "own.jsonl", [{"text": t, "label": s} for t, s in zip(texts, sets)])
    elif form == "columns":
        rows = [{"text": t} | {n: int(n in s) for n in ("new", "long", "dull")} for t, s in zip(texts, sets)]
        pd.DataFrame(rows).to_csv(path, index=False)
        settings["label_column"] = ["new", "long", "dull"]
    else:
        cells = [json.dumps(s) if form == "json" else "; ".join(s) for s in sets]
        pd.DataFrame({"text": texts, "label": cells}).to_csv(path, index=False)
    names = {0: "New", 1: "Dull", 2: "other", 3: "Long"}
    model = headed(4, "multi_label_classification", id2label=names)
    task = load_task(path, model=model, **settings)
    assert task.kind == "multi-label" and sorted(task.labels) == ["dull", "long", "new"]
    scored = evaluate(model, ENCODER, task)
    with torch.no_grad():
        logits = torch.cat([model(**ENCODER(t, return_tensors="pt")).logits for t in texts])
    truth = np.array([[name.lower() in s for name in names.values()] for s in sets])
    said = logits.numpy() > 0
    assert scored.value == pytest.approx(f1_score(truth, said, average="micro", zero_division=0))
    seen = truth.any(0) | said.any(0)
    assert scored.secondary["macro_f1"] == pytest.approx(
        f1_score(truth, said, average=None, zero_division=0)[seen].mean()
    )
    assert scored.secondary["accuracy"] == (truth == said).all(1).mean()
    loss = model(**ENCODER(texts[:1], return_tensors="pt"), labels=torch.tensor(truth[:1] * 1.0)).loss.item()
    assert scored.columns["cross_entropy"][0] == pytest.approx(loss, rel=1e-5)
    features = task.features(ENCODER, task.examples, model=model)
    assert [feature["labels"] for feature in features] == truth.astype(float).tolist()
    indices = np.random.default_rng(0).integers(0, 30, (20, 30))
    drawn = task.statistic.resampled(scored.columns, indices)
    assert drawn == pytest.approx(
        [f1_score(truth[i], said[i], average="micro", zero_division=0) for i in indices]
    )
    pytest.raises(WrongTask, task.check, headed(4, "multi_label_classification")).match(
        "dull.*no names.*labels="
    )
    pytest.raises(WrongTask, task.check, headed(3, "single_label_classification")).match("problem_type")


def test_any_evaluate_metric_reads_what_its_kind_scores(tmp_path):
    module = """
import datasets
import evaluate


class Largest(evaluate.Metric):
    def _info(self):
        value = {feature}
        features = datasets.Features({{"predictions": value, "references": value}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {{"largest": {result}}}
"""
    cases = {
        "regression": (
            'datasets.Value("float64")',
            "max(abs(p - r) for p, r in zip(predictions, references))",
        ),
        "multi-label": ('datasets.Sequence(datasets.Value("int64"))', "float(len(predictions[0]))"),
        "generation": ('datasets.Value("string")', "float(max(len(r) for r in references))"),
    }
    content = {"generation": "source,target\n" + "".join(f"a {i},{'b' * i}\n" for i in range(1, 22))}
    content |= dict.fromkeys(
        ("regression", "multi-label"), "text,label\n" + "".join(f"t {i},{i % 3}\n" for i in range(21))
    )
    models = {
        "regression": headed(1),
        "multi-label": headed(3, "multi_label_classification"),
        "generation": gpt2(),
    }
    for kind, (feature, result) in cases.items():
        (tmp_path / kind).mkdir()
        metric = write(tmp_path / kind / "largest.py", module.format(feature=feature, result=result))
        settings = {"higher_is_better": True} | ({"max_new_tokens": 2} if kind == "generation" else {})
        task = load_task(
            write(tmp_path / kind / "own.csv", content[kind]), kind=kind, metric=str(metric), **settings
        )
        scored = evaluate(models[kind], DECODER if kind == "generation" else ENCODER, task)
        error = max(abs(scored.columns["score"] - scored.columns["label"])) if kind == "regression" else None
        assert scored.value == pytest.approx({"regression": error, "multi-label": 3, "generation": 11}[kind])
        assert scored.metric == "largest" and task.statistic(scored.columns) == pytest.approx(scored.value)


def test_several_labels_that_a_data_set_declares_keep_their_names(tmp_path):
    import datasets

    label = datasets.Sequence(datasets.ClassLabel(names=["dull", "new"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = {"text": ["a", "b", "c"], "label": [[1], [], [1, 0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "own.parquet")
    task = load_task(tmp_path / "own.parquet")
    assert (task.kind, task.labels) == ("multi-label", ["dull", "new"])
    assert [example["label"] for example in task.examples] == [[1], [], [0, 1]]


# -------------------------------------------------------- text that is written


def test_a_folder_of_sources_and_targets_has_its_own_training_text(tmp_path):
    texts = sentences(30, seed=7)
    for split, part in (("train", texts[:20]), ("test", texts[20:])):
        write(tmp_path / f"{split}.jsonl", [{"source": text, "target": text[::-1]} for text in part])
    task = load_task(tmp_path)
    assert (task.kind, len(task.examples), len(task.training_examples())) == ("generation", 10, 20)
    features = task.training_features(CLOSING, model=tiny("t5", vocab_size=VOCABULARY))
    source, target = (
        CLOSING.decode(features[0][side], skip_special_tokens=True) for side in ("input_ids", "labels")
    )
    assert source == target[::-1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_goes_on_after_prompts_of_any_length(tmp_path, family):
    texts = sentences(12, seed=4)
    rows = [{"source": text[: 5 + 3 * i], "target": f" {text[5 + 3 * i :]} "} for i, text in enumerate(texts)]
    path = write(tmp_path / "own.jsonl", rows)
    task = load_task(path, prompt="Go on: {source}", max_new_tokens=7, metric="rougeL")
    sizes = {"gpt2": {"n_positions": 256}, "llama": {"max_position_embeddings": 256}}[family]
    model = tiny(family, vocab_size=VOCABULARY, **sizes)
    scored = evaluate(model, DECODER, task)
    assert scored.metric == "rougeL" and {"bleu", "chrf", "exact_match", "rouge1"} <= {*scored.secondary}
    for example, sample in zip(task.examples, scored.details["samples"]):
        ids = [DECODER.bos_token_id, *DECODER(example["text"])["input_ids"]]
        with torch.no_grad():
            alone = model.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False)[0, len(ids) :]
        assert sample["output"] == DECODER.decode(alone, skip_special_tokens=True).strip()
    whole = [f"{e['text']} {e['target']}" for e in task.examples]
    with torch.no_grad():
        ids = torch.tensor([[DECODER.bos_token_id, *DECODER(whole[0])["input_ids"], DECODER.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(DECODER(task.examples[0]["text"])["input_ids"]) + 1] = IGNORED
        loss = model(input_ids=ids, labels=labels).loss.item() * (labels != IGNORED).sum().item()
    assert scored.columns["nll"][0] == pytest.approx(loss, rel=1e-4)
    [features] = task.features(DECODER, task.examples[:1], model=model)
    assert features == {"input_ids": ids[0].tolist(), "labels": labels[0].tolist()}
    pytest.raises(WrongTask, task.check, headed()).match("needs a model that writes")
    pytest.raises(BadSetting, evaluate, gpt2(n_positions=8), DECODER, task).match(
        "leaves no room for a prompt"
    )


def test_an_encoder_decoder_reads_the_source_and_matches_are_counted(tmp_path, caplog):
    caplog.set_level("WARNING", "lmcompress")
    path = write(tmp_path / "own.jsonl", [{"source": t, "target": t[:9]} for t in sentences(8, seed=6)])
    task = load_task(path, max_new_tokens=5)
    model = tiny("t5", vocab_size=VOCABULARY)
    outputs = [sample["output"] for sample in evaluate(model, CLOSING, task).details["samples"]]
    longer = task.features(CLOSING, [{"text": "a", "target": "bcdefghi"}], model=model)[0]["labels"]
    assert CLOSING.decode(longer, skip_special_tokens=True) == "bcd"
    assert "1 of 1 texts are longer than 4 tokens and were cut" in caplog.text
    for example, output in zip(task.examples, outputs):
        example["target"] = output
    task._cache.clear()
    scored = evaluate(model, CLOSING, task)
    assert scored.columns["exact_match"][: len(outputs)].tolist() == [1.0] * len(outputs)


def test_calibration_without_training_text_fits_the_model(tmp_path, monkeypatch):
    from lmcompress.corpus import pydocs
    from tests.synthetic_mirror import FakeCorpus

    monkeypatch.setattr(pydocs, "harvest", FakeCorpus)
    path = write(tmp_path / "own.jsonl", [{"source": t, "target": t} for t in sentences(8, seed=6)])
    for model, tokenizer in ((gpt2(), DECODER), (tiny("t5", vocab_size=VOCABULARY), CLOSING)):
        task = load_task(path)
        batch = calibration_batches(task, tokenizer, n=4, length=24, labels=True, model=model)[0]
        assert torch.isfinite(model(**batch).loss) and "pydocs train" in calibration_source(task, model)


# --------------------------------------------------------------------- choices


def choices_file(tmp_path, answer):
    questions, rows = sentences(14, seed=8), []
    for i, question in enumerate(questions):
        choices = [questions[(i + k) % 14][: 5 + 4 * k] for k in range(2 + i % 3)]
        rows.append({"question": question, "choices": choices, "answer": answer(choices, i % len(choices))})
    return write(tmp_path / "own.jsonl", rows)


def test_the_likeliest_choice_is_the_answer(tmp_path):
    forms = [lambda c, i: i, lambda c, i: "ABCD"[i], lambda c, i: c[i], lambda c, i: str(i + 1)]
    tasks = [load_task(choices_file(tmp_path, form)) for form in forms]
    assert all(task.examples == tasks[0].examples for task in tasks[1:])
    model, task = gpt2(), tasks[0]
    scored = evaluate(model, DECODER, task)
    for number, example in enumerate(task.examples):
        likelihoods = []
        for choice in example["choices"]:
            ids = torch.tensor([[DECODER.bos_token_id, *DECODER(f"{example['text']} {choice}")["input_ids"]]])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            count = len(DECODER(f" {choice}")["input_ids"])
            likelihoods.append(
                sum(log_p[k - 1, ids[0, k]].item() for k in range(-count + ids.shape[1], ids.shape[1]))
            )
        likelihoods = np.array(likelihoods)
        assert scored.columns["prediction"][number] == likelihoods.argmax()
        share = np.exp(likelihoods - np.logaddexp.reduce(likelihoods))[example["label"]]
        assert scored.columns["cross_entropy"][number] == pytest.approx(-np.log(share), rel=1e-3, abs=1e-4)
        per_byte = likelihoods / [len(choice.encode()) for choice in example["choices"]]
        assert scored.columns["correct_per_byte"][number] == (per_byte.argmax() == example["label"])
    assert scored.floor == pytest.approx(np.mean([1 / len(e["choices"]) for e in task.examples]))
    features = task.features(DECODER, task.examples, model=model)
    right = " " + task.examples[0]["choices"][0]
    assert DECODER.decode([t for t in features[0]["labels"] if t != IGNORED]) == right
    other = load_task(choices_file(tmp_path, forms[0]), metric="accuracy_per_byte")
    assert evaluate(model, DECODER, other).value == scored.secondary["accuracy_per_byte"]


def test_choices_in_columns_and_cells(tmp_path):
    table = "question,A,B,answer,all\nx,yes; sir,no,no,yes;no\ny,one,two,one,one;two\n"
    path = write(tmp_path / "own.csv", table)
    task = load_task(path, choices_column="A,B", prompt="Q: {question}\nA:")
    assert task.examples[0] == {"text": "Q: x\nA:", "choices": ["yes; sir", "no"], "label": 1}
    assert load_task(path, choices_column="all").examples[1]["choices"] == ["one", "two"]


@pytest.mark.parametrize(
    ("answers", "indices"),
    [
        (["b", "A"], [1, 0]),
        (["x", "y"], [0, 1]),  # the choices themselves
        (["0", "1"], [0, 1]),
        (["3", "1"], [2, 0]),  # counted from 1: the last choice's number occurs, 0 does not
        (["1", "2"], [None, None]),  # from 0 or from 1?
        (["0", "3"], [0, None]),
        (["x", "nothing"], [0, None]),
    ],
)
def test_answers_are_texts_letters_or_numbers(answers, indices):
    assert answer_indices(answers, [["x", "y", "z"]] * 2)[0] == indices


# ------------------------------------------------- longer than the model reads


def test_texts_longer_than_the_model_are_cut_counted_and_said(tmp_path, caplog):
    caplog.set_level("WARNING", "lmcompress")
    long = "a long text " * 30
    tokenizers = {"bert": ENCODER, "gpt2": DECODER, "t5": CLOSING}
    labelled = [{"text": f"{long if i < 3 else 'short'} {i}", "label": "ab"[i % 2]} for i in range(9)]
    sources = [{"source": row["text"], "target": "b"} for row in labelled]
    choices = [{"question": row["text"], "choices": ["b", "c"], "answer": "A"} for row in labelled]
    for rows, model, count, tokens in (
        (labelled, headed(max_position_embeddings=64), 3, 64),
        (labelled, headed(family="gpt2", n_positions=64), 3, 64),
        (sources, gpt2(n_positions=64), 3, 56),
        (choices, gpt2(n_positions=64), 6, 64),
    ):
        path = write(tmp_path / "own.jsonl", rows)
        settings = {"max_new_tokens": 8} if rows is sources else {}
        task = load_task(path, model=model, **settings)
        tokenizer = tokenizers[model.config.model_type]
        scored = evaluate(model, tokenizer, task)
        assert scored.details["cut"] == {"texts": count, "tokens": tokens}
        assert f"{count} of " in caplog.text and f"longer than {tokens} tokens and were cut" in caplog.text
        caplog.clear()
        features = task.features(tokenizer, task.examples, model=model)
        assert max(len(feature["input_ids"]) for feature in features) <= 65 and "were cut" in caplog.text
        caplog.clear()


def test_a_prompt_that_is_cut_keeps_its_end_and_what_follows():
    [item], sizes, details = continuations(DECODER, ["abcdefgh"], ["xyz"], length=6, closed=True)
    assert details == {"cut": {"texts": 1, "tokens": 6}} and sizes.tolist() == [3]
    start, end = DECODER.bos_token_id, DECODER.eos_token_id
    [train] = for_training([item])
    assert train["input_ids"] == [start, *DECODER("h xyz")["input_ids"], end]
    assert [t for t in item["labels"] if t != IGNORED] == [*DECODER(" xyz")["input_ids"], end]
    assert len(item["input_ids"]) == len(item["labels"]) == 6


def test_running_text_in_a_column_is_perplexity_within_the_models_positions(tmp_path):
    texts = [f"{a}\n\n{b}" for a, b in zip(sentences(30, seed=3), sentences(30, seed=5))]
    path = write(tmp_path / "own.jsonl", [{"text": text} for text in texts])
    model = gpt2(n_positions=32)
    task = load_task(path, model=model, split=0.5)
    scored = evaluate(model, DECODER, task)
    assert scored.details["window"] == 32 and len({e["document"] for e in task.examples}) == 15
    documents = {}
    for example in task.examples:
        documents.setdefault(example["document"], []).append(example["text"])
    kept = ["\n\n".join(paragraphs) for paragraphs in documents.values()]
    assert set(kept) < set(texts) and scored.details["bytes"] == sum(len(text.encode()) for text in kept)
    assert task.training_features(DECODER, limit=2, model=model)


# --------------------------------------------------------------------- splits


def test_splits_by_share_and_by_file(tmp_path):
    rows = [{"text": f"review number {i}", "label": "ab"[i % 2]} for i in range(100)]
    path = write(tmp_path / "all.jsonl", rows)
    task = load_task(path, split="0.2,0.3,0.5")
    sizes = [len(task.training_examples()), len(task.selection().examples), len(task.examples)]
    assert sizes == [20, 30, 50] and (task.split, task.selection().split) == ("report", "selection")
    assert len(load_task(path, split=0.3).examples) == 30 and load_task(path, split=0.3).selection() is None
    assert len(load_task(path, split="0.2,0.3,0.5", limit=7).selection().examples) == 7
    train = write(tmp_path / "train.jsonl", [{"text": f"another {i}", "label": "a"} for i in range(10)])
    chosen = write(tmp_path / "chosen.jsonl", [{"text": f"one more {i}", "label": "b"} for i in range(12)])
    task = load_task(path, train_path=train, selection_path=chosen)
    assert (len(task.training_examples()), len(task.selection().examples)) == (10, 12)
    assert [e["label"] for e in task.selection().examples] == [1] * 12
    task = load_task(path, train_path=train, split=0.6)
    assert (len(task.training_examples()), len(task.selection().examples)) == (10, 40)
    for more in (
        {"split": "0.2,0.3,0.5", "selection_path": chosen},
        {"split": "0.2,0.3,0.5", "train_path": train},
    ):
        pytest.raises(BadSetting, load_task, path, **more).match("and no .*_path besides")
