"""The whole harness on tiny models, every part real; rows are checked against the store's schema."""

import copy
import gc
import math
import subprocess
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F

from lmcompress import compress, device, tasks
from lmcompress import measure as measuring
from lmcompress.errors import BadSetting, StudyError
from lmcompress.measure import DenseMeasurement, Reuse, kernels, limiting_shape, measure, peak
from lmcompress.measure import calls as calls_module
from lmcompress.measure.calls import Call, Shape, default_shapes, prepared_calls, shape_signature
from lmcompress.measure.compute import compute, flops, weight_bytes_read
from lmcompress.measure.kernels import KERNELS, Kernel, linear_kernels
from lmcompress.measure.latency import (
    COPY,
    DENSE,
    VARIANT,
    interleave,
    latency,
    summarise,
    unchanged,
    verdicts,
)
from lmcompress.measure.memory import memory, peak_memory
from lmcompress.measure.peak import peak_rss_bytes
from lmcompress.measure.quality import quality, quality_verdict
from lmcompress.measure.shares import ATTENTION, PRODUCTS, time_shares
from lmcompress.models import storage
from lmcompress.models.serialization import plain_values
from lmcompress.results.store import RowStore
from lmcompress.stats import RatioOfSums, paired_difference
from tests.test_results import make_row
from tests.tiny_models import DECODERS, FAMILIES, kind, tiny


@pytest.fixture
def quick(monkeypatch):
    """A made-up machine and a task of 40 examples; the fresh process has tests of its own."""
    peak = {"peak_bytes": 5, "baseline_bytes": 1, "peak_kind": "rss"}
    monkeypatch.setattr(device, "ceiling", lambda *_, **__: CEILING)
    monkeypatch.setattr(measuring, "peak_memory", lambda *_, **__: peak)
    monkeypatch.setattr(tasks, "evaluate", fake_evaluate)


def fake_evaluate(model, tokenizer, task):
    ids = torch.arange(3, 43)[:, None]
    with torch.no_grad():
        predicted = model(input_ids=ids).logits.flatten(1).argmax(-1).numpy()
    columns = {"correct": (predicted == task.answers).astype(float)}
    found = {
        "value": columns["correct"].mean(),
        "floor": 0.1,
        "collapsed": None,
        "secondary": {},
        "details": {},
    }
    return SimpleNamespace(task=task, columns=columns, metric="accuracy", **found)


def subject(family: str):
    model = tiny(family)
    with torch.no_grad():
        answers = model(input_ids=torch.arange(3, 43)[:, None]).logits.flatten(1).argmax(-1).numpy()
    settings = {"secondary": {}, "likelihood": None, "block": 1, "cluster": None, "higher_is_better": True}
    settings |= {"selection": lambda: None}
    statistic = RatioOfSums("correct", None)
    task = SimpleNamespace(answers=answers, metric="accuracy", statistic=statistic, **settings)
    loaded = {"kind": kind(family), "tokenizer": None, "dtype": torch.float32, "file_bytes": None}
    return SimpleNamespace(model=model, **loaded), task


def shapes(family: str) -> list[Shape]:
    parts = ["forward"] if kind(family) == "encoder" else ["prefill", "decode"]
    return [Shape(part, batch, 8, 2) for batch in (1, 2) for part in parts]


def row(key: str, measured) -> dict:
    return make_row(key=key, **measured.row_parts())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_baseline_then_variants_give_rows_that_the_store_accepts(quick, family, tmp_path):
    dense, task = subject(family)
    store = RowStore(tmp_path / "rows")
    given = {"shapes": shapes(family), "calls": 3}
    folder = storage.save(dense.model, tmp_path / "dense")
    first = measure(dense.model, dense, task, folder=folder, **given)
    assert first.verdict["quality"] == first.verdict["size"] == "baseline"
    assert set(first.verdict["latency"].values()) == {"baseline"}
    assert first.quality["value"] == 1 and first.quality["difference"] is None
    baseline = row("0" * 16, first)
    store.append(baseline)

    compressed = copy.deepcopy(dense.model)
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.normal_()
    compressed.bfloat16()
    folder = storage.save(compressed, tmp_path / "half")
    given["baseline"] = DenseMeasurement(baseline, first.scores)
    second = measure(compressed, dense, task, folder=folder, **given)
    store.append(row("1" * 16, second))
    assert second.verdict["size"] == "smaller" and second.verdict["quality"] == "worse"
    assert second.quality["difference"]["value"] < -0.5 and second.quality["difference"]["n"] == 40
    assert second.latency["signature"] == shape_signature(compressed) != first.latency["signature"]
    assert second.latency["measured_on"] is None and second.memory["peak_bytes"] == 5
    assert list(second.latency["shapes"]) == [shape.name for shape in given["shapes"]]
    assert second.compute["shape"] == {"bert": "batch2", "llama": "decode_b1"}[family]
    assert 0 < second.compute["matmul_share"] < 1
    assert len(store.rows()) == 2


