"""The first cell of every notebook, run as IPython runs it, outside Colab and in it."""

import os
import subprocess
import sys
import types
from importlib.metadata import version

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from IPython.utils.text import DollarFormatter

from helpers.run import notebook_lint
from lmcompress.errors import BadSetting
from lmcompress.paths import NOTEBOOKS


class Shell:
    """What `get_ipython()` gives a cell: runs shell lines and %cd, records %pip."""

    def __init__(self, folder):
        self.folder, self.names, self.pip = folder, {}, []
        self.names["get_ipython"] = lambda: self

    def run(self, source: str) -> None:
        exec(TransformerManager().transform_cell(source), self.names)

    def _expand(self, line: str) -> str:
        return DollarFormatter().vformat(line, (), self.names).replace("/content", str(self.folder))

    def system(self, line: str) -> None:
        subprocess.run(self._expand(line), shell=True, check=True)

    def run_line_magic(self, magic: str, line: str) -> None:
        if magic == "cd":
            os.chdir(self._expand(line))
        else:
            assert magic == "pip"
            self.pip.append(self._expand(line))


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell in a folder that stands for /content, and a project to clone beside it."""
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "pyproject.toml").write_text("[project]\n")
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", "-C", str(origin), *arguments], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STUDY_REPOSITORY", raising=False)
    return Shell(tmp_path / "content")


@pytest.fixture
def colab(monkeypatch):
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def test_outside_colab_nothing_happens(shell):
    before = os.getcwd()
    shell.run(notebook_lint.bootstrap())
    assert shell.pip == [] and os.getcwd() == before and not shell.folder.exists()


def test_in_colab_the_project_is_installed_beside_the_torch_and_numpy_that_are_there(
    shell, colab, monkeypatch
):
    monkeypatch.setenv("STUDY_REPOSITORY", f"file://{shell.folder.parent}/origin")
    shell.run(notebook_lint.bootstrap())
    assert os.getcwd() == str(shell.folder / "study") and os.path.exists("pyproject.toml")
    project, apart = shell.pip
    assert project.split("--editable ")[1].split() == [
        ".",
        f"torch=={version('torch')}",
        f"numpy=={version('numpy')}",
    ]
    assert "--no-deps" in apart and "--upgrade" not in project + apart
    makefile = (NOTEBOOKS.parent / "Makefile").read_text(encoding="utf-8")
    assert apart.removeprefix("install --quiet ") in makefile


def test_without_an_address_the_reader_is_asked(shell, colab):
    shell.names["input"] = lambda question: f"file://{shell.folder.parent}/origin"
    shell.run(notebook_lint.bootstrap())
    assert os.path.exists("pyproject.toml") and len(shell.pip) == 2


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Two committed notebooks, the template, and the README, to be rewritten."""
    (tmp_path / "notebooks").mkdir()
    for name in ("00_start_here.ipynb", "02_pruning.ipynb", notebook_lint.TEMPLATE):
        (tmp_path / "notebooks" / name).write_text((NOTEBOOKS / name).read_text())
    (tmp_path / "README.md").write_text((NOTEBOOKS.parent / "README.md").read_text())
    monkeypatch.setattr(notebook_lint, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(notebook_lint, "ROOT", tmp_path)
    return tmp_path


def contents(folder) -> dict:
    return {path.name: path.read_text() for path in [*folder.glob("notebooks/*"), folder / "README.md"]}


def test_an_address_goes_into_badges_and_bootstrap_and_out_again(checkout, shell, colab):
    notebook_lint.set_address("")
    before = contents(checkout)
    for address in ("git@github.com:some-one/some.name.git", "https://github.com/some-one/some.name/"):
        notebook_lint.set_address(address)
        opens = (
            "https://colab.research.google.com/github/some-one/some.name/blob/main/notebooks/02_pruning.ipynb"
        )
        notebook = nbformat.read(checkout / "notebooks" / "02_pruning.ipynb", as_version=4)
        assert notebook.cells[0].source.count(opens) == contents(checkout)["README.md"].count(opens) == 1
        assert notebook_lint.problems(checkout / "notebooks" / "02_pruning.ipynb") == []
        cloned = []
        shell.system, shell.run_line_magic = cloned.append, lambda *a: None
        shell.run(notebook.cells[1].source)
        assert shell.names["repository"] == "https://github.com/some-one/some.name" and len(cloned) == 1
    notebook_lint.set_address("")
    assert contents(checkout) == before


def test_an_address_that_colab_cannot_open_is_refused(checkout, capsys):
    before = contents(checkout)
    with pytest.raises(BadSetting, match="not on GitHub"):
        notebook_lint.set_address("/somewhere/on/disk")
    assert contents(checkout) == before
    assert notebook_lint.main(["--badges", "/somewhere/on/disk"]) == 1 and "error:" in capsys.readouterr().err


def test_fixing_renews_the_bootstrap_from_the_template(checkout):
    path = checkout / "notebooks" / "02_pruning.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = 'if "google.colab" in sys.modules:\n    %pip install old'
    nbformat.write(notebook, path)
    assert "make lint" in " ".join(notebook_lint.problems(path))
    assert notebook_lint.main(["--fix"]) == 0
