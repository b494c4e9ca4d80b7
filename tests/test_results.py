"""Rows on disk: keys that mean the same are the same, and nothing that was recorded is ever lost or torn."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from lmcompress.errors import BadData, DiskFull
from lmcompress.results import store as results
from lmcompress.results.names import told_apart
from lmcompress.results.store import RowStore, canonical, row_key

KEY_PARTS = {"task": "sst2", "model_hash": "aaaa", "data_hash": "bbbb", "technique": "magnitude"}
KEY_PARTS |= {"technique_version": 1, "measure_version": 1, "seed": 0}
KEY_PARTS |= {"settings": {"sparsity": 0.5, "policy": "blocks"}}


def make_row(**changes) -> dict:
    """A row of `measured_row.json`, which has all there is to measure, with other fields at its top level."""
    return json.loads(Path(__file__).with_name("measured_row.json").read_text(encoding="utf-8")) | changes


def key_of(number: int) -> str:
    return f"{number:016x}"


def put(row: dict, dotted: str, value: object) -> dict:
    *parents, last = dotted.split(".")
    target = row
    for name in parents:
        target = target[name]
    target[last] = value
    return row


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1.0}, {"a": 1}, True),
        ({"a": (1, 2)}, {"a": [1, 2]}, True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": np.float64(0.1)}, {"a": 0.1}, True),
        ({"a": np.float32(0.1)}, {"a": 0.1}, True),
        ({"a": np.int64(3)}, {"a": 3.0}, True),
        ({"a": np.array([1, 2])}, {"a": [1.0, 2.0]}, True),
        ({"a": np.array(0.5, np.float32)}, {"a": 0.5}, True),
        ({"a": np.bool_(True)}, {"a": True}, True),
        ({"a": np.str_("x")}, {"a": "x"}, True),
        ({"a": -0.0}, {"a": 0}, True),
        ({0: 4}, {"0": 4}, True),
        ({"a": 1e300}, {"a": int(1e300)}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": None}, {}, False),
        ({"a": 0.1}, {"a": 0.2}, False),
    ],
)
def test_keys_are_the_same_exactly_where_the_meaning_is(one, other, same):
    assert (canonical(one) == canonical(other)) == same
    keys = {row_key(**KEY_PARTS | {"settings": settings}) for settings in (one, other)}
    assert len(keys) == (1 if same else 2)


def test_every_part_of_the_key_counts_and_their_order_does_not():
    key = row_key(**KEY_PARTS)
    assert len(key) == 16 and int(key, 16) >= 0
    assert row_key(**dict(reversed(KEY_PARTS.items()))) == key
    for name in KEY_PARTS:
        assert row_key(**KEY_PARTS | {name: {"other": 1} if name == "settings" else 99}) != key, name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_canonical_text_says_the_same_as_its_object_and_reads_back_to_itself(value):
    text = canonical(value)
    assert json.loads(text) == value
    assert canonical(json.loads(text)) == text
    assert text.isascii() and "\n" not in text


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), np.float32("nan"), object(), {1, 2}])
def test_what_json_cannot_hold_is_refused_by_name(bad):
    pytest.raises(BadData, canonical, {"settings": {"inner": [0, bad]}}).match(r"settings\.inner\.1")
    pytest.raises(BadData, canonical, {"settings": {1: "a", "1": "b"}}).match("read alike")


def test_the_schema_is_one_and_takes_a_full_row_and_a_row_without_measurements(tmp_path):
    Draft202012Validator.check_schema(results._schema())
    store = RowStore(tmp_path)
    full = make_row()
    store.append(full)
    bare = make_row(key=key_of(1), task=None, family=None, seed=None)
    bare |= dict.fromkeys(("quality", "latency", "memory", "compute", "verdict"))
    store.append(bare)
    assert store.rows() == [full, bare]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("quality.value", float("nan"), "quality.value"),
        ("latency.shapes.batch1.ratio", float("inf"), "latency.shapes.batch1.ratio"),
        ("quality.value", "high", "quality.value"),
        ("quality.difference.p", 1.5, "quality.difference.p"),
        ("quality.accuracy", 0.9, "accuracy"),
        ("latency.shapes.batch1.speed", 2, "speed"),
        ("memory.parameters", -1, "memory.parameters"),
        ("memory.parameters", 1.5, "memory.parameters"),
        ("compute.tflops", 1, "tflops"),
        ("verdict.size", "tiny", "verdict.size"),
        ("verdict.latency.batch1", "quick", "verdict.latency.batch1"),
        ("provenance.host", "mine", "host"),
        ("provenance.started", "yesterday", "provenance.started"),
        ("provenance", None, "provenance"),
        ("settings", None, "settings"),
        ("key", "short", "key"),
        ("notebook", "../escape", "notebook"),
        ("extra", 1, "extra"),
    ],
)
def test_a_bad_field_is_refused_and_named(tmp_path, field, value, named):
    with pytest.raises(BadData) as refused:
        RowStore(tmp_path).append(put(make_row(), field, value))
    assert named in str(refused.value)
    assert not list(tmp_path.glob("*.jsonl"))


def test_every_top_level_field_is_required(tmp_path):
    for name in make_row():
        row = make_row()
        del row[name]
        with pytest.raises(BadData, match=name):
            RowStore(tmp_path).append(row)


def test_later_rows_win_within_a_notebook_and_notebooks_keep_their_own(tmp_path):
    store = RowStore(tmp_path / "not" / "there" / "yet")
    assert store.rows() == [] and store.rows("02_pruning") == [] and store.find(key_of(1)) is None
    for seed in (1, 2):
        store.append(make_row(key=key_of(1), seed=seed))
    store.append(make_row(key=key_of(2), seed=3))
    elsewhere = make_row(key=key_of(1), seed=4, notebook="01_other")
    store.append(put(elsewhere, "provenance.started", "2026-01-02T00:00:00+00:00"))
    assert [row["seed"] for row in store.rows("02_pruning")] == [2, 3]
    assert [row["seed"] for row in store.rows()] == [4, 2, 3]
    assert store.find(key_of(1))["seed"] == 4, "the latest of any notebook"
    assert store.find(key_of(2))["seed"] == 3
    assert store.find(key_of(3)) is None


@pytest.mark.parametrize(
    "made, shown",
    [
        ([("m", "a", "x/m", "d", 9), ("m", "a", None, "d", None)], [("m", "t"), ("m", "t")]),
        ([("m", "a", "x/m", "d", 9), ("m", "b", "y/m", "d", 9)], [("x/m", "t"), ("y/m", "t")]),
        ([("m", "a", None, "d", 9), ("m", "b", None, "d", 9)], [("m (a)", "t"), ("m (b)", "t")]),
        ([("m", "a", "x/m", "d", 9), ("m", "b", "x/m", "d", 9)], [("m (a)", "t"), ("m (b)", "t")]),
        (
            [("m", "a", None, "d", 9), ("m", "a", None, "e", 1000)],
            [("m", "t (9 examples)"), ("m", "t (1,000 examples)")],
        ),
        ([("m", "a", None, "d", 9), ("m", "a", None, "e", 9)], [("m", "t (d)"), ("m", "t (e)")]),
        ([("m", "a", None, "d", 9), ("n", "b", None, "e", 9)], [("m", "t"), ("n", "t")]),
        ([("m", "a", "x/m", "d", 9), ("copy", "a", "y/copy", "d", 9)], [("m", "t"), ("m", "t")]),
    ],
)
def test_names_that_mean_two_things_are_told_apart(tmp_path, made, shown):
    store = RowStore(tmp_path)
    for number, (model, model_hash, folder, data_hash, count) in enumerate(made):
        said = {"model_hash": model_hash, "data_hash": data_hash, "n_examples": count}
        said = make_row()["provenance"] | said
        said |= {"folder": folder} if folder else {}
        store.append(make_row(key=f"{number:016d}", model=model, task="t", provenance=said))
    assert [(row["model"], row["task"]) for row in store.rows()] == shown
    assert [(row["model"], row["task"]) for row in told_apart(store.rows())] == shown


def test_text_of_any_kind_stays_on_its_line(tmp_path):
    store = RowStore(tmp_path)
    nasty = "line\nfeed \u2028 \x85 \r\n \ud800 Zürich \x00"
    store.append(make_row(settings={nasty: nasty}))
    assert (tmp_path / "02_pruning.jsonl").read_bytes().count(b"\n") == 1
    assert store.rows()[0]["settings"] == {nasty: nasty}


@pytest.mark.parametrize(
    "tail", [b'{"key": "0000', b"\x00\x00\x00", b"{", b'{"key": "x"', "é".encode()[:1], b'{"a":"\\ud8']
)
def test_a_torn_tail_is_no_row_and_is_cut_before_the_next_append(tmp_path, tail):
    store = RowStore(tmp_path)
    file = tmp_path / "02_pruning.jsonl"
    store.append(make_row(key=key_of(1)))
    whole = file.read_bytes()
    file.write_bytes(whole + tail)
    assert [row["key"] for row in store.rows()] == [key_of(1)]
    store.append(make_row(key=key_of(2)))
    assert file.read_bytes() == whole + whole.replace(key_of(1).encode(), key_of(2).encode())
    assert [row["key"] for row in store.rows()] == [key_of(1), key_of(2)]


def test_a_last_row_whose_newline_an_editor_ate_is_kept(tmp_path):
    store = RowStore(tmp_path)
    file = tmp_path / "02_pruning.jsonl"
    store.append(make_row(key=key_of(1)))
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert [row["key"] for row in store.rows()] == [key_of(1)]
    store.append(make_row(key=key_of(2)))
    assert [row["key"] for row in store.rows()] == [key_of(1), key_of(2)]


@pytest.mark.parametrize("line", [b"<<<<<<< HEAD", b'{"no": "row"}', b"7"])
def test_a_strange_line_in_the_middle_is_an_error_with_its_number(tmp_path, line):
    store = RowStore(tmp_path)
    store.append(make_row())
    file = tmp_path / "02_pruning.jsonl"
    file.write_bytes(line + b"\n" + file.read_bytes())
    pytest.raises(BadData, store.rows).match(r"02_pruning.jsonl, line 1 ")


def _append_until_killed(folder: Path, first: int, acknowledge: int) -> None:
    store = RowStore(folder)
    for number in range(first, first + 100_000):
        # Large rows now and then, so that a kill can fall inside a write.
        filler = "x" * (2_000_000 if number % 3 == 0 else 10)
        store.append(make_row(key=key_of(number), settings={"filler": filler}))
        os.write(acknowledge, number.to_bytes(4, "big"))


def test_a_kill_at_any_moment_loses_at_most_the_row_in_flight(tmp_path):
    fork = multiprocessing.get_context("fork")
    chance = random.Random(0)
    file = tmp_path / "02_pruning.jsonl"
    first = 0
    for _ in range(25):
        reader, writer = os.pipe()
        child = fork.Process(target=_append_until_killed, args=(tmp_path, first, writer))
        child.start()
        os.close(writer)
        acknowledged = os.read(reader, 4)
        assert acknowledged, "the child ended before its first row"
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        while more := os.read(reader, 1 << 16):
            acknowledged += more
        os.close(reader)
        done = first + len(acknowledged) // 4
        numbers = [int(row["key"], 16) for row in RowStore(tmp_path).rows()]
        first = len(numbers)
        assert numbers == list(range(first)), "a row is missing, doubled or torn"
        assert first in (done, done + 1)
        if file.stat().st_size > 12_000_000:
            file.unlink()
            first = 0


def test_processes_that_append_at_once_do_not_mix(tmp_path):
    fork = multiprocessing.get_context("fork")

    def work(worker: int) -> None:
        for number in range(20):
            RowStore(tmp_path).append(
                make_row(key=key_of(worker * 1000 + number), settings={"x": "y" * 20_000})
            )

    children = [fork.Process(target=work, args=(worker,)) for worker in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    keys = [row["key"] for row in RowStore(tmp_path).rows()]
    assert sorted(keys) == sorted(key_of(w * 1000 + n) for w in range(3) for n in range(20))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("room", [0, 1, 500])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, code, room):
    """The disk takes `room` bytes of the row (a short write), then no more."""
    store = RowStore(tmp_path)
    store.append(make_row(key=key_of(1)))
    before = (tmp_path / "02_pruning.jsonl").read_bytes()
    real_write, left = os.write, room

    def full(descriptor: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(code, os.strerror(code))
        written = real_write(descriptor, data[:left])
        left -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "write", full)
        pytest.raises(DiskFull, store.append, make_row(key=key_of(2))).match(r"02_pruning\.jsonl")
    assert (tmp_path / "02_pruning.jsonl").read_bytes() == before
    store.append(make_row(key=key_of(2)))
    assert [row["key"] for row in store.rows()] == [key_of(1), key_of(2)]


def test_a_sync_that_finds_no_space_takes_the_row_back(tmp_path, monkeypatch):
    store = RowStore(tmp_path)
    store.append(make_row(key=key_of(1)))

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", no_space)
    pytest.raises(DiskFull, store.append, make_row(key=key_of(2)))
    assert [row["key"] for row in store.rows()] == [key_of(1)]


def test_a_short_write_that_can_go_on_is_completed(tmp_path, monkeypatch):
    real_write = os.write
    monkeypatch.setattr(results.os, "write", lambda descriptor, data: real_write(descriptor, data[:100]))
    store = RowStore(tmp_path)
    store.append(make_row())
    assert store.rows() == [make_row()]


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(results.os, "write", broken)
    with pytest.raises(OSError) as failed:
        RowStore(tmp_path).append(make_row())
    assert not isinstance(failed.value, DiskFull)


def test_scores_come_back_as_they_were(tmp_path):
    store = RowStore(tmp_path)
    scores = {
        "correct": np.array([True, False]),
        "nll": np.array([1.5, np.nan]),
        "counts": np.arange(12, dtype=np.int32).reshape(3, 4).T,
        "empty": np.zeros((0, 2), np.float32),
        "scalar": np.array(3.0),
    }
    path = store.save_scores(key_of(1), scores)
    assert path == tmp_path / "scores" / f"{key_of(1)}.safetensors"
    back = store.load_scores(key_of(1))
    assert back.keys() == scores.keys()
    for name, values in scores.items():
        np.testing.assert_array_equal(back[name], values)
        assert back[name].dtype == values.dtype and back[name].shape == values.shape
    store.save_scores(key_of(2), {"listed": [1, 2]})
    assert list(store.load_scores(key_of(2))["listed"]) == [1, 2]


def test_scores_that_cannot_be_stored_or_found_say_so(tmp_path):
    store = RowStore(tmp_path)
    pytest.raises(BadData, store.save_scores, key_of(1), {"texts": np.array(["a"])}).match("texts")
    pytest.raises(BadData, store.load_scores, key_of(1)).match(key_of(1))
    path = store.save_scores(key_of(2), {"a": np.arange(1000)})
    path.write_bytes(path.read_bytes()[:-100])
    pytest.raises(BadData, store.load_scores, key_of(2)).match("damaged")
