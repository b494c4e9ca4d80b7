"""The same training in one process and in two: losses, weights, checkpoints, and what is refused."""

import json
import subprocess
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import Stopped, losses, stop_after
from tiny_models import VOCAB, tiny

from lmcompress.errors import BadSetting, StudyError
from lmcompress.train import TrainSpec, batches, fit
from lmcompress.train.launch import command, launch

SWITCHES = {"layer_decay": 0.8, "gradient_checkpointing": True, "weight_decay": 0.1, "clip": 0.5}


def texts(count=21, seed=0):
    """Of very different lengths, so that a mean of the processes' means would be another number."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCAB, 3 + 2 * (i % 11)).tolist() for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def spec(**changes):
    settings = {"steps": 7, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 1, "checkpoint_every": 3}
    held = {"evaluate": texts(5, 1), "evaluate_every": 3}
    return TrainSpec(**({"features": texts()} | settings | held | SWITCHES | changes))


@pytest.mark.slow  # starts torchrun and two processes
def test_two_processes_go_on_from_one_as_one_would_and_one_goes_on_from_two(tmp_path, monkeypatch):
    bare = [{"input_ids": [5, 7, 9, 8], "labels": [-100, -100, -100, 8 if i else -100]} for i in range(4)]
    settings = spec(features=texts() + bare, micro_batches=2)  # some pieces without targets, a last of one
    kept = replace(settings, checkpoint=tmp_path / "c")
    alone, together = tiny("llama"), tiny("llama")
    expected = fit(alone, settings)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        fit(tiny("llama"), kept)
    found = launch(together, kept, tmp_path / "job")
    assert losses(found)[:3] == losses(expected)[:3]
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    assert [s["tokens"] for s in found.steps] == [s["tokens"] for s in expected.steps]
    for one, other in zip(found.validation, expected.validation):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4) and one["targets"] == other["targets"]
    for (name, a), b in zip(together.named_parameters(), alone.parameters()):
        assert torch.allclose(a, b, atol=2e-3), name
    taken_up = tiny("llama")
    stop_after(monkeypatch, 0)  # it is finished: nothing may be trained
    assert losses(fit(taken_up, kept)) == losses(found)
    assert all(torch.equal(a, b) for a, b in zip(taken_up.parameters(), together.parameters()))


SHARDED = """
    import os, sys, json
    sys.path.insert(0, {tests!r})
    import torch
    from torch.distributed.tensor import DTensor
    from test_distributed import spec
    from tiny_models import tiny
    from lmcompress.errors import BadSetting
    from lmcompress.train import fit, parallel
    from lmcompress.train.lora import Lora
    parallel.start()
    rank, found = parallel.rank(), {{}}
    try:
        fit(tiny("llama"), spec(lora=Lora()))
    except BadSetting as error:
        found["lora"] = str(error)
    model = tiny("t5")
    name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    mask = torch.arange(48 * 32).view(48, 32) % 2
    torch.manual_seed(5)
    fit(model, spec(steps=2, hidden_dropout=0.1, attention_dropout=0.1, evaluate=None), masks={{name: mask}})
    found["dtensors"] = all(isinstance(p, DTensor) for p in model.parameters())
    found["local"] = sum(p.to_local().numel() for p in model.parameters())
    whole = parallel.state_dict(model)
    found["whole"] = sum(value.numel() for value in whole.values())
    found["masked"] = int(whole[name][mask == 0].count_nonzero())
    found["kept"] = int(whole[name][mask == 1].count_nonzero())
    open(os.path.join({folder!r}, f"{{rank}}.json"), "w").write(json.dumps(found))
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow  # starts torchrun and two processes
def test_parameters_are_sharded_and_masks_hold(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SHARDED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))))
    done = subprocess.run([*command(2), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for one in found:
        assert one["dtensors"] and "one" in one["lora"]
        assert one["masked"] == 0 and one["kept"] == 48 * 16
        assert 0.4 < one["local"] / one["whole"] < 0.6
    assert sum(one["local"] for one in found) == found[0]["whole"]


def test_pieces_of_all_processes_are_the_batch_and_every_process_has_as_many():
    batch = batches.collate(texts(7), pad_id=0)
    whole = batches.count_targets(batch, shifted=True)
    for count, ranks in ((1, 1), (3, 1), (1, 2), (2, 2), (2, 4)):
        shared = [
            list(batches.pieces(batch, count, shifted=True, rank=rank, ranks=ranks)) for rank in range(ranks)
        ]
        assert sum(targets for pieces in shared for _, targets in pieces) == whole
        if ranks > 1:
            assert {len(pieces) for pieces in shared} == {count}
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert not list(batches.pieces(empty, 2, shifted=True))
    (piece, targets), *_ = batches.pieces(empty, 2, shifted=True, rank=0, ranks=2)
    assert targets == 0 and (piece["labels"] >= 0).all() and len(piece["input_ids"]) == 1


def test_failing_process_says_why(tmp_path, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, stderr="BadSetting: no such thing")

    monkeypatch.setattr("lmcompress.train.launch.subprocess.run", run)
    pytest.raises(BadSetting, launch, tiny("llama"), spec(), tmp_path, processes=5).match("share 4")
    pytest.raises(StudyError, launch, tiny("llama"), spec(), tmp_path).match("no such thing")
