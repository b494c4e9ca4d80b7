"""The published benchmarks, under the Hub's ids and column names, and a user's own labelled file."""

from pathlib import Path

from helpers.errors import BadData
from helpers.tasks.data import check_columns, read_split, read_table, sample
from helpers.tasks.language_modelling import LanguageModelling
from helpers.tasks.text_classification import Classification, Similarity

ROWS_PER_DOCUMENT = 50  # WikiText marks no articles; its training rows are shuffled in stretches of this many


def sst2(*, split: str = "validation", limit: int | None = None, seed: int = 0) -> Classification:
    """SST-2, the sentiment of a sentence (Socher et al. 2013); `validation` has 872 examples."""

    def examples(which: str) -> list[dict]:
        frame = read_split("nyu-mll/glue", "sst2", which, ["sentence", "label"])
        return [{"text": t, "label": int(y)} for t, y in zip(frame["sentence"], frame["label"])]

    return Classification(
        name="sst2",
        split=split,
        examples=sample(examples(split), limit, seed),
        source="nyu-mll/glue sst2",
        training=examples,
        training_source="nyu-mll/glue sst2",
        labels=["negative", "positive"],
    )


def stsb(*, split: str = "validation", limit: int | None = None, seed: int = 0) -> Similarity:
    """STS-B, how alike two sentences mean, rated 0 to 5 (Cer et al. 2017); `validation` has 1,500 pairs."""

    def examples(which: str) -> list[dict]:
        frame = read_split("nyu-mll/glue", "stsb", which, ["sentence1", "sentence2", "label"])
        rows = zip(frame["sentence1"], frame["sentence2"], frame["label"])
        return [{"text": a, "pair": b, "label": float(y)} for a, b, y in rows]

    return Similarity(
        name="stsb",
        split=split,
        examples=sample(examples(split), limit, seed),
        source="nyu-mll/glue stsb",
        training=examples,
        training_source="nyu-mll/glue stsb",
    )


def wikitext2(
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int | None = None,
) -> LanguageModelling:
    """WikiText-2 raw as one text, its rows joined by empty lines as in the published perplexities.

    `limit` takes the first rows.
    """
    del seed

    def examples(which: str) -> list[dict]:
        texts = read_split("Salesforce/wikitext", "wikitext-2-raw-v1", which, ["text"])["text"]
        rows = 0 if which == split else 1  # what is evaluated is one text; what is trained on is shuffled
        return [{"text": t, "document": rows * (i // ROWS_PER_DOCUMENT)} for i, t in enumerate(texts)]

    return LanguageModelling(
        name="wikitext2",
        split=split,
        examples=examples(split)[:limit],
        source="Salesforce/wikitext wikitext-2-raw-v1",
        training=examples,
        training_source="Salesforce/wikitext wikitext-2-raw-v1",
        window=window,
        stride=stride,
    )


def tinystories(
    *,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int | None = None,
) -> LanguageModelling:
    """TinyStories; a row is a text, its paragraphs the examples (a row may hold very many of them).

    `limit` takes the first paragraphs.
    """
    del seed

    def examples(which: str) -> list[dict]:
        texts = read_split("roneneldan/TinyStories", None, which, ["text"])["text"]
        return [{"text": part, "document": i} for i, text in enumerate(texts) for part in text.split("\n\n")]

    return LanguageModelling(
        name="tinystories",
        split=split,
        examples=examples(split)[:limit],
        source="roneneldan/TinyStories",
        training=examples,
        training_source="roneneldan/TinyStories",
        window=window,
        stride=stride,
    )


def own_file(
    path: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
    labels: list[str] | None = None,
    train_path: str | Path | None = None,
) -> Classification:
    """Labelled texts of a .csv or .jsonl file, all of them evaluated.

    Args:
        labels: class names in the order of the model's outputs; sorted by default.
        train_path: a file like it to train on.

    Raises:
        BadData: a column that is not there, no rows, an unknown label, or one label only.
    """
    columns = [text_column, label_column, *([text_pair_column] if text_pair_column else [])]

    def rows(file: Path) -> list[dict]:
        frame = check_columns(read_table(Path(file)), columns, str(file)).dropna(subset=columns)
        names = {"text": text_column, "label": label_column} | (
            {"pair": text_pair_column} if text_pair_column else {}
        )
        return [{k: str(row[c]) for k, c in names.items()} for row in frame[columns].to_dict("records")]

    def numbered(file: Path) -> list[dict]:
        found = rows(file)
        unknown = sorted({row["label"] for row in found} - set(order))
        if unknown:
            raise BadData(f"{file} has the labels {unknown}, which are not among {order}.")
        return [{**row, "label": order.index(row["label"])} for row in found]

    order = [str(x) for x in labels] if labels else sorted({r["label"] for r in rows(path)}, key=_by_number)
    if len(order) < 2:
        raise BadData(f"{path}: column {label_column!r} has fewer than two different labels ({order}).")
    return Classification(
        name=path.name,
        split=split,
        examples=sample(numbered(path), limit, seed),
        source=path.name,
        training=(lambda _: numbered(Path(train_path))) if train_path else None,
        training_source=str(train_path or ""),
        labels=order,
    )


def _by_number(label: str) -> tuple[float, str]:
    try:
        return (float(label), label)
    except ValueError:
        return (float("inf"), label)
