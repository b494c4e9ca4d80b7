"""Sweeps and notebooks on a cluster of two local worker processes, one of which is killed on the way."""

import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from test_runner import write
from test_sweep import save_tiny, write_reviews

from helpers.run import execution, runner
from lmcompress.errors import BadSetting
from lmcompress.study import cluster

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the workers have their notebooks, as `$STUDY_HOME` of theirs."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def workers(home):
    """Two worker processes of one thread each; the package they import is the one under test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_HOME", str(home))
        patch.setenv("TMPDIR", str(home))
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(home / "dask")
        ) as found:
            yield found


def lines(run):
    return [json.loads(line) for line in (run / "rows" / "02_pruning.jsonl").read_bytes().splitlines()]


@pytest.mark.slow  # workers import torch, and one is killed
def test_a_sweep_whose_worker_is_killed_ends_with_every_row_once(tmp_path, workers):
    save_tiny(tmp_path / "model")
    write_reviews(tmp_path / "reviews.csv", 60, seed=1)
    run = tmp_path / "run"
    levels = [round(0.06 * i, 2) for i in range(1, 13)]
    settings = [{"technique": "magnitude-layer", "sparsity": level, "timed": False} for level in levels]
    described = {
        "study": {"notebook": "02_pruning", "profile": "test", "folder": str(run), "calls": 2},
        "subject": {"model": str(tmp_path / "model"), "task": str(tmp_path / "reviews.csv"), "timed": False},
        "cluster": workers.scheduler_address,
    }
    found, victim = [], workers.workers[0].pid
    sweep = threading.Thread(target=lambda: found.extend(cluster.sweep(settings, **described)))
    sweep.start()
    while not (run / "rows" / "02_pruning.jsonl").exists() or len(lines(run)) < 5:
        assert sweep.is_alive()
        time.sleep(0.01)
    os.kill(victim, signal.SIGKILL)
    sweep.join()
    assert [row["settings"]["sparsity"] for row in found] == levels
    assert len({row["key"] for row in lines(run)}) == len(lines(run)) == len(levels) + 1  # and the dense one
    timed = {"technique": "magnitude-layer", "sparsity": 0.5}
    with pytest.raises(BadSetting, match="sparsity"):
        cluster.sweep([timed | {"sparsity": 2.0}, *settings[:3], timed, timed], **described)
    again = cluster.sweep([*settings[:3], timed], **described)
    assert again[:3] == found[:3] and again[3]["latency"]["shapes"]["batch1"]["ratio"] > 0
    assert len(lines(run)) == len(levels) + 2
    assert not list(run.glob(".shared-*"))


BESIDE = """
import pathlib, time
here = pathlib.Path({folder!r})
(here / {own!r}).write_text("x")
until = time.monotonic() + 30
while not (here / {other!r}).exists():
    assert time.monotonic() < until, "it ran alone"
    time.sleep(0.05)
"""


@pytest.mark.slow  # starts kernels
def test_notebooks_run_beside_each_other_and_one_that_reads_rows_after_them(home, workers, monkeypatch):
    for name in ("notebooks", "profiles", "run"):
        (home / name).mkdir()
    folder, run = home / "notebooks", home / "run"
    for own, other in (("00_a", "01_b"), ("01_b", "00_a")):
        write(folder, f"{own}.ipynb", BESIDE.format(folder=str(run), own=own, other=other))
    write(folder, "02_bad.ipynb", "raise RuntimeError(f'the cause: {level}')")
    reading = f"assert __import__('os').path.exists({str(run / '00_a')!r})"
    write(folder, "11_reader.ipynb", reading, study={"reads_rows": True})
    (home / "profiles" / "pocket.yaml").write_text("profile: pocket\nlevel: 0.25\n")
    for name in ("NOTEBOOKS", "PROFILES", "MODELS", "DATA_RAW"):  # another test may be harvesting
        monkeypatch.setattr(runner, name, home / name.lower())
    said = []
    settings = {"run": run, "cluster": workers.scheduler_address, "say": said.append}
    pytest.raises(execution.NotebookFailed, runner.run_profile, "pocket", **settings).match("the cause: 0.25")
    assert set(json.loads((run / "state.json").read_text())) == {"00_a", "01_b"}
    (folder / "02_bad.ipynb").unlink()
    assert list(runner.run_profile("pocket", **settings)) == ["00_a", "01_b", "11_reader"]
    assert [text for text in said if "skipped" in text] and (run / "notebooks" / "11_reader.ipynb").exists()
    monkeypatch.setattr(execution, "file_hash", lambda path: "another")
    with pytest.raises(execution.NotebookFailed, match="not the notebook that was sent"):
        runner.run_profile("pocket", only=["00"], force=True, **settings)


def test_waves(tmp_path):
    for name, study in {"00_a": {}, "01_b": {}, "11_c": {"reads_rows": True}, "12_d": {}}.items():
        write(tmp_path, f"{name}.ipynb", "1", study=study)
    chosen = sorted(tmp_path.glob("*.ipynb"))
    stems = [[path.stem for path in wave] for wave in runner.waves(chosen, together=True)]
    assert stems == [["00_a", "01_b", "12_d"], ["11_c"]]
    one_by_one = [path.stem for (path,) in runner.waves(chosen, together=False)]
    assert one_by_one == ["00_a", "01_b", "12_d", "11_c"]


def test_a_cluster_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(cluster.ClusterProblem, match="no Dask scheduler answers at .*dask scheduler"):
            runner.run_profile("pocket", run=tmp_path, cluster=address)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(cluster.ClusterProblem, match="'.\\[cluster\\]'"):
        runner.run_profile("pocket", run=tmp_path, cluster="tcp://127.0.0.1:9")


def test_a_wrong_setting_is_refused_before_a_cluster_is_looked_for():
    described = {"cluster": "tcp://127.0.0.1:9", "study": {"notebook": "02_pruning"}, "subject": {}}
    with pytest.raises(BadSetting, match="wanda has no setting sparsty; it has sparsity, .*, timed"):
        cluster.sweep([{"technique": "wanda", "sparsty": 0.5, "timed": False}], **described)


def test_workers_that_do_not_share_folder_and_code_are_refused(tmp_path):
    mark = tmp_path / "mark"
    assert "does not see" in cluster._refusal(mark, cluster.code_hash())
    mark.touch()
    assert cluster._refusal(mark, cluster.code_hash()) is None
    assert "same commit" in cluster._refusal(mark, "another")
    pytest.raises(cluster.ClusterProblem, cluster._task, mark, "another", print).match("same commit")
    refused = {"tcp://a": "it does not see it", "tcp://b": None}
    client = SimpleNamespace(nthreads=lambda: {"tcp://a": 1, "tcp://b": 4}, run=lambda *a, **k: refused)
    with pytest.raises(
        cluster.ClusterProblem, match="- tcp://a: it does not see it\n- tcp://b: .*--nthreads 1"
    ):
        cluster._check(client, mark)
