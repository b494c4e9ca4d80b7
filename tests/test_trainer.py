"""The training loop: resuming, masks, schedule, what counts in the loss, and what it refuses."""

import errno
import hashlib
import math
import multiprocessing
import os
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import event_file_writer
from tiny_models import tiny
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from lmcompress import paths
from lmcompress.errors import BadData, BadSetting, BadWeights, CorruptCheckpoint, DiskFull, NotWritable
from lmcompress.train import TrainSpec, batches, checkpoint, fit, trainer

VOCABULARY = 60


def llama(seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, attention_dropout=0.2, tie_word_embeddings=True, **sizes, **ids, **settings
        )
    )


def texts(count=40, seed=0, shortest=4, longest=18):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(2, VOCABULARY, rng.integers(shortest, longest)).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def spec(**changes):
    settings = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 3, "checkpoint_every": 4}
    return TrainSpec(
        **({"features": texts()} | settings | {"evaluate": texts(6, 1), "evaluate_every": 5} | changes)
    )


def losses(history):
    return [record["loss"] for record in history.steps]


class Stopped(Exception):
    pass


def stop_after(monkeypatch, steps):
    """Make the loop die as it begins step `steps` + 1."""
    real, seen = trainer._gradients, []

    def step(*arguments):
        if len(seen) == steps:
            raise Stopped
        seen.append(1)
        return real(*arguments)

    monkeypatch.setattr(trainer, "_gradients", step)


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch):
    straight = llama()
    expected = fit(straight, spec())
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 7)  # past the checkpoint at 4, so steps 5 to 7 are done twice
        fit(llama(), spec(checkpoint=tmp_path))
    resumed = llama()
    history = fit(resumed, spec(checkpoint=tmp_path))
    assert losses(history) == losses(expected)
    assert history.validation == expected.validation
    assert [r["lr"] for r in history.steps] == [r["lr"] for r in expected.steps]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert sorted(content(tmp_path)) == ["state.json", "step-00000012.safetensors"]
    stop_after(monkeypatch, 0)  # it is finished: nothing is trained again
    again = llama()
    assert losses(fit(again, spec(checkpoint=tmp_path))) == losses(expected)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), straight.parameters()))


@pytest.mark.parametrize("shifted", [True, False])
def test_smoothed_loss_is_spread_over_all_classes_and_validation_is_not(shifted):
    """(1 - ε) times the target's negative log-probability, ε times the mean of all classes'."""
    rows = torch.tensor(texts(2, shortest=9, longest=10)[0]["input_ids"])[None]
    model = tiny("llama" if shifted else "t5", vocab_size=VOCABULARY)
    batch = {"input_ids": rows, "labels": torch.cat([rows[:, :-1], torch.tensor([[-100]])], dim=1)}
    with torch.no_grad():
        logits = model(**batch).logits
    logits, labels = (logits[:, :-1], batch["labels"][:, 1:]) if shifted else (logits, batch["labels"])
    wanted = [
        -0.9 * one[label] - 0.1 * one.mean()
        for one, label in zip(logits[0].log_softmax(-1), labels[0].tolist())
        if label >= 0
    ]
    settings = spec(label_smoothing=0.1)
    found = trainer._loss(model, batch, settings, smoothing=0.1)
    torch.testing.assert_close(found, torch.stack(wanted).mean())
    assert found.item() != pytest.approx(trainer._loss(model, batch, settings).item(), rel=1e-3)
    watched = [{"input_ids": rows[0].tolist(), "labels": batch["labels"][0].tolist()}]
    assert trainer.validation_loss(model, watched, spec=settings)["loss"] == pytest.approx(
        model(**batch).loss.item(), rel=1e-5
    )


def test_checkpoints_older_than_smoothing_and_compiling_are_still_known():
    parameters, later = {"w": torch.zeros(2)}, {"label_smoothing", "compile"}
    plain, smoothed, compiled = (
        checkpoint.fingerprint(parameters, spec(**changed), {})
        for changed in ({}, {"label_smoothing": 0.1}, {"compile": True})
    )
    digest = hashlib.sha256()
    for name, value in vars(spec()).items():
        if name in {"checkpoint", "checkpoint_every", "log_dir", "micro_batches", "replace_other"} | later:
            continue
        digest.update(name.encode())
        if name in ("features", "evaluate"):
            for feature in value:
                for key in sorted(feature):
                    digest.update(key.encode() + np.asarray(feature[key], dtype=np.float64).tobytes())
        else:
            digest.update(repr(value).encode())
    digest.update(b"w(2,)torch.float32" + bytes(8))
    assert plain == digest.hexdigest()[:16]
    assert len({plain, smoothed, compiled}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"label_smoothing": 0.1},
        {"learning_rate": 2e-2},
        {"steps": 5},
        {"seed": 1},
        {"features": texts(40, 9)},
        {"dtype": torch.bfloat16},
        {"first": 5},
        {"masks": {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}},
    ],
)
def test_another_runs_checkpoint_is_never_overwritten(held, change):
    before = content(held)
    masks, model = change.pop("masks", None), llama(seed=change.pop("first", 0))
    with pytest.raises(BadSetting, match="other settings"):
        fit(model, replace(spec(checkpoint=held, steps=4, warmup_steps=1), **change), masks=masks)
    assert content(held) == before


