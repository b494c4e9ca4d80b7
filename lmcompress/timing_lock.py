"""The lock under which times are taken: nothing else of this project runs on the machine meanwhile.

Two files. Whoever times holds the first alone. Work that would disturb it (a task of a cluster) holds a share of the
second, and gives it up while it waits for the first, so that two tasks which both want to time never wait for each other.
"""

import fcntl
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmcompress.errors import StudyError

_thread_lock = threading.RLock()
_held: dict[str, int | None] = {"depth": 0, "share": None}


@contextmanager
def timing_lock(*, timeout_s: float = 3600.0) -> Iterator[None]:
    """Hold the machine for a measurement: no other process of this user's gets past here meanwhile.

    May be taken again by the thread that holds it. Ends with the process, however that ends. A child
    process that takes the lock while its parent holds it waits until `timeout_s`. A process that is `at_work`
    waits as long as the others that are take.

    Raises:
        StudyError: still held by another after `timeout_s` seconds; the message names the holder.
    """
    limit_s = timeout_s if _held["share"] is None else math.inf
    deadline = time.monotonic() + limit_s
    if not _thread_lock.acquire(timeout=max(0.0, timeout_s)):
        raise _still_held(_path("timing"), timeout_s)
    descriptors: list[int] = []
    try:
        if _held["depth"] == 0:
            _take_machine(descriptors, deadline, timeout_s)
        _held["depth"] += 1
        try:
            yield
        finally:
            _held["depth"] -= 1
            if descriptors and _held["share"] is not None:
                fcntl.flock(
                    _held["share"], fcntl.LOCK_SH
                )  # others that want it alone wait for the first lock
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        _thread_lock.release()


@contextmanager
def at_work() -> Iterator[None]:
    """Work that would disturb a measurement: begins when none is taken, and while it lasts only itself may time."""
    if _held["share"] is not None:
        yield
        return
    turn = _lock(_path("timing"), fcntl.LOCK_EX)
    try:
        _held["share"] = _lock(_path("work"), fcntl.LOCK_SH)
    finally:
        os.close(turn)
    try:
        yield
    finally:
        os.close(_held["share"])
        _held["share"] = None


def _take_machine(descriptors: list[int], deadline: float, timeout_s: float) -> None:
    share = _held["share"]
    if share is not None:
        fcntl.flock(share, fcntl.LOCK_UN)
    descriptors.append(_lock(_path("timing"), fcntl.LOCK_EX, deadline, timeout_s))
    if share is None:
        descriptors.append(_lock(_path("work"), fcntl.LOCK_EX, deadline, timeout_s))
    else:
        _wait(share, fcntl.LOCK_EX, _path("work"), deadline, timeout_s)


def _path(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"compression-study-{name}-{os.getuid()}.lock"


def _lock(path: Path, mode: int, deadline: float = math.inf, timeout_s: float = math.inf) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _wait(descriptor, mode, path, deadline, timeout_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _wait(descriptor: int, mode: int, path: Path, deadline: float, timeout_s: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise _still_held(path, timeout_s) from None
            time.sleep(0.02)


def _still_held(path: Path, timeout_s: float) -> StudyError:
    holder = path.read_text() if path.exists() else ""
    return StudyError(
        f"another measurement or task holds {path} (process {holder or 'unknown'}), and still did after {timeout_s:g} s. "
        "Wait for it, or end that process; the lock goes with it."
    )
