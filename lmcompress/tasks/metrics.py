"""Every score as a function of per-example columns, so that it can be bootstrapped and compared in pairs.

A statistic takes columns and returns a number; those that can be computed for all resamples at once also have
`resampled` (see `lmcompress.stats`). Text overlap is sacrebleu's and rouge-score's own counting, offline.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

from lmcompress.errors import BadSetting
from lmcompress.paths import scratch_folder
from lmcompress.stats import Columns, RatioOfSums, Statistic, times_drawn

ROUGE = ("rouge1", "rouge2", "rougeL")
LOWER_IS_BETTER = ("mae", "rmse", "perplexity", "bits_per_byte", "cross_entropy")
_ROWS = 64  # resamples whose ranks are held at once, in the processor's cache


class Resampled:
    """A statistic that is computed for all resamples at once: for each row of indices, `(resamples, n)`."""

    def __call__(self, columns: Columns) -> float:
        """Return it over all examples."""
        return float(self.resampled(columns, np.arange(len(next(iter(columns.values()))))[None])[0])


@dataclass(frozen=True)
class F1(Resampled):
    """F1 of classes as scikit-learn's, their unweighted mean or, with `micro`, of all decisions together.

    Columns are the integers `label` and `prediction`, or, where an example may have several classes,
    `label_0` … and `prediction_0` …, 1 for each class that it has. Absent classes do not count.
    """

    micro: bool = False

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        """Return it for each row of `indices`, over the classes that are said or true in that resample."""
        if "label" in columns:
            label, prediction = _one_hot(columns)
        else:
            label, prediction = (indicators(columns, name) > 0 for name in ("label", "prediction"))
        drawn = times_drawn(indices).astype(np.float64)
        hits = drawn @ (label & prediction)
        count = drawn @ (label.astype(float) + prediction)
        if self.micro:
            return 2 * hits.sum(axis=1) / np.maximum(count.sum(axis=1), 1)
        return (2 * hits / np.maximum(count, 1)).sum(axis=1) / np.maximum((count > 0).sum(axis=1), 1)


class Matthews(Resampled):
    """Matthews' correlation of `label` and `prediction`, of any number of classes (Gorodkin 2004)."""

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        """Return it for each row of `indices`; 0 where one side is constant, as scikit-learn has it."""
        label, prediction = _one_hot(columns)
        drawn, n = times_drawn(indices).astype(np.float64), indices.shape[1]
        counts, said = drawn @ label, drawn @ prediction
        product = n * (drawn @ (label & prediction)).sum(axis=1) - (counts * said).sum(axis=1)
        spreads = [n**2 - (side**2).sum(axis=1) for side in (counts, said)]
        return product / np.sqrt(np.where(np.minimum(*spreads) > 0, spreads[0] * spreads[1], np.inf))


