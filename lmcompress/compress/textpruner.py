"""TextPruner (Yang, Cui & Chen 2022) behind one technique: the one place where that library is touched.

It chooses heads and channels of encoders as `structured` does. What it lacks on transformers 5 is lent to it:
`prune_heads`, which 5.0 removed, and layer widths that follow.
"""

import io
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import torch
from torch import nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import on_device
from lmcompress.compress.settings import Amount
from lmcompress.compress.structured import goals_of, require_labels, units_left
from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import families, surgery
from lmcompress.models.anatomy import ModelAnatomy, anatomy, count_parameters
from lmcompress.paths import scratch_folder

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

    It scores as `importance` does and chooses what heads-ffn chooses, except that uneven, it gives a block
    that would lose all its heads or channels one back: more stay than was asked.

    Args:
        context.calibration: text to score on, with labels unless `use_logits`.
        heads, ffn, even, n_iters: as for "heads-ffn".
        use_logits: score by the cross-entropy to the dense model's own output, whose gradient is zero at
            first: the scores of the first iteration are rounding noise. TextPruner takes that output from a
            copy in fp16; here it runs in the model's own precision, but its weights stay rounded.
    """
    library = _library()
    structure = _structure(model)
    batches = on_device(model, context.calibration)
    require_labels(batches, needed=not use_logits)
    goals, parameters = goals_of(structure, heads, ffn), count_parameters(model)
    blocks = structure.blocks
    parameter = next(model.parameters())
    with scratch_folder() as folder, redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        pruning = library.TransformerPruningConfig(
            target_num_of_heads=goals[blocks[0].attention.name].keep,
            target_ffn_size=goals[blocks[0].name].keep,
            pruning_method="iterative",
            n_iters=n_iters,
            use_logits=use_logits,
            head_even_masking=even,
            ffn_even_masking=even,
        )
        general = library.GeneralConfig(use_device=str(parameter.device), output_dir=str(folder))
        pruner = library.TransformerPruner(model, pruning, general)
        if use_logits:
            pruner.model_rep.to(parameter.dtype)
        pruner.base_model.prune_heads = partial(_prune_heads, structure)
        try:
            pruner.prune(dataloader=batches, save_model=False)
        finally:
            del pruner.base_model.prune_heads
    for block in blocks:  # attributes that repeat a width follow the weights TextPruner put in
        output, width = block.ffn.output, block.ffn.output.weight2d().shape[1]
        for layer in block.ffn.inputs:
            layer.module.out_features = width
        output.module.in_features = width
        owner = model.get_submodule(output.name.rpartition(".")[0])
        surgery.set_ints(owner, families.FFN_WIDTH_ATTRIBUTES, width)
    surgery.settle_config(model)
    kept_units = {block.attention.name: mask for block, mask in zip(blocks, pruner.head_mask)}
    kept_units |= {block.name: mask for block, mask in zip(blocks, pruner.ffn_mask)}
    kept_units = {name: mask.nonzero().flatten().tolist() for name, mask in kept_units.items()}
    return model, TechniqueResult("textpruner", len(goals), units_left(kept_units, goals, parameters, model))


def _library():
    """Return the textpruner package, imported without its remarks on missing tokenizers."""
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
            import textpruner as library
    except ImportError as error:
        raise BadSetting(
            f"textpruner cannot be imported ({error}): install it with `{COMMAND}`, in a step of its own, or "
            "use heads-ffn, which prunes the same way."
        ) from error
    return library


def _structure(model: nn.Module) -> ModelAnatomy:
    """Return the anatomy of a model that TextPruner can prune; raise `UnknownFamily` for others."""
    config = model.config
    family, decodes = config.model_type, getattr(config, "is_decoder", False)
    if family not in FAMILIES or decodes:
        reason = f"TextPruner knows no {family}{' decoders' if decodes else ''}"
        if family in _LISTED:
            reason = f"TextPruner lists {family} but crashes on it, whose config has no intermediate_size"
        encoders = f"it works for {', '.join(FAMILIES)} encoders"
        raise UnknownFamily(f"{reason}; {encoders}. Use heads-ffn: the same importance, for every family.")
    structure = anatomy(model)
    if family == "albert" and len(structure.blocks) > 1:
        raise UnknownFamily("TextPruner prunes ALBERT's first layer only, and this has more: use heads-ffn.")
    shape = (config.num_attention_heads, config.intermediate_size)
    if any((block.attention.heads, block.ffn.width) != shape for block in structure.blocks):
        raise UnknownFamily(
            f"TextPruner reads {shape[0]} heads and {shape[1]} channels from the config, but a block has "
            "others: it was pruned before. Use heads-ffn, or start from the dense model."
        )
    return structure


def _prune_heads(structure: ModelAnatomy, removed: dict[int, list[int]]) -> None:
    """Cut heads, numbered by block, out of q, k, v and the output, as models did before transformers 5."""
    memo: surgery.Memo = {}
    for number, heads in removed.items():
        attention = structure.blocks[number].attention
        stay = [head for head in range(attention.heads) if head not in heads]
        surgery.cut_attention(attention, torch.tensor(stay), memo)
