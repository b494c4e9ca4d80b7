"""Break one line of a central function at a time and see a test fail: `python tests/mutants.py [NAME …]`.

Works in a temporary copy. A mutant is data; one whose text is not in its file exactly once is an error, so
that the list stays true. Exit status 1 if a mutant survives. A few minutes; no part of `make test`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("lmcompress", "helpers", "scripts", "tests", "pyproject.toml")
HANGS_S = 300


class Mutant(NamedTuple):
    """One change of one file, and the test files of which one has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(name, *fields)
    for name, fields in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items()
]


def copy_of_checkout(folder: Path) -> Path:
    """Copy the code into `folder` and link what tests read besides."""
    for path in ROOT.iterdir():
        if path.name in COPIED:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, folder / path.name)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


def run_tests(copy: Path, tests: str) -> tuple[int, str]:
    """Return pytest's exit status for the test files of `tests`, and the first test that failed; "hangs"
    after a while.
    """
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    files = [f"tests/{name}" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=HANGS_S
        )
    except subprocess.TimeoutExpired:
        return 1, "hangs"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return done.returncode, failed[1].removeprefix("tests/") if failed else done.stdout[-1500:]


def write(file: Path, text: str) -> None:
    """Write code, and remove what was compiled of it: two changes of one second look alike to Python."""
    file.write_text(text, encoding="utf-8")
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()


def untrue(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """Return a line per mutant whose text is not in its file exactly once."""
    counts = {
        mutant: (root / mutant.file).read_text(encoding="utf-8").count(mutant.old) for mutant in mutants
    }
    return [
        f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}, once is needed"
        for mutant, count in counts.items()
        if count != 1
    ]


def main(names: list[str]) -> int:
    """Print per mutant the test that found it and the seconds; return 1 if one survived, 2 if the list is not
    true.
    """
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copy_of_checkout(Path(folder))
        if problems := untrue(mutants, copy) or ([] if mutants else [f"no mutant of {names}"]):
            print(*problems, sep="\n", file=sys.stderr)
            return 2
        survivors = []
        for mutant in mutants:
            file, started = copy / mutant.file, time.monotonic()
            whole = file.read_text(encoding="utf-8")
            write(file, whole.replace(mutant.old, mutant.new))
            status, test = run_tests(copy, mutant.tests)
            write(file, whole)
            if status != 1:  # 2: the change is no Python, and proves nothing
                survivors.append(mutant)
                test = "SURVIVES" if status == 0 else f"NO TEST RAN: {test}"
            print(f"{mutant.name:42} {test:95} {time.monotonic() - started:5.0f} s", flush=True)
        status, test = run_tests(copy, " ".join({name: 0 for m in mutants for name in m.tests.split()}))
        print(f"{len(mutants) - len(survivors)} of {len(mutants)} found")
        print(
            f"the tests fail without a change, too: {test}" if status else "without a change the tests pass"
        )
        return int(bool(survivors or status))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
