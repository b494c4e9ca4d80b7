"""Execute single notebooks with papermill, here or on the workers of a cluster.

Light at import, as the runner is.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat

from lmcompress.errors import StudyError
from lmcompress.models.assets import file_hash
from lmcompress.paths import NOTEBOOKS, ROOT

if TYPE_CHECKING:
    from jupyter_client import AsyncKernelManager

Execute = Callable[[dict], Iterable[tuple[Path, float]]]
PRELOAD = "from helpers.run.execution import load_libraries; load_libraries(); del load_libraries"
LIFE_S = 30.0  # between two signs of life where no bar can be shown
QUIET = {"KINETO_LOG_LEVEL": "99"}  # else torch's profiler says on the terminal whenever it starts
KERNEL_START_S = 600  # a kernel waits for the measurements of others to end


class NotebookFailed(StudyError):
    """A notebook raised, or ended without writing what it declares."""


def start_kernel() -> "AsyncKernelManager":
    """Start a `python3` kernel that loads what every notebook imports; return its manager at once."""
    from jupyter_client import AsyncKernelManager

    manager = AsyncKernelManager(kernel_name="python3")
    arguments = ["--IPKernelApp.log_level=40", f"--IPKernelApp.exec_lines={PRELOAD}"]
    start = manager.start_kernel(
        cwd=str(ROOT), env=QUIET | os.environ | {"STUDY_BATCH": "1"}, extra_arguments=arguments
    )
    asyncio.run(start)
    return manager


def stop_kernel(manager: "AsyncKernelManager") -> None:
    """End a kernel and what it started."""
    asyncio.run(manager.shutdown_kernel(now=True))


def load_libraries() -> None:
    """Import what notebooks need (several seconds), while no measurement is being taken.

    Garbage collection is off meanwhile, which makes hundreds of imports a fifth faster.
    """
    import gc

    from lmcompress.timing_lock import at_work

    gc.disable()
    with at_work():
        import helpers.notebook  # noqa: F401
    gc.freeze()
    gc.enable()


def run_notebook(path: Path, parameters: dict, run: Path, *, kernel: "AsyncKernelManager") -> float:
    """Execute one notebook into `run/notebooks/` in a running kernel, which ends with it; return seconds.

    Raises:
        NotebookFailed: a cell raised, or an artefact that the notebook declares is missing or empty.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    started = time.time()
    output = run / "notebooks" / path.name
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(path),
            str(output),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=sys.stderr.isatty(),
            log_output=False,
            start_timeout=KERNEL_START_S,
            km=kernel,
        )
    except papermill.PapermillExecutionError as error:
        raise NotebookFailed(
            f"{path.name} stopped at cell {error.cell_index}: {error.ename}: {error.evalue}\n"
            f"The executed copy with the full traceback is {output}. Rows measured before it are kept; "
            "mend the cause and run again."
        ) from error
    except DeadKernelError as error:
        raise NotebookFailed(
            f"{path.name}: its kernel died, most likely killed because memory ran out. Rows measured before "
            "are kept. Close what else needs memory, or take a smaller model, shorter texts (timed_length) "
            f"or fewer examples, and run again; {output} shows how far it came."
        ) from error
    finally:
        stop_kernel(kernel)
    declared = nbformat.read(path, as_version=4).metadata.get("study", {}).get("artefacts", [])
    for file in (run / artefact for artefact in declared):
        if not file.is_file() or file.stat().st_size == 0:
            raise NotebookFailed(f"{path.name} ran, but {file} is missing or empty")
    return time.time() - started


def run_elsewhere(name: str, content: str, parameters: dict, run: Path) -> float:
    """Execute a worker's own copy of notebook `name` on a cluster, if its hash is `content`; return seconds.

    Raises:
        NotebookFailed: its copy is missing or another, or as for `run_notebook`.
    """
    path = NOTEBOOKS / name
    if not path.is_file() or file_hash(path) != content:
        raise NotebookFailed(
            f"{path} of the worker is not the notebook that was sent: check out the same commit"
        )
    return run_notebook(path, parameters, run, kernel=start_kernel())


@contextmanager
def signs_of_life(names: list[str], rows: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Report every 30 s how many rows the notebooks `names` have recorded; a terminal shows a bar instead."""
    over, started = threading.Event(), time.time()

    def report() -> None:
        while not over.wait(LIFE_S):
            files = [rows / f"{name}.jsonl" for name in names]
            recorded = sum(file.read_bytes().count(b"\n") for file in files if file.is_file())
            say(f"{', '.join(names)}: running for {time.time() - started:.0f} s, {recorded} rows recorded")

    if sys.stderr.isatty() or not names:
        yield
        return
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        over.set()
        reporter.join()


@contextmanager
def here(run: Path, last: Path) -> Iterator[Execute]:
    """Yield a function that runs `{notebook: parameters}` in turn.

    The next notebook's kernel starts alongside each but `last`, so that nobody waits for its imports.
    """
    ahead: list[AsyncKernelManager] = []

    def execute(due: dict) -> Iterator[tuple[Path, float]]:
        for path, parameters in due.items():
            kernel = ahead.pop() if ahead else start_kernel()
            if path != last:
                ahead.append(start_kernel())
            yield path, run_notebook(path, parameters, run, kernel=kernel)

    try:
        yield execute
    finally:
        for kernel in ahead:
            stop_kernel(kernel)


@contextmanager
def on_cluster(cluster: str, run: Path) -> Iterator[Execute]:
    """Yield a function that runs `{notebook: parameters}` on the cluster, and yields seconds as they end."""
    from lmcompress.study.cluster import connected

    with connected(cluster, run) as tasks:

        def execute(due: dict) -> Iterator[tuple[Path, float]]:
            calls = {
                path: (run_elsewhere, path.name, file_hash(path), parameters | {"output": str(run)}, run)
                for path, parameters in due.items()
            }
            return tasks(calls)

        yield execute
