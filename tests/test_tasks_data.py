"""Where examples come from: every task on a synthetic mirror, what is refused, and what never overlaps."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch

from lmcompress.corpus import pydocs
from lmcompress.errors import AssetNotFound, BadData, BadSetting, StudyError
from lmcompress.measure import quality
from lmcompress.tasks import TASKS, calibration_batches, calibration_source, evaluate, harvested, load_task
from lmcompress.tasks.data import read_split, splits_of
from lmcompress.tasks.harvested import library_examples, names_itself, signature_examples
from tests.synthetic_mirror import PARADIGMS, VOCABULARY, FakeCorpus, build, byte_tokenizer, documents
from tests.tiny_models import tiny

DECODER_TOKENIZER = byte_tokenizer()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A synthetic mirror as ASSET_MIRROR, and a small corpus in place of the harvested one."""
    monkeypatch.setenv("ASSET_MIRROR", str(build(tmp_path / "mirror")))
    monkeypatch.setattr(pydocs, "harvest", lambda: FakeCorpus())
    monkeypatch.setattr(harvested, "CONTINUED_WORDS", (7, 2))  # its bodies are one sentence
    return tmp_path / "mirror" / "datasets"


def fitting(task):
    """A tiny model and tokenizer that can do the task."""
    if task.kind in ("classification", "regression"):
        head = {"num_labels": len(task.labels)} if task.labels else {}
        model = tiny(
            "bert",
            "classification" if head else None,
            vocab_size=VOCABULARY,
            max_position_embeddings=256,
            **head,
        )
        return model, byte_tokenizer(encoder=True)
    if task.kind == "generation":
        return tiny("t5", vocab_size=VOCABULARY), byte_tokenizer(closing=True)
    return tiny("gpt2", vocab_size=VOCABULARY, n_positions=256), DECODER_TOKENIZER


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_scores_and_keeps_training_apart(mirror, name):
    task = load_task(name)
    model, tokenizer = fitting(task)
    found = evaluate(model, tokenizer, task)
    assert np.isfinite(found.value) and set(found.secondary) == set(task.secondary)
    compared = quality(found, found.columns, resamples=50)["secondary"]
    assert [name for name, part in compared.items() if "difference" in part] == [task.likelihood] * bool(
        task.likelihood
    )
    assert len({len(column) for column in found.columns.values()}) == 1
    assert json.dumps(found.details)
    assert (
        task.data_hash
        == load_task(name).data_hash
        != load_task(name, limit=1 if "lib" not in name else 10).data_hash
    )
    assert len(load_task(name, limit=10).examples) <= 10 * len(PARADIGMS)
    if task.has_training():
        shared = {task.text_key(e) for e in task.examples} & {
            task.text_key(e) for e in task.training_examples()
        }
        assert not shared
        features = task.training_features(tokenizer, limit=4, seed=3)
        assert 0 < len(features) <= 4 and features == task.training_features(tokenizer, limit=4, seed=3)
        batch = {k: torch.tensor([features[0][k]]) for k in features[0]}
        if task.kind != "regression":
            assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("name", TASKS)
def test_calibration_batches_of_every_task(mirror, name):
    task = load_task(name)
    model, tokenizer = fitting(task)
    batches = calibration_batches(task, tokenizer, n=6, length=24, seed=1)
    assert sum(len(batch["input_ids"]) for batch in batches) == 6
    for batch in batches:
        assert batch["input_ids"].shape[1] <= 24 and batch["attention_mask"].shape == batch["input_ids"].shape
        with torch.no_grad():
            model(**batch)
    if task.kind in ("language-modelling", "minimal-pairs"):
        assert all((batch["attention_mask"] == 1).all() for batch in batches)
    fallback = name in ("blimp", "wikitext2", "pydocs-continuation")
    assert ("pydocs train (" in calibration_source(task)) == fallback


def test_sst2_is_the_hubs(mirror):
    task = load_task("sst2")
    frame = pd.read_parquet(mirror / "nyu-mll/glue/sst2/validation-00000-of-00001.parquet")
    assert [e["text"] for e in task.examples] == frame["sentence"].tolist()
    assert [e["label"] for e in task.examples] == frame["label"].tolist()
    assert (task.split, task.labels, task.source) == (
        "validation",
        ["negative", "positive"],
        "nyu-mll/glue sst2",
    )


