"""One notebook's run in one profile: opens models with tasks, records rows, and skips rows that exist."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lmcompress import device, measure
from lmcompress.models import loading
from lmcompress.paths import RUNS, claimed, sweep, sweep_scratch
from lmcompress.results.store import RowStore
from lmcompress.study.baseline import DENSE, Baseline, Recovery
from lmcompress.study.provenance import Inputs
from lmcompress.tasks import Task, load_task
from lmcompress.timing_lock import at_rest
from lmcompress.train.encoder import finetune_encoder

__all__ = ["DENSE", "Recovery", "Study", "Baseline"]


@dataclass
class Study:
    """One notebook's rows in `folder` (default `runs/<profile>`): measures, records, and skips what exists.

    `calls` are the timed calls per variant and shape, of `length` tokens: 30 or more are worth recording, and
    fewer than `stats.LEAST_CALLS` have no verdict.
    """

    notebook: str
    profile: str = "pocket"
    folder: Path | None = None
    calls: int = 30
    length: int = 128
    seed: int = 0
    device: str = "auto"
    announce: Callable[[str], None] = print
    store: RowStore = field(init=False)

    def __post_init__(self) -> None:
        """Open the row store, settle on a device, and remove what killed processes left in the folder."""
        self.device = str(device.choose(self.device).device)
        self.folder = Path(self.folder) if self.folder else RUNS / self.profile
        self.store = RowStore(self.folder / "rows")
        sweep(self.folder / "scratch", "measure-")
        sweep_scratch()
        for written in (self.folder, self.folder / "rows" / "scores", self.folder / "models"):
            sweep(written)

    def baseline(
        self,
        model: str,
        task: str,
        *,
        limit: int | None = None,
        timed: bool = True,
        finetune: str | Path | None = None,
        epochs: float = 1.0,
        **task_settings,
    ) -> Baseline:
        """Load `model` and `task` (the first `limit` examples) and measure the dense model unless recorded.

        `timed`: its times, too. `finetune`: a file of labelled texts like `task`, for a model that has no
        head for it; it is fine-tuned on that for `epochs`, once, into this study's folder, and later
        techniques train on it, too.
        """
        if finetune is not None:
            task_settings["train_path"] = str(finetune)
            tuned = self.folder / "models" / f"{Path(model).name}-{Path(task).stem}"
            settings = {"epochs": epochs, "seed": self.seed, "task_settings": task_settings}
            model = str(finetune_encoder(model, task, tuned, **settings))
        loaded = loading.load(model, device=self.device)
        loaded_task = load_task(task, limit=limit, seed=self.seed, model=loaded, **task_settings)
        if loaded.tokenizer is None:
            loading.tokenizer_of(loaded.path)  # says what is missing, and how to save one
        loaded_task.check(loaded)
        baseline = Baseline(self, loaded, loaded_task)
        baseline.dense = baseline.measure(DENSE, timed=timed)
        return baseline

    def rows(self) -> list[dict]:
        """Return every row recorded by this notebook in this profile."""
        return self.store.rows(self.notebook)

    def record_once(
        self,
        technique: str,
        version: int,
        *,
        model: str,
        settings: dict,
        compute: Callable[[], dict],
        task: Task | None = None,
    ) -> dict:
        """Return a row that scores no model; `compute()` gives its `achieved`, unless the row exists.

        `compute` returns the `family` among its figures, and may return the `model`'s name; they go where
        rows keep them. `task` is the one whose text was looked at.
        """
        asked = {"technique": technique, "settings": settings, "seed": self.seed}
        inputs = Inputs.of(model, loading.identity(model), task, technique_version=version, **asked)
        if row := self.store.find(inputs.key):
            return self.claim(row)
        with self.measuring(inputs.key):
            if row := self.store.find(inputs.key):
                return self.claim(row)
            started, clock = datetime.now(UTC), time.perf_counter()
            achieved = compute()
            return self.record(
                self.new_row(
                    inputs.key,
                    task=inputs.task,
                    model=achieved.pop("model", Path(model).name if Path(model).is_absolute() else model),
                    family=achieved.pop("family"),
                    achieved=achieved,
                    provenance=inputs.provenance(started=started, wall_s=time.perf_counter() - clock),
                    **asked,
                )
            )

    @contextmanager
    def measuring(self, key: str) -> Iterator[None]:
        """Hold a row's key while it is measured: other runs into this folder wait, and then find the row."""

        @contextmanager
        def waiting() -> Iterator[None]:
            self.announce(f"waiting for another process that measures {key}")
            with at_rest():
                yield

        with claimed(self.folder / "locks" / f"{key}.lock", waiting):
            yield

    def new_row(self, key: str, **fields) -> dict:
        """Return a row of this notebook in this profile; measured parts that `fields` leaves out are None."""
        measured = {name: fields.get(name) for name in (*measure.FIELDS, "verdict")}
        return {"key": key, "notebook": self.notebook, "profile": self.profile, **fields, **measured}

    def claim(self, row: dict) -> dict:
        """Return a row that any notebook measured, recorded as this one's too, so that its rows are whole."""
        measured = (row["key"], row["provenance"]["started"])
        mine = ((r["key"], r["provenance"]["started"]) for r in self.store.rows(self.notebook))
        row = row | {"notebook": self.notebook}
        return row if measured in mine else self.record(row)

    def record(self, row: dict) -> dict:
        """Append a row to this notebook's file and return it."""
        self.store.append(row)
        return row
