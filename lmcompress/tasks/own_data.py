"""A user's own file, or any data set of the Hub's layout, as a task: its kind, columns, labels and splits.

The columns say which kind of task the rows are (`KINDS`), and where several have the same columns, the labels
and the model's head; a setting comes before all. Every value is the text that stands in the file.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lmcompress.errors import BadData, BadSetting
from lmcompress.tasks.base import Task
from lmcompress.tasks.batching import positions
from lmcompress.tasks.capabilities import bare, capabilities
from lmcompress.tasks.classification import Classification, MultiLabel, Regression
from lmcompress.tasks.data import FORMATS, Columns, read_file, read_split, sample
from lmcompress.tasks.generation import SourceTarget
from lmcompress.tasks.language_modelling import LanguageModelling
from lmcompress.tasks.multiple_choice import MultipleChoice, answer_indices

Labels = Sequence[str] | Mapping[str, str] | str | None
Names = Sequence[str] | str | None
Row = dict[str, Any]  # role -> text, or a list of texts

ROLES = {  # what a column holds -> the names it is looked for under, where no setting names it
    "text": ("text", "text_a", "sentence", "sentence1"),
    "text_pair": ("text_b", "sentence2"),
    "label": ("label", "labels", "score"),
    "source": ("source",),
    "target": ("target",),
    "question": ("question",),
    "choices": ("choices",),
    "answer": ("answer",),
}
_TEXTS = {f"{role}_column" for role in ROLES}
_TEXTS |= {"labels", "config", "metric", "prompt", "train_path", "selection_path"}
SEPARATOR = ";"  # between the labels or choices of one cell
_MARKS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _classes(rows: list[Row], own: "OwnData", title: str) -> list[dict]:
    indices = own.indices([[row["label"]] for row in rows], title)
    return [_texts(row) | {"label": index} for row, (index,) in zip(rows, indices)]


def _class_sets(rows: list[Row], own: "OwnData", title: str) -> list[dict]:
    indices = own.indices([row["label"] for row in rows], title)
    return [_texts(row) | {"label": sorted(set(labels))} for row, labels in zip(rows, indices)]


def _numbers(rows: list[Row], own: "OwnData", title: str) -> list[dict]:
    numbers = [_number(row["label"]) for row in rows]
    wrong = {i: row["label"] for i, row in enumerate(rows) if not math.isfinite(numbers[i])}
    _refuse(wrong, title, "a number, as 3.5, to regress on")
    return [_texts(row) | {"label": number} for row, number in zip(rows, numbers)]


def _documents(rows: list[Row], own: "OwnData", title: str) -> list[dict]:
    texts = [row["text"].split("\n\n") for row in rows]
    return [{"text": text, "document": i} for i, document in enumerate(texts) for text in document]


def _source_targets(rows: list[Row], own: "OwnData", title: str) -> list[dict]:
    return [{"text": own.prompted(row["source"]), "target": row["target"].strip()} for row in rows]


def _choices(rows: list[Row], own: "OwnData", title: str) -> list[dict]:
    choices = [row["choices"] for row in rows]
    few = {i: row for i, row in enumerate(choices) if len(row) < 2 or not all(row)}
    _refuse(few, title, f"two choices or more, none blank: a list, or texts with {SEPARATOR!r} between")
    indices, expected = answer_indices([row["answer"].strip() for row in rows], choices)
    _refuse({i: rows[i]["answer"] for i, index in enumerate(indices) if index is None}, title, expected)
    return [
        {"text": own.prompted(row["question"]), "choices": row["choices"], "label": index}
        for row, index in zip(rows, indices)
    ]


def _refuse(rows: Mapping[int, object], title: str, expected: str) -> None:
    """Raise `BadData` if there are rows, by their index, whose value is not what was expected."""
    if rows:
        index, shown = next(iter(rows.items()))
        raise BadData(f"{title}: row {index + 1} has {shown!r}, expected {expected} ({len(rows)} such rows).")


def _texts(row: Row) -> dict:
    return {"text": row["text"]} | ({"pair": row["text_pair"]} if "text_pair" in row else {})


@dataclass(frozen=True)
class Kind:
    """A kind of task: class, columns it needs and may have, what makes examples of rows, settings."""

    make: type[Task]
    roles: tuple[str, ...]
    examples: Callable[[list[Row], "OwnData", str], list[dict]]
    may_have: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("metric", "higher_is_better")
    several: str | None = None  # the role that has a list of texts

    def needs(self, columns: Mapping[str, object]) -> str:
        """Return what the model must be capable of; of a pair an encoder's cosine is a regression, too."""
        if self.make is Regression:
            return "similarity" if "text_pair" in columns else "regression"
        return self.make.needs


