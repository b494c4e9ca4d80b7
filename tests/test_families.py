"""The page of families and techniques, a part of it tried again; mixtures of experts as linear layers."""

import pytest
import torch
import transformers
from family_grid import COLUMNS, PAGE, TICK, TRIED, context, page_of, read_page, try_cell
from test_slicing import without
from tiny_models import WIDER, calibration_batches, logits, reloaded, tiny

from lmcompress.compress import get
from lmcompress.compress.calibration import calibrate
from lmcompress.compress.masks import kept_masks
from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families, mixtures
from lmcompress.models.anatomy import anatomy, prunable
from lmcompress.models.surgery import drop_blocks, keep_experts, keep_heads
from lmcompress.results.labels import label
from lmcompress.train.lora import Lora, adapted

CUTS = ("heads", "FFN channels", "hidden size", "blocks")
TEXT = PAGE.read_text(encoding="utf-8")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def rotating(family: str) -> list[str]:
    """One column without heads; and of families that no other test cuts, heads and another cut."""
    number = TRIED.index(family)
    others = [column for column in COLUMNS if column not in CUTS]
    columns = [others[number % len(others)]]
    return columns + (["heads", CUTS[1 + number % 3]] if family in WIDER else [])


@pytest.mark.parametrize("family", TRIED)
def test_the_page_says_what_happens(family):
    model, row = tiny(family), read_page(TEXT)[family]
    assert {column: try_cell(model, column) for column in rotating(family)} == {
        column: row[column] for column in rotating(family)
    }


def test_the_page_has_every_family_and_column_and_few_refusals():
    cells = read_page(TEXT)
    assert list(cells) == TRIED and all(list(row) == list(COLUMNS) for row in cells.values())
    assert page_of(cells) == TEXT, "python tests/family_grid.py"
    refused = {family for family, row in cells.items() for c in CUTS if row[c] != TICK}
    assert refused == {*MIXTURES}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_become_layers_in_the_same_memory_and_parameters_again(family):
    model = tiny(family)
    want, names = logits(model), [name for name, _ in model.named_parameters()]
    assert [layer.name for layer in prunable(model) if ".experts." in layer.name]
    mixtures.open_experts(model)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    layers = [layer for layer in prunable(model) if ".experts." in layer.name]
    assert len(layers) == 2 * 2 * 4 and all(model.get_submodule(x.name) is x.module for x in layers)
    layers[0].weight2d().data.zero_()
    mixtures.close_experts(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.get_submodule(layers[0].name.rpartition(".gate")[0]).gate_up_proj[0].abs().max() == 0


def test_what_a_technique_leaves_as_floats_is_the_model_s_own_class_and_integers_reload(tmp_path):
    model = tiny("mixtral")
    pruned, _ = get("magnitude-layer")(model, sparsity=0.5)
    experts = pruned.model.layers[0].mlp.experts
    assert type(experts) is type(model.model.layers[0].mlp.experts)
    assert all((experts.gate_up_proj[i] == 0).float().mean() == 0.5 for i in range(4))
    masks = kept_masks(pruned)
    assert torch.equal(masks["model.layers.0.mlp.experts.down_proj"], experts.down_proj != 0)
    pruned.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(again), logits(pruned), atol=1e-5, rtol=1e-5)
    small, _ = get("rtn")(pruned, bits=8)
    assert isinstance(reloaded(small, tmp_path / "small").model.layers[0].mlp.experts, mixtures.OpenExperts)


def test_experts_with_biases_and_transposed_matrices_open_and_those_that_gate_otherwise_are_refused():
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**shape, num_experts_per_tok=2)).eval()
    pytest.raises(UnknownFamily, get("rtn"), model, bits=4).match(r"GptOssExperts.*3-D.*heads or blocks")
    name = model.model.layers[0].mlp.experts
    assert keep_heads(model, {"model.layers.0": [0, 1]}) is not model and mixtures.is_fused(name)
    experts = tiny("mixtral").model.layers[0].mlp.experts
    tokens = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    want = experts(*tokens)
    experts.is_transposed = True
    for leaf in ("gate_up_proj", "down_proj"):
        setattr(experts, leaf, torch.nn.Parameter(getattr(experts, leaf).data.mT.contiguous()))
    torch.testing.assert_close(mixtures.as_layers(experts)(*tokens), want, atol=1e-5, rtol=1e-5)


def test_adapters_train_experts_and_are_merged_into_their_parameters():
    model = tiny("mixtral")
    experts, names = model.model.layers[0].mlp.experts, [name for name, _ in model.named_parameters()]
    before = experts.down_proj.detach().clone()
    with adapted(model, Lora(rank=2)):
        layer = model.model.layers[0].mlp.experts.down_proj[1]
        layer.lora_B["default"].weight.data.fill_(0.5)
        want = before[1] + layer.scaling["default"] * 0.5 * layer.lora_A["default"].weight.detach().sum(0)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model.model.layers[0].mlp.experts.down_proj[1], want.expand_as(before[1]))


@pytest.mark.parametrize("name", ["OpenAIGPT", "Longformer"])
def test_families_beside_the_page(name):
    """No cut reaches a width that Longformer's attention uses; GPT-1 does not run in half precision."""
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"attention_window": 4, "intermediate_size": 48} if name == "Longformer" else {}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**shape, **more))
    for technique, settings in (("rtn", {"bits": 4}), ("magnitude-layer", {"sparsity": 0.5})):
        assert get(technique)(model, **settings)[1].layers == len(prunable(model)) >= 8
    assert get("low-rank")(model, rank=0.5)[1].layers == len(prunable(model))
    keep = {anatomy(model).blocks[0].name: [0]}
    if name == "Longformer":
        pytest.raises(UnknownFamily, keep_heads, model, keep).match("Nothing was changed")
    else:
        assert anatomy(keep_heads(model, keep)).blocks[0].attention.heads == 1


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "pad_token_id": 0}


