"""The search: its statistics against simulation, its choices by hand, the whole command on a tiny model."""

import csv
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from hashlib import sha256
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmcompress.errors import BadData, BadSetting, DiskFull, NotWritable, StudyError
from lmcompress.fit import candidates, decision, fit, power, proof, run, schedule, search, split
from lmcompress.fit.__main__ import main
from lmcompress.fit.decision import Contender
from lmcompress.fit.journal import Journal, read
from lmcompress.fit.loss import Loss, Margin
from lmcompress.stats import tango_bound, tango_score
from lmcompress.tasks import load_task
from lmcompress.tasks.classification import Classification

ROOT = Path(__file__).resolve().parent.parent


def proportions(n, lost, gained):
    """Return columns of `n` answers, of which some turned wrong and right, and the dense model's."""
    dense = np.ones(n)
    dense[:gained] = 0
    columns = np.ones(n)
    columns[gained : gained + lost] = 0
    return {"correct": columns}, {"correct": dense}


def loss(margin="1", metric="accuracy"):
    examples = [{"text": "a", "label": 0}]
    task = Classification(name="t", split="s", examples=examples, source="", labels=["x", "y"], metric=metric)
    return Loss(task, Margin.parse(margin, metric))


# Statistics


def test_what_examples_can_decide_agrees_with_simulation():
    rng, n, margin, changed = np.random.default_rng(0), 1200, 0.01, 0.02
    counts = rng.binomial(n, changed, 4000)
    lost = rng.binomial(counts, 0.5)
    passed = [tango_bound(bad, count - bad, n) <= margin for bad, count in zip(lost, counts, strict=True)]
    assert power.chance(n, margin, changed=changed) == pytest.approx(np.mean(passed), abs=0.02)
    needed = power.examples_needed(margin, changed=changed)
    assert power.chance(needed, margin, changed=changed) >= 0.8
    assert power.chance(int(0.93 * needed), margin, changed=changed) < 0.8
    assert power.certifiable_loss(581) == pytest.approx(0.01067, abs=1e-5)
    assert power.examples_needed(margin, loss=margin) is None


def test_predicted_chances_come_true():
    rng, searched, confirmed, margin = np.random.default_rng(1), 600, 1200, 0.02
    predicted, passed = [], []
    for _ in range(400):
        true_loss, changed = rng.uniform(-0.005, 0.03), 0.05
        drawn = []
        for n in (searched, confirmed):
            count = rng.binomial(n, changed)
            lost = rng.binomial(count, (1 + true_loss / changed) / 2)
            drawn.append(proportions(n, lost, count - lost))
        value, error = loss().estimate(*drawn[0])
        predicted.append(power.predicted_chance(value, error, margin, scored=searched, n=confirmed))
        passed.append(loss("2").is_within(*drawn[1]))
    predicted, passed = np.array(predicted), np.array(passed)
    assert predicted.mean() == pytest.approx(passed.mean(), abs=0.06)
    assert passed[predicted > 0.7].mean() > 0.65 and passed[predicted < 0.3].mean() < 0.35


def test_bounds_of_a_proportion_invert_its_score_test_on_either_side():
    columns, dense = proportions(800, 20, 12)
    low, high = loss().bounds(columns, dense)
    assert low < 0.01 < high and high == tango_bound(20, 12, 800)
    assert tango_score(high, 20, 12, 800) == pytest.approx(-1.6449, abs=1e-3)
    assert tango_score(low, 20, 12, 800) == pytest.approx(1.6449, abs=1e-3)
    assert not loss("1").misses(columns, dense) and not loss("1").is_within(columns, dense)
    assert loss("3").is_within(columns, dense) and loss("0.05").misses(columns, dense)


def test_a_share_of_dense_is_a_ratio_for_a_bootstrap():
    labels = np.tile([0.0, 1.0], 200)
    wrong = np.arange(400) % 5 == 0
    dense = {"label": labels, "prediction": np.where(wrong, 1 - labels, labels)}
    relative = loss("1%", "macro_f1")
    assert relative.bounds(dense, dense) == (0, 0) and relative.is_within(dense, dense)
    worse = {**dense, "prediction": np.where(np.arange(400) % 4 == 0, 1 - labels, dense["prediction"])}
    low, high = relative.bounds(worse, dense)
    assert low < relative.value(worse, dense) < high and relative.misses(worse, dense)
    assert relative.value(worse, dense) > loss("1", "macro_f1").value(worse, dense)


def test_what_is_worse_passes_at_no_share_of_a_dense_value_that_may_be_below_0():
    labels, measured = np.tile([0.0, 1.0], 60), loss("5%", "matthews")
    right = np.random.default_rng(0).permuted(np.repeat([True, False], [52, 68]))
    dense = {"label": labels, "prediction": np.where(right, labels, 1 - labels)}  # its correlation is -0.13
    worse = dense | {"prediction": np.where(np.arange(120) % 10 == 0, 1 - labels, dense["prediction"])}
    assert measured.value(worse, dense) == np.inf and measured.bounds(worse, dense) == (-np.inf, np.inf)
    assert not measured.is_within(worse, dense) and not measured.misses(dense, dense)


@pytest.mark.parametrize("asked", ["-1", "x", "0", "200%", "nan"])
def test_losses_that_are_none_are_refused(asked):
    with pytest.raises(BadSetting, match="such as 1, or a share"):
        Margin.parse(asked, "accuracy")


