"""Where examples come from: every task on a synthetic mirror, what is refused, and what never overlaps."""

import ast
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lmcompress import tasks
from lmcompress.corpus import pydocs
from lmcompress.errors import AssetNotFound, BadData, BadSetting, NoSuchSplit, StudyError
from lmcompress.measure import quality
from lmcompress.stats import LEAST_EXAMPLES
from lmcompress.tasks import TASKS, calibration_batches, calibration_source, evaluate, harvested, load_task
from lmcompress.tasks.data import read_split
from lmcompress.tasks.harvested import library_examples, names_itself, signature_examples
from lmcompress.tasks.hub import DATA_SETS, DataSet
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
        sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256} | head
        return tiny("bert", "classification" if head else None, **sizes), byte_tokenizer(encoder=True)
    if task.kind == "generation":
        return tiny("t5", vocab_size=VOCABULARY), byte_tokenizer(closing=True)
    return tiny("gpt2", vocab_size=VOCABULARY, n_positions=256), DECODER_TOKENIZER


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_scores_and_keeps_training_apart(mirror, name):
    task = load_task(name)
    model, tokenizer = fitting(task)
    found = evaluate(model, tokenizer, task)
    assert np.isfinite(found.value) and set(found.secondary) == set(task.secondary)
    column = found.columns.get("nll", found.columns.get("label", ()))
    compared = quality(found, found.columns, resamples=50)["secondary"]
    with_difference = [name for name, part in compared.items() if "difference" in part]
    assert with_difference == [task.likelihood] * bool(task.likelihood and len(column) >= LEAST_EXAMPLES)
    assert len({len(column) for column in found.columns.values()}) == 1
    assert json.dumps(found.details)
    hashes = [load_task(name, limit=limit).data_hash for limit in (None, 10 if "lib" in name else 1)]
    assert task.data_hash == hashes[0] != hashes[1]
    assert len(load_task(name, limit=10).examples) <= 10 * len(PARADIGMS)
    if task.has_training():
        scored, trained = (set(map(task.text_key, e)) for e in (task.examples, task.training_examples()))
        assert not scored & trained
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
    task = load_task("sst2", split="validation")
    frame = pd.read_parquet(mirror / "nyu-mll/glue/sst2/validation-00000-of-00001.parquet")
    assert [e["text"] for e in task.examples] == frame["sentence"].tolist()
    assert [e["label"] for e in task.examples] == frame["label"].tolist()
    assert (task.split, task.source) == ("validation", "nyu-mll/glue sst2")
    assert task.labels == ["negative", "positive"]


def test_wikitext_is_one_text_joined_as_published(mirror):
    task = load_task("wikitext2")
    rows = pd.read_parquet(mirror / "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet")[
        "text"
    ]
    found = evaluate(*fitting(task), task)
    assert found.details["bytes"] == len("\n\n".join(rows).encode())


def test_tinystories_keeps_every_byte_of_a_row(mirror):
    task = load_task("tinystories", window=32, split="validation")
    rows = pd.read_parquet(mirror / "roneneldan/TinyStories/data/validation-00000-of-00001.parquet")["text"]
    found = evaluate(*fitting(task), task)
    assert found.details["bytes"] == sum(len(row.encode()) for row in rows)
    assert len(task.examples) == sum(row.count("\n\n") + 1 for row in rows)


def test_blimp_takes_the_limit_of_each_paradigm(mirror):
    task = load_task("blimp", limit=4, split="train")
    fields = {name: field.replace("/", "_") for name, field in PARADIGMS.items()}
    assert {e["paradigm"]: e["field"] for e in task.examples} == fields
    assert len(task.examples) == 4 * len(PARADIGMS)
    found = evaluate(*fitting(task), task)
    assert set(found.details["accuracy_by_paradigm"]) == set(PARADIGMS)
    pytest.raises(BadData, task.training_features, DECODER_TOKENIZER)


def test_a_missing_language_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSET_MIRROR", str(build(tmp_path, french=False)))
    assert load_task("multi30k-en-de").examples[0]["text"].startswith("translate English to German: ")
    pytest.raises(BadData, load_task, "multi30k-en-fr").match("no column 'fr'; its columns are en, de")


