"""The runner on small notebooks of its own: order, skipping, parameters, failures; and notebook hygiene."""

import ast
import json
import subprocess
import sys

import nbformat
import pytest

from helpers.run import ahead, execution, notebook_lint, runner
from lmcompress.errors import BadSetting
from lmcompress.paths import NOTEBOOKS


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
def house(tmp_path, monkeypatch):
    """A checkout with two notebooks: the first counts its runs in a file, the second reads rows."""
    for name in ("notebooks", "profiles", "run/rows"):
        (tmp_path / name).mkdir(parents=True)
    for name, folder in {"NOTEBOOKS": "notebooks", "PROFILES": "profiles", "MODELS": "models"}.items():
        monkeypatch.setattr(runner, name, tmp_path / folder)
    monkeypatch.setattr(runner, "DATA_RAW", tmp_path / "data")
    monkeypatch.setattr(ahead, "PRELOAD", "pass")  # seconds per kernel
    monkeypatch.setattr(ahead, "start", lambda: None)
    (tmp_path / "profiles" / "pocket.yaml").write_text("profile: pocket\nlevel: 0.25\nnot_declared: 3\n")
    runs = tmp_path / "run" / "count.txt"
    write(
        tmp_path / "notebooks", "00_first.ipynb",
        f"open({str(runs)!r}, 'a').write(f'{{level}} ')", study={"artefacts": ["count.txt"]},
    )  # fmt: skip
    write(
        tmp_path / "notebooks", "11_second.ipynb",
        f"open({str(runs)!r}, 'a').write('second ')", study={"reads_rows": True}, parameters="nothing: int = 0",
    )  # fmt: skip
    return tmp_path


def run(house, **settings):
    return runner.run_profile("pocket", run=house / "run", say=lambda text: None, **settings)


@pytest.mark.slow  # starts kernels: about a second each
def test_notebooks_run_in_order_are_skipped_when_unchanged_and_rerun_when_something_did(house):
    counted = house / "run" / "count.txt"
    run(house)
    assert counted.read_text() == "0.25 second "
    assert run(house) == {"00_first": 0.0, "11_second": 0.0}
    run(house, overrides={"level": 0.75})
    assert counted.read_text() == "0.25 second 0.75 "
    (house / "run" / "rows" / "02_other.jsonl").write_text("{}\n")
    run(house, overrides={"level": 0.75})
    assert counted.read_text() == "0.25 second 0.75 second "
    run(house, only=["00"], overrides={"level": 0.75}, force=True)
    assert counted.read_text() == "0.25 second 0.75 second 0.75 "


ABOUT_ITSELF = """
import gc, json, os, sys
found = ['helpers.notebook' in sys.modules, gc.get_freeze_count() > 0, gc.isenabled(), bool(os.environ['STUDY_BATCH'])]
json.dump([os.getpid(), *found], open({!r}, 'w'))
from helpers import notebook
notebook.show(notebook.plt.subplots()[0])
"""


