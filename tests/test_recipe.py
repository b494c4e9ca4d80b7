"""Every switch of the training recipe does what it says, and leaves nothing behind."""

import contextlib
import copy
import math
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import Stopped, losses, stop_after
from tiny_models import FAMILIES, VOCAB, inputs, kind, reloaded, tiny
from torch import nn

from lmcompress.errors import BadSetting, NothingTouched, UnknownFamily
from lmcompress.experiments import ablation
from lmcompress.experiments.context_length import longer
from lmcompress.experiments.sheared_training import published
from lmcompress.models.anatomy import anatomy, prunable
from lmcompress.models.packed import QuantizedLinear, dequantize, quantize_nf4
from lmcompress.models.serialization import plain_values
from lmcompress.train import TrainSpec, fit, launch
from lmcompress.train.distillation import distil
from lmcompress.train.lora import Lora, adapted, attach, merged
from lmcompress.train.spec import layer_powers, optimizer_for
from lmcompress.train.switches import applied

NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}


def texts(count=24, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCAB, rng.integers(4, 14)).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def spec(**changes):
    settings = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 2}
    return TrainSpec(**({"features": texts()} | settings | changes))


def snapshot(model):
    """Everything of the modules that a switch could leave changed."""
    values = {name: plain_values(module) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = copy.deepcopy(model.config.to_dict())
    return values, hooks, kinds, wanted, config, model.config._attn_implementation


def output(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        found = model(**inputs(model))
    return next(value for name, value in found.items() if name in ("logits", "last_hidden_state"))


def test_each_block_learns_slower_than_the_next():
    model = tiny("llama", tie_word_embeddings=False)
    changes = {"layer_decay": 0.5, "learning_rate": 0.8, "min_learning_rate": 0.08, "steps": 4}
    powers = layer_powers(model, spec(layer_decay=0.5))
    optimizer, schedule = optimizer_for(dict(model.named_parameters()), spec(**changes), powers)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.lm_head.weight)] == rates[id(model.model.norm.weight)] == 0.8
    for block, rate in ((1, 0.4), (0, 0.2)):
        assert {rates[id(p)] for p in model.model.layers[block].parameters()} == {rate}
    assert rates[id(model.model.embed_tokens.weight)] == pytest.approx(0.1)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    ends = [group["lr"] for group in optimizer.param_groups]
    assert max(ends) == ends[0] == pytest.approx(0.08) and min(ends) == pytest.approx(0.01)
    vectors = [g for g in optimizer.param_groups if all(p.ndim < 2 for p in g["params"])]
    assert vectors and all(group["weight_decay"] == 0 for group in vectors)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_its_place(family):
    model = tiny(family)
    power, found = layer_powers(model, spec(layer_decay=0.5)), anatomy(model)
    assert {power(f"{found.blocks[-1].name}.x")} == {1}
    inside = tuple(
        f"{block.name}." for block in found.blocks
    )  # T5's first block holds its table of distances
    tables = [one.name for one in found.embeddings if not one.name.startswith(inside)]
    assert {power(f"{name}.weight") for name in tables} == {len(found.blocks) + 1}
    assert {power(f"{one.name}.weight") for one in found.heads} <= {0}
    names = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    positions = [n for n in names if "position" in n or "wpe" in n]
    assert {power(n) for n in positions} <= {len(found.blocks) + 1}


def test_layer_decay_moves_the_weights_by_those_rates():
    """AdamW's first step is lr · sign(g), so the movements are the rates."""
    model = tiny("llama", tie_word_embeddings=False)
    before = copy.deepcopy(model.state_dict())
    fit(model, spec(steps=1, layer_decay=0.5, weight_decay=0.0, clip=1e9, learning_rate=1e-3))
    for name, rate in (
        ("lm_head", 1e-3),
        ("model.layers.1.mlp.up_proj", 5e-4),
        ("model.layers.0.mlp.up_proj", 2.5e-4),
    ):
        moved = (model.state_dict()[f"{name}.weight"] - before[f"{name}.weight"]).abs()
        assert moved.median().item() == pytest.approx(rate, rel=1e-2), name


