"""The tasks without a download: harvested docstrings for classification, language modelling, summaries."""

import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from lmcompress.corpus import pydocs
from lmcompress.tasks.classification import Classification
from lmcompress.tasks.generation import SUMMARY_PROMPT, Continuation, Generation
from lmcompress.tasks.language_modelling import LanguageModelling

MIN_WORDS = 4
CONTINUED_WORDS = (32, 16)  # words of a body that are given, and that are to follow
_ALIASES = {  # how a library is called besides its own name
    "matplotlib": ("mpl", "plt", "pyplot"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "python": ("cpython",),
    "scipy": ("sp",),
    "sklearn": ("scikit-learn", "scikit", "sk"),
    "sympy": ("sym",),
    "torch": ("pytorch",),
    "transformers": ("huggingface", "hugging face"),
}


def _labelled(name: str, labels: list[str], examples_of: Callable, *, split, limit, seed) -> Classification:
    read = lambda split, limit=None: examples_of(_documents(split), limit=limit, seed=seed)  # noqa: E731
    fields = {"name": name, "source": "pydocs", "labels": labels, "training": read}
    return Classification(split=split, examples=read(split, limit), **fields)


def library(*, split: str = "test", limit: int | None = None, seed: int = 0) -> Classification:
    """Make the task: which of ten libraries does this summary line document? As many examples of each."""
    names = list(pydocs.LIBRARIES)
    return _labelled("pydocs-library", names, library_examples, split=split, limit=limit, seed=seed)


def library_examples(documents: pd.DataFrame, *, limit: int | None, seed: int) -> list[dict]:
    """Return class-balanced `{"text": summary, "label"}` in random order, `limit` in all.

    Left out: summaries under four words, those that name their own library (or its import alias), and those
    that stand in more than one library; of repeated ones, one stays.
    """
    frame = documents[documents["library"].isin(pydocs.LIBRARIES)]
    frame = frame[frame["summary"].str.split().str.len() >= MIN_WORDS]
    keys = frame["summary"].str.casefold().str.split().str.join(" ")
    frame = frame[frame.groupby(keys)["library"].transform("nunique") == 1]
    frame = frame[~keys.loc[frame.index].duplicated()]
    frame = frame[[not names_itself(s, name) for s, name in zip(frame["summary"], frame["library"])]]
    rng = np.random.default_rng(seed)
    by_class = [frame.loc[frame["library"] == name, "summary"].tolist() for name in pydocs.LIBRARIES]
    size = min(map(len, by_class))
    size = size if limit is None else min(size, limit // len(by_class))
    examples = [
        {"text": texts[i], "label": label}
        for label, texts in enumerate(by_class)
        for i in rng.choice(len(texts), size=size, replace=False)
    ]
    return [examples[i] for i in rng.permutation(len(examples))]


def names_itself(text: str, name: str) -> bool:
    """Return whether a text says its library's name anywhere, or an import alias as a word, in any case."""
    aliases = "|".join(map(re.escape, _ALIASES[name]))
    return name in text.lower() or bool(re.search(rf"(?<![a-z])({aliases})(?![a-z])", text.lower()))


def signature(*, split: str = "test", limit: int | None = None, seed: int = 0) -> Classification:
    """Make the task: is this summary line of this signature? Half are; others are of the same library."""
    names = ["mismatch", "match"]
    return _labelled("pydocs-signature", names, signature_examples, split=split, limit=limit, seed=seed)


def signature_examples(documents: pd.DataFrame, *, limit: int | None, seed: int) -> list[dict]:
    """Return `{"text": summary, "pair": signature, "label"}`, alternately its own and another document's
    signature.

    A document whose library has no other signature in this split is left out.
    """
    frame = documents[documents["kind"].isin(("function", "class")) & (documents["signature"] != "")]
    frame = frame[frame["summary"].str.split().str.len() >= MIN_WORDS]
    by_library = {name: group.to_numpy() for name, group in frame.groupby("library")["signature"]}
    several = {name for name, signatures in by_library.items() if len(set(signatures)) > 1}
    frame = frame[frame["library"].isin(several)].iloc[:limit]
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(len(frame)) % 2)
    examples, columns = [], (frame[name] for name in ("summary", "signature", "library"))
    for summary, signature, name, label in zip(*columns, labels):
        shown = signature
        while not label and shown == signature:
            shown = by_library[name][rng.integers(len(by_library[name]))]
        examples.append({"text": summary, "pair": str(shown), "label": int(label)})
    return examples


# The tasks below take the first `limit` documents, whatever the seed: the corpus has one fixed random order,
# so
# that every model is scored on the same text.


def language_modelling(
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int | None = None,
) -> LanguageModelling:
    """Make the task of held-out documents: signature, summary, body."""

    def read(split: str, limit: int | None = None) -> list[dict]:
        rows = _documents(split, limit).to_dict("records")
        return [{"text": document_text(row), "document": number} for number, row in enumerate(rows)]

    fields = {"name": "pydocs-lm", "source": "pydocs", "window": window, "stride": stride}
    return LanguageModelling(split=split, examples=read(split, limit), training=read, **fields)


def summary(*, split: str = "test", limit: int | None = None, seed: int = 0) -> Generation:
    """Make the task: write the summary line of a document from its signature and body."""

    def read(split: str) -> list[dict]:
        return list(filter(None, map(summary_example, _documents(split).to_dict("records"))))

    fields = {"name": "pydocs-summary", "source": "pydocs", "metric": "chrf", "english": True}
    return Generation.reading(read, split=split, limit=limit, **fields)


def summary_example(document: dict) -> dict | None:
    """Return `{"text": prompt, "target": summary}`; None where there is no body or a summary of one word."""
    if not document["body"] or len(document["summary"].split()) < 2:
        return None
    return {"text": SUMMARY_PROMPT.format(**document), "target": document["summary"]}


def continuation(*, split: str = "test", limit: int | None = None, seed: int = 0) -> Continuation:
    """Make the task: go on with a document's body, if it is long enough, after its first words."""
    start, total = CONTINUED_WORDS[0], sum(CONTINUED_WORDS)
    bodies = [words for body in _documents(split)["body"] if len(words := body.split()) >= total]
    examples = [
        {"text": " ".join(words[:start]), "target": " " + " ".join(words[start:total])} for words in bodies
    ]
    fields = {"name": "pydocs-continuation", "source": "pydocs", "metric": "bleu", "english": True}
    new_tokens = 2 * CONTINUED_WORDS[1]
    return Continuation(split=split, examples=examples[:limit], max_new_tokens=new_tokens, **fields)


def document_text(document: dict) -> str:
    """Return a document's full text: signature, summary and body, each apart by an empty line."""
    return "\n\n".join(filter(None, (document["signature"], document["summary"], document["body"])))


def _documents(split: str, limit: int | None = None) -> pd.DataFrame:
    return pydocs.harvest().documents(split, limit=limit)


TASKS = {
    "pydocs-library": library,
    "pydocs-signature": signature,
    "pydocs-lm": language_modelling,
    "pydocs-summary": summary,
    "pydocs-continuation": continuation,
}
