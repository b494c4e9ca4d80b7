"""Apply a recipe from the command line: compress, save one folder, measure what was saved, record the row.

`python -m lmcompress.study.apply RECIPE.yaml --model MODEL --task TASK --save FOLDER`, or with the key of a
row of the report in place of the recipe, whose model and task are then the default.
"""

import argparse
import re
import sys
from pathlib import Path

from lmcompress.errors import BadSetting, StudyError, accept_any_encoding
from lmcompress.formats import FORMATS
from lmcompress.paths import RUNS
from lmcompress.study.options import parse_setting

KEY = re.compile("[0-9a-f]{16}")
_OPTIONS = {"limit": "--examples", "seed": "--seed", "timed": "--timed", "model": "--model", "task": "--task"}


def main(arguments: list[str] | None = None) -> int:
    """Apply the recipe; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcompress.study.apply", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("recipe", help="a .yaml file with a list of steps (see notebooks/recipes/), or the key of a row")
    add("--model", help="Hub id, folder, or pocket/<name>; default: that of the row")
    add(
        "--task",
        help="a task by name, or a file of your own (csv, jsonl, parquet, txt …); default: that of the row",
    )
    add("--results", type=Path, help="folder of the row (default: the rows of report.md)")
    add("--save", type=Path, required=True, help="new or empty folder for the model")
    add("--format", choices=FORMATS, default="transformers", help="what is written there (report/formats.md)")
    add("--examples", type=int, help="score so many examples only")
    add("--seed", type=int, help="default: that of the row, else 0")
    add("--timed", action="store_true", help="measure times and peak memory, too")
    add("--output", type=Path, default=RUNS / "recipes", help="folder for the recorded rows")
    add("-p", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="of the task")
    accept_any_encoding()
    options = parser.parse_args(arguments)
    try:
        row, dense_row, written = _apply(options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from lmcompress.results.labels import bytes_text, difference, label_of, with_interval

    size, dense_size = (bytes_text(measured["memory"]["file_bytes"]) for measured in (row, dense_row))
    metric = row["quality"]["metric"]
    away = f", dense {difference(row)} away" if row["quality"]["difference"] else ""
    print(f"{label_of(row)}\n{metric} {with_interval(row['quality'], metric)}{away}")
    print(
        f"{size}, dense {dense_size}; saved in {options.save}: "
        f"lmcompress.load_compressed({str(options.save)!r})"
    )
    if written:
        print(written)
    return 0


def _apply(options: argparse.Namespace) -> tuple[dict, dict, str]:
    """Return the row of the recipe, that of the dense model, and what a reader of another format gives."""
    from lmcompress.models import storage
    from lmcompress.results.store import published_rows
    from lmcompress.study import kept, recipes
    from lmcompress.study.study import Study

    model, task, seed = options.model, options.task, options.seed
    if KEY.fullmatch(options.recipe):
        row = next((row for row in published_rows(options.results) if row["key"] == options.recipe), None)
        if row is None:
            raise BadSetting(f"no row has the key {options.recipe}: give one of those in report.md.")
        steps, model, task = recipes.of_row(row), model or row["model"], task or row["task"]
        seed = row["seed"] if seed is None else seed
    else:
        steps = recipes.read(options.recipe)  # a bad recipe shall not wait for the model
    if missing := [f"--{name}" for name, given in (("model", model), ("task", task)) if not given]:
        raise BadSetting(f"give {' and '.join(missing)}: a recipe does not say what it is applied to.")
    task_settings = dict(parse_setting(text) for text in options.settings)
    if taken := [f"{name} is {_OPTIONS[name]}" for name in task_settings if name in _OPTIONS]:
        raise BadSetting(f"-p takes settings of the task: {', '.join(taken)}.")
    name = re.sub(r"[^A-Za-z0-9_.-]|^[.-]", "_", Path(options.recipe).stem)  # the rows' file has it
    study = Study(name, profile="recipe", folder=options.output, seed=options.seed or 0)
    if options.format == "transformers":  # a folder with something in it shall not wait for the model
        kept.refuse_others(options.save, study.store.rows(), own=study.folder)
    else:
        storage.check_target(options.save)
    baseline = study.baseline(model, task, limit=options.examples, timed=options.timed, **task_settings)
    measuring = {"timed": options.timed, "seed": seed}
    if options.format == "transformers":
        return baseline.measure_recipe(steps, keep=options.save, **measuring), baseline.dense, ""
    measured = study.folder / "formats" / name
    row = baseline.measure_recipe(steps, keep=measured, **measuring)
    return row, baseline.dense, _rewritten(measured, options, row, baseline)


def _rewritten(measured: Path, options: argparse.Namespace, row: dict, baseline) -> str:
    """Write the model that was measured in the format asked for; return how it compares, read back."""
    from lmcompress import formats
    from lmcompress.compress import TechniqueResult
    from lmcompress.results.labels import bytes_text
    from lmcompress.tasks.calibration import Calibration

    model, tokenizer = formats.load(measured)
    figures = dict(row["achieved"])
    report = TechniqueResult(row["technique"], figures.pop("layers"), figures)
    origin = {"tokenizer": tokenizer, "report": report, "base_name": row["model"]}
    formats.save(model, options.save, format=options.format, **origin)
    batches = baseline.calibration(Calibration(n=8, length=64))
    found = formats.round_trip(model, options.save, batches)
    size = bytes_text(found["bytes"])
    return (
        f"{options.format}, {size}, read back: logits differ from those measured by at most "
        f"{found['difference']:.2g} (their standard deviation is {found['spread']:.2g}); "
        f"{found['agreement']:.1%} of {found['predictions']:,} predictions on {found['examples']} examples "
        "are the same"
    )


if __name__ == "__main__":
    sys.exit(main())
