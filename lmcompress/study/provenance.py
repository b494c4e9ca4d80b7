"""What a measurement depends on, and so its key; and what its row says of where it comes from.

`Inputs` is the one place that says what a key is made of. Not in it, because they change no number that is
kept: notebook, profile and commit; and because they decide the times alone, which are taken again when they
differ: timed calls, lengths and threads. `limit` is in `data_hash`, which is over the examples that are
    scored.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch

from lmcompress import device, measure
from lmcompress.models import loading
from lmcompress.results.rows import chain_steps
from lmcompress.results.store import FURTHER_INPUTS, published_tokenizers, row_key
from lmcompress.tasks import Task
from lmcompress.train.recovery import product_dtype


@dataclass(frozen=True)
class Inputs:
    """All that decides a row's numbers. `tokenizer_hash` and `training_hash` are None at their default.

    The default tokenizer of a model that this project published is the one it was published with; the default
    training text of a data set is its own train split. `selection_hash` is of the examples that choices are
    made on, which are kept out of training, too; None where there are none.
    """

    task: str
    model_hash: str
    data_hash: str
    technique: str
    technique_version: int
    settings: dict
    seed: int
    tokenizer_hash: str | None = None
    training_hash: str | None = None
    selection_hash: str | None = None
    measure_version: int = field(default_factory=lambda: measure.MEASURE_VERSION)

    @classmethod
    def of(
        cls, model: Path | str, model_hash: str, task: Task | None, *, trains: bool = True, **asked
    ) -> "Inputs":
        """Return the inputs of what is `asked` (technique, technique_version, settings, seed) of a model.

        Args:
            model: its name or folder, for the tokenizer.
            task: whose text the model sees; None where it sees none.
            trains: whether the training text of `task` may be read, as calibration or to train on.
        """
        if task is None:
            return cls(task="none", model_hash=model_hash, data_hash="none", **asked)
        tokenizer, selection = loading.tokenizer_identity(model), task.selection()
        return cls(
            task=task.name,
            model_hash=model_hash,
            data_hash=task.data_hash,
            tokenizer_hash=None if published_tokenizers().get(model_hash) == tokenizer else tokenizer,
            training_hash=task.training_hash if trains else None,
            selection_hash=selection.data_hash if selection else None,
            **asked,
        )

    @property
    def key(self) -> str:
        """The row's key: 16 hex digits."""
        return row_key(**asdict(self))

    def provenance(self, *, started: datetime, wall_s: float, on: str = "cpu", **more) -> dict:
        """Return where a row comes from: code, packages, machine, hashes, when, and how long (seconds)."""
        fields = ("model_hash", "data_hash", "technique_version", "measure_version")
        further = {name: getattr(self, name) for name in FURTHER_INPUTS if getattr(self, name)}
        if budgets := training_budgets(self.settings):
            further["training_dtype"] = product_dtype(budgets[-1].get("dtype"))
        return {
            "code": device.code_version(),
            "packages": device.versions(),
            "machine": device.machine(),
            "device": on,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            **{name: getattr(self, name) for name in fields},
            **further,
            "started": started.isoformat(timespec="seconds"),
            "wall_s": round(wall_s, 3),
            **more,
        }


def reads_training(settings: Mapping) -> bool:
    """Return whether a technique at these recorded settings reads training text, in any step."""
    steps = (settings, *chain_steps(settings))
    looks = any("calibration" in step and not is_scored(step) for step in steps)
    return looks or bool(training_budgets(settings))


def training_budgets(settings: Mapping) -> list[Mapping]:
    """Return the recorded budgets of what trains, in order, of a chain those of its steps."""
    steps = (settings, *chain_steps(settings))
    return [step[name] for step in steps for name in ("training", "recovery") if step.get(name)]


def is_scored(step: Mapping) -> bool:
    """Return whether a step is calibrated on the examples that are scored."""
    return bool((step.get("calibration") or {}).get("scored"))
