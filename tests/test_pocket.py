"""Pocket models: tokenizer, windows, span corruption, n-grams, a tiny making of each, what is committed."""

import itertools
import json
import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import tiny

from lmcompress import paths
from lmcompress.corpus import pydocs
from lmcompress.errors import BadData, BadSetting
from lmcompress.models import loading
from lmcompress.tasks import load_task
from lmcompress.train import encoder
from lmcompress.train import pretraining as data
from lmcompress.train.trainer import validation_loss
from scripts.make_models import encoder as encoders
from scripts.make_models import pocket, publishing
from scripts.make_models.cards import model_card

PARTS = [("mean", "sum", "peak", "shape"), ("array", "given series", "naïve ∑")]
PARTS += [("slowly", "along an axis", "twice")]
TEXTS = [f"Return the {a} of the {b}, computed {c}." for a, b, c in itertools.product(*PARTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, vocab_size=400)


@given(text=st.text(max_size=60))
@settings(deadline=None)
def test_any_text_survives_the_tokenizer_and_its_bytes_are_counted(text):
    made = _tokenizer()
    ids = made(text)["input_ids"]
    assert made.decode(ids) == text or any(token in text for token in made.all_special_tokens)
    if not any(token in text for token in made.all_special_tokens):
        assert data.token_bytes(made)[ids].sum() == len(text.encode())


def _tokenizer(made=[]):  # noqa: B006  (one for all of hypothesis's examples)
    if not made:
        made.append(data.train_tokenizer(TEXTS, vocab_size=400))
    return made[0]


def test_closing_tokenizer_ends_every_text_and_leaves_the_first_alone(tokenizer):
    closing = data.closing_with_end(tokenizer)
    plain = tokenizer(TEXTS[0])["input_ids"]
    assert closing(TEXTS[0])["input_ids"] == [*plain, tokenizer.eos_token_id]
    cut = closing(TEXTS[0], max_length=5, truncation=True)["input_ids"]
    assert cut == [*plain[:4], tokenizer.eos_token_id]
    assert tokenizer(TEXTS[0])["input_ids"] == plain
    pytest.raises(BadSetting, pocket.build, "mamba", tokenizer).match("gpt2, llama, t5")


def test_windows_hold_every_text_once_with_ends_between(tokenizer):
    rows = data.windows(TEXTS, tokenizer, length=16)
    assert rows.shape[1] == 16
    joined = tokenizer.decode(rows.ravel()).split("</s>")
    assert joined[: len(TEXTS) - 3] == TEXTS[: len(TEXTS) - 3]
    pytest.raises(BadData, data.windows, ["a"], tokenizer, length=16).match("less than one window")


@given(seed=st.integers(0, 999), length=st.integers(20, 120))
@settings(deadline=None, max_examples=30)
def test_span_corruption_can_be_undone(seed, length):
    made = _tokenizer()
    first = made.convert_tokens_to_ids("<extra_id_0>")
    sentinels = set(range(first, first + data.SENTINELS))
    row = np.random.default_rng(seed).integers(first + data.SENTINELS, 400, length)
    feature = data.span_corruption(row[None], made, seed=seed)[0]
    assert feature["input_ids"][-1] == feature["labels"][-1] == made.eos_token_id
    spans, current = defaultdict(list), None
    for token in feature["labels"][:-1].tolist():
        if token in sentinels:
            current = token
        else:
            spans[current].append(token)
    undone = [[t] if t not in sentinels else spans[t] for t in feature["input_ids"][:-1].tolist()]
    assert sum(undone, []) == row.tolist()
    assert sum(map(len, spans.values())) == round(length * 0.15)


def test_ngram_baselines_equal_a_plain_count():
    rng = np.random.default_rng(0)
    train, rows = rng.integers(0, 7, (30, 12)) ** 2 % 9, rng.integers(0, 9, (5, 8))
    found = data.ngram_baselines(train, rows, vocab_size=10)
    counts = Counter(train.ravel().tolist())
    uni = {b: (counts[b] + 1) / (train.size + 10) for b in range(10)}
    after = defaultdict(Counter)
    for row in train.tolist():
        for a, b in itertools.pairwise(row):
            after[a][b] += 1

    def bigram(a, b):
        total, kinds = sum(after[a].values()), len(after[a])
        return (after[a][b] + kinds * uni[b]) / (total + kinds) if total else uni[b]

    pairs = [pair for row in rows.tolist() for pair in itertools.pairwise(row)]
    assert found["unigram"] == pytest.approx(-np.mean([math.log(uni[b]) for _, b in pairs]))
    assert found["bigram"] == pytest.approx(-np.mean([math.log(bigram(a, b)) for a, b in pairs]))


@pytest.mark.parametrize("kind", pocket.KINDS)
def test_shapes_are_small_tied_and_reload(kind, tmp_path):
    full = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    model = pocket.build(kind, _Sized(full, pocket.VOCABULARY))
    parameters = sum(p.numel() for p in model.parameters())
    assert 4e6 <= parameters <= 6e6
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 12e6
    again = publishing.load(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert sum(p.numel() for p in again.parameters()) == parameters
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), again.state_dict()[name]), name