def test_a_missing_split_or_data_set_is_named(mirror, monkeypatch):
    with pytest.raises(BadData, match="no split 'train'; it has test"):
        load_task("wikitext2").training_features(DECODER_TOKENIZER)
    pytest.raises(BadData, load_task, "sst2", split="dev").match("no split 'dev'; it has train, validation")
    monkeypatch.setenv("ASSET_MIRROR", str(mirror))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(mirror / "no cache"))
    pytest.raises(AssetNotFound, load_task, "sst2").match("nyu-mll/glue")


def test_unknown_names_and_settings_are_named(mirror):
    with pytest.raises(BadData, match="shorter than one window"):
        load_task("tinystories").training_features(DECODER_TOKENIZER, length=100_000)
    pytest.raises(BadSetting, load_task, "sst3").match("unknown task 'sst3'.*sst2")
    pytest.raises(BadSetting, load_task, "pydocs-lm", windw=3).match("no setting windw; it has .*window")
    pytest.raises(BadSetting, load_task, "sst2", limit=0).match("limit=0")
    pytest.raises(BadSetting, load_task, "x" * 5000).match("unknown task 'xxx")


def test_splits_without_a_readme_are_found_by_file_name(tmp_path):
    for name in ("train", "val", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"en": name, "de": "b"}])
    assert read_split(str(tmp_path), None, "validation").select(["en"]).rows() == [("val",)]


def test_a_readme_may_list_files_that_are_not_there(tmp_path):
    splits = "  - split: test\n    path: x/test-*\n  - split: train\n    path: x/train-*"
    header = f"configs:\n- config_name: x\n  data_files:\n{splits}"
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
    (tmp_path / "x").mkdir()
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "x/test-0.parquet")
    assert read_split(str(tmp_path), "x", "test").rows() == [("a",)]
    with pytest.raises(NoSuchSplit, match="no split 'train'; it has test"):
        read_split(str(tmp_path), "x", "train")
    with pytest.raises(BadData, match="no configuration 'y'; it has x"):
        read_split(str(tmp_path), "y", "test")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"configs: [", "the header of .*README.md is not YAML"),
        (b"x: \xff", "README.md is not UTF-8"),
        (b"configs:\n- config_name: a\n  data_files:\n  - path: t.jsonl", "need a split and a path each"),
        (b"configs:\n- config_name: a\n  data_files: ../t.jsonl", r"files outside its folder: \.\./t\.jsonl"),
        (b"configs:\n- config_name: a\n  data_files: /t.jsonl", "files outside its folder: /t.jsonl"),
        (b"- a list", "no data found"),
        (b"configs: 3", "no data found"),
    ],
)
def test_a_readme_that_is_not_as_the_hub_has_it_is_named(tmp_path, header, message):
    write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])  # valid, and where "outside" leads
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "README.md").write_bytes(b"---\n" + header + b"\n---\n")
    pytest.raises(BadData, read_split, str(tmp_path / "x"), None, "train").match(message)


def test_reading_leaves_nothing_in_a_users_home(mirror, tmp_path, monkeypatch):
    for name in [
        "HF_DATASETS_CACHE",
        "HF_MODULES_CACHE",
        "DOWNLOADED_DATASETS_PATH",
        "EXTRACTED_DATASETS_PATH",
    ]:
        monkeypatch.setattr(f"datasets.config.{name}", str(tmp_path / "home" / name))
    assert len(load_task("sst2", limit=3).examples) == 3
    assert not (tmp_path / "home").exists()


def test_importing_tasks_imports_datasets_and_evaluate_only_when_they_read():
    """Of the modules that are imported with the package; `evaluate_metrics` is, with the first evaluation."""
    for file in Path(tasks.__file__).parent.glob("[!e]*.py"):
        names = [
            name
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        ]
        assert not {"datasets", "evaluate", "lmcompress.tasks.evaluate_metrics"} & set(names), file


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
    again, other = (signature_examples(frame, limit=None, seed=seed) for seed in (1, 2))
    assert examples == again != other


def test_documents_without_a_body_are_no_summary_task(mirror):
    task = load_task("pydocs-summary")
    frame = documents("test")
    assert len(task.examples) == (frame["body"] != "").sum()
    first = frame[frame["body"] != ""].iloc[0]
    text = f"summarize: {first['signature']}\n{first['body']}"
    assert task.examples[0] == {"text": text, "target": first["summary"]}


