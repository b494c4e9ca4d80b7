"""Run the numbered notebooks headlessly, in order, skipping those whose every input is unchanged.

`python -m helpers.run.runner --profile pocket` executes with papermill into `runs/<profile>/notebooks/`. A
notebook is skipped whole when the fingerprint of its cells, parameters, models, data and imported code is the
one it last succeeded with; inside a notebook, rows that exist are skipped one by one. Light at import: the
second run of an unchanged study must not wait for torch.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import nbformat
import yaml

from helpers.parameters import check_kinds, from_folder
from helpers.run.execution import here, on_cluster, signs_of_life
from helpers.run.notebook_lint import code_cells
from lmcompress.code_digest import code_digest
from lmcompress.errors import BadSetting, StudyError, accept_any_encoding
from lmcompress.models.assets import file_hash
from lmcompress.paths import (
    DATA_RAW,
    MODELS,
    NOTEBOOKS,
    PROFILES,
    ROOT,
    RUNS,
    from_checkout,
    naming_write_errors,
    write_json,
)
from lmcompress.study.options import parse_setting

APPENDIX = 90  # notebooks from this number on are run only when asked for by number


def notebooks(only: list[str] | None = None) -> list[Path]:
    """Return the numbered notebooks in order; `only` picks by number or stem ("02", "02_pruning").

    Raises:
        AssetNotFound: there is no checkout.
        BadSetting: `only` names one that is not there.
    """
    paths = sorted(from_checkout(NOTEBOOKS).glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return [path for path in paths if int(path.stem[:2]) < APPENDIX]
    if unknown := set(only) - {name for path in paths for name in (path.stem[:2], path.stem)}:
        available = ", ".join(path.stem for path in paths)
        raise BadSetting(f"no notebook {', '.join(sorted(unknown))}; available: {available}")
    return [path for path in paths if path.stem[:2] in only or path.stem in only]


def load_profile(name: str) -> dict:
    """Return the parameters of `profiles/<name>.yaml`, a flat mapping as `papermill -f` takes it.

    Raises:
        BadSetting: no such profile, or a number that YAML read as text (write 1.0e-4, not 1e-4).
    """
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        available = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise BadSetting(f"no profile {name!r}; available: {available}")
    try:
        parameters = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise BadSetting(f"{path} holds no list of parameters, `name: value`: {error}") from error
    for key, value in parameters.items():
        if isinstance(value, str) and _is_number(value):
            raise BadSetting(f"{path.name}: {key}: {value} is text to YAML; write it as {float(value)!r}")
    return parameters


def declared_parameters(path: Path) -> dict[str, str]:
    """Return names and annotations of the cell tagged `parameters` of a notebook."""
    from papermill import inspect_notebook

    return {name: entry["inferred_type_name"] for name, entry in inspect_notebook(str(path)).items()}


def choose_parameters(path: Path, profile: dict, overrides: dict, legal: set[str]) -> dict:
    """Return what of `profile` and `overrides` the notebook `path` declares.

    Raises:
        BadSetting: an override that no chosen notebook declares (papermill itself would only warn), or a
            value of
            another kind than declared.
    """
    if unknown := sorted(set(overrides) - legal):
        raise BadSetting(
            f"no notebook has a parameter {', '.join(unknown)}; available: {', '.join(sorted(legal))}"
        )
    if "output" in overrides:
        raise BadSetting("the folder of a run is --output, not -p output")
    declared = declared_parameters(path)
    parameters = {name: value for name, value in (profile | overrides).items() if name in declared}
    check_kinds(parameters, declared)
    return parameters


def fingerprint(path: Path, parameters: dict, run: Path) -> str:
    """Return a hash of what a notebook's result depends on: cells, parameters, code, packages, inputs."""
    notebook = nbformat.read(path, as_version=4)
    digest = hashlib.sha256()
    digest.update(json.dumps([cell.source for cell in notebook.cells]).encode())
    digest.update(json.dumps(parameters, sort_keys=True).encode())
    digest.update(os.environ.get("ASSET_MIRROR", "").encode())
    for name in ("torch", "transformers", "numpy", "scipy", "pandas", "scikit-learn", "sympy", "matplotlib"):
        digest.update(f"{name}=={metadata.version(name)}".encode())
    for name in ("openvino", "nncf", "onnxruntime"):  # extras: a notebook goes on without them
        digest.update(f"{name}: {find_spec(name) is not None}".encode())
    # IPython's own lines (%pip, !git) import nothing of ours, and are no Python
    code = "\n".join(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source) for cell in code_cells(notebook))
    try:
        digest.update(code_digest([], code=code).encode())
    except SyntaxError as error:
        raise BadSetting(f"{path.name} has a cell that is no Python: {error.msg}: {error.text}") from error
    for weights in sorted(MODELS.glob("*/*/*.safetensors")):
        digest.update(f"{weights.parent.name} {file_hash(weights)}".encode())
    for stats in sorted(DATA_RAW.glob("pydocs/*/*.json")):
        digest.update(stats.parent.name.encode())
    digest.update(str((run / "notebooks" / path.name).is_file()).encode())  # its output, written last
    if _reads_rows(path):
        for rows in sorted((run / "rows").glob("*.jsonl")):
            if rows.stem != path.stem:
                digest.update(rows.read_bytes())
    return digest.hexdigest()[:16]


