"""Every technique on every family, tried on tiny random models: `python tests/family_grid.py [FAMILY …]`.

Writes report/families.md when all families are tried. A cell is a check of its own: what a technique gives
is compared with a reference, saved, loaded again and, of a decoder, asked to generate. Minutes; the tests try
each family on some columns and compare with the page.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from tiny_models import (
    FAMILIES,
    HEAD_OWNERS,
    WIDER,
    calibration_batches,
    inputs,
    logits,
    reloaded,
    tiny,
)
from torch import nn

from lmcompress.compress import Context, get
from lmcompress.errors import StudyError
from lmcompress.models.anatomy import Attention, anatomy, count_parameters, prunable
from lmcompress.models.mixtures import experts_in, is_mixture
from lmcompress.models.surgery import drop_blocks, keep_ffn, keep_heads, keep_hidden
from lmcompress.paths import ROOT, atomic_path
from lmcompress.weights import statistics

POSITIONS = "relative_attention_bias"  # tables in T5's first blocks, which serve all blocks
PAGE = ROOT / "report" / "families.md"
TRIED = [name for name in (*FAMILIES, *HEAD_OWNERS, *WIDER) if not name.startswith("headwise")]


def context(model: nn.Module) -> Context:
    """Two batches with labels, and a seed."""
    batches = calibration_batches(kind_of(model))
    for batch in batches if kind_of(model) == "encoder" else ():
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return Context(calibration=batches, seed=0)


def kind_of(model: nn.Module) -> str:
    return anatomy(model).kind


def technique(name: str, tolerance: float = 0.0, **settings) -> Callable[[nn.Module, Path], None]:
    """A cell for a technique that needs no heads: every linear layer of the blocks is touched; it reloads."""

    def cell(model: nn.Module, folder: Path) -> None:
        compressed, result = get(name)(model, context(model), **settings)
        assert result.layers >= len(prunable(model)), result.layers
        change = (logits(compressed).float() - logits(model)).abs().max()
        assert change.isfinite() and change > 0
        runs_again(compressed, folder, tolerance)

    return cell


def runs_again(model: nn.Module, folder: Path, tolerance: float = 0.0) -> None:
    """Save and load `model`, with equal logits and generated tokens."""
    if any(map(is_mixture, model.modules())):  # the kernel for all experts rounds as tensors lie in memory
        tolerance = max(tolerance, 1e-5)
    again = reloaded(model, folder, tolerance=tolerance)
    if kind_of(model) != "encoder":
        batch = {k: v for k, v in inputs(model).items() if k != "decoder_input_ids"}
        ask = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        cached = model.generate(**batch, **ask)
        assert cached.tolist() == again.generate(**batch, **ask).tolist()
        if model.dtype == torch.float32:  # in half precision a near tie falls otherwise without a cache
            assert cached.tolist() == model.generate(**batch, **ask, use_cache=False).tolist()


def look_at_weights(model: nn.Module, folder: Path) -> None:
    """Statistics of the saved file have each layer's role, and as many numbers in a block as the model."""
    model.save_pretrained(folder)
    frame = statistics.moments(folder).set_index("name")
    counts = frame.groupby(["stack", "block"])["n"].sum()
    for layer in prunable(model):
        if f"{layer.name}.weight" in frame.index:  # files name the matrices of experts otherwise
            row = frame.loc[f"{layer.name}.weight"]
            assert (row["kind"], row["role"]) == (layer.kind, layer.role), layer.name
    for block in anatomy(model).blocks:
        inside = sum(p.numel() for n, p in block.module.named_parameters() if POSITIONS not in n)
        assert counts[block.stack, block.index] == inside, block.name


