"""The metrics for `evaluate`, offline: `evaluate.load("lmcompress/tasks/evaluate_metrics.py", "bleu")`.

Each of `CONFIGS` is computed by the package the field takes it from. Reported values come from here, their
intervals from the equal statistics of columns in `metrics`. `evaluate`'s parser wants one import a line.
"""

from functools import partial

import datasets
import evaluate
import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import rankdata
from sklearn import metrics


def _correlation(predictions: list[float], references: list[float], *, transform=np.asarray) -> float:
    """Return the linear correlation of transformed sides; NaN where one is constant or not finite."""
    if not np.isfinite(predictions).all() or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return np.nan
    return np.corrcoef(transform(predictions), transform(references))[0, 1]


def _per_sum(predictions: list[float], references: list[float]) -> float:
    """Return Σ predictions / Σ references: nats of negative log-likelihood per token or byte."""
    return np.sum(predictions) / np.sum(references)


def _rouge_l(predictions: list[str], references: list[str]) -> float:
    """Return the mean F-measure, stemmed (English only)."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return np.mean([scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references)])


CONFIGS = {
    "accuracy": ("int64", lambda p, r: metrics.accuracy_score(r, p)),
    "macro_f1": ("int64", lambda p, r: metrics.f1_score(r, p, average="macro", zero_division=0)),
    "matthews": ("int64", lambda p, r: metrics.matthews_corrcoef(r, p)),
    "exact_match": ("string", lambda p, r: np.mean([a == b for a, b in zip(p, r)])),
    "spearman": ("float64", partial(_correlation, transform=rankdata)),
    "pearson": ("float64", _correlation),
    "mae": ("float64", lambda p, r: metrics.mean_absolute_error(r, p)),
    "rmse": ("float64", lambda p, r: metrics.root_mean_squared_error(r, p)),
    "perplexity": ("float64", lambda nats, tokens: np.exp(_per_sum(nats, tokens))),
    "bits_per_byte": ("float64", lambda nats, sizes: _per_sum(nats, sizes) / np.log(2)),
    "bleu": ("string", lambda p, r: sacrebleu.corpus_bleu(p, [r]).score),
    "chrf": ("string", lambda p, r: sacrebleu.corpus_chrf(p, [r]).score),
    "rougeL": ("string", _rouge_l),
}


class StudyMetric(evaluate.Metric):
    """One of `CONFIGS`; `compute(predictions=..., references=...)` returns it under its name."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGS:
            raise KeyError(f"no metric {self.config_name!r}: give one of {', '.join(CONFIGS)}")
        value = datasets.Value(CONFIGS[self.config_name][0])
        return evaluate.MetricInfo(
            description=self.config_name,
            citation="",
            inputs_description="A prediction and a reference per example; nats and counts of likelihoods.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        with np.errstate(over="ignore"):
            return {self.config_name: float(CONFIGS[self.config_name][1](predictions, references))}
