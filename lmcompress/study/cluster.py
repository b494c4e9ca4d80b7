"""Sweeps and notebooks on a Dask cluster, by the address of its scheduler: a setting or notebook is a task.

The rows, not the cluster, remember what is done: a worker records what it measured in the run's folder, which
all workers see, and a task that comes back after its worker died finds the row. Needs the extra `cluster`.
"""

import hashlib
import inspect
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

import lmcompress
from lmcompress.errors import StudyError
from lmcompress.paths import RUNS, write_text
from lmcompress.results.store import RowStore, canonical
from lmcompress.timing_lock import at_work

if TYPE_CHECKING:
    from distributed import Client

    from lmcompress.study.study import Baseline

ANSWER_S = 15  # how long a scheduler may take to answer, and the first worker to come
SHARED = "STUDY_SHARED"  # set where a kernel runs as a task of a cluster


class ClusterProblem(StudyError):
    """No cluster answers, or its workers cannot do this project's work; the message says which and why."""


def sweep(settings: list[dict], *, cluster: str, study: dict, subject: dict) -> list[dict]:
    """Return the rows of `settings`, in their order, each measured by a worker unless it is recorded.

    A setting that fails keeps none of the others from being measured; the first failure is raised at the end.

    Args:
        settings: what `Baseline.measure` takes: `{"technique": "wanda", "sparsity": 0.5}`; a wrong one is
            refused before anything is sent.
        cluster: address of the scheduler, `tcp://host:8786`.
        study: what `Study` takes; its folder has to be on a disk all workers share.
        subject: what `Study.baseline` takes: `{"model": ..., "task": ...}`.

    Raises:
        ClusterProblem: no scheduler, no worker, or one that does not share folder and code, or died again and
            again.
    """
    from lmcompress import compress
    from lmcompress.study.baseline import Baseline

    arguments = [n for n in inspect.signature(Baseline.measure).parameters if n not in ("self", "settings")]
    for setting in settings:
        given = {name: value for name, value in setting.items() if name not in arguments}
        compress.get(setting["technique"]).check(given, also=arguments)
    folder = Path(study.get("folder") or RUNS / study.get("profile", "pocket")).resolve()
    described = {"study": study | {"folder": str(folder)}, "subject": subject, "sweep": uuid.uuid4().hex}
    opened, names = canonical(described), [repr(sorted(setting.items())) for setting in settings]
    with connected(cluster, folder) as run:
        dict(run({"dense": (_measured, opened, folder, {})}))  # before all others, or each would measure it
        calls = {name: (_measured, opened, folder, setting) for name, setting in zip(names, settings)}
        keys = dict(run(calls))
    rows = {row["key"]: row for row in RowStore(folder / "rows").rows(study["notebook"])}
    return [rows[keys[name]] for name in names]


@contextmanager
def connected(address: str, folder: Path) -> Iterator[Callable[[dict], Iterator[tuple]]]:
    """Yield a function that runs `{name: (function, *arguments)}` and yields each (name, result) as it ends.

    The first failure is raised once everything else has ended; a task whose worker dies is run on another. No
    scheduler there, or a worker that does not see `folder` or has other code, is a `ClusterProblem`.
    """
    mark = folder / f".shared-{uuid.uuid4().hex}"
    client = _client(address)
    try:
        write_text(mark, address)
        _check(client, mark)
        yield lambda calls: _run(client, mark, calls)
    finally:
        mark.unlink(missing_ok=True)
        client.close()


def _client(address: str) -> "Client":
    try:
        from distributed import Client
    except ImportError as error:
        raise ClusterProblem(
            f"a cluster needs Dask, which is not here ({error}): pip install -e '.[cluster]' -c "
            "constraints.txt"
        ) from error
    worker = f"`dask worker {address} --nworkers 1 --nthreads 1` on every machine"
    try:
        client = Client(address, timeout=ANSWER_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterProblem(
            f"no Dask scheduler answers at {address!r} ({error}). An address is tcp://host:8786; start one "
            f"with `dask scheduler`, and {worker}."
        ) from error
    try:
        client.wait_for_workers(1, timeout=ANSWER_S)
    except TimeoutError as error:
        client.close()
        raise ClusterProblem(f"the scheduler at {address} has no worker: start {worker}.") from error
    return client


def _check(client: "Client", mark: Path) -> None:
    answers = client.run(_refusal, mark, code_hash(), on_error="return")
    reasons = {worker: str(answer) for worker, answer in answers.items() if answer}
    crowded = [worker for worker, threads in client.nthreads().items() if threads != 1]
    reasons |= dict.fromkeys(crowded, "it runs several tasks in one process: start it with --nthreads 1")
    if reasons:
        listed = "".join(f"\n- {worker}: {reason}" for worker, reason in reasons.items())
        raise ClusterProblem(f"these workers cannot take part:{listed}")


def _refusal(mark: Path, code: str) -> str | None:
    """Return why this worker cannot take part, if it cannot."""
    if not mark.is_file():
        return (
            f"it does not see {mark.parent}: put the run's folder on a disk all workers share, at that path"
        )
    if code_hash() != code:
        package = Path(lmcompress.__file__).parent
        return f"its {package} is of other code: check out the same commit there, and start it again"
    return None


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Hash of this package's modules as they were when first asked."""
    modules = sorted(Path(lmcompress.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()[:16]


def _run(client: "Client", mark: Path, calls: dict[object, tuple]) -> Iterator[tuple]:
    from distributed import KilledWorker, as_completed

    code, call = code_hash(), uuid.uuid4().hex
    futures = {
        client.submit(_task, mark, code, *function, key=f"study-{call}-{index}", pure=False): name
        for index, (name, function) in enumerate(calls.items())
    }
    failures = []
    for future in as_completed(futures, loop=client.loop):
        error = future.exception()
        if error is None:
            yield futures[future], future.result()
        elif isinstance(error, KilledWorker):
            reason = "every worker that took it died, out of memory or killed; its own log says more"
            failures.append(ClusterProblem(f"{futures[future]} was given up: {reason}"))
        else:
            failures.append(error)
    if failures:
        raise failures[0]


def _task(mark: Path, code: str, function: Callable, *arguments: object) -> object:
    reason = _refusal(mark, code)  # of a worker that came later
    if reason:
        raise ClusterProblem(f"a worker cannot take part: {reason}")
    shared = SHARED in os.environ
    os.environ[SHARED] = "1"  # what the task starts, such as a notebook's kernel, reads it there
    try:
        return function(*arguments)
    finally:
        if not shared:
            del os.environ[SHARED]


@lru_cache(maxsize=1)
def _open(opened: str) -> "Baseline":
    from lmcompress.study.study import Study

    described = json.loads(opened)
    return Study(**described["study"]).baseline(**described["subject"])


def _measured(opened: str, folder: Path, setting: dict) -> str:
    """Return the key of the row of one setting, `{}` for the dense model; measured here unless recorded."""
    name = hashlib.sha256(repr(sorted(setting.items())).encode()).hexdigest()[:16]
    # The lock keeps a worker that is slow, and was taken for dead, from measuring beside the one that took
    # over.
    with FileLock(folder / "locks" / f"{name}.lock"), at_work():
        baseline = _open(opened)
        return (baseline.measure(**setting) if setting else baseline.dense)["key"]