def test_points_are_refused_for_metrics_without_them():
    with pytest.raises(BadSetting, match="--max-loss 1%"):
        Margin.parse("1", "perplexity")
    assert Margin.parse("1%", "perplexity") == Margin(0.01, True, 100.0)
    assert (
        str(Margin.parse(1, "accuracy")) == "1 point"
        and str(Margin.parse("2 %", "bleu")) == "2 % of the dense value"
    )


# Choices


def test_the_front_is_cheaper_than_dense_and_nearer_the_dearer():
    named = [
        Contender(*entry) for entry in (("a", 0.2, 0.5), ("b", 0.3, 0.6), ("c", 0.4, 0.1), ("d", 0.99, 0.0))
    ]
    assert [c.name for c in decision.front(named)] == ["a", "c"]
    as_cheap = [Contender("a", 0.30, 0.5), Contender("b", 0.302, 0.19), Contender("c", 0.301, 0.1)]
    assert [c.name for c in decision.front(as_cheap)] == ["c", "b"]  # and "a" is five times as far
    alike = [Contender("large", 0.3, 0.1, 20), Contender("small", 0.3, 0.2, 5)]
    assert [c.name for c in decision.front(alike)] == ["small", "large"]


def test_halving_takes_back_what_only_a_dropped_one_beat():
    named = [Contender("cheap", 0.2, 0.1), Contender("second", 0.3, 0.2), Contender("safe", 0.5, 0.05)]
    calls = []

    def misses(contender, rung):
        calls.append((contender.name, rung))
        return contender.name == "cheap" and rung == 0.5

    survivors = decision.halving(named, misses, rungs=(0.25, 0.5, 1.0))
    assert [c.name for c in survivors] == ["second", "safe"]
    assert ("second", 0.25) not in calls and ("second", 0.5) in calls and ("cheap", 1.0) not in calls


def test_finalists_go_from_the_safest_to_the_cheapest_and_hopeless_ones_are_left_out():
    named = [Contender(str(i), cost, 0.0) for i, cost in enumerate((0.1, 0.3, 0.5, 0.9))]
    order = decision.finalists(named, [0.02, 0.5, 0.95, 0.99])
    assert [c.name for c in order] == ["3", "2", "1"]  # all but the one that has no chance
    assert [c.name for c in decision.finalists(named, [0.9, 0.3, 0.31, 0.99])] == ["3", "0"]
    assert [c.name for c in decision.finalists(named, [0.9, 0.5, 0.5, 0.5])] == ["0"]
    assert [c.name for c in decision.finalists(named, [0.0, 0.0, 0.0, 0.01])] == ["3"]
    many = [Contender(str(i), 0.9**i, 0.0) for i in range(1, 30)]
    assert (
        1
        < len(decision.finalists(many, [1 - 1e-4 * 2**i for i in range(12)] + [0.6] * 17))
        <= decision.FINALISTS
    )


def test_confirmation_stops_at_the_first_failure():
    tested = []

    def passes(contender):
        tested.append(contender.name)
        return contender.name in "ac"

    order = [Contender(name, 0.5, 0.0) for name in "abc"]
    assert decision.confirm(order, passes).name == "a" and tested == ["a", "b"]
    assert decision.confirm(order[1:], passes) is None


def test_replays_keep_the_promise_and_find_an_answer():
    spec = importlib.util.spec_from_file_location("replay", ROOT / "benchmarks" / "replay.py")
    replay = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(replay)
    pool, margin = replay.pool(), Margin.parse("1", "accuracy")
    truth = {
        n: (pool["dense"]["columns"]["correct"] - c["columns"]["correct"]).mean() for n, c in pool.items()
    }
    sizes = {"margin": margin, "search": 872, "confirmation": 2000}
    for goal, least in (("batch1", 0.8), ("worst", 0.3)):
        answers = [replay.replay(pool, goal=goal, seed=seed, **sizes)[0] for seed in range(60)]
        assert np.mean([truth[name] > margin.amount for name in answers if name]) <= 0.06 + 0.06
        assert np.mean([name is not None for name in answers]) >= least


# Examples


def task_of(texts, **fields):
    examples = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    return Classification(name="t", split="s", examples=examples, source="f", labels=["x", "y"], **fields)


def test_the_parts_of_a_file_share_no_text_and_have_the_sizes_that_are_said():
    texts = [f"text {i // 3}" if i % 3 else f"TEXT  {i // 3}" for i in range(600)]
    parts = split.divide(task_of(texts))
    sizes = [parts.trained, parts.searched, len(parts.confirm.examples)]
    assert (
        sum(sizes) + parts.repeats == 600
        and sizes[0] == pytest.approx(90, abs=3)
        and sizes[1] == pytest.approx(170 * 2 / 3, abs=4)
    )
    examples = [parts.training.training_examples(), parts.confirm.examples]
    examples += [[e for chunk in parts.chunks.values() for e in chunk.examples]]
    train, confirm, search = ({e["text"].casefold().split()[1] for e in part} for part in examples)
    assert not train & confirm and not confirm & search and not train & search
    assert split.divide(task_of([f"t {i}" for i in range(9000)])).trained == split.MOST_TRAINED


