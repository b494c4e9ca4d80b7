"""Time recorded rows again, each in several fresh processes: how far a time varies from run to run.

`python -m lmcompress.study.retime --run runs/reference` takes the rows that the decision names, or those
whose keys are given. Each is made and saved once; then every process loads it and its dense model and times
both. What a process found is a row of its own, so a second run goes on where the first stopped. Let nothing
else run meanwhile.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from lmcompress import device
from lmcompress.errors import BadSetting, StudyError, accept_any_encoding
from lmcompress.measure import fresh
from lmcompress.models import loading
from lmcompress.paths import RUNS, owned_folder
from lmcompress.results.rows import TIMED_AGAIN, is_dense, machine_name, model_task_of
from lmcompress.results.store import Row, RowStore
from lmcompress.study import decision, recipes
from lmcompress.study.baseline import Baseline
from lmcompress.study.options import parse_setting
from lmcompress.study.study import Study
from lmcompress.tasks import load_task

PROCESSES, CALLS, LENGTH = 3, 40, 128
VERSION = 1


def named_keys(rows: Iterable[Row]) -> list[str]:
    """Return the keys of the configurations that the decision names for their time, each once."""
    rows = decision.comparable_rows(rows)
    groups = {pair: [row for row in rows if model_task_of(row) == pair] for pair in map(model_task_of, rows)}
    answers = [entry for group in groups.values() for entry in decision.named(decision.options(group))]
    return list(dict.fromkeys(option.key for _, shape, option in answers if shape is not None))


def retime(
    row: Row,
    run: Path,
    *,
    processes: int = PROCESSES,
    calls: int = CALLS,
    length: int = LENGTH,
    model: str | None = None,
    task: str | None = None,
    **task_settings,
) -> list[Row]:
    """Return the rows of the times of `row`'s configuration in each process, measured unless recorded.

    They go into the file of `row`'s notebook in the folder `run`. `model` and `task` say where a model given
    by folder, or data of one's own, lie; else they are the row's.
    """
    if is_dense(row):
        raise BadSetting(
            f"{row['key']} is the dense model, which others are timed beside: give one of theirs."
        )
    study = Study(row["notebook"], row["profile"], run, calls=calls, length=length)
    loaded = loading.load(model or row["model"], device=study.device)
    if loaded.hash != (recorded := row["provenance"]["model_hash"]):
        raise BadSetting(
            f"row {row['key']} was measured on a model of the hash {recorded}, and {loaded.path} has "
            f"{loaded.hash}: say where that model lies, --model FOLDER (in Python model=)."
        )
    limit = row["provenance"]["n_examples"]
    baseline = Baseline(
        study, loaded, load_task(task or row["task"], limit=limit, model=loaded, **task_settings)
    )
    options = {"device": study.device, "calls": calls, "length": length}
    machine = f"{machine_name(device.machine())}, {torch.get_num_threads()} threads"
    timing = {"of": row["key"], "machine": machine}  # part of the key; what is usual adds nothing
    timing |= {"calls": calls} if calls != CALLS else {}
    timing |= {"length": length} if length != LENGTH else {}
    with owned_folder(study.folder / "scratch", "times-") as holder:

        def times(process: int) -> dict:
            if not (folder := holder / "model").exists():
                baseline.make(recipes.of_row(row), folder, seed=row["seed"])
            arguments = str(folder), str(loaded.path), json.dumps(options | {"seed": process})
            doing = f"timing {row['key']}"
            taken = fresh.run("lmcompress.measure.times", *arguments, doing=doing)
            shapes = [{"shape": name, **shape} for name, shape in taken.pop("shapes").items()]
            return taken | {"shapes": shapes}

        return [
            baseline.record(
                TIMED_AGAIN,
                VERSION,
                settings=timing | {"process": process},
                compute=lambda process=process: times(process),
            )
            for process in range(processes)
        ]


def main(arguments: list[str] | None = None) -> int:
    """Time rows again on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcompress.study.retime", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("keys", nargs="*", metavar="KEY", help="of rows; default: those that the decision names")
    add("--run", type=Path, default=RUNS / "pocket", help="folder of the run (runs/pocket)")
    add("--processes", type=int, default=PROCESSES, help=f"that each is timed in (default: {PROCESSES})")
    add("--calls", type=int, default=CALLS, help=f"timed calls of each model and shape (default: {CALLS})")
    add(
        "--length",
        type=int,
        default=LENGTH,
        help=f"tokens of each sequence in a timed call (default: {LENGTH})",
    )
    add("--model", help="where the model lies, if the rows are of a folder")
    add("--task", help="where the data lie, if the rows are of a file of your own")
    add("-p", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="of the task")
    accept_any_encoding()
    options = parser.parse_args(arguments)
    try:
        store = RowStore(options.run / "rows")
        by_key = {row["key"]: row for row in store.recorded()}  # with names that load, not those of display
        keys = options.keys or named_keys(store.rows())
        if unknown := [key for key in keys if key not in by_key]:
            raise BadSetting(
                f"{options.run / 'rows'} has no row {', '.join(unknown)}: give keys of its rows."
            )
        if not keys:
            raise BadSetting(
                f"no row of {options.run / 'rows'} is named for its time: give the keys of rows."
            )
        timing = dict(map(parse_setting, options.settings)) | {
            name: getattr(options, name) for name in ("processes", "calls", "length", "model", "task")
        }
        for key in keys:
            for again in retime(by_key[key], options.run, **timing):
                ratios = {s["shape"]: round(s["ratio"], 3) for s in again["achieved"]["shapes"]}
                print(key, by_key[key]["technique"], f"process {again['settings']['process']}:", ratios)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
