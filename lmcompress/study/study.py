"""One notebook's run in one profile: opens models with their tasks, records rows, and skips rows that exist."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lmcompress import device, measure
from lmcompress.models import loading
from lmcompress.paths import RUNS
from lmcompress.results.store import RowStore, row_key
from lmcompress.study.baseline import DENSE, Baseline, Recovery
from lmcompress.study.provenance import provenance
from lmcompress.tasks import Task, load_task

__all__ = ["DENSE", "Recovery", "Study", "Baseline"]


@dataclass
class Study:
    """One notebook's rows in `folder` (default `runs/<profile>`): measures, records, and skips what exists.

    `calls` is the number of timed calls per variant and shape, at least 30, `length` the tokens of their sequences.
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
        """Open the row store and settle on a device."""
        self.device = str(device.choose(self.device).device)
        self.folder = Path(self.folder) if self.folder else RUNS / self.profile
        self.store = RowStore(self.folder / "rows")

    def baseline(
        self, model: str, task: str, *, limit: int | None = None, timed: bool = True, **task_settings
    ) -> "Baseline":
        """Load `model` and `task` (the first `limit` examples) and measure the dense model unless recorded.

        `timed` is that of `Baseline.measure`, for the dense model.
        """
        loaded_task = load_task(task, limit=limit, seed=self.seed, **task_settings)
        loaded = loading.load(model, device=self.device)
        loaded_task.check(loaded)
        baseline = Baseline(self, loaded, loaded_task)
        baseline.dense = baseline.measure(DENSE, timed=timed)
        return baseline

    def rows(self) -> list[dict]:
        """Every row recorded by this notebook in this profile."""
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
        """A row that scores no model: `compute()` returns its `achieved`, and is not called if the row exists.

        `compute` returns the `family` among its figures, and may return the `model`'s name; they go where rows keep
        them. `task` is the one whose text was looked at.
        """
        model_hash = loading.identity(model)
        data = {"task": task.name if task else "none", "data_hash": task.data_hash if task else "none"}
        key = row_key(
            **data,
            model_hash=model_hash,
            technique=technique,
            technique_version=version,
            measure_version=measure.MEASURE_VERSION,
            settings=settings,
            seed=self.seed,
        )
        if row := self.store.find(key):
            return self.claim(row)
        started, clock = datetime.now(UTC), time.perf_counter()
        achieved = compute()
        row = self.new_row(
            key,
            task=data["task"],
            model=achieved.pop("model", Path(model).name if Path(model).is_absolute() else model),
            family=achieved.pop("family"),
            technique=technique,
            settings=settings,
            seed=self.seed,
            achieved=achieved,
            provenance=provenance(
                model_hash=model_hash,
                data_hash=data["data_hash"],
                technique_version=version,
                started=started,
                wall_s=time.perf_counter() - clock,
            ),
        )
        return self.record(row)

    def new_row(self, key: str, **fields) -> dict:
        """Return a row of this notebook in this profile; measured parts that `fields` leaves out are None."""
        measured = {name: fields.get(name) for name in (*measure.FIELDS, "verdict")}
        return {"key": key, "notebook": self.notebook, "profile": self.profile, **fields, **measured}

    def claim(self, row: dict) -> dict:
        """Return a row that any notebook measured, recorded as this one's too, so that its rows are whole."""
        return row if row["notebook"] == self.notebook else self.record(row | {"notebook": self.notebook})

    def record(self, row: dict) -> dict:
        """Append a row to this notebook's file and return it."""
        self.store.append(row)
        return row