@pytest.fixture
def held(tmp_path):
    """A folder with the checkpoint of step 4, and its files' bytes."""
    fit(llama(), spec(checkpoint=tmp_path, steps=4, warmup_steps=1))
    return tmp_path


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("write", ["save_file", "write_text"])
def test_full_disk_is_named_and_the_checkpoint_before_stays(held, monkeypatch, write):
    expected = fit(llama(), spec(checkpoint=None))

    def full(*arguments, **settings):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint if write == "save_file" else paths.Path, write, full)
        pytest.raises(DiskFull, fit, llama(), spec(checkpoint=held / "run")).match("no space left")
    whole = fit(llama(), spec(checkpoint=held / "run"))
    assert losses(whole) == losses(expected) and not list((held / "run").glob(".*"))


@pytest.mark.parametrize("size", [0, 1, 300, -1])
def test_a_state_that_is_empty_or_cut_is_read_from_the_tensor_file(tmp_path, monkeypatch, size):
    expected = fit(llama(), spec())
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 7)
        fit(llama(), spec(checkpoint=tmp_path))
    state = tmp_path / "state.json"
    state.write_bytes(state.read_bytes()[:size])
    stop_after(monkeypatch, 8)  # of twelve steps four are done
    assert losses(fit(llama(), spec(checkpoint=tmp_path))) == losses(expected)