def _one_hot(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Return `label` and `prediction` as `(n, classes)` booleans, over the classes of both."""
    sides = [columns[name].astype(int)[:, None] for name in ("label", "prediction")]
    label, prediction = (side == np.union1d(*sides) for side in sides)
    return label, prediction


def indicators(columns: Columns, name: str) -> np.ndarray:
    """Return the columns `<name>_0` … side by side, `(n, classes)`."""
    return np.stack([columns[key] for key in columns if key.startswith(f"{name}_")], axis=1)


def class_indices(columns: Columns) -> tuple[np.ndarray, ...]:
    """Return predictions and references of one class an example, `(n,)` integers."""
    return tuple(columns[name].astype(int) for name in ("prediction", "label"))


def class_sets(columns: Columns) -> tuple[np.ndarray, ...]:
    """Return predictions and references of several classes an example, `(n, classes)` of 0 and 1."""
    return tuple(indicators(columns, name).astype(int) for name in ("prediction", "label"))


def numbers(columns: Columns) -> tuple[np.ndarray, ...]:
    """Return predictions and references of a regression, `(n,)`."""
    return columns["score"], columns["label"]


@dataclass(frozen=True)
class EvaluateMetric:
    """Any `evaluate` metric of what `read` makes of columns, recomputed on each resample (about 7 ms each).

    Attributes:
        source: the name of one of ours, or what `evaluate.load` takes: a path or a name.
    """

    source: str
    read: Callable[[Columns], tuple[np.ndarray, ...]] = class_indices

    def __post_init__(self) -> None:
        load_metric(self.source)  # refused now, not after a model has run

    @property
    def name(self) -> str:
        """The name that rows record, which is one of ours only where the metric is."""
        stem = Path(self.source).stem
        return stem if stem not in STATISTICS or self.source in STATISTICS else f"evaluate_{stem}"

    def __call__(self, columns: Columns) -> float:
        """Compute the metric."""
        return self.of(*self.read(columns))

    def of(self, predictions: Sequence, references: Sequence) -> float:
        """Compute the metric of what its module takes.

        Raises:
            BadSetting: the module returns several numbers and none under its own name.
        """
        scores = load_metric(self.source).compute(predictions=predictions, references=references)
        stem = Path(self.source).stem
        if stem not in scores and len(scores) != 1:
            raise BadSetting(
                f"{self.source} returns {', '.join(scores)}; expected one number, or one called {stem!r}."
            )
        return float(scores.get(stem, next(iter(scores.values()))))


@cache
def load_metric(source: str) -> Any:
    """Load one of our `evaluate` metrics by its name, or any other by its path or name.

    Raises:
        BadSetting: there is none.
    """
    import evaluate  # with `datasets` 0.3 s, spent on the first evaluation only

    from lmcompress.tasks.evaluate_metrics import CONFIGS, StudyMetric

    with scratch_folder() as scratch:  # it wants a folder, and homes may be read-only
        memory = {"keep_in_memory": True, "cache_dir": str(scratch)}
        if source in CONFIGS:
            return StudyMetric(source, **memory)
        try:
            return evaluate.load(source, **memory)
        except (OSError, ValueError, ImportError, TypeError) as error:
            raise BadSetting(
                f"no metric {source!r} ({str(error).splitlines()[0]}): expected one of {', '.join(CONFIGS)}, "
                "or the path of a module for evaluate.load."
            ) from error


@dataclass(frozen=True)
class Correlation(Resampled):
    """The linear correlation of `score` and `label`, or with `ranked` that of their ranks (Spearman's).

    NaN where one of them is constant or not finite.
    """

    ranked: bool = False

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        """Return it for each row of `indices`; ranks are those within the resample."""
        sides = columns["score"], columns["label"]
        if not all(np.isfinite(side).all() for side in sides):
            return np.full(len(indices), np.nan)
        few = range(0, len(indices), _ROWS)
        return np.concatenate([self._of_few(sides, indices[start : start + _ROWS]) for start in few])

    def _of_few(self, sides: tuple[np.ndarray, ...], indices: np.ndarray) -> np.ndarray:
        drawn, n = times_drawn(indices).astype(np.float64), indices.shape[1]
        if self.ranked:
            first, second = (_ranks(side, drawn) - (n + 1) / 2 for side in sides)
        else:
            first, second = (side - (drawn @ side)[:, None] / n for side in sides)
        weighted = drawn * first
        product = np.einsum("ij,ij->i", weighted, second)
        spreads = np.einsum("ij,ij->i", weighted, first), np.einsum("ij,ij,ij->i", drawn, second, second)
        rounding = [0 if self.ranked else n * (1e-15 * np.abs(side).max()) ** 2 for side in sides]
        varied = (spreads[0] > rounding[0]) & (spreads[1] > rounding[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(varied, product / np.sqrt(spreads[0] * spreads[1]), np.nan)


def _ranks(side: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the average rank of each example in each resample, `(resamples, n)`."""
    distinct, place = np.unique(side, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(distinct)))
    alike = drawn[:, order]
    if len(distinct) < len(side):
        alike = np.add.reduceat(alike, starts, axis=1)
    return (np.cumsum(alike, axis=1) - (alike - 1) / 2)[:, place]


@dataclass(frozen=True)
class CorpusOverlap(Resampled):
    """sacrebleu's corpus BLEU or chrF (0 to 100), from the counts each sentence contributes.

    The counts are columns `bleu_0` … or `chrf_0` …; summed, they give exactly sacrebleu's corpus score.
    """

    name: str
    scorer: Metric
    counts: int

    def columns(self, hypotheses: Sequence[str], references: Sequence[str]) -> Columns:
        """Return each sentence's counts, `(n,)` per count."""
        # The one use of sacrebleu's inside: its public scores do not give chrF's counts.
        counts = self.scorer._extract_corpus_statistics(list(hypotheses), [list(references)])
        return {f"{self.name}_{i}": column for i, column in enumerate(np.array(counts, dtype=np.float64).T)}

    def resampled(self, columns: Columns, indices: np.ndarray) -> np.ndarray:
        """Return the corpus score of each resample: indices `(resamples, n)` to scores `(resamples,)`."""
        counts = np.stack([columns[f"{self.name}_{i}"] for i in range(self.counts)], axis=1)
        sums = (times_drawn(indices) @ counts).astype(int).tolist()
        return np.array([self.scorer._compute_score_from_stats(row).score for row in sums])

    def signature(self) -> str:
        """Return sacrebleu's signature: version, tokenizer, smoothing, case."""
        self.scorer.num_refs = 1
        return str(self.scorer.get_signature())


bleu = CorpusOverlap("bleu", BLEU(), 10)  # lengths of both sides, matches and totals of 1- to 4-grams
chrf = CorpusOverlap("chrf", CHRF(), 18)  # totals of both sides and matches of 1- to 6-grams
STATISTICS: dict[str, Statistic] = {
    "accuracy": RatioOfSums("correct", None),
    "accuracy_per_byte": RatioOfSums("correct_per_byte", None),
    "macro_f1": F1(),
    "matthews": Matthews(),
    "micro_f1": F1(micro=True),
    "exact_match": RatioOfSums("exact_match", None),
    "cross_entropy": RatioOfSums("cross_entropy", None),
    "spearman": Correlation(ranked=True),
    "pearson": Correlation(),
    "mae": RatioOfSums("absolute_error", None),
    "rmse": RatioOfSums("squared_error", None, np.sqrt),
    "perplexity": RatioOfSums("nll", "tokens", np.exp),
    "bleu": bleu,
    "chrf": chrf,
    "bits_per_byte": RatioOfSums("nll", "bytes", lambda nats: nats / np.log(2)),
    **{name: RatioOfSums(name, None) for name in ROUGE},
}


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return each sentence's own chrF `(n,)`, 0 to 100."""
    scorer = CHRF()
    return np.array(
        [scorer.sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)]
    )


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> Columns:
    """Return ROUGE-1, -2 and -L F-measures, `(n,)` each, 0 to 1 (stemmed; splits English words only)."""
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(r, h) for h, r in zip(hypotheses, references, strict=True)]
    return {name: np.array([score[name].fmeasure for score in scores]) for name in ROUGE}


def is_degenerate(text: str) -> bool:
    """Return whether a text is empty or mostly repeats itself: over half of its word trigrams seen before."""
    words = text.split()
    trigrams = Counter(zip(words, words[1:], words[2:]))
    return not words or (len(words) >= 6 and len(trigrams) < 0.5 * (len(words) - 2))