def test_a_text_counts_once_with_a_label_however_often_it_stands_there():
    texts = [f"text {i % 300 // 2}" for i in range(3000)]  # each with either label ten times
    parts = split.divide(task_of(texts))
    scored = [e for part in parts.tasks.values() for e in part.examples]
    assert len({(e["text"], e["label"]) for e in scored}) == len(scored)
    assert parts.repeats == 9 * len(scored) and parts.trained + 10 * len(scored) == 3000
    confirm = task_of([f"other {i % 40}" for i in range(200)])
    assert len(split.divide(task_of([f"t {i}" for i in range(200)]), confirm=confirm).confirm.examples) == 40


def test_shares_files_training_text_and_selection_sets_divide_otherwise():
    texts = [f"text {i}" for i in range(200)]
    halves = split.divide(task_of(texts), shares=split.shares_of("20,40,40"))
    assert [halves.trained, halves.searched, len(halves.confirm.examples)] == [40, 80, 80]
    filed = split.divide(task_of(texts), confirm=task_of([f"other {i}" for i in range(50)] + texts[:10]))
    assert len(filed.confirm.examples) == 50 and [filed.trained, filed.searched] == [30, 170]
    trained = split.divide(task_of(texts, training=lambda _: [{"text": "apart", "label": 0}]))
    assert not trained.trained and trained.searched == pytest.approx(67, abs=1)
    chosen = task_of(texts, training=lambda _: [{"text": "apart", "label": 0}])
    chosen.selecting = lambda: task_of([f"selected {i}" for i in range(40)])
    assert split.divide(chosen).searched == 40 and len(split.divide(chosen).confirm.examples) == 200
    assert run._parts(task_of(texts), "20,42.5,37.5", {}).trained == 40
    with pytest.raises(BadSetting, match="15,28,57"):
        split.shares_of("1,2")
    with pytest.raises(BadSetting, match="nothing to calibrate on"):
        split.divide(task_of(texts), shares=split.shares_of("0,1,2"))
    with pytest.raises(BadData, match="Bring more"):
        split.divide(task_of(texts[:50]))


def test_a_file_to_confirm_on_is_read_with_the_labels_of_the_task(tmp_path):
    def file(name, head, labels):
        lines = [f"{name} {i}{',b' * head.count('text_b')},{labels[i % len(labels)]}" for i in range(60)]
        (tmp_path / name).write_text("\n".join([head, *lines]))
        return tmp_path / name

    task = load_task(file("main.csv", "text,label", ["no", "yes"]))
    confirm = run._parts(task, file("one.csv", "text,label", ["yes"]), {}).confirm
    assert confirm.labels == ["no", "yes"] and {example["label"] for example in confirm.examples} == {1}
    with pytest.raises(BadData, match="labels .'zebra'., which are not among .'no', 'yes'"):
        run._parts(task, file("other.csv", "text,label", ["yes", "zebra"]), {})
    with pytest.raises(BadData, match="have pair and text, those of main.csv text. Give both"):
        run._parts(task, file("pairs.csv", "text,text_b,label", ["no", "yes"]), {})


def test_lists_of_candidates_are_recipes_of_registered_techniques(tmp_path):
    for kind in ("encoder", "decoder", "encoder-decoder"):
        listed, moves = candidates.listed(kind, file=None, runtime="any", texts=32)
        assert len(listed) >= 20 and len({c.label for c in listed}) == len(listed)
        cuts = [move for move in moves if candidates.trains(move)]
        assert 0 < len(cuts) < len(moves)  # the others, mixed bits, need no training
        moved = candidates.moves_on(listed[:1], cuts, 32)
        assert all(c.moved and c.trains for c in moved) and len(moved) == len(cuts)
    gptq = next(c for c in listed if c.techniques == ("gptq",))
    assert gptq.steps[0]["calibration"]["n"] == 32
    single = tmp_path / "recipe.yaml"
    single.write_text("- {technique: rtn, bits: 4}\n- {technique: cast, dtype: bfloat16}\n")
    [candidate], moves = candidates.listed("encoder", file=single, runtime="torch", texts=8)
    assert candidate.label == "RTN, 4 bits, per-channel → BF16" and not moves
    written = candidates.completed([{"technique": "nf4"}, {"format": "compressed-tensors"}], 8)
    assert written.format == "compressed-tensors" and written.label == "NF4, written as compressed-tensors"
    assert len(written.recipe) == 1 and written.name != candidates.completed([{"technique": "nf4"}], 8).name
    with pytest.raises(BadSetting, match="no format 'zip'"):
        candidates.completed([{"technique": "nf4"}, {"format": "zip"}], 8)
    with pytest.raises(BadSetting, match="--runtime any"):
        candidates.listed("encoder", file=single, runtime="openvino", texts=8)


@pytest.mark.parametrize(
    ("recipe", "position"),
    [
        ([{"technique": "rtn", "bits": 8}, {"technique": "cast", "dtype": "bfloat16"}], 0),
        ([{"technique": "drop-blocks", "blocks": 1}, {"technique": "awq", "bits": 4}], 1),
        ([{"technique": "gptq", "bits": 3}], None),  # there are no fewer
        ([{"technique": "nf4"}], None),
        ([{"technique": "qat", "bits": 4, "training": {"steps": 2}}], None),  # takes one width
        ([{"technique": "rtn", "bits": 8}, {"format": "openvino"}], None),
    ],
)
def test_bits_are_dealt_out_where_a_technique_and_the_file_take_several(recipe, position):
    candidate = candidates.completed(recipe, 8)
    assert candidate.rounding == position
    if position is not None:
        dealt = candidates.mixed(candidate, {"a": 3, "b": 8, "c": 3})
        assert "mixed precision" in dealt.label and "(groups: 2 × 3, 1 × 8 bits)" in dealt.label
        assert dealt.name != candidate.name and dealt.rounding is None


