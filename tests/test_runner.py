"""The runner on small notebooks of its own: order, skipping, parameters, failures; and notebook_lint."""

import ast
import json
import logging
import os
import queue
import subprocess
import sys
import types
from importlib.metadata import version

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from IPython.utils.text import DollarFormatter

from helpers import parameters
from helpers.run import execution, notebook_lint, papermill_engine, runner
from lmcompress.errors import BadSetting, NotWritable
from lmcompress.paths import NOTEBOOKS

HEAVY = ("torch", "transformers", "pandas", "papermill", "distributed")


def write(folder, name, source, *, study=None, parameters="level: float = 0.5"):
    cells = [
        nbformat.v4.new_markdown_cell("# What is this?"),
        nbformat.v4.new_code_cell(notebook_lint.bootstrap()),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "study": study or {}})
    nbformat.write(notebook, folder / name)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with two notebooks: the first counts its runs in a file, the second reads rows."""
    for name in ("notebooks", "profiles", "run/rows"):
        (tmp_path / name).mkdir(parents=True)
    for name, folder in {"NOTEBOOKS": "notebooks", "PROFILES": "profiles", "MODELS": "models"}.items():
        monkeypatch.setattr(runner, name, tmp_path / folder)
    monkeypatch.setattr(runner, "DATA_RAW", tmp_path / "data")
    monkeypatch.setattr(execution, "PRELOAD", "pass")  # seconds per kernel
    (tmp_path / "profiles" / "pocket.yaml").write_text("profile: pocket\nlevel: 0.25\nnot_declared: 3\n")
    counter = f"open({str(tmp_path / 'run' / 'count.txt')!r}, 'a')"
    count, second = f"{counter}.write(f'{{level}} ')", f"{counter}.write('second ')"
    write(tmp_path / "notebooks", "00_first.ipynb", count, study={"artefacts": ["count.txt"]})
    write(
        tmp_path / "notebooks", "11_second.ipynb", second, study={"reads_rows": True}, parameters="n: int = 0"
    )
    return tmp_path


@pytest.fixture
def without_kernels(monkeypatch):
    """Return the calls of `run_notebook` (stem of a notebook, number of its kernel), and kernels stopped."""
    kernels, calls, stopped = iter(range(9)), [], []
    monkeypatch.setattr(execution, "start_kernel", lambda: next(kernels))
    monkeypatch.setattr(execution, "stop_kernel", stopped.append)
    monkeypatch.setattr(
        execution, "run_notebook", lambda path, *_, kernel: calls.append((path.stem, kernel)) or 1.5
    )
    return calls, stopped


def run(checkout, **settings):
    return runner.run_profile("pocket", run=checkout / "run", say=lambda text: None, **settings)


@pytest.mark.slow  # starts kernels: about a second each
def test_notebooks_run_in_order_are_skipped_when_unchanged_and_rerun_when_something_changed(checkout):
    count = checkout / "run" / "count.txt"
    run(checkout)
    assert count.read_text() == "0.25 second "
    assert run(checkout) == {"00_first": 0.0, "11_second": 0.0}
    run(checkout, overrides={"level": 0.75})
    assert count.read_text() == "0.25 second 0.75 "
    (checkout / "run" / "rows" / "02_other.jsonl").write_text("{}\n")
    run(checkout, overrides={"level": 0.75})
    assert count.read_text() == "0.25 second 0.75 second "
    (checkout / "run" / "notebooks" / "11_second.ipynb").unlink()
    run(checkout, overrides={"level": 0.75})
    assert count.read_text() == "0.25 second 0.75 second second "


def test_state_is_json_a_person_can_read_and_force_runs_what_is_unchanged(checkout, without_kernels):
    run(checkout)
    state = json.loads((checkout / "run" / "state.json").read_text())
    assert state["00_first"]["seconds"] == 1.5
    assert run(checkout, only=["00"]) == {"00_first": 0.0}
    assert run(checkout, only=["00"], force=True) == {"00_first": 1.5}


def test_the_next_kernel_starts_beside_each_notebook_but_the_last(checkout, without_kernels):
    ran, stopped = without_kernels
    run(checkout)
    assert ran == [("00_first", 0), ("11_second", 1)] and stopped == []
    run(checkout, overrides={"level": 0.5})  # the second is skipped: the kernel that waits for it ends
    assert ran[2:] == [("00_first", 2)] and stopped == [3]


def test_a_notebook_is_stale_when_code_it_imports_is(checkout, monkeypatch):
    path = checkout / "notebooks" / "00_first.ipynb"
    before = runner.fingerprint(path, {}, checkout)
    seen = []
    monkeypatch.setattr(runner, "code_digest", lambda files, code: seen.append(code) or "changed")
    assert runner.fingerprint(path, {}, checkout) != before
    assert ast.parse(seen[0]) and "level: float" in seen[0] and "%pip" not in seen[0]


ABOUT_ITSELF = """
import gc, json, os, sys
batch, frozen = os.environ['STUDY_BATCH'], gc.get_freeze_count() > 0
about = ['helpers.notebook' in sys.modules, frozen, gc.isenabled(), batch]
json.dump([os.getpid(), *about], open({!r}, 'w'))
from helpers import notebook
notebook.show(notebook.plt.subplots()[0])
"""


@pytest.mark.slow  # starts a kernel that loads everything
def test_a_kernel_begins_with_the_libraries_loaded_shows_figures_and_ends(tmp_path):
    write(tmp_path, "00_alone.ipynb", ABOUT_ITSELF.format(str(tmp_path / "about.json")))
    kernel = execution.start_kernel()
    execution.run_notebook(tmp_path / "00_alone.ipynb", {}, tmp_path, kernel=kernel)
    _, *about = json.loads((tmp_path / "about.json").read_text())
    assert about == [True, True, True, "1"] and not kernel.has_kernel
    cells = nbformat.read(tmp_path / "notebooks" / "00_alone.ipynb", as_version=4).cells
    assert sum("image/png" in out.get("data", {}) for c in cells for out in c.get("outputs", ())) == 1


@pytest.mark.slow  # starts kernels
@pytest.mark.parametrize(
    ("source", "artefacts", "message"),
    [
        ("raise RuntimeError('the cause')", [], "RuntimeError: the cause"),
        ("level", ["rows/00_first.jsonl"], "missing or empty"),
        ("import os; os.kill(os.getpid(), 9)", [], "kernel died, most likely .* memory ran out"),
    ],
)
def test_a_failing_notebook_stops_the_run_and_is_not_taken_for_done(checkout, source, artefacts, message):
    write(checkout / "notebooks", "00_first.ipynb", source, study={"artefacts": artefacts})
    pytest.raises(execution.NotebookFailed, run, checkout).match(message)
    assert not (checkout / "run" / "state.json").exists()


def test_bad_settings_list_what_is_available(checkout):
    (checkout / "profiles" / "bad.yaml").write_text("profile: bad\nlr: 1e-4\n")
    with pytest.raises(BadSetting, match="no notebook has a parameter levle; available: level, n"):
        run(checkout, overrides={"levle": 0.1})
    pytest.raises(BadSetting, run, checkout, only=["07"]).match("00_first, 11_second")
    with pytest.raises(BadSetting, match="available: bad, pocket"):
        runner.run_profile("poket", run=checkout / "run")
    pytest.raises(BadSetting, runner.load_profile, "bad").match("lr: 1e-4 is text")
    for text in ("- a list", "lr: [", "", "[" * 20_000):
        (runner.PROFILES / "bad.yaml").write_text(text)
        pytest.raises(BadSetting, runner.load_profile, "bad").match("bad.yaml holds no list of parameters")


def test_a_value_of_another_kind_or_an_output_beside_the_runs_own_is_refused_before_a_kernel_starts(checkout):
    for name, value, message in (
        ("level", "half", "level is 'half', a str; its type has to be float"),
        ("level", True, "type has to be float"),
        ("n", 0.5, "n is 0.5, a float; its type has to be int"),
        ("output", "mine", "no notebook has a parameter output|--output, not -p output"),
    ):
        pytest.raises(BadSetting, run, checkout, overrides={name: value}).match(message)


def test_what_papermill_injects_is_compared_with_the_annotations_of_the_parameters_cell():
    annotations = {"sparsities": list, "calls": int, "model": str}
    parameters.check_kinds({"sparsities": [0.5], "calls": 3, "model": ""}, annotations)
    with pytest.raises(BadSetting, match=r"sparsities is 0.5, a float; .* -y 'sparsities: \[0.5\]'"):
        parameters.check_kinds({"sparsities": 0.5}, annotations)
    cells = ["import os", "calls: int = 1", "# Parameters\ncalls = 2\nclals = 2\nqat_steps = 3\n", "setup()"]
    assert parameters.unknown_parameters(cells, annotations) == ["clals"]
    assert parameters.unknown_parameters(cells[:2], annotations) == []


def test_papermill_warns_once_of_a_profiles_other_parameters():
    assert papermill_engine.FirstOnly in {type(each) for each in logging.getLogger("papermill").filters}
    first_only = papermill_engine.FirstOnly()  # one that has seen nothing yet
    texts = [f"Passed unknown parameter: {name}" for name in ("first", "second", "third")] + ["another"]
    records = [logging.makeLogRecord({"msg": text}) for text in texts]
    assert [first_only.filter(record) for record in records] == [True, False, False, True]
    assert "the setup cell lists" in records[0].getMessage()


def test_paths_are_read_from_the_callers_folder(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("mine.csv", "model/config.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sst2").mkdir()  # a task's name stays one
    here = parameters.from_folder(["model", ["mine.csv", "pydocs-lm", "sst2", "", 3]], tmp_path)
    assert here == [str(tmp_path / "model"), [str(tmp_path / "mine.csv"), "pydocs-lm", "sst2", "", 3]]
    with pytest.raises(BadSetting, match=f"there is no file reviews.csv in {tmp_path}"):
        parameters.from_folder("reviews.csv", tmp_path)


@pytest.mark.parametrize("text", ["", '{"00_first": {"finger', "[]", '{"00_first": 3}'])
def test_a_cut_state_counts_as_none_and_is_reported(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    said = []
    (tmp_path / "file").write_text("")
    pytest.raises(NotWritable, runner.check_writable, tmp_path / "file" / "run").match("cannot write .*file")
    assert runner.read_state(tmp_path / "state.json", said.append) == {} and "every notebook" in said[0]


def test_rows_are_reported_on_the_way_where_no_bar_can_be_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "LIFE_S", 0.01)
    (tmp_path / "02_x.jsonl").write_text("{}\n{}\n")
    said = queue.Queue()
    with execution.signs_of_life(["02_x"], tmp_path, said.put):
        assert "02_x: running for 0 s, 2 rows recorded" in said.get(timeout=30)


MODULES = ("helpers.run.runner", "helpers.report", "helpers.run.notebook_lint")


@pytest.mark.parametrize("module", [*MODULES, "lmcompress.study.decision", "lmcompress.study.apply"])
def test_a_command_line_prints_where_stdout_is_ascii(module):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "300"}
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_runner_imports_nothing_heavy():
    code = f"import sys, helpers.run.runner; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_committed_notebook_is_in_order():
    assert [p for path in sorted(NOTEBOOKS.glob("*.ipynb")) for p in notebook_lint.problems(path)] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nb: nb.cells[3].update(source="\n".join(["x = 1"] * 41)), "more than 40 lines"),
        (lambda nb: nb.cells[2].metadata.update(tags=[]), "tagged `parameters`"),
        (lambda nb: nb.metadata.kernelspec.update(name="mine"), "kernel"),
        (lambda nb: nb.cells[0].update(source="A title"), "asks a question"),
        (lambda nb: nb.cells[3].update(source="%pip install x"), "installs packages"),
        (lambda nb: nb.cells[3].update(source="from torch import *"), "star import"),
        (lambda nb: nb.cells[1].update(source="%pip install this"), "not that of _template.ipynb"),
        (lambda nb: [nb.update(nbformat_minor=4), *(cell.pop("id") for cell in nb.cells)], "cell ids"),
    ],
)
def test_notebook_lint_finds(tmp_path, change, message):
    write(tmp_path, "00_x.ipynb", "print(1)")
    path = tmp_path / "00_x.ipynb"
    assert notebook_lint.problems(path) == []
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    path.write_text(json.dumps(notebook))
    (problem,) = notebook_lint.problems(path)
    assert message in problem


def test_every_profile_fits_the_notebooks_parameters():
    legal = set().union(*(runner.declared_parameters(path) for path in runner.notebooks()))
    for profile in ("pocket", "reference", "paper"):
        assert set(runner.load_profile(profile)) <= legal, profile


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_papermill_sees_every_parameter_that_python_sees(path):
    """An equals sign in a parameter's comment hides it from papermill, which then ignores what is passed."""
    cells = notebook_lint.code_cells(nbformat.read(path, as_version=4))
    source = next(cell.source for cell in cells if notebook_lint.is_parameters(cell))
    assigned = {node.target.id for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)}
    assert assigned == set(runner.declared_parameters(path))


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
    pinned = [f"{name}=={version(name)}" for name in ("torch", "numpy")]
    assert project.split("--editable ")[1].split() == [".", *pinned]
    assert "--no-deps" in apart and "--upgrade" not in project + apart
    makefile = (NOTEBOOKS.parent / "Makefile").read_text(encoding="utf-8")
    assert apart.removeprefix("install --quiet ") in makefile