def test_a_row_of_the_same_shapes_lends_its_times_but_not_its_bytes(quick, tmp_path, monkeypatch):
    dense, task = subject("bert")
    given = {"shapes": shapes("bert"), "calls": 2}
    folder = storage.save(dense.model, tmp_path / "dense")
    first = measure(dense.model, dense, task, folder=folder, **given)
    baseline = row("0" * 16, first)
    pruned = copy.deepcopy(dense.model)
    with torch.no_grad():
        pruned.bert.encoder.layer[0].output.dense.weight.zero_()
    folder = storage.save(pruned, tmp_path / "pruned")
    common = {"baseline": DenseMeasurement(baseline, first.scores), "folder": folder, **given}
    timed = row("1" * 16, measure(pruned, dense, task, **common))
    for name in ("latency", "peak_memory", "compute"):
        monkeypatch.setattr(measuring, name, lambda *_, **__: pytest.fail("measured again"))
    lent = measure(dense.model, dense, task, reuse=Reuse(timed), **common)
    assert lent.latency["shapes"] == timed["latency"]["shapes"] and lent.latency["measured_on"] == "1" * 16
    assert lent.compute == timed["compute"] and lent.memory["peak_bytes"] == 5
    assert lent.memory["formats"] == first.memory["formats"] != timed["memory"]["formats"]
    assert lent.verdict["size"] == "no change" and lent.quality["difference"]["value"] == 0
    again = measure(dense.model, dense, task, reuse=Reuse(row("2" * 16, lent)), **common)
    assert again.latency["measured_on"] == "1" * 16


def test_parts_left_out_are_null_and_accepted(quick, tmp_path):
    dense, task = subject("bert")
    only = measure(dense.model, dense, task, parts=("quality",))
    assert only.latency is only.memory is only.compute is None
    assert only.verdict == {"quality": "baseline", "size": None, "latency": None}
    RowStore(tmp_path).append(row("0" * 16, only))
    assert set(only.scores) == {"correct"} and isinstance(only.scores["correct"], np.ndarray)
    weighed = measure(dense.model, dense, None, parts=("memory",))
    assert weighed.quality is None and weighed.memory["file_bytes"] is None and weighed.scores == {}


def test_the_shape_that_limits():
    assert limiting_shape([Shape("forward", 1), Shape("forward", 8)]).name == "batch8"
    assert limiting_shape([Shape("prefill", 8), Shape("decode", 8), Shape("decode", 1)]).name == "decode_b1"


def test_a_dense_model_counts_as_its_checkpoint_is_stored(quick):
    """A bfloat16 file is computed in float32: its row says the file's bytes, and a cast halves nothing."""
    dense, _ = subject("bert")
    whole = measure(dense.model, dense, None, parts=("memory",)).memory
    dense.dtype, dense.file_bytes = torch.bfloat16, 12345
    given = measure(dense.model, dense, None, parts=("memory",)).memory
    assert given["file_bytes"] == 12345 and given["parameters"] == whole["parameters"]
    assert given["formats"]["dense"] < 0.6 * whole["formats"]["dense"]
    assert dense.model.dtype == torch.float32


def evaluation(columns, *, metric, statistic, floor=None, collapsed=None, **more):
    defaults = {"block": 1, "cluster": None, "higher_is_better": True, "secondary": {}, "likelihood": None}
    task = SimpleNamespace(metric=metric, statistic=statistic, **(defaults | more))
    found = {"metric": metric, "value": statistic(columns), "floor": floor, "collapsed": collapsed}
    return SimpleNamespace(task=task, columns=columns, details={"window": 8}, **found)


def accuracy(correct, **more):
    columns, right = {"correct": np.asarray(correct, float)}, RatioOfSums("correct", None)
    return evaluation(columns, metric="accuracy", statistic=right, **more)


def test_accuracy_has_wilsons_interval_and_mcnemars_test():
    ours, theirs = np.zeros(100), np.zeros(100)
    ours[:80], theirs[:72], theirs[98:] = 1, 1, 1  # 8 gained, 2 lost
    found = quality(accuracy(ours), {"correct": theirs})
    reference = binomtest(80, 100).proportion_ci(method="wilson")
    assert (found["value"], found["n"]) == (0.8, 100)
    assert (found["low"], found["high"]) == pytest.approx((reference.low, reference.high))
    assert found["difference"]["value"] == pytest.approx(0.06)
    assert found["difference"]["p"] == pytest.approx(binomtest(8, 10).pvalue)
    assert quality_verdict(found, baseline=False) == "no measurable change"


def labels(correct, nats):
    columns = {"correct": np.asarray(correct, float), "cross_entropy": nats}
    right, surprise = RatioOfSums("correct", None), RatioOfSums("cross_entropy", None)
    secondary = {"cross_entropy": surprise, "other": right}
    settings = {"metric": "accuracy", "likelihood": "cross_entropy", "secondary": secondary}
    return evaluation(columns, statistic=right, **settings)


