"""A target shape for a LLaMA-like decoder: which units stay, masks on a running model, and the cut.

Units are blocks, groups of heads (those that share a key and value head), hidden dimensions and channels.
Whatever chooses them gives a score per unit; scores become a choice, and the choice is sliced.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lmcompress.compress.masks import smallest
from lmcompress.compress.settings import Amount
from lmcompress.compress.structured import resolve_amount
from lmcompress.errors import UnknownFamily
from lmcompress.models import families
from lmcompress.models.anatomy import LinearLayer, ModelAnatomy, anatomy
from lmcompress.models.surgery import drop_blocks, keep_ffn, keep_heads, keep_hidden

KINDS = ("layers", "heads", "hidden", "ffn")
WRITERS = ("o", "out")  # roles of the layers that write to the hidden state
# layers `(blocks,)`, heads `(blocks, groups)`, hidden `(d,)`, ffn `(blocks, channels)`
Units = dict[str, Tensor]


@dataclass(frozen=True)
class TargetShape:
    """Blocks of a model, and query heads, hidden dimensions and feed-forward channels of each block.

    As a request its fields may be fractions or None (all are kept); `resolve` makes them whole numbers.
    """

    layers: Amount = None
    heads: Amount = None
    hidden: Amount = None
    ffn: Amount = None

    @classmethod
    def of(cls, structure: ModelAnatomy) -> "TargetShape":
        """Return the shape of a LLaMA-like decoder with blocks that are alike; else raise `UnknownFamily`."""
        first = structure.blocks[0]
        widths = {(b.attention.heads, b.attention.kv_heads, b.ffn.width) for b in structure.blocks}
        tables = [table for table in structure.embeddings if isinstance(table.module, nn.Embedding)]
        split = first.attention.layout == "split" and not first.ffn.fused
        decoder = structure.kind == "decoder" and len(tables) == 1 and split
        if not decoder or len(widths) > 1:
            raise UnknownFamily(
                f"a {structure.family} model is not a decoder with rotary positions, separate layers for q, "
                "k, v, gate and input, and blocks that are all alike: cut its heads and channels with "
                "heads-ffn, its blocks with drop-blocks."
            )
        return cls(len(structure.blocks), first.attention.heads, structure.hidden_size, first.ffn.width)

    def resolve(self, structure: ModelAnatomy, multiple_of: int = 1) -> "TargetShape":
        """Return the shape in whole numbers, for this model; see `of` and `resolve_amount` for errors.

        Hidden dimensions and channels that are asked for become, or are, multiples of `multiple_of`.
        """
        present, requested = asdict(TargetShape.of(structure)), asdict(self)
        attention = structure.blocks[0].attention
        groups = dict.fromkeys(KINDS, 1) | {"heads": attention.heads // attention.kv_heads}
        groups |= {kind: multiple_of for kind in ("hidden", "ffn") if requested[kind] is not None}
        amounts = [resolve_amount(requested[k], present[k], groups[k], f"the {k}") for k in KINDS]
        return TargetShape(*amounts)

    def units(self, structure: ModelAnatomy) -> dict[str, int]:
        """Return how many units of each kind the shape has; heads (as groups) and channels: in each block."""
        attention = structure.blocks[0].attention
        return asdict(self) | {"heads": self.heads * attention.kv_heads // attention.heads}


def open_masks(structure: ModelAnatomy) -> Units:
    """Return ones for every unit."""
    count, rows = TargetShape.of(structure).units(structure), (len(structure.blocks),)
    device = structure.blocks[0].attention.o.module.weight.device
    rows = {"layers": (), "heads": rows, "hidden": (), "ffn": rows}
    return {kind: torch.ones(*rows[kind], count[kind], device=device) for kind in KINDS}


@torch.no_grad()
def unit_scores(structure: ModelAnatomy, sums: Mapping[str, tuple[Tensor, Tensor]]) -> Units:
    """Sum scores of single weights over the units they belong to; a block's score is that of all its weights.

    `sums`: `both_sums` of the scores `(out, in)` of each layer in the blocks, of embeddings where they count.
    """
    groups = structure.blocks[0].attention.kv_heads
    totals = {kind: [] for kind in ("layers", "heads", "ffn")}
    hidden = sum(sums[table.name][1] for table in structure.embeddings if table.name in sums)
    for block in structure.blocks:
        attention, ffn = block.attention, block.ffn
        outputs = [sums[layer.name][0] for layer in (attention.q, attention.k, attention.v)]
        heads = sum(score.view(groups, -1).sum(1) for score in (*outputs, sums[attention.o.name][1]))
        channels = sums[ffn.output.name][1] + sum(sums[layer.name][0] for layer in ffn.inputs)
        hidden = hidden + sum(sums[layer.name][0 if layer.role in WRITERS else 1] for layer in block.linears)
        for kind, score in (("heads", heads), ("ffn", channels), ("layers", heads.sum() + channels.sum())):
            totals[kind].append(score)
    return {kind: torch.stack(rows) for kind, rows in totals.items()} | {"hidden": hidden}


def both_sums(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sum a matrix `(out, in)` by output, and by input."""
    return scores.sum(1), scores.sum(0)