_LABELLED = {"roles": ("text", "label"), "may_have": ("text_pair",)}
_OF_CLASSES = ("metric", "higher_is_better", "labels")
_WRITTEN = ("metric", "higher_is_better", "prompt", "max_new_tokens")
KINDS = {
    "classification": Kind(Classification, examples=_classes, settings=_OF_CLASSES, **_LABELLED),
    "multi-label": Kind(MultiLabel, examples=_class_sets, settings=_OF_CLASSES, several="label", **_LABELLED),
    "regression": Kind(Regression, examples=_numbers, **_LABELLED),
    "language-modelling": Kind(LanguageModelling, ("text",), _documents, settings=("window", "stride")),
    "generation": Kind(SourceTarget, ("source", "target"), _source_targets, settings=_WRITTEN),
    "multiple-choice": Kind(
        MultipleChoice,
        ("question", "choices", "answer"),
        _choices,
        settings=("metric", "higher_is_better", "prompt"),
        several="choices",
    ),
}


@dataclass(kw_only=True)
class OwnData:
    """A file's rows, or a split of a Hub id or a folder laid out like one; `task()` makes a task of them.

    Attributes:
        split: of a Hub id or folder its name; of a file, besides a name, shares of its rows, by the hash of
            their texts: `0.3` reports on 30 % and trains on the rest (or, with `train_path`, chooses on it),
            `0.15,0.25,0.6` trains, chooses and reports on so much.
        model: a model, or a `LoadedModel`, whose head tells the kind where the columns do not.
        kind: one of `KINDS`.
        config: configuration (subset) of a Hub id or folder.
        text_column: and those below: names of columns, by default those of `ROLES`; the labels of a
            multi-label task and choices may stand in several (`a,b,c`).
        labels: class names in the order of the model's outputs, or the model's name for each label of the
            file (`{"pos": "positive", "neg": "negative"}`); on a command line `0,1` or
            `pos=positive,neg=negative`. By default the data set's own, or sorted.
        train_path: a file to train on; a Hub id or folder has its train split.
        selection_path: a file that configurations are chosen on.
        metric: one of ours, or any of `evaluate` by its path or name. (ROUGE splits words of English only.)
        higher_is_better: true or false, needed with a metric that is not ours.
        prompt: a template around "{source}" or "{question}".
        max_new_tokens: most tokens of an output.
        window: and `stride` of language modelling, in tokens.

    Raises:
        BadData: a column that is not there, no rows, a cell that is blank or not what its kind needs.
        BadSetting: no such kind, metric or setting; or the columns fit several kinds.
    """

    source: str | Path = field(kw_only=False)
    split: str | float = "test"
    limit: int | None = None
    seed: int = 0
    model: Any = None
    kind: str | None = None
    config: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: Names = None
    source_column: str | None = None
    target_column: str | None = None
    question_column: str | None = None
    choices_column: Names = None
    answer_column: str | None = None
    labels: Labels = None
    train_path: str | Path | None = None
    selection_path: str | Path | None = None
    metric: str | None = None
    higher_is_better: bool | None = None
    prompt: str | None = None
    max_new_tokens: int | None = None
    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        """Refuse files that are not there before anything is measured; a command line's numbers are text."""
        for name, given in vars(self).items():
            if name in _TEXTS and isinstance(given, int | float):  # a column called 3
                setattr(self, name, str(given))
        for name in ("train_path", "selection_path"):
            if (path := getattr(self, name)) and not os.path.isfile(path):
                raise BadData(f"there is no file {name}={str(path)!r}.")
        if not isinstance(self.higher_is_better, bool | None):
            raise BadSetting(f"higher_is_better={self.higher_is_better!r}: give true or false.")
        is_folder = os.path.isdir(self.source)
        self.is_file = Path(self.source).suffix.lower() in FORMATS and not is_folder
        is_path = self.is_file or is_folder
        self.name = Path(self.source).name if is_path else str(self.source)

    def task(self) -> Task:
        """Return the task, with training text and examples to choose on where there are any."""
        shares = self._shares() if self.is_file else {}
        content = self._content(str(self.split), self.source if self.is_file else None)
        columns = self._columns(content)
        self.kind = self._kind(content, columns)
        kind = KINDS[self.kind]
        self.columns = {role: columns.get(role) or ROLES[role][:1] for role in kind.roles}
        self.columns |= {role: columns[role] for role in kind.may_have if role in columns}
        fields = self._fields(content)
        has_training = self.train_path or not self.is_file
        make = partial(
            kind.make,
            name=self.name,
            source=self.name,
            training=self._training if has_training else None,
            training_source=str(self.train_path or ""),
            training_is_own=True,
            **fields,
        )
        whole = make(split="test" if shares else str(self.split), examples=self._examples(content))
        tasks = whole.parts(shares, seed=self.seed) if shares else {"report": whole}
        if self.selection_path:
            examples = self._examples(self._content("selection", self.selection_path))
            tasks["selection"] = make(split="selection", examples=examples)
        for task in tasks.values():
            is_text = kind.make is LanguageModelling
            task.examples = (
                task.examples[: self.limit] if is_text else sample(task.examples, self.limit, self.seed)
            )
        if "selection" in tasks:
            tasks["report"].selecting = partial(tasks.get, "selection")
        return tasks["report"]

    def _shares(self) -> dict[str, float]:
        """Return the share of each part that `split` asks for; none where it is a name."""
        fields = str(self.split).split(",")
        if not all(math.isfinite(_number(share)) for share in fields):
            return {}
        names = ("train", "selection", "report") if len(fields) == 3 else ("report",)
        shares = dict(zip(names, map(float, fields)))
        if len(fields) == 1:
            shares = {"selection" if self.train_path else "train": 1 - shares["report"]} | shares
        twice = [n for n in ("train", "selection") if n in shares and getattr(self, f"{n}_path")]
        if twice or len(fields) not in (1, 3):
            raise BadSetting(
                f"split={self.split}: expected the share to report on, or those to train, choose and report "
                f"on (0.15,0.25,0.6){f', and no {twice[0]}_path besides' if twice else ''}."
            )
        return shares

    def _content(self, split: str, file: str | Path | None) -> Columns:
        return read_file(Path(file)) if file else read_split(str(self.source), self.config, split)

    def _columns(self, content: Columns) -> dict[str, tuple[str, ...]]:
        """Return the names of the columns of each role that has any."""
        listed, columns = content.table.column_names, {}
        for role, defaults in ROLES.items():
            named = getattr(self, f"{role}_column")
            if isinstance(named, str):
                named = [named] if named in listed else [name.strip() for name in named.split(",")]
            names = named or [name for name in defaults if name in listed][:1]
            if names:
                columns[role] = tuple(names)
        return columns

    def _kind(self, content: Columns, columns: Mapping[str, tuple[str, ...]]) -> str:
        """Return the kind that was asked for, else the one that columns, labels and the model's head tell."""
        if self.kind in KINDS:
            return self.kind
        if self.kind is not None:
            raise BadSetting(f"no kind {self.kind!r} of own data: expected one of {', '.join(KINDS)}.")
        can = capabilities(bare(self.model)) if self.model is not None else set()
        fitting = [name for name, kind in KINDS.items() if {*kind.roles} <= {*columns}]
        besides = [name for name in content.table.column_names if name not in columns.get("text", ())]
        if "label" in columns or (besides and "language modelling" not in can):
            fitting = [name for name in fitting if name != "language-modelling"]
        # A head was trained for one thing; without one an encoder compares pairs, a decoder reads on.
        heads = can & {"classification", "multi-label", "regression"}
        fitting = [name for name in fitting if KINDS[name].needs(columns) in (heads or can)] or fitting
        labelled = [name for name in fitting if "label" in KINDS[name].roles]
        if len(labelled) > 1:
            labelled = _of_labels(content.select(columns["label"]), labelled)
            fitting = [name for name in fitting if name in labelled or "label" not in KINDS[name].roles]
        if len(fitting) == 1:
            return fitting[0]
        shown = ", ".join(content.table.column_names)
        if fitting:
            raise BadSetting(
                f"{content.title} (columns {shown}) fits the kinds {', '.join(fitting)}: say "
                f"kind={fitting[0]!r} or another of them."
            )
        missing = "label" if "text" in columns else "text"
        expected = "; ".join(f"{' and '.join(kind.roles)} ({name})" for name, kind in KINDS.items())
        raise BadData(
            f"{content.title} has no column {_missing(columns)}; its columns are {shown}. Expected are "
            f"{expected}. Say which is which: -p {missing}_column={besides[0] if besides else 'NAME'} "
            "(in Python an argument), or -p kind=."
        )

    def _fields(self, content: Columns) -> dict[str, Any]:
        """Return the fields of the task that settings decide; labels are read where there are none given."""
        kind, names = KINDS[self.kind], {name for kind in KINDS.values() for name in kind.settings}
        fields = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if unknown := sorted(fields.keys() - {*kind.settings}):
            legal = ", ".join(kind.settings)
            raise BadSetting(f"{self.name} is {self.kind}: no setting {', '.join(unknown)}; it has {legal}.")
        if self.prompted("\0") == self.prompt:
            raise BadSetting(f"prompt={self.prompt!r} lacks {{{kind.roles[0]}}}, the place of the text.")
        if self.kind == "language-modelling" and self.model is not None and self.window is None:
            limit = positions(bare(self.model)) or LanguageModelling.window
            fields["window"] = min(LanguageModelling.window, limit)
        if "labels" in kind.settings:
            labels = renamed_labels(self.labels)
            names = labels or self._known_labels(content)
            self.renamed = labels if isinstance(labels, Mapping) else dict(zip(names, names))
            self.names = list(dict.fromkeys(self.renamed.values()))
            if len(self.names) < 2:
                column = ", ".join(self.columns["label"])
                raise BadData(
                    f"{self.source}: column {column!r} has fewer than two different labels ({self.names})."
                )
            fields |= {"labels": self.names, "labels_ordered": isinstance(labels, list)}
        return {name: field for name, field in fields.items() if name != "prompt"}

    def prompted(self, text: str) -> str:
        """Return a source or question within the prompt."""
        return text if self.prompt is None else self.prompt.replace(f"{{{KINDS[self.kind].roles[0]}}}", text)

    def indices(self, labels: Sequence[list[str]], title: str) -> list[list[int]]:
        """Return the indices of the labels of each row; `BadData` names unknown ones."""
        if unknown := sorted({label for row in labels for label in row} - {*self.renamed}):
            raise BadData(f"{title} has the labels {unknown}, which are not among {list(self.renamed)}.")
        return [[self.names.index(self.renamed[label]) for label in row] for row in labels]

    def _known_labels(self, content: Columns) -> list[str]:
        """Return the labels in the data set's order, else sorted, numbers by value."""
        columns = self.columns["label"]
        if len(columns) > 1:
            return list(columns)
        declared = content.select(columns).class_names(columns[0])
        labels = (row["label"] for row in self._rows(content))
        distinct = {label for cell in labels for label in (cell if isinstance(cell, list) else [cell])}
        return declared or sorted(distinct, key=lambda label: (_number(label, math.inf), label))

    def _rows(self, content: Columns) -> list[Row]:
        """Return each role's text, or list of texts; `BadData` names the first row that lacks one."""
        names = [name for columns in self.columns.values() for name in columns]
        several, rows, blank = KINDS[self.kind].several, [], []
        for number, cells in enumerate(content.select(names).rows(named=True), start=1):
            by_name, row = dict(zip(names, cells)), {}
            for role, columns in self.columns.items():
                texts = [_text(by_name[name]) for name in columns]
                if isinstance(texts[0], list) and role != several:
                    raise BadData(
                        f"{content.title}: row {number} has a list in {columns[0]!r}; {self.kind} takes one "
                        "value. Lists are labels of kind='multi-label', or choices."
                    )
                row[role] = texts[0] if role != several else texts if len(columns) > 1 else _listed(texts[0])
                if role == several == "label" and len(columns) > 1:
                    marks = [_MARKS.get(str(text).strip().casefold().removesuffix(".0")) for text in texts]
                    if None in marks:
                        wrong = {number - 1: texts[marks.index(None)]}
                        _refuse(wrong, content.title, f"0 or 1 in each of {', '.join(columns)}")
                    row[role] = [name for name, mark in zip(columns, marks) if mark]
                # None of a multi-label task's classes may hold; everything else says something.
                if not row[role] and not (role == several == "label"):
                    blank.append((number, columns[0]))
            rows.append(row)
        if blank:
            raise BadData(
                f"{content.title}: row {blank[0][0]} lacks a {blank[0][1]} ({len(blank)} blank or missing "
                "cells in all, the header not counted). Fill them, or remove the rows."
            )
        return rows

    def _examples(self, content: Columns) -> list[dict]:
        return KINDS[self.kind].examples(self._rows(content), self, content.title)

    def _training(self, split: str) -> list[dict]:
        examples = self._examples(self._content(split, self.train_path))
        if len({example.get("document", i) for i, example in enumerate(examples)}) == 1:
            # Trained on in random order, so each paragraph of one text is a document.
            return [example | {"document": number} for number, example in enumerate(examples)]
        return examples