def test_the_likelihood_is_compared_in_pairs_and_sees_what_the_accuracy_does_not():
    rng = np.random.default_rng(0)
    correct, nats = rng.random(200) < 0.9, rng.exponential(0.3, 200)
    dense = {"correct": correct.astype(float), "cross_entropy": nats}
    found = quality(labels(correct, nats + rng.normal(0.02, 0.05, 200)), dense)
    assert found["difference"]["value"] == 0
    assert quality_verdict(found, baseline=False) == "no measurable change"
    part = found["secondary"]["cross_entropy"]
    shuffled = {"cross_entropy": rng.permutation(nats)}  # the same numbers, without their pairs
    apart = paired_difference(RatioOfSums("cross_entropy", None), {"cross_entropy": nats + 0.02}, shuffled)
    assert part["difference"]["p"] < 0.01 and apart.p > 0.1
    assert part["difference"]["resamples"] == 10_000 and "bound" not in part["difference"]
    assert found["difference"]["bound"] > 0
    assert part["difference"]["value"] == pytest.approx(part["value"] - nats.mean())
    assert part["difference"]["low"] > 0 and "difference" not in found["secondary"]["other"]
    alone = quality(labels(correct, nats))["secondary"]["cross_entropy"]
    assert "difference" not in alone  # the dense model's own
    broken = quality(labels(correct, np.full(200, np.nan)), dense)
    assert broken["secondary"]["cross_entropy"]["difference"] is None and broken["difference"] is not None


def perplexity(nll, tokens):
    settings = {"block": 10, "higher_is_better": False, "secondary": {"nats": RatioOfSums("nll", "tokens")}}
    statistic = RatioOfSums("nll", "tokens", np.exp)
    return evaluation({"nll": nll, "tokens": tokens}, metric="perplexity", statistic=statistic, **settings)


def test_perplexity_is_bootstrapped_in_blocks_and_lower_is_better():
    rng = np.random.default_rng(0)
    tokens = rng.integers(200, 256, 120).astype(float)
    drift = np.repeat(rng.normal(0, 0.4, 12), 10)  # neighbouring windows are alike
    dense, worse = (3 + drift) * tokens, (3.1 + drift) * tokens
    found = quality(perplexity(worse, tokens), {"nll": dense, "tokens": tokens})
    assert found["value"] == pytest.approx(math.exp(worse.sum() / tokens.sum()))
    assert found["difference"]["low"] > 0 and found["difference"]["test"] == "paired bootstrap, blocks of 10"
    assert quality_verdict(found, baseline=False) == "worse"
    turned = quality(perplexity(dense, tokens), {"nll": worse, "tokens": tokens})
    assert quality_verdict(turned, baseline=False) == "better"
    single = perplexity(worse, tokens)
    single.task.block = 1
    assert quality(single)["high"] - quality(single)["low"] < 0.6 * (found["high"] - found["low"])
    nats = found["secondary"]["nats"]
    assert nats["low"] < nats["value"] < nats["high"]
    assert found["details"] == {"window": 8}


def test_what_is_not_a_number_is_null_and_collapsed():
    alike = quality(accuracy([1, 0] * 50), {"correct": np.array([1.0, 0.0] * 50)})
    assert alike["difference"]["value"] == 0
    columns = {"score": np.ones(20), "label": np.arange(20.0)}
    nothing = {"metric": "spearman", "statistic": lambda c: float("nan")}
    one = evaluation(columns, collapsed="the scores are the same", **nothing)
    found = quality(one, columns)
    assert found["value"] is None and found["low"] is None and found["difference"] is None
    assert quality_verdict(found, baseline=False) == "collapsed"


def test_baseline_collapsed_and_uncompared():
    found = quality(accuracy([1, 0, 1, 1], floor=0.75, collapsed="no better than the majority class"))
    assert found["difference"] is None and found["floor"] == 0.75
    assert quality_verdict(found, baseline=True) == "baseline"
    assert quality_verdict(found, baseline=False) == "collapsed"
    assert quality_verdict(quality(accuracy([1, 0, 1, 1])), baseline=False) is None


FIELDS = set(make_row()["latency"]["shapes"]["batch1"])


class FakeMachine:
    """A clock that moves only when its calls run; it may be noisy, and slow down as it gets hot."""

    def __init__(self, *, seed: int = 0, noise: float = 0.0, drift: float = 0.0) -> None:
        self.now, self.noise, self.drift, self.done = 0.0, noise, drift, 0
        self.rng, self.order = np.random.default_rng(seed), []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, seconds: float, *, expected: int = 99) -> Call:
        def run() -> None:
            self.order.append(name)
            heat = 1 + self.drift * self.done / expected
            self.now += seconds * heat * float(np.exp(self.noise * self.rng.standard_normal()))
            self.done += 1

        return Call(run)


def timed(machine: FakeMachine, seconds: dict[str, float], *, calls: int = 30, seed: int = 0) -> dict:
    work = {name: machine.call(name, s) for name, s in seconds.items()}
    return interleave(work, calls=calls, seed=seed, clock=machine.clock)


def test_calls_of_known_length_give_their_times_and_ratio():
    found = summarise(timed(FakeMachine(), {DENSE: 0.2, COPY: 0.2, VARIANT: 0.4}))
    assert found["median_ms"] == pytest.approx(400) and found["dense_ms"] == pytest.approx(200)
    assert found["ratio"] == pytest.approx(2) and found["ratio_low"] == pytest.approx(2)
    assert found["aa_ratio"] == pytest.approx(1) and found["noise_floor"] == pytest.approx(0, abs=1e-9)
    assert found["p5_ms"] == pytest.approx(400) and found["p95_ms"] == pytest.approx(400)