@pytest.mark.parametrize(
    ("move", "sentence"),
    [
        ("{mixed_bits: 1.5}", "share above 0"),
        ("[{mixed_bits: 0.5}, {technique: nf4}]", "stands alone"),
        ("[{technique: nf5}]", "nf5"),
    ],
)
def test_a_move_that_makes_no_sense_is_refused_before_anything_runs(move, sentence, tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text(f"encoder: [[{{technique: nf4}}]]\nmoves: {{encoder: [{move}]}}\n")
    with pytest.raises(StudyError, match=sentence):
        candidates.listed("encoder", file=file, runtime="any", texts=8)


# The whole command


@pytest.fixture(autouse=True)
def own_timing_lock(tmp_path, monkeypatch):
    """Wait for no other program of this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-bert"
    # A table large enough that a graph is smaller than the dense file.
    model = tiny(
        "bert", "classification", vocab_size=20000, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    model.save_pretrained(folder)
    words = {f"w{i}": i + 5 for i in range(90)} | {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    file, rng = tmp_path_factory.mktemp("data") / "reviews.csv", np.random.default_rng(0)
    with open(file, "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["text", "label"])
        for i in range(420):
            writer.writerow([" ".join(f"w{k}" for k in rng.integers(0, 90, 8)), ("no", "yes")[i % 2]])
    return file


@pytest.fixture(scope="module")
def recipes_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipes") / "few.yaml"
    file.write_text(
        "encoder:\n- [{technique: cast, dtype: bfloat16}]\n- [{technique: rtn, bits: 8, embeddings: true}]\n"
        "- [{technique: rtn, bits: 3, embeddings: true}]\n- [{technique: drop-blocks, blocks: 2}]\n"
        "- [{technique: int8-dynamic}]\n"
        "moves:\n  encoder:\n  - {mixed_bits: 0.5}\n"
        "  - [{technique: drop-blocks, blocks: 1}, {recovery: {steps: 2, batch_size: 2}}]\n"
    )
    return file


def asked(model, task, save):
    """Return the options that every command line has."""
    return ["--model", str(model), "--task", str(task), "--save", str(save)]


def killed_at(stop, arguments):
    """Run the search in a child that dies without warning after so many lines, or before a line of a kind."""
    add = Journal.add

    def deadly(self, event, **fields):
        if stop in (event, len(self.lines)):
            os.kill(os.getpid(), signal.SIGKILL)
        return add(self, event, **fields)

    Journal.add = deadly
    fit(**arguments)


def test_the_command_ends_where_it_was_killed_and_confirms_on_what_was_never_scored(
    model_folder, reviews, recipes_file, tmp_path, monkeypatch, capsys
):
    arguments = {"model": model_folder, "task": reviews, "save": tmp_path / "fitted", "max_loss": "10"}
    arguments |= {"recipes": recipes_file, "minutes": 3, "length": 16, "progress": False}
    for stop in (6, 14, "order"):
        child = multiprocessing.get_context("fork").Process(target=killed_at, args=(stop, arguments))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    work = tmp_path / "fitted.search"
    with open(work / "search.jsonl", "a") as state:
        state.write('{"event": "sco')  # as a kill in the middle of a line leaves it
    scored, evaluate = [], search.evaluate

    def recorded(model, tokenizer, task, **how):
        scored.append((task.split, [example["text"] for example in task.examples]))
        return evaluate(model, tokenizer, task, **how)

    monkeypatch.setattr(search, "evaluate", recorded)
    result = fit(**arguments)
    assert (
        result.answer and result.answer["bytes"] < 0.5 * result.answer["bytes"] / result.answer["size_share"]
    )
    lines = [json.loads(line) for line in (work / "search.jsonl").read_text().splitlines()]
    for event, names in (
        ("scored", ("name", "chunk")),
        ("made", ("name",)),
        ("timed", ("name",)),
        ("failed", ("name",)),
        ("scanned", ("event",)),
    ):
        keys = [tuple(line[name] for name in names) for line in lines if line["event"] == event]
        assert len(keys) == len(set(keys)) and keys
    # What confirms is scored after the order is fixed, and no text of it before.
    order = max(i for i, line in enumerate(lines) if line["event"] == "order")
    assert all(
        (i > order) == (line["chunk"] == "confirm")
        for i, line in enumerate(lines)
        if line["event"] == "scored"
    )
    confirming = [set(texts) for chunk, texts in scored if chunk == "confirm"]
    searching = set().union(*(texts for chunk, texts in scored if chunk != "confirm"))
    assert confirming and not confirming[0] & searching
    frame = result.frame()
    assert frame["state"].str.contains("not possible here").sum() == 1 and any(
        "drop" in s.lower() for s in frame["label"]
    )
    assert (frame["state"] == "confirmed: the answer").sum() == 1
    sizes = frame.set_index("label")["bytes"]
    [dealt] = [label for label in sizes.index if label.startswith("RTN, mixed precision, incl. embeddings")]
    assert sizes["RTN, 3 bits, per-channel, incl. embeddings"] < sizes[dealt]
    assert sizes[dealt] < 0.8 * sizes["RTN, 8 bits, per-channel, incl. embeddings"]
    # Written: what loads, and says what it is.
    facts = json.loads((result.save / "fit.json").read_text())
    assert (
        facts["answer"]["bound"] <= 0.10
        and facts["confirmation"][0]["bound"] == result.confirmation["bound"][0]
    )
    for name in ("README.md", "proof.md", "proof.html", "recipe.yaml"):
        assert (
            result.answer["label"].split(",")[0] in (result.save / name).read_text() or name == "recipe.yaml"
        )
    shown, page = ((result.save / f"proof.{suffix}").read_text() for suffix in ("md", "html"))
    words = unescape(
        re.sub("<[^>]+>", " ", re.sub("<(style|title|figure)>.*?</\\1>", "", page, flags=re.DOTALL))
    )
    strip = partial(re.sub, r"[^\w%.+-]+|---", " ")
    text = re.sub(r"(?m)^(#+|-|\d\.) |^\|( --- \|)+$", "", shown)
    assert strip(words).split() == strip(text).split() and "$" not in page
    assert page.count("<circle") >= 3 and page.count('fill="#117733"') == 2  # the answer: its mark and number
    assert f"SHA-256 `{sha256(reviews.read_bytes()).hexdigest()}`" in shown and facts["date"] in shown
    assert "accuracy on reviews.csv falls by at most 10 points\n" in shown
    assert "Outputs, in order: no, yes." in (result.save / "README.md").read_text()
    done = subprocess.run(
        [sys.executable, result.save / "check.py", reviews],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    n = facts["examples"]["confirm"]
    assert done.returncode == 0 and f"{n} of {n} are as recorded" in done.stdout, done.stderr
    # Asked for again, nothing runs; asked for something else, nothing is lost.
    scored.clear()
    command = [*asked(model_folder, reviews, result.save), "--max-loss", "10"]
    command += ["--candidates", str(recipes_file), "--length", "16", "--minutes", "1"]
    assert main(command) == 0 and not scored and result.answer["label"] in capsys.readouterr().out
    assert main([*command, "--for", "batch1"]) == 2
    assert "holds" in capsys.readouterr().err


def test_a_search_deletes_nothing_of_the_users_and_leaves_no_work(
    model_folder, reviews, recipes_file, tmp_path, monkeypatch
):
    arguments = {"recipes": recipes_file, "length": 16, "progress": False, "max_loss": "20"}
    save, run, remove = tmp_path / "fitted", search.Search.run, shutil.rmtree

    def meanwhile(self):
        answer = run(self)
        save.mkdir(exist_ok=True)
        (save / "diary.txt").write_text("mine")
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(search.Search, "run", meanwhile)
        with pytest.raises(BadSetting, match="diary.txt, which saving would delete"):
            fit(model_folder, reviews, save=save, **arguments)
        patched.setattr(search.Search, "run", run)
        patched.setattr(
            shutil, "rmtree", lambda path, **how: remove(path, **how) if "models" not in str(path) else 0
        )
        assert (save / "diary.txt").read_text() == "mine"
        (save / "diary.txt").unlink()
        fit(model_folder, reviews, save=save, **arguments)  # ended before it removed its models
    work = tmp_path / "fitted.search"
    assert (work / "models").is_dir()
    (work / "checkpoints" / "a").mkdir(parents=True)
    fit(model_folder, reviews, save=save, **arguments)
    assert not (work / "models").exists() and not (work / "checkpoints").exists()
    (save / "fit.json").write_text("{")  # cut: nothing is saved over it
    pytest.raises(BadSetting, fit, model_folder, reviews, save=save, **arguments).match("would delete")


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"a": 1}\n', '{"event": "job"}\n', "[1]\n"])
def test_a_file_that_is_no_searchs_stays(text, tmp_path):
    (tmp_path / "search.jsonl").write_text(text)
    pytest.raises(BadSetting, Journal, tmp_path, {}, {}).match("is no search's: move it")
    assert (tmp_path / "search.jsonl").read_text() == text


def test_a_journal_torn_in_its_first_line_is_begun_anew(tmp_path):
    for text in ("", "{", '{"event": "job", "jo'):
        (tmp_path / "search.jsonl").write_text(text)
        Journal(tmp_path, {"a": 1}, {})
        assert [line["event"] for line in read(tmp_path)] == ["job"]
        (tmp_path / "search.jsonl").unlink()
    (tmp_path / "work").write_text("a file")
    pytest.raises(BadSetting, Journal, tmp_path / "work", {}, {}).match("holds other files")


def test_a_full_disk_is_no_fault_of_a_candidate(model_folder, reviews, recipes_file, tmp_path, monkeypatch):
    arguments = {"recipes": recipes_file, "length": 16, "progress": False, "max_loss": "20", "train": False}

    def full(*_, **how):
        raise DiskFull("no space left to write it")

    with monkeypatch.context() as patched:
        patched.setattr(search.formats, "save", full)
        pytest.raises(DiskFull, fit, model_folder, reviews, save=tmp_path / "fitted", **arguments)
    assert "failed" not in {line["event"] for line in read(tmp_path / "fitted.search")}
    assert fit(model_folder, reviews, save=tmp_path / "fitted", **arguments).answer
    (tmp_path / "file").write_text("")
    pytest.raises(NotWritable, fit, model_folder, reviews, save=tmp_path / "file" / "x", **arguments)


@pytest.mark.parametrize(
    ("recipe", "runtime"),
    [
        ("[{technique: openvino, weights: int8}]", "openvino"),
        ("[{technique: onnxruntime-int8}]", "onnxruntime"),
        ("[{technique: gptq, bits: 4, embeddings: true}, {format: openvino}]", "openvino"),
    ],
)
def test_a_graph_is_checked_by_its_runtime_alone(recipe, runtime, model_folder, reviews, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"- {recipe}\n")
    options = {"recipes": file, "length": 16, "progress": False, "runtime": runtime, "max_mb": 5}
    result = fit(model_folder, reviews, save=tmp_path / "f", max_loss="20%", train=False, **options)
    assert (
        result.answer["runtime"] == runtime and f"import {runtime}" in (result.save / "README.md").read_text()
    )
    code = "import runpy, sys; sys.modules |= {'torch': None, 'lmcompress': None, 'transformers': None}; "
    code += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import sys; sys.argv = sys.argv[1:]; {code}"
    command = [sys.executable, "-c", code, result.save / "check.py", reviews]
    done = subprocess.run(command, capture_output=True, text=True)
    n = result.content["examples"]["confirm"]
    assert done.returncode == 0 and f"{n} of them confirmed" in done.stdout, done.stderr
    same = int(done.stdout.splitlines()[-1].split(" of ")[0])
    assert same >= 0.98 * n


KINDS = {  # of own data: family, head, what its config says, columns of a row, and the metric
    "regression": ("bert", {"num_labels": 1, "problem_type": "regression"}, ("text", "score"), "spearman"),
    "multi-label": (
        "bert",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        ("text", "labels"),
        "micro_f1",
    ),
    "language-modelling": ("gpt2", {}, ("text",), "perplexity"),
    "generation": ("t5", {}, ("source", "target"), "chrf"),
    "multiple-choice": ("gpt2", {}, ("question", "choices", "answer"), "accuracy"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_own_data_is_searched_and_confirmed(kind, model_folder, tmp_path, monkeypatch, capsys):
    family, config, columns, metric = KINDS[kind]
    rng, folder = np.random.default_rng(0), tmp_path / "model"
    if kind == "multi-label":
        config = config | {
            "id2label": dict(enumerate("abc")),
            "label2id": {name: i for i, name in enumerate("abc")},
        }
    tiny(family, "classification" if config else "lm", **config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)

    def words(count):
        return " ".join(f"w{k}" for k in rng.integers(0, 90, count))

    def cells(i):
        make = {
            "text": words(9 if config else 60),
            "source": words(9),
            "question": words(9),
            "target": words(4),
            "score": rng.normal(),
        }
        make |= {"labels": ("a;b", "c", "b")[i % 3], "choices": f"{words(2)};{words(2)}", "answer": i % 2}
        return [make[column] for column in columns]

    file, recipe = tmp_path / "data.csv", tmp_path / "recipe.yaml"
    with open(file, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([columns, *map(cells, range(130))])
    listed = "[[{technique: rtn, bits: 8, embeddings: true}]]"
    lines = [f"{name}: {listed}" for name in ("encoder", "decoder", "encoder-decoder")]
    moves = [f"  {line.partition(':')[0]}: [{{mixed_bits: 0.5}}]" for line in lines]
    recipe.write_text("\n".join([*lines, "moves:", *moves]))
    points = "30%" if kind == "language-modelling" else "30"
    settings = {"kind": kind, **({"max_new_tokens": 4} if kind == "generation" else {})}
    options = {"recipes": recipe, "length": 12, "max_loss": points, "progress": False, "train": False}
    result = fit(folder, file, save=tmp_path / "f", **options, **settings)
    assert result.answer and result.content["metric"] == metric
    assert result.answer["bound"] <= 0.3 * (100 if metric == "chrf" else 1)
    assert result.frame()["label"].str.contains("RTN, mixed precision").sum() == 1
    monkeypatch.setattr(sys, "argv", ["check.py", str(file)])
    runpy.run_path(str(result.save / "check.py"), run_name="__main__")
    same, n = capsys.readouterr().out.splitlines()[-1].split(" are as recorded")[0].split(" of ")
    unit = "windows of 64 tokens" if kind == "language-modelling" else "examples"
    assert same == n and f"measured on {n} {unit} that nothing was chosen by" in result.text


def test_what_is_listed_is_made_in_the_first_part_of_the_time(
    model_folder, reviews, recipes_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(search, "MAKING", 0.0)
    options = {"recipes": recipes_file, "length": 16, "progress": False}
    result = fit(model_folder, reviews, save=tmp_path / "f", **options)
    assert result.answer is None and "Not reached in the time given: 5 candidates" in result.text


def test_what_another_process_found_meanwhile_is_the_answer(
    model_folder, reviews, recipes_file, tmp_path, monkeypatch
):
    found = iter([None, {"answer": {"label": "of the other"}}])
    monkeypatch.setattr(proof, "read", lambda *_: next(found))
    result = fit(model_folder, reviews, save=tmp_path / "f", recipes=recipes_file, progress=False)
    assert result.answer["label"] == "of the other" and not result.work.exists()


def test_a_head_is_trained_first_and_its_search_resumes_as_it_was_asked_for(
    model_folder, reviews, tmp_path, capsys
):
    bare = tmp_path / "bare"
    tiny("bert", None).save_pretrained(bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, bare / name)
    file = tmp_path / "recipe.yaml"
    file.write_text("- {technique: rtn, bits: 8, embeddings: true}\n")
    command = [*asked(bare, reviews, tmp_path / "f"), "--max-loss", "20"]
    command += ["--candidates", str(file), "--length", "16"]
    assert main(command) == 2 and "--finetune" in capsys.readouterr().err
    assert main([*command, "--finetune", "--minutes", "0.001"]) == 1
    assert "not made, no time" in capsys.readouterr().err
    assert (tmp_path / "f.search" / "proof.md").is_file()
    assert main(["--resume", "--save", str(tmp_path / "f"), "--minutes", "5"]) == 0
    assert "] dense: accuracy" in (said := capsys.readouterr().err) and "always the commonest label:" in said
    assert not (tmp_path / "f.search" / "proof.md").exists()  # it said that there is no answer
    assert " --finetune " in (tmp_path / "f" / "README.md").read_text()
    assert (tmp_path / "f.search" / "dense" / "model.safetensors").is_file()
    assert not (tmp_path / "f.search" / "training").exists()
    assert main(["--resume", "--save", str(tmp_path / "none")]) == 2
    assert "holds no search" in capsys.readouterr().err


def test_memory_is_that_beyond_the_libraries_and_stands_in_card_and_proof(
    model_folder, reviews, recipes_file, tmp_path, monkeypatch
):
    def peak_memory(folder, *, unpack, **_):  # that of the dense model is of float32
        assert unpack is False
        bytes_ = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return {"peak_bytes": 400_000_000 + bytes_, "baseline_bytes": 400_000_000, "peak_kind": "rss"}

    monkeypatch.setattr(search, "peak_memory", peak_memory)
    options = {"recipes": recipes_file, "length": 16, "progress": False, "train": False, "goal": "memory"}
    result = fit(model_folder, reviews, save=tmp_path / "f", max_loss="30", **options)
    dense, answer = result.content["dense"]["peak_bytes"], result.answer["peak_bytes"]
    assert answer == result.answer["bytes"] < 0.3 * dense and answer == result.frame()["peak_bytes"].min()
    card, proof = ((result.save / name).read_text() for name in ("README.md", "proof.md"))
    assert f"load_compressed('{result.save.name}', unpack=False)" in card
    assert "beyond the libraries (14 % of dense)" in card and "| peak memory beyond the libraries |" in card
    assert "| peak memory, MB |" in proof and f"| {answer / 1e6:.1f} | {answer / 1e6:.1f} |" in proof
    for name in ("proof.md", "proof.html"):
        assert "Peak memory is of a fresh process" in (result.save / name).read_text()


def test_examples_are_left_out_where_time_is_short_and_the_rest_decides(
    model_folder, reviews, tmp_path, monkeypatch
):
    monkeypatch.setattr(schedule.Schedule, "per_example", lambda self: 0.05)  # of a far larger model
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {technique: rtn, bits: 8, embeddings: true}\n")
    by_class = tmp_path / "sorted.csv"
    lines = [f"w{i % 90} w{i % 89},{('no', 'yes')[i // 150]}" for i in range(300)]
    by_class.write_text("\n".join(["text,label", *lines]))
    options = {"recipes": recipe, "length": 16, "progress": False, "train": False, "minutes": 1}
    options |= {"split_by": by_class, "max_loss": "40"}
    result = fit(model_folder, reviews, save=tmp_path / "f", **options)
    examples = result.content["examples"]
    assert 20 <= examples["confirm"] < 150 and examples["search"] < 300
    assert result.content["dense"]["quality"]["n"] == examples["confirm"]
    labels = [
        label for label, *_ in json.loads((result.save / "answers.json").read_text())["answers"].values()
    ]
    assert 0.3 < np.mean(labels) < 0.7  # not the first of the file, which are of one class
    card, shown = ((result.save / name).read_text() for name in ("README.md", "proof.md"))
    assert "accuracy on sorted.csv falls" in shown and "`python check.py sorted.csv`" in card
    assert f"What confirms: `{by_class}`, SHA-256 `{sha256(by_class.read_bytes()).hexdigest()}`" in shown
    assert f"Those that confirm are {examples['confirm']} of `{by_class}`" in shown


@pytest.mark.parametrize("line", [{}, {"by_hash": True}])
def test_a_recorded_search_goes_on_with_the_examples_that_it_was_limited_to(line, tmp_path):
    texts = [f"text {i}" for i in range(100)]
    limited = SimpleNamespace(journal=Journal(tmp_path / "w", {}, {}), tasks={"": None, "a": task_of(texts)})
    limited.journal.add("limited", share=0.3, **line)
    search.Search._limit(limited)
    texts_left = [example["text"] for example in limited.tasks["a"].examples]
    assert len(texts_left) == 30 and (texts_left == texts[:30]) == (not line)


def test_what_is_not_finite_or_not_bounded_is_said_in_words(model_folder, reviews, tmp_path, monkeypatch):
    bounds, recipe = Loss.bounds, tmp_path / "recipe.yaml"

    def bounded(self, columns, *of, **how):  # as of a search part of fewer than 20 windows
        return bounds(self, columns, *of, **how) if len(columns["correct"]) > 150 else (-np.inf, np.inf)

    monkeypatch.setattr(Loss, "bounds", bounded)
    monkeypatch.setattr(search.divergence, "compared", lambda *_: (float("inf"), 1.0))
    monkeypatch.setattr(search, "latency", lambda *_, **how: (_ for _ in ()).throw(StudyError("busy")))
    recipe.write_text("- {technique: rtn, bits: 8, embeddings: true}\n")
    options = {"recipes": recipe, "length": 16, "progress": False, "train": False, "max_ms": 1e4}
    result = fit(model_folder, reviews, save=tmp_path / "f", max_loss="30", **options)
    assert "keeps to 10000 ms was seen in a short run alone" in result.text
    written = json.loads((result.save / "fit.json").read_text())["candidates"][0]
    assert [written[name] for name in ("divergence", "search_low", "search_high")] == [None] * 3
    assert re.search(
        r"not finite \| 100 % \| [-+.0-9]+ \[not bounded\]", (result.save / "proof.md").read_text()
    )


@pytest.mark.parametrize(("timed", "limit", "order"), [("a", 5, "a"), ("", 5, "ab"), ("a", None, "ab")])
def test_a_finalist_that_was_not_timed_is_left_out_under_a_limit_unless_none_was(
    timed, limit, order, tmp_path
):
    named = [Contender("a", 0.5, 0.1), Contender("b", 0.4, 0.2)]
    stub = SimpleNamespace(_sequence=list, contenders=lambda: named, limits=(None, limit), _skip=lambda *_: 0)
    stub.journal, stub.clock = Journal(tmp_path / "w", {}, {}), schedule.Clock(0)
    stub.schedule = SimpleNamespace(to_time=lambda: 1, reserve=lambda **_: 0)
    stub.all = {contender.name: contender for contender in named}
    for name in timed:
        stub.journal.add("timed", name=name)
    assert "".join(contender.name for contender in search.Search.order(stub, named)) == order


def test_time_for_measurements_is_planned_by_the_calls_that_were_timed(tmp_path):
    journal = Journal(tmp_path / "work", {}, {})  # scoring short texts says little of a batch of long ones
    plan = schedule.Schedule(schedule.Clock(1), journal, *[None] * 3, goal="time", finalists=5)
    for signature, call_s in (("dense", 0.2), ("b", 0.3), ("slow", 9.0)):
        plan.journal.add("time", signature=signature, call_s=call_s)
    assert plan.to_time() == pytest.approx(3 * 33 * 0.3)
    assert plan.to_cost() == pytest.approx(2 * 10 * 0.3)
    plan.goal = "memory"
    plan.journal.add("peak", signature="a", seconds=7.0)
    assert plan.to_cost() == 7.0


def test_no_answer_says_what_came_nearest_and_how_many_would_decide(model_folder, reviews, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("- {technique: rtn, bits: 8, embeddings: true}\n")
    command = [*asked(model_folder, reviews, tmp_path / "f"), "--max-loss", "0.5"]
    assert main([*command, "--candidates", str(file), "--length", "16", "--no-train"]) == 1
    shown = capsys.readouterr()
    assert "Nearest came RTN, 8 bits" in shown.out and "examples would decide" in shown.out
    assert "a lossless candidate is certified at" in shown.err and not (tmp_path / "f").exists()
    assert "failed confirmation" in (tmp_path / "f.search" / "proof.md").read_text()


def test_a_share_of_a_dense_value_that_is_not_above_0_is_refused_before_anything_is_made(
    model_folder, reviews, tmp_path, capsys
):
    for labels in ("no=no,yes=yes", "no=yes,yes=no"):  # the correlation of one is minus that of the other
        command = [*asked(model_folder, reviews, tmp_path / labels), "--max-loss", "1%", "--minutes", "0.001"]
        main([*command, "-p", "metric=matthews", "-p", f"labels={labels}"])
    assert "share of the dense model's MCC, and that is -0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--for", "speed"], "choose one of size, memory, batch1"),
        (["--runtime", "tvm"], "choose one of torch, openvino"),
        (["--minutes", "0"], "number above 0"),
        (["--minutes", "inf"], "number above 0"),
        (["-p", "labels=" + "[" * 20_000], "is not YAML"),
        (["--for", "decode"], "about models that generate"),
        (["--split", "a,b"], "three shares"),
        (["--split", "no.csv"], "no such file"),
        (["--split", "0.15,0.25,x.6"], "three shares"),
        (["-p", "max_loss=5", "-p", "train=false"], "For max_loss, train see --help"),
        (["--train", "a.csv", "-p", "train_path=b.csv"], "For train_path see --help"),
        (["--candidates", "no.yaml"], "no file no.yaml"),
        (["--max-loss", "one"], "give points above 0"),
    ],
)
def test_bad_options_end_in_a_sentence(options, sentence, model_folder, reviews, tmp_path, capsys):
    assert main([*asked(model_folder, reviews, tmp_path / "f"), *options]) == 2
    assert sentence in capsys.readouterr().err and not any(tmp_path.iterdir())
