"""What a recorded difference amounts to: Holm's correction over a family, the verdict, loss, non-inferiority.

A family is the comparisons with the dense model among the rows handed in, which are of one model and task.
Verdict words stand here once.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist

from lmcompress.results.rows import ModelTask, is_dense, model_task_of
from lmcompress.results.store import Row, canonical
from lmcompress.stats import CONFIDENCE, RESAMPLES, TOO_FEW_EXAMPLES, holm

ALPHA = 0.05
COARSE = 0.02  # below this, too few of a thousand resamples stand behind a bootstrap's p
BETTER, WORSE, COLLAPSED, BASELINE = "better", "worse", "collapsed", "baseline"
NOT_SIGNIFICANT, REPEAT = "n.s.", "repeat"
# Metrics from 0 to 1, whose differences are stated in hundredths, called points.
POINTS = ("accuracy", "accuracy_per_byte", "exact_match", "macro_f1", "micro_f1", "f1", "matthews")
POINTS += ("mcc", "matthews_correlation", "spearman", "pearson", "rouge1", "rouge2", "rougeL")
LOSS_UNITS = {"perplexity": "of perplexity", "chrf": "chrF", "bleu": "BLEU"}
_NORMAL = NormalDist()
# A two-sided 95 % interval reaches 1.960 standard errors, a one-sided 95 % bound 1.645.
ONE_SIDED = _NORMAL.inv_cdf(CONFIDENCE) / _NORMAL.inv_cdf(0.5 + CONFIDENCE / 2)


def loss_scale(metric: str) -> tuple[float, str]:
    """Return what a difference of a metric is multiplied by, and the unit it then has."""
    return (100.0, "points") if metric in POINTS else (1.0, LOSS_UNITS.get(metric, metric))


def loss_of(row: Row, part: str = "quality") -> tuple[float, float, float]:
    """Return the loss against dense with its favourable and unfavourable end, in the unit of `loss_scale`.

    Each is NaN where there were too few examples for a difference. `part` "selection" is on the examples that
    configurations are chosen on.
    """
    quality, difference = row[part], row[part]["difference"]
    if difference is None:
        return math.nan, math.nan, math.nan
    scale = loss_scale(quality["metric"])[0]
    if quality["higher_is_better"]:
        return -scale * difference["value"], -scale * difference["high"], -scale * difference["low"]
    return scale * difference["value"], scale * difference["low"], scale * difference["high"]


def relative_loss_bound(row: Row, dense_row: Row, part: str = "quality") -> float | None:
    """Return the upper one-sided 95 % bound of the paired loss as a share of the dense quality.

    Older rows record a two-sided interval only; its unfavourable half is then shortened by the normal
    quantiles. For perplexity the share is that of the ratio minus 1. None where there is no difference or no
    positive dense quality, or no such `part`.
    """
    quality, dense_quality = row.get(part), dense_row.get(part)
    if not quality or not quality["difference"] or quality["collapsed"]:
        return None
    if not dense_quality or (dense_quality["value"] or 0) <= 0:
        return None
    bound = quality["difference"].get("bound")
    if bound is None:
        loss, _, high = loss_of(row, part)
        bound = (loss + ONE_SIDED * (high - loss)) / loss_scale(quality["metric"])[0]
    return bound / dense_quality["value"]


def tested_p(difference: dict) -> float:
    """Return the p of a recorded difference, fine enough to be corrected over dozens of comparisons.

    A bootstrap of a thousand resamples cannot tell 0.001 from less. Where one of fewer than `RESAMPLES` has a
    p below `COARSE`, that of the normal curve with the width of the interval is taken.
    """
    is_coarse = "bootstrap" in difference["test"] and difference.get("resamples", 0) < RESAMPLES
    if difference["p"] >= COARSE or not is_coarse:
        return difference["p"]
    spread = (difference["high"] - difference["low"]) / (2 * _NORMAL.inv_cdf(0.975))
    return 2 * _NORMAL.cdf(-abs(difference["value"]) / spread) if spread else difference["p"]


def adjusted(rows: Iterable[Row]) -> dict[str, tuple[float, str]]:
    """Return per row key its p, Holm-adjusted over these rows' comparisons with dense, and the verdict.

    A compressed row of too few examples for a difference has p 1 and says so.
    """
    scored = [row for row in rows if row["quality"] and not is_dense(row)]
    untested = {row["key"]: (1.0, TOO_FEW_EXAMPLES) for row in scored if not row["quality"]["difference"]}
    compared = [row for row in rows if row["quality"] and row["quality"]["difference"]]
    p_values = holm([tested_p(row["quality"]["difference"]) for row in compared])
    return untested | {row["key"]: (p, _verdict(row, p)) for row, p in zip(compared, p_values, strict=True)}


def _verdict(row: Row, p: float) -> str:
    quality = row["quality"]
    if quality["collapsed"]:
        return COLLAPSED
    return NOT_SIGNIFICANT if p >= ALPHA else _direction(quality["difference"], quality["higher_is_better"])


def _direction(difference: dict, higher_is_better: bool) -> str:
    return BETTER if (difference["value"] > 0) == higher_is_better else WORSE


def comparisons(rows: Iterable[Row], model_task: ModelTask) -> list[tuple[Row, float | None, str]]:
    """Return the tested differences between two compressed models: the row, adjusted p, a verdict.

    The verdict is of the first against the second. `rows` are those of all notebooks, for what is corrected
    is one family per model and task. The same pair of another seed is `REPEAT` and outside of it.
    """
    compared = [
        row
        for row in rows
        if row["technique"] == "paired-difference"
        and model_task_of(row) == model_task
        and row["achieved"]["difference"]
    ]
    family: dict[str, Row] = {}
    for row in compared:
        family.setdefault(canonical([row["achieved"]["first"], row["achieved"]["second"]]), row)
    p_values = holm([tested_p(row["achieved"]["difference"]) for row in family.values()])
    by_key = dict(zip((row["key"] for row in family.values()), p_values, strict=True))
    return [(row, by_key.get(row["key"]), _compared(row, by_key.get(row["key"]))) for row in compared]


def _compared(row: Row, p: float | None) -> str:
    if p is None or p >= ALPHA:
        return REPEAT if p is None else NOT_SIGNIFICANT
    return _direction(row["achieved"]["difference"], row["achieved"]["higher_is_better"])


def likelihood_of(row: Row) -> tuple[str, dict] | None:
    """Return the metric of how likely the right answers are (lower is better) and its interval."""
    secondary = (row["quality"] or {}).get("secondary") or {}
    return next(((name, interval) for name, interval in secondary.items() if "difference" in interval), None)
