"""TextPruner (Yang, Cui & Chen 2022) behind one technique: the one place where that library is touched.

It chooses heads and channels of encoders as `structured` does. What it lacks on transformers 5 is lent to it:
`prune_heads`, which 5.0 removed, and layer widths that follow. The result is saved by `storage`, uneven or
not.
"""

import io
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.importance import require_labels
from lmcompress.compress.structured import Amount, check_iterations, goals_of, units_left
from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families, resizing
from lmcompress.models.anatomy import Block, ModelAnatomy, anatomy, count_parameters

COMMAND = "pip install --no-deps textpruner==1.1.post2"
FAMILIES = ("albert", "bert", "electra", "roberta", "xlm-roberta")
_LISTED = ("t5", "mt5", "bart", "xlm")  # by TextPruner, too


@technique("textpruner", 1, "TextPruner", "#AA4499", "p", needs=("calibration",))
def textpruner(
    model: nn.Module,
    context: Context,
    *,
    heads: Amount = None,
    ffn: Amount = None,
    even: bool = True,
    n_iters: int = 1,
    use_logits: bool = False,
):
    """Let TextPruner remove heads and feed-forward channels of an encoder.

    It scores as `importance` does, one forward and one backward pass per batch and iteration, and chooses
    what heads-ffn chooses, except that uneven, it gives a block that would lose all its heads or channels one
    back: more stay than was asked.

    Args:
        context.calibration: text to score on, with labels unless `use_logits`.
        heads: heads each block keeps (whole number, or a fraction up to 1); None keeps all.
        ffn: channels each block keeps, likewise.
        even: False: the same totals, but the least important of all blocks go.
        n_iters: prune in so many steps, scoring anew before each.
        use_logits: score by the cross-entropy to the dense model's own output, whose gradient is zero at
            first: the scores of the first iteration are rounding noise. TextPruner takes that output from a
            copy in fp16; here the copy is computed in the model's own precision, but its weights stay
            rounded.

    Raises:
        BadSetting: TextPruner is not installed, or an amount is not there.
        UnknownFamily: it cannot prune this family, or not a model pruned before.
        BadData: no labels.
    """
    library = _library()
    _refuse_family(model)
    structure = anatomy(model)
    _refuse_shape(model, structure)
    check_iterations(n_iters)
    require_labels(context.calibration, needed=not use_logits)
    goals, parameters = goals_of(structure, heads, ffn), count_parameters(model)
    blocks = structure.blocks
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        pruner = library.TransformerPruner(
            model,
            library.TransformerPruningConfig(
                target_num_of_heads=goals[blocks[0].attention.name].keep,
                target_ffn_size=goals[blocks[0].name].keep,
                pruning_method="iterative",
                head_even_masking=even,
                ffn_even_masking=even,
                n_iters=n_iters,
                use_logits=use_logits,
            ),
            library.GeneralConfig(use_device=str(next(model.parameters()).device), output_dir=folder),
        )
        if use_logits:
            pruner.model_rep.to(next(model.parameters()).dtype)
        with _heads_prunable(pruner.base_model, structure):
            pruner.prune(dataloader=list(context.calibration), save_model=False)
    _settle(model, blocks)
    kept_units = {block.attention.name: mask for block, mask in zip(blocks, pruner.head_mask)}
    kept_units |= {block.name: mask for block, mask in zip(blocks, pruner.ffn_mask)}
    kept_units = {name: mask.nonzero().flatten().tolist() for name, mask in kept_units.items()}
    return model, TechniqueResult("textpruner", len(goals), units_left(kept_units, goals, parameters, model))


def _library():
    """Return the textpruner package, imported without its remarks on missing tokenizers."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            import textpruner as library
    except ImportError as error:
        raise BadSetting(
            f"textpruner cannot be imported ({error}): install it with `{COMMAND}`, in a step of its own, or "
            "use heads-ffn, which prunes the same way."
        ) from error
    return library


def _refuse_family(model: nn.Module) -> None:
    family, decodes = model.config.model_type, getattr(model.config, "is_decoder", False)
    if family in FAMILIES and not decodes:
        return
    reason = f"TextPruner knows no {family}{' decoders' if decodes else ''}"
    if family in _LISTED:
        reason = (
            f"TextPruner lists {family} but crashes on it: it looks for intermediate_size in a config without"
        )
    raise UnknownFamily(
        f"{reason}; it works for {', '.join(FAMILIES)} encoders. Use heads-ffn: the same importance, for "
        f"every family."
    )


def _refuse_shape(model: nn.Module, structure: ModelAnatomy) -> None:
    if structure.family == "albert" and len(structure.blocks) > 1:
        raise UnknownFamily(
            "TextPruner prunes ALBERT's first layer only, and this one has more: use heads-ffn."
        )
    config = model.config
    shape = (config.num_attention_heads, config.intermediate_size)
    if any((b.attention.heads, b.ffn.width) != shape for b in structure.blocks):
        raise UnknownFamily(
            f"TextPruner reads {shape[0]} heads and {shape[1]} channels from the config, but a block has "
            "others: it was pruned before. Use heads-ffn, or start from the dense model."
        )


@contextmanager
def _heads_prunable(base: nn.Module, structure: ModelAnatomy):
    """Lend `base` a `prune_heads` while inside: {block: heads that go}, cut out of q, k, v and the output."""

    def prune_heads(removed: dict[int, list[int]]) -> None:
        memo: resizing.Memo = {}
        for number, heads in removed.items():
            attention = structure.blocks[number].attention
            stay = [head for head in range(attention.heads) if head not in heads]
            resizing.cut_attention(attention, torch.tensor(stay), memo)

    base.prune_heads = prune_heads
    try:
        yield
    finally:
        del base.prune_heads


def _settle(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Let the attributes that repeat a feed-forward's width follow the weights TextPruner put in."""
    for block in blocks:
        width = block.ffn.output.weight2d().shape[1]
        for layer in block.ffn.inputs:
            layer.module.out_features = width
        block.ffn.output.module.in_features = width
        owner = model.get_submodule(block.ffn.output.name.rpartition(".")[0])
        resizing.set_ints(owner, families.FFN_WIDTH_ATTRIBUTES, width)
    resizing.settle_config(model)
