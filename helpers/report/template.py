"""The report's text: Markdown templates with placeholders, filled from rows; no logic in a template.

A template begins with a YAML header of what its placeholders mean:

- `numbers`: name -> [model, label, kind], a number of `values.KINDS` of the row of that model (the end of its
  name) and label, with a task in the fourth place among all rows, whichever notebook's; or name -> {count:
  QUERY}, how many configurations of the frame a pandas query selects (`every: true`: how many rows); or
  name -> {range: QUERY, column: NAME}, the least and the greatest of a column over all rows, with
  `records: [technique, list]` over the records in that list of an analysis;
- `presumes`: name -> {where: QUERY, expect: QUERY}: the sentence is only true while every row that `where`
  selects (at least one) is also selected by `expect`; or {where: QUERY, below: QUERY, column: NAME}: while
  each of the first has less in the column than each of the second, with `within: NAME` where that column is
  the same. `every` and `records` as above. Beside the frame's columns there are `smallest_1` and
  `smallest_5`: is it what the first table names at 1 % and 5 %;
- `tables`: name -> {rows: [label, …], cell: "kind; kind"}, a configuration a line, a model that has half
  of them a column; of a label such as "… (750 or 225 steps)" each model has the first of those that it
  was given.

Placeholders are `{number}`, `{presume}` (empty), `{table:NAME}`, `{figure:NAME}`, `{block:NAME}`, and
`{study}`, empty, of a sentence that is of the reference profile's rows as a whole. A paragraph, or an item
of a list, whose placeholders cannot be filled, or whose presumption is wrong, is left out of the report of a
run, and a problem of the committed report. So is what a header names and no sentence uses.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas
import yaml

from helpers.report import values
from lmcompress.results.frame import frame
from lmcompress.results.labels import SECOND_BENCHMARKS, number
from lmcompress.results.rows import by_model_task
from lmcompress.results.store import Row
from lmcompress.study.decision import MARGINS, Budget, comparable_rows, decide, options

FOLDER = Path(__file__).with_name("templates")
STUDY = "study"
_BUDGETS = re.compile(r"\d+( or \d+)+(?= steps)")
_PLACEHOLDER = re.compile(r"\{([a-z0-9_]+(?::[a-z0-9_-]+)?)\}")


class Unfilled(Exception):
    """A placeholder that the rows cannot fill; the message says why."""


@dataclass
class Filler:
    """Fills templates from rows; `problems` collects what could not be filled, paragraph by paragraph.

    `figures` and `blocks` map what `{figure:NAME}` and `{block:NAME}` stand for to Markdown.
    """

    rows: list[Row]
    figures: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def lines(self) -> pandas.DataFrame:
        """The frame of the rows that configurations are compared by, and which of them are the smallest."""
        rows = comparable_rows(self.rows)
        choices = [options(group) for group in by_model_task(rows).values()]
        lines, smallest = frame(rows), {}
        for margin in MARGINS:
            decisions = [decide(choice, Budget(margin=margin, listed=True)) for choice in choices]
            keys = [decision.chosen.key for decision in decisions if decision.chosen]
            smallest[f"smallest_{100 * margin:.0f}"] = lines["key"].isin(keys)
        return lines.assign(**smallest)

    @cached_property
    def every(self) -> pandas.DataFrame:
        """The frame of all scored rows: every seed and control, whichever notebook's."""
        return frame(row for row in self.rows if row["quality"])

    def fill(self, name: str) -> str:
        """Return the text of a template, without what the rows do not say."""
        header, text = read(name)
        named = [*header.get("numbers", {}), *header.get("presumes", {})]
        named += [f"table:{table}" for table in header.get("tables", {})]
        unused = [placeholder for placeholder in named if f"{{{placeholder}}}" not in text]
        self.problems += [f"{name}.md: no sentence uses {placeholder}" for placeholder in unused]
        return "\n\n".join(filter(None, (self._block(block, header, name) for block in text.split("\n\n"))))

    def _block(self, block: str, header: dict, name: str) -> str:
        items = re.split(r"\n(?=- )", block.strip()) if block.lstrip().startswith("- ") else [block.strip()]
        filled = []
        for item in items:
            try:
                filled.append(_PLACEHOLDER.sub(lambda match: self._value(match[1], header), item).strip())
            except Unfilled as reason:
                self.problems.append(f"{name}.md: {reason} ({item[:60]}…)")
        return "\n".join(filled)

    def _value(self, placeholder: str, header: dict) -> str:
        kind, _, name = placeholder.rpartition(":")
        if kind in ("figure", "block"):
            if not (text := getattr(self, f"{kind}s").get(name)):
                raise Unfilled(f"no {kind} {name}")
            return text
        if kind == "table":
            return self._table(header["tables"][name])
        if name == STUDY:
            if all(row["profile"] != "reference" for row in self.rows):
                raise Unfilled("the sentence is of the reference study's rows")
            return ""
        if name in header.get("presumes", {}):
            self._presume(**header["presumes"][name])
            return ""
        if name not in header.get("numbers", {}):
            raise Unfilled(f"the header does not say what {name} is")
        return self._number(header["numbers"][name])

    def _select(self, query: str, lines: pandas.DataFrame | None = None) -> pandas.DataFrame:
        lines = self.lines if lines is None else lines
        asked = lines[[name for name in lines if name in query]]  # pandas reads the name of every column
        try:
            return lines.loc[asked.query(query, engine="python").index]
        except pandas.errors.UndefinedVariableError as error:
            raise Unfilled(f"{query}: {error}") from error

    def _presume(
        self,
        where: str,
        expect: str = "",
        *,
        below: str = "",
        column: str = "",
        within: str = "",
        every: bool = False,
        records: list | None = None,
    ) -> None:
        lines = self._records(*records) if records else self.every if every else self.lines
        selected = self._select(where, lines)
        if selected.empty:
            raise Unfilled(f"no row with {where}")
        if below:
            _compare(selected, self._select(below, lines), column, within)
            return
        other = selected.drop(self._select(expect, lines).index, errors="ignore")
        if len(other):
            first = other.iloc[0]
            raise Unfilled(f"presumed {expect}, which {first['model']}, {first.get('label')} is not")

    def _number(self, spec: list | dict) -> str:
        if isinstance(spec, dict) and "range" in spec:
            lines = self._records(*spec["records"]) if "records" in spec else self.every
            numbers = self._select(spec["range"], lines)[spec["column"]].dropna()
            if numbers.empty:
                raise Unfilled(f"no row with {spec['range']}")
            is_count = (numbers % 1 == 0).all()
            ends = [f"{end:,.0f}" if is_count else number(end) for end in (numbers.min(), numbers.max())]
            return " to ".join(dict.fromkeys(ends))
        if isinstance(spec, dict):
            return str(len(self._select(spec["count"], self.every if spec.get("every") else None)))
        model, label, kind, *task = spec
        if not task:
            return values.written(self._line(model, label), kind)
        lines = self._select(
            f"model.str.endswith('{model}') and task == '{task[0]}' and label == '{label}'", self.every
        )
        line = next(iter(lines.to_dict("records")), None)
        if line is None:
            raise Unfilled(f"no row of {model} on {task[0]} is {label!r}")
        return values.written(line, kind)

    def _records(self, technique: str, part: str) -> pandas.DataFrame:
        """Return the records in a list of the analyses of one technique, each with its model."""
        rows = [row for row in self.rows if row["technique"] == technique]
        return pandas.DataFrame(
            [{"model": r["model"], **entry} for r in rows for entry in r["achieved"][part]]
        )

    def _line(self, model: str, label: str) -> dict:
        selected = self._labelled(model, label)
        if len(selected) != 1:
            raise Unfilled(f"{len(selected)} rows of {model} are {label!r}")
        return selected.iloc[0].to_dict()

    def _labelled(self, model: str, label: str) -> pandas.DataFrame:
        budgets = _BUDGETS.search(label)
        labels = (
            [label.replace(budgets[0], steps) for steps in budgets[0].split(" or ")] if budgets else [label]
        )
        lines = self.lines[self.lines["model"].str.endswith(model)]
        label = next((text for text in labels if text in set(lines["label"])), label)  # named first
        return lines[lines["label"] == label]

    def _table(self, spec: dict) -> str:
        models = [m for m in values.current(dict.fromkeys(self.lines["model"])) if m not in SECOND_BENCHMARKS]
        present = {
            label: [m for m in models if self._present(m, label) is not None] for label in spec["rows"]
        }
        labels = [label for label, having in present.items() if having]
        models = [m for m in models if 2 * sum(m in present[label] for label in labels) >= len(labels)]
        if not labels:
            raise Unfilled(f"no row with one of {', '.join(present)}")
        lines = [
            [self._heading(models, label), *(self._cell(model, label, spec["cell"]) for model in models)]
            for label in labels
        ]
        return values.table(["Configuration", *map(values.model_name, models)], lines)

    def _heading(self, models: list[str], label: str) -> str:
        """Return a label with the steps that were given, in the order of the models."""
        if not (budgets := _BUDGETS.search(label)):
            return label
        present = [line["label"] for model in models if (line := self._present(model, label))]
        steps = dict.fromkeys(re.search(r"\d+(?= steps)", text)[0] for text in present)
        return label.replace(budgets[0], ", ".join(steps))

    def _present(self, model: str, label: str) -> dict | None:
        return None if self._labelled(model, label).empty else self._line(model, label)

    def _cell(self, model: str, label: str, kinds: str) -> str:
        if (line := self._present(model, label)) is None:
            return "not run"
        written = [values.written(line, kind) for kind in kinds.split("; ")]
        return "; ".join([text for text in written if text != values.NOT_TIMED] or written)


def _compare(first: pandas.DataFrame, second: pandas.DataFrame, column: str, within: str) -> None:
    """Raise unless all of `first` have less in a column than all of `second` that have the same `within`."""
    groups = [dict(list(lines.groupby(within or (lambda _: "")))) for lines in (first, second)]
    for name in groups[0].keys() & groups[1].keys():
        greatest, least = groups[0][name][column].max(), groups[1][name][column].min()
        if not greatest < least:
            raise Unfilled(f"presumed {column} below {least:.4g}, which {greatest:.4g} is not ({name})")
    if not groups[0].keys() & groups[1].keys():
        raise Unfilled(f"nothing to compare {column} with")


def read(name: str) -> tuple[dict, str]:
    """Return header and text of a template."""
    _, header, text = (FOLDER / f"{name}.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header) or {}, text.strip()