def test_record_holds_the_highest_rate_and_a_run_with_decay_resumes(tmp_path, monkeypatch):
    settings = spec(layer_decay=0.7, warmup_steps=2, attention_dropout=0.3, hidden_dropout=0.2)
    expected = fit(tiny("llama"), settings)
    assert max(step["lr"] for step in expected.steps) == 1e-3
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        fit(tiny("llama"), replace(settings, checkpoint=tmp_path))
    history = fit(tiny("llama"), replace(settings, checkpoint=tmp_path))
    assert losses(history) == losses(expected)
    assert [s["lr"] for s in history.steps] == [s["lr"] for s in expected.steps]


def gradients(model, settings):
    with applied(model, settings):
        model.train()
        torch.manual_seed(1)
        batch = {k: v for k, v in inputs(model, padded=True).items() if k != "decoder_input_ids"}
        model(**batch, labels=batch["input_ids"]).loss.backward()
    model.eval()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "albert"])
def test_gradient_checkpointing_gives_the_same_gradients_with_dropout_on(family):
    model = tiny(family)
    before = snapshot(model)
    calls = []
    hook = anatomy(model).blocks[0].attention.o.module.register_forward_hook(lambda *_: calls.append(1))
    plain = gradients(model, spec(attention_dropout=0.2))
    once, _ = len(calls), calls.clear()
    again = gradients(model, spec(attention_dropout=0.2, gradient_checkpointing=True))
    hook.remove()
    assert (once, len(calls)) == (1, 2)  # the block was computed a second time
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert (value - again[name]).abs().max() <= 1e-4 * value.abs().max() + 1e-7, name
    assert snapshot(model) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["attention_dropout", "hidden_dropout"])
def test_dropout_acts_while_training_only_and_is_put_back(family, which):
    model = tiny(family, attn_implementation="eager")
    quiet, before = output(model), snapshot(model)
    with applied(model, spec(**NO_DROPOUT)):
        assert torch.allclose(output(model.train()), quiet, atol=1e-5)
    with applied(model, spec(**NO_DROPOUT | {which: 0.5})):
        assert not torch.allclose(output(model.train(), 1), output(model, 2), atol=1e-3)
        assert torch.allclose(output(model.eval(), 1), quiet, atol=1e-5)
    assert snapshot(model.eval()) == before


def test_attention_dropout_leaves_what_it_should_not_touch():
    """Half the probabilities dropped, the rest doubled; the feed-forward sees no dropout."""
    model = tiny("gpt2", attn_implementation="eager")
    with applied(model, spec(attention_dropout=0.5)):
        rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert {rate for name, rate in rates.items() if "attn_dropout" in name} == {0.5}
    assert {rate for name, rate in rates.items() if "attn_dropout" not in name} == {0.1}


def test_hidden_dropout_where_the_family_has_none_falls_on_weights_adapters_and_integers():
    for lora in (None, Lora(), Lora(bits=4)):
        model, shares = tiny("llama"), []
        adapters = adapted(model, lora) if lora else contextlib.nullcontext()
        with adapters, applied(model, spec(hidden_dropout=0.3), anatomy(tiny("llama"))):
            for block in model.model.layers:
                block.mlp.down_proj.register_forward_hook(
                    lambda _, __, out, to=shares: to.append((out == 0).float().mean().item())
                )
            output(model.train())
            output(model.eval())
        assert shares == pytest.approx([0.3, 0.3, 0, 0], abs=0.07)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementation_is_set_for_the_run(family):
    model = tiny(family)
    before, seen = snapshot(model), model.config._attn_implementation
    expected = output(model)
    with applied(model, spec(attention="eager")):
        assert model.config._attn_implementation == "eager"
        assert torch.allclose(output(model), expected, atol=1e-4)
    assert snapshot(model) == before and model.config._attn_implementation == seen


def test_switches_are_undone_when_training_fails(monkeypatch):
    model = tiny("llama")
    before = snapshot(model)
    stop_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        fit(model, spec(gradient_checkpointing=True, hidden_dropout=0.1, attention="eager", lora=Lora()))
    model.eval()
    assert snapshot(model) == before