class _Sized(SimpleNamespace):
    def __init__(self, ids, size):
        super().__init__(**vars(ids))
        self.size = size

    def __len__(self):
        return self.size


class FakeCorpus:
    """Three dozen sentences in every split, each with a number of its own."""

    hash = "fake"

    def documents(self, split, *, limit=None):
        body = "This is number {} of {}, with a longer description that follows."
        rows = [
            (
                f"{split}.f{i}",
                pydocs.LIBRARIES[i % 10],
                f"{split}{i}(a, axis=None)",
                text,
                body.format(i, split),
            )
            for i, text in enumerate(TEXTS)
        ]
        columns = ["qualname", "library", "signature", "summary", "body"]
        return pd.DataFrame(rows[:limit], columns=columns).assign(kind="function", split=split)

    def text(self, split):
        for row in self.documents(split).itertuples():
            yield f"{row.signature}\n\n{row.summary}\n\n{row.body}"

    def content_hash(self, split):
        return f"hash of {split}"


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    monkeypatch.setattr(pydocs, "harvest", FakeCorpus)
    monkeypatch.setattr(pocket, "TRAINING", tmp_path / "runs")
    monkeypatch.setattr(pocket, "MODELS", tmp_path / "models")
    monkeypatch.setattr(pocket, "VOCABULARY", 400)
    monkeypatch.setattr(pocket, "WINDOW", 32)

    def build(kind, tok, *, seed=0):
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": True}
        return tiny(kind, "lm", vocab_size=len(tok), **ends).train()

    monkeypatch.setattr(pocket, "build", build)
    return tmp_path


@pytest.mark.parametrize("kind", pocket.KINDS)
def test_making_a_pocket_model_writes_a_folder_that_loads(kind, small_world, monkeypatch):
    monkeypatch.setattr(pocket, "PROMPTS", ("Return the",))
    arguments = [kind, "--steps", "5", "--batch-size", "2"]
    if kind == "t5":  # it begins with the embeddings of the LLaMA
        pocket.main(["llama", *arguments[1:]])
    pocket.main(arguments)
    folder = small_world / "models" / "pocket" / f"{kind}-pydocs"
    training = json.loads((folder / "training.json").read_text())
    assert training["phases"].keys() == ({"docs", "summary"} if kind == "t5" else {"docs"})
    last = training["phases"]["summary" if kind == "t5" else "docs"]["validation"][-1]
    assert last["bits_per_byte"] > 0 and training["data"]["train"] == "hash of train"
    assert training["validation"]["unigram"] > training["validation"]["bigram"] > 0
    assert (folder / "README.md").read_text() == model_card(folder.name, training)
    loaded = loading.load(folder)
    assert loaded.model.dtype == torch.float32 and loaded.tokenizer.eos_token == "</s>"
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(pocket, "fit", None)
    assert pocket.make(kind) == folder  # there already: nothing is trained again
    pytest.raises(BadSetting, pocket.main, arguments).match("there already")
    assert (folder / "model.safetensors").read_bytes() == before


def test_t5_begins_with_the_embeddings_of_the_llama(small_world):
    pocket.main(["llama", "--steps", "1", "--batch-size", "2"])
    decoder = publishing.load(pocket.folder_of("llama"))
    model = tiny("t5", "lm", vocab_size=decoder.config.vocab_size, tie_word_embeddings=True)
    pocket.start_from_decoder(model, pocket.folder_of("llama"))
    assert torch.equal(model.lm_head.weight, decoder.lm_head.weight)
    gain = model.decoder.final_layer_norm.weight / decoder.model.norm.weight
    assert torch.allclose(gain, torch.full_like(gain, math.sqrt(32)))


def test_watched_bits_per_byte_agree_with_the_tasks_own(small_world):
    """One window that holds all: both code the same targets, but for the first token."""
    pocket.main(["llama", "--steps", "1", "--batch-size", "2"])
    folder = small_world / "models" / "pocket" / "llama-pydocs"
    training = json.loads((folder / "training.json").read_text())
    watched = training["phases"]["docs"]["validation"][-1]["bits_per_byte"]
    assert watched == pytest.approx(training["validation"]["model"], rel=0.1)