def cut_heads(model: nn.Module, folder: Path) -> None:
    """Half of the heads, others in each attention, against the dense model with the others masked."""
    keep, masked, removed = {}, copy.deepcopy(model), 0
    for number, attention in enumerate(a for block in anatomy(masked).blocks for a in block.attentions):
        units = range(number % 2, attention.heads // attention.group, 2)
        if attention.group == attention.heads:
            units = [0]
        kept = [
            head for unit in units for head in range(unit * attention.group, (unit + 1) * attention.group)
        ]
        keep[attention.name] = kept
        gone = [head for head in range(attention.heads) if head not in kept]
        attention.o.weight2d().data[:, attention.columns(gone)] = 0
        removed += parameters_of(attention, gone)
        blind_norms(attention, kept)
    check_cut(model, keep_heads(model, keep), masked, removed, folder)


def parameters_of(attention: Attention, gone: list[int]) -> int:
    """Return the number of parameters that the heads `gone` have, by their widths."""
    groups = set() if attention.kv_heads == 1 else {head // attention.group for head in gone}
    rows, kv_rows = len(gone) * attention.head_dim, len(groups) * attention.head_dim
    fused = attention.qkv is not None
    layers = {attention.q or attention.qkv: rows, attention.k: kv_rows, attention.v: kv_rows}
    layers = {attention.qkv: rows + 2 * kv_rows} if fused else layers
    layers |= dict.fromkeys(attention.per_head, rows)
    count = sum(n * (x.in_features + (x.module.bias is not None)) for x, n in layers.items())
    for _, owner, numbers, heads in attention.owned(gone):
        owned = [owner] if isinstance(owner, nn.Parameter) else list(owner.parameters())
        apart = [p for p in owned if p.shape != (attention.head_dim,) or hasattr(owner, "norms")]
        count += sum(p.numel() for p in apart) * len(numbers) // heads
    return count + rows * attention.o.out_features


def blind_norms(attention: Attention, kept: list[int]) -> None:
    """Let norms over all heads (OLMo 2) work on those that stay."""
    from test_slicing import OnlyOver

    for role, index in [(layer.role, rows) for layer, rows in attention.rows(kept)]:
        norm = getattr(attention.module, f"{role}_norm", None)
        weight = getattr(norm, "weight", None)
        if weight is not None and weight.dim() == 1 and len(weight) > attention.head_dim:
            setattr(attention.module, f"{role}_norm", OnlyOver(norm, index.tolist()))


def cut_channels(model: nn.Module, folder: Path) -> None:
    """Every second or third channel, against the dense model with the others masked."""
    keep, masked, removed = {}, copy.deepcopy(model), 0
    for number, block in enumerate(anatomy(masked).blocks):
        ffn = block.ffn
        keep[block.name] = list(range(number % 2, ffn.width, 2 + number % 2))
        gone = [channel for channel in range(ffn.width) if channel not in keep[block.name]]
        ffn.output.weight2d().data[:, gone] = 0
        rows = sum(layer.in_features + (layer.module.bias is not None) for layer in ffn.inputs)
        removed += len(gone) * (rows * (2 if ffn.fused else 1) + ffn.output.out_features)
    check_cut(model, keep_ffn(model, keep), masked, removed, folder)


def cut_experts(model: nn.Module, folder: Path) -> None:
    """The least used of four experts goes, against the dense model whose routers cannot choose it."""
    smaller, result = get("drop-experts")(model, context(model), kept_experts=3)
    routers, removed = {}, 0
    for block in anatomy(model).blocks:
        _, experts = experts_in(block.module, block.name)
        (gone,) = {*range(4)} - {*result.achieved["experts_kept"][block.name]}
        routers[block.module.mlp.gate.weight] = gone
        removed += sum(p[gone].numel() for p in [*experts.parameters(), block.module.mlp.gate.weight])
    linear = nn.functional.linear

    def blind(states: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
        scores = linear(states, weight, bias)
        if weight in routers:
            scores[..., routers[weight]] = -torch.inf
        return scores

    with patch.object(nn.functional, "linear", blind):
        want = logits(model)
    close(logits(smaller), want)
    assert count_parameters(model) - count_parameters(smaller) == removed
    assert smaller.config.num_experts == 3 and {b.name for b in anatomy(model).blocks} == {
        *result.achieved["usage"]
    }
    runs_again(smaller, folder)


def cut_hidden(model: nn.Module, folder: Path) -> None:
    """A narrower hidden state, against the dense model that is zero and blind in the other dimensions."""
    from test_slicing import KEPT_HIDDEN, restrict_hidden

    narrow, reference = keep_hidden(model, KEPT_HIDDEN), restrict_hidden(model, KEPT_HIDDEN)
    close(logits(narrow), logits(reference))
    assert count_parameters(narrow) < count_parameters(model)
    runs_again(narrow, folder)


def cut_blocks(model: nn.Module, folder: Path) -> None:
    """The first block goes, against the dense model in which it hands its input on."""
    from test_slicing import without

    for stack, blocks in anatomy(model).stacks.items():
        removed = sum(p.numel() for p in blocks[0].module.parameters())
        if len(blocks) == 1:  # ALBERT runs one block several times
            shorter, masked, removed = (
                drop_blocks(model, {stack: [0]}),
                tiny("albert", num_hidden_layers=1),
                0,
            )
            masked.load_state_dict(model.state_dict())
        else:
            shorter, masked = drop_blocks(model, {stack: [0]}), without(model, stack, [0])
        tables = [p.numel() for n, p in blocks[0].module.named_parameters() if POSITIONS in n]
        check_cut(model, shorter, masked, removed - sum(tables), folder / stack)


def importance(model: nn.Module, folder: Path) -> None:
    """Heads and channels of least importance go: half of each, as asked for."""
    pruned, result = get("heads-ffn")(model, context(model), heads=0.5, ffn=0.5, loss="sampled")
    for before, after in zip(anatomy(model).blocks, anatomy(pruned).blocks, strict=True):
        assert after.ffn.width == before.ffn.width // 2
        for dense, small in zip(before.attentions, after.attentions, strict=True):
            assert small.heads == max(1, dense.heads // dense.group // 2) * dense.group
    runs_again(pruned, folder)


def check_cut(model: nn.Module, cut: nn.Module, masked: nn.Module, removed: int, folder: Path) -> None:
    """Compare a cut model with its masked reference, its size with what was removed, and save it."""
    close(logits(cut), logits(masked))
    assert (logits(masked) - logits(model)).abs().max() > 1e-3, "the mask changed nothing"
    extra = own_tables(cut) - own_tables(model)
    assert count_parameters(model) - count_parameters(cut) == removed - extra, (removed, extra)
    runs_again(cut, folder)


def own_tables(model: nn.Module) -> int:
    """Return the size of the tables of position biases inside blocks, of which a cut T5 has one in each."""
    inside = [m for block in anatomy(model).blocks for m in block.module.modules()]
    return sum(m.weight.numel() for m in inside if isinstance(m, nn.Embedding))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5 * max(1.0, want.abs().max().item()), rtol=0)


# Column of the page -> its cell
COLUMNS: dict[str, Callable[[nn.Module, Path], None]] = {
    "statistics": look_at_weights,
    "magnitude": technique("magnitude-layer", sparsity=0.5),
    "Wanda": technique("wanda", sparsity=0.5),
    "SparseGPT": technique("sparsegpt", sparsity=0.5),
    "cast": technique("cast", dtype="bfloat16"),
    "RTN": technique("rtn", bits=4, group_size=8),
    "GPTQ": technique("gptq", bits=4),
    "AWQ": technique("awq", bits=4),
    "SVD": technique("low-rank", rank=0.5),
    "SVD, aware": technique("low-rank-aware", rank=0.5),
    "heads": cut_heads,
    "FFN channels": cut_channels,
    "heads + FFN by importance": importance,
    "hidden size": cut_hidden,
    "blocks": cut_blocks,
    "experts": cut_experts,
}


TICK, NONE = "✓", "–"
INTRO = """# Families and techniques

Tried on tiny random models of each family by `python tests/family_grid.py`, which writes this page; the
tests try a part of it again. ✓ means: the technique treats every linear layer of the blocks (heads, channels,
hidden size, blocks and experts: the cut model has the logits of the dense one with the same parts masked, and
exactly as many parameters less as these have); saved and loaded again it has equal logits; a decoder or
encoder-decoder generates the same tokens, with and without its cache. A number is a refusal, whose sentence
stands below. "{NONE}": there are no experts to drop.

A model of a family that is not listed is read by structure. Techniques without a head layout (up to "SVD,
aware") treat the linear layers of any model that has a list of blocks; those that cut shapes compare each
block of their result with the masked dense one, and refuse with a sentence where the two differ.
"""


def try_cell(model: nn.Module, column: str) -> str:
    """Return `TICK` if the cell passes, else the sentence of the refusal, or `NONE`; a failure raises."""
    if column == "experts" and not any(map(is_mixture, model.modules())):
        return NONE
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            COLUMNS[column](model, Path(folder) / "saved")
        except StudyError as refusal:
            return " ".join(str(refusal).split())
        finally:
            state = model.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in before.items()), (
                "changed its input"
            )
    return TICK


def page_of(cells: dict[str, dict[str, str]]) -> str:
    """Return the page for {family: {column: what `try_cell` returned}}."""
    refusals = list(dict.fromkeys(c for row in cells.values() for c in row.values() if c not in (TICK, NONE)))
    lines = [INTRO.format(NONE=NONE), f"| | {' | '.join(COLUMNS)} |", f"|---|{':-:|' * len(COLUMNS)}"]
    for family, row in cells.items():
        marks = [c if c in (TICK, NONE) else f"{refusals.index(c) + 1}" for c in row.values()]
        lines.append(f"| {family} | {' | '.join(marks)} |")
    notes = [f"{number}. {sentence}" for number, sentence in enumerate(refusals, 1)]
    return "\n".join([*lines, "", *notes, ""])


def read_page(text: str) -> dict[str, dict[str, str]]:
    """Return what `page_of` was given."""
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    notes = dict(line.split(". ", 1) for line in text.splitlines() if line[:1].isdigit())
    columns = table[0]
    return {
        family: dict(zip(columns, [notes.get(mark, mark) for mark in marks], strict=True))
        for family, *marks in table[1:]
    }


def main(families: list[str]) -> None:
    """Try `families`, by default all; then write the page."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cells: dict[str, dict[str, str]] = {}
    for family in families or TRIED:
        model = tiny(family)
        cells[family] = {}
        for column in COLUMNS:
            try:
                cells[family][column] = try_cell(model, column)
            except Exception as error:
                raise AssertionError(f"{family}, {column}") from error
        print(page_of({family: cells[family]}).partition("---")[2].partition("\n")[2], flush=True)
    if not families:
        with atomic_path(PAGE) as temporary:
            temporary.write_text(page_of(cells), encoding="utf-8")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(sys.argv[1:])