def test_the_evaluated_split_is_never_trained_on(mirror):
    scored = {"sst2": ("validation", "held-out"), "pydocs-lm": ("test", "validation")}
    scored |= {"multi30k-en-de": ("test",), "tinystories": ("validation",)}
    for name, split in ((name, split) for name, splits in scored.items() for split in splits):
        with pytest.raises(BadData, match=f"evaluated on '{split}'"):
            load_task(name).training_features(byte_tokenizer(closing=True), split=split)


@pytest.mark.parametrize("name", TASKS)
def test_a_report_set_and_a_selection_set_share_nothing_with_each_other_nor_with_training(mirror, name):
    report, selection = load_task(name), load_task(name).selection()
    assert (selection is None) == (name == "wikitext2")
    assert load_task(name, split=report.split).selection() is None
    if selection is None:
        return
    assert selection.selection() is None and selection.metric == report.metric
    assert selection.split != report.split and selection.data_hash != report.data_hash
    sides = [{task.text_key(example) for example in task.examples} for task in (report, selection)]
    assert not sides[0] & sides[1] or name == "pydocs-continuation"  # made-up documents of equal bodies
    if report.has_training():
        assert not {report.text_key(e) for e in report.training_examples()} & (sides[0] | sides[1])
    limited = load_task(name, limit=10)
    assert len(limited.selection().examples) < max(11, len(selection.examples))


def test_what_the_selection_set_repeats_is_not_trained_on(mirror):
    task = load_task("sst2")
    stray = task.training_examples()[0]
    task.selection().examples.append(stray)
    task._cache.pop("train")
    assert stray not in task.training_examples() and len(task.training_examples()) > 10


def test_halves_of_a_split_are_the_whole(mirror, monkeypatch):
    for name, whole, key in (("blimp", "train", "paradigm"), ("tinystories", "validation", "text")):
        halves = [load_task(name, split=f"{whole}/{half}").examples for half in ("report", "selection")]
        seen = [{example[key] for example in half} for half in halves]
        everything = load_task(name, split=whole).examples
        assert all(seen) and not seen[0] & seen[1] and len(halves[0]) + len(halves[1]) == len(everything)
    monkeypatch.setattr(DataSet, "_rows", lambda self, split: [("One.\n\nTwo.\n\nThree.",)])  # no borders
    halves = [DATA_SETS["tinystories"].rows(f"validation/{half}") for half in ("report", "selection")]
    assert halves == [[("One.",)], [("Two.\n\nThree.",)]]
    with pytest.raises(NoSuchSplit, match="no half 'other' of the split 'train': expected report or sel"):
        load_task("blimp", split="train/other")


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


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_columns_and_labels_are_named(tmp_path):
    rows = [("good, really", "x", 10), ("bad", "y", 2), ("ünd so", "z", 2)]
    frame = pd.DataFrame(rows, columns=["review", "other", "stars"])
    frame.to_csv(tmp_path / "a.csv", index=False)
    settings = {"text_column": "review", "label_column": "stars"}
    task = load_task(tmp_path / "a.csv", **settings)
    assert task.labels == ["2", "10"]  # numbers in the order of numbers
    assert [(e["text"], e["label"]) for e in task.examples] == [(t, int(n == 10)) for t, _, n in rows]
    turned = load_task(tmp_path / "a.csv", labels=["10", "2"], **settings)
    assert [e["label"] for e in turned.examples] == [0, 1, 1]
    paired = load_task(tmp_path / "a.csv", text_pair_column="other", **settings)
    assert paired.examples[1] == {"text": "bad", "pair": "y", "label": 0}
    with pytest.raises(BadData, match='no training split.*train_path="train.csv"'):
        task.training_features(DECODER_TOKENIZER)


@pytest.mark.parametrize("name", ["own.csv", "own.tsv"])
def test_values_of_a_csv_are_the_strings_that_stand_in_it(tmp_path, name):
    rows = [("null", "NA"), ("1.50", "007"), ('say ""hi"", all', "None"), ("line\none", "7e1")]
    comma = "," if name == "own.csv" else "\t"
    text = "".join(f'"{text}"{comma}{label}\r\n' for text, label in [("text", "label"), *rows])
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    task = load_task(tmp_path / name)
    assert [e["text"] for e in task.examples] == ["null", "1.50", 'say "hi", all', "line\none"]
    assert task.labels == ["007", "7e1", "NA", "None"]


