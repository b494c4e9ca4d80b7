"""The check beside a fitted model: every kind of file, by torch and by the graphs' runtimes alone."""

import csv
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from lmcompress import formats
from lmcompress.fit import answers, check, check_graph
from lmcompress.tasks import evaluate, load_task
from lmcompress.tasks.metrics import STATISTICS, bleu, chrf, rouge

N, CONFIRMED = 60, 40
KINDS = {  # model's family and head, what its config says, columns, and the task's settings
    "classification": ("bert", "classification", {}, ("text", "label"), {}),
    "decoder's pairs": ("gpt2", "classification", {"pad_token_id": 0}, ("text_a", "text_b", "label"), {}),
    "regression": ("bert", "classification", {"num_labels": 1}, ("text", "score"), {"metric": "mae"}),
    "similarity": ("bert", None, {}, ("text_a", "text_b", "score"), {}),
    "multi-label": (
        "bert",
        "classification",
        {"problem_type": "multi_label_classification"},
        ("text", "labels"),
        {"metric": "macro_f1"},
    ),
    "language-modelling": ("gpt2", "lm", {}, ("text",), {"window": 16, "stride": 12}),
    "translation": ("t5", "lm", {}, ("source", "target"), {"max_new_tokens": 5, "prompt": "w1: {source}"}),
    "continuation": ("gpt2", "lm", {}, ("source", "target"), {"max_new_tokens": 5, "metric": "bleu"}),
    "multiple-choice": ("llama", "lm", {}, ("question", "choices", "answer"), {}),
}
OPTIONS = {"continuation": "generation", "similarity": "regression", "translation": "generation"}
STATEFUL = ("decoder's pairs", "language-modelling", "translation", "continuation")


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i + 5 for i in range(90)} | {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, ":": 3}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=24, **special)