@pytest.mark.parametrize("file", ["state.json", "step-00000004.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"[" * 100_000, b"\xff"])
def test_a_checkpoint_that_cannot_be_read_is_refused_or_begun_anew(held, file, content):
    if file == "state.json":
        save_file({"x": torch.zeros(1)}, held / "step-00000004.safetensors")  # it tells no state either
    (held / file).write_bytes(content)
    (held / "notes.txt").write_text("of the user's")
    settings = spec(checkpoint=held, steps=4, warmup_steps=1)
    pytest.raises(CorruptCheckpoint, fit, llama(), settings).match(f"{held} cannot be read.*Delete")
    assert losses(fit(llama(), replace(settings, replace_other=True))) == losses(
        fit(llama(), replace(settings, checkpoint=None))
    )
    assert (held / "notes.txt").exists()


def test_missing_tensor_file_is_named(held):
    again = spec(checkpoint=held, steps=4, warmup_steps=1, checkpoint_every=5)
    assert len(fit(llama(), again).steps) == 4, "how often checkpoints are written is not another run"
    next(held.glob("*.safetensors")).unlink()
    with pytest.raises(CorruptCheckpoint, match=str(held)):
        fit(llama(), spec(checkpoint=held, steps=4, warmup_steps=1))


def train_to_be_killed(folder):
    fit(llama(), spec(steps=40, checkpoint=folder, checkpoint_every=1, evaluate=None))


@pytest.mark.slow  # starts Python: a real kill needs a real process
def test_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11's server looks nowhere else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that torch is imported once for all
    for wait_s in (0.0, 0.031, 0.077):
        process = context.Process(target=train_to_be_killed, args=(tmp_path,))
        before = set(tmp_path.glob("step-*"))
        process.start()
        while process.is_alive() and set(tmp_path.glob("step-*")) == before:
            time.sleep(0.002)
        time.sleep(wait_s)
        process.kill()
        process.join()
    settings = spec(steps=40, checkpoint_every=1, evaluate=None)
    assert losses(fit(llama(), replace(settings, checkpoint=tmp_path))) == losses(fit(llama(), settings))


def test_masked_weights_do_not_count_in_the_clipped_norm():
    """Clipping must see only the gradients of what is not hidden; Adam forgives a wrong norm for one step."""
    name, settings = "model.layers.0.mlp.down_proj.weight", spec(steps=3, warmup_steps=0, clip=1e-3)
    model, twin = llama(), llama()
    fit(model, settings, masks={name: torch.zeros(32, 48)})
    twin.get_parameter(name).data.zero_()
    twin.get_parameter(name).requires_grad_(False)
    fit(twin, settings)
    for (key, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(a, b, rtol=0, atol=1e-6), key


@pytest.mark.parametrize("mask", [{"no.such": torch.ones(2)}, {"model.norm.weight": torch.ones(3)}])
def test_mask_that_fits_nothing_is_refused(mask):
    pytest.raises(BadSetting, fit, llama(), spec(), masks=mask).match("fits nothing")


def test_schedule_is_warm_up_then_cosine_to_the_minimum():
    history = fit(llama(), spec(steps=20, warmup_steps=5, learning_rate=1e-3, min_learning_rate=1e-4))
    for record in history.steps:
        done = record["step"] - 1  # the first update is made with the rate of step 0
        if done < 5:
            expected = 1e-3 * done / 5
        else:
            expected = 1e-4 + (1e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (done - 5) / 15))
        assert record["lr"] == pytest.approx(expected, rel=1e-9)


def test_loss_is_the_mean_over_targets_without_padding():
    """Against cross-entropy summed one text at a time, where nothing needs padding."""
    model, features = llama().eval(), texts(10)
    total = count = 0
    for feature in features:
        ids = torch.tensor(feature["input_ids"])
        logits = model(ids[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
        count += len(ids) - 1
    found = trainer.validation_loss(model, features, spec=spec(batch_size=4))
    assert found["targets"] == count
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_cutting_a_step_into_pieces_changes_nothing(pieces):
    whole, cut = llama(attention_bias=False), llama(attention_bias=False)
    whole.config.attention_dropout = cut.config.attention_dropout = 0.0
    for model in (whole, cut):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
    a = fit(whole, spec(warmup_steps=0, steps=4))
    b = fit(cut, spec(warmup_steps=0, steps=4, micro_batches=pieces))
    assert losses(b) == pytest.approx(losses(a), abs=1e-5)
    for p, q in zip(whole.parameters(), cut.parameters()):
        assert torch.allclose(p, q, atol=1e-4)


def test_adamw_step_by_hand_without_decay_on_vectors():
    """First step of AdamW: every weight moves by lr · sign(g); matrices are first shrunk by lr · decay."""
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, spec(steps=1, warmup_steps=0, learning_rate=1e-2, weight_decay=0.5, clip=1e9))
    for name, parameter in model.named_parameters():
        decayed = before[name] * (1 - 1e-2 * 0.5) if parameter.ndim >= 2 else before[name]
        moved = (parameter.detach() - decayed).abs()
        assert moved.max() <= 1e-2 * (1 + 1e-4), name
        assert moved.median().item() == pytest.approx(1e-2, rel=1e-2) or "embed" in name, name


@pytest.mark.parametrize("family, head", [("bert", "classification"), ("t5", "lm"), ("gpt2", "lm")])
def test_training_learns_classification_seq2seq_and_gpt2(family, head):
    rows = [feature["input_ids"] for feature in texts()]
    features = {
        "bert": [{"input_ids": row + [2 + i % 2], "labels": i % 2} for i, row in enumerate(rows)],
        "t5": [{"input_ids": row, "labels": row[:3]} for row in rows],
        "gpt2": [{"input_ids": (row := list(range(2, 12 + i % 5))), "labels": row} for i in range(20)],
    }[family]
    drawn = tiny(family, head, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    model = type(drawn)(drawn.config)  # as its constructor draws it
    history = fit(model, spec(features=features, steps=60, learning_rate=5e-3, evaluate=features))
    assert history.validation[-1]["loss"] < 0.75 * history.validation[0]["loss"]


def test_bf16_autocast_leaves_the_weights_in_fp32():
    model = llama()
    history, exact = fit(model, spec(steps=3, dtype=torch.bfloat16)), fit(llama(), spec(steps=3))
    assert model.dtype == torch.float32
    assert losses(history)[0] == pytest.approx(losses(exact)[0], rel=2e-2)
    assert losses(history) != losses(exact)


def test_callers_random_numbers_are_left_alone():
    model = llama()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    fit(model, spec(steps=3))
    assert torch.equal(torch.rand(3), expected)


def test_curves_are_logged_once_a_step_over_resumptions(tmp_path, monkeypatch):
    settings = spec(checkpoint=tmp_path / "c", log_dir=tmp_path / "log", evaluate_every=4)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 7)  # steps 5 to 7 are made, and logged, twice
        fit(llama(), settings)
    history = fit(llama(), settings)
    curves = EventAccumulator(str(tmp_path / "log"))
    curves.Reload()
    logged = {
        name: [(event.step, event.value) for event in curves.Scalars(name)]
        for name in curves.Tags()["scalars"]
    }
    assert logged["train/loss"] == [(step["step"], pytest.approx(step["loss"])) for step in history.steps]
    assert [step for step, _ in logged["validation/loss"]] == [4, 8, 12]


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, DiskFull), (errno.EACCES, NotWritable)])
@pytest.mark.parametrize("call", ["write_event", "flush", "__init__"])
def test_curves_that_cannot_be_written_are_an_error_with_their_folder(
    tmp_path, monkeypatch, call, code, error
):
    def refuse(*_):
        raise OSError(code, "no")

    monkeypatch.setattr(event_file_writer.EventsWriter, call, refuse)
    with pytest.raises(error, match=str(tmp_path / "log")):
        fit(llama(), spec(steps=2, warmup_steps=0, log_dir=tmp_path / "log"))


@pytest.mark.parametrize("pad_id", [None, -1, 999])
def test_a_padding_id_that_is_no_token_changes_nothing(pad_id):
    expected, model = fit(llama(), spec(steps=2, warmup_steps=0)), llama()
    model.config.pad_token_id = pad_id
    assert losses(fit(model, spec(steps=2, warmup_steps=0))) == losses(expected)


def test_frozen_parameters_stay():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    fit(model, spec(steps=4))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_nan_loss_is_named():
    broken = llama()
    broken.model.norm.weight.data.fill_(float("nan"))
    pytest.raises(BadWeights, fit, broken, spec()).match("step 1")


@pytest.mark.parametrize("features", [[], [{"input_ids": [], "labels": []}], [{"input_ids": [1, 2]}]])
def test_features_that_teach_nothing_are_refused(features):
    pytest.raises(BadData, fit, llama(), spec(features=features))


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("learning_rate", 0.0), ("warmup_steps", 13), ("min_learning_rate", 1.0)]
    + [("micro_batches", 9), ("layer_decay", 0.0), ("attention", "fast"), ("hidden_dropout", 1.0)]
    + [("attention_dropout", -0.1)],
)
def test_settings_out_of_range_are_refused(name, value):
    pytest.raises(BadSetting, spec, **{name: value}).match(name)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_example_is_seen_once_an_epoch(lengths, batch_size, seed):
    order = batches.grouped_order(np.array(lengths), batch_size, seed=seed, epoch=0)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(lengths)))
    assert max(map(len, order)) <= batch_size