def test_wikitext_is_one_text_joined_as_published(mirror):
    task = load_task("wikitext2")
    rows = pd.read_parquet(mirror / "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet")[
        "text"
    ]
    found = evaluate(*fitting(task), task)
    assert found.details["bytes"] == len("\n\n".join(rows).encode())


def test_tinystories_keeps_every_byte_of_a_row(mirror):
    task = load_task("tinystories", window=32)
    [row] = pd.read_parquet(mirror / "roneneldan/TinyStories/data/validation-00000-of-00001.parquet")["text"]
    found = evaluate(*fitting(task), task)
    assert found.details["bytes"] == len(row.encode()) and len(task.examples) == row.count("\n\n") + 1


def test_blimp_takes_the_limit_of_each_paradigm(mirror):
    task = load_task("blimp", limit=4)
    assert {e["paradigm"]: e["field"] for e in task.examples} == {
        name: field.replace("/", "_") for name, field in PARADIGMS.items()
    }
    assert len(task.examples) == 4 * len(PARADIGMS)
    found = evaluate(*fitting(task), task)
    assert set(found.details["accuracy_by_paradigm"]) == set(PARADIGMS)
    with pytest.raises(BadData):
        task.training_features(DECODER_TOKENIZER)


def test_a_missing_language_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSET_MIRROR", str(build(tmp_path, french=False)))
    assert load_task("multi30k-en-de").examples[0]["text"].startswith("translate English to German: ")
    with pytest.raises(BadData, match="no column 'fr'; its columns are en, de"):
        load_task("multi30k-en-fr")


def test_a_missing_split_or_data_set_is_named(mirror, monkeypatch):
    with pytest.raises(BadData, match="no split 'train'; it has test"):
        load_task("wikitext2").training_features(DECODER_TOKENIZER)
    with pytest.raises(BadData, match="no split 'dev'; it has train, validation"):
        load_task("sst2", split="dev")
    monkeypatch.setenv("ASSET_MIRROR", str(mirror))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(mirror / "no cache"))
    with pytest.raises(AssetNotFound, match="nyu-mll/glue"):
        load_task("sst2")


def test_unknown_names_and_settings_are_named(mirror):
    with pytest.raises(BadSetting, match="unknown task 'sst3'.*sst2"):
        load_task("sst3")
    with pytest.raises(BadSetting, match="no setting windw; it has .*window"):
        load_task("pydocs-lm", windw=3)
    with pytest.raises(BadSetting, match="limit 0"):
        load_task("sst2", limit=0)


def test_splits_without_a_readme_are_found_by_file_name(tmp_path):
    frame = pd.DataFrame({"en": ["a"], "de": ["b"]})
    for name in ("train", "val", "test"):
        frame.to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    assert set(splits_of(tmp_path, None)) == {"train", "validation", "test"}
    assert read_split(str(tmp_path), None, "validation", ["en"]).to_dict("list") == {"en": ["a"], "de": ["b"]}


def test_a_readme_may_list_files_that_are_not_there(tmp_path):
    header = "configs:\n- config_name: x\n  data_files:\n  - split: test\n    path: x/test-*\n  - split: train\n    path: x/train-*"
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
    (tmp_path / "x").mkdir()
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "x/test-0.parquet")
    assert list(splits_of(tmp_path, "x")) == ["test"]


# ---------------------------------------------------------------- harvested documents


