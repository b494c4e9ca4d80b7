"""Executes single notebooks with papermill, here or on the workers of a cluster.

Light at import, as the runner is.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

from lmcompress.errors import StudyError
from lmcompress.models.assets import file_hash
from lmcompress.paths import NOTEBOOKS, ROOT

Execute = Callable[[dict], Iterable[tuple[Path, float]]]


class NotebookFailed(StudyError):
    """A notebook raised, or ended without writing what it declares."""


def run_notebook(
    path: Path, parameters: dict, run: Path, *, interpreter: subprocess.Popen | None = None
) -> float:
    """Execute one notebook into `run/notebooks/`, by an `interpreter` of `ahead.start` if there is one; returns seconds.

    Raises:
        NotebookFailed: a cell raised, or an artefact that the notebook declares is missing, empty or old.
    """
    import papermill

    from helpers.run import ahead

    started = time.time()
    manager = {} if interpreter is None else {"kernel_manager_class": ahead.kernel_manager(interpreter)}
    output = run / "notebooks" / path.name
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ["STUDY_BATCH"] = "1"
    try:
        papermill.execute_notebook(
            str(path), str(output), parameters=parameters, kernel_name="python3", cwd=str(ROOT),
            progress_bar=sys.stderr.isatty(), log_output=False,
            extra_arguments=["--IPKernelApp.log_level=40", f"--IPKernelApp.exec_lines={ahead.PRELOAD}"],
            start_timeout=600, **manager,  # it waits for others' measurements to end
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        raise NotebookFailed(
            f"{path.name} stopped at cell {error.cell_index}: {error.ename}: {error.evalue}\n"
            f"The executed copy with the full traceback is {output}. Rows measured before it are kept; "
            "mend the cause and run again."
        ) from error
    declared = nbformat.read(path, as_version=4).metadata.get("study", {}).get("artefacts", [])
    for artefact in declared:
        file = run / artefact
        if not file.is_file() or file.stat().st_size == 0:
            raise NotebookFailed(f"{path.name} ran, but {file} is missing or empty")
    return time.time() - started


def run_elsewhere(name: str, content: str, parameters: dict, run: Path) -> float:
    """What a worker of a cluster does: `run_notebook` on its own copy of notebook `name`, if that is the same.

    Raises:
        NotebookFailed: its copy is missing or another, or as for `run_notebook`.
    """
    path = NOTEBOOKS / name
    if not path.is_file() or file_hash(path) != content:
        raise NotebookFailed(
            f"{path} of the worker is not the notebook that was sent: check out the same commit"
        )
    return run_notebook(path, parameters, run)


@contextmanager
def here(run: Path, last: Path) -> Iterator[Execute]:
    """A function that runs `{notebook: parameters}` in turn, the next one's interpreter starting beside each but `last`."""
    from helpers.run import ahead

    waiting = None

    def execute(due: dict) -> Iterator[tuple[Path, float]]:
        nonlocal waiting
        for path, given in due.items():
            ready, waiting = waiting, None if path == last else ahead.start()
            yield path, run_notebook(path, given, run, interpreter=ready)

    try:
        yield execute
    finally:
        ahead.dismiss(waiting)


@contextmanager
def on_cluster(cluster: str, run: Path) -> Iterator[Execute]:
    """A function that runs `{notebook: parameters}` on the cluster, and yields seconds as they end."""
    from lmcompress.study.cluster import connected

    with connected(cluster, run) as tasks:

        def execute(due: dict) -> Iterator[tuple[Path, float]]:
            calls = {
                path: (run_elsewhere, path.name, file_hash(path), given | {"output": str(run)}, run)
                for path, given in due.items()
            }
            return tasks(calls)

        yield execute