def _reads_rows(path: Path) -> bool:
    return bool(nbformat.read(path, as_version=4).metadata.get("study", {}).get("reads_rows"))


def waves(paths: list[Path], *, together: bool) -> list[list[Path]]:
    """Return `paths` in groups to run one after the other; a notebook that reads rows follows all others."""
    readers = [path for path in paths if _reads_rows(path)]
    makers = [path for path in paths if path not in readers]
    first = [makers] if together and makers else [[path] for path in makers]
    return first + [[path] for path in readers]


def run_profile(
    profile_name: str,
    *,
    only: list[str] | None = None,
    overrides: dict | None = None,
    force: bool = False,
    run: Path | None = None,
    cluster: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Run the profile's notebooks, on the Dask `cluster` if given.

    Returns:
        Seconds by notebook, in the order they ran; 0 for one that was skipped.
    """
    paths, profile, overrides = notebooks(only), load_profile(profile_name), dict(overrides or {})
    folder = run or RUNS / profile_name
    legal = set().union(*(declared_parameters(path) for path in paths))
    elsewhere = {"output": str(folder)} if folder != RUNS / profile_name else {}
    parameters = {path: choose_parameters(path, profile, overrides, legal) | elsewhere for path in paths}
    state_path = folder / "state.json"
    state, seconds = read_state(state_path, say), {}
    check_writable(folder)
    turns = waves(paths, together=cluster is not None)
    with on_cluster(cluster, folder) if cluster else here(folder, turns[-1][-1]) as execute:
        for wave in turns:
            due = {}
            for path in wave:
                finished = state.get(path.stem, {})
                if force or finished.get("fingerprint") != fingerprint(path, parameters[path], folder):
                    due[path] = parameters[path]
                    say(f"{path.stem}: running …")
                else:
                    seconds[path.stem] = 0.0
                    say(f"{path.stem}: unchanged since {finished['finished']}, skipped")
            with signs_of_life([path.stem for path in due], folder / "rows", say):
                for path, duration_s in execute(due):
                    state[path.stem] = {
                        "fingerprint": fingerprint(path, parameters[path], folder),
                        "seconds": round(duration_s, 1),
                        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
                    }
                    seconds[path.stem] = duration_s
                    write_json(state_path, state)
                    say(f"{path.stem}: {duration_s:.0f} s")
    return {path.stem: seconds[path.stem] for wave in turns for path in wave}


def read_state(path: Path, say: Callable[[str], None]) -> dict[str, dict]:
    """Return what `state.json` holds of each notebook; one that is cut counts as none, and that is said."""
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if all(entry.keys() >= {"fingerprint", "finished"} for entry in state.values()):
            return state
    except (ValueError, AttributeError):
        pass
    say(f"{path} is cut or not ours: every notebook counts as changed; recorded rows are skipped one by one")
    return {}


def check_writable(folder: Path) -> None:
    """Write and remove a file in `folder`, which is made if need be, before hours of work end at its door.

    Raises:
        NotWritable: nothing can be written there.
    """
    with naming_write_errors(folder / "rows"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers.run.runner", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="pocket", help="a file of profiles/ (default: pocket)")
    parser.add_argument("--only", action="append", metavar="NB", help="02 or 02_pruning; may be repeated")
    parser.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the notebooks; VALUE is YAML, paths are read from here",
    )
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/<profile>)")
    parser.add_argument("--force", action="store_true", help="run notebooks even where nothing changed")
    parser.add_argument(
        "--cluster", metavar="tcp://HOST:PORT", help="a Dask scheduler whose workers run them"
    )
    parser.add_argument("--no-report", action="store_true", help="do not write the report afterwards")
    accept_any_encoding()
    options = parser.parse_args(arguments)
    try:
        overrides = dict(parse_setting(text) for text in options.parameters)
        if Path.cwd() != ROOT:  # where kernels start
            overrides = {name: from_folder(value, Path.cwd()) for name, value in overrides.items()}
        run = options.output.resolve() if options.output else None
        run_profile(
            options.profile,
            only=options.only,
            overrides=overrides,
            force=options.force,
            run=run,
            cluster=options.cluster,
            say=partial(print, flush=True),
        )
        run = run or RUNS / options.profile
        if not options.no_report and any(run.glob("rows/*.jsonl")):  # one that fits a model records none
            from helpers.report import build_run

            print(build_run(run), flush=True)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from helpers.run import runner  # under its own name, by which a worker finds what it is sent

    sys.exit(runner.main())