def test_only_run_is_timed_and_it_is_divided_by_its_steps():
    machine = FakeMachine()
    work = Call(machine.call("run", 0.4).run, machine.call("prepare", 5.0).run, steps=16)
    assert interleave({"x": work}, calls=3, warmup=1, clock=machine.clock)["x"] == pytest.approx([0.025] * 3)
    assert machine.order == ["prepare", "run"] * 4


def test_what_takes_too_long_is_called_less_often_but_warmed_up_and_not_once_only():
    machine = FakeMachine()
    work = {name: machine.call(name, 1.0) for name in (DENSE, COPY)}
    for calls, patience, expected in (
        (30, {"patience_s": 0.0}, 10),
        (3, {"patience_s": 0.0}, 3),
        (30, {}, 30),
    ):
        machine.order.clear()
        times = interleave(work, calls=calls, clock=machine.clock, **patience)
        assert [len(one) for one in times.values()] == [expected] * 2
        assert len(machine.order) >= 2 * (expected + 1)  # at least one round to warm up


def test_order_is_drawn_anew_each_round_and_fixed_by_the_seed():
    names = {DENSE: 1.0, COPY: 1.0, VARIANT: 1.0}
    orders = []
    for seed in (0, 0, 1):
        machine = FakeMachine()
        timed(machine, names, calls=297, seed=seed)
        rounds = [tuple(machine.order[i : i + 3]) for i in range(0, len(machine.order), 3)]
        assert all(set(one) == set(names) for one in rounds) and len(rounds) == 300
        counts = Counter(rounds)
        assert len(counts) == 6 and min(counts.values()) > 25  # 50 expected of each order
        orders.append(rounds)
    assert orders[0] == orders[1] != orders[2]


def test_the_ratio_interval_covers_the_truth_and_drift_hits_all_alike():
    inside, ratios, one_after_the_other = 0, [], []
    for seed in range(100):
        machine = FakeMachine(seed=seed, noise=0.05, drift=2.0)
        found = summarise(timed(machine, {DENSE: 1.0, COPY: 1.0, VARIANT: 0.5}, seed=seed))
        inside += found["ratio_low"] <= 0.5 <= found["ratio_high"]
        ratios.append(found["ratio"])
        machine = FakeMachine(seed=seed, noise=0.05, drift=2.0)
        parts = [timed(machine, {name: s}) for name, s in ((DENSE, 1.0), (COPY, 1.0), (VARIANT, 0.5))]
        one_after_the_other.append(np.median(parts[2][VARIANT]) / np.median(parts[0][DENSE]))
    assert inside >= 88
    assert np.mean(ratios) == pytest.approx(0.5, rel=0.02)
    assert np.mean(one_after_the_other) > 0.75  # what interleaving prevents


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.0, "no measurable change"), (0.5, "faster"), (2.0, "slower"), (1.003, "no measurable change")],
)
def test_verdicts(factor, said):
    machine = FakeMachine(seed=3, noise=0.05)
    found = summarise(timed(machine, {DENSE: 1.0, COPY: 1.0, VARIANT: factor}))
    assert 0 < found["noise_floor"] < 0.2
    assert verdicts({"calls": 10, "shapes": {"batch1": found}}) == {"batch1": said}
    assert verdicts({"calls": 9, "shapes": {"batch1": found}}) == {"batch1": "too few calls"}


def test_without_a_variant_the_dense_model_is_reported_as_baseline():
    found = summarise(timed(FakeMachine(noise=0.1), {DENSE: 0.2, COPY: 0.2}))
    assert found["ratio"] is None and found["median_ms"] == found["dense_ms"]
    assert verdicts({"shapes": {"batch1": found}}) == {"batch1": "baseline"}


def test_the_garbage_collector_is_off_while_timing_and_back_after(monkeypatch):
    states = []
    note = lambda: states.append(gc.isenabled())  # noqa: E731
    interleave({"x": Call(note, note)}, calls=2, warmup=0)
    assert states == [True, False, True, False] and gc.isenabled()

    def fail() -> None:
        raise RuntimeError

    pytest.raises(RuntimeError, interleave, {"x": Call(fail)}, calls=1)
    assert gc.isenabled()


def test_the_lock_is_held_and_modes_are_given_back(monkeypatch):
    held = []

    class Lock:
        def __enter__(self):
            held.append(True)

        def __exit__(self, *_):
            held.pop()

    seen = []
    monkeypatch.setitem(latency.__globals__, "timing_lock", Lock)
    model = tiny("bert").train()
    note = lambda *_: seen.append((bool(held), model.training, torch.is_grad_enabled()))  # noqa: E731
    model.register_forward_pre_hook(note)
    latency(model, kind="encoder", shapes=[Shape("forward", 1, 5)], calls=2)
    assert set(seen) == {(True, False, False)} and not held and model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_timed_at_every_shape(family):
    model = tiny(family)
    shapes = [Shape(s.part, s.batch, 7, 3) for s in default_shapes(kind(family), batches=(1, 2))]
    found = latency(model, copy.deepcopy(model), kind=kind(family), calls=2, shapes=shapes)
    assert (found["calls"], found["dtype"], found["device"]) == (2, "float32", "cpu")
    expected = {"encoder": "batch1 batch2", "decoder": "prefill_b1 decode_b1 prefill_b2 decode_b2"}
    expected["encoder-decoder"] = "encode_b1 decode_b1 encode_b2 decode_b2"
    assert list(found["shapes"]) == expected[kind(family)].split()
    for shape in found["shapes"].values():
        assert set(shape) == FIELDS and shape["length"] == 7 and shape["ratio"] > 0


