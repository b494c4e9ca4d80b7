"""The published shape and its command; switches, longer texts and the shortest way in."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from scipy.stats import norm
from tiny_models import VOCAB, inputs, reloaded, tiny
from transformers import LlamaForCausalLM

from lmcompress.errors import BadSetting
from lmcompress.experiments import ablation, context_length
from lmcompress.experiments import sheared_training as published
from lmcompress.models import storage
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.study import quick
from lmcompress.train import TrainSpec, launch
from lmcompress.train.pretraining import train_tokenizer
from lmcompress.train.recovery import Recovery
from tests.synthetic_mirror import sentences


def spec(**changes):
    rows = np.random.default_rng(0).integers(3, VOCAB, (12, 10)).tolist()
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1}
    return TrainSpec(
        **({"features": [{"input_ids": row, "labels": row} for row in rows]} | settings | changes)
    )


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(sentences(300, seed=0)))
    return file


def test_the_published_shape_has_the_published_parameters():
    with init_empty_weights():
        model = LlamaForCausalLM(published.config_of("full"))
    assert count_parameters(model) == 1_345_423_360
    assert {p.device.type for p in model.parameters()} == {"meta"}
    table, block = 32_000 * 2048, 4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048
    assert count_parameters(model) == 2 * table + 24 * block + 2048
    pytest.raises(BadSetting, published.config_of, "half").match("full, tiny")


def test_the_command_trains_goes_on_and_begins_with_a_given_model(tmp_path, text, monkeypatch):
    folder = tmp_path / "run"
    published.main(["--scale", "tiny", "--folder", str(folder), "--text", str(text)])
    history = json.loads((folder / "history.json").read_text())
    assert [step["step"] for step in history["steps"]] == [1, 2, 3, 4, 5, 6]
    assert history["steps"][0]["tokens"] == 8 * 32 and history["validation"]
    trained, tokenizer = storage.load(folder / "trained")
    assert trained.config.hidden_size == 32 and tokenizer("a sentence")["input_ids"]
    again = published.train("tiny", folder, text=text)
    assert [s["loss"] for s in asdict(again)["steps"]] == [s["loss"] for s in history["steps"]], (
        "it was finished"
    )
    seen = []
    monkeypatch.setattr(published, "fit", lambda model, spec: (seen.append((model, spec)), again)[1])
    published.train("tiny", tmp_path / "other", text=text, start=folder / "trained", steps=3)
    ((model, run),) = seen
    assert torch.equal(model.model.norm.weight, trained.model.norm.weight)
    assert run.steps == 3 and run.clip == 1.0 and run.micro_batches == 4 and run.dtype == torch.bfloat16


def test_full_scale_takes_the_published_recipe(tmp_path, monkeypatch, text):
    seen = []
    monkeypatch.setitem(published.SHAPES, "full", published.SHAPES["tiny"])
    monkeypatch.setattr(published, "fit", lambda model, spec: seen.append(spec))
    monkeypatch.setattr(published.launch, "keep", lambda *a, **k: None)
    published.train("full", tmp_path, text=text)
    found = {name: getattr(seen[0], name) for name in published.published()}
    assert found == published.published() and seen[0].gradient_checkpointing


@pytest.mark.slow  # starts torchrun and two processes
def test_the_command_trains_in_two_processes_as_in_one(tmp_path, text):
    command = [*launch.command(2), "-m", published.__name__]
    settings = ["--scale", "tiny", "--text", str(text), "--folder"]
    published.main([*settings, str(tmp_path / "1")])
    run = subprocess.run([*command, *settings, str(tmp_path / "2")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    losses = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        steps = json.loads((folder / "history.json").read_text())["steps"]
        losses.append([step["loss"] for step in steps])
        assert steps[-1]["tokens"] == 6 * 8 * 32
        model, _ = storage.load(folder / "trained")
        assert all(p.isfinite().all() for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # dropout differs from process to process


def test_every_switch_changes_what_it_says_and_trains():
    model = tiny("llama", tie_word_embeddings=True)
    for switch in ablation.SWITCHES:
        changed, fields = ablation.with_switch(model, spec(), switch)
        assert fields or changed is not model or switch == ablation.SHARDED, switch
    ids = inputs(model)["input_ids"]
    gelu, _ = ablation.with_switch(model, spec(), "GELU")
    mlp = gelu.model.layers[0].mlp
    x = torch.randn(1, 3, 32)
    by_hand = mlp.gate_proj(x) * torch.tensor(
        norm.cdf(mlp.gate_proj(x).detach().numpy()), dtype=torch.float32
    )
    assert torch.allclose(mlp(x), mlp.down_proj(by_hand * mlp.up_proj(x)), atol=1e-4)
    assert model.config.hidden_act == "silu" and not torch.allclose(
        model(ids).logits, gelu(ids).logits, atol=1e-2
    )
    assert ablation.with_switch(model, spec(), "constant rate")[1] == {"min_learning_rate": 1e-3}
    pytest.raises(BadSetting, ablation.with_switch, model, spec(), "faster").match("QLoRA")


def test_normed_embeddings_by_hand_stay_tied_and_reload(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    normed, _ = ablation.with_switch(model, spec(), "norm on embeddings")
    table = normed.model.embed_tokens
    rows = table(torch.tensor([5, 7]))
    assert torch.allclose(rows.square().mean(1).sqrt(), table.gain.mean().expand(2), rtol=1e-3)
    assert torch.allclose(
        rows / rows.norm(dim=1, keepdim=True), torch.nn.functional.normalize(table.weight[[5, 7]])
    )
    assert normed.lm_head.weight is table.weight
    assert count_parameters(normed) == count_parameters(model) + 32 and anatomy(normed).hidden_size == 32
    reloaded(normed, tmp_path / "m")


def test_a_switched_run_says_what_it_cost(monkeypatch):
    """In this process: what two sharded ones train is tested by `launch`, which starts them."""
    commands = []

    def here(command, **_):
        commands.append(command)
        monkeypatch.setattr(sys, "argv", command[-2:])
        with contextlib.redirect_stdout(io.StringIO()) as text:
            ablation.main()
        return subprocess.CompletedProcess(command, 0, stdout=text.getvalue())

    monkeypatch.setattr(launch.subprocess, "run", here)
    costs = [ablation.switched(tiny("llama"), spec(), switch) for switch in ("baseline", ablation.SHARDED)]
    assert [cost["tokens"] for cost in costs] == [3 * 4 * 10] * 2 and costs[0]["loss"] == costs[1]["loss"]
    assert costs[0]["peak_bytes"] > 1e6 and costs[0]["tokens_per_s"] > 0 and costs[0]["step_ms"] > 0
    assert commands[0][1:3] == ["-m", ablation.__name__] and "--nproc-per-node" not in commands[0]
    assert commands[1][commands[1].index("--nproc-per-node") + 1] == "2"


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A tiny LLaMA with a tokenizer, in a folder, and a task to read."""
    from lmcompress.tasks.language_modelling import LanguageModelling

    texts = sentences(60, seed=0)
    tokenizer = train_tokenizer(texts, vocab_size=400)
    folder = tmp_path / "m"
    tiny("llama", vocab_size=400, max_position_embeddings=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    others = [{"text": one, "document": i} for i, one in enumerate(sentences(60, seed=1))]

    def task(name, *, limit=None, **settings):
        examples = [{"text": one, "document": i} for i, one in enumerate(texts[:limit])]
        fixed = {"split": "test", "source": "x", "training": lambda _: others, "training_source": "x"}
        return LanguageModelling(name=name, examples=examples, **fixed, **settings)

    monkeypatch.setattr(context_length, "load_task", task)
    return folder


def test_windows_longer_than_training_are_read_with_and_without_stretching(reader):
    found = context_length.context_lengths(reader, "x", trained=16, factors=[1, 2, 4])
    places = {(one["window"], one["kind"], one["stretch"]): one for one in found}
    assert len(places) == len(found) == 3 + 2 * 3 * 2
    assert places[16, "dynamic", 2]["value"] == pytest.approx(places[16, "none", 1]["value"], rel=1e-4)
    assert places[16, "linear", 2]["value"] != pytest.approx(places[16, "none", 1]["value"], rel=1e-4)
    assert all((one["difference"] is None) == (one["kind"] == "none") for one in found)
    one = places[32, "yarn", 2]
    gap = one["value"] - places[32, "none", 1]["value"]
    assert one["difference"]["value"] == pytest.approx(gap, rel=1e-6)
    assert one["low"] <= one["value"] <= one["high"]


def test_load_train_generate(reader):
    loaded = quick.load(reader)
    before = loaded.model.model.norm.weight.clone()
    history = quick.train(
        loaded, context_length.load_task("x", window=16), steps=3, batch_size=2, learning_rate=1e-2
    )
    assert len(history.steps) == 3 and not torch.equal(before, loaded.model.model.norm.weight)
    text = quick.generate(loaded, "a", tokens=5)
    ids = loaded.tokenizer("a", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        first = loaded.model(ids).logits[0, -1].argmax()
    assert text.startswith(loaded.tokenizer.decode(first, skip_special_tokens=True))
    assert text == quick.generate(loaded, "a", tokens=5) and Recovery(3).steps == 3
    with pytest.raises(BadSetting, match="its own teacher. To distil"):
        quick.train(loaded, context_length.load_task("x", window=16), steps=3, teacher=True)
