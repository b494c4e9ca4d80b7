"""Pruning by expert: of a mixture of experts, those go that the text uses least."""

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import on_device, without_cache
from lmcompress.compress.masks import smallest
from lmcompress.compress.settings import Amount
from lmcompress.compress.structured import resolve_amount
from lmcompress.errors import UnknownFamily
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.models.mixtures import experts_in, is_mixture
from lmcompress.models.surgery import keep_experts
from lmcompress.train.batches import token_masks
from lmcompress.train.trainer import evaluating


@technique("drop-experts", 1, "Experts dropped", "#4D4D4D", "h", needs=("calibration",))
def drop_experts(model, context, *, kept_experts: Amount):
    """Keep the experts that tokens of the calibration text give most weight, in every mixture alike.

    Args:
        context.calibration: text for `expert_usage`.
        kept_experts: how many each mixture keeps (a number, or a fraction up to 1), at least as many as a
            token uses.
    """
    usage, parameters = expert_usage(model, context), count_parameters(model)
    keep = {}
    for name, weights in usage.items():
        stay = resolve_amount(kept_experts, len(weights), 1, f"the experts of {name}")
        keep[name] = (~smallest(weights, len(weights) - stay)).nonzero().flatten().tolist()
    smaller = keep_experts(model, keep)
    figures = {"experts_kept": keep, "usage": {name: weights.tolist() for name, weights in usage.items()}}
    figures["parameters_share"] = count_parameters(smaller) / parameters
    return smaller, TechniqueResult("drop-experts", len(keep), figures)


@torch.no_grad()
def expert_usage(model: nn.Module, context: Context) -> dict[str, Tensor]:
    """Return block name -> `(experts,)` shares of the weight that tokens (not padding) give its experts."""
    structure, totals, mask = anatomy(model), {}, {"own": None}

    def count(name: str, module: nn.Module, args: tuple) -> None:
        if len(args) < 3:
            raise UnknownFamily(
                f"{name}: a {type(module).__name__} is not told which expert a token goes to."
            )
        chosen, weights = args[1].flatten(0, -2), args[2].flatten(0, -2).float()
        if mask["own"] is not None:
            weights = weights * mask["own"].reshape(-1, 1).to(weights)
        totals[name].index_add_(0, chosen.flatten().cpu(), weights.flatten().cpu())

    mixed = [block for block in structure.blocks if any(map(is_mixture, block.module.modules()))]
    with ExitStack() as hooks, evaluating(model):
        for block in mixed or structure.blocks[:1]:  # whose error says what was looked for
            _, experts = experts_in(block.module, block.name)
            totals[block.name] = torch.zeros(experts.num_experts)
            hooks.enter_context(experts.register_forward_pre_hook(partial(count, block.name)))
        for batch in on_device(model, context.calibration):
            mask = token_masks(batch, structure.blocks[0].stack, structure.kind)
            model(**batch, **without_cache(structure.kind))
    return {name: weights / weights.sum() for name, weights in totals.items()}
