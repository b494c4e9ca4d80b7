import copy
import gc
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from lmcompress.errors import BadSetting
from lmcompress.measure import calls as calls_module
from lmcompress.measure.calls import Call, Shape, default_shapes, prepared_calls, shape_signature
from lmcompress.measure.compute import flops, weight_bytes_read
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
from lmcompress.models.serialization import plain_values
from tests.tiny_models import DECODERS, FAMILIES, kind, tiny

FIELDS = {
    *(
        "batch",
        "length",
        "median_ms",
        "low_ms",
        "high_ms",
        "p5_ms",
        "p95_ms",
        "dense_ms",
        "ratio",
        "ratio_low",
    ),
    *("ratio_high", "aa_ratio", "aa_low", "aa_high", "noise_floor"),
}


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


def test_a_real_sleep_of_twice_the_length_is_found_to_be_about_twice():
    work = {
        name: Call(lambda s=s: time.sleep(s)) for name, s in ((DENSE, 0.01), (COPY, 0.01), (VARIANT, 0.02))
    }
    assert 1.6 < summarise(interleave(work, calls=15))["ratio"] < 2.4


def test_only_run_is_timed_and_it_is_divided_by_its_steps():
    machine = FakeMachine()
    work = Call(machine.call("run", 0.4).run, machine.call("prepare", 5.0).run, steps=16)
    assert interleave({"x": work}, calls=3, warmup=1, clock=machine.clock)["x"] == pytest.approx([0.025] * 3)
    assert machine.order == ["prepare", "run"] * 4


def test_what_takes_too_long_is_called_less_often_but_warmed_up_and_not_once_only():
    machine = FakeMachine()
    work = {name: machine.call(name, 1.0) for name in (DENSE, COPY)}
    assert {
        len(times) for times in interleave(work, calls=30, clock=machine.clock, patience_s=0.0).values()
    } == {10}
    assert len(machine.order) == 2 * 11  # one round to warm up
    assert {
        len(times) for times in interleave(work, calls=3, clock=machine.clock, patience_s=0.0).values()
    } == {3}
    assert {len(times) for times in interleave(work, calls=30, clock=machine.clock).values()} == {30}


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


def test_the_aa_interval_covers_one_in_about_95_of_100_runs_despite_drift():
    def covers(seed: int) -> bool:
        machine = FakeMachine(seed=seed, noise=0.08, drift=1.0)
        found = summarise(timed(machine, {DENSE: 1.0, COPY: 1.0, VARIANT: 0.7}, seed=seed))
        return found["aa_low"] <= 1 <= found["aa_high"]

    share = np.mean([covers(seed) for seed in range(200)])
    assert 0.90 <= share <= 0.99


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


def test_identical_work_is_hardly_ever_called_a_change():
    def said(seed: int) -> str:
        machine = FakeMachine(seed=seed, noise=0.1, drift=0.5)
        found = summarise(timed(machine, {DENSE: 1.0, COPY: 1.0, VARIANT: 1.0}, seed=seed))
        return verdicts({"calls": 30, "shapes": {"x": found}})["x"]

    assert Counter(said(seed) for seed in range(100))["no measurable change"] >= 95


def test_without_a_variant_the_dense_model_is_reported_as_baseline():
    found = summarise(timed(FakeMachine(noise=0.1), {DENSE: 0.2, COPY: 0.2}))
    assert found["ratio"] is None and found["median_ms"] == found["dense_ms"]
    assert verdicts({"shapes": {"batch1": found}}) == {"batch1": "baseline"}


def test_the_garbage_collector_is_off_while_timing_and_back_after(monkeypatch):
    states = []
    interleave(
        {"x": Call(lambda: states.append(gc.isenabled()), lambda: states.append(gc.isenabled()))},
        calls=2,
        warmup=0,
    )
    assert states == [True, False, True, False] and gc.isenabled()

    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleave({"x": Call(fail)}, calls=1)
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
    model.register_forward_pre_hook(
        lambda *_: seen.append((bool(held), model.training, torch.is_grad_enabled()))
    )
    latency(model, kind="encoder", shapes=[Shape("forward", 1, 5)], calls=2)
    assert set(seen) == {(True, False, False)} and not held and model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_timed_at_every_shape(family):
    model = tiny(family)
    shapes = [Shape(s.part, s.batch, 7, 3) for s in default_shapes(kind(family), batches=(1, 2))]
    found = latency(model, copy.deepcopy(model), kind=kind(family), calls=2, shapes=shapes)
    assert (
        found["calls"] == 2
        and found["dtype"] == "float32"
        and found["device"] == "cpu"
        and found["threads"] >= 1
    )
    expected = {
        "encoder": ["batch1", "batch2"],
        "decoder": ["prefill_b1", "decode_b1", "prefill_b2", "decode_b2"],
        "encoder-decoder": ["encode_b1", "decode_b1", "encode_b2", "decode_b2"],
    }
    assert list(found["shapes"]) == expected[kind(family)]
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
    """Everything a forward may leave changed: module classes, plain attributes, config, the tensors
    themselves.
    """
    tensors = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return [
        model.config.to_dict(),
        tensors,
        {name: (type(module), plain_values(module)) for name, module in model.named_modules()},
    ]


class Switching(nn.Module):
    """An attention that exchanges itself, a buffer, the config and its mode at a short input, as BigBird's
    does.
    """

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
    if family == "switching":
        model = tiny("bert").train()
        model.bert.encoder.layer[0].attention.self = Switching(
            model.bert.encoder.layer[0].attention.self, model.config
        )
    else:
        model = tiny(family)
    before, training = state_of(model), model.training
    latency(model, model, kind=kind("bert" if family == "switching" else family), calls=1)
    assert state_of(model) == before and model.training == training
    assert model.register_forward_hook(
        lambda *_: None
    )  # its tables are what they were, not copies of another kind
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
            whole = model(input_ids=ids, decoder_input_ids=torch.cat([ids[:, :1], ids[:, :3]], dim=1)).logits[
                :, 1:
            ]
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
    with pytest.raises(BadSetting, match="encoder-decoder"):
        default_shapes("diffusion")


def test_signature_is_equal_for_equal_work_only():
    model = tiny("bert")
    same = tiny("bert", seed=1)
    with torch.no_grad():
        same.bert.encoder.layer[0].output.dense.weight.zero_()
    assert shape_signature(model) == shape_signature(same)
    weight = model.bert.encoder.layer[0].output.dense.weight.detach()
    variants = {shape_signature(model)}
    for change in (
        lambda layer: layer.output.dense.__setattr__("weight", nn.Parameter(weight.half())),
        lambda layer: layer.output.dense.__setattr__("weight", nn.Parameter(weight[:, :20])),
        lambda layer: layer.output.dense.__setattr__("weight", nn.Parameter(weight.t().contiguous().t())),
        lambda layer: layer.output.dense.__setattr__("weight", nn.Parameter(weight.to_sparse_csr())),
        lambda layer: layer.output.__setattr__("dense", nn.Identity()),
        lambda layer: layer.attention.self.__setattr__("num_attention_heads", 2),
    ):
        changed = tiny("bert")
        change(changed.bert.encoder.layer[0])
        variants.add(shape_signature(changed))
    variants.add(shape_signature(tiny("bert", "classification")))
    assert len(variants) == 8
    assert shape_signature(tiny("albert")) != shape_signature(tiny("albert", num_hidden_layers=3))
