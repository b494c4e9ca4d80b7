"""English technical prose that every machine with this environment already has: its packages' docstrings.

They are read with `ast` (no package is imported), cleaned, freed of duplicates, split by the hash of the
qualified name, and kept as one parquet file per set of package versions under `data/raw/pydocs/`.
"""

import gc
import hashlib
import json
import logging
import os
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from joblib import Parallel, delayed
from pyarrow import dataset

from lmcompress import paths
from lmcompress.corpus import docstrings
from lmcompress.corpus.docstrings import LIBRARIES as LIBRARIES  # what is offered with the corpus
from lmcompress.corpus.docstrings import Raw, installed_sources
from lmcompress.corpus.prose import clean, split_summary, words
from lmcompress.errors import BadData, BadSetting

VERSION = 3  # bump on any change of what is harvested, cleaned or split: it is part of the folder's name
SPLITS = ("train", "validation", "test")
COLUMNS = ("qualname", "library", "kind", "signature", "summary", "body", "split")

_MIN_WORDS, _MAX_SUMMARY, _SHINGLE, _NEAR_DUPLICATE = 5, 400, 8, 0.5
log = logging.getLogger(__name__)


def _document(raw: Raw, library: str) -> dict | None:
    """Return a docstring as a document, or None if it is not English that begins with a sentence."""
    signature, text = docstrings.lift_signature(raw, clean(raw.doc))
    summary, body = split_summary(text)
    tokens, letters = words(text), sum(map(str.isalpha, text))
    foreign = len(text) - len(text.encode("ascii", "ignore"))
    is_english = letters >= 0.6 * len(re.sub(r"\s", "", text)) and foreign <= 0.1 * len(text)
    is_sentence = len(words(summary)) > 1 and len(summary) <= _MAX_SUMMARY and "://" not in summary
    if len(tokens) < _MIN_WORDS or not is_english or not is_sentence:
        return None
    return {
        "qualname": raw.qualname,
        "library": library,
        "kind": raw.kind,
        "signature": signature,
        "summary": summary,
        "body": body,
        "split": split_of(raw.qualname),
        "digest": hashlib.blake2b(" ".join(tokens).encode(), digest_size=16).digest(),
        "shingles": shingles(tokens),
    }