def figures(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    return sum("image/png" in out.get("data", {}) for cell in cells for out in cell.get("outputs", ()))


@pytest.mark.slow  # starts a kernel that loads everything
def test_a_kernel_begins_with_the_libraries_loaded_and_looks_for_garbage_again(tmp_path):
    write(tmp_path, "00_alone.ipynb", ABOUT_ITSELF.format(str(tmp_path / "said.json")))
    execution.run_notebook(tmp_path / "00_alone.ipynb", {}, tmp_path)
    assert json.loads((tmp_path / "said.json").read_text())[1:] == [True, True, True, True]
    assert figures(tmp_path / "notebooks" / "00_alone.ipynb") == 1


@pytest.mark.slow  # starts kernels that load everything
def test_the_interpreter_started_ahead_becomes_the_kernel_and_a_dead_one_is_replaced(tmp_path):
    write(tmp_path, "00_alone.ipynb", ABOUT_ITSELF.format(str(tmp_path / "said.json")))
    for dead in (False, True):
        interpreter = ahead.start()
        if dead:
            interpreter.kill()
            interpreter.wait()
        execution.run_notebook(tmp_path / "00_alone.ipynb", {}, tmp_path, interpreter=interpreter)
        pid, *found = json.loads((tmp_path / "said.json").read_text())
        assert (pid == interpreter.pid) is not dead and found == [True, True, True, True]
        assert figures(tmp_path / "notebooks" / "00_alone.ipynb") == 1
        assert interpreter.poll() is not None, "it ends with its notebook"


@pytest.mark.slow  # starts an interpreter
def test_an_interpreter_nobody_takes_does_not_outlive_us():
    interpreter = ahead.start()
    interpreter.stdin.close()  # as when this process ends
    assert interpreter.wait(timeout=120) == 0
    another = ahead.start()
    ahead.dismiss(another)
    assert another.poll() is not None


def test_the_next_interpreter_starts_beside_each_notebook_but_the_last(house, monkeypatch):
    made, used, dismissed = iter("abc"), [], []
    monkeypatch.setattr(ahead, "start", lambda: next(made))
    monkeypatch.setattr(ahead, "dismiss", dismissed.append)
    monkeypatch.setattr(
        execution, "run_notebook", lambda path, *a, interpreter: used.append((path.stem, interpreter)) or 1.0
    )
    run(house)
    assert used == [("00_first", None), ("11_second", "a")] and dismissed == [None]
    run(house, only=["00"], force=True)
    assert used[2:] == [("00_first", None)] and dismissed == [None, None]


def test_an_unknown_parameter_is_refused_and_the_known_ones_listed(house):
    with pytest.raises(BadSetting, match="no notebook has a parameter levle; available: level, nothing"):
        run(house, overrides={"levle": 0.1})


def test_unknown_notebooks_and_profiles_list_what_there_is(house):
    with pytest.raises(BadSetting, match="00_first, 11_second"):
        run(house, only=["07"])
    with pytest.raises(BadSetting, match="available: pocket"):
        runner.run_profile("poket", run=house / "run")


def test_a_number_that_yaml_reads_as_text_is_refused(house):
    (house / "profiles" / "bad.yaml").write_text("profile: bad\nlr: 1e-4\n")
    with pytest.raises(BadSetting, match="lr: 1e-4 is text"):
        runner.load_profile("bad")


@pytest.mark.slow  # starts kernels
def test_a_failing_notebook_stops_the_run_and_is_not_taken_for_done(house):
    write(house / "notebooks", "00_first.ipynb", "raise RuntimeError('the cause')")
    for _ in range(2):
        with pytest.raises(execution.NotebookFailed, match="RuntimeError: the cause"):
            run(house)


@pytest.mark.slow  # starts a kernel
def test_a_declared_artefact_has_to_be_there(house):
    write(house / "notebooks", "00_first.ipynb", "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass",
          study={"artefacts": ["rows/00_first.jsonl"]})  # fmt: skip
    with pytest.raises(execution.NotebookFailed, match="missing or empty"):
        run(house)


def test_the_runner_imports_nothing_heavy():
    code = "import sys, helpers.run.runner; print([m for m in ('torch', 'transformers', 'pandas', 'dask', 'distributed') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_committed_notebook_is_stripped_and_in_order():
    assert [p for path in sorted(NOTEBOOKS.glob("*.ipynb")) for p in notebook_lint.problems(path)] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda nb: nb.cells[3].update(execution_count=3), "execution counts"),
        (lambda nb: nb.cells[3].update(source="\n".join(["x = 1"] * 41)), "more than 40 lines"),
        (lambda nb: nb.cells[2].metadata.update(tags=[]), "tagged `parameters`"),
        (lambda nb: nb.metadata.kernelspec.update(name="mine"), "kernel"),
        (lambda nb: nb.cells[0].update(source="A title"), "asks a question"),
        (lambda nb: nb.cells[3].update(source="%pip install x"), "installs packages"),
        (lambda nb: nb.cells[3].update(source="from torch import *"), "star import"),
        (lambda nb: nb.cells[1].update(source="%pip install this"), "not that of _template.ipynb"),
    ],
)
def test_hygiene_finds(tmp_path, change, said):
    write(tmp_path, "00_x.ipynb", "print(1)")
    path = tmp_path / "00_x.ipynb"
    assert notebook_lint.problems(path) == []
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)
    assert said in " ".join(notebook_lint.problems(path))


def test_every_profile_fits_the_notebooks_parameters():
    known = set().union(*(runner.declared_parameters(path) for path in runner.notebooks()))
    for profile in ("pocket", "reference", "paper"):
        assert set(runner.load_profile(profile)) <= known, profile


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_papermill_sees_every_parameter_that_python_sees(path):
    """An equals sign in a parameter's comment hides it from papermill, which then ignores what is passed."""
    cell = next(
        c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])
    )
    assigned = {node.target.id for node in ast.parse(cell.source).body if isinstance(node, ast.AnnAssign)}
    assert assigned == set(runner.declared_parameters(path))


def test_state_is_json_a_person_can_read(house, monkeypatch):
    monkeypatch.setattr(execution, "run_notebook", lambda *a, **how: 1.5)
    run(house)
    state = json.loads((house / "run" / "state.json").read_text())
    assert state["00_first"]["seconds"] == 1.5
