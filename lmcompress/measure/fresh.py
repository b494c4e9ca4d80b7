"""Runs a module of this package in a process of its own, which prints its answer as a line of JSON."""

import json
import os
import subprocess
import sys

import lmcompress
from lmcompress.errors import StudyError


def run(module: str, *arguments: str, doing: str, if_killed: str = "", timeout_s: float = 1800.0) -> dict:
    """Return the last line that `python -m module arguments` prints, read as JSON.

    `doing` begins the sentence of the `StudyError` of a process that fails, is killed or takes too long;
    `if_killed` says what to do when memory ran out.
    """
    package = os.path.dirname(os.path.dirname(lmcompress.__file__))
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command, environment = [sys.executable, "-m", module, *arguments], os.environ | {"PYTHONPATH": path}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired as error:
        raise StudyError(f"{doing} took more than {timeout_s:g} s") from error
    if done.returncode < 0:
        raise StudyError(
            f"{doing}: its process was ended by signal {-done.returncode}; the system does so when memory "
            f"runs out (9). Free memory{if_killed}."
        )
    if done.returncode:
        raise StudyError(f"{doing} failed: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
