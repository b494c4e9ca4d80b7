"""One real headless pass of every numbered notebook, on the pocket models with a very small budget."""

from pathlib import Path

import nbformat
import pytest
import yaml

from helpers import report
from helpers.report import check
from helpers.run import runner
from lmcompress.models.anatomy import anatomy
from lmcompress.models.loading import load
from lmcompress.models.surgery import drop_blocks
from lmcompress.results.store import RowStore
from lmcompress.study.decision import configuration_of, configurations

SMALL_RUN = yaml.safe_load(Path(__file__).with_name("small_run.yaml").read_text(encoding="utf-8"))
SMALL = SMALL_RUN["parameters"]


def shortened(name, folder):
    """Save a committed model with the first two blocks of each stack, which take a third of the time."""
    loaded = load(name)
    depths = {stack: len(blocks) for stack, blocks in anatomy(loaded.model).stacks.items()}
    model = drop_blocks(loaded.model, {stack: range(2, depth) for stack, depth in depths.items()})
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, models = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("models")
    short = {"encoder": "minilm-pydocs", "encoder_decoder": "t5-pydocs"}
    short = {kind: shortened(f"pocket/{name}", models / name) for kind, name in short.items()}
    asked = {"run": folder, "overrides": SMALL | short}
    seconds = runner.run_profile("pocket", **asked)
    report.build_run(folder)
    return asked, seconds


@pytest.mark.slow  # runs the study itself, a minute or two; the first time it harvests the text as well
def test_the_notebooks_run_and_the_report_is_current_with_its_rows(run):
    asked, seconds = run
    folder = asked["run"]
    assert set(seconds) == {path.stem for path in runner.notebooks()} and all(s > 0 for s in seconds.values())
    assert list(seconds)[-1] == "11_comparison", "what reads all rows runs last"
    rows = RowStore(folder / "rows").rows()
    kinds = {(row["notebook"], row["technique"]) for row in rows}
    expected = {(notebook, name) for notebook, names in SMALL_RUN["rows"].items() for name in names}
    assert expected <= kinds
    assert any(row["settings"].get("recovery") for row in rows)
    assert (folder / "report" / "00_start_here.md").is_file(), "a page without a section"
    problems = check.check(report=folder / "report.md", images=folder / "images", rows=rows)
    own = [problem for problem in problems if not problem.startswith("template ")]
    assert own == [], "sentences of the study that a small run does not bear out are left out of its report"


@pytest.mark.slow  # see above
def test_a_second_run_skips_every_notebook_and_redraws_nothing(run):
    asked, _ = run
    again = runner.run_profile("pocket", **asked, say=lambda text: None)
    assert set(again.values()) == {0.0}
    assert "0 of" in report.build_run(asked["run"])


@pytest.mark.slow  # see above
def test_the_executed_notebooks_carry_their_outputs(run):
    asked, _ = run
    for path in sorted((asked["run"] / "notebooks").glob("*.ipynb")):
        code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert all(cell.execution_count for cell in code if cell.source), path.name
        drawn = any("image/png" in out.get("data", {}) for c in code for out in c.outputs)
        assert drawn or path.stem[:2] == "00"


@pytest.mark.slow  # one notebook, half a minute
def test_a_further_model_is_asked_for_the_configurations_of_the_list(tmp_path):
    asked = [steps for steps in configurations() if steps[0].get("technique") in ("rtn", "drop-blocks")]
    names = {step.get("technique", "recovery") for steps in configurations() for step in steps}
    few = {
        "more": [["pocket/llama-pydocs", "pydocs-lm", 8]],
        "left_out": sorted(names - {"rtn", "drop-blocks", "recovery"}),
    }
    few |= {"calibration_examples": 4, "recovery_steps": 1, "recovery_batch": 2}
    runner.run_profile("pocket", only=["11"], overrides=few, run=tmp_path, say=lambda text: None)
    dense, control, *rows = RowStore(tmp_path / "rows").rows()
    assert not dense["settings"] and control["settings"]["recovery"]["steps"] == 1  # of the dense model, too
    assert [configurations()[configuration_of(row)] for row in rows] == asked
    assert rows[-1]["settings"]["recovery"]["steps"] == 1 and rows[-1]["settings"]["calibration"]["n"] == 4
