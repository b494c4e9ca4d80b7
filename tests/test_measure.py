"""The whole harness on tiny models, every part real; rows are checked against the store's schema."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmcompress import measure as measuring
from lmcompress import tasks
from lmcompress.measure import DenseMeasurement, Reuse, Shape, limiting_shape, measure, shape_signature
from lmcompress.models import storage
from lmcompress.results.store import RowStore
from lmcompress.stats import RatioOfSums
from tests.tiny_models import kind, tiny


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A made-up machine and a task of 40 examples; the fresh process is tested in test_measure_memory."""
    monkeypatch.setattr(
        measuring.compute.__globals__["device"],
        "ceiling",
        lambda *_, **__: {"gflops_per_s": 100.0, "bandwidth_gb_per_s": 10.0},
    )
    monkeypatch.setattr(
        measuring, "peak_memory", lambda *_, **__: {"peak_bytes": 5, "baseline_bytes": 1, "peak_kind": "rss"}
    )
    monkeypatch.setattr(tasks, "evaluate", fake_evaluate)


def fake_evaluate(model, tokenizer, task):
    ids = torch.arange(3, 43)[:, None]
    with torch.no_grad():
        predicted = model(input_ids=ids).logits.flatten(1).argmax(-1).numpy()
    columns = {"correct": (predicted == task.answers).astype(float)}
    return SimpleNamespace(
        task=task, columns=columns, metric="accuracy", value=columns["correct"].mean(), floor=0.1,
        collapsed=None, secondary={}, details={},
    )  # fmt: skip


def subject(family: str):
    model = tiny(family)
    with torch.no_grad():
        answers = model(input_ids=torch.arange(3, 43)[:, None]).logits.flatten(1).argmax(-1).numpy()
    task = SimpleNamespace(
        answers=answers, metric="accuracy", statistic=RatioOfSums("correct", None), secondary={},
        likelihood=None, block=1, higher_is_better=True,
    )  # fmt: skip
    return SimpleNamespace(
        model=model, kind=kind(family), tokenizer=None, dtype=torch.float32, file_bytes=None
    ), task


def shapes(family: str) -> list[Shape]:
    return [
        Shape(part, b, 8, 2)
        for b in (1, 2)
        for part in (["forward"] if kind(family) == "encoder" else ["prefill", "decode"])
    ]


def row(key: str, measured) -> dict:
    return {
        "key": key, "notebook": "02_pruning", "profile": "pocket", "task": "t", "model": "m", "family": "f",
        "technique": "x", "settings": {}, "seed": 0, "achieved": {}, **measured.row_parts(),
        "provenance": {
            "code": "0", "packages": {}, "machine": {}, "device": "cpu", "dtype": "float32", "threads": 1,
            "model_hash": "h", "data_hash": "d", "technique_version": 1,
            "measure_version": measuring.MEASURE_VERSION, "started": "2026-01-01T00:00:00+00:00",
            "wall_s": 1.0, "split": "test", "n_examples": 40, "scores": None,
        },
    }  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_baseline_then_variants_give_rows_that_the_store_accepts(family, tmp_path):
    dense, task = subject(family)
    store = RowStore(tmp_path / "rows")
    given = {"shapes": shapes(family), "calls": 3}
    folder = storage.save(dense.model, tmp_path / "dense")
    first = measure(dense.model, dense, task, folder=folder, **given)
    assert first.verdict["quality"] == first.verdict["size"] == "baseline"
    assert set(first.verdict["latency"].values()) == {"baseline"}
    assert first.quality["value"] == 1 and first.quality["difference"] is None
    baseline = row("0" * 16, first)
    store.append(baseline)

    compressed = copy.deepcopy(dense.model)
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.normal_()
    compressed.bfloat16()
    folder = storage.save(compressed, tmp_path / "half")
    second = measure(
        compressed, dense, task, baseline=DenseMeasurement(baseline, first.scores), folder=folder, **given
    )
    store.append(row("1" * 16, second))
    assert second.verdict["size"] == "smaller" and second.verdict["quality"] == "worse"
    assert second.quality["difference"]["value"] < -0.5 and second.quality["difference"]["n"] == 40
    assert second.latency["signature"] == shape_signature(compressed) != first.latency["signature"]
    assert second.latency["measured_on"] is None and second.memory["peak_bytes"] == 5
    assert list(second.latency["shapes"]) == [shape.name for shape in given["shapes"]]
    assert second.compute["shape"] == {"bert": "batch2", "llama": "decode_b1"}[family]
    assert 0 < second.compute["matmul_share"] < 1
    assert len(store.rows()) == 2


def test_a_row_of_the_same_shapes_lends_its_times_but_not_its_bytes(tmp_path, monkeypatch):
    dense, task = subject("bert")
    given = {"shapes": shapes("bert"), "calls": 2}
    folder = storage.save(dense.model, tmp_path / "dense")
    first = measure(dense.model, dense, task, folder=folder, **given)
    baseline = row("0" * 16, first)
    pruned = copy.deepcopy(dense.model)
    with torch.no_grad():
        pruned.bert.encoder.layer[0].output.dense.weight.zero_()
    folder = storage.save(pruned, tmp_path / "pruned")
    common = {"baseline": DenseMeasurement(baseline, first.scores), "folder": folder, **given}
    timed = row("1" * 16, measure(pruned, dense, task, **common))
    for name in ("latency", "peak_memory", "compute"):
        monkeypatch.setattr(measuring, name, lambda *_, **__: pytest.fail("measured again"))
    lent = measure(dense.model, dense, task, reuse=Reuse(timed), **common)
    assert lent.latency["shapes"] == timed["latency"]["shapes"] and lent.latency["measured_on"] == "1" * 16
    assert lent.compute == timed["compute"] and lent.memory["peak_bytes"] == 5
    assert lent.memory["formats"] == first.memory["formats"] != timed["memory"]["formats"]
    assert lent.verdict["size"] == "no change" and lent.quality["difference"]["value"] == 0
    again = measure(dense.model, dense, task, reuse=Reuse(row("2" * 16, lent)), **common)
    assert again.latency["measured_on"] == "1" * 16


def test_parts_left_out_are_null_and_accepted(tmp_path):
    dense, task = subject("bert")
    only = measure(dense.model, dense, task, parts=("quality",))
    assert only.latency is only.memory is only.compute is None
    assert only.verdict == {"quality": "baseline", "size": None, "latency": None}
    RowStore(tmp_path).append(row("0" * 16, only))
    assert set(only.scores) == {"correct"} and isinstance(only.scores["correct"], np.ndarray)
    weighed = measure(dense.model, dense, None, parts=("memory",))
    assert weighed.quality is None and weighed.memory["file_bytes"] is None and weighed.scores == {}


def test_the_shape_that_limits():
    assert limiting_shape([Shape("forward", 1), Shape("forward", 8)]).name == "batch8"
    assert limiting_shape([Shape("prefill", 8), Shape("decode", 8), Shape("decode", 1)]).name == "decode_b1"


def test_a_dense_model_counts_as_its_checkpoint_is_stored():
    """A bfloat16 file is computed in float32: its row says the file's bytes, and a cast halves nothing."""
    dense, _ = subject("bert")
    whole = measure(dense.model, dense, None, parts=("memory",)).memory
    dense.dtype, dense.file_bytes = torch.bfloat16, 12345
    given = measure(dense.model, dense, None, parts=("memory",)).memory
    assert given["file_bytes"] == 12345 and given["parameters"] == whole["parameters"]
    assert given["formats"]["dense"] < 0.6 * whole["formats"]["dense"]
    assert dense.model.dtype == torch.float32