def _of_labels(content: Columns, labelled: list[str]) -> list[str]:
    """Return which of the kinds of labelled texts, of which more than one fits, the labels are of."""
    cells = [cell for row in content.rows() for cell in row]
    texts = [text for cell in cells if (text := _text(cell))]
    numbers = [_number(text) for text in texts]
    kinds = ["classification"]
    if len(content.table.columns) > 1 or any(isinstance(cell, list) for cell in cells):
        kinds = ["multi-label"]
    elif content.class_names(content.table.column_names[0]):
        pass
    elif all(map(math.isfinite, numbers)) and any("." in text for text in texts):
        is_whole = all(number.is_integer() for number in numbers)
        kinds = ["classification", "regression"] if is_whole else ["regression"]
    elif any(SEPARATOR in text for text in texts):
        kinds = ["classification", "multi-label"]
    return [name for name in labelled if name in kinds] or labelled[:1]


def _missing(columns: Mapping[str, object]) -> str:
    """Return the columns that are missing for the kind of which most are there."""
    missing = [[role for role in kind.roles if role not in columns] for kind in KINDS.values()]
    partly = [r for r, kind in zip(missing, KINDS.values()) if 0 < len(r) < len(kind.roles)]
    return ", ".join(repr(ROLES[role][0]) for role in min(partly or [["text"]], key=len))