@pytest.mark.parametrize("family", ["bart", "t5", "gpt2", "bert"])
def test_a_classifier_of_any_kind_is_timed_by_its_forward(family):
    model = tiny(family, "classification")
    found = latency(model, copy.deepcopy(model), kind=kind(family), calls=1)
    assert list(found["shapes"]) == ["batch1", "batch8"]
    shape = default_shapes(kind(family), model=model)[0]
    assert flops(model, kind=kind(family), shape=shape) > 0
    assert weight_bytes_read(model, shape) > 0.5 * sum(p.nbytes for p in model.parameters())
    with pytest.raises(BadSetting, match="it has forward"):
        prepared_calls({"x": model}, Shape("decode", 1), kind=kind(family))


def state_of(model) -> list:
    """Everything a forward may leave changed: module classes, plain attributes, config, the tensors."""
    tensors = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modules = {name: (type(module), plain_values(module)) for name, module in model.named_modules()}
    return [model.config.to_dict(), tensors, modules]


class Switching(nn.Module):
    """An attention that exchanges itself, a buffer and the config at a short input, as BigBird's does."""

    def __init__(self, attention: nn.Module, config):
        super().__init__()
        self.attention, self.config, self.sparse = attention, config, True
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, *args, **kwargs):
        if self.sparse:
            self.sparse, self.attention = False, copy.copy(self.attention)
            self.seen, self.config.attention_type = self.seen + 1, "full"
        return self.attention(*args, **kwargs)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "switching"])
def test_timing_leaves_models_as_they_were(family):
    model = tiny("bert").train() if family == "switching" else tiny(family)
    if family == "switching":
        attention = model.bert.encoder.layer[0].attention
        attention.self = Switching(attention.self, model.config)
    before, training = state_of(model), model.training
    latency(model, model, kind=kind("bert" if family == "switching" else family), calls=1)
    assert state_of(model) == before and model.training == training
    assert model.register_forward_hook(lambda *_: None)  # its tables are no copies of another kind
    with unchanged(model), pytest.raises(ZeroDivisionError):
        model.config.new, _ = 1, 1 / 0
    assert state_of(model) == before


def test_no_position_is_left_for_the_input():
    with pytest.raises(BadSetting, match="needs 16 positions"):
        prepared_calls({"x": tiny("gpt2", n_positions=16)}, Shape("decode", 1), kind="decoder")


@pytest.mark.parametrize("family", [*DECODERS, "t5", "bart"])
def test_decode_steps_continue_the_cache_and_every_round_starts_from_the_same_one(family):
    """Step logits equal those of one forward over prompt and tokens: the cache is used and restored."""
    model, shape = tiny(family), Shape("decode", 2, 5, 3)
    outputs = []
    model.register_forward_hook(lambda m, a, out: outputs.append(out.logits))
    with torch.no_grad():
        call = prepared_calls({"x": model}, shape, kind=kind(family))["x"]
        rounds = []
        for _ in range(2):
            call.prepare()
            outputs.clear()
            call.run()
            rounds.append(torch.cat(outputs, dim=1))
        ids = torch.randint(100, (2, 5), generator=torch.Generator().manual_seed(0))
        if kind(family) == "decoder":
            whole = model(input_ids=torch.cat([ids, ids[:, :3]], dim=1)).logits[:, 5:]
        else:
            given = {"decoder_input_ids": torch.cat([ids[:, :1], ids[:, :3]], dim=1)}
            whole = model(input_ids=ids, **given).logits[:, 1:]
    assert rounds[0].shape[1] == 3
    assert torch.equal(rounds[0], rounds[1])
    torch.testing.assert_close(rounds[0], whole, atol=1e-4, rtol=1e-4)


def test_ids_are_valid_for_the_smallest_vocabulary_and_lengths_for_the_fewest_positions():
    dense, variant = tiny("gpt2"), tiny("gpt2", vocab_size=11, n_positions=32)
    shape = Shape("prefill", 64, 128)
    with torch.no_grad():
        for call in prepared_calls({"a": dense, "b": variant}, shape, kind="decoder").values():
            call.run()
    assert calls_module.usable_length([dense, variant], shape) == 30
    assert calls_module.usable_length([dense, variant], Shape("decode", 1, 128, 16)) == 16


def test_a_part_that_the_kind_does_not_have_is_refused():
    with pytest.raises(BadSetting, match="prefill, decode"):
        prepared_calls({"x": tiny("gpt2")}, Shape("forward", 1), kind="decoder")
    pytest.raises(BadSetting, default_shapes, "diffusion").match("encoder-decoder")