def test_library_examples_are_balanced_and_do_not_name_their_library():
    frame = documents("test")
    row = frame.iloc[0].to_dict()
    other = next(n for n in pydocs.LIBRARIES if n != row["library"])
    extra = [
        row | {"summary": f"A helper of {row['library'].upper()} for you."},
        row | {"summary": "Too short this"},
        row | {"summary": "The same words stand in two libraries."},
        row | {"library": other, "summary": "the same  words stand in two libraries."},
        row | {"library": "click", "summary": "A library that is no class here."},
        row | {"summary": row["summary"].upper()},
    ]
    frame = pd.concat([frame, pd.DataFrame(extra)], ignore_index=True)
    examples = library_examples(frame, limit=None, seed=0)
    assert np.bincount([e["label"] for e in examples]).tolist() == [12] * len(pydocs.LIBRARIES)
    kept = {e["text"].casefold() for e in examples}
    assert len(kept) == len(examples) and not kept & {e["summary"].casefold() for e in extra[:5]}
    owner = dict(zip(frame["summary"], frame["library"]))
    assert all(pydocs.LIBRARIES[e["label"]] == owner[e["text"]] for e in examples)
    assert [e["label"] for e in examples] != sorted(e["label"] for e in examples)


@pytest.mark.parametrize(
    "text, name, expected",
    [
        ("Wrap a NumPy array.", "numpy", True),
        ("Call np.where on it.", "numpy", True),
        ("The input of this function.", "numpy", False),
        ("Fits a scikit-learn model.", "sklearn", True),
        ("Whether the space is empty.", "scipy", False),
        ("A PyTorch module.", "torch", True),
        ("Use numpy arrays.", "torch", False),
    ],
)
def test_own_name_and_alias_in_any_case(text, name, expected):
    assert names_itself(text, name) == expected


def test_mismatched_signatures_are_of_the_same_library_but_another_document():
    frame = documents("test")
    alone = frame.iloc[0].to_dict() | {"library": "single", "summary": "It has no sibling at all."}
    examples = signature_examples(pd.concat([frame, pd.DataFrame([alone])]), limit=None, seed=1)
    own = dict(zip(frame["summary"], frame["signature"]))
    library_of = dict(zip(frame["signature"], frame["library"]))
    assert len(examples) == len(frame) and sum(e["label"] for e in examples) == len(frame) // 2
    for example in examples:
        assert (example["pair"] == own[example["text"]]) == bool(example["label"])
        assert library_of[example["pair"]] == library_of[own[example["text"]]]
    assert (
        examples
        == signature_examples(frame, limit=None, seed=1)
        != signature_examples(frame, limit=None, seed=2)
    )


def test_documents_without_a_body_are_no_summary_task(mirror):
    task = load_task("pydocs-summary")
    frame = documents("test")
    assert len(task.examples) == (frame["body"] != "").sum()
    first = frame[frame["body"] != ""].iloc[0]
    assert task.examples[0] == {
        "text": f"summarize: {first['signature']}\n{first['body']}",
        "target": first["summary"],
    }


# ---------------------------------------------------------------- leakage


def test_the_evaluated_split_is_never_trained_on(mirror):
    for name, split in (("sst2", "validation"), ("pydocs-lm", "test"), ("multi30k-en-de", "test")):
        with pytest.raises(BadData, match=f"evaluated on '{split}'"):
            load_task(name).training_features(byte_tokenizer(closing=True), split=split)


def test_strays_are_left_out_and_the_same_data_twice_is_refused(tmp_path):
    rows = [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(60)]
    write_jsonl(tmp_path / "test.jsonl", rows[:10])
    write_jsonl(tmp_path / "train.jsonl", [{"text": " Text  NUMBER 3", "label": "b"}, *rows[10:]])
    task = load_task(tmp_path / "test.jsonl", train_path=tmp_path / "train.jsonl")
    assert len(task.training_examples()) == 50 and not any(
        e["text"][-1:] == "3" and "NUMBER" in e["text"] for e in task.training_examples()
    )
    write_jsonl(tmp_path / "train.jsonl", rows[3:33])
    with pytest.raises(BadData, match="7 of 30 training examples.*are evaluation examples"):
        load_task(tmp_path / "test.jsonl", train_path=tmp_path / "train.jsonl").training_features(
            byte_tokenizer()
        )


def test_language_model_windows_hold_training_text_only(mirror):
    task = load_task("pydocs-lm", limit=5, window=16)
    features = task.training_features(DECODER_TOKENIZER, limit=30, seed=0)
    assert len(features) == 30 and all(
        len(f["input_ids"]) == 16 and f["labels"] == f["input_ids"] for f in features
    )
    text = "".join(DECODER_TOKENIZER.decode(f["input_ids"]) for f in features)
    assert "of train does" in text and "of test does" not in text
    assert features != task.training_features(DECODER_TOKENIZER, limit=30, seed=1)
    everything = task.training_features(DECODER_TOKENIZER)
    assert len(everything) > 500


