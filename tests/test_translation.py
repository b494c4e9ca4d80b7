"""The translator of the reference profile: its tokenizer, a tiny making of it, and what is committed."""

import json

import pytest
import torch
from synthetic_mirror import build
from tiny_models import tiny

from helpers import models, paths
from helpers.errors import BadData
from helpers.tasks import load_task
from helpers.train import pocket, translation
from helpers.train.card import translation_card

PAIRS = [
    {
        "text": f"translate English to German: A dog and {n} men run.",
        "target": f"Ein Hund und {n} Männer rennen.",
    }
    for n in range(30)
]


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSET_MIRROR", str(build(tmp_path)))
    monkeypatch.setattr(translation, "MODELS", tmp_path / "models")
    monkeypatch.setattr(translation, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(pocket, "VOCABULARY", 420)

    def small(kind, tokenizer):
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        return tiny(kind, "lm", vocab_size=len(tokenizer), dropout_rate=0.0, **ids)

    monkeypatch.setattr(pocket, "build", small)
    return tmp_path


def test_the_instruction_is_one_token_and_both_languages_survive(tmp_path):
    made = translation.tokenizer_for(PAIRS, vocab_size=330)
    assert len(made) == 330
    made.save_pretrained(tmp_path)
    for tokenizer in (made, models.tokenizer_of(tmp_path)):
        ids = tokenizer(PAIRS[0]["text"])["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids[0]) == "translate English to German:"
        assert ids[-1] == tokenizer.eos_token_id and ids.count(ids[0]) == 1
        target = tokenizer(text_target=PAIRS[3]["target"])["input_ids"]
        assert tokenizer.decode(target, skip_special_tokens=True) == PAIRS[3]["target"]


def test_prompts_that_begin_differently_are_refused():
    other = {"text": "translate English to French: A dog.", "target": "Un chien."}
    with pytest.raises(BadData, match="begin in 2 ways"):
        translation.tokenizer_for([*PAIRS, other], vocab_size=400)


@pytest.mark.parametrize("pair", translation.PAIRS)
def test_making_a_translator_writes_a_folder_that_loads_and_translates(pair, small_world, monkeypatch):
    seen = {}

    def fit(model, spec, **others):
        seen["sources"] = {tuple(feature["input_ids"]) for feature in spec.features}
        seen["spec"] = spec
        return real(model, spec, **others)

    real = translation.fit
    monkeypatch.setattr(translation, "fit", fit)
    translation.main([pair, "--steps", "3", "--batch-size", "4"])
    folder = translation.folder_of(pair)
    training = json.loads((folder / "training.json").read_text())
    assert training["examples"] == 40 and training["settings"]["steps"] == 3
    assert training["test"]["metric"] == "bleu" and training["test"]["n"] == 10
    assert (folder / "README.md").read_text() == translation_card(folder.name, training)
    loaded = models.load(folder)
    test = load_task(f"multi30k-{pair}")
    assert training["test"]["data_hash"] == test.data_hash
    assert training["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    evaluated = {tuple(f["input_ids"]) for f in test.features(loaded.tokenizer, test.examples, length=None)}
    assert seen["sources"] and not seen["sources"] & evaluated
    assert seen["spec"].label_smoothing > 0 and seen["spec"].hidden_dropout > 0
    assert loaded.model.config.dropout_rate == 0.0  # only while it was trained
    monkeypatch.setattr(translation, "fit", None)
    assert translation.make(pair) == folder  # there already: nothing is trained again


COMMITTED = sorted(paths.MODELS.glob("reference/t5-multi30k-*"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_translator_is_what_its_card_says(folder):
    training = json.loads((folder / "training.json").read_text())
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    assert (folder / "README.md").read_text() == translation_card(folder.name, training)
    test = training["test"]
    assert test["value"] >= 33 and test["low"] < test["value"] < test["high"] and test["n"] == 1000
    assert not test["collapsed"] and "tok:13a" in test["details"]["signatures"]["bleu"]
    loaded = models.load(f"reference/{folder.name}")
    assert sum(p.numel() for p in loaded.model.parameters()) == training["parameters"]
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size
    ids = loaded.tokenizer("translate English to German: A man is sleeping.", return_tensors="pt")
    with torch.no_grad():
        text = loaded.tokenizer.decode(loaded.model.generate(**ids)[0], skip_special_tokens=True)
    assert "Mann" in text and "schl" in text
