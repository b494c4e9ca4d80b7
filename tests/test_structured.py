"""Importance against explicit gates; heads and channels cut in every family: counted, saved, generating."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.compress.structured import MIN_CHANNELS, Goal, attentions, choose, importance
from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import anatomy, count_parameters
from tests.tiny_models import FAMILIES, HEAD_OWNERS, calibration_batches, kind, reloaded, tiny


def batches(count: int = 2) -> list[dict]:
    return calibration_batches("decoder", count)


def prune(model: nn.Module, calibration=None, **settings):
    return compress.get("heads-ffn")(model, Context(calibration=calibration or batches()), **settings)


def gated(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """dL/dgate by autograd, a factor of one on what each map reads ("o", "out") or gives ("in", "gate")."""
    found, gates, handles = anatomy(model), {}, []

    def factor(one, width: int, repeat: int, *, reads: bool) -> None:
        gate = gates[one.name] = torch.ones(width, requires_grad=True)
        if reads:
            hook = lambda _, args: (args[0] * gate.repeat_interleave(repeat),)  # noqa: E731
            handles.append(one.module.register_forward_pre_hook(hook))
        else:
            handles.append(one.module.register_forward_hook(lambda _, args, output: output * gate))

    for one in attentions(found):
        factor(one.o, one.heads, one.head_dim, reads=True)
    for block in found.blocks:
        factor(block.ffn.output, block.ffn.width, 1, reads=True)
        for one in block.ffn.inputs:
            factor(one, block.ffn.width, 1, reads=False)
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: gate.grad.abs() for name, gate in gates.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_derivative_by_a_gate(family):
    model, given = tiny(family), batches()
    wanted = [gated(model, batch) for batch in given]
    mean = {name: sum(one[name] for one in wanted) / len(given) for name in wanted[0]}
    found = anatomy(model)
    for even in (True, False):
        got = importance(model, given, even=even)
        assert set(got) == {one.name for one in attentions(found)} | {block.name for block in found.blocks}
        for one in attentions(found):
            torch.testing.assert_close(got[one.name], mean[one.o.name], rtol=1e-3, atol=1e-5)
        for block in found.blocks:
            maps = [block.ffn.output, *(block.ffn.inputs if even else [])]
            torch.testing.assert_close(
                got[block.name], sum(mean[one.name] for one in maps), rtol=1e-3, atol=1e-5
            )
    assert all(score.max() > 1e-4 for score in got.values())


def parameters_left(model: nn.Module, achieved: dict) -> int:
    """By arithmetic on dense shapes: rows of inputs with biases, columns of outputs, T5's bias tables."""
    found, left = anatomy(model), count_parameters(model)

    def row(one) -> int:
        return one.in_features + (one.module.bias is not None)

    for one in attentions(found):
        gone = one.heads - len(achieved["heads_kept"][one.name])
        shares = {"q": gone, "k": gone, "v": gone, "qkv": 3 * gone}
        if one.kv_heads < one.heads:
            shares |= dict.fromkeys("kv", gone * one.kv_heads // one.heads)
        left -= sum(row(m) * shares[m.role] * one.head_dim for m in one.linears if m.role != "o")
        left -= one.o.out_features * gone * one.head_dim
        if getattr(getattr(one.module, "phi", None), "per_head", False):
            left -= gone * (one.head_dim**2 + one.head_dim)
        if found.family in ("olmo2", "stablelm"):  # norms of queries and keys, a weight per row
            left -= one.head_dim * (gone + gone * one.kv_heads // one.heads)
    for block in found.blocks:
        gone = block.ffn.width - achieved["ffn_kept"][block.name]
        left -= gone * (sum(map(row, block.ffn.inputs)) + block.ffn.output.out_features)
    if found.family == "t5":
        for blocks in found.stacks.values():
            kept = [len(achieved["heads_kept"][block.attention.name]) for block in blocks]
            left += model.config.relative_attention_num_buckets * (sum(kept) - blocks[0].attention.heads)
    return left


@pytest.mark.parametrize(
    "family, even",
    [(family, True) for family in FAMILIES + HEAD_OWNERS]
    + [(family, False) for family in ("bert", "albert", "gpt2", "llama", "headwise_per_head", "t5", "bart")],
)
def test_every_family_is_cut_counted_saved_and_generates(family, even, tmp_path):
    model = tiny(family)
    pruned, report = prune(model, heads=2, ffn=0.5, even=even, n_iters=2)
    found, kept = anatomy(pruned), report.achieved
    counts = {name: len(heads) for name, heads in kept["heads_kept"].items()}
    assert {one.name: one.heads for one in attentions(found)} == counts
    assert {block.name: block.ffn.width for block in found.blocks} == kept["ffn_kept"]
    heads, widths = [one.heads for one in attentions(found)], [block.ffn.width for block in found.blocks]
    dense = anatomy(model).blocks[0].ffn.width
    if even:
        assert set(heads) == {2} and set(widths) == {dense // 2}
    assert (sum(heads), sum(widths)) == (2 * len(heads), dense // 2 * len(widths))
    assert min(widths) >= MIN_CHANNELS and len(kept["heads_kept"]) + len(kept["ffn_kept"]) == report.layers
    assert count_parameters(pruned) == parameters_left(model, kept)
    assert kept["parameters_share"] == count_parameters(pruned) / count_parameters(model)
    again = reloaded(pruned, tmp_path / "m", report=report)
    if kind(family) != "encoder":
        ask = {"input_ids": batches()[0]["input_ids"][1:], "max_new_tokens": 5, "do_sample": False}
        tokens = pruned.generate(**ask)
        assert torch.equal(tokens, again.generate(**ask))
        assert torch.equal(tokens, pruned.generate(**ask, use_cache=False))


def test_choice_by_hand():
    scores = {
        "a": torch.tensor([5.0, 1.0, 5.5, 0.0]),
        "b": torch.tensor([0.5, 0.1, 0.3, 0.2]),
        "f": torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0]),
        "g": torch.tensor([0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    }
    goals = {name: Goal("heads", 4, 2) for name in "ab"} | {name: Goal("ffn", 6, 5) for name in "fg"}
    even = choose(scores, goals, even=True)
    assert even == {"a": [0, 2], "b": [0, 2], "f": [0, 1, 2, 3, 4], "g": [0, 1, 2, 3, 4]}
    uneven = choose(scores, goals, even=False)
    assert uneven == {"a": [0, 1, 2], "b": [0], "f": [0, 1, 2, 3, 4, 5], "g": [0, 1, 2, 3]}
    grouped = {name: Goal("heads", 4, 2, group=2) for name in "ab"}
    assert choose(scores, grouped, even=True) == {"a": [0, 1], "b": [0, 1]}  # 5 + 1 > 5.5 + 0
    least = {name: Goal("ffn", 6, 5 - MIN_CHANNELS) for name in "fg"}
    assert choose(scores, least, even=False) == {"f": [0], "g": [0]}


def test_channels_go_in_multiples_by_hand():
    scores = {"f": torch.tensor([0.0, 9.0, 1.0, 8.0, 7.0, 6.0, 2.0]), "g": torch.arange(7.0) / 10}
    goals = {name: Goal("ffn", 7, 4, group=2) for name in "fg"}
    assert choose(scores, goals, even=True) == {"f": [1, 3, 4, 5], "g": [3, 4, 5, 6]}
    least = {name: Goal("ffn", 7, 2, group=2) for name in "fg"}  # the seventh channel fills no pair
    assert choose(scores, least, even=False) == {"f": [1, 3], "g": [5, 6]}
    scores = {"f": torch.arange(10.0) + 1, "g": torch.arange(10.0) / 10}
    goals = {name: Goal("ffn", 10, 6, group=2) for name in "fg"}  # the two best pairs stay in any case
    assert choose(scores, goals, even=False) == {"f": list(range(2, 10)), "g": list(range(6, 10))}


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_widths_are_multiples_after_any_number_of_steps(family, even, tmp_path):
    model = tiny(family)
    plain, _ = prune(model, ffn=0.6, even=even)
    pruned, report = prune(model, ffn=0.6, even=even, n_iters=2, multiple_of=8, heads=2)
    blocks = anatomy(pruned).blocks
    dense = anatomy(model).blocks[0].ffn.width
    assert all(block.ffn.width % 8 == 0 for block in blocks)
    assert any(block.ffn.width % 8 for block in anatomy(plain).blocks)
    assert sum(block.ffn.width for block in blocks) == len(blocks) * 8 * round(0.6 * (dense // 8))
    assert count_parameters(pruned) == parameters_left(model, report.achieved)
    reloaded(pruned, tmp_path / "m", report=report)


def test_a_multiple_that_cannot_be_is_refused():
    pytest.raises(BadSetting, prune, tiny("bert"), ffn=20, multiple_of=8).match("whole groups of 8")
    pytest.raises(BadSetting, prune, tiny("bert"), ffn=0.5, multiple_of=512).match("whole groups of 512")
    pytest.raises(BadSetting, prune, tiny("bert"), heads=2, multiple_of=8).match("give ffn")
    pytest.raises(BadSetting, prune, tiny("bert"), ffn=0.5, multiple_of=0).match("whole number from 1")


@pytest.mark.parametrize("even, sizes", [(True, [[5], [4], [3]]), (False, [[4, 6], [3, 5], [3, 3]])])
def test_steps_are_equal(even, sizes):
    """Six channels of twelve go in three steps; uneven, the lowest scores first, down to the floor."""
    scores = {"f": torch.arange(6.0), "g": torch.arange(6.0) + 100}
    goals = {name: Goal("ffn", 6, 3) for name in scores}
    for done, wanted in enumerate(sizes, start=1):
        kept = choose(scores, goals, even=even, step=done, steps=3)
        assert [len(one) for one in kept.values()] == (wanted * 2 if even else wanted)
        scores = {name: scores[name][indices] for name, indices in kept.items()}
    three_heads = {name: Goal("heads", 4, 3) for name in "ab"}  # two go in four steps: one, one, none, none
    scores = {name: torch.rand(4) for name in "ab"}
    assert sum(map(len, choose(scores, three_heads, even=False, step=1, steps=4).values())) == 7


def test_each_step_scores_anew():
    model = tiny("gpt2", seed=1)
    twice, report = prune(model, heads=2, ffn=64, n_iters=2)
    half, _ = prune(model, heads=3, ffn=96)
    composed, _ = prune(half, heads=2, ffn=64)
    for ours, theirs in zip(twice.state_dict().values(), composed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    for (name, heads), before in zip(report.achieved["heads_kept"].items(), anatomy(model).blocks):
        after = twice.get_submodule(before.attention.o.name).weight
        assert torch.equal(after, before.attention.o.module.weight[before.attention.columns(heads)]), name


def test_soft_loss_by_hand_and_padding_left_out():
    model, dense, given = tiny("bert"), tiny("bert", seed=1), batches(1)
    mask = given[0]["attention_mask"].bool()
    with torch.no_grad():
        target = dense(**given[0]).logits[mask].softmax(-1)
    (-(target * model(**given[0]).logits[mask].log_softmax(-1)).sum(-1).mean()).backward()
    one = anatomy(model).blocks[0].attention
    wanted = (one.o.module.weight.grad * one.o.module.weight).view(32, 4, 8).sum((0, 2)).abs()
    got = importance(model, given, loss="soft", dense=dense)[one.name]
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-7)


def test_sampled_labels_by_hand_with_a_seed_and_without_labels():
    model, given = tiny("gpt2"), [{n: v for n, v in b.items() if n != "labels"} for b in batches(1)]
    mask = given[0]["attention_mask"].bool()
    logits = model(**given[0]).logits[mask]
    draw = torch.Generator().manual_seed(7)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw).squeeze(1)
    cross_entropy(logits, labels).backward()
    one = anatomy(model).blocks[1].attention
    weight = one.o.module.weight  # of a Conv1D: a head owns rows
    wanted = (weight.grad * weight).view(4, 8, 32).sum((1, 2)).abs().detach()
    got, again, other = (importance(model, given, loss="sampled", seed=seed)[one.name] for seed in (7, 7, 8))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    assert torch.equal(got, again) and not torch.allclose(got, other, rtol=1e-2)
    pruned, _ = prune(model, heads=3, loss="sampled", n_iters=2, calibration=given)
    assert [block.attention.heads for block in anatomy(pruned).blocks] == [3, 3]


def test_a_multi_label_head_is_scored_class_by_class():
    head = {"num_labels": 3, "problem_type": "multi_label_classification"}
    model, dense = (tiny("bert", "classification", seed=seed, **head) for seed in (0, 1))
    given = [{name: tensor for name, tensor in batches(1)[0].items() if name != "labels"}]
    with torch.no_grad():
        target = dense(**given[0]).logits.sigmoid()
    binary_cross_entropy_with_logits(model(**given[0]).logits, target).backward()
    one = anatomy(model).blocks[0].attention
    wanted = (one.o.module.weight.grad * one.o.module.weight).view(32, 4, 8).sum((0, 2)).abs()
    got = importance(model, given, loss="soft", dense=dense)[one.name]
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-7)
    assert importance(model, given, loss="sampled")[one.name].isfinite().all()


def test_the_model_is_left_as_it_was():
    model = tiny("bert").train()
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        scores = importance(model, batches(1))
    assert model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(scores, importance(tiny("bert"), batches(1)))


BAD = [{}] + [{"heads": amount} for amount in (0, 5, True, 2.0, 0.0)]
BAD += [{"ffn": amount} for amount in (49, -0.5, "half")]
BAD += [{"ffn": 24} | change for change in ({"n_iters": 0}, {"n_iters": 1.5}, {"loss": "hard"})]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_bad_settings_refuse(settings):
    with pytest.raises(BadSetting, match='heads=0.5|from 1 to|whole number|use "task"'):
        prune(tiny("bert"), **settings)


def test_parts_of_a_group_refuse_and_fractions_keep_at_least_one():
    pytest.raises(BadSetting, prune, tiny("llama"), heads=3).match("whole groups of 2")
    _, report = prune(tiny("llama"), heads=0.01, ffn=0.001)
    assert {len(one) for one in report.achieved["heads_kept"].values()} == {2}
    assert set(report.achieved["ffn_kept"].values()) == {1}


def test_missing_labels_batches_and_logits_say_what_to_do():
    model, unlabelled = tiny("bert"), [{n: v for n, v in b.items() if n != "labels"} for b in batches()]
    pytest.raises(BadData, importance, model, unlabelled).match("sampled")
    pytest.raises(BadData, importance, model, []).match("no calibration batches")
    with pytest.raises(BadSetting, match="regression"):
        importance(tiny("bert", "classification", num_labels=1), unlabelled, loss="soft")
    with pytest.raises(BadSetting, match="without a head"):
        importance(tiny("bert", None), unlabelled, loss="sampled")
    nowhere = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    pytest.raises(BadWeights, importance, model, nowhere).match("not -100")
