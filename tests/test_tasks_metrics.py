"""The `evaluate` metrics: equal to the per-example statistics, loadable by path, and a user's own."""

import evaluate as hf_evaluate
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import matthews_corrcoef

from lmcompress.errors import BadSetting
from lmcompress.fit.loss import Loss, Margin
from lmcompress.measure import quality
from lmcompress.tasks import Evaluation, evaluate, evaluate_metrics, load_task, metrics
from tests.synthetic_mirror import VOCABULARY, byte_tokenizer, sentences
from tests.tiny_models import tiny

RNG = np.random.default_rng(0)
LABEL, SAID = RNG.integers(0, 3, (2, 40))
SCORES, RATINGS = RNG.normal(size=(2, 40)).round(1)
NATS, COUNTS = RNG.uniform(1, 99, 40), RNG.integers(1, 50, 40)
OUTPUTS, TARGETS = sentences(40, seed=1), sentences(40, seed=2)
CASES = {
    "accuracy": (SAID, LABEL, {"correct": SAID == LABEL}),
    "macro_f1": (SAID, LABEL, {"prediction": SAID, "label": LABEL}),
    "matthews": (SAID, LABEL, {"prediction": SAID, "label": LABEL}),
    "mae": (SCORES, RATINGS, {"absolute_error": np.abs(SCORES - RATINGS)}),
    "rmse": (SCORES, RATINGS, {"squared_error": (SCORES - RATINGS) ** 2}),
    "spearman": (SCORES, RATINGS, {"score": SCORES, "label": RATINGS}),
    "pearson": (SCORES, RATINGS, {"score": SCORES, "label": RATINGS}),
    "perplexity": (NATS, COUNTS, {"nll": NATS, "tokens": COUNTS}),
    "bits_per_byte": (NATS, COUNTS, {"nll": NATS, "bytes": COUNTS}),
    "bleu": (OUTPUTS, TARGETS, metrics.bleu.columns(OUTPUTS, TARGETS)),
    "chrf": (OUTPUTS, TARGETS, metrics.chrf.columns(OUTPUTS, TARGETS)),
    "rougeL": (OUTPUTS, TARGETS, metrics.rouge(OUTPUTS, TARGETS)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_metric_loaded_by_path_equals_the_statistic_of_columns(name, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    predictions, references, columns = CASES[name]
    module = hf_evaluate.load(evaluate_metrics.__file__, name, cache_dir=str(tmp_path))
    value = module.compute(predictions=predictions, references=references)[name]
    assert value == pytest.approx(metrics.STATISTICS[name](columns), rel=1e-12) and np.isfinite(value)


def test_exact_match_matthews_and_unknown_ones():
    compute = metrics.load_metric("exact_match").compute
    matched = compute(predictions=["a", "b ", "c"], references=["a", "b", "c"])["exact_match"]
    assert matched == pytest.approx(2 / 3)
    # Of a 2x2 table: (TP·TN − FP·FN) / √(product of the margins).
    said, label = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]
    expected = (3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2)
    found = metrics.load_metric("matthews").compute(predictions=said, references=label)["matthews"]
    assert found == pytest.approx(expected)
    pytest.raises(KeyError, evaluate_metrics.StudyMetric, "bleurt").match("no metric 'bleurt'")


@pytest.fixture
def own_file(tmp_path):
    rows = "".join(f"{text},{'ab'[len(text) % 2]}\n" for text in sentences(30, seed=3))
    (tmp_path / "own.csv").write_text("text,label\n" + rows)
    return tmp_path / "own.csv"


def own_metric(folder, returned: str, name="minority_recall"):
    module = folder / f"{name}.py"
    module.write_text(f"""
import datasets
import evaluate


class MinorityRecall(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        features = datasets.Features({{"predictions": value, "references": value}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        hits = [p for p, r in zip(predictions, references) if r == 1]
        return {returned}
""")
    return str(module)


def test_a_users_own_metric_is_reported_with_an_interval_and_a_paired_difference(
    own_file, tmp_path, monkeypatch
):
    module = own_metric(tmp_path, '{"minority_recall": sum(hits) / len(hits), "n": len(hits)}')
    task = load_task(own_file, metric=module, higher_is_better=True)
    model = tiny("bert", "classification", vocab_size=VOCABULARY, max_position_embeddings=128)
    scored = evaluate(model, byte_tokenizer(encoder=True), task)
    label, said = scored.columns["label"], scored.columns["prediction"]
    assert scored.metric == "minority_recall" and scored.value == said[label == 1].mean()
    assert set(scored.secondary) == {"accuracy", "macro_f1", "cross_entropy"} and scored.floor is None
    better = scored.columns | {"prediction": label}
    measured = quality(scored, better, resamples=60)
    assert measured["value"] == scored.value and measured["low"] <= scored.value <= measured["high"]
    assert measured["difference"]["value"] == pytest.approx(scored.value - 1)
    assert measured["difference"]["test"] == "paired bootstrap" and measured["difference"]["n"] == 30
    assert task.data_hash != load_task(own_file).data_hash


def test_a_metric_that_is_not_there_or_not_one_number_is_refused(own_file, tmp_path):
    with pytest.raises(BadSetting, match=r"no metric '.*nowhere\.py'.*expected one of accuracy"):
        load_task(own_file, metric=str(tmp_path / "nowhere.py"))
    module = own_metric(tmp_path, '{"x": 1.0, "y": 2.0}')
    task = load_task(own_file, metric=module, higher_is_better=True)
    with pytest.raises(BadSetting, match="returns x, y; expected one number"):
        task.statistic({"prediction": np.ones(3), "label": np.ones(3)})
    with pytest.raises(BadSetting, match=r"which of two values is better is not known: give -p higher_is"):
        load_task(own_file, metric=module)
    error = load_task(own_file, metric=module, higher_is_better=False)
    assert not error.higher_is_better and error.data_hash != task.data_hash
    assert load_task(own_file, higher_is_better=False).higher_is_better  # that of ours is known


def test_a_users_own_metric_that_is_called_as_one_of_ours_is_not_taken_for_it(own_file, tmp_path):
    module = own_metric(tmp_path, '{"accuracy": len(hits) / len(references), "n": 1}', "accuracy")
    task = load_task(own_file, metric=module, higher_is_better=True)
    columns = {"label": np.arange(30.0) % 2, "prediction": np.zeros(30)}
    columns |= dict.fromkeys(("correct", "cross_entropy"), np.zeros(30))
    blank = {"secondary": {}, "floor": None, "collapsed": None, "seconds": 0.0, "details": {}}
    scored = Evaluation(task=task, columns=columns, metric=task.metric, value=0.5, **blank)
    measured = quality(scored, columns, resamples=20)
    assert measured["low"] <= 0.5 <= measured["high"] and measured["difference"]["test"] == "paired bootstrap"
    assert not Loss(task, Margin(0.01, True)).is_proportion and "accuracy" in task.secondary
    assert task.data_hash != load_task(own_file).data_hash


@pytest.mark.parametrize("metric", ["macro_f1", "matthews"])
def test_own_data_may_be_scored_by_another_metric_of_ours(own_file, metric):
    model = tiny("bert", "classification", vocab_size=VOCABULARY, max_position_embeddings=128)
    scored = evaluate(model, byte_tokenizer(encoder=True), load_task(own_file, metric=metric))
    assert scored.metric == metric and metric not in scored.secondary and "accuracy" in scored.secondary
    assert scored.value == pytest.approx(scored.task.statistic(scored.columns))


def test_matthews_of_resamples_is_scikit_learns_of_each():
    indices = np.vstack([RNG.integers(0, 40, (30, 40)), np.full((1, 40), 3)])  # the last: one example
    columns = {"label": LABEL * 1.0, "prediction": SAID * 1.0}
    expected = [matthews_corrcoef(LABEL[i], SAID[i]) for i in indices]
    assert metrics.STATISTICS["matthews"].resampled(columns, indices) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "reference"), [("spearman", spearmanr), ("pearson", pearsonr)])
def test_correlations_of_resamples_are_scipys_of_each(name, reference):
    rng = np.random.default_rng(0)
    columns = {"score": rng.normal(size=80).round(1), "label": rng.integers(0, 5, 80).astype(float)}
    indices = np.vstack([rng.integers(0, 80, (70, 80)), np.zeros((1, 80), int)])  # the last: one example
    found = metrics.STATISTICS[name].resampled(columns, indices)
    expected = [reference(columns["score"][i], columns["label"][i])[0] for i in indices[:-1]]
    assert found[:-1] == pytest.approx(expected)
    assert np.isnan(found[-1]) and np.isnan(metrics.STATISTICS[name](columns | {"score": np.full(80, 0.1)}))
