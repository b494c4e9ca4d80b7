"""Depth: influence against the hidden states, dropped and replaced blocks against other forwards."""

import copy
import json

import pytest
import torch
from tiny_models import FAMILIES, inputs, kind, reloaded, tiny

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.compress.calibration import replaced_forwards
from lmcompress.compress.depth import block_influence, mean_loss, replacement_matrix
from lmcompress.errors import BadData, BadSetting, NothingTouched, UnknownFamily
from lmcompress.models.anatomy import anatomy

MODULES = [family for family in FAMILIES if family != "albert"]


def batches_for(model):
    return [inputs(model, padded=True, seed=seed) for seed in (1, 2)]


def first_output(model):
    with torch.no_grad():
        options = {} if anatomy(model).kind == "encoder" else {"use_cache": False}
        return model(**inputs(model, padded=True), **options)[0]


def assert_close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5 * max(1.0, want.abs().max().item()), rtol=0)


def recorded_states(model, batch, stack):
    """What enters block 0, 1, ... and what the last one gives, by replacing the blocks' forwards."""
    blocks, states = anatomy(model).stacks[stack], []

    def recording(forward):
        def run(*args, **kwargs):
            output = forward(*args, **kwargs)
            entered = args[0] if args else kwargs["hidden_states"]
            states.append((entered, output[0] if isinstance(output, tuple) else output))
            return output

        return run

    with torch.no_grad(), replaced_forwards({b.module: recording(b.module.forward) for b in blocks}):
        model(**batch)
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_is_the_mean_distance_of_what_enters_and_leaves(family):
    model = tiny(family)
    batches = batches_for(model)
    for batch in batches:
        if "decoder_input_ids" in batch:
            batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
            batch["decoder_attention_mask"][1, -2:] = 0
    found = block_influence(model, batches)
    assert list(found) == list(anatomy(model).stacks)
    for stack, figures in found.items():
        of_decoder = kind(family) == "encoder-decoder" and stack == "decoder"
        name = "decoder_attention_mask" if of_decoder else "attention_mask"
        for i, figure in enumerate(figures):
            distances = []
            for batch in batches:
                before, after = recorded_states(model, batch, stack)[i]
                rows = batch[name].bool()
                cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
                distances.append((1 - cosine)[rows])
            assert figure == pytest.approx(torch.cat(distances).mean().item(), abs=1e-6)
            assert 0 < figure < 2
    assert len(found["encoder" if "encoder" in found else "decoder"]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lowest_block_goes_the_rest_is_a_forward_without_it_and_reloads(family, tmp_path):
    model = tiny(family)
    batches = batches_for(model)
    influence = block_influence(model, batches)
    dropped, report = compress.get("drop-blocks")(model, Context(calibration=batches), blocks=1)
    for stack, figures in influence.items():
        assert report.achieved["dropped"][stack] == [figures.index(min(figures))]
        assert report.achieved["blocks_left"][stack] == 1
    assert report.achieved["influence"] == influence and report.layers == len(influence)
    json.dumps(report.as_dict())
    if family != "albert":
        assert_close(first_output(dropped), skipping(model, report.achieved["dropped"]))
    reloaded(dropped, tmp_path / "model", report=report)


def skipping(model, which):
    """First output of a copy of `model` whose blocks at those positions hand on what they are given."""
    model = copy.deepcopy(model)
    found, identities = anatomy(model), {}
    for stack, positions in which.items():
        tables = [getattr(b.attention.module, "relative_attention_bias", None) for b in found.stacks[stack]]
        for i in positions:
            block = found.stacks[stack][i]
            identities[block.module] = identity_like(block.module.forward)
        if tables[0] is not None and 0 in positions:  # T5: the next block has to compute the position bias
            after = next(b for i, b in enumerate(found.stacks[stack]) if i not in positions).attention.module
            after.relative_attention_bias, after.has_relative_attention_bias = tables[0], True
    with replaced_forwards(identities):
        return first_output(model)


def identity_like(forward):
    def run(*args, **kwargs):
        state = args[0] if args else kwargs["hidden_states"]
        output = forward(*args, **kwargs)
        if not isinstance(output, tuple):
            return state
        bias = args[2] if len(args) > 2 and len(output) == 3 else None  # T5 hands position biases on
        cross = args[5] if len(args) > 5 and len(output) == 3 else None
        return (state, bias, cross) if len(output) == 3 else (state, *output[1:])

    return run


def test_which_fraction_and_stack_choose_and_bad_settings_are_refused():
    model = tiny("t5")
    context, drop = Context(calibration=batches_for(model)), compress.get("drop-blocks")
    half, report = drop(model, context, blocks=0.5, stack="decoder")
    assert list(report.achieved["dropped"]) == ["decoder"] and report.layers == 1
    assert [len(b) for b in anatomy(half).stacks.values()] == [2, 1]
    named, report = drop(model, context, which={"encoder": [1]})
    assert report.achieved["dropped"] == {"encoder": [1]}
    wrongs = [{"blocks": blocks} for blocks in (2, 0, 1.5, 0.1)] + [{}, {"blocks": 1, "stack": "middle"}]
    for wrong in (*wrongs, {"blocks": 1, "which": {"encoder": [0]}}, {"which": {"encoder": [7]}}):
        pytest.raises(BadSetting, drop, model, context, **wrong)
    pytest.raises(NothingTouched, drop, model, context, which={"encoder": []})
    pytest.raises(BadData, drop, model, Context(calibration=[]), blocks=1).match("no calibration batches")


def norm_of_output(model):
    return first_output(model).double().square().mean().item()


@pytest.mark.parametrize("family", MODULES)
def test_replaced_blocks_score_as_a_model_with_the_weights_copied_and_nothing_stays_changed(family):
    model = tiny(family)
    before, state = first_output(model), copy.deepcopy(model.state_dict())
    modules, keys = list(model.modules()), list(model.state_dict())
    for stack in anatomy(model).stacks:
        found = replacement_matrix(model, norm_of_output, stack=stack)
        json.dumps(found)
        for i in range(2):
            assert found["replaced"][i][i] == found["dense"] == norm_of_output(model)
            copied = norm_of_output(with_weights_copied(model, stack, i, 1 - i))
            assert found["replaced"][i][1 - i] == pytest.approx(copied, rel=1e-5)
            skipped = skipping(model, {stack: [i]}).double().square().mean().item()
            assert found["null"][i] == pytest.approx(skipped, rel=1e-5)
    assert modules == list(model.modules()) and keys == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(before, first_output(model))


def with_weights_copied(model, stack, i, j):
    """A copy whose block i has the weights, and what else tells them apart, of block j; T5's bias stays."""
    model = copy.deepcopy(model)
    blocks = anatomy(model).stacks[stack]
    to, of = blocks[i].module, blocks[j].module
    own, other = to.state_dict(), of.state_dict()
    to.load_state_dict({name: other.get(name, own[name]) for name in own}, strict=True)
    for mine, its in zip(to.modules(), of.modules()):
        for name in ("is_sliding", "sliding_window"):
            if name in vars(mine):
                setattr(mine, name, getattr(its, name))
        for name, buffer in mine._buffers.items():
            if buffer is not None:
                mine._buffers[name] = its._buffers[name].clone()
    return model


def test_the_model_is_restored_when_scoring_fails_and_hopeless_cases_are_refused():
    model = tiny("t5")
    before, calls = first_output(model), []

    def failing(one):
        calls.append(one)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return 0.0

    pytest.raises(RuntimeError, replacement_matrix, model, failing, stack="encoder")
    assert torch.equal(before, first_output(model))
    flags = [b.attention.module.has_relative_attention_bias for b in anatomy(model).stacks["encoder"]]
    assert flags == [True, False]
    with pytest.raises(UnknownFamily, match="one block module"):
        replacement_matrix(tiny("albert"), failing, stack="encoder")
    with pytest.raises(BadSetting, match="available: encoder"):
        replacement_matrix(tiny("bert"), failing, stack="decoder")


def test_the_mean_loss_weighs_batches_by_their_examples():
    model = tiny("gpt2")
    batches = [inputs(model, batch=n, seed=n) for n in (1, 3)]
    for batch in batches:
        batch["labels"] = batch["input_ids"]
    with torch.no_grad():
        each = [
            model(**{k: v[i : i + 1] for k, v in b.items()}).loss.item()
            for b in batches
            for i in range(len(b["labels"]))
        ]
    assert mean_loss(model, batches) == pytest.approx(sum(each) / 4, rel=1e-5)
