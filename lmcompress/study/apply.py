"""Apply a recipe from the command line: compress, save one folder, measure what was saved, record the row.

`python -m lmcompress.study.apply RECIPE.yaml --model MODEL --task TASK --save FOLDER`
"""

import argparse
import sys
from pathlib import Path

from lmcompress.errors import StudyError, accept_any_encoding
from lmcompress.paths import RUNS
from lmcompress.study.options import parse_setting


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcompress.study.apply", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", type=Path, help="a .yaml file with a list of steps; see notebooks/recipes/")
    parser.add_argument("--model", required=True, help="Hub id, folder, or pocket/<name>")
    parser.add_argument("--task", required=True, help="a task by name, or a .csv or .jsonl of labelled text")
    parser.add_argument(
        "--save", type=Path, required=True, help="folder for the model; storage.load reads it"
    )
    parser.add_argument("--examples", type=int, help="score so many examples only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed", action="store_true", help="measure times and peak memory, too")
    parser.add_argument("--output", type=Path, default=RUNS / "recipes", help="folder for the recorded rows")
    parser.add_argument(
        "-p", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="of the task"
    )
    accept_any_encoding()
    options = parser.parse_args(arguments)
    try:
        row, dense = _apply(options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from lmcompress.results.labels import bytes_text, difference, label_of, with_interval

    size, base = (bytes_text(one["memory"]["file_bytes"]) for one in (row, dense))
    metric = row["quality"]["metric"]
    print(f"{label_of(row)}\n{metric} {with_interval(row['quality'], metric)}, dense {difference(row)} away")
    print(
        f"{size}, dense {base}; saved in {options.save}: lmcompress.models.storage.load({str(options.save)!r})"
    )
    return 0


def _apply(options: argparse.Namespace) -> tuple[dict, dict]:
    """The row of the recipe and that of the dense model."""
    from lmcompress.study import recipes
    from lmcompress.study.study import Study

    steps = recipes.read(options.recipe)  # a bad recipe shall not wait for the model
    study = Study(options.recipe.stem, profile="recipe", folder=options.output, seed=options.seed)
    task_settings = dict(parse_setting(text) for text in options.settings)
    subject = study.baseline(
        options.model, options.task, limit=options.examples, timed=options.timed, **task_settings
    )
    return subject.measure_recipe(steps, keep=options.save, timed=options.timed), subject.dense


if __name__ == "__main__":
    sys.exit(main())