def test_batches_hold_similar_lengths_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 500, 4000)
    order = batches.grouped_order(lengths, 8, seed=0, epoch=0)
    spread = np.mean([np.ptp(lengths[batch]) for batch in order])
    assert spread < 20 < np.mean([np.ptp(batch) for batch in lengths.reshape(-1, 8)])
    means = np.array([lengths[batch].mean() for batch in order])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2
    assert not np.array_equal(order[0], batches.grouped_order(lengths, 8, seed=0, epoch=1)[0])


@given(start=st.integers(0, 23))
def test_stream_begins_anywhere(start):
    features = texts(30)
    whole = batches.batch_stream(features, 4, pad_id=0, seed=1)
    for _ in range(start):
        next(whole)
    resumed = batches.batch_stream(features, 4, pad_id=0, seed=1, start=start)
    for _ in range(3):
        assert torch.equal(next(whole)["input_ids"], next(resumed)["input_ids"])


def test_collate_pads_and_masks():
    batch = batches.collate(
        [{"input_ids": [5, 6, 7], "labels": [6, 7]}, {"input_ids": [8], "labels": [9]}], pad_id=3
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["labels"].tolist() == [[6, 7], [9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in batches.collate([{"input_ids": [5], "labels": 1.5}], pad_id=3)
    assert batches.collate([{"input_ids": [5], "labels": 1.5}], pad_id=3)["labels"].dtype == torch.float32


def test_a_curve_keeps_means_and_every_validation():
    steps = [
        {"step": i, "loss": float(i), "lr": 0.1, "seconds": i / 10, "tokens": 7 * i} for i in range(1, 101)
    ]
    history = trainer.History(steps, [{"step": 50, "loss": 2.0, "targets": 3, "divergence": 0.5}])
    found = trainer.curve(history, points=4)
    assert found["train"] == [[25, 13.0], [50, 38.0], [75, 63.0], [100, 88.0]]
    assert found["validation"] == [[50, 2.0]] and found["divergence"] == [[50, 0.5]]
    assert (found["seconds"], found["tokens"]) == (10.0, 700)
    assert len(trainer.curve(trainer.History(steps[:3]))["train"]) == 3