def test_a_corpus_shorter_than_a_window_is_refused(mirror):
    with pytest.raises(BadData, match="shorter than one window"):
        load_task("tinystories").training_features(DECODER_TOKENIZER, length=100_000)


# ---------------------------------------------------------------- one's own file


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_csv_and_jsonl_are_the_same_task(tmp_path):
    rows = [
        {"review": "good, really", "stars": 10},
        {"review": "bad", "stars": 2},
        {"review": "ünd so", "stars": 2},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    write_jsonl(tmp_path / "a.jsonl", rows)
    tasks = [
        load_task(tmp_path / n, text_column="review", label_column="stars") for n in ("a.csv", "a.jsonl")
    ]
    for task in tasks:
        assert task.labels == ["2", "10"]  # numbers in the order of numbers
        assert task.examples == [
            {"text": "good, really", "label": 1},
            {"text": "bad", "label": 0},
            {"text": "ünd so", "label": 0},
        ]
    turned = load_task(tmp_path / "a.csv", text_column="review", label_column="stars", labels=["10", "2"])
    assert [e["label"] for e in turned.examples] == [0, 1, 1]
    with pytest.raises(BadData, match="no training split"):
        tasks[0].training_features(DECODER_TOKENIZER)


def test_words_that_pandas_takes_for_missing_are_texts(tmp_path):
    (tmp_path / "own.csv").write_text("text,label\nnull,NA\nNone,nan\n")
    task = load_task(tmp_path / "own.csv")
    assert [e["text"] for e in task.examples] == ["null", "None"] and task.labels == ["NA", "nan"]


def test_own_pairs(tmp_path):
    rows = [{"a": "x", "b": "y", "label": "no"}, {"a": "u", "b": "v", "label": "yes"}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    task = load_task(path, text_column="a", text_pair_column="b")
    assert task.examples[1] == {"text": "u", "pair": "v", "label": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("text,label\n", "is empty"),
        ("text,class\na,b\n", "no column 'label'; its columns are text, class"),
        ("text,label\na,x\nb,x\n", "fewer than two different labels"),
        ("text,label\na,x\n ,y\nc,\n", "2 rows lack a text or a label, the first is row 1"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, content, message):
    path = tmp_path / "own.csv"
    path.write_text(content)
    with pytest.raises(BadData, match=message):
        load_task(path)


def test_a_bad_jsonl_a_missing_file_and_an_unknown_label_are_named(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "a", "label": \n')
    with pytest.raises(BadData, match="could not be read as .jsonl"):
        load_task(tmp_path / "own.jsonl")
    with pytest.raises(StudyError, match=r"no file .*missing\.csv"):
        load_task(tmp_path / "missing.csv")
    path = write_jsonl(tmp_path / "l.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(BadData, match=r"labels \['x'\], which are not among"):
        load_task(path, labels=["y", "z"])


# ---------------------------------------------------------------- the real data

real = pytest.mark.skipif(
    not os.environ.get("ASSET_MIRROR"), reason="ASSET_MIRROR is not set: no downloaded data sets"
)


@real
def test_real_data_sets_have_the_published_sizes():
    assert len(load_task("sst2").examples) == 872
    assert len(load_task("stsb").examples) == 1500
    assert len(load_task("multi30k-en-de").examples) == 1000
    blimp = load_task("blimp", limit=1)
    assert len(blimp.examples) == 67 and len(blimp.fields) == 4


@real
@pytest.mark.slow  # a pretrained encoder over 2,900 sentences
def test_minilm_reaches_its_published_correlation_on_stsb():
    from transformers import AutoModel, AutoTokenizer

    from lmcompress.models import assets

    try:
        path = assets.resolve("sentence-transformers/all-MiniLM-L6-v2", kind="models")
    except AssetNotFound as error:
        pytest.skip(str(error).splitlines()[0])
    found = evaluate(AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path), load_task("stsb"))
    assert found.value == pytest.approx(0.867, abs=5e-4)
