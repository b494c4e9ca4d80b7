"""The one call: checks what is asked, divides the examples, searches, confirms, and writes the answer."""

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from tqdm.auto import tqdm

from lmcompress.errors import BadData, BadSetting, WrongTask
from lmcompress.fit import candidates, power, proof, split
from lmcompress.fit.facts import facts
from lmcompress.fit.journal import Journal, read, remove_work
from lmcompress.fit.loss import Loss, Margin
from lmcompress.fit.schedule import Clock
from lmcompress.fit.search import Search
from lmcompress.measure.calls import Shape, default_shapes
from lmcompress.models import loading, storage
from lmcompress.paths import atomic_path, claimed
from lmcompress.results.labels import plural
from lmcompress.tasks import Task, load_task
from lmcompress.tasks.data import FORMATS
from lmcompress.train import encoder

# What is asked for: how it is measured, and the batch that it is about unless one is given.
GOALS = {
    "size": ("size", 1),
    "memory": ("memory", 1),
    "batch1": ("time", 1),
    "batch8": ("time", 8),
    "decode": ("time", 1),
}
CALIBRATION = 128  # texts a technique looks at, if there are so many
HEAD = {"epochs": 3, "batch_size": 16, "learning_rate": 5e-5}  # the training of a model that has none


@dataclass(frozen=True)
class Fit:
    """What a search came to.

    Attributes:
        content: everything that is said of it, as in the folder's fit.json.
        save: the folder with the answer, or None.
        work: the folder with everything that was measured.
    """

    content: dict
    save: Path | None
    work: Path

    @property
    def answer(self) -> dict | None:
        """The confirmed candidate ("label", "recipe", "bytes", "loss", "bound", …), or None."""
        return self.content["answer"]

    @property
    def confirmation(self) -> pandas.DataFrame:
        """The tests in their order, up to the first that failed."""
        return pandas.DataFrame(self.content["confirmation"])

    @property
    def text(self) -> str:
        """The result in sentences."""
        return self.content["text"]

    def frame(self) -> pandas.DataFrame:
        """Return a line per candidate: what was measured of it, and how far it came ("state")."""
        return pandas.DataFrame(self.content["candidates"])


