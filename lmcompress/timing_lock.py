"""The lock under which times are taken: nothing else of this project runs on the machine meanwhile.

Two files. Whoever times holds the first alone. Work that would disturb it (a task of a cluster) holds a share
of the second, and gives it up while it waits for the first, so that two tasks which both want to time never
wait for each other.
"""

import fcntl
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lmcompress.errors import StudyError


@dataclass
class _Process:
    """What this process holds of the two locks; they belong to the process, hence one object.

    Attributes:
        threads: held by the thread that times, which may take the lock again.
        depth: how often that thread holds it.
        work_share: descriptor of the share of the second lock while the process is `at_work`.
    """

    threads: threading.RLock = field(default_factory=threading.RLock)
    depth: int = 0
    work_share: int | None = None


_process = _Process()


@contextmanager
def timing_lock(*, timeout_s: float = 3600.0) -> Iterator[None]:
    """Hold the machine for a measurement: no other process of this user's gets past here meanwhile.

    May be taken again by the thread that holds it. Ends with the process, however that ends. A process
    that is `at_work` waits as long as the others that are take.

    Raises:
        StudyError: one of the locks is still held by another after `timeout_s` seconds; its holder is named.
    """
    if not _process.threads.acquire(timeout=max(0.0, timeout_s)):
        raise _still_held(_path("timing"), timeout_s)
    with ExitStack() as stack:
        stack.callback(_process.threads.release)
        if not _process.depth:
            _take_machine(stack, timeout_s)
        _process.depth += 1
        try:
            yield
        finally:
            _process.depth -= 1


@contextmanager
def at_work() -> Iterator[None]:
    """Do work that would disturb a measurement: it begins when none is taken, and only itself may time."""
    if _process.work_share is not None:
        yield
        return
    turn = _lock(_path("timing"), fcntl.LOCK_EX)
    try:
        _process.work_share = _lock(_path("work"), fcntl.LOCK_SH)
    finally:
        os.close(turn)
    try:
        yield
    finally:
        os.close(_process.work_share)
        _process.work_share = None


@contextmanager
def at_rest() -> Iterator[None]:
    """While at work, wait for another process: meanwhile that one may time, or both would wait for ever."""
    share = _process.work_share
    if share is None:
        yield
        return
    fcntl.flock(share, fcntl.LOCK_UN)
    try:
        yield
    finally:
        turn = _lock(_path("timing"), fcntl.LOCK_EX)  # not in the midst of a measurement
        try:
            fcntl.flock(share, fcntl.LOCK_SH)
        finally:
            os.close(turn)


def _take_machine(stack: ExitStack, timeout_s: float) -> None:
    """Take both locks alone until `stack` closes, which gives a process at work its share back."""
    share = _process.work_share
    if share is None:
        for name in ("timing", "work"):
            stack.callback(os.close, _lock(_path(name), fcntl.LOCK_EX, timeout_s))
        return
    fcntl.flock(share, fcntl.LOCK_UN)
    try:
        stack.callback(os.close, _lock(_path("timing"), fcntl.LOCK_EX))
        _wait(share, fcntl.LOCK_EX, _path("work"))
        stack.callback(fcntl.flock, share, fcntl.LOCK_SH)  # before others that wait for the first lock
    except BaseException:  # an interrupt, too: else this process would work without its share
        fcntl.flock(share, fcntl.LOCK_SH)
        raise


def _path(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"compression-study-{name}-{os.getuid()}.lock"


def _lock(path: Path, mode: int, timeout_s: float = math.inf) -> int:
    """Return the descriptor of `path`, locked and with this process's number in it; closing it unlocks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _wait(descriptor, mode, path, timeout_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _wait(descriptor: int, mode: int, path: Path, timeout_s: float = math.inf) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            return fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise _still_held(path, timeout_s) from None
            time.sleep(0.02)


def _still_held(path: Path, timeout_s: float) -> StudyError:
    holder = path.read_text() if path.exists() else ""
    return StudyError(
        f"another measurement or task holds {path} (process {holder or 'unknown'}), and still did after "
        f"{timeout_s:g} s. Wait for it, or end that process; the lock goes with it."
    )