def test_checkpointed_run_equals_the_plain_one_and_its_model_is_saved_as_any(tmp_path):
    plain, again = tiny("llama"), tiny("llama")
    settings = spec(attention_dropout=0.1, hidden_dropout=0.1)
    expected = fit(plain, settings)
    found = fit(again, replace(settings, gradient_checkpointing=True))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    reloaded(again, tmp_path / "m")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, 4])
def test_only_adapters_learn_and_merging_changes_no_output(family, bits):
    model = tiny(family, head="classification" if kind(family) == "encoder" else "lm")
    model.config.problem_type = "single_label_classification"  # else set by the first loss
    before, start, maps = snapshot(model), copy.deepcopy(model.state_dict()), prunable(model)
    twin = copy.deepcopy(model)
    with adapted(model, Lora(rank=3, alpha=5.0, bits=bits)):
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learning and all("lora_" in name for name in learning)
        assert len(learning) == 2 * len(maps)
        integers = {n: m.packed.clone() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        assert len(integers) == (len(maps) if bits else 0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.05)
        batch = {k: v for k, v in inputs(model).items() if k != "decoder_input_ids"}
        labels = batch["input_ids"][:, 0] % 2 if kind(family) == "encoder" else batch["input_ids"]
        model(**batch, labels=labels).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        for name, packed in integers.items():
            assert torch.equal(model.get_submodule(name).packed, packed)
        unmerged = output(model)
    assert torch.allclose(output(model), unmerged, atol=2e-4)
    assert not torch.allclose(output(twin), unmerged, atol=1e-3)
    assert snapshot(model) == before
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {f"{one.name}.weight" for one in maps}


def test_merged_weight_by_hand():
    """W = I, A = (1, 2), B = (3, 0)ᵀ, alpha = 4, rank 1: W + 4 B A."""
    model = tiny("llama")
    one = prunable(model)[0]
    layer = one.module
    attach(model, [one], Lora(rank=1, alpha=4.0))
    wrapped = model.get_submodule(one.name)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(32))
        wrapped.lora_A["default"].weight.zero_()[0, :2] = torch.tensor([1.0, 2.0])
        wrapped.lora_B["default"].weight.zero_()[0, 0] = 3.0
    expected = torch.eye(32)
    expected[0, :2] += torch.tensor([12.0, 24.0])
    assert torch.equal(merged(wrapped, conv1d=False).weight, expected)


def test_qlora_begins_at_the_nf4_weights():
    model = tiny("gpt2")
    one = prunable(model)[0]
    integers, scales = quantize_nf4(one.weight2d(), group_size=64)
    expected = dequantize(integers, scales, None, group_size=64, nf4=True)
    with adapted(model, Lora(bits=4)):
        pass  # the adapters' B is 0
    found = next(m for m in prunable(model) if m.name == one.name)
    assert torch.allclose(found.weight2d(), expected, atol=1e-7)


def test_integer_weights_give_the_gradient_of_floats_and_keep_no_floats():
    weight, x = torch.randn(6, 10), torch.randn(3, 5, 10, requires_grad=True)
    integers, scales = quantize_nf4(weight, group_size=4)
    from lmcompress.models.packed import pack

    layer = QuantizedLinear(pack(integers, 4), scales, None, width=10, bits=4, group_size=4, nf4=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = layer(x)
    assert torch.Size([6, 10]) not in kept and torch.Size([10, 6]) not in kept
    out.square().sum().backward()
    expected = 2 * (x @ layer.dequantized().t()) @ layer.dequantized()
    assert torch.allclose(x.grad, expected, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 4])
def test_adapters_learn_resume_and_are_saved(tmp_path, monkeypatch, bits):
    settings = spec(steps=8, learning_rate=1e-2, lora=Lora(rank=4, dropout=0.1, bits=bits))
    whole = tiny("llama")
    expected = fit(whole, settings)
    assert losses(expected)[-1] < losses(expected)[0]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 5)
        fit(tiny("llama"), replace(settings, checkpoint=tmp_path / "c"))
    resumed = tiny("llama")
    assert losses(fit(resumed, replace(settings, checkpoint=tmp_path / "c"))) == losses(expected)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))
    with pytest.raises(BadSetting, match="other settings"):  # another base is another run
        fit(tiny("llama", seed=1), replace(settings, checkpoint=tmp_path / "c"))
    reloaded(resumed, tmp_path / "m")