def fit(
    model: str | Path,
    task: str | Path | Task,
    *,
    save: str | Path,
    max_loss: str | float = "1",
    goal: str = "size",
    minutes: float = 20,
    max_mb: float | None = None,
    max_ms: float | None = None,
    batch: int | None = None,
    length: int = 128,
    runtime: str = "any",
    train: bool = True,
    finetune: bool = False,
    recipes: str | Path | None = None,
    split_by: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings,
) -> Fit:
    """Find the version of `model` that is best in `goal`, and loses at most `max_loss` on `task`; save it.

    Run again after it was ended, it goes on from where it was; once finished, it returns what was found.

    Args:
        model: Hub id, folder, or pocket/<name>.
        task: what `load_task` takes, with its `settings`; or a task.
        save: a new or empty folder; the search keeps its work in a folder beside it.
        max_loss: `1` means a point of a metric in percent, `1%` a hundredth of the dense value.
        goal: "size", "batch1" or "batch8" (time of a call), "decode" (time of a token), or "memory".
        minutes: nothing is begun that would not end in time.
        batch, length: as the model is served; by default what the goal says, and 128 tokens.
        runtime: "torch", "openvino", "onnxruntime" or "any".
        train: whether what survives is also cut and trained, where time is left; bits are mixed in any case.
        finetune: give a model without a head one, and train it on the training text first; that is dense.
        recipes: a file with a list of them, to try instead of the package's.
        split_by: shares of training, search and confirmation, `15,28,57`; or a file to confirm on.

    Raises:
        BadSetting: something asked for makes no sense, or `save` holds something.
        BadData: too few examples.
        WrongTask: the model cannot do the task.
    """
    _check(
        goal,
        runtime,
        **{"minutes": minutes, "max-mb": max_mb, "max-ms": max_ms, "batch": batch, "length": length},
    )
    save, clock = Path(save), Clock(minutes)
    work = work_folder(save)
    loaded = None if finetune else loading.load(model)
    options = {"task": task.name if isinstance(task, Task) else task, "split_by": split_by}
    options |= {"recipes": recipes, "settings": settings}
    settings = {"seed": seed, "model": loaded, **settings}
    task = task if isinstance(task, Task) else load_task(task, **settings)
    margin = Margin.parse(max_loss, task.metric)
    loaded = loaded or encoder.with_head(model, task)
    try:
        task.check(loaded)
    except WrongTask as error:
        advice = f"{error} To give it a head that is trained on your examples first: --finetune."
        raise WrongTask(advice if task.kind in encoder.PROBLEMS else str(error)) from error
    division, shape = _parts(task, split_by, settings), _shape(loaded, goal, batch, length)
    division.confirm.check(loaded)
    drawn = {"limit": CALIBRATION, "length": 128, "model": loaded.model}
    texts = len(division.training.training_features(loaded.tokenizer, **drawn))
    tried, moves = candidates.listed(
        loaded.kind, file=recipes and Path(recipes), runtime=runtime, texts=texts
    )
    job = {"model": loaded.name, "model_hash": loaded.hash, "task": task.name, "metric": task.metric}
    job |= {"data": [scored.data_hash for scored in division.tasks.values()], "trained": division.trained}
    job |= {"max_loss": str(max_loss), "goal": goal, "max_mb": max_mb, "max_ms": max_ms, "runtime": runtime}
    job |= {
        "part": shape.part,
        "batch": shape.batch,
        "length": shape.length,
        "threads": torch.get_num_threads(),
    }
    job |= {"candidates": [candidate.name for candidate in tried], "train": train, "seed": seed}
    job |= {"finetune": True} if finetune else {}
    if content := proof.read(save, job):
        remove_work(work)  # a kill may have left it
        return Fit(content, save, work)
    storage.check_target(save, source=str(loaded.path))

    @contextmanager
    def waiting() -> Iterator[None]:
        shown.say(f"another search works on {save}: waiting for it", "")
        yield

    with _Progress(clock, shown=progress) as shown, claimed(work.with_name(f".{work.name}.lock"), waiting):
        if content := proof.read(save, job):
            return Fit(content, save, work)
        journal = Journal(work, job, options | {"minutes": minutes})
        if finetune:
            loaded = _with_trained_head(loaded, division.training, work, seed)
        search = Search(
            loaded,
            division,
            Loss(task, margin),
            GOALS[goal][0],
            shape,
            (max_mb and 1e6 * max_mb, max_ms),
            tried,
            [move for move in moves if train or not candidates.trains(move)],
            texts,
            journal,
            clock,
            shown.say,
            seed,
        )
        shown.say(opening(search), "")
        answer = search.run()
        content = facts(search, answer, job, options)
        if answer:
            proof.write(search, answer, content, save, options["settings"])
            remove_work(work)
            for old in work.glob("proof.*"):  # of a run that had no answer
                old.unlink()
        else:
            proof.write_proof(content, work)
    return Fit(content, save if answer else None, work)


def resumed(save: str | Path) -> dict:
    """Return the arguments of `fit` that the search of `save` was asked for with.

    Raises:
        BadSetting: there is none.
    """
    work = work_folder(Path(save))
    if not (lines := read(work)):
        raise BadSetting(f"--resume: {work} holds no search. Give --model and --task to begin one.")
    job, options = lines[0]["job"], lines[0]["options"]
    names = ("model", "max_loss", "goal", "max_mb", "max_ms", "runtime", "batch", "length", "train", "seed")
    arguments = {name: job[name] for name in names} | {"finetune": job.get("finetune", False)}
    given = {name: options[name] for name in ("task", "split_by", "recipes", "minutes")}
    return arguments | given | options["settings"]


def work_folder(save: Path) -> Path:
    """Return where the search for `save` keeps its work."""
    return save.resolve().with_name(f"{save.resolve().name}.search")