def test_without_an_address_the_reader_is_asked(shell, colab):
    shell.names["input"] = lambda question: f"file://{shell.folder.parent}/origin"
    shell.run(notebook_lint.bootstrap())
    assert os.path.exists("pyproject.toml") and len(shell.pip) == 2


@pytest.fixture
def two_notebooks(tmp_path, monkeypatch):
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


def test_an_address_goes_into_badges_and_bootstrap_and_out_again(two_notebooks, shell, colab):
    notebook_lint.set_address("")
    before = contents(two_notebooks)
    for address in ("git@github.com:some-one/some.name.git", "https://github.com/some-one/some.name/"):
        notebook_lint.set_address(address)
        opens = "colab.research.google.com/github/some-one/some.name/blob/main/notebooks/02_pruning.ipynb"
        notebook = nbformat.read(two_notebooks / "notebooks" / "02_pruning.ipynb", as_version=4)
        assert notebook.cells[0].source.count(opens) == contents(two_notebooks)["README.md"].count(opens) == 1
        assert notebook_lint.problems(two_notebooks / "notebooks" / "02_pruning.ipynb") == []
        cloned = []
        shell.system, shell.run_line_magic = cloned.append, lambda *a: None
        shell.run(notebook.cells[1].source)
        assert shell.names["repository"] == "https://github.com/some-one/some.name" and len(cloned) == 1
    notebook_lint.set_address("")
    assert contents(two_notebooks) == before


def test_an_address_that_colab_cannot_open_is_refused(two_notebooks, capsys):
    before = contents(two_notebooks)
    pytest.raises(BadSetting, notebook_lint.set_address, "/somewhere/on/disk").match("not on GitHub")
    assert contents(two_notebooks) == before
    assert notebook_lint.main(["--badges", "/somewhere/on/disk"]) == 1 and "error:" in capsys.readouterr().err


def test_fixing_renews_the_bootstrap_from_the_template(two_notebooks):
    path = two_notebooks / "notebooks" / "02_pruning.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = 'if "google.colab" in sys.modules:\n    %pip install old'
    nbformat.write(notebook, path)
    assert "make lint" in " ".join(notebook_lint.problems(path))
    assert notebook_lint.main(["--fix"]) == 0
