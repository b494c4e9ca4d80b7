"""Which parameter learns how fast: AdamW's groups, their decay and the schedule."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import get_scheduler

from lmcompress.models.anatomy import anatomy
from lmcompress.train.spec import TrainSpec


def optimizer_for(
    parameters: Mapping[str, nn.Parameter], spec: TrainSpec, powers: Callable[[str], int] | None = None
):
    """Return AdamW without decay on vectors (norms, biases), and a cosine with warm-up to the minimum rate.

    `powers` of `spec.layer_decay`, by parameter name, multiply both rates; the highest comes first.
    """
    groups: dict[tuple[int, bool], list] = {}
    for name, parameter in parameters.items():
        group = powers(name) if powers else 0, parameter.ndim < 2
        groups.setdefault(group, []).append(parameter)
    settings = [
        {
            "params": groups[power, vectors],
            "weight_decay": 0.0 if vectors else spec.weight_decay,
            "lr": spec.learning_rate * spec.layer_decay**power,
        }
        for power, vectors in sorted(groups)
    ]
    optimizer = torch.optim.AdamW(settings, lr=spec.learning_rate, betas=spec.betas, fused=True)
    minimum = {"scheduler_specific_kwargs": {"min_lr": spec.min_learning_rate}}
    return optimizer, get_scheduler("cosine_with_min_lr", optimizer, spec.warmup_steps, spec.steps, **minimum)


def layer_powers(model: nn.Module, spec: TrainSpec) -> Callable[[str], int] | None:
    """Return parameter name -> power of the layer-wise decay (Howard and Ruder 2018), or None without decay.

    B - l in block l = 0 … B-1 (encoder, then decoder), B + 1 in the embeddings, 0 elsewhere: heads, poolers,
    final norms. A head tied to the embeddings is one of them.

    Raises:
        UnknownFamily: no blocks were found.
    """
    if spec.layer_decay == 1:
        return None
    structure = anatomy(model)
    depth = len(structure.blocks)
    blocks = {f"{block.name}.": depth - index for index, block in enumerate(structure.blocks)}
    heads = tuple(f"{head.name}." for head in structure.heads)
    tables = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Embedding))

    def power(name: str) -> int:
        for prefix, blocks_above in blocks.items():
            if name.startswith(prefix):
                return blocks_above
        low = not name.startswith(heads) and (name.startswith(tables) or "embed" in name)
        return depth + 1 if low else 0

    return power