def opening(search: Search) -> str:
    """Return what the examples can decide, before anything is scored."""
    division, loss, margin = search.parts, search.loss, search.loss.margin
    n, percent = len(division.confirm.examples), 100
    text = f"{plural(division.searched + n, division.noun)} to score, {n:,} of them for confirmation"
    if division.repeats:
        text += f" ({plural(division.repeats, 'repeat')} of a text with its label left out)"
    if division.trained:
        text = f"{plural(division.trained, division.noun)} to calibrate and train on; {text}"
    if not loss.is_proportion or margin.relative:
        return (
            f"{text}. What they can decide depends on how candidates vary, and is said before they confirm."
        )
    changed = power.USUAL_CHANGES
    needed = power.examples_needed(margin.amount, changed=changed)
    enough = f"bring {needed:,} for confirmation" if needed else "no number is enough"
    return (
        f"{text}. At {percent * changed:g} % changed answers a lossless candidate is certified at "
        f"{percent * power.certifiable_loss(n, changed):.2f} points, and passes {margin} with "
        f"{percent * power.chance(n, margin.amount, changed=changed):.0f} %; to pass it with "
        f"{percent * power.POWER:.0f} % {enough}."
    )


def _check(goal: str, runtime: str, **amounts: float | None) -> None:
    """Raise `BadSetting` for what makes no sense, before anything is loaded."""
    if goal not in GOALS:
        raise BadSetting(f"--for {goal}: choose one of {', '.join(GOALS)}.")
    if runtime not in ("any", *candidates.RUNTIMES):
        raise BadSetting(f"--runtime {runtime}: choose one of {', '.join(candidates.RUNTIMES)}, any.")
    for name, amount in amounts.items():
        if amount is not None and not 0 < amount < math.inf:
            raise BadSetting(f"--{name} {amount}: give a number above 0.")


def _with_trained_head(loaded: loading.LoadedModel, task: Task, work: Path, seed: int) -> loading.LoadedModel:
    """Return the dense model of a search for which its head is trained first; as it is there, if it is."""
    folder, checkpoint = work / "dense", work / "training"
    if not folder.exists():
        encoder.finetune(loaded, task, checkpoint, seed=seed, **HEAD)
        with atomic_path(folder) as temporary:
            encoder.write(loaded.model, loaded.tokenizer, temporary)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return loading.load(folder)


def _parts(task: Task, split_by: str | Path | None, settings: dict) -> split.Parts:
    """Return the parts of the task's examples, as asked for or by default.

    A file to confirm on is read as the task is: of the same kind, with the same labels in the same order.
    """
    shares = confirm = None
    if split_by is not None and (Path(split_by).suffix.lower() in FORMATS or Path(split_by).is_file()):
        if not Path(split_by).exists():
            raise BadData(f"--split {split_by}: there is no such file.")
        alike = {"kind": task.kind} | ({"labels": task.labels} if task.labels else {})  # else each file's own
        confirm = load_task(split_by, **alike | settings)
        fields, confirming = ({*side.text_fields} & {*side.examples[0]} for side in (task, confirm))
        if fields != confirming:
            raise BadData(
                f"--split {split_by}: its examples have {' and '.join(sorted(confirming))}, those of "
                f"{task.name} {' and '.join(sorted(fields))}. Give both files the same columns."
            )
    elif split_by is not None:
        shares = split.shares_of(str(split_by))
    return split.divide(task, shares=shares, confirm=confirm)


def _shape(loaded: loading.LoadedModel, goal: str, batch: int | None, length: int) -> Shape:
    """Return the call that is timed: one of a classifier, of a generating model a token or its prompt."""
    batch = batch or GOALS[goal][1]
    shapes = default_shapes(loaded.kind, length=length, batches=(batch,), model=loaded.model)
    if goal == "decode" and shapes[-1].part != "decode":
        raise BadSetting("--for decode is about models that generate; this one reads its text in one call.")
    return shapes[0] if goal in ("batch1", "batch8") else shapes[-1]


class _Progress:
    """A bar over the minutes on a terminal, a line per step elsewhere; with what is best so far."""

    def __init__(self, clock: Clock, *, shown: bool):
        self.clock, self.shown, self.bar, self.best = clock, shown, None, ""

    def __enter__(self) -> "_Progress":
        if self.shown and sys.stderr.isatty():
            form = "{bar:20} {n:.1f} of {total:g} min {postfix}"
            self.bar = tqdm(total=self.clock.minutes, bar_format=form, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str, best: str) -> None:
        """Print a line, and move the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
            self.bar.n = min(self.clock.now() / 60, self.clock.minutes)
            self.bar.set_postfix_str(best)
        elif self.shown:
            best, self.best = "" if best == self.best else f"; {best}", best
            print(f"[{self.clock.now():5.0f} s] {text}{best}", file=sys.stderr, flush=True)