def test_signature_is_equal_for_equal_work_only():
    model = tiny("bert")
    same = tiny("bert", seed=1)
    with torch.no_grad():
        same.bert.encoder.layer[0].output.dense.weight.zero_()
    assert shape_signature(model) == shape_signature(same)
    weight = model.bert.encoder.layer[0].output.dense.weight.detach()
    variants = {shape_signature(model)}
    others = [weight.half(), weight[:, :20], weight.t().contiguous().t(), weight.to_sparse_csr()]
    changes = [("output.dense", "weight", nn.Parameter(other)) for other in others]
    changes += [("output", "dense", nn.Identity()), ("attention.self", "num_attention_heads", 2)]
    for place, name, value in changes:
        changed = tiny("bert")
        setattr(changed.bert.encoder.layer[0].get_submodule(place), name, value)
        variants.add(shape_signature(changed))
    variants.add(shape_signature(tiny("bert", "classification")))
    assert len(variants) == 8
    assert shape_signature(tiny("albert")) != shape_signature(tiny("albert", num_hidden_layers=3))


CEILING = {"gflops_per_s": 100.0, "bandwidth_gb_per_s": 10.0}
SDPA = [family for family in FAMILIES if family not in ("gpt_neo", "gemma2")]  # those two have eager only


def test_an_encoder_counted_by_hand():
    """d 32, two blocks, FFN 48, vocabulary 100, 7 tokens in each of 3 sentences; attention included."""
    tokens, d, width, vocabulary, length = 3 * 7, 32, 48, 100, 7
    block = 2 * tokens * (4 * d * d + 2 * d * width) + 2 * tokens * 2 * length * d
    head = 2 * tokens * (d * d + d * vocabulary)
    assert flops(tiny("bert"), kind="encoder", shape=Shape("forward", 3, 7)) == 2 * block + head


def test_a_decoded_token_counted_by_hand():
    """Grouped keys and values, gated FFN; step t attends to 7 + t tokens; 3 steps from 7 cached tokens."""
    d, kv, width, vocabulary, batch = 32, 16, 48, 100, 2
    weights = 2 * (2 * d * d + 2 * d * kv + 3 * d * width) + d * vocabulary
    attended = sum(7 + step for step in (1, 2, 3)) / 3
    by_hand = 2 * batch * (weights + 2 * 2 * d * attended)
    assert flops(tiny("llama"), kind="decoder", shape=Shape("decode", batch, 7, 3)) == by_hand


@pytest.mark.parametrize("family", SDPA)
def test_fused_attention_counts_as_much_as_eager(family):
    """torch's counter has no formula for the CPU's fused kernel, so by itself it would count none of it."""
    for shape in default_shapes(kind(family), length=9, batches=(2,)):
        counts = []
        for implementation in ("sdpa", "eager"):
            model = tiny(family)
            model.set_attn_implementation(implementation)
            counts.append(flops(model, kind=kind(family), shape=shape))
        assert counts[0] == counts[1] > 0


def test_zeros_do_not_lower_the_count_but_fewer_rows_do():
    model, shape = tiny("bert"), Shape("forward", 1, 7)
    dense = flops(model, kind="encoder", shape=shape)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.zero_()
    assert flops(model, kind="encoder", shape=shape) == dense
    assert flops(tiny("bert", intermediate_size=24), kind="encoder", shape=shape) < dense


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_integer_products_count_like_those_of_floats(family, monkeypatch):
    """They were taken for nothing once, which drew a quantized model far left of its dense one."""
    dense = tiny(family)
    rounded, _ = compress.get("int8-dynamic")(dense)
    for shape in default_shapes(kind(family)):
        small = Shape(shape.part, shape.batch, 7, 2)
        assert flops(rounded, kind=kind(family), shape=small) == flops(dense, kind=kind(family), shape=small)
    given = lambda *_, at_least: pytest.fail("raised") if at_least else CEILING  # noqa: E731
    monkeypatch.setattr(device, "ceiling", given)
    found = compute(rounded, kind=kind(family), shape=small, seconds=1e-9)
    assert found["matmul_share"] is None and found["flops"] > 0


def test_weights_read_leave_out_tables_that_are_only_looked_up():
    d, width, vocabulary = 32, 48, 100
    block = 4 * (d * d + d) + (d * width + width) + (width * d + d) + 4 * d
    bert = tiny("bert", None)
    pooler, norm = d * d + d, 2 * d
    position_ids = sum(buffer.nbytes for buffer in bert.buffers())
    assert weight_bytes_read(bert, Shape("forward", 1)) == 4 * (2 * block + pooler + norm) + position_ids
    llama = tiny("llama", tie_word_embeddings=True)
    untied = tiny("llama", tie_word_embeddings=False)
    shape = Shape("decode", 1)
    assert weight_bytes_read(llama, shape) == weight_bytes_read(untied, shape)
    assert weight_bytes_read(llama.bfloat16(), shape) == weight_bytes_read(untied, shape) / 2
    t5 = tiny("t5")
    whole = sum(p.nbytes for p in t5.parameters())
    embeddings = [m for m in t5.modules() if isinstance(m, torch.nn.Embedding)]
    tables = sum(m.weight.nbytes for m in embeddings if m.num_embeddings == 8)
    parts = weight_bytes_read(t5, Shape("encode", 1)) + weight_bytes_read(t5, Shape("decode", 1))
    assert parts == whole - tables
    assert weight_bytes_read(t5, Shape("decode", 1)) > 4 * vocabulary * d


