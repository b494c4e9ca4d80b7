"""A target shape for a LLaMA-like decoder: which units stay, masks on a running model, and the cut.

Units are blocks, groups of heads (those that share a key and value head), hidden dimensions and feed-forward channels.
Whatever chooses them gives one score per unit; here scores become what stays, and what stays is really sliced.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lmcompress.compress.masks import smallest
from lmcompress.compress.structured import Amount, kept_of
from lmcompress.errors import UnknownFamily
from lmcompress.models import families
from lmcompress.models.anatomy import Block, ModelAnatomy, anatomy, refuse_experts
from lmcompress.models.surgery import drop_blocks, keep_ffn, keep_heads, keep_hidden

KINDS = ("layers", "heads", "hidden", "ffn")
Units = dict[
    str, Tensor
]  # layers `(blocks,)`, heads `(blocks, groups)`, hidden `(d,)`, ffn `(blocks, channels)`


@dataclass(frozen=True)
class Target:
    """Blocks of a model, and query heads, hidden dimensions and feed-forward channels of each block."""

    layers: int
    heads: int
    hidden: int
    ffn: int


def shape_of(found: ModelAnatomy) -> Target:
    """The shape of a model whose blocks are alike.

    Raises:
        UnknownFamily: not a LLaMA-like decoder (one stack, one table, RMS norms before attention and feed-forward), or
            blocks of different widths.
    """
    for block in found.blocks:
        refuse_experts(block)
    first = found.blocks[0]
    widths = {(one.attention.heads, one.attention.kv_heads, one.ffn.width) for one in found.blocks}
    tables = [one for one in found.embeddings if isinstance(one.module, nn.Embedding)]
    if found.kind != "decoder" or len(tables) != 1 or first.attention.layout != "split" or len(widths) > 1:
        raise UnknownFamily(
            f"a {found.family} model is not a decoder with rotary positions and blocks that are all alike: cut its "
            "heads and channels with heads-ffn, its blocks with drop-blocks."
        )
    return Target(len(found.blocks), first.attention.heads, found.hidden_size, first.ffn.width)


def target_of(found: ModelAnatomy, **asked: Amount) -> Target:
    """The shape that is asked for: whole numbers, or fractions of what is there; None keeps all.

    Raises:
        BadSetting: an amount that is not there, or a part of a group of heads.
        UnknownFamily: see `shape_of`.
    """
    group = found.blocks[0].attention.heads // found.blocks[0].attention.kv_heads
    there = asdict(shape_of(found))
    return Target(
        **{
            kind: kept_of(asked.get(kind), there[kind], group if kind == "heads" else 1, f"the {kind}")
            for kind in KINDS
        }
    )


def units_of(found: ModelAnatomy, shape: Target | None = None) -> dict[str, int]:
    """How many units of each kind a shape has (default: the model's own), in each block for heads and channels."""
    shape = shape or shape_of(found)
    attention = found.blocks[0].attention
    return asdict(shape) | {"heads": shape.heads * attention.kv_heads // attention.heads}


def open_masks(found: ModelAnatomy) -> Units:
    """Ones for every unit."""
    count, depth = units_of(found), len(found.blocks)
    device = found.blocks[0].attention.o.module.weight.device
    rows = {"heads": (depth,), "ffn": (depth,)}
    return {kind: torch.ones(*rows.get(kind, ()), count[kind], device=device) for kind in KINDS}


@torch.no_grad()
def unit_scores(found: ModelAnatomy, sums: Mapping[str, tuple[Tensor, Tensor]]) -> Units:
    """Scores of single weights, summed over the units they belong to; a block's is that of all its weights.

    Args:
        sums: name of a map in the blocks -> its scores `(out, in)` summed by output `(out,)` and by input `(in,)`; an
            embedding's too where it counts for hidden dimensions.
    """
    groups, total = units_of(found)["heads"], {kind: [] for kind in ("layers", "heads", "ffn")}
    hidden = sum(sums[one.name][1] for one in found.embeddings if one.name in sums)
    for block in found.blocks:
        attention, ffn = block.attention, block.ffn
        parts = [sums[one.name][0] for one in (attention.q, attention.k, attention.v)]
        heads = sum(part.view(groups, -1).sum(1) for part in (*parts, sums[attention.o.name][1]))
        channels = sums[ffn.output.name][1] + sum(sums[one.name][0] for one in ffn.inputs)
        hidden = hidden + sum(sums[one.name][0 if _writes(one) else 1] for one in block.linears)
        for kind, score in (("heads", heads), ("ffn", channels), ("layers", heads.sum() + channels.sum())):
            total[kind].append(score)
    return {kind: torch.stack(rows) for kind, rows in total.items()} | {"hidden": hidden}


def both_sums(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix `(out, in)`: by output, and by input."""
    return scores.sum(1), scores.sum(0)


def choose(scores: Units, kept: Mapping[str, int]) -> Units:
    """True for the `kept[kind]` units of highest score: of the model for blocks and hidden, of each block for others."""
    chosen = {}
    for kind, score in scores.items():
        gone = [smallest(row, len(row) - kept[kind]) for row in score.reshape(-1, score.shape[-1])]
        chosen[kind] = ~torch.stack(gone).view_as(score)
    return chosen


def cut(model: nn.Module, kept: Units) -> nn.Module:
    """A copy of `model` that has only the units of `kept` (true where a unit stays), its config in step."""
    blocks = anatomy(model).blocks
    size = blocks[0].attention.heads // blocks[0].attention.kv_heads
    names = {block.name: number for number, block in enumerate(blocks)}
    groups = {name: kept["heads"][at].nonzero().flatten().tolist() for name, at in names.items()}
    heads = {name: [g * size + i for g in ones for i in range(size)] for name, ones in groups.items()}
    channels = {name: kept["ffn"][at].nonzero().flatten().tolist() for name, at in names.items()}
    gone = (kept["layers"] == 0).nonzero().flatten().tolist()
    smaller = keep_ffn(keep_heads(model, heads), channels)
    smaller = keep_hidden(smaller, kept["hidden"].nonzero().flatten().tolist())
    return drop_blocks(smaller, {blocks[0].stack: gone}) if gone else smaller


class Masks:
    """Masks on the units of a running model: `current[kind]`, from 0 (as if cut off) to 1 (as if not masked).

    A head's mask multiplies its output, a channel's its activation, a block's what it adds to the hidden state, a hidden
    dimension's whatever is written to it and every norm's output. Norms take their mean over the dimensions that are not
    0, as they do when the others are cut off.
    """

    def __init__(self, found: ModelAnatomy):
        self.found, self.current = found, open_masks(found)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Mask `model` while inside; whatever stands in the place of its maps meanwhile, adapters say, too."""
        with ExitStack() as stack:

            def hook(name: str, before: Callable | None, after: Callable | None) -> None:
                module = model.get_submodule(name)
                if before:
                    stack.callback(
                        module.register_forward_pre_hook(
                            lambda _, args: (args[0] * before(), *args[1:])
                        ).remove
                    )
                if after:
                    stack.callback(module.register_forward_hook(lambda _m, _a, out: out * after()).remove)

            for number, block in enumerate(self.found.blocks):
                for one in (block.attention.o, block.ffn.output):
                    hook(one.name, *self._sides(number, block, one))
            for name in self._norms(model):
                hook(name, self._wider, self._narrower)
            for table in self.found.embeddings:
                hook(table.name, None, lambda: self.current["hidden"])
            yield

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Multiply the masks into the weights, in place: the logits are those of the masked model, but for the norms'
        means, which follow when the units of mask 0 are cut off."""
        hidden = self.current["hidden"]
        for number, block in enumerate(self.found.blocks):
            for one in block.linears:
                weight = model.get_submodule(one.name).weight
                if not _writes(one):
                    weight.mul_(hidden)
                    continue
                columns, rows = (side() for side in self._sides(number, block, one))
                weight.mul_(rows[:, None] * columns)
                if model.get_submodule(one.name).bias is not None:
                    model.get_submodule(one.name).bias.mul_(rows)
        tables = [model.get_submodule(one.name).weight for one in self.found.embeddings]
        heads = [model.get_submodule(one.name).weight for one in self.found.heads]
        for weight in {id(one): one for one in (*tables, *heads)}.values():  # a tied one once
            weight.mul_(hidden)

    def _sides(self, number: int, block: Block, one) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """What multiplies the inputs and the outputs of a map that writes to the hidden state."""

        def inputs() -> Tensor:
            if one.role == "out":
                return self.current["ffn"][number]
            width = one.in_features // self.current["heads"].shape[1]
            return self.current["heads"][number].repeat_interleave(width)

        return inputs, lambda: self.current["layers"][number] * self.current["hidden"]

    def _norms(self, model: nn.Module) -> list[str]:
        names = [
            name
            for name, module in model.named_modules()
            if families.is_norm(name, module) and families.norm_width(module) == self.found.hidden_size
        ]
        kinds = {type(model.get_submodule(name)).__name__ for name in names}
        if len(names) != 2 * len(self.found.blocks) + 1 or not all("RMS" in kind for kind in kinds):
            raise UnknownFamily(
                f"a {self.found.family} model has {len(names)} norms of kinds {', '.join(sorted(kinds))} over its hidden "
                f"state; masks on hidden dimensions know RMS norms, two in a block and one at the end."
            )
        return names

    def _share(self) -> float:
        return math.sqrt(max(1, int((self.current["hidden"] > 0).sum())) / self.found.hidden_size)

    def _wider(self) -> float:
        return 1 / self._share()

    def _narrower(self) -> Tensor:
        return self.current["hidden"] * self._share()


def _writes(one) -> bool:
    return one.role in ("o", "out")
