"""What the notebooks share: a study to record into, the standard baselines, tables, figures and progress.

A notebook keeps the idea it teaches; loading, timing, recording and styling are here and in `lmcompress`.
"""

import atexit
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from IPython.display import display
from tqdm.auto import tqdm

from helpers.figures import core
from helpers.parameters import check_kinds, unknown_parameters
from lmcompress import device
from lmcompress.errors import BadSetting
from lmcompress.models.loading import ModelKind
from lmcompress.paths import PROFILES, RUNS
from lmcompress.results.frame import COLUMNS, frame
from lmcompress.study.baseline import Baseline
from lmcompress.study.cluster import SHARED
from lmcompress.study.study import Recovery, Study
from lmcompress.timing_lock import at_work
from lmcompress.train.encoder import finetune_encoder

T = TypeVar("T")
ModelTask = tuple[str, str, int]  # model, task, how many examples are scored
DENSE_COLUMNS = {
    "model": "model",
    "task": "task",
    "metric": "metric",
    "value": "value",
    "low": "low",
    "high": "high",
    "parameters": "parameters",
    "size_bytes": "bytes",
    "flops": "FLOPs per call",
}


def setup(
    name: str, *, profile: str = "pocket", output: str = "", calls: int = 30, length: int = 128, seed: int = 0
) -> Study:
    """Open the study of notebook `name`, style the figures, and print versions, device and seed.

    Args:
        output: folder of this run; empty means `runs/<profile>`.
        calls: timed calls per variant and shape; at least 30 for numbers worth recording.
        length: tokens of each sequence in a timed call.

    Raises:
        BadSetting: `profile` is not a file of `profiles/`, `calls` or `length` is below 1, or a parameter of
            the
            notebook is of another kind than its cell says.
    """
    _check_parameters()
    profiles = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if profiles and profile not in profiles:
        raise BadSetting(f"no profile {profile!r}; available: {', '.join(profiles)} (files of {PROFILES})")
    if calls < 1:
        raise BadSetting(f"calls is {calls}: a time needs at least one call, and an interval about 30")
    if length < 1:
        raise BadSetting(f"timed length is {length}: a timed call needs at least one token")
    if os.environ.get(SHARED):
        until_exit = ExitStack()
        until_exit.enter_context(at_work())
        atexit.register(until_exit.close)
    core.use_style()
    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(output) if output else RUNS / profile
    chosen = device.choose()
    print(
        f"{name} · profile {profile} · rows in {_short(folder)}\npython {sys.version.split()[0]} · torch "
        f"{torch.__version__} · transformers {transformers.__version__}\ndevice {chosen.device} "
        f"({chosen.reason}) · {torch.get_num_threads()} threads · seed {seed}"
    )
    return Study(name, profile=profile, folder=folder, calls=calls, length=length, seed=seed)


def _check_parameters() -> None:
    """Compare the notebook's variables with the annotations of its parameters cell; print unknown names."""
    notebook = vars(sys.modules["__main__"])
    annotations = notebook.get("__annotations__", {})
    check_kinds({name: notebook[name] for name in annotations if name in notebook}, annotations)
    if unknown := unknown_parameters(notebook.get("In", []), annotations):
        print(
            f"not used, because no notebook has them: {', '.join(unknown)}; here are {', '.join(annotations)}"
        )


def load_baselines(
    study: Study,
    models: Sequence[ModelTask],
    *,
    timed: int | None = None,
    encoder_epochs: float = 0.0,
    encoder_train: str = "",
) -> list[Baseline]:
    """Load models with their tasks, measure the dense ones unless recorded, and display them as a table.

    Args:
        models: model, task and number of examples each; one whose model is "" is left out.
        timed: how many of them, in order, are timed; None times all.
        encoder_epochs: fine-tune the first model on its task before, for so many epochs; loaded from the
            study's folder if it is there.
        encoder_train: a file of labelled texts like the first model's task, to train on.
    """
    encoder, *others = [*models] or [("", "", 0)]
    settings = {"train_path": encoder_train} if encoder_train and encoder[0] else {}
    if encoder_epochs and encoder[0]:
        name, task, examples = encoder
        folder = study.folder / "models" / f"{Path(name).name}-{Path(task).stem}"
        tuned = finetune_encoder(name, task, folder, epochs=encoder_epochs, task_settings=settings)
        encoder = (str(tuned), task, examples)
    baselines = []
    for model, task, examples in (entry for entry in (encoder, *others) if entry[0]):
        is_timed = timed is None or len(baselines) < timed
        baselines.append(study.baseline(model, task, limit=examples, timed=is_timed, **settings))
        settings = {}
    display(table([baseline.dense for baseline in baselines], DENSE_COLUMNS))
    return baselines


def budgets(baseline: Baseline, usual: Recovery, by_kind: Mapping[str, Sequence]) -> list[Recovery]:
    """Return the budgets for what a finding hangs on, shortest first.

    Args:
        usual: what they share, and the only one for a kind of model that is not in `by_kind`.
        by_kind: kind of model, as "encoder" → lists of steps, batch size, and learning rates if of its own.

    Raises:
        BadSetting: `by_kind` has another name, or a list is too short.
    """
    pairs = for_kind(baseline, by_kind, [[usual.steps, usual.batch_size]])
    try:
        runs = [(steps, size, rates or usual.learning_rate) for steps, size, *rates in pairs]
        return [
            replace(usual, steps=steps, batch_size=size, learning_rate=rate) for steps, size, rate in runs
        ]
    except (TypeError, ValueError) as error:
        raise BadSetting(f"budgets {pairs!r}: give steps and examples per step, [[60, 8]]") from error


def for_kind(baseline: Baseline, by_kind: Mapping[str, T], usual: T) -> T:
    """Return what a parameter gives for this kind of model, as "encoder" → 5e-5, else `usual`.

    Raises:
        BadSetting: `by_kind` names a kind that does not exist.
    """
    if unknown := sorted(set(by_kind) - set(get_args(ModelKind))):
        raise BadSetting(f"no kind of model {', '.join(unknown)}; there are {', '.join(get_args(ModelKind))}")
    return by_kind.get(baseline.loaded.kind, usual)


def in_batch() -> bool:
    """Return True if nobody is watching: the runner sets STUDY_BATCH, and progress bars keep quiet."""
    return bool(os.environ.get("STUDY_BATCH"))


def progress(items: Iterable[T], *, label: str) -> Iterable[T]:
    """Yield `items`, with a progress bar in an open notebook and without one in batch."""
    return tqdm(items, desc=label, disable=in_batch(), leave=False)


def show(figure: plt.Figure) -> None:
    """Display a figure once and close it, so that a kernel does not keep every figure of a session."""
    display(figure)
    plt.close(figure)


def table(rows: list[dict], columns: dict[str, str], *, digits: int = 4) -> pd.DataFrame:
    """Return a readable table of rows: `columns` maps a column of `lmcompress.results.frame` to its heading.

    Raises:
        BadSetting: no frame has such a column.
    """
    if unknown := [name for name in columns if name not in COLUMNS and "." not in name]:
        raise BadSetting(
            f"no column {', '.join(unknown)}; available: {', '.join(COLUMNS)}, and settings.…, achieved.…, "
            "secondary.…, ratio.batch1, …"
        )
    tidy = frame(rows).reindex(columns=list(columns))
    return tidy.rename(columns=columns).round(digits)


def _short(folder: Path) -> str:
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
