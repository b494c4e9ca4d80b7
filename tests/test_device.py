"""Device, machine card, ceilings and the timing lock, on whatever machine the tests run on."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lmcompress import device, paths
from lmcompress.device import ceiling, choose, code_version, machine, versions
from lmcompress.errors import BadSetting, StudyError
from lmcompress.timing_lock import at_work, timing_lock

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture
def own_lock(tmp_path, monkeypatch):
    """A lock folder of the test's own, for child processes too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@needs_no_gpu
def test_auto_is_the_cpu_in_float32_and_says_why(capsys):
    chosen = choose()
    assert (chosen.device, chosen.dtype) == (torch.device("cpu"), torch.float32)
    assert "no CUDA device" in chosen.reason and "float32" in chosen.reason
    assert capsys.readouterr().out == ""


def test_what_is_asked_for_is_taken():
    chosen = choose("cpu", "bfloat16")
    assert (chosen.device.type, chosen.dtype) == ("cpu", torch.bfloat16)
    assert chosen.reason.count("was asked for") == 2


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "Big GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capability)
    chosen = choose()
    assert (str(chosen.device), chosen.dtype) == ("cuda:0", dtype)
    assert "Big GPU" in chosen.reason
    assert str(choose("cuda:1").device) == "cuda:1"


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"device": "cuda:99"}, "cpu"), ({"device": "tpu"}, "cpu"), ({"dtype": "int3"}, "bfloat16")],
)
def test_what_is_not_here_is_refused_with_what_is(asked, named):
    pytest.raises(BadSetting, choose, **asked).match(named)


def test_the_machine_card_is_plain_and_in_bytes():
    card = machine()
    assert json.loads(json.dumps(card)) == card
    assert 1 <= card["cores"] <= psutil.cpu_count()
    assert card["memory_bytes"] == psutil.virtual_memory().total > 1 << 28
    assert card["cpu"] and card["python"] == sys.version.split()[0]
    if sys.platform == "linux" and "model name" in (cpuinfo := Path("/proc/cpuinfo").read_text()):
        assert card["cpu"] in cpuinfo


