"""The translator of the reference profile: its tokenizer, a tiny making of it, and what is committed."""

import json

import pytest
import torch
from synthetic_mirror import build
from tiny_models import tiny

from lmcompress import paths
from lmcompress.errors import BadData
from lmcompress.models import loading
from lmcompress.tasks import load_task
from lmcompress.train.trainer import TrainSpec, fit
from scripts.make_models import pocket, translation
from scripts.make_models.cards import translation_card

SENTENCE = {
    "text": "translate English to German: A dog and {} men run.",
    "target": "Ein Hund und {} Männer rennen.",
}
PAIRS = [{side: text.format(n) for side, text in SENTENCE.items()} for n in range(30)]


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
    other = {"text": "translate English to French: A dog.", "target": "Un chien."}
    pytest.raises(BadData, translation.tokenizer_for, [*PAIRS, other], vocab_size=400).match(
        "begin in 2 ways"
    )
    made = translation.tokenizer_for(PAIRS, vocab_size=330)
    assert len(made) == 330
    made.save_pretrained(tmp_path)
    for tokenizer in (made, loading.tokenizer_of(tmp_path)):
        ids = tokenizer(PAIRS[0]["text"])["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids[0]) == "translate English to German:"
        assert ids[-1] == tokenizer.eos_token_id and ids.count(ids[0]) == 1
        target = tokenizer(text_target=PAIRS[3]["target"])["input_ids"]
        assert tokenizer.decode(target, skip_special_tokens=True) == PAIRS[3]["target"]


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
    loaded = loading.load(folder)
    test = load_task(f"multi30k-{pair}")
    assert training["test"]["data_hash"] == test.data_hash
    assert training["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    evaluated = {tuple(f["input_ids"]) for f in test.features(loaded.tokenizer, test.examples, length=None)}
    assert seen["sources"] and not seen["sources"] & evaluated
    assert seen["spec"].label_smoothing > 0 and seen["spec"].hidden_dropout > 0
    assert loaded.model.config.dropout_rate == 0.0  # only while it was trained
    monkeypatch.setattr(translation, "fit", None)
    assert translation.make(pair) == folder  # there already: nothing is trained again


SLEEPING = {"de": ("German", "Mann", "schl"), "fr": ("French", "homme", "dor")}
COMMITTED = sorted(paths.MODELS.glob("reference/t5-multi30k-*"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_translator_is_what_its_card_says(folder):
    training = json.loads((folder / "training.json").read_text())
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    assert (folder / "README.md").read_text() == translation_card(folder.name, training)
    test = training["test"]
    assert test["value"] >= 33 and test["low"] < test["value"] < test["high"] and test["n"] == 1000
    assert not test["collapsed"] and "tok:13a" in test["details"]["signatures"]["bleu"]
    loaded = loading.load(f"reference/{folder.name}")
    assert sum(p.numel() for p in loaded.model.parameters()) == training["parameters"]
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size
    asked, *words = SLEEPING[folder.name[-2:]]
    ids = loaded.tokenizer(f"translate English to {asked}: A man is sleeping.", return_tensors="pt")
    with torch.no_grad():
        text = loaded.tokenizer.decode(loaded.model.generate(**ids)[0], skip_special_tokens=True)
    assert all(word in text for word in words), text


def test_queries_trained_as_if_scaled_are_ordinary_ones_afterwards_and_move_less():
    batch = [{"input_ids": [5, 6, 7, 8], "labels": [9, 10, 1]}] * 8
    spec = TrainSpec(batch, steps=2, batch_size=4, learning_rate=1e-3, weight_decay=0.0, warmup_steps=1)
    model = tiny("t5", "lm", dropout_rate=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pocket.scaled_queries(model):
        inside = dict(model.named_parameters())
        for name, value in before.items():
            held = model.get_parameter(name) if name in inside else model.get_submodule(name[:-7]).weight
            assert torch.allclose(held, value, atol=1e-7), "the model computes what it did"
        fit(model, spec)
    after = model.state_dict()
    assert set(after) == set(before)
    moved = {name: (after[name] - value).abs().max().item() for name, value in before.items()}
    query, key = (moved[f"encoder.block.0.layer.0.SelfAttention.{one}.weight"] for one in "qk")
    assert key == pytest.approx(1e-3, rel=0.05)  # Adam's second step, the first that has a rate
    assert query == pytest.approx(1e-3 * model.config.d_kv**-0.5, rel=0.05)