def test_layers_kept_in_lists_of_their_own_are_calibrated_by_runs_of_the_whole_model():
    """XLM has its attentions in one list and its feed-forwards in another: no module is a block."""
    config = transformers.XLMConfig(
        vocab_size=50, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=32
    )
    model, squares, hooks = transformers.XLMModel(config).eval(), {}, []
    batches = calibration_batches("encoder")
    for batch in batches:
        batch["input_ids"] %= 50
    for layer in prunable(model):

        def add(_, args, name=layer.name):
            squares[name] = squares.get(name, 0) + args[0].square().sum((0, 1))

        hooks.append(layer.module.register_forward_pre_hook(add))
    whole = [{"input_ids": batch["input_ids"]} for batch in batches]
    with torch.no_grad():
        for batch in whole:
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    stats = {name: stat for step in calibrate(model, whole) for name, stat in step.stats.items()}
    assert set(stats) == set(squares) and len(stats) == 12
    for name, stat in stats.items():
        torch.testing.assert_close(stat.norm_sq, squares[name])
    pytest.raises(UnknownFamily, drop_blocks, model, {"decoder": [0]}).match(
        "several lists.*attentions.*ffns"
    )


def test_blocks_without_attention_can_be_dropped_and_layers_that_are_not_called_stay(tmp_path):
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape)).eval()
    x = {"input_ids": torch.arange(3, 12)[None]}
    names = {layer.name.rpartition(".")[2] for layer in prunable(model)}
    assert names == {"in_proj", "x_proj", "out_proj"}, "dt_proj's weight is read, not called"
    small, result = get("rtn")(model, bits=8)
    assert result.layers == 9 and reloaded(small, tmp_path / "small", x)
    shorter = drop_blocks(model, {"decoder": [1]})
    torch.testing.assert_close(logits(shorter, x), logits(without(model, "decoder", [1]), x))
    reloaded(shorter, tmp_path / "shorter", x)


def test_a_result_that_does_not_run_is_refused(monkeypatch):
    monkeypatch.setattr(families, "READ_DIRECTLY", ())
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape)).eval()
    pytest.raises(UnknownFamily, get("rtn"), model, bits=8).match("otherwise than by calling it.*pruning")
    assert get("magnitude-layer")(model, sparsity=0.5)[1].layers == 8


def test_corrections_of_a_router_go_with_its_experts(tmp_path):
    config = transformers.Glm4MoeConfig(
        **SMALL | {"vocab_size": 100},
        **{"num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    )
    model = transformers.Glm4MoeForCausalLM(config).eval()
    block = anatomy(model).blocks[1]
    block.module.mlp.gate.e_score_correction_bias.copy_(torch.arange(4.0))
    smaller = keep_experts(model, {block.name: [0, 1, 3]})
    assert smaller.model.layers[1].mlp.gate.e_score_correction_bias.tolist() == [0, 1, 3]
    reloaded(smaller, tmp_path / "smaller", tolerance=1e-5)


def test_dropped_experts_are_those_that_tokens_use_least():
    model = tiny("qwen3_moe")
    with torch.no_grad():
        for block, unused in zip(anatomy(model).blocks, (2, 0)):
            block.module.mlp.gate.weight[unused] = -block.module.mlp.gate.weight.sum(0) * 9
    smaller, result = get("drop-experts")(model, context(model), kept_experts=0.75)
    assert label("drop-experts", {"kept_experts": 0.75}) == "Experts dropped, 75 % of the experts"
    usage = result.achieved["usage"]
    for name, kept in result.achieved["experts_kept"].items():
        assert sum(usage[name]) == pytest.approx(1) and len(kept) == 3
        assert min(range(4), key=usage[name].__getitem__) not in kept
    assert [b.module.mlp.experts.num_experts for b in anatomy(smaller).blocks] == [3, 3]
    first = anatomy(model).blocks[0].name
    uneven = keep_experts(model, {first: [0, 2]})
    assert [b.module.mlp.experts.num_experts for b in anatomy(uneven).blocks] == [2, 4]
    pytest.raises(BadSetting, keep_experts, model, {first: [0]}).match("at least 2 must stay")
    pytest.raises(UnknownFamily, get("drop-experts"), tiny("llama"), context(model), kept_experts=2).match(
        "no mixture of experts"
    )


def test_heads_of_a_mixture_go_by_importance_where_channels_cannot():
    model = tiny("mixtral")
    pruned, result = get("heads-ffn")(model, context(model), heads=0.5, loss="sampled")
    assert [block.attention.heads for block in anatomy(pruned).blocks] == [2, 2] and not result.achieved[
        "ffn_kept"
    ]
    pytest.raises(UnknownFamily, get("heads-ffn"), model, context(model), ffn=0.5).match("drop-experts")


def test_heads_of_multi_query_attention_go_one_by_one_and_codegen_s_in_fours():
    model = tiny("falcon_mq")
    name = anatomy(model).blocks[0].name
    attention = anatomy(keep_heads(model, {name: [0, 1, 3]})).blocks[0].attention
    assert (attention.heads, attention.kv_heads) == (3, 1)
    model = tiny("codegen")
    name = anatomy(model).blocks[0].name
    pytest.raises(BadSetting, keep_heads, model, {name: [0, 1]}).match("4 equal shares.*multiple of 4")
