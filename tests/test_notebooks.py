"""One real headless pass of every numbered notebook, on the pocket models with a very small budget."""

import nbformat
import pytest

from helpers import report
from helpers.report import check
from helpers.run import runner
from lmcompress.results.store import RowStore

SMALL = {
    "calls": 3,
    "encoder_examples": 32,
    "decoder_examples": 20,
    "encoder_decoder_examples": 20,
    "sparsities": [0.5],
    "recovered_sparsities": [0.5],
    "recovery_steps": 2,
    "movement_steps": 2,
    "calibration_examples": 8,
    "sweep_iterations": 2,
    "replacement_examples": 4,
    "vocabulary_texts": 200,
    "first_students": ["copied"],
    "distil_steps": 2,
    "other_steps": 1,
    "distil_batch": 4,
    "other_batch": 2,
    "validation_examples": 2,
    "other_validation": 1,
    "temperatures": [],
    "cache_examples": 4,
    "backend_models": 0,
    "timed_techniques": [],
    "rounded": [[4, 0]],
    "scan_examples": 4,
    "qat_steps": 2,
    "kept_fractions": [0.5],
    "other_fractions": [],
    "first_bases": ["stacked"],
    "recovery_batch": 2,
    "recoveries": ["lora-per-block"],
    "first_trained": [],
    "other_trained": [],
    "glam_thresholds": [2.0],
    "glam_every": 1,
    "part_models": 0,
    "hadamard_models": 0,
    "speed_rows": [8],
    "speed_ranks": [0.5],
    "moe_timed_models": 0,
    "relu_active": [8],
    "architecture_tokens": 8192,
    "architecture_layers": [5],
    "architecture_controls": [[5, "linear"]],
    "architecture_timed": [[5, "shared"]],
    "architecture_seeds": [0],
    "architecture_examples": 20,
    "continued_examples": 20,
    "sheared_examples": 20,
    "sheared_steps": 2,
    "sheared_batch": 2,
    "sheared_share": 0.5,
    "sheared_timed": False,
    "sheared_validation": 2,
    "context_examples": 20,
    "switches": ["gradient checkpointing"],
    "switch_steps": 1,
    "switch_batch": 1,
    "chain_models": 2,
    "chain_steps": 1,
    "other_chain_steps": 1,
    "single_steps": [],
    "texts": [["pydocs-lm", 20]],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    seconds = runner.run_profile("pocket", run=folder, overrides=SMALL)
    report.build_run(folder)
    return folder, seconds


@pytest.mark.slow  # runs the study itself, a minute or two; the first time it harvests the text as well
def test_the_notebooks_run_and_the_report_is_current_with_its_rows(run):
    folder, seconds = run
    assert set(seconds) == {path.stem for path in runner.notebooks()} and all(s > 0 for s in seconds.values())
    assert list(seconds)[-1] == "11_comparison", "what reads all rows runs last"
    rows = RowStore(folder / "rows").rows()
    kinds = {(row["notebook"], row["technique"]) for row in rows}
    assert {
        ("00_start_here", "dense"),
        ("02_pruning", "magnitude-global"),
        ("02_pruning", "kernels"),
        ("03_structured_pruning", "heads-ffn"),
        ("03_structured_pruning", "textpruner"),
        ("03_structured_pruning", "drop-blocks"),
        ("03_structured_pruning", "vocabulary"),
        ("03_structured_pruning", "block-replacement"),
        ("03_structured_pruning", "time-shares"),
        ("04_distillation", "student"),
        ("04_distillation", "distil"),
        ("04_distillation", "teacher-cache"),
        ("06_low_rank_and_sharing", "redundancy"),
        ("06_low_rank_and_sharing", "global-basis"),
        ("06_low_rank_and_sharing", "glam"),
        ("06_low_rank_and_sharing", "layer-speed"),
        ("05_quantization", "gptq"),
        ("05_quantization", "qat"),
        ("05_quantization", "sensitivity-bits"),
        ("05_quantization", "stored-integers"),
        ("07_moefication", "activation-sparsity"),
        ("07_moefication", "relufy"),
        ("07_moefication", "moefy"),
        ("08_architecture_training", "architecture"),
        ("08_architecture_training", "parameter-counts"),
        ("08_architecture_training", "training-speed"),
        ("09_sheared_llama", "sheared"),
        ("09_sheared_llama", "scratch-shape"),
        ("09_sheared_llama", "context-lengths"),
        ("09_sheared_llama", "switch"),
        ("10_combinations", "chain"),
        ("10_combinations", "refused"),
        ("12_other_text", "dense"),
    } <= kinds
    assert any(row["settings"].get("recovery") for row in rows)
    problems = check.check(report=folder / "report.md", images=folder / "images", rows=rows)
    assert problems == []


@pytest.mark.slow  # see above
def test_a_second_run_skips_every_notebook_and_redraws_nothing(run):
    folder, _ = run
    again = runner.run_profile("pocket", run=folder, overrides=SMALL, say=lambda text: None)
    assert set(again.values()) == {0.0}
    assert "0 of" in report.build_run(folder)


@pytest.mark.slow  # see above
def test_the_executed_notebooks_carry_their_outputs(run):
    folder, _ = run
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert all(cell.execution_count for cell in code if cell.source), path.name
        assert (
            any("image/png" in out.get("data", {}) for c in code for out in c.outputs)
            or path.stem[:2] == "00"
        )
