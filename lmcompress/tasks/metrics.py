"""Every score as a function of per-example columns, so that it can be bootstrapped and compared in pairs.

A statistic takes columns and returns a number; those that can be computed for all resamples at once also have
`resampled` (see `lmcompress.stats`). Text overlap is sacrebleu's and rouge-score's own counting, offline.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from scipy.stats import rankdata

from lmcompress.errors import BadSetting
from lmcompress.stats import Columns, RatioOfSums, Statistic

accuracy = RatioOfSums("correct", None)
cross_entropy = RatioOfSums("cross_entropy", None)
perplexity = RatioOfSums("nll", "tokens", np.exp)
bits_per_byte = RatioOfSums("nll", "bytes", lambda nats: nats / np.log(2))


class MacroF1:
    """Unweighted mean over classes of F1, of integer columns `label` and `prediction` (as scikit-learn's)."""

    def __call__(self, columns: Columns) -> float:
        """Of all examples."""
        return float(self.resampled(columns, np.arange(len(columns["label"]))[None])[0])

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        """Of each row of `indices`; a class that a resample does not hold, neither said nor true, is left out of it."""
        label, prediction = columns["label"].astype(int), columns["prediction"].astype(int)
        total, present = np.zeros(len(indices)), np.zeros(len(indices))
        for index in np.union1d(label, prediction):
            is_label, is_predicted = label == index, prediction == index
            hits = (is_label & is_predicted)[indices].sum(axis=1)
            count = (is_label.astype(int) + is_predicted)[indices].sum(axis=1)
            total += 2 * hits / np.maximum(count, 1)
            present += count > 0
        return total / present


macro_f1 = MacroF1()


@dataclass(frozen=True)
class EvaluateMetric:
    """Any `evaluate` metric of class indices, recomputed on each resample (about 7 ms each).

    Attributes:
        source: the name of one of ours, or what `evaluate.load` takes: a path or a name.
    """

    source: str

    def __post_init__(self) -> None:
        load_metric(self.source)  # refused now, not after a model has run

    @property
    def name(self) -> str:
        """The name that rows record."""
        return Path(self.source).stem

    def __call__(self, columns: Columns) -> float:
        """Compute the metric of the integer columns `prediction` and `label`.

        Raises:
            BadSetting: the module returns several numbers and none under its own name.
        """
        predictions, references = (columns[name].astype(int) for name in ("prediction", "label"))
        scores = load_metric(self.source).compute(predictions=predictions, references=references)
        if self.name not in scores and len(scores) != 1:
            raise BadSetting(
                f"{self.source} returns {', '.join(scores)}; expected one number, or one called {self.name!r}."
            )
        return float(scores.get(self.name, next(iter(scores.values()))))


@cache
def load_metric(source: str) -> Any:
    """Load one of our `evaluate` metrics by its name, or any other by its path or name.

    Raises:
        BadSetting: there is none.
    """
    import evaluate  # with `datasets` 0.3 s, spent on the first evaluation only

    from lmcompress.tasks.evaluate_metrics import CONFIGS, StudyMetric

    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # kept in memory, yet it wants a folder; homes may be read-only
        if source in CONFIGS:
            return StudyMetric(source, keep_in_memory=True, cache_dir=scratch)
        try:
            return evaluate.load(source, keep_in_memory=True, cache_dir=scratch)
        except (OSError, ValueError, ImportError, TypeError) as error:
            raise BadSetting(
                f"no metric {source!r} ({str(error).splitlines()[0]}): expected one of {', '.join(CONFIGS)}, or "
                "the path of a module for evaluate.load."
            ) from error


def pearson(columns: Columns) -> float:
    """Linear correlation of the columns `score` and `label`; NaN where one is constant or not finite."""
    return _correlation(columns["score"], columns["label"])


def spearman(columns: Columns) -> float:
    """Rank correlation of the columns `score` and `label`; NaN where one is constant or not finite."""
    if not np.isfinite(columns["score"]).all():
        return float("nan")
    return _correlation(rankdata(columns["score"]), rankdata(columns["label"]))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


# ---------------------------------------------------------------- text overlap


@dataclass(frozen=True)
class CorpusOverlap:
    """sacrebleu's corpus BLEU or chrF (0 to 100), from the counts each sentence contributes.

    The counts are columns `bleu_0` … or `chrf_0` …; summed, they give exactly sacrebleu's corpus score.
    """

    name: str  # "bleu" or "chrf"
    counts: int

    @cached_property
    def _scorer(self) -> Metric:
        return {"bleu": BLEU, "chrf": CHRF}[self.name]()

    def columns(self, hypotheses: Sequence[str], references: Sequence[str]) -> Columns:
        """Each sentence's counts, `(n,)` per count."""
        # The one use of sacrebleu's inside: its public scores do not give chrF's counts.
        counts = self._scorer._extract_corpus_statistics(list(hypotheses), [list(references)])
        return {f"{self.name}_{i}": column for i, column in enumerate(np.array(counts, dtype=np.float64).T)}

    def __call__(self, columns: Columns) -> float:
        """The corpus score of the columns as they stand."""
        return self._score(self._stacked(columns).sum(axis=0))

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        """The corpus score of each resample: indices `(resamples, n)` to scores `(resamples,)`."""
        counts = self._stacked(columns)
        return np.array([self._score(counts[row].sum(axis=0)) for row in indices])

    def signature(self) -> str:
        """sacrebleu's signature: version, tokenizer, smoothing, case."""
        self._scorer.num_refs = 1
        return str(self._scorer.get_signature())

    def _stacked(self, columns: Columns) -> np.ndarray:
        return np.stack([columns[f"{self.name}_{i}"] for i in range(self.counts)], axis=1)

    def _score(self, sums: np.ndarray) -> float:
        return float(self._scorer._compute_score_from_stats([int(s) for s in sums]).score)


bleu = CorpusOverlap("bleu", 10)  # lengths of both sides, matches and totals of 1- to 4-grams
chrf = CorpusOverlap("chrf", 18)  # totals of both sides and matches of 1- to 6-grams
ROUGE = ("rouge1", "rouge2", "rougeL")
STATISTICS: dict[str, Statistic] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "cross_entropy": cross_entropy,
    "spearman": spearman,
    "pearson": pearson,
    "perplexity": perplexity,
    "bleu": bleu,
    "chrf": chrf,
    "bits_per_byte": bits_per_byte,
    **{name: RatioOfSums(name, None) for name in ROUGE},
}


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Each sentence's own chrF `(n,)`, 0 to 100."""
    scorer = CHRF()
    return np.array(
        [scorer.sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)]
    )


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> Columns:
    """Return ROUGE-1, -2 and -L F-measures, `(n,)` each, 0 to 1 (stemmed; rouge-score splits English words only)."""
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(r, h) for h, r in zip(hypotheses, references, strict=True)]
    return {name: np.array([score[name].fmeasure for score in scores]) for name in ROUGE}


def is_degenerate(text: str) -> bool:
    """Whether a generated text is empty or mostly repeats itself: over half of its word trigrams seen before."""
    words = text.split()
    trigrams = Counter(zip(words, words[1:], words[2:]))
    return not words or (len(words) >= 6 and len(trigrams) < 0.5 * (len(words) - 2))
