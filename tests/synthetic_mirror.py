"""A small stand-in for downloaded data sets: the Hub's ids, configs, splits and column names, made-up text.

`build(folder)` lays it out as `hf download --local-dir` would; set ASSET_MIRROR to the folder. `documents` is
the
like for the harvested corpus, `byte_tokenizer` a tokenizer that needs no training.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_SUBJECTS = [
    "the film",
    "a quiet drama",
    "this sequel",
    "his début",
    "the naïve plot",
    "every scene",
    "one joke",
]
_VERBS = ["delights", "drags", "convinces", "annoys", "charms", "fails", "shines"]
_TAILS = ["from start to end", "in places", "without effort", "despite its cast", "for an hour", "at last"]
CAPTIONS = (("train", 40, 7), ("validation", 8, 9), ("test", 10, 8))
PARADIGMS = {"determiner_noun": "morphology", "wh_island": "syntax", "npi_scope": "syntax/semantics"}


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """`count` different sentences, some with letters outside ASCII."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        words = [parts[rng.integers(len(parts))] for parts in (_SUBJECTS, _VERBS, _TAILS)]
        drawn[" ".join([*words, f"{rng.integers(1000)} ."])] = None
    return list(drawn)


def long_sentences(count: int, *, seed: int) -> list[str]:
    """`count` sentences of eleven words or more, a number after each few, so that no two share a phrase."""
    rng = np.random.default_rng(seed)
    texts = sentences(count, seed=seed)
    return [
        " ".join(w if i % 2 else f"{w} {rng.integers(10_000)}" for i, w in enumerate(t.split()))
        for t in texts
    ]


def build(folder: Path, *, french: bool = True) -> Path:
    """Write the data sets under `folder/datasets`; returns `folder`, the value for ASSET_MIRROR."""
    datasets = folder / "datasets"
    _write(datasets / "nyu-mll/glue", {"sst2": {"train": _sst2(60, 1), "validation": _sst2(24, 2)}})
    _write(datasets / "nyu-mll/glue", {"stsb": {"train": _stsb(40, 3), "validation": _stsb(16, 4)}})
    _write(datasets / "Salesforce/wikitext", {"wikitext-2-raw-v1": {"test": _wikitext()}})
    stories = {"train": pd.DataFrame({"text": ["\n\n".join(sentences(4, seed=s)) for s in range(10, 30)]})}
    stories["validation"] = pd.DataFrame({"text": ["\n\n".join(sentences(6, seed=s)) for s in range(50, 54)]})
    _write(datasets / "roneneldan/TinyStories", {"default": stories}, data="data")
    _write(datasets / "nyu-mll/blimp", {name: {"train": _pairs(name)} for name in PARADIGMS})
    lines = {split: _captions(n, seed, french) for split, n, seed in CAPTIONS}
    _write(datasets / "bentrevett/multi30k", {"default": lines}, data="data")
    return folder


def _write(folder: Path, configs: dict[str, dict[str, pd.DataFrame]], *, data: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    entries = readme.read_text().split("---\n")[1].splitlines()[1:] if readme.exists() else []
    for config, splits in configs.items():
        entries += [f"- config_name: {config}", "  data_files:"]
        for split, frame in splits.items():
            place = folder / (data or config)
            place.mkdir(exist_ok=True)
            frame.to_parquet(place / f"{split}-00000-of-00001.parquet")
            entries += [f"  - split: {split}", f"    path: {data or config}/{split}-*"]
    readme.write_text("\n".join(["---", "configs:", *entries, "---", "", "# made up", ""]))


def _sst2(count: int, seed: int) -> pd.DataFrame:
    texts = long_sentences(count, seed=seed)
    return pd.DataFrame({"sentence": texts, "label": [len(t) % 2 for t in texts], "idx": range(count)})


def _stsb(count: int, seed: int) -> pd.DataFrame:
    texts = long_sentences(2 * count, seed=seed)
    ratings = np.random.default_rng(seed).uniform(0, 5, count).astype(np.float32)
    columns = {"sentence1": texts[:count], "sentence2": texts[count:], "label": ratings}
    return pd.DataFrame(columns | {"idx": range(count)})


def _wikitext() -> pd.DataFrame:
    return pd.DataFrame({"text": ["", " = A heading = \n", *(f" {s} \n" for s in sentences(20, seed=6)), ""]})


def _pairs(paradigm: str) -> pd.DataFrame:
    good = sentences(6, seed=sum(map(ord, paradigm)))
    bad = [" ".join(reversed(text.split())) for text in good]
    columns = {"sentence_good": good, "sentence_bad": bad, "field": PARADIGMS[paradigm], "UID": paradigm}
    return pd.DataFrame(columns | {"pairID": [str(i) for i in range(6)]})


def _captions(count: int, seed: int, french: bool) -> pd.DataFrame:
    texts = sentences(count, seed=seed)
    columns = {"en": texts, "de": [f"Übersetzt: {t}" for t in texts]}
    return pd.DataFrame(columns | ({"fr": [f"Traduit à peu près: {t}" for t in texts]} if french else {}))


# ---------------------------------------------------------------- the harvested corpus


def documents(split: str, *, per_library: int = 12) -> pd.DataFrame:
    """Documents as `lmcompress.corpus.pydocs` gives them, in a random order; each library has its own
    words.
    """
    from lmcompress.corpus import pydocs

    rows = []
    for library in pydocs.LIBRARIES:
        seed = sum(map(ord, library + split))
        for number, text in enumerate(sentences(per_library, seed=seed)):
            name = f"{library}_{split}_{number}"
            rows.append(
                {
                    "qualname": f"{library}.{name}",
                    "library": library,
                    "kind": "function",
                    "signature": f"{name}(x, y={number})",
                    "summary": f"{text[:-2]} as item {number} of {split} does.".capitalize(),
                    "body": f"Parameters:\nx: {text}" if number % 3 else "",
                    "split": split,
                }
            )
    return pd.DataFrame(rows).sample(frac=1, random_state=0, ignore_index=True)


class FakeCorpus:
    """What `corpus.harvest()` returns, without harvesting."""

    def documents(self, split: str, *, limit: int | None = None) -> pd.DataFrame:
        """The first `limit` documents of a split."""
        return documents(split).iloc[:limit]


# ---------------------------------------------------------------- a tokenizer


def byte_tokenizer(
    *, encoder: bool = False, closing: bool = False, merges: int = 0
) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8 (ids 5 to 260), so that a test can count by hand.

    Args:
        encoder: surround texts by [CLS] and [SEP], the second of a pair in segment 1.
        closing: end every text by the end token, as T5's tokenizers do.
        merges: letter pairs that are one token (ids from 261 on).
    """
    specials = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "aeiou" for b in "nrst"][:merges]
    tokens = [*specials, *alphabet, *(a + b for a, b in pairs)]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    if encoder:
        ends = [("[CLS]", 3), ("[SEP]", 4)]
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    if closing:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if encoder
        else ["input_ids", "attention_mask"],
    )


VOCABULARY = 300  # room for the byte tokenizer and its merges