def test_shares_are_of_the_machines_ceiling(monkeypatch):
    monkeypatch.setattr(device, "ceiling", lambda *_, **__: {"gflops_per_s": 10.0, "bandwidth_gb_per_s": 2.0})
    model, shape = tiny("bert"), Shape("forward", 8, 16)
    found = compute(model, kind="encoder", shape=shape, seconds=0.01)
    assert found["shape"] == "batch8"
    assert found["gflops_per_s"] == pytest.approx(found["flops"] / 0.01 / 1e9)
    assert found["matmul_share"] == pytest.approx(found["gflops_per_s"] / 10)
    assert found["bandwidth_share"] == pytest.approx(weight_bytes_read(model, shape) / 0.01 / 2e9)
    unknown = compute(model, kind="encoder", shape=shape, seconds=None)
    assert unknown["flops"] == found["flops"]
    assert unknown["matmul_share"] is unknown["bandwidth_share"] is None


def test_parameters_count_once_and_zeros_show(tmp_path):
    model = tiny("gpt2")
    by_hand = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    before = memory(model, None)["nonzero_parameters"]
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, :5] = 0.0
        model.transformer.h[0].mlp.c_fc.weight[0, 5] = -0.0
    folder = storage.save(model, tmp_path / "saved")
    found = memory(model, folder)
    assert found["parameters"] == by_hand
    assert found["nonzero_parameters"] == before - 5 * 32 - 1
    assert found["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["formats"]["dense"] == 4 * by_hand
    assert found["peak_bytes"] is None


@pytest.mark.slow
def test_peak_of_a_fresh_process_sees_the_model_and_not_its_parent(tmp_path):
    """Slow: two starts of torch. 77 MB more weights must show, this process's 1.2 GB must not."""
    shape = Shape("forward", 1, 8)
    small = storage.save(tiny("bert", None), tmp_path / "small")
    large = storage.save(tiny("bert", None, intermediate_size=150_000), tmp_path / "large")
    weight_bytes = 2 * 2 * 150_000 * 32 * 4
    ballast = torch.ones(300_000_000)
    least, more = (peak_memory(folder, kind="encoder", shape=shape) for folder in (small, large))
    assert peak_rss_bytes() > 4 * len(ballast)
    assert least["peak_kind"] == "rss"
    assert 50e6 < least["baseline_bytes"] <= least["peak_bytes"] < 2 * len(ballast)
    assert 0.8 * weight_bytes < more["peak_bytes"] - least["peak_bytes"] < 3 * weight_bytes


def test_a_peak_is_of_integers_held_as_they_are_asked_for(tmp_path, monkeypatch, capsys):
    folder, loaded, load = storage.save(tiny("bert", None), tmp_path / "saved"), [], storage.load

    def here(command, **_):  # in place of a process
        peak.main(*command[3:])
        return subprocess.CompletedProcess(command, 0, stdout=capsys.readouterr().out)

    monkeypatch.setattr(subprocess, "run", here)
    monkeypatch.setattr(
        storage, "load", lambda place, **settings: loaded.append(settings) or load(place, **settings)
    )
    for settings in ({}, {"unpack": False}):
        peak_memory(folder, kind="encoder", shape=Shape("forward", 1, 8), **settings)
    assert [settings["unpack"] for settings in loaded] == ["auto", False]


@pytest.mark.slow  # starts torch and transformers
def test_a_failing_process_says_why(tmp_path):
    (tmp_path / "compression.json").write_text("{broken")
    with pytest.raises(StudyError, match=r"compression\.json is damaged"):
        peak_memory(tmp_path, kind="encoder", shape=Shape("forward", 1))


def test_a_process_ended_for_want_of_memory_says_what_to_do(monkeypatch, tmp_path):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="a warning of a library")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(StudyError, match="signal 9.*memory runs out.*timed=False"):
        peak_memory(tmp_path, kind="encoder", shape=Shape("forward", 1))


def sparse_weight(sparsity: float, shape=(64, 32), seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw)
    return weight * (torch.rand(shape, generator=draw) >= sparsity)


HERE = [name for name in KERNELS if name != "semi_structured"]  # that one needs a CUDA device


def test_the_semi_structured_kernel_is_left_out_without_a_cuda_device():
    weight = torch.tensor([1.0, 0, 2, 0]).repeat(32, 16)
    found = linear_kernels(weight, rows=(3,), calls=2, kernels=("semi_structured", "csr"))
    expected = ["dense_fp32", "csr"] if not weight.is_cuda else ["dense_fp32", "semi_structured", "csr"]
    assert [entry["kernel"] for entry in found] == expected
    odd = linear_kernels(sparse_weight(0.9, (40, 32)), rows=(3,), calls=2, kernels=("bsr", "csr"))
    assert [entry["kernel"] for entry in odd] == ["dense_fp32", "csr"]  # no multiple of a block
    unknown = {"kernels": ("cusparse",)}
    pytest.raises(BadSetting, linear_kernels, sparse_weight(0.5), **unknown).match("rows_removed")


