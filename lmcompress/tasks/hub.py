"""The published benchmarks, under the Hub's ids and column names."""

from functools import partial

from lmcompress.tasks.classification import Classification, Similarity
from lmcompress.tasks.data import configs_of, read_split, sample
from lmcompress.tasks.generation import TRANSLATION_PROMPT, Generation
from lmcompress.tasks.language_modelling import LanguageModelling
from lmcompress.tasks.minimal_pairs import MinimalPairs

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


def blimp(*, split: str = "train", limit: int | None = None, seed: int = 0) -> MinimalPairs:
    """BLiMP (Warstadt et al. 2020): every paradigm that is there, `limit` pairs of each."""
    name, columns = "nyu-mll/blimp", ["sentence_good", "sentence_bad", "field"]
    examples = []
    for paradigm in configs_of(name):
        frame = read_split(name, paradigm, split, columns)
        rows = [
            {"good": good, "bad": bad, "field": field.replace("/", "_"), "paradigm": paradigm}
            for good, bad, field in zip(*(frame[column] for column in columns))
        ]
        examples += sample(rows, limit, seed)
    return MinimalPairs(name="blimp", split=split, examples=examples, source=name)


_LANGUAGES = {"de": "German", "fr": "French"}


def multi30k(to: str, *, split: str = "test", limit: int | None = None, seed: int = 0) -> Generation:
    """Multi30k image captions, English to German or French (Elliott et al. 2016); `test` is test2016, 1,000 lines."""

    def examples(which: str) -> list[dict]:
        frame = read_split("bentrevett/multi30k", None, which, ["en", to])
        prompts = [TRANSLATION_PROMPT.format(language=_LANGUAGES[to], text=text) for text in frame["en"]]
        return [{"text": prompt, "target": target} for prompt, target in zip(prompts, frame[to])]

    return Generation(
        name=f"multi30k-en-{to}",
        split=split,
        examples=sample(examples(split), limit, seed),
        source="bentrevett/multi30k",
        training=examples,
        training_source="bentrevett/multi30k",
        metric="bleu",
    )


TASKS = {
    "sst2": sst2,
    "stsb": stsb,
    "wikitext2": wikitext2,
    "tinystories": tinystories,
    "blimp": blimp,
    "multi30k-en-de": partial(multi30k, "de"),
    "multi30k-en-fr": partial(multi30k, "fr"),
}