@pytest.mark.parametrize("row", ["the film, good,0", "the film"])
def test_another_number_of_fields_is_refused_with_its_line(tmp_path, row):
    path = tmp_path / "own.csv"
    path.write_text(f'text,label\n"two\nlines",1\n\n{row}\nb,1\n')
    pytest.raises(BadData, load_task, path).match(r"own\.csv, line 5: \d fields, but the header has 2")


def test_every_format_of_own_data_is_the_same_task(tmp_path):
    rows = [{"text": "2020-01-01", "label": "b"}, {"text": "2020-01-02", "label": "a"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    pd.DataFrame(rows).to_csv(tmp_path / "x.tsv", index=False, sep="\t")
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    expected = [{"text": "2020-01-01", "label": 1}, {"text": "2020-01-02", "label": 0}]
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        assert load_task(tmp_path / f"x.{suffix}").examples == expected, suffix


def test_a_folder_or_hub_id_of_labelled_texts(mirror):
    columns = {"text_column": "sentence", "split": "validation", "config": "sst2"}
    task = load_task("nyu-mll/glue", labels=["0", "1"], **columns)
    ours = load_task("sst2", split="validation")
    assert [e["label"] for e in task.examples] == [e["label"] for e in ours.examples]
    assert load_task(mirror / "nyu-mll/glue", **columns).examples == task.examples
    assert len(task.training_examples()) == 60 and calibration_source(task) == "nyu-mll/glue train"
    pytest.raises(AssetNotFound, load_task, "no/where").match("no/where")


def test_a_folder_of_csv_files_is_read_as_a_file_is(tmp_path):
    for split, label in (("train", "007"), ("test", "NA")):
        (tmp_path / f"{split}.csv").write_text(f"text,label\n1.50 {split},{label}\nb {split},1\n")
    task = load_task(tmp_path, labels=["NA", "007", "1"])
    assert [(e["text"], e["label"]) for e in task.examples] == [("1.50 test", 0), ("b test", 2)]
    assert sorted(e["label"] for e in task.training_examples()) == [1, 2]
    (tmp_path / "test-1.csv").write_text("label,text\n1,c\n")
    pytest.raises(BadData, load_task, tmp_path).match("2 files have different columns")
    (tmp_path / "none").mkdir()
    pytest.raises(BadData, load_task, tmp_path / "none").match("no data found in .*none")


def test_classes_that_a_data_set_declares_keep_their_names_and_order(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    task = load_task(tmp_path / "x.parquet")
    assert task.labels == ["pos", "neg"] and [e["label"] for e in task.examples] == [1, 0, 1]
    datasets.Dataset.from_dict(rows | {"label": [1, 0, -1]}, features=features).to_parquet(
        tmp_path / "x.parquet"
    )
    pytest.raises(BadData, load_task, tmp_path / "x.parquet").match(r"labels \['-1'\]")


def test_a_text_file_is_language_modelling(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\nthree four")
    (tmp_path / "b.txt").write_text("five six\n\nseven eight nine ten")
    task = load_task(tmp_path / "a.txt", window=8, train_path=tmp_path / "b.txt")
    assert evaluate(*fitting(task), task).details["bytes"] == len("one two\n\nthree four")
    assert len(task.training_features(DECODER_TOKENIZER, limit=2)) == 2


def test_an_error_in_the_training_file_is_no_reason_for_another_text(tmp_path, mirror):
    rows = [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(20)]
    test = write_jsonl(tmp_path / "test.jsonl", rows)
    for name, content in (
        ("blank", '{"text": "", "label": "a"}\n'),
        ("same", test.read_text()),
        ("bad", "{"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(content)
        task = load_task(test, train_path=tmp_path / f"{name}.jsonl")
        for ask in (calibration_source, lambda task: calibration_batches(task, byte_tokenizer(), n=2)):
            pytest.raises(BadData, ask, task).match(f"{name}.jsonl")
    (tmp_path / "own.txt").write_text("a text")
    for own in (test, tmp_path / "own.txt"):
        pytest.raises(BadData, load_task, own, train_path=tmp_path / "trian.csv").match("no file train_path")
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"folder/{split}.jsonl", rows[:: 1 if split == "test" else 2])
    with pytest.raises(BadData, match="10 of 10 training examples"):
        calibration_source(load_task(tmp_path / "folder"))


STARS = "text,label\na dog,1 star\na fox,2 star\na cat,3 star\n"


@pytest.mark.parametrize(
    "name, content, more",
    [
        ("a.csv", STARS, {}),
        ("UP.CSV", STARS, {}),
        ("UP.Tsv", STARS.replace(",", "\t"), {}),
        ("blanks.csv", STARS.replace(",", ", "), {}),
        ("quotes.csv", '"text", "label"\n"a dog", "1 star"\na fox, 2 star\na cat,3 star\n', {}),
        ("b.csv", STARS, {"labels": "1 star, 2 star,3 star"}),
        ("c.csv", STARS.replace(" star", ""), {"labels": "1=1 star,2=2 star,3=3 star"}),
        ("d.csv", STARS.replace(" star", ""), {"labels": {i: f"{i} star" for i in (3, 2, 1)}}),
    ],
)
def test_own_csv_however_it_was_written(tmp_path, name, content, more):
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
    task = load_task(tmp_path / name, **more)
    examples = [(example["text"], task.labels[example["label"]]) for example in task.examples]
    assert examples == [("a dog", "1 star"), ("a fox", "2 star"), ("a cat", "3 star")]
    assert task.labels_ordered == isinstance(more.get("labels"), str) or "=" in more["labels"]
    config = tiny("bert", "classification", id2label={i: f"{5 - i} star" for i in range(5)}).config
    assert task.labels_ordered or sorted(task.outputs(config)) == [2, 3, 4]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("text,label\n", "is empty"),
        ("text,class\na,b\n", "no column 'label'; its columns are text, class"),
        ("text,label\na,x\nb,x\n", "fewer than two different labels"),
        ("text,label\na,x\n ,y\nc,\n", r"row 2 lacks a text \(2 blank or missing cells"),
        ("a|b\n1|2|3\n", r"line 2: 3 fields, but the header has 2 \(a, b\)"),
        ("text,label,text\na,x,b\n", "more than one column 'text'"),
        ('text,label\n"a" b,x\n', "line 2, is no .csv: ',' expected after"),
        ('text,label\n"a,x\nb,y\n', "line 3, is no .csv: unexpected end of data"),
        ("text,label\nä,x\n".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, content, message):
    path = tmp_path / "own.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    pytest.raises(BadData, load_task, path).match(message)


def test_a_bad_jsonl_a_missing_file_and_an_unknown_label_are_named(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "a", "label": \n')
    pytest.raises(BadData, load_task, tmp_path / "own.jsonl").match(r"own\.jsonl, line 2, is no \.jsonl: Exp")
    pytest.raises(StudyError, load_task, tmp_path / "missing.csv").match(r"no file .*missing\.csv")
    path = write_jsonl(tmp_path / "l.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    pytest.raises(BadData, load_task, path, labels=["y", "z"]).match(r"labels \['x'\], which are not among")


real = pytest.mark.skipif(
    not os.environ.get("ASSET_MIRROR"), reason="ASSET_MIRROR is not set: no downloaded data sets"
)


@real
def test_real_data_sets_have_the_published_sizes():
    sizes = {"sst2": (2000, 872), "stsb": (1000, 1500), "multi30k-en-de": (1000, 1014)}
    for name, (report, selection) in sizes.items():
        task = load_task(name)
        assert (len(task.examples), len(task.selection().examples)) == (report, selection)
    blimp = load_task("blimp", limit=1)
    assert len(blimp.examples) == 34 and len(blimp.selection().examples) == 33
    assert len(load_task("blimp", limit=1, split="train").fields) == 4


@real
@pytest.mark.slow  # a pretrained encoder over 2,900 sentences
def test_minilm_reaches_its_published_correlation_on_stsb():
    from transformers import AutoModel, AutoTokenizer

    from lmcompress.models import assets

    try:
        path = assets.resolve("sentence-transformers/all-MiniLM-L6-v2", kind="models")
    except AssetNotFound as error:
        pytest.skip(str(error).splitlines()[0])
    found = evaluate(
        AutoModel.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
        load_task("stsb", split="validation"),
    )
    assert found.value == pytest.approx(0.867, abs=5e-4)