def test_what_adapters_and_switches_cannot_do_is_refused():
    model, shared = tiny("llama"), tiny("llama")
    name = prunable(model)[0].name + ".weight"
    pytest.raises(BadSetting, fit, tiny("albert"), spec(gradient_checkpointing=True)).match("Albert")
    pytest.raises(BadSetting, fit, model, spec(lora=Lora()), masks={name: torch.ones(32, 32)}).match("fits")
    pytest.raises(BadSetting, distil, tiny("llama"), model, spec(lora=Lora())).match("distillation")
    shared.model.layers[1].mlp.up_proj = shared.model.layers[0].mlp.up_proj
    pytest.raises(BadSetting, fit, shared, spec(lora=Lora())).match("share")
    for one in prunable(model):
        model.set_submodule(one.name, nn.Identity())
    pytest.raises((NothingTouched, UnknownFamily), fit, model, spec(lora=Lora()))
    for wrong in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"bits": 8}):
        pytest.raises(BadSetting, Lora, **wrong).match(next(iter(wrong)))


def test_distillation_takes_the_switches():
    teacher, student = tiny("llama", seed=3), tiny("llama")
    rates = []
    student.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, _: rates.append(module.attention_dropout), prepend=True
    )
    distil(
        teacher, student, spec(steps=1, attention_dropout=0.25, layer_decay=0.5, gradient_checkpointing=True)
    )
    assert set(rates) == {0.25} and student.model.layers[0].self_attn.attention_dropout == 0.0


def test_published_recipe_is_a_training_spec():
    found = TrainSpec(features=texts(), **published())
    assert (found.learning_rate, found.min_learning_rate, found.warmup_steps) == (1e-4, 1e-5, 2000)
    assert (found.batch_size, found.micro_batches, found.steps) == (128, 4, 100_000)
    assert (found.betas, found.weight_decay, found.clip) == ((0.9, 0.999), 0.01, 1.0)
    assert found.dtype == torch.bfloat16 and found.attention_dropout == found.hidden_dropout == 0.1
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer, schedule = optimizer_for({"x": parameter}, found)
    parameter.grad = torch.zeros_like(parameter)
    rate = {}
    for step in range(100_001):
        rate[step] = schedule.get_last_lr()[0]
        schedule._step_count += 1  # without an optimizer step there would be a warning
        schedule.step()
    assert rate[0] == 0 and rate[1000] == pytest.approx(5e-5) and rate[2000] == pytest.approx(1e-4)
    assert rate[51_000] == pytest.approx(5.5e-5) and rate[100_000] == pytest.approx(1e-5)
    assert optimizer.defaults["betas"] == (0.9, 0.999)


ROTARY = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox"]


def angles(model, positions):
    rotary = model.base_model.rotary_emb
    more = {"layer_type": "full_attention"} if "full_attention" in model.config.rope_parameters else {}
    return rotary(torch.zeros(1), torch.as_tensor([positions]), **more)


@pytest.mark.parametrize("family", ROTARY)
def test_linear_stretching_is_the_old_model_at_divided_positions(family):
    model, long = tiny(family), longer(tiny(family), 4.0)
    for before, after in zip(angles(model, [0, 5, 31]), angles(long, [0, 20, 124])):
        assert torch.allclose(before, after, atol=1e-5)
    assert long.config.max_position_embeddings == 256
    assert output(long).isfinite().all()


