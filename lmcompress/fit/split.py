"""Which examples a search trains on, searches by and confirms on: by the hash of their text, in one part."""

from dataclasses import dataclass

from lmcompress.errors import BadData, BadSetting
from lmcompress.fit.decision import RUNGS
from lmcompress.stats import LEAST_EXAMPLES
from lmcompress.tasks import Task

TRAIN_SHARE, MOST_TRAINED = 0.15, 1000
SEARCH_SHARE = 1 / 3  # of what is not trained on
CONFIRM = "confirm"
CHUNKS = {f"search{i}": b - a for i, (a, b) in enumerate(zip((0.0, *RUNGS), RUNGS), 1)}


@dataclass(frozen=True)
class Parts:
    """The task that is trained on, those of the search's chunks, and the one that confirms.

    `trained` is how many examples are kept to train on; 0: there is other training text. `repeats` is how
    many examples are not scored, because another has their text and label.
    """

    training: Task
    chunks: dict[str, Task]
    confirm: Task
    trained: int
    repeats: int = 0

    @property
    def searched(self) -> int:
        """How many examples the search may score."""
        return sum(len(chunk.examples) for chunk in self.chunks.values())

    @property
    def noun(self) -> str:
        """What an example is called."""
        return "paragraph" if self.confirm.kind == "language-modelling" else "example"

    @property
    def tasks(self) -> dict[str, Task]:
        """Every task that is scored, by name."""
        return self.chunks | {CONFIRM: self.confirm}


def shares_of(text: str) -> tuple[float, float, float]:
    """Return what `15,28,57` says of training, search and confirmation, as fractions of their sum."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not min(numbers) >= 0 or not min(numbers[1:]) > 0:
        raise BadSetting(
            f"--split {text}: give three shares, of training, search and confirmation, such as 15,28,57; or "
            "a file of examples to confirm on."
        )
    train, search, confirm = (number / sum(numbers) for number in numbers)
    return train, search, confirm


def divide(
    task: Task, *, shares: tuple[float, float, float] | None = None, confirm: Task | None = None
) -> Parts:
    """Return the parts of a task's examples; equal texts, and what belongs together, lie in one part.

    By default a task that has training text keeps all its examples for search and confirmation, and one with
    a selection set is searched by that. Otherwise 15 % of the examples, at most 1,000, are for calibration
    and training, of the rest a third for the search. `confirm` is a task whose examples confirm, but for
    those that are in the other. What repeats an example is not scored: a bound takes examples as independent.

    Raises:
        BadData: a part is too small for any bound. BadSetting: nothing is left to calibrate on.
    """
    base, selection = task, None if shares or confirm else task.selection()
    if selection:
        base, confirm = selection, task
    has_training, n = task.has_training(), len(base.examples)
    train = 0.0 if has_training else min(TRAIN_SHARE, MOST_TRAINED / n)
    search = 1 - train if confirm else SEARCH_SHARE * (1 - train)
    train, search, confirming = shares or (train, search, 1 - train - search)
    if not train and not has_training:
        raise BadSetting("--split leaves nothing to calibrate on: give training a share.")
    fractions = {name: search * chunk for name, chunk in CHUNKS.items()}
    fractions |= {CONFIRM: confirming} if not confirm else {}
    division = base.parts(fractions | ({"train": train} if train else {}))
    if confirm:
        searched = {task.text_key(example) for example in base.examples}
        searched |= (
            {task.text_key(example) for example in task.training_examples()} if has_training else set()
        )
        division[CONFIRM] = confirm.parts({CONFIRM: 1.0})[CONFIRM]
        division[CONFIRM].examples = [e for e in confirm.examples if task.text_key(e) not in searched]
    training = division["search1"] if train else task
    trained = len(training.training_examples()) if train else 0
    repeats = 0
    for scored in (division[name] for name in (*CHUNKS, CONFIRM)):
        count = len(scored.examples)
        scored.examples = _distinct(scored)
        repeats += count - len(scored.examples)
    chunks = {name: division[name] for name in CHUNKS}
    return _checked(Parts(training, chunks, division[CONFIRM], trained, repeats))


def _distinct(task: Task) -> list[dict]:
    """Return the examples, each text and label once; of running text, and of clusters drawn whole, all."""
    if task.cluster or task.kind == "language-modelling":
        return task.examples
    return list({(task.text_key(e), str(e.get("label"))): e for e in reversed(task.examples)}.values())[::-1]


def _checked(parts: Parts) -> Parts:
    for name, count in (("search", parts.searched), ("confirmation", len(parts.confirm.examples))):
        if count < LEAST_EXAMPLES:
            raise BadData(
                f"{parts.confirm.name}: {count} different examples are left for {name}, and fewer than "
                f"{LEAST_EXAMPLES} bound no loss. Bring more, or give that part a larger share with --split."
            )
    return parts
