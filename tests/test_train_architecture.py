"""Training from scratch: curves, equal batches, resuming, and finished runs that nothing overwrites."""

import json

import numpy as np
import pytest
import torch

from lmcompress.compress import Context
from lmcompress.errors import BadSetting
from lmcompress.experiments import architecture as training
from lmcompress.experiments.architecture import step_times
from lmcompress.models import loading
from lmcompress.train import trainer
from lmcompress.train.pretraining import train_tokenizer
from tests.synthetic_mirror import sentences

TOKENS = 24 * 2 * 16


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A scale of 24 steps on made-up text, and its folder."""
    tiny = training.Scale(16, 2, 300, 16, 2, TOKENS, 1e-2, 10, layers=(1, 2))
    monkeypatch.setitem(training.SCALES, "tiny", tiny)
    folder, texts = tmp_path / "runs", sentences(200, seed=0)

    def tokenizer(scale, where):
        kept = where / "tokenizer"
        if not kept.exists():
            train_tokenizer(texts, vocab_size=300).save_pretrained(kept)
        return kept

    rows = [{"input_ids": row, "labels": row} for row in np.random.default_rng(0).integers(2, 290, (80, 16))]
    monkeypatch.setattr(training, "_tokenizer", tokenizer)
    monkeypatch.setattr(training, "_features", lambda *asked: (rows[:64], rows[64:]))
    return folder


def train(folder, **changed):
    settings = {"layers": 1, "phi": "shared", "scale": "tiny", "seed": 3, "folder": folder} | changed
    return training.train_architecture(settings.pop("layers"), settings.pop("phi"), **settings)


def weights(folder):
    return loading.load(folder).model.state_dict()


def test_a_run_leaves_a_model_its_tokenizer_and_its_curves(small, monkeypatch):
    kept = {}
    monkeypatch.setattr(training, "fit", lambda *a, **k: kept.setdefault("history", trainer.fit(*a, **k)))
    made = train(small)
    loaded, record = loading.load(made), training.read(made)
    assert (loaded.family, loaded.model.config.phi) == ("headwise-llama", "shared") and loaded.tokenizer
    losses = np.array([one["loss"] for one in kept["history"].steps]).reshape(-1, 4).mean(1)
    np.testing.assert_allclose([point[1] for point in record["curve"]], losses, atol=1e-5)
    assert len({one["lr"] for one in kept["history"].steps[2:]}) == 1, "constant after the warm-up"
    assert [point[0] for point in record["curve"]] == [4, 8, 12, 16, 20, 24]  # every four batches
    assert [point[3] for point in record["curve"]] == [4 * 32 * i for i in range(1, 7)]
    seconds = [point[2] for point in record["curve"]]
    assert seconds == sorted(seconds) and record["seconds"] == pytest.approx(seconds[-1], abs=1e-3)
    assert record["tokens"] == TOKENS and record["validation"][-1][0] == 24
    assert record["validation"][-1][1] < record["validation"][0][1]
    assert not (small / "checkpoints" / made.name).exists()


def test_a_stopped_run_goes_on_with_the_same_curve_and_weights(small, monkeypatch, tmp_path):
    whole = train(tmp_path / "whole")
    real, calls = trainer._update, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(trainer, "_update", stop)
    pytest.raises(KeyboardInterrupt, train, small)
    monkeypatch.setattr(trainer, "_update", real)
    again = train(small)
    losses = [[point[:2] for point in training.read(made)["curve"]] for made in (whole, again)]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, weights(whole).values(), weights(again).values()))


def test_a_finished_run_is_loaded_and_never_overwritten(small, monkeypatch):
    made = train(small)
    before = (made / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(training, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert train(small) == made
    pytest.raises(BadSetting, train, small, tokens=TOKENS // 2).match("not overwritten")
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_depths_and_kinds_of_a_seed_see_the_same_batches(small, monkeypatch):
    seen = []
    real = trainer._gradients
    monkeypatch.setattr(
        trainer, "_gradients", lambda m, b, s: (seen.append(b["input_ids"].clone()), real(m, b, s))[1]
    )
    for layers, phi in training.eight_models("tiny"):
        train(small, layers=layers, phi=phi)
    runs = [seen[24 * i : 24 * i + 24] for i in range(4)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
    train(small, seed=4)
    assert any(not torch.equal(a, b) for a, b in zip(runs[0], seen[-24:]))


def test_as_a_technique_it_gives_the_trained_model_and_its_curve(small):
    technique = training.as_technique(small)
    assert technique.needs == ("seed",) and set(technique.settings) == {"layers", "phi", "scale", "tokens"}
    base = loading.load(train(small, phi="none")).model
    model, report = technique(base, Context(seed=3), layers=2, phi="shared", scale="tiny", tokens=None)
    assert model.config.num_hidden_layers == 2 and report.achieved["validation"]
    json.dumps(report.as_dict(), allow_nan=False)


def test_steps_of_all_shapes_are_timed_in_turns(small):
    ticks = iter(range(10**6))
    shapes = [(1, "none"), (1, "shared"), (2, "linear")]
    found = step_times(shapes, scale="tiny", calls=3, clock=lambda: next(ticks))
    assert [(one["layers"], one["phi"]) for one in found["shapes"]] == shapes and found["batch"] == 2
    assert all(one["ratio"] == 1 and one["median_ms"] == 1000 for one in found["shapes"])  # a tick each
    json.dumps(found, allow_nan=False)


def test_the_linear_control_is_phi_without_its_nonlinearity(small):
    model, shared = (loading.load(train(small, phi=phi)).model for phi in ("linear", "shared"))
    assert model.config.phi_activation == "linear" and shared.config.phi_activation == "silu"
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in shared.parameters())
    phi, z = model.model.layers[0].self_attn.phi, torch.randn(2, 3, 2, 8)
    with torch.no_grad():
        torch.testing.assert_close(phi(2 * z) - phi(z), z @ phi.weight.T)


def test_eight_models_and_unknown_scales():
    shapes = training.eight_models("full")
    assert len(shapes) == 8 and {config.intermediate_size for config in shapes.values()} == {2752}
    assert shapes[5, "none"].initializer_range == pytest.approx(0.02)
    pytest.raises(BadSetting, training.config_of, "huge", 5, "none").match("pocket, middle, full")
