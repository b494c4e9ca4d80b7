"""Every score as a function of per-example columns, so that it can be bootstrapped and compared in pairs.

A statistic takes columns and returns a number; those that can be computed for all resamples at once also have
`resampled` (see `lmcompress.stats`). Text overlap is sacrebleu's and rouge-score's own counting, offline.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from scipy.stats import rankdata

from lmcompress.stats import RatioOfSums

Columns = dict[str, np.ndarray]

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
        for one in np.union1d(label, prediction):
            is_label, is_said = label == one, prediction == one
            hits = (is_label & is_said)[indices].sum(axis=1)
            said = (is_label.astype(int) + is_said)[indices].sum(axis=1)
            total += 2 * hits / np.maximum(said, 1)
            present += said > 0
        return total / present


macro_f1 = MacroF1()


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
        return self._score(self._counts(columns).sum(axis=0))

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        """The corpus score of each resample: indices `(resamples, n)` to scores `(resamples,)`."""
        counts = self._counts(columns)
        return np.array([self._score(counts[row].sum(axis=0)) for row in indices])

    def signature(self) -> str:
        """sacrebleu's signature: version, tokenizer, smoothing, case."""
        self._scorer.num_refs = 1
        return str(self._scorer.get_signature())

    def _counts(self, columns: Columns) -> np.ndarray:
        found = sorted(
            (int(n.removeprefix(f"{self.name}_")), c) for n, c in columns.items() if self._is_count(n)
        )
        return np.stack([column for _, column in found], axis=1)

    def _is_count(self, column: str) -> bool:
        return column.startswith(f"{self.name}_") and column.removeprefix(f"{self.name}_").isdigit()

    def _score(self, sums: np.ndarray) -> float:
        return float(self._scorer._compute_score_from_stats([int(s) for s in sums]).score)


bleu = CorpusOverlap("bleu")
chrf = CorpusOverlap("chrf")
rouge_1, rouge_2, rouge_l = (RatioOfSums(name, None) for name in ("rouge1", "rouge2", "rougeL"))


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Each sentence's own chrF `(n,)`, 0 to 100."""
    scorer = CHRF()
    return np.array(
        [scorer.sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)]
    )


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> Columns:
    """ROUGE-1, -2 and -L F-measures, `(n,)` each, 0 to 1 (stemmed; English only, as rouge-score splits words)."""
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = _rouge_scorer(tuple(names))
    scores = [scorer.score(r, h) for h, r in zip(hypotheses, references, strict=True)]
    return {name: np.array([score[name].fmeasure for score in scores]) for name in names}


@cache
def _rouge_scorer(names: tuple[str, ...]) -> RougeScorer:
    return RougeScorer(list(names), use_stemmer=True)


def is_degenerate(text: str) -> bool:
    """Whether a generated text is empty or mostly repeats itself: over half of its word trigrams seen before."""
    words = text.split()
    trigrams = Counter(zip(words, words[1:], words[2:]))
    return not words or (len(words) >= 6 and len(trigrams) < 0.5 * (len(words) - 2))
