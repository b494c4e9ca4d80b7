"""The lock under which times are taken: nothing else of this project runs on the machine meanwhile.

Two files. Whoever times holds the first alone. Work that would disturb it (a task of a cluster) holds a share
of the second, and gives it up while it waits for the first: two tasks that both want to time never deadlock.
"""

import fcntl
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lmcompress.errors import StudyError


class _Process:
    """What this process holds of the two locks: they belong to the process, hence no instances."""

    threads = threading.RLock()  # of the thread that times, which may take the lock again
    depth = 0  # how often that thread holds it
    work_share: int | None = None  # descriptor of the share of the second lock, while `at_work`


@contextmanager
def timing_lock(*, timeout_s: float = 3600.0) -> Iterator[None]:
    """Hold the machine for a measurement: no other process of this user's gets past here meanwhile.

    May be taken again by the thread that holds it. Ends with the process, however that ends. A process that
    is `at_work` waits as long as the others that are take; any other raises `StudyError` after `timeout_s`
    seconds, which names the holder.
    """
    if not _Process.threads.acquire(timeout=max(0.0, timeout_s)):
        raise _still_held("timing", timeout_s)
    with ExitStack() as stack:
        stack.callback(_Process.threads.release)
        if not _Process.depth:
            _take_machine(stack, timeout_s)
        _Process.depth += 1
        try:
            yield
        finally:
            _Process.depth -= 1


@contextmanager
def at_work() -> Iterator[None]:
    """Do work that would disturb a measurement: it begins when none is taken, and only itself may time."""
    if _Process.work_share is not None:
        yield
        return
    _take_share()
    try:
        yield
    finally:
        os.close(_Process.work_share)
        _Process.work_share = None


@contextmanager
def at_rest() -> Iterator[None]:
    """While at work, wait for another process: meanwhile that one may time, or both would wait for ever."""
    if _Process.work_share is None:
        yield
        return
    fcntl.flock(_Process.work_share, fcntl.LOCK_UN)
    try:
        yield
    finally:
        _take_share()


def _take_share() -> None:
    """Take this process's share of the second lock, but not in the midst of a measurement."""
    turn = _lock("timing", fcntl.LOCK_EX)
    try:
        if _Process.work_share is None:
            _Process.work_share = _lock("work", fcntl.LOCK_SH)
        else:
            fcntl.flock(_Process.work_share, fcntl.LOCK_SH)
    finally:
        os.close(turn)


def _take_machine(stack: ExitStack, timeout_s: float) -> None:
    """Take both locks alone until `stack` closes, which gives a process at work its share back."""
    if (share := _Process.work_share) is None:
        for name in ("timing", "work"):
            stack.callback(os.close, _lock(name, fcntl.LOCK_EX, timeout_s))
        return
    fcntl.flock(share, fcntl.LOCK_UN)
    try:
        stack.callback(os.close, _lock("timing", fcntl.LOCK_EX))
        _wait(share, fcntl.LOCK_EX, "work")
        stack.callback(fcntl.flock, share, fcntl.LOCK_SH)  # before others that wait for the first lock
    except BaseException:  # an interrupt, too: else this process would work without its share
        fcntl.flock(share, fcntl.LOCK_SH)
        raise


def _path(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"compression-study-{name}-{os.getuid()}.lock"


def _lock(name: str, mode: int, timeout_s: float = math.inf) -> int:
    """Return the descriptor of a lock that is held, this process's number in it; closing it unlocks."""
    descriptor = os.open(_path(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _wait(descriptor, mode, name, timeout_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _wait(descriptor: int, mode: int, name: str, timeout_s: float = math.inf) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            return fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise _still_held(name, timeout_s) from None
            time.sleep(0.02)


def _still_held(name: str, timeout_s: float) -> StudyError:
    path = _path(name)
    return StudyError(
        f"another measurement or task holds {path} (process {path.read_text() or 'unknown'}), and still did "
        f"after {timeout_s:g} s. Wait for it, or end that process; the lock goes with it."
    )
