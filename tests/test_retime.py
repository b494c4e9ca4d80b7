"""Times taken again in several processes: recorded once each, and the least favourable of them counts."""

import json
from pathlib import Path

import pytest

from helpers.report import conditions
from lmcompress.errors import BadSetting
from lmcompress.measure import fresh
from lmcompress.results.frame import frame
from lmcompress.results.rows import NO_CHANGE, TIMED_AGAIN, machine_of, with_times_again
from lmcompress.results.store import RowStore
from lmcompress.study import decision, retime
from tests.synthetic_rows import SHAPE, row
from tests.test_sweep import house, subject_in  # noqa: F401  the fixture

HOW = {"device": "cpu", "dtype": "float32", "threads": 2, "calls": 40}


def process(of, number, ratio, *, width=0.02, speed="faster", instructions="AVX2") -> dict:
    ends = {"ratio": ratio, "ratio_low": ratio - width, "ratio_high": ratio + width}
    shape = SHAPE | ends | {"shape": "batch1", "median_ms": 10 * ratio, "speed": speed}
    again = row(TIMED_AGAIN, notebook=of["notebook"])
    again |= {"quality": None, "latency": None, "settings": {"of": of["key"], "process": number}}
    machine = again["provenance"]["machine"] | {"instructions": instructions}
    again["provenance"] = again["provenance"] | {"machine": machine}
    return again | {"key": f"{of['key']}{number}{instructions}", "achieved": HOW | {"shapes": [shape]}}


def test_of_several_processes_the_median_stands_and_the_widest_interval():
    timed = row("wanda", 0.9, p=0.5, sparsity=0.5)
    again = [process(timed, number, ratio) for number, ratio in enumerate((0.5, 0.8, 0.6))]
    elsewhere = process(timed, 0, 0.1, instructions="AVX512")
    rows = with_times_again([row(), timed, *again, elsewhere])
    assert [kept["technique"] for kept in rows] == ["dense", "wanda"]
    line = frame(rows).iloc[1]
    times = [line[f"{name}.batch1"] for name in ("ms", "ratio", "ratio_low", "ratio_high", "speed")]
    assert times == [6.0, 0.6, pytest.approx(0.48), pytest.approx(0.82), "faster"]
    assert (line["processes"], line["machine"], line["timed"]) == (3, "a cpu, AVX2", True)
    other_threads, longer = process(timed, 3, 0.1), process(timed, 4, 0.1)
    other_threads["achieved"] = other_threads["achieved"] | {"threads": 1}
    longer["achieved"]["shapes"][0]["length"] = 512
    assert frame(with_times_again([row(), timed, *again, other_threads, longer])).iloc[1]["processes"] == 3
    for least_favourable in (NO_CHANGE, "slower"):
        again[1]["achieved"]["shapes"][0]["speed"] = least_favourable
        assert frame(with_times_again([row(), timed, *again])).iloc[1]["speed.batch1"] == least_favourable
    assert frame([row(), timed])["processes"].tolist() == [1, 1]
    timed["provenance"]["machine"] = again[0]["provenance"]["machine"]  # its own time is of a process, too
    line = frame(with_times_again([row(), timed, *again])).iloc[1]
    assert (line["processes"], line["ratio_high.batch1"]) == (4, SHAPE["ratio_high"])


def test_hosts_of_one_name_are_told_apart_and_that_with_most_times_of_the_model_stands():
    timed, other = (row("wanda", 0.8, p=0.5, sparsity=sparsity) for sparsity in (0.5, 0.9))
    elsewhere, here = process(timed, 0, 0.9), process(timed, 1, 0.4)
    elsewhere["provenance"]["machine"]["os"] = "of another host"
    again = [elsewhere, here, process(other, 0, 0.5)]
    line = frame(with_times_again([row(), timed, other, *again])).iloc[1]
    assert (line["processes"], line["ratio.batch1"]) == (1, 0.4)


def test_fine_tuning_changes_no_time():
    timed, trained = (
        row("wanda", 0.8, p=0.5, sparsity=0.5),
        row("wanda", 0.9, p=0.5, sparsity=0.5, recovery=60),
    )
    other = row("wanda", 0.9, p=0.5, sparsity=0.9, recovery=60)
    alike = row(
        "sparsegpt", 0.9, p=0.5, sparsity=0.5
    )  # of the same shapes: it stood on the first's one process
    alike["latency"] = alike["latency"] | {"measured_on": timed["key"]}
    for untimed in (timed, trained, other):
        untimed["latency"] = None
    rows = with_times_again([row(), timed, trained, other, alike, process(timed, 0, 0.5)])
    table = frame(rows).set_index("key")
    assert table.loc[alike["key"], ["ratio.batch1", "machine"]].tolist() == [0.5, "a cpu, AVX2"]
    assert {machine_of(each) for each in rows} == {"a cpu"}  # of their quality, as before
    assert table.loc[trained["key"], "measured_on"] == timed["key"]
    assert table.loc[trained["key"], "ratio.batch1"] == 0.5 and not table.loc[trained["key"], "timed"]
    assert table.loc[trained["key"], "machine"] == "a cpu, AVX2"
    assert table["ratio.batch1"].isna()[other["key"]]