@pytest.fixture
def tiny_encoder(tmp_path):
    tok = data.train_tokenizer(TEXTS, vocab_size=400)
    folder = tmp_path / "base"
    tiny("bert", None, vocab_size=400).save_pretrained(folder)
    tok.save_pretrained(folder)
    rows = pd.DataFrame({"text": TEXTS, "label": ["many" if "twice" in t else "one" for t in TEXTS]})
    rows.iloc[::2].to_csv(tmp_path / "train.csv", index=False)
    rows.iloc[1::2].to_csv(tmp_path / "held_out.csv", index=False)
    return folder, tmp_path


def _finetune(tiny_encoder, monkeypatch, **changes):
    base, folder = tiny_encoder
    held_out, train = folder / "held_out.csv", folder / "train.csv"
    monkeypatch.setattr(encoder, "RUNS", folder / "runs")
    monkeypatch.setattr(
        encoder, "load_task", lambda name, split: load_task(held_out, split=split, train_path=train)
    )
    where = {"task_name": "own", "folder": folder / "made"}
    return encoder.finetune_encoder(
        str(base), **where, epochs=20, batch_size=4, learning_rate=3e-3, **changes
    )


def test_partial_checkpoint_holds_the_trained_tensors_only(tiny_encoder, monkeypatch):
    pytest.raises(BadSetting, _finetune, tiny_encoder, monkeypatch, last_blocks=3).match("2 blocks")
    folder = _finetune(tiny_encoder, monkeypatch, last_blocks=1)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names and not any("embeddings" in name or "layer.0" in name for name in names)
    assert any("layer.1" in name for name in names) and any("classifier" in name for name in names)
    base, made = loading.load(tiny_encoder[0]), loading.load(folder)
    frozen = "encoder.layer.0.output.dense.weight"
    assert torch.equal(made.model.bert.get_parameter(frozen), base.model.get_parameter(frozen))
    assert type(made.model).__name__ == "BertForSequenceClassification"
    assert set(made.model.config.id2label.values()) == {"many", "one"}
    training = json.loads((folder / "training.json").read_text())
    assert (folder / "README.md").read_text() == encoder.encoder_card("made", training)


def test_whole_encoder_learns_and_is_not_trained_twice(tiny_encoder, monkeypatch):
    folder = _finetune(tiny_encoder, monkeypatch)
    training = json.loads((folder / "training.json").read_text())
    assert training["validation"]["accuracy"] > training["validation"]["majority"]
    assert loading.load(folder).model.num_labels == 2
    assert not list((tiny_encoder[1] / "runs" / "training").iterdir()), "its checkpoint is of no use any more"
    other = [_finetune(tiny_encoder, monkeypatch, **asked) for asked in ({"seed": 1}, {"last_blocks": 1})]
    assert len({folder, *other}) == 3 and {path.parent for path in other} == {folder.parent}
    monkeypatch.setattr(encoder, "fit", None)
    assert _finetune(tiny_encoder, monkeypatch) == folder
    assert _finetune(tiny_encoder, monkeypatch, seed=1) == other[0]


def test_the_best_epochs_weights_are_kept_as_they_are_stored(tiny_encoder, monkeypatch):
    folder = _finetune(tiny_encoder, monkeypatch, best_epoch=True, stored=torch.bfloat16)
    training = json.loads((folder / "training.json").read_text())
    losses = [entry["loss"] for entry in training["held_out_loss"]]
    assert len(losses) > 20 and training["stored"] == "bfloat16"
    loaded = loading.load(folder)
    task = load_task(tiny_encoder[1] / "held_out.csv", train_path=tiny_encoder[1] / "train.csv")
    held_out = task.training_features(loaded.tokenizer, subset="held-out", model=loaded.model, length=128)
    spec = encoder.TrainSpec(held_out, steps=1)
    assert validation_loss(loaded.model, held_out, spec=spec)["loss"] == pytest.approx(min(losses), abs=0.02)


COMMITTED = sorted(path.parent for path in paths.MODELS.glob("pocket/*/model.safetensors"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_model_is_what_its_card_says(folder):
    training = json.loads((folder / "training.json").read_text())
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(t.dtype == torch.bfloat16 and torch.isfinite(t).all() for t in tensors.values())
    card, scores = (folder / "README.md").read_text(), training["validation"]
    if folder.name.startswith("minilm"):
        note = encoders.note(folder.name.removeprefix("minilm-"))
        assert card == encoder.encoder_card(folder.name, training, note=note)
        assert scores["accuracy"] > 1.5 * scores["majority"]
        return
    assert card == model_card(folder.name, training)
    assert scores["model"] < scores["bigram"] < scores["unigram"]
    loaded = loading.load(folder)
    assert sum(p.numel() for p in loaded.model.parameters()) == training["parameters"]
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size
