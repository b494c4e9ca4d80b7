"""layers.py against every family: all matrices claimed once, roles whole, shapes right, unknowns refused."""

import pytest
import torch
from tiny_models import ENCODER_DECODERS, FAMILIES, inputs, kind, tiny
from torch import nn

from lmcompress.compress import Context, get
from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models.anatomy import anatomy, count_parameters, prunable
from lmcompress.models.surgery import keep_ffn, keep_hidden

HEADWISE = ("headwise", "headwise_per_head")  # their φ mixes the inside of a head, and nobody may compress it


def matrices_in_blocks(model: nn.Module) -> dict[int, str]:
    """Id -> name of every matrix inside the model's lists of layers, found by name alone."""
    lists = ("layer.", "layers.", "h.", "block.", "albert_layers.")
    names = [
        n for n, p in model.named_parameters() if p.dim() == 2 and any(f".{one}" in f".{n}" for one in lists)
    ]
    names = [name for name in names if "relative_attention_bias" not in name and "phi." not in name]
    return {id(model.get_parameter(name)): name for name in names}


@pytest.mark.parametrize("head", ["lm", "classification", None])
@pytest.mark.parametrize("family", [*FAMILIES, "albert with groups"])
def test_every_matrix_is_claimed_exactly_once(family, head):
    groups = {"inner_group_num": 2, "num_hidden_groups": 2, "num_hidden_layers": 4}
    model = tiny(family.split()[0], head, **(groups if "groups" in family else {}))
    maps, everything = prunable(model), prunable(model, "all")
    claimed = [id(one.module.weight) for one in maps]
    assert len(claimed) == len(set(claimed)) and set(claimed) == set(matrices_in_blocks(model))
    assert all(model.get_submodule(one.name) is one.module for one in maps)
    matrices = {id(p) for n, p in model.named_parameters() if p.dim() == 2 and "phi." not in n}
    assert {id(one.module.weight) for one in everything} == matrices and len(everything) == len(matrices)
    assert count_parameters(model) == sum(p.numel() for p in set(model.parameters()))
    pytest.raises(BadSetting, prunable, model, "everything").match("blocks")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_heads_and_widths(family):
    found = anatomy(tiny(family))
    assert (found.kind, found.hidden_size) == (kind(family), 32)
    per_stack = 1 if family == "albert" else 2
    assert all(len(blocks) == per_stack for blocks in found.stacks.values())
    grouped = family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", *HEADWISE)
    gated = grouped or family == "t5_gated"
    for index, block in enumerate(found.blocks):
        assert block.index == index % per_stack
        assert (block.cross_attention is not None) == (
            family in ENCODER_DECODERS and block.stack == "decoder"
        )
        for attention in filter(None, (block.attention, block.cross_attention)):
            assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2 if grouped else 4, 8)
            assert attention.o.weight2d().shape == (32, 32)
        assert [one.role for one in block.ffn.inputs] == (["gate", "in"] if gated else ["in"])
        width = 128 if family in ("gpt2", "gpt_neo") else 48
        assert block.ffn.width == width
        assert {tuple(one.weight2d().shape) for one in block.ffn.inputs} == {(width, 32)}
        assert block.ffn.output.weight2d().shape == (32, width)
        assert len(block.linears) == len({one.name for one in block.linears})


@pytest.mark.parametrize("family", FAMILIES)
def test_weight2d_is_a_view_in_linear_layout(family):
    model = tiny(family)
    for one in prunable(model):
        x = torch.randn(3, one.in_features)
        bias = 0 if one.module.bias is None else one.module.bias
        torch.testing.assert_close(one.module(x), x @ one.weight2d().T + bias, atol=1e-5, rtol=1e-5)
        assert one.weight2d().shape == (one.out_features, one.in_features)
        with torch.no_grad():
            one.weight2d()[0, 1] = 7.0
        assert 7.0 in one.module.weight


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in HEADWISE])  # φ of nothing is not nothing
def test_rows_and_columns_of_a_head_are_those_the_model_uses(family):
    """Zeroing a head's value rows changes what reaches `o` in that head's columns and nowhere else."""
    model = tiny(family, None)
    block = anatomy(model).blocks[0]
    attention, seen = block.attention, []
    attention.o.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    batch = inputs(model)
    group = attention.heads // attention.kv_heads
    heads = list(range(group, 2 * group))
    with torch.no_grad():
        model(**batch)
        for one, rows in attention.rows(heads):
            values = rows
            if one.role == "v" or one.role == "qkv":
                third = len(rows) // 3
                if attention.layout == "stacked":
                    values = rows[2 * third :]
                if attention.layout == "interleaved":
                    values = rows.view(-1, 3, attention.head_dim)[:, 2].reshape(-1)
                one.weight2d()[values] = 0
                if one.module.bias is not None:
                    one.module.bias[values] = 0
        model(**batch)
    repeats = len(seen) // 2
    before, after = seen[0], seen[repeats]
    mine = attention.columns(heads)
    others = torch.tensor([c for c in range(32) if c not in mine])
    assert after[..., mine].abs().max() == 0 < before[..., mine].abs().min()
    torch.testing.assert_close(after[..., others], before[..., others])