@pytest.mark.parametrize("family", ROTARY[:-1])  # GPT-NeoX turns a quarter of a head: one pair of these
def test_dynamic_stretching_changes_long_texts_only(family):
    model, long = tiny(family), longer(tiny(family), 3.0, "dynamic")
    for before, after in zip(angles(model, list(range(64))), angles(long, list(range(64)))):
        assert torch.allclose(before, after, atol=1e-6)
    width = 2 * long.base_model.rotary_emb.original_inv_freq.numel() if family == "llama" else None
    found = angles(long, list(range(160)))[0]
    if width:  # base · (factor · length / trained - (factor - 1)) ^ (width / (width - 2))
        base = 10_000 * (3 * 160 / 64 - 2) ** (width / (width - 2))
        frequencies = base ** (-torch.arange(0, width, 2) / width)
        expected = torch.outer(torch.arange(160.0), frequencies).cos()
        assert torch.allclose(found[0, :, : width // 2], expected, atol=1e-4)
    assert not torch.allclose(found, angles(model, list(range(160)))[0], atol=1e-3)


def test_yarn_divides_slow_angles_keeps_fast_ones_and_sharpens():
    """With beta 32 and 1: fastest kept, slowest divided, cos multiplied by .1 ln 8 + 1."""
    sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 2048}
    model = tiny("llama", **sizes)
    before = model.model.rotary_emb.inv_freq.clone()
    after = longer(model, 8.0, "yarn").model.rotary_emb
    ratio = before / after.inv_freq
    turns = 2048 * before / (2 * math.pi)
    assert torch.allclose(ratio[turns > 64], torch.ones(1))
    assert torch.allclose(ratio[turns < 0.5], torch.tensor(8.0))
    assert (ratio[1:] >= ratio[:-1] - 1e-6).all()
    assert after.attention_scaling == pytest.approx(0.1 * math.log(8) + 1)
    assert model.config.max_position_embeddings == 8 * 2048


def test_positions_that_cannot_be_stretched_are_refused():
    pytest.raises(UnknownFamily, longer, tiny("gpt2"), 2.0).match("rotary")
    pytest.raises(BadSetting, longer, longer(tiny("llama"), 2.0), 2.0).match("already")
    for wrong in ({"factor": 1.0}, {"factor": 2.0, "kind": "best"}):
        pytest.raises(BadSetting, longer, tiny("llama"), **wrong).match("kinds are")


def test_a_switch_runs_by_itself_from_the_same_weights(monkeypatch):
    def here(command, **_):  # a fresh process costs seconds; tests of the sheared recipe start one
        launch.run(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, stdout='{"peak_bytes": 1, "peak_kind": "rss"}\n')

    monkeypatch.setattr(launch.subprocess, "run", here)
    model = tiny("llama")
    for switch in ("baseline", "QLoRA", "constant rate"):
        row = ablation.switched(model, spec(steps=4), switch)
        changed, fields = ablation.with_switch(tiny("llama"), spec(steps=4), switch)
        alone = losses(fit(changed, replace(spec(steps=4), **fields)))
        assert row["loss"] == pytest.approx(alone[-1], rel=1e-6) and row["peak_bytes"] == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny("llama").parameters()))


def test_costs_of_a_run_by_hand():
    from lmcompress.train import History

    history = History([{"step": i, "loss": float(i), "tokens": 10 * i, "seconds": i} for i in range(1, 21)])
    assert ablation._loss_at_end(history) == {"loss": 19.5, "tokens": 200}  # steps 19 and 20
    assert ablation._speed(history) == {"tokens_per_s": 10.0, "step_ms": 1000.0}


def test_compiled_blocks_train_alike_share_one_compilation_and_are_undone(monkeypatch):
    """With the graphs that are captured, but without the C++ compiler, which takes a minute."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    rows = [{"input_ids": row, "labels": row} for row in np.random.default_rng(0).integers(3, VOCAB, (8, 12))]
    plain, again = (tiny("llama", num_hidden_layers=3) for _ in range(2))
    before = snapshot(again)
    settings = spec(features=rows, steps=3)
    expected = losses(fit(plain, settings))
    counters.clear()
    assert losses(fit(again, replace(settings, compile=True))) == pytest.approx(expected, abs=1e-5)
    assert counters["stats"]["unique_graphs"] == 2, "one for all blocks, one for the loss"
    assert snapshot(again) == before
    assert all(block._compiled_call_impl is None for block in again.model.layers)


def test_no_keys_and_values_are_kept_while_training():
    model = tiny("llama")
    with applied(model, spec()):
        assert not model.config.use_cache
        assert model(input_ids=torch.tensor([[3, 4]])).past_key_values is None
    assert model.config.use_cache
