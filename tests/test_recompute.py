"""What is published of a row's scores gives its numbers again, and finds a number that is not theirs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from lmcompress.measure import compare, quality, recompute
from lmcompress.measure.quality import quality_verdict
from lmcompress.results.rows import is_dense
from lmcompress.results.scores import columns_of, named, publish_scores, read_scores
from lmcompress.results.store import RowStore, published_folder, published_rows
from lmcompress.tasks.metrics import STATISTICS, bleu
from lmcompress.tasks.minimal_pairs import within_fields
from tests import synthetic_rows

RNG = np.random.default_rng(0)
N = 60


def task(metric, *, secondary=(), higher=True, cluster=None):
    return SimpleNamespace(
        metric=metric,
        statistic=STATISTICS[metric],
        secondary=within_fields(secondary) if cluster else {name: STATISTICS[name] for name in secondary},
        likelihood=next((name for name in secondary if name in ("cross_entropy", "bits_per_byte")), None)
        if metric != "perplexity"
        else None,
        block=10 if metric == "perplexity" else 1,
        cluster=cluster,
        higher_is_better=higher,
    )


def labels(share):
    prediction = np.where(RNG.random(N) < share, 1.0, 0.0)
    label = np.ones(N)
    nats = RNG.exponential(0.5, N).astype(np.float32)
    return {"label": label, "prediction": prediction, "correct": prediction * label, "cross_entropy": nats}


def pairs(share):
    paradigm = np.repeat(np.arange(20.0), 3)
    return {"correct": (RNG.random(N) < share) * 1.0, "field": paradigm // 10, "paradigm": paradigm}


def captions(share):
    said = ["a b c d e f" if RNG.random() < share else "a b x d y f" for _ in range(N)]
    columns = bleu.columns(said, ["a b c d e f g"] * N)
    return columns | {"nll": RNG.random(N), "bytes": np.full(N, 11.0)}


TASKS = {
    "labels": (task("accuracy", secondary=("macro_f1", "cross_entropy")), labels),
    "pairs": (task("accuracy", secondary=("accuracy_a", "accuracy_b"), cluster="paradigm"), pairs),
    "captions": (task("bleu", secondary=("bits_per_byte",)), captions),
    "ratings": (task("spearman"), lambda share: {"score": RNG.normal(size=N), "label": np.arange(N) // 9.0}),
    "text": (
        task("perplexity", secondary=("bits_per_byte",), higher=False),
        lambda share: {"nll": RNG.normal(300, 9, N), "tokens": np.full(N, 99.0), "bytes": np.full(N, 400.0)},
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a dense and a compressed row of each task, the first with a set to choose on, published."""
    folder = tmp_path_factory.mktemp("run")
    store = RowStore(folder)
    for name, (asked, draw) in TASKS.items():
        parts = ("quality", "selection") if name == "labels" else ("quality",)
        scores = {}
        for row in (
            synthetic_rows.row(task=name),
            synthetic_rows.row("wanda", sparsity=0.5, p=0.5, task=name),
        ):
            is_dense = not scores
            row["provenance"] = row["provenance"] | {"data_hash": name.ljust(16, "0")}
            scores[row["key"]] = {}
            for part in parts:
                columns = draw(0.9 if is_dense else 0.8)
                value = float(asked.statistic(columns))
                about = {
                    "metric": asked.metric,
                    "value": value,
                    "floor": 0.1,
                    "collapsed": None,
                    "details": {},
                }
                evaluation = SimpleNamespace(task=asked, columns=columns, **about)
                dense = None if is_dense else columns_of(next(iter(scores.values())), part)
                row[part] = quality(evaluation, dense)
                scores[row["key"]] |= named(columns, part)
            row["verdict"] = row["verdict"] | {"quality": quality_verdict(row["quality"], baseline=is_dense)}
            store.append(row)
            store.save_scores(row["key"], scores[row["key"]])
        if name == "labels":
            keys = dict(zip(("first", "second"), scores, strict=True))
            both = [columns_of(scores[key]) for key in keys.values()]
            tested = synthetic_rows.compared("dense", "wanda", 0, {}, {}, p=0.5)
            achieved = tested["achieved"] | {
                "values": [float(asked.statistic(columns)) for columns in both],
                "difference": compare(asked, *both),
            }
            of_labels = {"task": name, "provenance": row["provenance"]}
            store.append(tested | {"settings": keys, "achieved": achieved} | of_labels)
    unscored = synthetic_rows.row("random", 0.6, sparsity=0.5, p=0.5)
    store.append(unscored | {"notebook": "other"} | of_labels)
    publish_scores(store, store.rows(), folder / "scores")
    return folder


def test_published_scores_are_those_of_the_run_to_the_bit(run):
    store, published = RowStore(run), read_scores(run / "scores")
    assert [file.name for file in (run / "scores").glob("*.parquet")] == ["02_pruning.parquet"]
    assert len(published) == 2 * len(TASKS)
    for key, columns in published.items():
        kept = store.load_scores(key)
        assert set(kept) == set(columns)
        assert all(np.array_equal(kept[name], columns[name]) for name in kept)


def test_every_number_of_a_row_follows_from_its_scores(run, capsys):
    assert recompute.main(["--results", str(run)]) == 0
    assert "11 rows agree with their scores, 0 do not, 1 have no scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("technique", "path"),
    [
        ("wanda", ("quality", "value")),
        ("wanda", ("quality", "difference", "p")),
        ("wanda", ("quality", "difference", "bound")),
        ("wanda", ("selection", "difference", "high")),
        ("wanda", ("quality", "secondary", "cross_entropy", "difference", "low")),
        ("wanda", ("verdict", "quality")),
        ("dense", ("quality", "low")),
        ("paired-difference", ("achieved", "difference", "value")),
    ],
)
def test_a_number_that_is_not_of_the_scores_is_found(run, technique, path):
    rows = json.loads(json.dumps(RowStore(run).rows()))
    row = next(row for row in rows if row["technique"] == technique and row["task"] == "labels")
    part = row
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = "better" if path[-1] == "quality" else part[path[-1]] + 1e-4
    differences, _ = recompute.check(rows, read_scores(run / "scores"))
    found = {key: lines for key, lines in differences.items() if lines}
    assert list(found) == [row["key"]] or technique == "dense"
    assert found[row["key"]][0].startswith(".".join(path))


def test_a_wrong_number_gives_the_exit_status_and_the_row(run, tmp_path, capsys):
    rows = [json.loads(line) for line in (run / "02_pruning.jsonl").read_text().splitlines()]
    rows[1]["quality"]["high"] += 0.01
    (tmp_path / "02_pruning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scores").symlink_to(run / "scores")
    assert recompute.main(["--results", str(tmp_path)]) == 1
    assert f"{rows[1]['key']}: quality.high is" in capsys.readouterr().out


def test_scores_of_rows_that_are_no_longer_published_go(run, tmp_path):
    store = RowStore(run)
    publish_scores(store, store.rows(), tmp_path)
    publish_scores(store, [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_published_rows_are_what_the_published_scores_give():
    rows, scores = published_rows(), read_scores(published_folder() / "scores")
    of_rows = [row for row in rows if row["key"] in scores and not is_dense(row)]
    differences, _ = recompute.check([*filter(is_dense, rows), *of_rows[::9]], scores)  # all take a minute
    assert len(differences) > 20
    assert {key: found for key, found in differences.items() if found} == {}
