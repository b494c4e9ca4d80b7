import subprocess

import pytest
import torch

from lmcompress.errors import StudyError
from lmcompress.measure.calls import Shape
from lmcompress.measure.memory import memory, peak_memory
from lmcompress.measure.peak import peak_rss_bytes
from lmcompress.models import storage
from tests.tiny_models import tiny


def test_parameters_count_once_and_zeros_show(tmp_path):
    model = tiny("gpt2")
    by_hand = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    before = memory(model, None)["nonzero_parameters"]
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, :5] = 0.0
        model.transformer.h[0].mlp.c_fc.weight[0, 5] = -0.0
    folder = storage.save(model, tmp_path / "saved")
    found = memory(model, folder)
    assert found["parameters"] == by_hand
    assert found["nonzero_parameters"] == before - 5 * 32 - 1
    assert found["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["formats"]["dense"] == 4 * by_hand
    assert found["peak_bytes"] is None


@pytest.mark.slow
def test_peak_of_a_fresh_process_sees_the_model_and_not_its_parent(tmp_path):
    """Slow: two starts of torch and transformers. 77 MB more weights must show, this process's 1.2 GB must
    not.
    """
    shape = Shape("forward", 1, 8)
    small = storage.save(tiny("bert", None), tmp_path / "small")
    large = storage.save(tiny("bert", None, intermediate_size=150_000), tmp_path / "large")
    weight_bytes = 2 * 2 * 150_000 * 32 * 4
    ballast = torch.ones(300_000_000)
    least, more = (peak_memory(folder, kind="encoder", shape=shape) for folder in (small, large))
    assert peak_rss_bytes() > 4 * len(ballast)
    assert least["peak_kind"] == "rss"
    assert 50e6 < least["baseline_bytes"] <= least["peak_bytes"] < 2 * len(ballast)
    assert 0.8 * weight_bytes < more["peak_bytes"] - least["peak_bytes"] < 3 * weight_bytes


@pytest.mark.slow  # starts torch and transformers
def test_a_failing_process_says_why(tmp_path):
    (tmp_path / "compression.json").write_text("{broken")
    with pytest.raises(StudyError, match=r"compression\.json is damaged"):
        peak_memory(tmp_path, kind="encoder", shape=Shape("forward", 1))


def test_a_process_ended_for_want_of_memory_says_what_to_do(monkeypatch, tmp_path):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="a warning of a library")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(StudyError, match="signal 9.*memory runs out.*timed=False"):
        peak_memory(tmp_path, kind="encoder", shape=Shape("forward", 1))
