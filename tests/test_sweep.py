"""A sweep on a tiny real model and a file of labelled text: rows, skipping, resuming, recovery."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import notebook
from lmcompress import compress, device, measure
from lmcompress.errors import AssetNotFound, BadData, BadSetting, BadWeights, WrongTask
from lmcompress.models import loading, storage
from lmcompress.paths import owned_folder
from lmcompress.paths import sweep as sweep_folder
from lmcompress.results.store import RowStore
from lmcompress.study.job import CompressionJob
from lmcompress.study.provenance import reads_training
from lmcompress.study.study import DENSE, Baseline, Recovery, Study
from lmcompress.tasks import load_task
from lmcompress.tasks.calibration import Calibration
from lmcompress.train import recovery as recovery_module
from lmcompress.train.distillation import divergence
from tests.tiny_models import tiny

GOOD, BAD = ["good", "fine", "great", "nice"], ["bad", "poor", "awful", "sad"]
WORDS = ["<pad>", "<unk>", *GOOD, *BAD, "film", "plot", "actor", "scene", "the", "a", "is", "was"]


def save_tiny(folder, family="bert", head="classification", **config):
    """A tiny random model with a word-level tokenizer, as a folder."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    tiny(family, head, **config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def write_reviews(path, count, seed):
    draw = torch.Generator().manual_seed(seed)
    lines = ["text,label"]
    for _ in range(count):
        label = int(torch.randint(2, (1,), generator=draw))
        words = [WORDS[2 + 4 * label + int(torch.randint(4, (1,), generator=draw))]]
        words += [WORDS[10 + int(torch.randint(8, (1,), generator=draw))] for _ in range(6)]
        lines.append(f"{' '.join(words)},{'bad' if label else 'good'}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A model folder, test and training files, and no fresh process per row."""
    fake = {"peak_bytes": 1, "peak_kind": "not measured in this test"}
    monkeypatch.setattr(measure, "peak_memory", lambda *a, **k: fake)
    save_tiny(tmp_path / "model")
    write_reviews(tmp_path / "reviews.csv", 60, seed=1)
    write_reviews(tmp_path / "train.csv", 200, seed=2)
    return tmp_path


def subject_in(house, notebook="02_pruning", **settings):
    study = Study(notebook, profile="test", folder=house / "run", calls=2, announce=lambda text: None)
    return study.baseline(
        str(house / "model"), str(house / "reviews.csv"), train_path=str(house / "train.csv"), **settings
    )


def test_the_dense_row_comes_first_and_is_the_baseline(house):
    subject = subject_in(house)
    row = subject.dense
    assert row["technique"] == "dense" and row["verdict"]["quality"] == "baseline"
    assert row["quality"]["difference"] is None and row["quality"]["n"] == 60
    assert row["latency"]["shapes"]["batch1"]["aa_ratio"] > 0
    assert row["memory"]["file_bytes"] > row["memory"]["parameters"] * 4 * 0.9
    assert row["provenance"]["model_hash"] == subject.loaded.hash


def test_a_compressed_row_is_compared_with_the_dense_one_on_the_same_examples(house):
    subject = subject_in(house)
    row = subject.measure("magnitude-layer", sparsity=0.5)
    assert row["settings"] == {"sparsity": 0.5}
    assert row["achieved"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert row["quality"]["difference"]["n"] == 60
    scores = subject.study.store.load_scores(row["key"])
    dense = subject.study.store.load_scores(subject.dense["key"])
    difference = row["quality"]["value"] - subject.dense["quality"]["value"]
    assert row["quality"]["difference"]["value"] == pytest.approx(difference)
    assert set(scores) == set(dense)
    assert row["memory"]["formats"]["dense"] == subject.dense["memory"]["formats"]["dense"]
    assert row["memory"]["formats"]["bitmask"] < row["memory"]["formats"]["dense"]


def test_a_recorded_row_is_not_measured_again_until_its_version_changes(house, monkeypatch):
    subject = subject_in(house)
    first = subject.measure("magnitude-layer", sparsity=0.5)
    with monkeypatch.context() as patched:
        patched.setattr(measure, "measure", lambda *a, **k: pytest.fail("measured again"))
        assert subject_in(house).measure("magnitude-layer", sparsity=0.5) == first
    monkeypatch.setattr(measure, "MEASURE_VERSION", measure.MEASURE_VERSION + 1)
    assert subject_in(house).measure("magnitude-layer", sparsity=0.5)["key"] != first["key"]


def test_another_notebook_claims_a_row_instead_of_measuring_it(house):
    subject_in(house, "00_start_here").measure("random", sparsity=0.5)
    again = subject_in(house, "02_pruning")
    again.measure("random", sparsity=0.5)
    assert [row["technique"] for row in again.study.rows()] == ["dense", "random"]
    assert len({row["key"] for row in again.study.store.rows()}) == 2
    for name in ("00_start_here", "02_pruning"):  # both have it: nothing is appended
        subject_in(house, name).measure("random", sparsity=0.5)
        assert len((house / "run" / "rows" / f"{name}.jsonl").read_text().splitlines()) == 2


def test_recovery_holds_the_zeros_and_learns(house):
    subject = subject_in(house)
    before = subject.measure("magnitude-layer", sparsity=0.5)
    recovery = Recovery(steps=40, learning_rate=1e-2)
    after = subject.measure("magnitude-layer", sparsity=0.5, recovery=recovery, keep=house / "kept")
    assert after["achieved"]["sparsity"] >= before["achieved"]["sparsity"]
    assert after["quality"]["value"] > 0.9 > before["quality"]["value"]
    assert after["settings"]["recovery"]["steps"] == 40
    assert (house / "kept" / "model.safetensors").exists()
    assert not list((house / "run" / "checkpoints").glob("*"))
    control = subject.measure(DENSE, recovery=recovery)
    assert control["key"] != subject.dense["key"] and control["quality"]["difference"] is not None


def test_a_technique_is_handed_calibration_text_that_is_not_scored(house):
    subject = subject_in(house)
    row = subject.measure("wanda", sparsity=0.5, calibration=Calibration(n=20, length=16))
    assert row["settings"]["calibration"] == {"n": 20, "length": 16, "seed": 0}
    assert "train" in row["provenance"]["calibration"]
    scored = subject.measure("wanda", sparsity=0.5, calibration=Calibration(n=20, length=16, scored=True))
    assert scored["settings"]["calibration"]["scored"] and scored["key"] != row["key"]
    with pytest.raises(BadSetting, match="takes no calibration"):
        subject.measure("random", sparsity=0.5, calibration=Calibration())


def test_a_technique_that_trains_needs_a_budget(house):
    subject = subject_in(house)
    pytest.raises(BadSetting, subject.measure, "movement", sparsity=0.5).match("give it a budget")
    row = subject.measure("movement", sparsity=0.5, training=Recovery(steps=3, batch_size=4))
    assert row["settings"]["training"]["steps"] == 3
    assert row["achieved"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_a_student_is_measured_like_any_other_model(house):
    subject = subject_in(house)
    training = Recovery(steps=3, batch_size=4)
    row = subject.measure("distil", blocks=1, training=training, timed=False)
    assert row["settings"] == {"blocks": 1, "training": training.settings()}
    assert row["achieved"]["blocks"] == {"encoder": 1} and row["achieved"]["final_losses"]["soft"] > 0
    control = subject.measure("student", blocks=1, timed=False)
    assert control["quality"]["n"] == 60 and control["key"] != row["key"]
    with pytest.raises(BadSetting, match="takes a teacher"):
        subject.measure("distil", blocks=1, training=Recovery(steps=3, teacher=True))


def test_training_keeps_a_curve_of_held_out_text(house, monkeypatch):
    subject = subject_in(house)
    training = Recovery(steps=20, batch_size=4, validation=6)
    row = subject.measure("distil", blocks=1, training=training, timed=False)
    curve = row["achieved"]["curve"]
    assert [step for step, _ in curve["validation"]] == list(range(2, 21, 2)) and len(curve["train"]) == 20
    assert row["settings"]["training"]["validation"] == 6
    examples = [subject.task.training_examples(subset=subset) for subset in ("all", "rest", "held-out")]
    whole, rest, held_out = (set(map(subject.task.text_key, some)) for some in examples)
    assert whole == rest | held_out and not rest & held_out and len(held_out) == 10
    recovered = subject.measure("magnitude-layer", sparsity=0.5, recovery=training, timed=False)
    assert recovered["achieved"]["sparsity"] >= 0.5 and recovered["achieved"]["recovery_curve"]["tokens"] > 0


def test_a_long_training_that_was_stopped_goes_on(house, monkeypatch):
    subject = subject_in(house)
    training = Recovery(steps=110, batch_size=4)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save", stopped)
        pytest.raises(KeyboardInterrupt, subject.measure, "distil", blocks=1, training=training, timed=False)
    with monkeypatch.context() as patch:  # the checkpoint outlives even its row
        patch.setattr(subject.study.store, "append", stopped)
        pytest.raises(KeyboardInterrupt, subject.measure, "distil", blocks=1, training=training, timed=False)
    kept = list((house / "run" / "checkpoints").rglob("*.safetensors"))
    assert kept and subject.study.store.rows()[1:] == []
    monkeypatch.setattr("lmcompress.train.batches.batch_stream", lambda *a, **k: iter(()))  # no step is left
    row = subject.measure("distil", blocks=1, training=training, timed=False)
    assert row["achieved"]["curve"]["train"][-1][0] == 110
    assert not list((house / "run" / "checkpoints").rglob("*.safetensors"))


def test_a_checkpoint_that_older_code_left_is_begun_anew(house):
    subject, training = subject_in(house), Recovery(steps=110, batch_size=4)
    technique = compress.get("distil")
    asked = CompressionJob(subject.loaded, subject.task, technique, {"blocks": 1}, training=training)
    key = subject.inputs(asked).key
    left = house / "run" / "checkpoints" / key / "training"
    left.mkdir(parents=True)
    (left / "state.json").write_text(json.dumps({"settings": "of older code", "step": 100}))
    row = subject.measure("distil", blocks=1, training=training, timed=False)
    assert row["key"] == key and row["achieved"]["curve"]["train"][-1][0] == 110


def test_recovery_may_be_taught_by_the_dense_model(house):
    subject = subject_in(house)
    before = subject.measure("magnitude-layer", sparsity=0.7, timed=False)
    recovery = Recovery(steps=40, learning_rate=1e-2, teacher=True)
    after = subject.measure(
        "magnitude-layer", sparsity=0.7, recovery=recovery, timed=False, keep=house / "kept"
    )
    assert after["achieved"]["sparsity"] >= before["achieved"]["sparsity"]
    rows = subject.task.training_features(subject.loaded.tokenizer, limit=40, seed=0)
    pruned, _ = compress.get("magnitude-layer")(subject.loaded.model, sparsity=0.7)
    recovered, _ = storage.load(house / "kept")
    gaps = [divergence(subject.loaded.model, model, rows) for model in (recovered, pruned)]
    assert gaps[0] < 0.5 * gaps[1], gaps
    assert after["settings"]["recovery"]["teacher"] is True


def test_a_time_is_not_lent_to_a_study_of_other_lengths(house):
    first = subject_in(house).measure("magnitude-layer", sparsity=0.5)
    subject = subject_in(house)
    subject.study.length = 16
    other = subject.measure("magnitude-layer", sparsity=0.9)
    assert other["latency"]["measured_on"] is None
    lengths = [{one["length"] for one in row["latency"]["shapes"].values()} for row in (first, other)]
    assert lengths[1] == {16} and lengths[0] != {16}


def key_in(house, technique="magnitude-layer", *, opened=None, **asked):
    """The key of a job on the house's model as it lies there now; nothing is measured."""
    asked = {"sparsity": 0.5} | asked
    settings = {name: asked.pop(name) for name in list(asked) if name in ("sparsity", "policy")}
    study = Study("02_pruning", folder=house / "run", calls=2, announce=str)
    task_settings = {"train_path": str(house / "train.csv")} | (opened or {})
    task = load_task(str(house / "reviews.csv"), **task_settings)
    subject = Baseline(study, loading.load(str(house / "model")), task)
    return subject.inputs(
        CompressionJob(subject.loaded, task, compress.get(technique), settings, **asked)
    ).key


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


RECOVERY = Recovery(8, 1e-2, 8)
INPUTS = {
    "another training file": lambda h: {"opened": {"train_path": write_reviews(h / "b.csv", 200, seed=3)}},
    "no training file": lambda h: {"opened": {"train_path": None}},
    "training file edited": lambda h: edit(h / "train.csv", "film", "scene"),
    "data edited": lambda h: edit(h / "reviews.csv", "film", "plot"),
    "limit": lambda h: {"opened": {"limit": 20}},
    "tokenizer": lambda h: edit(h / "model" / "tokenizer.json", '"film"', '"movie"'),
    "config": lambda h: edit(h / "model" / "config.json", "1e-12", "1e-05"),
    "weights": lambda h: save_tiny(h / "model", seed=1) and {},
    "setting": lambda h: {"sparsity": 0.6},
    "technique": lambda h: {"technique": "magnitude-global"},
    "budget": lambda h: {"recovery": Recovery(9, 1e-2, 8)},
    "seed": lambda h: {"seed": 1},
}


@pytest.mark.parametrize("change", INPUTS)
def test_whatever_decides_a_number_is_part_of_its_key(house, change):
    before = key_in(house, recovery=RECOVERY)
    assert before == key_in(house, recovery=RECOVERY)
    assert key_in(house, **({"recovery": RECOVERY} | (INPUTS[change](house) or {}))) != before


def test_a_key_has_no_part_in_training_text_that_is_not_read(house):
    before = key_in(house)
    assert before == key_in(house, **INPUTS["another training file"](house))
    scored = {"technique": "wanda", "calibration": Calibration(scored=True)}
    other = INPUTS["another training file"](house)
    assert key_in(house, **scored) == key_in(house, **scored, **other)
    plain = {"technique": "wanda", "calibration": Calibration()}
    assert key_in(house, **plain) != key_in(house, **plain, **other)
    assert reads_training({"steps": [{"technique": "wanda", "calibration": {"n": 8}}]})


def test_times_of_other_threads_or_fewer_calls_are_taken_again(house, monkeypatch):
    first = subject_in(house).measure("magnitude-layer", sparsity=0.5)
    subject = subject_in(house)
    assert subject.measure("magnitude-layer", sparsity=0.5) == first
    subject.study.calls = 3
    again = subject.measure("magnitude-layer", sparsity=0.5)
    assert again["key"] == first["key"] and again["provenance"]["calls"] == 3 == again["latency"]["calls"]
    assert subject_in(house).measure("magnitude-layer", sparsity=0.5) == again  # more calls than asked
    monkeypatch.setattr(torch, "get_num_threads", lambda: first["latency"]["threads"] + 1)
    other = subject_in(house).measure("magnitude-layer", sparsity=0.5)
    assert other["latency"]["threads"] == first["latency"]["threads"] + 1 and other["key"] == first["key"]


def test_a_row_claims_no_folder_that_holds_something_else(house):
    subject, measured = subject_in(house), {"sparsity": 0.5, "timed": False}
    row = subject.measure("magnitude-layer", **measured)
    (house / "empty").mkdir()
    for folder in (house / "new", house / "empty"):  # a row that exists: made again for its model
        assert subject.measure("magnitude-layer", **measured, keep=folder)["key"] == row["key"]
        assert storage.load(folder)[0].training is False
    count = len((house / "run" / "rows" / "02_pruning.jsonl").read_text().splitlines())
    subject.measure("magnitude-layer", **measured, keep=house / "new")  # holds it
    assert len((house / "run" / "rows" / "02_pruning.jsonl").read_text().splitlines()) == count
    (house / "notes").mkdir()
    (house / "notes" / "diary.txt").write_text("mine")
    (house / "file").write_text("mine")
    for folder in (house / "notes", house / "file", house / "model"):
        for level in (0.5, 0.7):  # recorded, and not
            with pytest.raises(BadSetting, match="file|holds other files"):
                subject.measure("magnitude-layer", sparsity=level, timed=False, keep=folder)
    with pytest.raises(BadSetting, match="another model .magnitude-layer"):
        subject.measure("random", **measured, keep=house / "new")
    assert (house / "notes" / "diary.txt").read_text() == (house / "file").read_text() == "mine"
    own = house / "run" / "models" / "kept"  # inside the run the newest is kept
    subject.measure("magnitude-layer", **measured, keep=own)
    subject.measure("random", **measured, keep=own)
    assert json.loads((own / "compression.json").read_text())["technique"] == "random"
    (own / "diary.txt").write_text("mine")  # but for what is not of a model
    with pytest.raises(BadSetting, match=r"another model .random .* and diary\.txt, which would be lost"):
        subject.measure("magnitude-layer", **measured, keep=own)
    assert (own / "diary.txt").read_text() == "mine"


def test_what_appears_in_a_folder_while_its_model_is_measured_stays(house, monkeypatch):
    subject, keep, run = subject_in(house), house / "kept", CompressionJob.run

    def meanwhile(self):
        keep.mkdir()
        (keep / "diary.txt").write_text("mine")
        return run(self)

    monkeypatch.setattr(CompressionJob, "run", meanwhile)
    with pytest.raises(BadSetting, match="holds other files"):
        subject.measure("magnitude-layer", sparsity=0.5, timed=False, keep=keep)
    assert (keep / "diary.txt").read_text() == "mine" and len(subject.study.rows()) == 2  # the row is kept


def test_two_runs_into_one_folder_measure_each_row_once(house):
    first, second = subject_in(house), subject_in(house)
    made = []
    real = CompressionJob.run

    def slow(self):
        made.append(self.technique.name)
        time.sleep(0.2)
        return real(self)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(CompressionJob, "run", slow)
        rows = list(pool.map(lambda s: s.measure("random", sparsity=0.5, timed=False), (first, second)))
    assert made == ["random"] and rows[0] == rows[1]
    assert not list((house / "run" / "locks").iterdir())


def test_what_a_killed_run_left_is_swept_and_nothing_else(house):
    child = f"""
import os, signal, pathlib
from lmcompress.paths import atomic_path, owned_folder
run = pathlib.Path({str(house / "run")!r})
with owned_folder(run / "scratch", "measure-"), atomic_path(str(run / "models" / "m")) as new:
    new.mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", child])
    mine = house / "run" / "scratch" / "tiny.safetensors"
    mine.write_text("mine")
    left = [
        *(house / "run/scratch").glob("measure-*"),
        *(house / "run/models").glob(".lmcompress-unfinished-*"),
    ]
    assert len(left) == 2
    with owned_folder(house / "run" / "scratch", "measure-") as owned:
        Study("02_pruning", folder=house / "run", announce=str)
        assert owned.is_dir() and mine.exists() and not any(folder.exists() for folder in left)


def test_a_folder_between_two_renames_is_put_back(tmp_path):
    halfway = tmp_path / ".lmcompress-unfinished-x"
    for name in ("model", "replaced"):
        (halfway / name).mkdir(parents=True)
    sweep_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_without_a_head_is_fine_tuned_on_a_file_of_the_users(house):
    save_tiny(house / "plain", head=None)
    asked = {"finetune": house / "train.csv", "timed": False, "epochs": 4.0}
    study = Study("mine", folder=house / "run", calls=2, announce=str)
    subject = study.baseline(str(house / "plain"), str(house / "reviews.csv"), **asked)
    assert subject.task.labels == ["bad", "good"] and subject.dense["quality"]["n"] == 60
    again = study.baseline(str(house / "plain"), str(house / "reviews.csv"), **asked)
    assert again.loaded.hash == subject.loaded.hash and again.dense == subject.dense
    longer = study.baseline(str(house / "plain"), str(house / "reviews.csv"), **asked | {"epochs": 5.0})
    assert longer.loaded.hash != subject.loaded.hash and longer.loaded.path != subject.loaded.path
    row = subject.measure("magnitude-layer", sparsity=0.5, recovery=RECOVERY, timed=False)
    assert row["provenance"]["training_hash"] == subject.task.training_hash


def test_times_left_out_are_taken_when_they_are_asked_for(house, monkeypatch):
    subject = subject_in(house)
    row = subject.measure("magnitude-layer", sparsity=0.5, timed=False)
    assert row["latency"] is None and row["compute"] is None and row["quality"]
    again = subject.measure("magnitude-layer", sparsity=0.5)
    assert again["latency"] and again["key"] == row["key"]
    assert [r["key"] for r in subject.study.rows()].count(row["key"]) == 1
    late = subject.measure("magnitude-layer", sparsity=0.9, timed=False)
    assert late["latency"]["measured_on"] == row["key"]  # same shape: taken over at no cost
    elsewhere = device.machine() | {"instructions": "other"}
    monkeypatch.setattr(device, "machine", lambda: elsewhere)
    other = subject.measure("magnitude-layer", sparsity=0.8, timed=False)
    assert other["latency"] is None  # another machine's are not taken over


def test_two_rows_are_compared_on_the_same_examples(house):
    subject = subject_in(house)
    first, second = (subject.measure("random", sparsity=level, seed=1) for level in (0.5, 0.9))
    found = subject.compare(first, second)
    scores = [subject.study.store.load_scores(row["key"])["correct"] for row in (first, second)]
    assert found["achieved"]["difference"]["value"] == pytest.approx(scores[0].mean() - scores[1].mean())
    assert found["task"] == first["task"] and found["achieved"]["first"]["settings"] == {"sparsity": 0.5}
    count = len(subject.study.rows())
    assert subject.compare(first, second)["key"] == found["key"] and len(subject.study.rows()) == count


def test_bad_input_is_refused_before_anything_is_recorded(house, monkeypatch):
    subject = subject_in(house)
    recorded = subject.study.rows()
    pytest.raises(BadSetting, subject.measure, "magnitude-layer", sparsity=1.0)
    with monkeypatch.context() as patch:  # nothing is made, and no text is read
        patch.setattr(CompressionJob, "context", lambda self: pytest.fail("it began"))
        with pytest.raises(BadSetting, match="wanda has no setting sparsty; it has sparsity, pattern, alloc"):
            subject.measure("wanda", sparsty=0.5)
        with pytest.raises(BadSetting, match="gptq needs bits; its settings are bits, group_size"):
            subject.measure("gptq")
    pytest.raises(AssetNotFound, subject.study.baseline, "nobody/such-model", str(house / "reviews.csv"))
    save_tiny(house / "masked", head="lm")  # a masked language model, asked to classify
    (house / "empty.csv").write_text("text,label\n")
    pytest.raises(BadData, subject.study.baseline, str(house / "model"), str(house / "empty.csv"))
    with pytest.raises(BadData, match="text, label"):
        subject.study.baseline(str(house / "model"), str(house / "reviews.csv"), label_column="sentiment")
    with pytest.raises(WrongTask, match="classif"):
        subject.study.baseline(str(house / "masked"), str(house / "reviews.csv"))
    assert subject.study.rows() == recorded
    untrained = subject.study.baseline(str(house / "model"), str(house / "reviews.csv"))
    with pytest.raises(BadData, match="train"):
        untrained.measure("magnitude-layer", sparsity=0.5, recovery=Recovery(steps=2))


def test_record_once_computes_once(house):
    study = Study("01_weight_statistics", profile="test", folder=house / "run")
    compute = Mock(return_value={"family": "bert", "mean": 0.5})
    asked = {"model": str(house / "model"), "settings": {}, "compute": compute}
    rows = [study.record_once("weight-statistics", 1, **asked) for _ in range(2)]
    assert compute.call_count == 1 and rows[0] == rows[1] and rows[0]["achieved"] == {"mean": 0.5}
    assert rows[0]["model"] == "model"  # a folder's own name, not where it lies on this machine


CHILD = """
import sys
from lmcompress import measure
from lmcompress.study.study import Study
measure.peak_memory = lambda *a, **k: {"peak_bytes": 1, "peak_kind": "none"}
announce = lambda t: print(t, flush=True)
study = Study("02_pruning", profile="test", folder=sys.argv[1] + "/run", calls=2, announce=announce)
subject = study.baseline(sys.argv[1] + "/model", sys.argv[1] + "/reviews.csv")
for level in range(1, 100):
    subject.measure("magnitude-layer", sparsity=level / 100)
"""


@pytest.mark.slow  # starts an interpreter with torch and kills it
def test_a_killed_sweep_goes_on_where_it_was(house):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(house)], stdout=subprocess.PIPE, text=True, env=environment
    )
    for _ in range(4):
        assert child.stdout.readline()
    time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    lines = (house / "run" / "rows" / "02_pruning.jsonl").read_bytes().splitlines()
    whole = [json.loads(line) for line in lines[:-1]]
    done = RowStore(house / "run" / "rows").rows()
    assert 4 <= len(done) < 99 and len(done) >= len(whole)
    study = Study("02_pruning", profile="test", folder=house / "run", calls=2, announce=lambda text: None)
    subject = study.baseline(str(house / "model"), str(house / "reviews.csv"))
    for level in range(1, len(done) + 2):
        subject.measure("magnitude-layer", sparsity=level / 100)
    rows = study.rows()
    assert len(rows) == len(done) + 2 and len({row["key"] for row in rows}) == len(rows)
    assert rows[: len(done)] == done


def test_of_several_rates_the_best_on_held_out_text_is_kept(house):
    subject = subject_in(house)
    rates = [1e-9, 1e-2]
    row = subject.measure("magnitude-layer", sparsity=0.5, recovery=Recovery(40, rates, 4))
    tried = row["achieved"]["rates"]
    assert [rate for rate, _ in tried] == rates and row["settings"]["recovery"]["learning_rate"] == rates
    assert row["achieved"]["rate"] == min(tried, key=lambda one: one[1])[0]
    assert tried[0][1] != tried[1][1] and row["achieved"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    alone = subject.measure(
        "magnitude-layer", sparsity=0.5, recovery=Recovery(40, row["achieved"]["rate"], 4)
    )
    assert "rates" not in alone["achieved"] and alone["key"] != row["key"]
    with pytest.raises(BadSetting, match="nothing to try"):
        subject.measure("magnitude-layer", sparsity=0.5, recovery=Recovery(40, [], 4))


def test_rates_are_tried_for_a_few_steps_and_the_best_is_trained_anew(house):
    subject = subject_in(house)
    rates, asked = [1e-9, 1e-2], {"sparsity": 0.5}
    budget = Recovery(12, rates, 4, trial_steps=3)
    row = subject.measure("magnitude-layer", recovery=budget, **asked)
    assert (
        row["settings"]["recovery"]["trial_steps"] == 3 and Recovery(**row["settings"]["recovery"]) == budget
    )
    trial = subject.measure("magnitude-layer", recovery=Recovery(3, rates, 4), **asked)
    assert "trial_steps" not in trial["settings"]["recovery"]
    assert row["achieved"]["rates"] == trial["achieved"]["rates"]  # chosen after three steps
    whole = replace(budget, learning_rate=row["achieved"]["rate"], apart=True)
    alone = subject.measure("magnitude-layer", recovery=whole, **asked)
    assert (
        row["quality"] == alone["quality"] and row["provenance"]["weights"] == alone["provenance"]["weights"]
    )
    assert row["provenance"]["weights"] != trial["provenance"]["weights"]


def test_rates_that_were_tried_before_a_kill_are_not_tried_again(house, monkeypatch):
    subject, trained = subject_in(house), []
    run_once = CompressionJob._run_once

    def until_killed(job):
        trained.append((job.recovery.learning_rate, job.recovery.steps))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return run_once(job)

    monkeypatch.setattr(CompressionJob, "_run_once", until_killed)
    budget = Recovery(12, [1e-9, 1e-2], 4, trial_steps=3)
    with pytest.raises(KeyboardInterrupt):
        subject.measure("magnitude-layer", sparsity=0.5, recovery=budget)
    row = subject.measure("magnitude-layer", sparsity=0.5, recovery=budget)
    best = row["achieved"]["rate"]
    assert trained == [(1e-9, 3), (1e-2, 3), (best, 12), (best, 12)]
    assert row["achieved"]["rates"][0][1] != row["achieved"]["rates"][1][1]


def test_products_are_in_what_is_faster_unless_asked(house, monkeypatch):
    subject, asked, rows = subject_in(house), {"sparsity": 0.5}, {}
    for faster in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(recovery_module, "fast_dtype", lambda _, faster=faster: faster)
        for dtype in (None, "float32", "bfloat16"):
            budget = Recovery(3, 1e-2, 4, dtype=dtype)
            rows[dtype] = subject.measure("magnitude-layer", recovery=budget, **asked)
    # Taken at the first, as a machine's threads are: no part of the key, said in the provenance
    assert "dtype" not in rows[None]["settings"]["recovery"]
    used = {dtype: row["provenance"]["training_dtype"] for dtype, row in rows.items()}
    assert used == {None: "bfloat16", "float32": "float32", "bfloat16": "bfloat16"}
    weights = {dtype: row["provenance"]["weights"] for dtype, row in rows.items()}
    assert weights[None] == weights["bfloat16"] != weights["float32"]
    assert len({row["key"] for row in rows.values()}) == 3
    with pytest.raises(BadSetting, match="choose one of float32, bfloat16, None"):
        subject.measure("magnitude-layer", recovery=Recovery(3, 1e-2, 4, dtype="int8"), **asked)


def test_what_chooses_a_rate_is_never_trained_on(house, monkeypatch):
    subject, seen = subject_in(house), []
    real = subject.task.training_features

    def watched(*arguments, **asked):
        seen.append((asked.get("subset", "all"), asked.get("limit")))
        return real(*arguments, **asked)

    monkeypatch.setattr(subject.task, "training_features", watched)
    subject.measure("magnitude-layer", sparsity=0.5, recovery=Recovery(2, [1e-5, 1e-4], 4))
    assert {subset for subset, _ in seen} == {"rest", "held-out"}
    seen.clear()
    subject.measure("movement", sparsity=0.5, training=Recovery(2, [1e-5, 1e-4], 4))
    assert {subset for subset, _ in seen} == {"rest", "held-out"}


def test_a_rate_at_which_training_fails_is_passed_over(house, monkeypatch):
    subject, real = subject_in(house), CompressionJob._recover

    def fails(self, *arguments):
        if self.recovery.learning_rate > 1:
            raise BadWeights("the loss is nan")
        return real(self, *arguments)

    monkeypatch.setattr(CompressionJob, "_recover", fails)
    row = subject.measure("magnitude-layer", sparsity=0.5, recovery=Recovery(2, [10.0, 1e-4], 4))
    assert row["achieved"]["rates"][0] == [10.0, None] and row["achieved"]["rate"] == 1e-4
    with pytest.raises(BadWeights):
        subject.measure("magnitude-layer", sparsity=0.6, recovery=Recovery(2, [10.0, 11.0], 4))


@pytest.mark.parametrize("wrong", [{"calls": 0}, {"length": 0}, {"profile": "pockte"}])
def test_a_notebook_cannot_be_set_up_with_what_makes_no_sense(wrong, tmp_path):
    with pytest.raises(BadSetting, match="pocket|at least one"):
        notebook.setup("00_start_here", output=str(tmp_path), **wrong)
    opened = notebook.setup("00_start_here", output=str(tmp_path), calls=31, length=17)
    assert (opened.calls, opened.length) == (31, 17)
