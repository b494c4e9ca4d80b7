"""Each kind of own task through a study: scored, compared in pairs, calibrated on and trained on."""

import json

import numpy as np
import pytest

from lmcompress import measure
from lmcompress.measure.recompute import differing, recomputed
from lmcompress.results.verdicts import loss_scale
from lmcompress.study.study import Recovery, Study
from lmcompress.tasks.calibration import Calibration
from lmcompress.train import encoder
from tests.synthetic_mirror import VOCABULARY, byte_tokenizer, sentences
from tests.tiny_models import tiny

SENTENCES = sentences(120, seed=11)
HALVES = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in SENTENCES]
LABELLED = {"regression": [round(len(t) / 7, 2) for t in SENTENCES]}
LABELLED["classification"] = ["ab"[len(t) % 2] for t in SENTENCES]
LABELLED["multi-label"] = [["short", "odd"][len(t) % 2 :][: len(t) % 3] for t in SENTENCES]
POSITIONS = {"bert": "max_position_embeddings", "gpt2": "n_positions", "t5": "n_positions"}
# Kind -> what the rows hold, and the models that it is for: family, head and config.
CASES = {
    ("classification", "bert"): {"num_labels": 2},
    ("classification", "gpt2"): {"num_labels": 2},
    ("regression", "bert"): {"num_labels": 1},
    ("regression", "gpt2"): {"num_labels": 1},
    ("multi-label", "bert"): {"num_labels": 2, "problem_type": "multi_label_classification"},
    ("language-modelling", "gpt2"): None,
    ("generation", "t5"): None,
    ("generation", "gpt2"): None,
    ("multiple-choice", "gpt2"): None,
}
METRICS = {
    "classification": ("accuracy", {"macro_f1", "cross_entropy"}),
    "regression": ("spearman", {"pearson", "mae", "rmse"}),
    "multi-label": ("micro_f1", {"macro_f1", "accuracy", "cross_entropy"}),
    "language-modelling": ("perplexity", {"bits_per_byte"}),
    "generation": ("chrf", {"bleu", "exact_match", "bits_per_byte"}),
    "multiple-choice": ("accuracy", {"accuracy_per_byte", "cross_entropy"}),
}


def rows_of(kind):
    if kind == "language-modelling":
        return [{"text": f"{first}\n\n{second}"} for first, second in zip(SENTENCES, SENTENCES[1:])]
    if kind == "generation":
        return [{"source": first, "target": second} for first, second in HALVES]
    if kind == "multiple-choice":
        others = [second for _, second in HALVES[1:] + HALVES[:1]]
        return [{"question": q, "choices": [o, a], "answer": "B"} for (q, a), o in zip(HALVES, others)]
    return [{"text": text, "label": label} for text, label in zip(SENTENCES, LABELLED[kind])]


@pytest.fixture
def study(tmp_path, monkeypatch):
    fake = {"peak_bytes": 1, "peak_kind": "not measured in this test"}
    monkeypatch.setattr(measure, "peak_memory", lambda *a, **k: fake)
    return Study("own", profile="test", folder=tmp_path / "run", calls=2, announce=str, device="cpu")


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_every_kind_is_measured_compared_calibrated_and_trained(kind, family, study, tmp_path):
    head = CASES[kind, family]
    labels = dict(enumerate(["short", "odd"] if kind == "multi-label" else "ab"))
    named = {"id2label": labels} if head and head["num_labels"] == 2 else {}
    shape = {"vocab_size": VOCABULARY, POSITIONS[family]: 96} | (head or {}) | named
    tiny(family, "classification" if head else "lm", **shape).save_pretrained(tmp_path / "model")
    byte_tokenizer(encoder=family == "bert", closing=family == "t5").save_pretrained(tmp_path / "model")
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    settings = {"max_new_tokens": 8} if kind == "generation" else {}
    baseline = study.baseline(
        str(tmp_path / "model"), str(file), split="0.3,0.3,0.4", timed=False, **settings
    )
    assert baseline.task.kind == kind
    metric, further = METRICS[kind]
    assert loss_scale(metric)[1] in ("points", "of perplexity", "chrF")
    row = baseline.measure("rtn", bits=8, timed=False)
    for part in ("quality", "selection"):
        assert row[part]["metric"] == metric and further <= {*row[part]["secondary"]}
        assert np.isfinite(row[part]["difference"]["bound"]) and row[part]["n"] >= 20
    scores = {key: study.store.load_scores(key) for key in (row["key"], baseline.dense["key"])}
    recorded = {part: row[part] for part in ("quality", "selection", "verdict")}
    assert not list(differing(recorded, recomputed(row, baseline.dense, scores), ""))
    budgets = {"calibration": Calibration(8, 32), "recovery": Recovery(1, 1e-2, 4)}
    trained = baseline.measure("wanda", sparsity=0.5, timed=False, **budgets)
    assert trained["provenance"]["calibration"] == "own.jsonl train"
    assert trained["quality"]["value"] is not None or trained["quality"]["collapsed"]
    again = study.baseline(str(tmp_path / "model"), str(file), split="0.3,0.3,0.4", timed=False, **settings)
    assert again.measure("rtn", bits=8, timed=False) == row


@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_a_bare_encoder_is_fine_tuned_for_numbers_and_for_several_labels(kind, study, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "RUNS", tmp_path / "runs")
    tiny("bert", None, vocab_size=VOCABULARY, max_position_embeddings=96).save_pretrained(tmp_path / "bare")
    byte_tokenizer(encoder=True).save_pretrained(tmp_path / "bare")
    lines = [json.dumps(row) + "\n" for row in rows_of(kind)]
    for name, part in (("own", lines[:80]), ("train", lines[80:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    files = {"task": str(tmp_path / "own.jsonl"), "finetune": tmp_path / "train.jsonl"}
    baseline = study.baseline(str(tmp_path / "bare"), **files, timed=False, metric=METRICS[kind][0])
    config = baseline.loaded.model.config
    assert baseline.task.kind == kind and config.problem_type == encoder.PROBLEMS[kind]
    assert config.num_labels == (1 if kind == "regression" else 2)
    card = next((tmp_path / "run" / "models").glob("*/README.md")).read_text()
    assert f"Validation: {METRICS[kind][0]} " in card and "on 80 examples" in card
    assert len(baseline.task.training_examples()) == 40