def test_a_shared_module_is_prunable_once_but_listed_in_each_block():
    model = tiny("bert")
    first, second = (block.ffn.output for block in anatomy(model).blocks)
    model.bert.encoder.layer[1].output.dense = first.module
    found = anatomy(model)
    assert found.blocks[1].ffn.output.module is first.module
    assert len(prunable(model)) == 11
    assert second.name not in {one.name for one in prunable(model)}


class LowRank(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.first, self.second = nn.Linear(self.in_features, rank), nn.Linear(rank, self.out_features)


def test_a_replaced_map_keeps_its_place_and_gives_its_inner_maps():
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = LowRank(mlp.down_proj, 4)
    block = anatomy(model).blocks[0]
    assert (block.ffn.output.role, block.ffn.width) == ("out", 48)
    names = {one.name for one in prunable(model) if one.role == "out" and one.block == 0}
    assert names == {f"model.layers.0.mlp.down_proj.{inner}" for inner in ("first", "second")}


class Mixer(nn.Module):
    """Blocks without attention, beside a smaller list of layers and a head."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in "ab"]
        )
        self.probes = nn.ModuleList([nn.Sequential(nn.Linear(16, 2)) for _ in "ab"])
        self.mixer = nn.Linear(16, 16)

    def forward(self, hidden_states, **_):
        for stage in self.stages:
            hidden_states = hidden_states + stage(hidden_states)
        return self.mixer(hidden_states)


def test_a_model_of_no_known_family_gives_the_linear_layers_of_its_largest_list():
    """No heads are needed for these; whoever asks for heads or channels is told what was looked for."""
    model = Mixer()
    assert [layer.name for layer in prunable(model)] == [f"stages.{i}.{j}" for i in "01" for j in "02"]
    block = anatomy(model).blocks[0]
    with pytest.raises(UnknownFamily) as error:
        _ = block.attention
    for part in ("stages.0", "q_proj", "Wqkv", "0, 2", "families.py", "quantization"):
        assert part in str(error.value)
    with pytest.raises(UnknownFamily, match="not a feed-forward.*intermediate.dense"):
        _ = block.ffn


@pytest.mark.parametrize(
    "name, settings",
    [("rtn", {"bits": 4}), ("magnitude-layer", {"sparsity": 0.5}), ("wanda", {"sparsity": 0.5})]
    + [("gptq", {"bits": 4}), ("low-rank", {"rank": 0.5}), ("cast", {"dtype": "bfloat16"})],
)
def test_techniques_that_need_no_heads_treat_a_model_of_no_known_family(name, settings):
    model, x = Mixer(), torch.randn(3, 5, 16)
    context = Context(calibration=[{"hidden_states": x}])
    compressed, result = get(name)(model, context, **settings)
    changed = compressed.to(torch.bfloat16)(x.bfloat16()) if name == "cast" else compressed(x)
    assert result.layers >= 4 and (changed - model(x)).abs().max() > 0


def test_a_model_without_repeated_blocks_says_what_was_looked_for_and_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"classifier": nn.Linear(4, 4)}))
    for ask in (anatomy, prunable):
        with pytest.raises(UnknownFamily) as error:
            ask(model)
        for part in ("Sequential", "ModuleList", "Conv1D", "classifier"):
            assert part in str(error.value)


def test_an_extra_matrix_in_a_block_is_listed_but_no_feed_forward():
    model = tiny("bert")
    model.bert.encoder.layer[0].adapter = nn.Linear(32, 32)
    block = anatomy(model).blocks[0]
    assert block.attention.heads == 4 and "bert.encoder.layer.0.adapter" in {x.name for x in prunable(model)}
    with pytest.raises(UnknownFamily, match="adapter"):
        _ = block.ffn
    model = tiny("bert")
    model.bert.encoder.layer[0].mixing = nn.Parameter(torch.zeros(3, 3))
    pytest.raises(UnknownFamily, keep_ffn, model, {"bert.encoder.layer.0": [0]}).match("mixing")
    pytest.raises(UnknownFamily, keep_hidden, model, range(8)).match("mixing")