def split_of(qualname: str) -> str:
    """Return a document's split by sha256 of its name: 90 % train, 5 % validation, 5 % test, everywhere."""
    share = int(hashlib.sha256(qualname.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.90 else "validation" if share < 0.95 else "test"


def shingles(tokens: list[str]) -> np.ndarray:
    """Return distinct 8-word windows as `(n,)` uint64 hashes; a shorter text is one window."""
    hashes = [zlib.crc32(token.encode()) for token in tokens]
    codes = np.array(hashes + [0] * (_SHINGLE - len(hashes)), np.uint64)
    total = np.zeros(len(codes) - _SHINGLE + 1, np.uint64)
    for offset in range(_SHINGLE):
        total = (total * np.uint64(0x9E3779B97F4A7C15)) ^ codes[offset : offset + len(total)]
        total += total >> np.uint64(29)
    total.sort()
    return total[np.append(True, total[1:] != total[:-1])]  # np.unique, without its overhead on short arrays


@dataclass(frozen=True)
class Corpus:
    """A harvested corpus on disk; `hash` names the package versions and the harvester that made it."""

    folder: Path
    hash: str

    @property
    def file(self) -> Path:
        """Return the one parquet file; a row group never holds two splits."""
        return self.folder / "docs.parquet"

    def documents(self, split: str, *, limit: int | None = None) -> pd.DataFrame:
        """Return documents of a split in a fixed random order: the first `limit` are a fair sample."""
        _check(split)
        rows, of_split = dataset.dataset(self.file), dataset.field("split") == split
        table = rows.to_table(filter=of_split) if limit is None else rows.head(limit, filter=of_split)
        return table.to_pandas()

    def text(self, split: str) -> Iterator[str]:
        """Yield the full text of every document: signature, summary and body, apart by empty lines."""
        for texts in self.documents(split)[["signature", "summary", "body"]].itertuples(index=False):
            yield "\n\n".join(filter(None, texts))

    def content_hash(self, split: str) -> str:
        """Return 16 hex digits of sha256 over the text of a split: what a row records as its data."""
        _check(split)
        return pq.read_schema(self.file).metadata[f"content_hash.{split}".encode()].decode()

    def stats(self) -> dict:
        """Return documents, bytes and what was dropped, per library and in all."""
        return json.loads((self.folder / "stats.json").read_text(encoding="utf-8"))


def _check(split: str) -> None:
    if split not in SPLITS:
        raise BadData(f"the corpus has no split {split!r}; it has {', '.join(SPLITS)}")


def harvest(
    *, force: bool = False, processes: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Corpus:
    """Return the corpus of the installed packages: read from disk, or harvested once (about a minute).

    `force` harvests again although the file is there; the result does not depend on the number of
    `processes` (all cores); `progress` is called with (bytes read, bytes in all) meanwhile.
    """
    cores = os.cpu_count() or 1
    if processes is not None and processes < 1:
        raise BadSetting(f"processes must be at least 1, or None for all {cores} cores; got {processes}")
    sources, notes = installed_sources()
    versions = {name: source.version for name, source in sources.items()}
    key = hashlib.sha256(json.dumps([VERSION, versions], sort_keys=True).encode()).hexdigest()[:16]
    corpus = Corpus(paths.DATA_RAW / "pydocs" / key, key)
    if force or not corpus.file.is_file():
        with paths.naming_write_errors(corpus.file):
            corpus.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(corpus.folder / ".lock"):
            if force or not corpus.file.is_file():
                _build(corpus, sources, notes, processes or cores, progress)
    return corpus


@cache
def _end_with(owner: int) -> None:
    """End this worker when the process `owner` does: else a killed one's workers live on for minutes."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() == owner:
        threading.Thread(target=watch, daemon=True).start()


def _read_batch(batch: list[tuple[str, str, Path, int]], owner: int) -> tuple[list[dict], list[str], int]:
    """Return documents of a batch, files that could not be read, and bytes read, for the process `owner`."""
    _end_with(owner)
    documents, unreadable = [], []
    # syntax trees are many small acyclic objects: collecting among them costs a third of the time
    gc.disable()
    try:
        for library, module, path, _ in batch:
            try:
                source = path.read_bytes()
                if docstrings.GENERATED.search(source[:1000]) or not (b'"""' in source or b"'''" in source):
                    continue
                raws = docstrings.raw_docs(source, module)
                documents += filter(None, (_document(raw, library) for raw in raws))
            except (OSError, SyntaxError, ValueError, RecursionError) as error:
                unreadable.append(f"{module}: {type(error).__name__}")
    finally:
        gc.enable()
    return documents, unreadable, sum(size for *_, size in batch)


def _build(corpus: Corpus, sources: dict, notes: dict, processes: int, progress: Callable | None) -> None:
    work = docstrings.batches(sources)
    total = sum(size for batch in work for *_, size in batch)
    log.info("harvesting %d packages, %.0f MB, on %d processes", len(sources), total / 1e6, processes)
    documents, unreadable, done = [], [], 0
    jobs = Parallel(n_jobs=processes, return_as="generator", pre_dispatch="4*n_jobs")
    for texts, failed, size in jobs(delayed(_read_batch)(batch, os.getpid()) for batch in work):
        documents += texts
        unreadable += failed
        done += size
        if progress:
            progress(done, total)
    documents, dropped = _deduplicate(documents)
    if not documents:
        raise BadData(
            f"no docstrings found in {len(sources)} packages ({', '.join(sorted(sources))}): are they "
            "installed as sources (.py files)? Reinstall this project's environment, then call "
            "harvest(force=True)."
        )
    frame = pd.DataFrame(documents, columns=list(COLUMNS))
    texts = frame["signature"] + frame["summary"] + frame["body"]
    sized = frame.assign(bytes=[len(text.encode()) for text in texts])

    def count(group: pd.DataFrame) -> dict:
        return {"documents": len(group), "bytes": int(group["bytes"].sum())}

    stats = {
        **count(sized),
        "dropped": dropped,
        "splits": {split: count(sized[sized["split"] == split]) for split in SPLITS},
        "libraries": {name: count(group) for name, group in sized.groupby("library")},
        "versions": {name: source.version for name, source in sources.items()},
        "harvester": VERSION,
        "notes": notes,
        "unreadable": unreadable,
        "hash": corpus.hash,
    }
    paths.write_json(corpus.folder / "stats.json", stats)
    _write(frame, corpus.file)
    log.info("harvested %d documents, %.1f MB", len(frame), stats["bytes"] / 1e6)


def _deduplicate(documents: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Keep one document per name and per text, evaluation ones unlike all training text; hash-ordered.

    Of several copies of a text a training one stays, so that no copy in train can also be in evaluation.
    """
    documents = sorted(documents, key=lambda d: (d["split"] != "train", d["qualname"]))
    names, texts = {}, {}
    for document in documents:  # sorting is stable: of one name, the first definition in the file stays
        names.setdefault(document["qualname"], document)
    for document in names.values():
        texts.setdefault(document["digest"], document)
    train = [d for d in texts.values() if d["split"] == "train"]
    trained = np.sort(np.concatenate([d["shingles"] for d in train] or [np.zeros(0, np.uint64)]))
    summaries = {" ".join(words(d["summary"])) for d in train}
    unique = train
    dropped = Counter(same_name=len(documents) - len(names), same_text=len(names) - len(texts))
    for document in (d for d in texts.values() if d["split"] != "train"):
        windows = document["shingles"]  # looked up in the sorted ones: `np.isin` would sort them each time
        nearest = np.searchsorted(trained, windows).clip(max=len(trained) - 1)
        if len(trained) and (trained[nearest] == windows).mean() >= _NEAR_DUPLICATE:
            dropped["near_duplicate"] += 1
        elif " ".join(words(document["summary"])) in summaries:
            dropped["same_summary"] += 1
        else:
            unique.append(document)
    unique.sort(key=lambda d: hashlib.sha256(d["qualname"].encode()).digest())
    return unique, dict(dropped)


def _write(frame: pd.DataFrame, file: Path) -> None:
    """Write one parquet file, row groups by split, the content hash of each split in its metadata."""
    frames, hashes = {split: frame[frame["split"] == split] for split in SPLITS}, {}
    for split, documents in frames.items():
        text = "\x1e".join(map("\x1f".join, documents[list(COLUMNS)].itertuples(index=False)))
        hashes[f"content_hash.{split}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    schema = pa.schema([(name, pa.string()) for name in COLUMNS], metadata=hashes)
    with paths.atomic_path(file) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for documents in filter(len, frames.values()):  # an empty row group has no statistics to find it by
            table = pa.Table.from_pandas(documents, schema=schema, preserve_index=False)
            writer.write_table(table, row_group_size=20_000)
