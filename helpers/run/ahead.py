"""Starts the interpreter of the next notebook while one still runs, so that its imports keep nobody waiting.

They take several seconds in every kernel. Meanwhile the interpreter is `timing.at_work`: it begins when no measurement
is being taken, and whoever wants to take one waits until it is done.
"""

import json
import os
import subprocess
import sys

from jupyter_client import AsyncKernelManager

from lmcompress.paths import ROOT
from lmcompress.timing_lock import at_work

# Every notebook imports the same hundreds of modules: a fifth faster if nothing looks for garbage among them meanwhile.
PRELOAD = "import gc; gc.disable(); import helpers.notebook; gc.freeze(); gc.enable(); del gc"
LAUNCHER = "ipykernel_launcher"
# A kernel says where matplotlib shows figures before it is imported, unless that is said already.
FIGURES = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def start() -> subprocess.Popen:
    """An interpreter that imports what notebooks need, and then waits for its `kernel_manager`; or ends with us."""
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.run.ahead"],
        stdin=subprocess.PIPE,
        cwd=ROOT,
        env=FIGURES | os.environ | {"STUDY_BATCH": "1", "JPY_PARENT_PID": str(os.getpid())},
        start_new_session=True,  # as kernels have, so that an interrupt reaches what they started
    )


def dismiss(interpreter: subprocess.Popen | None) -> None:
    """End an interpreter that no kernel manager has taken."""
    if interpreter is not None:
        interpreter.kill()
        interpreter.communicate()


def kernel_manager(interpreter: subprocess.Popen) -> type[AsyncKernelManager]:
    """A kernel manager class that makes `interpreter` its kernel; if that has ended or is no match, it starts another."""

    class Ready(AsyncKernelManager):
        async def _async_launch_kernel(self, kernel_cmd: list[str], **settings) -> None:
            if kernel_cmd[0] != sys.executable or LAUNCHER not in kernel_cmd or self.kernel_spec.env:
                return await super()._async_launch_kernel(kernel_cmd, **settings)
            arguments = json.dumps(kernel_cmd[kernel_cmd.index(LAUNCHER) + 1 :])
            try:
                interpreter.stdin.write(arguments.encode() + b"\n")
                interpreter.stdin.close()
            except OSError:
                return await super()._async_launch_kernel(kernel_cmd, **settings)
            found = self.provisioner
            found.process, found.pid, found.pgid = interpreter, interpreter.pid, os.getpgid(interpreter.pid)
            self._reconcile_connection_info(found.connection_info)

    return Ready


def main() -> None:
    """Import, wait for a kernel's arguments on stdin, and become that kernel."""
    with at_work():
        exec(PRELOAD, {})
    line = sys.stdin.readline()
    if line:
        from ipykernel.kernelapp import launch_new_instance

        launch_new_instance(argv=json.loads(line))


if __name__ == "__main__":
    main()