def choose(scores: Units, counts: Mapping[str, int]) -> Units:
    """Return true for the `counts[kind]` units of highest score in the model (heads, ffn: in each block)."""
    stays = {}
    for kind, score in scores.items():
        removed = [smallest(row, len(row) - counts[kind]) for row in score.reshape(-1, score.shape[-1])]
        stays[kind] = ~torch.stack(removed).view_as(score)
    return stays


def cut(model: nn.Module, stays: Units) -> nn.Module:
    """Return a copy of `model` that has only the units where `stays` is true, its config in step."""
    blocks = anatomy(model).blocks
    size = blocks[0].attention.heads // blocks[0].attention.kv_heads
    heads, channels = {}, {}
    for block, group_stays, channel_stays in zip(blocks, stays["heads"], stays["ffn"], strict=True):
        heads[block.name] = group_stays.repeat_interleave(size).nonzero().flatten().tolist()
        channels[block.name] = channel_stays.nonzero().flatten().tolist()
    smaller = keep_ffn(keep_heads(model, heads), channels)
    smaller = keep_hidden(smaller, stays["hidden"].nonzero().flatten().tolist())
    removed = (stays["layers"] == 0).nonzero().flatten().tolist()
    return drop_blocks(smaller, {blocks[0].stack: removed}) if removed else smaller


class Masks:
    """Masks on the units of a running model: `current[kind]`, from 0 (as if cut off) to 1 (as if not masked).

    A head's mask multiplies its output, a channel's its activation, a block's what it adds to the hidden
    state, a hidden dimension's what is written to it and every norm's output, whose mean is over open ones.
    """

    def __init__(self, structure: ModelAnatomy):
        self.structure, self.current = structure, open_masks(structure)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Mask `model` while inside; layers are found by name, so adapters in their places are masked."""
        factors: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
        for number, block in enumerate(self.structure.blocks):
            for layer in (block.attention.o, block.ffn.output):
                factors[layer.name] = partial(self._sides, number, layer)
        factors |= dict.fromkeys(self._norms(model), self._norm_sides)
        with ExitStack() as hooks:
            for table in self.structure.embeddings:
                hook = model.get_submodule(table.name).register_forward_hook
                hooks.enter_context(hook(lambda _module, _ids, y: y * self.current["hidden"]))
            for name, sides in factors.items():
                module = model.get_submodule(name)
                before = partial(lambda sides, _module, x: (x[0] * sides()[0], *x[1:]), sides)
                hooks.enter_context(module.register_forward_pre_hook(before))
                after = partial(lambda sides, _module, _x, y: y * sides()[1], sides)
                hooks.enter_context(module.register_forward_hook(after))
            yield

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Multiply the masks into the weights, in place; the norms' means follow when units are cut off."""
        hidden = self.current["hidden"]
        for number, block in enumerate(self.structure.blocks):
            for layer in block.linears:
                module = model.get_submodule(layer.name)
                if layer.role not in WRITERS:
                    module.weight.mul_(hidden)
                    continue
                columns, rows = self._sides(number, layer)
                module.weight.mul_(rows[:, None] * columns)
                if module.bias is not None:
                    module.bias.mul_(rows)
        outside = [*self.structure.embeddings, *self.structure.heads]
        for weight in {model.get_submodule(layer.name).weight for layer in outside}:  # a tied one once
            weight.mul_(hidden)

    def _sides(self, number: int, layer: LinearLayer) -> tuple[Tensor, Tensor]:
        """Return what multiplies the inputs and the outputs of a layer that writes to the hidden state."""
        rows = self.current["layers"][number] * self.current["hidden"]
        if layer.role == "out":
            return self.current["ffn"][number], rows
        width = layer.in_features // self.current["heads"].shape[1]
        return self.current["heads"][number].repeat_interleave(width), rows

    def _norms(self, model: nn.Module) -> list[str]:
        norms = {
            name: type(module).__name__
            for name, module in model.named_modules()
            if families.is_norm(name, module) and families.norm_width(module) == self.structure.hidden_size
        }
        if len(norms) == 2 * len(self.structure.blocks) + 1 and all("RMS" in kind for kind in norms.values()):
            return list(norms)
        raise UnknownFamily(
            f"a {self.structure.family} model has {len(norms)} norms of kinds {', '.join({*norms.values()})} "
            "over its hidden state; masks on hidden dimensions know RMS norms, two in a block, one after."
        )

    def _norm_sides(self) -> tuple[float, Tensor]:
        """Return a norm's factors: RMSNorm divides by the mean over all dimensions, not the open ones."""
        open_count = max(1, int((self.current["hidden"] > 0).sum()))
        scale = math.sqrt(open_count / self.structure.hidden_size)
        return 1 / scale, self.current["hidden"] * scale
