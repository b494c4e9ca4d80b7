"""Every number of the published rows, computed again from the per-example scores beside them.

`python -m lmcompress.measure.recompute [--results FOLDER]` needs no model and no data set.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lmcompress.measure.quality import compare, quality, quality_verdict
from lmcompress.results.rows import dense_of, is_dense, model_task_of
from lmcompress.results.scores import columns_of, read_scores
from lmcompress.results.store import Row, published_folder, published_rows
from lmcompress.stats import Columns, Statistic
from lmcompress.tasks.language_modelling import LanguageModelling
from lmcompress.tasks.metrics import STATISTICS
from lmcompress.tasks.minimal_pairs import MinimalPairs, within_fields

TOLERANCE = 1e-9
UNSCORED = ("floor", "collapsed", "details")  # recorded beside the scores, not computed from them


@dataclass(frozen=True)
class Recorded:
    """What a row says of an evaluation, as `quality` asks it of the task and of the evaluation."""

    fields: dict
    columns: Columns

    def __getattr__(self, name: str) -> object:
        return self.fields[name]

    @property
    def task(self) -> "Recorded":
        """Itself."""
        return self

    @property
    def value(self) -> float:
        """The metric of the columns."""
        return float(self.statistic(self.columns))

    @property
    def statistic(self) -> Statistic:
        """The metric as a function of columns."""
        return STATISTICS[self.metric]

    @property
    def secondary(self) -> dict[str, Statistic]:
        """The recorded secondary metrics as functions of columns."""
        names = self.fields["secondary"]
        return within_fields(names) if self.cluster else {name: STATISTICS[name] for name in names}

    @property
    def likelihood(self) -> str | None:
        """The secondary metric that has a difference."""
        return next((name for name, part in self.fields["secondary"].items() if "difference" in part), None)

    @property
    def cluster(self) -> str | None:
        """The column of what is resampled whole."""
        return MinimalPairs.cluster if MinimalPairs.cluster in self.columns else None

    @property
    def block(self) -> int:
        """How many examples are resampled together."""
        return LanguageModelling.block if self.metric == LanguageModelling.metric else 1


def recomputed(row: Row, dense_row: Row | None, scores: dict[str, Columns]) -> dict | None:
    """Return the parts of a row that follow from the scores; None where there are not all of them.

    A row that compares two others gives its "achieved"; any other "quality", "selection" and "verdict".
    """
    if row["technique"] == "paired-difference":
        keys = row["settings"]["first"], row["settings"]["second"]
        achieved = row["achieved"]
        if not {*keys} <= {*scores} or achieved["metric"] not in STATISTICS:
            return None
        first, second = (columns_of(scores[key]) for key in keys)
        task = Recorded(achieved | {"secondary": {}}, first)
        values = [float(task.statistic(columns)) for columns in (first, second)]
        return {"achieved": achieved | {"values": values, "difference": compare(task, first, second)}}
    baseline = None if is_dense(row) else dense_row
    needed = {row["key"], *([baseline["key"]] if baseline else [])}
    if not row["quality"] or not needed <= {*scores} or row["quality"]["metric"] not in STATISTICS:
        return None
    parts = {}
    for part in ("quality", "selection"):
        if row.get(part):
            evaluation = Recorded(row[part], columns_of(scores[row["key"]], part))
            dense_columns = columns_of(scores[baseline["key"]], part) if baseline else None
            parts[part] = quality(evaluation, dense_columns)
            parts[part] |= {name: row[part][name] for name in UNSCORED if name in row[part]}
    word = quality_verdict(parts["quality"], baseline=baseline is None)
    return parts | {"verdict": (row["verdict"] or {}) | {"quality": word}}


def differing(recorded: object, computed: object, where: str) -> Iterator[str]:
    """Yield what differs between two nests of dictionaries and lists, by its dotted name."""
    if isinstance(recorded, list) and isinstance(computed, list):
        recorded, computed = dict(enumerate(recorded)), dict(enumerate(computed))
    if isinstance(recorded, dict) and isinstance(computed, dict):
        for name in {**recorded, **computed}:
            yield from differing(recorded.get(name), computed.get(name), f"{where}.{name}")
    elif isinstance(recorded, int | float) and isinstance(computed, int | float):
        if not math.isclose(recorded, computed, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{where} is {recorded}, from the scores {computed}"
    elif recorded != computed:
        yield f"{where} is {recorded!r}, from the scores {computed!r}"


def check(rows: Iterable[Row], scores: dict[str, Columns]) -> tuple[dict[str, list[str]], int]:
    """Return key -> what differs, of the rows that have scores; and how many scored rows have none."""
    rows = list({row["key"]: row for row in rows}.values())
    differences, without = {}, 0
    for row in rows:
        parts = recomputed(row, dense_of(rows, model_task_of(row)), scores)
        if parts is None:
            without += bool(row["quality"]) or row["technique"] == "paired-difference"
        else:
            recorded = {name: row[name] for name in parts}
            found = [line.removeprefix(".") for line in differing(recorded, parts, "")]
            differences[row["key"]] = found
    return differences, without


def main(arguments: list[str] | None = None) -> int:
    """Recompute, print what differs, and return 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder of rows, default that of the committed report")
    folder = parser.parse_args(arguments).results or published_folder()
    differences, without = check(published_rows(folder), read_scores(folder / "scores"))
    wrong = {key: lines for key, lines in differences.items() if lines}
    for key, lines in wrong.items():
        print(*(f"{key}: {line}" for line in lines), sep="\n")
    print(
        f"{len(differences) - len(wrong)} rows agree with their scores, {len(wrong)} do not, "
        f"{without} have no scores in {folder / 'scores'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