def test_a_processor_is_named_on_macos_and_where_nobody_names_it(monkeypatch):
    monkeypatch.setattr(device.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(device, "_output", lambda *command: "Apple M4" if command[0] == "sysctl" else None)
    assert device._cpu_name() == "Apple M4"
    monkeypatch.setattr(device, "_output", lambda *command: None)
    monkeypatch.setattr(device.platform, "processor", lambda: "")
    monkeypatch.setattr(device.platform, "machine", lambda: "arm64")
    assert device._cpu_name() == "arm64"


def test_versions_are_those_imported_and_leave_out_what_is_missing(monkeypatch):
    monkeypatch.setattr(device, "_REPORTED", ("torch", "numpy", "no-such-package-at-all"))
    found = versions()
    assert found.keys() == {"torch", "numpy"}
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_code_version_is_the_commit_then_dirty_then_the_package(tmp_path, monkeypatch):
    source = SimpleNamespace(version="0.1.0", read_text=lambda name: None)
    monkeypatch.setattr(device.importlib.metadata, "distribution", lambda name: source)
    monkeypatch.setattr(paths, "CODE", tmp_path)
    (tmp_path / "code.py").write_text("")
    assert code_version() == "0.1.0", "no repository"
    git(tmp_path, "init", "-q")
    assert code_version() == "0.1.0", "no commit yet"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v9", "-m", "a tag does not hide the commit")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert code_version() == commit
    (tmp_path / "code.py").write_text("changed")
    assert code_version() == commit + "-dirty"
    monkeypatch.setattr(paths, "CODE", tmp_path / "site-packages")
    assert code_version() == "0.1.0", "another's repository"
    origin = {"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}
    source.read_text = {"direct_url.json": json.dumps(origin)}.get
    assert code_version() == "0.1.0+0123456789ab", "installed by pip from a repository"


HOLD = """
import sys, time
from lmcompress.timing_lock import timing_lock
with timing_lock(timeout_s=30):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold_elsewhere() -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    return child


def test_another_process_waits_is_named_and_a_killed_one_lets_go(own_lock):
    child = hold_elsewhere()
    try:
        with pytest.raises(StudyError, match=f"process {child.pid}"), timing_lock(timeout_s=0.1):
            pass
        child.kill()
        child.wait()
        with timing_lock(timeout_s=30):
            pass
    finally:
        child.kill()
        child.communicate()


def test_the_holder_may_take_it_again_and_other_threads_may_not(own_lock):
    inside = []

    def other() -> None:
        with timing_lock(timeout_s=30):
            inside.append("other")

    thread = threading.Thread(target=other)
    with timing_lock(), timing_lock(timeout_s=0):
        thread.start()
        time.sleep(0.05)
        with timing_lock():
            pass
        inside.append("holder")
    thread.join(30)
    assert inside == ["holder", "other"]
    with pytest.raises(ZeroDivisionError), timing_lock():
        raise ZeroDivisionError
    child = hold_elsewhere()  # an error gave it back, and so does the end of a process
    threading.Timer(0.1, child.stdin.close).start()
    with timing_lock(timeout_s=30):
        assert child.wait(timeout=30) == 0
    child.stdout.close()
    files = [file.name for file in own_lock.glob("*.lock")]
    assert files and all(str(os.getuid()) in name for name in files)


def test_the_ceiling_is_measured_once_and_kept(tmp_path, monkeypatch, own_lock):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = ceiling("cpu", torch.float32)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"
    assert first["gflops_per_s"] > 0 and first["bandwidth_gb_per_s"] > 0
    assert (first["device"], first["dtype"]) == ("cpu", "float32")
    with monkeypatch.context() as patch:
        for name in ("_matmul_gflops_per_s", "_bandwidth_gb_per_s"):
            patch.setattr(device, name, lambda *_: pytest.fail("measured again"))
        assert ceiling(torch.device("cpu"), torch.float32) == first
    for name, value in (("_matmul_gflops_per_s", 7.0), ("_bandwidth_gb_per_s", 3.0)):
        monkeypatch.setattr(device, name, lambda *_, value=value: value)
    assert ceiling("cpu", torch.bfloat16)["gflops_per_s"] == 7, "another dtype is measured on its own"
    threads = first["threads"] + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert ceiling("cpu", torch.float32)["gflops_per_s"] == 7, "and so is another thread count"
    monkeypatch.setattr(device, "_matmul_gflops_per_s", lambda *_: 9.0)
    assert ceiling("cpu", torch.float32, at_least=6.0)["gflops_per_s"] == 7, "not exceeded: as recorded"
    assert ceiling("cpu", torch.float32, at_least=8.0)["gflops_per_s"] == 9, "exceeded: taken again"
    file = tmp_path / "runs" / "machine.json"
    assert len(json.loads(file.read_text())) == 3
    file.write_text("{ torn")
    assert ceiling("cpu", torch.float32)["bandwidth_gb_per_s"] == 3
    assert len(json.loads(file.read_text())) == 1


def test_rates_count_operations_and_bytes(monkeypatch):
    """With a clock that says each call took one second, the rates are the work of one call."""

    def one_second(call, device):
        call()
        return 1.0

    monkeypatch.setattr(device, "_best_seconds", one_second)
    cpu = torch.device("cpu")
    assert device._bandwidth_gb_per_s(cpu) == pytest.approx(3 * (128 << 20) / 1e9)
    assert device._matmul_gflops_per_s(cpu, torch.float32) == pytest.approx(2 * 512**3 / 1e9)


@pytest.mark.parametrize(
    ("seconds", "chosen"), [({"bfloat16": 1.0}, torch.float32), ({"float32": 1.0}, torch.bfloat16)]
)
def test_training_takes_the_faster_format(monkeypatch, seconds, chosen):
    def timed(call, device, **_):
        return seconds.get(str(call().dtype).removeprefix("torch."), 0.5)

    monkeypatch.setattr(device, "_best_seconds", timed)
    device.fast_dtype.cache_clear()
    assert device.fast_dtype(torch.device("cpu")) == chosen
    device.fast_dtype.cache_clear()


WORK = """
import sys, time
from lmcompress.timing_lock import at_work, timing_lock
with at_work():
    print("at work", flush=True)
    sys.stdin.readline()
    with timing_lock():
        print("timing", flush=True)
        time.sleep(0.1)
    print("timed", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(own_lock):
    """A process at work, which times when told to and ends when told again."""
    child = subprocess.Popen(
        [sys.executable, "-c", WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "at work\n"
    yield child
    child.kill()
    child.communicate()


def tell(child):
    child.stdin.write("\n")
    child.stdin.flush()


def test_nothing_is_timed_beside_work_of_another(other):
    with pytest.raises(StudyError, match="still did after 0.1 s"), timing_lock(timeout_s=0.1):
        pass
    other.kill()
    other.wait()
    with timing_lock(timeout_s=10):
        pass


def test_two_at_work_that_both_want_to_time_do_so_one_after_the_other(other):
    with at_work():
        tell(other)  # it waits, for this process is at work
        time.sleep(0.2)
        threading.Timer(0.3, tell, [other]).start()
        with timing_lock(), timing_lock():
            here = time.monotonic()
        seen = [other.stdout.readline() for _ in range(2)]
        assert seen == ["timing\n", "timed\n"] and time.monotonic() - here < 10
        other.wait(timeout=10)


def test_work_begins_when_nothing_is_timed(own_lock):
    begun = []
    with at_work(), at_work(), timing_lock(timeout_s=1):
        pass  # work inside work is the same work

    def work():
        with at_work():
            begun.append(time.monotonic())

    with timing_lock():
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.1)
        assert not begun
    thread.join(10)
    assert begun
