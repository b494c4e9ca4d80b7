"""The published benchmarks: a table of Hub ids, configurations, columns and splits, read by one function."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from lmcompress.errors import NoSuchSplit
from lmcompress.models import assets
from lmcompress.tasks.base import Task
from lmcompress.tasks.classification import Classification, Similarity
from lmcompress.tasks.data import listed_files, read_split, sample
from lmcompress.tasks.generation import TRANSLATION_PROMPT, Generation
from lmcompress.tasks.held_out import HoldOut
from lmcompress.tasks.language_modelling import LanguageModelling
from lmcompress.tasks.minimal_pairs import MinimalPairs

HELD_OUT = "held-out"
HALVES = ("report", "selection")  # of a split that is all there is: "validation/report"
ROWS_PER_DOCUMENT = 50  # WikiText marks no articles; its training rows are shuffled in stretches of this many


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A line of the table: where a benchmark lies on the Hub, and how a row becomes an example.

    Attributes:
        split: what is reported on by default.
        selection: the split that configurations are chosen on, which `split` never is.
        hold_out: which rows of the training split are the split `HELD_OUT` instead.
        example: takes the columns' values of a row; of running text all rows, and whether they are evaluated.
        settings: of the task that is made.
    """

    path: str
    config: str | None = None
    columns: tuple[str, ...]
    split: str
    make: type[Task]
    example: Callable[..., Any]
    selection: str | None = None
    hold_out: HoldOut | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Id and configuration, as rows record it."""
        return f"{self.path} {self.config}" if self.config else self.path

    def rows(self, split: str) -> list[tuple]:
        """Read the columns' values, row by row; of "split/report" and "split/selection" half of the rows.

        A row alone is a text of many paragraphs, of which the first half is reported on.
        """
        whole, number = _half(split)
        rows = self._rows(whole)
        if number is not None and len(rows) == 1:
            paragraphs = rows[0][0].split("\n\n")
            middle = len(paragraphs) // 2
            return [("\n\n".join((paragraphs[:middle], paragraphs[middle:])[number]),)]
        return rows if number is None else [row for row in rows if _hash(row[0]) % 2 == number]

    def _rows(self, split: str) -> list[tuple]:
        if self.hold_out is None or split not in (HELD_OUT, "train"):
            return read_split(self.path, self.config, split).select(self.columns).rows()
        folder = assets.resolve(self.path, kind="datasets")
        return _parted(str(folder), self.config, self.columns, self.hold_out)[split == "train"]


@lru_cache(maxsize=2)
def _parted(
    folder: str, config: str | None, columns: tuple[str, ...], hold_out: HoldOut
) -> list[list[tuple]]:
    """Return the rows held out of a training split, and those to train on; finding them takes seconds."""
    rows = read_split(folder, config, "train").select(columns).rows()
    texts = [" ".join(cell for cell in row if isinstance(cell, str)) for row in rows]
    return [[rows[i] for i in part] for part in hold_out.split(texts)]


def labelled(
    name: str, data_set: DataSet, *, split: str = "", limit: int | None = None, seed: int = 0
) -> Task:
    """Make a task of independent rows; `limit` of them are drawn by `seed`."""
    evaluated = split or data_set.split

    def read(split: str) -> list[dict]:
        return [data_set.example(*row) for row in data_set.rows(split)]

    examples = sample(read(evaluated), limit, seed)
    fields = {"name": name, "split": evaluated, "source": data_set.source, "training": read}
    return data_set.make(examples=examples, **fields, **data_set.settings)


def running_text(
    name: str,
    data_set: DataSet,
    *,
    split: str = "",
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int | None = None,
) -> LanguageModelling:
    """Make a task of one text after the other; `limit` takes the first rows or paragraphs at any seed."""
    evaluated = split or data_set.split

    def read(split: str) -> list[dict]:
        return data_set.example([text for (text,) in data_set.rows(split)], split == evaluated)

    fields = {"name": name, "source": data_set.source, "window": window, "stride": stride}
    return LanguageModelling.reading(read, split=evaluated, limit=limit, **fields)


def blimp(*, split: str = "train/report", limit: int | None = None, seed: int = 0) -> MinimalPairs:
    """Make BLiMP (Warstadt et al. 2020) of every paradigm that is there, `limit` pairs of each.

    Its one split, "train", has halves: of the 67 paradigms, "train/report" has 34 and "train/selection" 33.
    """
    name, examples = "nyu-mll/blimp", []
    configs = listed_files(assets.resolve(name, kind="datasets"))
    whole, number = _half(split)
    paradigms = sorted((config for config, splits in configs.items() if whole in splits), key=_hash)
    for paradigm in sorted(paradigms if number is None else paradigms[number::2]):
        columns = ["sentence_good", "sentence_bad", "field"]
        rows = read_split(name, paradigm, whole).select(columns).rows()
        for good, bad, field_name in sample(rows, limit, seed):
            field = field_name.replace("/", "_")
            examples.append({"good": good, "bad": bad, "field": field, "paradigm": paradigm})
    return MinimalPairs(name="blimp", split=split, examples=examples, source=name)


def _half(split: str) -> tuple[str, int | None]:
    """Return the split that is stored, and which of its `HALVES` is meant, None for the whole."""
    whole, _, half = split.partition("/")
    if half and half not in HALVES:
        raise NoSuchSplit(f"no half {half!r} of the split {whole!r}: expected {' or '.join(HALVES)}.")
    return whole, HALVES.index(half) if half else None


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


def _wikitext(texts: list[str], evaluated: bool) -> list[dict]:
    """Return one text, as in the published perplexities; for shuffled training, it is cut into documents."""
    rows = len(texts) if evaluated else ROWS_PER_DOCUMENT
    return [{"text": text, "document": number // rows} for number, text in enumerate(texts)]


def _stories(texts: list[str], evaluated: bool) -> list[dict]:
    """Return the paragraphs of each row, a text (which may hold very many of them)."""
    return [{"text": line, "document": i} for i, text in enumerate(texts) for line in text.split("\n\n")]


def _multi30k(column: str, language: str) -> DataSet:
    """Return image captions (Elliott et al. 2016); `test` is test2016, 1,000 lines."""

    def example(text: str, target: str) -> dict:
        return {"text": TRANSLATION_PROMPT.format(language=language, text=text), "target": target}

    columns = {"path": "bentrevett/multi30k", "columns": ("en", column), "split": "test"}
    columns["selection"] = "validation"
    return DataSet(**columns, make=Generation, example=example, settings={"metric": "bleu"})


_TEXT = {"columns": ("text",), "make": LanguageModelling}
DATA_SETS = {
    # Sentiment of a sentence (Socher et al. 2013); its test labels are not published. `validation` has 872.
    "sst2": DataSet(
        path="nyu-mll/glue",
        config="sst2",
        columns=("sentence", "label"),
        split=HELD_OUT,
        selection="validation",
        make=Classification,
        example=lambda text, label: {"text": text, "label": int(label)},
        settings={"labels": ["negative", "positive"]},
        hold_out=HoldOut(2000, least_words=10),
    ),
    # How alike two sentences mean, rated 0 to 5 (Cer et al. 2017); `validation` has 1,500 pairs.
    "stsb": DataSet(
        path="nyu-mll/glue",
        config="stsb",
        columns=("sentence1", "sentence2", "label"),
        split=HELD_OUT,
        selection="validation",
        make=Similarity,
        example=lambda text, pair, label: {"text": text, "pair": pair, "label": float(label)},
        hold_out=HoldOut(1000, least_words=4),
    ),
    "wikitext2": DataSet(
        path="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test", example=_wikitext, **_TEXT
    ),
    "tinystories": DataSet(
        path="roneneldan/TinyStories",
        split="validation/report",
        selection="validation/selection",
        example=_stories,
        **_TEXT,
    ),
    "multi30k-en-de": _multi30k("de", "German"),
    "multi30k-en-fr": _multi30k("fr", "French"),
}
TASKS: dict[str, Callable[..., Task]] = {"blimp": blimp} | {
    name: partial(running_text if data_set.make is LanguageModelling else labelled, name, data_set)
    for name, data_set in DATA_SETS.items()
}
SELECTION = {"blimp": "train/selection"} | {
    name: data_set.selection for name, data_set in DATA_SETS.items() if data_set.selection
}
