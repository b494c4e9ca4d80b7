"""The timing lock beside work that would disturb: who waits for whom, and that nobody waits for ever."""

import subprocess
import sys
import tempfile
import threading
import time

import pytest

from lmcompress.errors import StudyError
from lmcompress.timing_lock import at_work, timing_lock

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


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    """Locks of this test alone, in its processes too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def other():
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


def test_work_inside_work_is_the_same_work():
    with at_work(), at_work(), timing_lock(timeout_s=1):
        pass
    with timing_lock(timeout_s=1):
        pass