def written(file, columns):
    """Write a file of examples of random words, and return its rows."""
    rng = np.random.default_rng(0)

    def words(low, high):
        return " ".join(f"w{k}" for k in rng.integers(0, 90, rng.integers(low, high)))

    def cells(i):
        make = {name: words(3, 30) for name in ("text", "text_a", "text_b", "source", "question")}
        make |= {"target": words(1, 5), "score": f"{rng.normal():.3f}", "label": ("no", "yes")[i % 2]}
        make |= {"labels": ("no;yes", "yes", "", "no")[i % 4], "answer": "ABA"[i % 3]}
        return [{**make, "choices": f"{words(1, 4)};{words(1, 4)}"}[name] for name in columns]

    rows = [cells(i) for i in range(N)]
    rows += rows[:9]  # which count once
    if columns == ("text",):
        rows = [[f"{text}\n\nW3 {text}"] for [text] in rows]
    with open(file, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([columns, *rows])


def fitted(name, runtime, tokenizer, folder):
    """Write a model, and what a search would record of it, to `folder`; return the check's arguments."""
    family, head, changes, columns, settings = KINDS[name]
    if head == "classification" and "num_labels" not in changes:
        changes = changes | {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    dense, file = tiny(family, head, **changes), folder / "data.csv"
    folder.mkdir(parents=True)
    written(file, columns)
    saved = dense if runtime != "torch" else tiny(family, head, **changes)
    formats.save(
        saved, folder / "f", format={"torch": "transformers"}.get(runtime, runtime), tokenizer=tokenizer
    )
    model, tokenizer = formats.load(folder / "f")
    settings = {"kind": OPTIONS.get(name, name.replace("decoder's pairs", "classification"))} | settings
    task = load_task(str(file), model=dense, **settings)
    task.examples = task.examples[: 2 * CONFIRMED if columns == ("text",) else CONFIRMED]
    scored = [evaluate(side, tokenizer, task) for side in (tiny(family, head, seed=1, **changes), model)]
    sides = [(evaluation.columns, evaluation.outputs) for evaluation in scored]
    content = answers.record(task, dense, tokenizer, settings, *sides)
    qualities = [{"quality": {"value": evaluation.value}} for evaluation in scored]
    facts = {"dense": qualities[0], "answer": qualities[1] | {"runtime": runtime, "batch": None}}
    for stem, written_content in (("answers", content), ("fit", facts)):
        (folder / "f" / f"{stem}.json").write_text(json.dumps(written_content, allow_nan=False))
    for module in (check, check_graph)[: 1 if runtime == "torch" else 2]:
        shutil.copy(module.__file__, folder / "f")
    whole = evaluate(model, tokenizer, load_task(str(file), model=dense, **settings))
    return [str(folder / "f" / "check.py"), str(file)], whole, scored[1]


def agrees(shown, whole, confirmed):
    """Return whether the check's lines say of a model what an evaluation of it does."""
    lines = shown.splitlines()
    values = [check_value(e) for e in (whole, confirmed)]
    same = lines[-1].split()
    return (
        f" {values[0]} on " in lines[0]
        and f"; then {values[1]}, the dense" in lines[-2]
        and f" {values[1]};" in lines[-2]
        and same[0] == same[2] != "0"
    )


def check_value(evaluation):
    value = evaluation.value
    return f"{100 * value:.2f} %" if evaluation.metric == "accuracy" else f"{value:.4g}"


@pytest.mark.parametrize(("runtime", "names"), [("onnx", KINDS), ("openvino", STATEFUL)])
def test_graphs_are_checked_by_their_runtime_alone(runtime, names, tokenizer, tmp_path):
    made = {name: fitted(name, runtime, tokenizer, tmp_path / name) for name in names}
    code = (
        "import json, os, runpy, sys\n"
        "for name in ('torch', 'lmcompress', 'transformers', 'datasets'): sys.modules[name] = None\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    sys.argv, sys.path[0] = command, os.path.dirname(command[0])\n"
        "    print('CHECK', flush=True)\n"
        "    runpy.run_path(command[0], run_name='__main__')\n"
    )
    commands = json.dumps([command for command, *_ in made.values()])
    done = subprocess.run([sys.executable, "-c", code, commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for (name, (_, *evaluations)), shown in zip(made.items(), done.stdout.split("CHECK\n")[1:], strict=True):
        assert agrees(shown, *evaluations), (name, shown)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_torch_is_checked_as_it_was_evaluated(name, tokenizer, tmp_path, monkeypatch, capsys):
    command, *evaluations = fitted(name, "torch", tokenizer, tmp_path / "made")
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(command[0], run_name="__main__")
    assert agrees(capsys.readouterr().out, *evaluations)


def test_changed_answers_are_counted(tokenizer, tmp_path, monkeypatch, capsys):
    command, *_ = fitted("classification", "torch", tokenizer, tmp_path / "made")
    file = Path(command[0]).with_name("answers.json")
    recorded = json.loads(file.read_text())
    for number, entry in enumerate(recorded["answers"].values()):
        label, now = number % 2, entry[2]
        # Of the first eight every second is another answer than dense's; of the first five, than it was then.
        entry[:] = [now if label else 1 - now, 1 - now if label and number < 8 else now, now]
        entry[2] = 1 - now if number < 5 else now
    file.write_text(json.dumps(recorded))
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(command[0], run_name="__main__")
    shown = capsys.readouterr().out
    assert "4 answers differ from the dense model's, 0 turned wrong and 4 right" in shown
    assert "35 of 40 are as recorded then" in shown


FILES = {  # a file, and how it is read
    "a.csv": ('text;label\nAh, so;yes\n"b; c";no\n', {"kind": "classification"}),
    "b.jsonl": ('{"s1": "x", "s2": "y", "score": 0.50}\n{"s1": "x", "s2": "z", "score": 2}\n', None),
    "c.tsv": ("text\ta\tb\nx y\t1\t0\nz\tno\tTrue\n", {"kind": "multi-label", "label_column": "a,b"}),
    "d.json": ('{"text": ["x", "y"], "label": [["a", "b"], []]}', {"kind": "multi-label"}),
    "e.csv": (
        'question, choices, answer\nwhy, "[""a"", ""b""]", B\nhow, a;c;d, A\n',
        {"prompt": "Q: {question}"},
    ),
    "f.jsonl": (
        '{"question": "q", "x": "a", "y": "b", "answer": 1}\n'
        '{"question": "r", "x": 1, "y": 2.0, "answer": 2}',
        {"choices_column": "x,y"},
    ),
    "g.csv": ("source,target\n a , b \nc,d\n", {"prompt": "say {source}"}),
    "i.jsonl": (
        '{"text": "x\u2028y\x85z", "label": true}\n{"text": "w", "label": false}\n',
        {"labels": "false=no,true=yes", "kind": "classification"},
    ),
    "j.json": (
        '{"t": {"en": "a", "de": "b"}}\n{"t": {"en": "c", "de": "d"}}\n',
        {"source_column": "t.en", "target_column": "t.de"},
    ),
    "k.csv": ("text; label\nx; yes\ny; no\n", {"kind": "classification"}),
    "h.csv": ("text,label\nx,pos\ny,neg\n", {"labels": "pos=yes,neg=no", "kind": "classification"}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_without_this_package_as_with_it(name, tmp_path):
    content, settings = FILES[name]
    settings = settings or {"text_column": "s1", "text_pair_column": "s2", "kind": "regression"}
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    config = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = tiny("bert", "classification", **config if settings.get("kind") == "classification" else {})
    task = load_task(str(tmp_path / name), **settings)
    label = [example["label"] for example in task.examples] if "label" in task.examples[0] else None
    outputs = task.outputs(model.config) if task.kind in ("classification", "multi-label") else []
    label = [outputs[index] for index in label] if task.kind == "classification" else label
    columns = {"label": np.array(label, dtype=float)} if label and task.kind != "multi-label" else {}
    if task.kind == "multi-label":
        columns = {f"label_{i}": np.array([float(i in row) for row in label]) for i in range(2)}
    columns |= {name.replace("label", "prediction"): column for name, column in columns.items()}
    columns |= {"score": columns["label"]} if task.kind == "regression" else {}
    texts = [example.get("target") for example in task.examples]
    tokenizer = SimpleNamespace(model_max_length=9, pad_token_id=0, eos_token_id=2, bos_token_id=None)
    recorded = answers.record(task, model, tokenizer, settings, (columns, texts), (columns, texts))
    examples = check_graph.examples_of(check_graph.rows_of(tmp_path / name), recorded)
    read = {check_graph.key_of(*example["texts"]): example["label"] for example in examples}
    assert read == {key: label for key, (label, *_) in recorded["answers"].items()} and len(read) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nx,1\ny,2,3\n", "a.csv, line 3: 3 fields, the header has 2"),
        ("a.csv", b"", "is empty, cut or no file of its kind"),
        ("a.csv", "text,label\nä,1\n".encode("latin-1"), "UnicodeDecodeError"),
        ("a.jsonl", b'{"text": "x", "label": "1"}\n{"text"', "JSONDecodeError"),
        ("a.jsonl", b'{"text": "x", "label": "1"}\n{"text": "y"}\n', "KeyError: 'label'"),
        ("a.json", b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_file_that_cannot_be_read_ends_in_a_sentence(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    recorded = {"kind": "classification", "columns": {"text": ["text"], "label": ["label"]}, "answers": {}}
    recorded |= {"needs": ["text", "label"], "outputs": {"1": 0, "2": 1}}
    with pytest.raises(SystemExit, match=message), check_graph.reading(tmp_path / name):
        check_graph.examples_of(check_graph.rows_of(tmp_path / name), recorded)


def test_metrics_are_those_of_the_search():
    rng = np.random.default_rng(0)
    label, answer = rng.integers(0, 3, (2, 50))
    columns = {"label": label, "prediction": answer, "correct": label == answer}
    sets = rng.integers(0, 2, (2, 50, 3))
    scores = rng.normal(size=(2, 50)).round(1)
    texts = [[" ".join(f"w{k}" for k in row) for row in side] for side in rng.integers(0, 4, (2, 50, 6))]
    error = np.abs(scores[0] - scores[1])
    numbers = {"label": scores[0], "score": scores[1], "absolute_error": error, "squared_error": error**2}
    indicators = {f"{n}_{i}": side[:, i] for n, side in zip(("label", "prediction"), sets) for i in range(3)}
    written = {"exact_match": np.array(texts[0]) == np.array(texts[1])}
    for scorer in (bleu, chrf):
        written |= scorer.columns(texts[1], texts[0])
    written |= rouge(texts[1], texts[0])
    of_sets = [[np.flatnonzero(row).tolist() for row in side] for side in sets]
    cases = [
        (columns, (label.tolist(), answer.tolist()), ("accuracy", "macro_f1", "matthews")),
        (indicators, of_sets, ("micro_f1", "macro_f1")),
        (numbers, scores.tolist(), ("mae", "rmse", "pearson", "spearman")),
        (written, texts, ("exact_match", "bleu", "chrf", "rouge1", "rougeL")),
    ]
    for content, sides, names in cases:
        for name in names:
            expected = STATISTICS[name]({key: np.asarray(side, dtype=float) for key, side in content.items()})
            assert check_graph.score(name, list(zip(*sides))) == pytest.approx(expected), name
    assert check_graph.score("my_metric", [(0, 0)]) is None


def test_what_cannot_be_checked_is_said(tokenizer, tmp_path, monkeypatch, capsys):
    (command, file), *_ = fitted("translation", "onnx", tokenizer, tmp_path / "made")
    folder, other = Path(command).parent, tmp_path / "other.csv"
    other.write_text("source,target\nw1,w2\n")
    recorded = json.loads((folder / "answers.json").read_text())
    monkeypatch.syspath_prepend(folder)

    def said(path, **changes):
        (folder / "answers.json").write_text(json.dumps(recorded | changes))
        monkeypatch.setattr(sys, "argv", [command, str(path)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(command, run_name="__main__")
        return str(ended.value)

    assert "no example of other.csv is among the 40" in said(other)
    assert "only lmcompress can check this model: it generates by bad_words_ids" in said(
        file, unlike=["bad_words_ids"]
    )
    assert "minimal-pairs is no task of a file" in said(file, kind="minimal-pairs", answers={})
    assert "no column of the source" in said(file, columns={"source": ["x"], "target": ["target"]})
    assert "there is no file" in said(tmp_path / "none.csv")
    capsys.readouterr()
    said(other, metric="my_metric", metric_name="my_metric")
    assert (
        "exact match 0 on 1" in (shown := capsys.readouterr().out)
        and "my_metric, which needs lmcompress" in shown
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime is missing: install what README.md says" in said(file)
    (folder / "tokenizer.json").rename(folder / "elsewhere.json")
    assert "has no tokenizer.json" in said(file)