def test_a_decision_goes_by_the_least_favourable_process():
    timed, plain = row("wanda", 0.9, p=0.5, sparsity=0.5), row("sparsegpt", 0.9, p=0.5, sparsity=0.5)
    again = [process(timed, number, ratio) for number, ratio in enumerate((0.5, 0.6))]
    rows = decision.comparable_rows([row(), timed, plain, *again], ())
    named = {option.key: option for option in decision.options(rows)}
    assert named[timed["key"]].ratio["batch1"] == pytest.approx(0.62) and named[timed["key"]].processes == 2
    table = conditions.times_again([timed, *again])
    assert "0.50 [0.48, 0.52], 0.60 [0.58, 0.62]" in table and "a cpu, AVX2" in table
    assert conditions.times_again([timed]) == ""


def test_one_name_of_a_processor_is_two_machines_with_other_instructions():
    plain = row()
    assert machine_of(plain) == "a cpu"
    plain["provenance"]["machine"] = plain["provenance"]["machine"] | {"instructions": "AVX2"}
    assert machine_of(plain) == "a cpu, AVX2"
    plain["provenance"]["machine"] = plain["provenance"]["machine"] | {"gpu": "a gpu"}
    assert machine_of(plain) == "a gpu"


def test_each_process_is_recorded_once_from_one_saved_model(house, monkeypatch, capsys):  # noqa: F811
    subject = subject_in(house, timed=False)
    made = subject.measure("magnitude-layer", sparsity=0.5, timed=False)
    asked, saved = [], []
    baseline_make = retime.Baseline.make
    monkeypatch.setattr(retime.Baseline, "make", lambda *a, **k: saved.append(1) or baseline_make(*a, **k))

    def run(module, folder, dense, settings, **_):
        asked.append((module, json.loads(settings)["seed"]))
        assert (house / "run").resolve() in Path(folder).resolve().parents
        return HOW | {"shapes": {"batch1": SHAPE | {"ratio": 0.5, "speed": "faster"}}}

    monkeypatch.setattr(fresh, "run", run)
    places = ["--model", str(house / "model"), "--task", str(house / "reviews.csv")]
    command = [made["key"], "--run", str(house / "run"), *places, "-p", f"train_path={house / 'train.csv'}"]
    assert retime.main([*command, "--processes", "2"]) == 0
    assert asked == [("lmcompress.measure.times", 0), ("lmcompress.measure.times", 1)] and len(saved) == 1
    assert retime.main(command) == 0  # a third process is added to the two
    assert [number for _, number in asked] == [0, 1, 2]
    assert retime.main([*command, "--processes", "1", "--calls", "50"]) == 0  # another number of calls
    assert len(asked) == 4 and retime.main([*command, "--length", "16", "--processes", "1"]) == 0
    asked.clear()
    assert retime.main([*command, "--calls", "50", "--processes", "1"]) == 0 and not asked
    again = [r for r in RowStore(house / "run" / "rows").rows() if r["technique"] == TIMED_AGAIN]
    assert [(r["settings"]["of"], r["notebook"]) for r in again] == [(made["key"], "02_pruning")] * 5
    assert "process 2: {'batch1': 0.5}" in capsys.readouterr().out
    assert not list((house / "run" / "scratch").glob("times-*"))
    assert retime.main(["0" * 16, "--run", str(house / "run")]) == 1
    assert "has no row 0000000000000000" in capsys.readouterr().err
    dense = next(r for r in RowStore(house / "run" / "rows").rows() if r["technique"] == "dense")
    assert retime.main([dense["key"], "--run", str(house / "run"), *places]) == 1
    assert "is the dense model, which others are timed beside" in capsys.readouterr().err
    made["provenance"]["model_hash"] = "0" * 16
    with pytest.raises(BadSetting, match="on a model of the hash 0000000000000000, and .*: say where"):
        retime.retime(made, house / "run", model=str(house / "model"))


def test_names_of_display_are_not_loaded(tmp_path, monkeypatch, capsys):
    rows = [row("wanda", 0.9, p=0.5, sparsity=0.5), row("wanda", 0.9, p=0.5, sparsity=0.5)]
    for number, recorded in enumerate(rows):  # two evaluation sets of one task
        recorded["provenance"] = recorded["provenance"] | {"data_hash": f"{number:016}"}
        recorded["key"] = f"{number:016}"
        RowStore(tmp_path / "rows").append(recorded)
    asked = []
    monkeypatch.setattr(retime, "retime", lambda row, *_, **__: asked.append(row["task"]) or [])
    assert retime.main([rows[0]["key"], "--run", str(tmp_path)]) == 0 and asked == [rows[0]["task"]]


@pytest.mark.slow  # starts torch
def test_a_process_of_its_own_times_a_saved_model(house):  # noqa: F811
    subject = subject_in(house, timed=False)
    made = subject.measure("magnitude-layer", sparsity=0.5, timed=False)
    where = {"model": str(house / "model"), "task": str(house / "reviews.csv")}
    how = {"processes": 1, "calls": 3, "length": 8, "train_path": str(house / "train.csv")}
    (again,) = retime.retime(made, house / "run", **how, **where)
    shapes = {shape["shape"]: shape for shape in again["achieved"]["shapes"]}
    assert set(shapes) == {"batch1", "batch8"} and again["achieved"]["calls"] == 3
    assert all(shape["ratio"] > 0 and shape["speed"] == "too few calls" for shape in shapes.values())
    assert frame(with_times_again([subject.dense, made, again])).iloc[1]["processes"] == 1