@pytest.mark.parametrize("bias", [None, torch.arange(64.0)])
@pytest.mark.parametrize("name", HERE)
def test_every_kernel_computes_the_dense_map(name, bias):
    weight, x = sparse_weight(0.7), torch.randn(5, 32)
    offset = torch.zeros(64) if bias is None else bias
    kernel = KERNELS[name](x, weight, offset)
    expected = F.linear(x, weight, bias)
    tolerance = 0.05 if name == "dense_bf16" else 1e-4
    for _ in range(2):  # a reused output buffer must not add up
        result = kernel.run().float()
        torch.testing.assert_close(
            result, expected[:, : kernel.kept], atol=tolerance * expected.abs().max().item(), rtol=0
        )


def test_rows_removed_has_as_many_weights_as_there_are_nonzeros():
    weight = torch.zeros(64, 32)
    weight.view(-1)[:512] = 1.0
    assert KERNELS["rows_removed"](torch.randn(3, 32), weight, torch.zeros(64)).kept == 16
    assert KERNELS["rows_removed"](torch.randn(3, 32), torch.zeros(64, 32), torch.zeros(64)).kept == 1


def test_entries_are_complete_with_dense_first():
    found = linear_kernels(sparse_weight(0.9).t(), rows=(3, 7), calls=3, kernels=tuple(KERNELS))
    names = ["dense_fp32", *HERE]
    assert [(e["kernel"], e["rows"]) for e in found] == [(name, rows) for rows in (3, 7) for name in names]
    for entry in found:
        assert entry["ratio_low"] <= entry["ratio"] <= entry["ratio_high"]
        assert entry["median_ms"] > 0 and entry["noise_floor"] >= 0 and entry["error"] < 0.02
    assert found[0]["ratio"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w, b: Kernel(lambda: F.linear(x, w * 1.01, b)),
        lambda x, w, b: Kernel(lambda: F.linear(x, w, b).t()),
        lambda x, w, b: Kernel(lambda: F.linear(x, w, b) * float("nan")),
    ],
)
def test_a_wrong_kernel_is_refused_and_not_timed(wrong, monkeypatch):
    monkeypatch.setitem(KERNELS, "wrong", wrong)
    monkeypatch.setattr(kernels, "interleave", lambda *_, **__: pytest.fail("timed a wrong kernel"))
    with pytest.raises(StudyError, match="kernel wrong"):
        linear_kernels(sparse_weight(0.5), rows=(4,), kernels=("csr", "wrong"))


@pytest.mark.parametrize(
    "family, kind", [("bert", "encoder"), ("gpt2", "decoder"), ("t5", "encoder-decoder")]
)
def test_shares_of_every_part_of_the_work_add_up_to_one(family, kind):
    for shape in default_shapes(kind, length=16, batches=(2,)):
        found = time_shares(tiny(family), kind=kind, shape=shape, calls=1)
        assert set(found) == {"products", "attention", "rest"}
        assert sum(found.values()) == pytest.approx(1) and all(0 <= one <= 1 for one in found.values())
        assert found["products"] > 0 and found["attention"] > 0 and found["rest"] > 0


def test_the_operations_a_model_runs_are_recognised():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        q = torch.randn(1, 2, 8, 4)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.nn.functional.linear(torch.randn(3, 8), torch.randn(5, 8), torch.randn(5))
    keys = {event.key for event in profiled.key_averages()}
    assert keys & PRODUCTS and any(part in key for part in ATTENTION for key in keys)


def test_the_examples_to_choose_on_are_measured_beside_those_of_the_report(quick, tmp_path):
    dense, task = subject("bert")
    chosen_on = SimpleNamespace(**vars(task) | {"answers": (task.answers + np.arange(40) // 30) % 99})
    task.selection = lambda: chosen_on
    store = RowStore(tmp_path / "rows")
    first = measure(dense.model, dense, task, parts=("quality",))
    assert (first.quality["value"], first.selection["value"]) == (1.0, 0.75)
    assert set(first.scores) == {"correct", "selection.correct"} and first.selection["difference"] is None
    store.append(row("0" * 16, first))
    store.save_scores("0" * 16, first.scores)
    broken = copy.deepcopy(dense.model)
    torch.nn.init.normal_(broken.get_input_embeddings().weight)
    baseline = DenseMeasurement(row("0" * 16, first), store.load_scores("0" * 16))
    second = measure(broken, dense, task, baseline=baseline, parts=("quality",))
    for part, value in ((second.quality, 1.0), (second.selection, 0.75)):
        assert part["difference"]["value"] == pytest.approx(part["value"] - value)
        assert part["difference"]["bound"] >= -part["difference"]["value"]
    store.append(row("1" * 16, second))
    assert store.find("1" * 16)["selection"] == second.selection