def _listed(cell: str | list[str]) -> list[str]:
    """Return the texts of a list, or of a cell with separators or a JSON list."""
    if isinstance(cell, str) and re.match(r"\s*\[.*\]\s*$", cell, re.DOTALL):
        with suppress(json.JSONDecodeError, RecursionError):  # how a list is often kept in a .csv
            cell = _text(json.loads(cell))
    texts = cell if isinstance(cell, list) else [text.strip() for text in cell.split(SEPARATOR)]
    return [text for text in texts if text]


def _text(cell: Any) -> str | list[str]:
    """Return a cell, or each of a list, as text; a missing one is empty."""
    if isinstance(cell, list):
        return [str(_text(element)) for element in cell]
    is_missing = cell is None or cell != cell or not str(cell).strip()
    return "" if is_missing else str(cell)


def _number(text: str, otherwise: float = math.nan) -> float:
    """Return a number, `otherwise` for a text that is none or not finite."""
    try:
        return float(text) if math.isfinite(float(text)) else otherwise
    except (TypeError, ValueError):
        return otherwise


def renamed_labels(labels: Labels) -> list[str] | dict[str, str] | None:
    """Return the setting `labels` as strings, a command line's `a,b` or `a=x,b=y` taken apart."""
    if isinstance(labels, str):
        fields = [label.strip() for label in labels.split(",")]
        labels = dict(label.split("=", 1) for label in fields) if all("=" in f for f in fields) else fields
    if isinstance(labels, Mapping):
        return {str(label).strip(): str(name).strip() for label, name in labels.items()}
    return labels and [str(label) for label in labels]
