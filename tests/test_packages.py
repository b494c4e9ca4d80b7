"""What an install without the checkout holds, and what its command lines say there."""

import os
import subprocess
import sys
import zipfile

import pytest

from lmcompress.paths import ROOT

WHEEL = "from setuptools.build_meta import build_wheel; print(build_wheel({!r}))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with the packages as `pip install .` puts them, and the names in the wheel."""
    folder = tmp_path_factory.mktemp("install")
    committed = subprocess.check_output(
        ["git", "ls-files", "-z", "helpers", "lmcompress"], cwd=ROOT, text=True
    )
    source = folder / "source"
    for name in {*committed.split("\0")[:-1], "pyproject.toml", "README.md", "LICENSE"}:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-c", WHEEL.format(str(folder))], cwd=source, check=True, capture_output=True
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
        return (
            folder / "site",
            set(wheel.namelist()),
            {n for n in committed.split("\0")[:-1] if (ROOT / n).is_file()},
        )


def test_a_wheel_holds_every_file_of_both_packages(installed):
    _, names, committed = installed
    assert committed - names == set()
    assert any(name.endswith("entry_points.txt") for name in names)


@pytest.mark.parametrize(
    "command",
    ["lmcompress.study.decision", "helpers.report --run run", "helpers.report --check", "helpers.run.runner"],
)
def test_without_a_checkout_a_command_line_says_what_is_missing_and_how_to_get_it(
    installed, tmp_path, command
):
    environment = {
        name: text for name, text in os.environ.items() if name not in ("STUDY_HOME", "STUDY_RUNS")
    }
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(installed[0])},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode and "Traceback" not in said and str(tmp_path) in said
    assert "Clone the repository" in said
