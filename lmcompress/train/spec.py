"""What decides a run of training, the optimizer that it asks for, and the record of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import get_scheduler

from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import anatomy
from lmcompress.train.batches import Feature
from lmcompress.train.lora import Lora

_COUNTS = ("steps", "batch_size", "checkpoint_every", "evaluate_every")
_SHARES = ("attention_dropout", "hidden_dropout", "label_smoothing")


@dataclass(frozen=True)
class TrainSpec:
    """Everything that decides the outcome of a run, and where it is kept."""

    features: Sequence[Feature]  # an example each: `input_ids`, `labels`, and what else the forward takes
    steps: int  # of the optimizer; the schedule is laid out over them
    batch_size: int = 32  # examples per optimizer step
    micro_batches: int = 1  # pieces a step is cut into, to fit memory; the update does not depend on it
    learning_rate: float = 1e-4  # peak, after `warmup_steps`; then a cosine to `min_learning_rate`
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0  # largest global gradient norm
    seed: int = 0
    dtype: torch.dtype = torch.float32  # bfloat16: forward passes under autocast, weights as they are
    checkpoint: Path | None = None  # folder for checkpoints; None: none
    checkpoint_every: int = 500
    replace_other: bool = False  # remove another run's checkpoint from that folder instead of refusing
    evaluate: Sequence[Feature] | None = None  # their loss is recorded every so many steps and at the end
    evaluate_every: int = 500
    layer_decay: float = 1.0  # each block's rate over that of the block above (`layer_powers`)
    gradient_checkpointing: bool = False  # keep blocks' inputs only, compute the rest again going back
    attention: str | None = None  # "sdpa" or "eager" while training; None: as the model has it
    compile: bool = False  # fuse each block and the loss; takes a C++ compiler and up to a minute to begin
    attention_dropout: float | None = None  # while training; None: as the model has it
    hidden_dropout: float | None = None
    label_smoothing: float = 0.0  # share of a target spread over all classes; not in `evaluate`
    lora: Lora | None = None  # train adapters on the blocks' linear layers only, and merge them at the end
    log_dir: Path | None = None  # folder for TensorBoard's curves; None: none

    def __post_init__(self) -> None:
        legal = {
            **{name: getattr(self, name) >= 1 for name in _COUNTS},
            "micro_batches": 1 <= self.micro_batches <= self.batch_size,
            "learning_rate": self.learning_rate > 0,
            "min_learning_rate": 0 <= self.min_learning_rate <= self.learning_rate,
            "warmup_steps": 0 <= self.warmup_steps <= self.steps,
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip > 0,
            "dtype": self.dtype in (torch.float32, torch.bfloat16),
            "layer_decay": 0 < self.layer_decay <= 1,
            "attention": self.attention in (None, "sdpa", "eager"),
            **{name: 0 <= (getattr(self, name) or 0.0) < 1 for name in _SHARES},
        }
        if wrong := [f"{name}={getattr(self, name)}" for name, ok in legal.items() if not ok]:
            raise BadSetting(
                f"out of range: {', '.join(wrong)}. Counts are at least 1, 0 <= min_learning_rate <= "
                "learning_rate, 0 <= warmup_steps <= steps, micro_batches <= batch_size, dtype float32 or "
                "bfloat16, 0 < layer_decay <= 1, attention sdpa or eager, dropouts and label_smoothing from "
                "0 to below 1."
            )


@dataclass
class History:
    """What happened: the mean loss per target of each step, in nats; seconds and tokens are totals."""

    steps: list[dict] = field(default_factory=list)  # {step, loss, lr, seconds, tokens}
    validation: list[dict] = field(default_factory=list)  # {step, loss, targets}


def grouped(history: History, *, size: int) -> list[tuple[dict, float]]:
    """Return the last step and the mean loss of every `size` steps."""
    groups = [history.steps[start : start + size] for start in range(0, len(history.steps), size)]
    return [(group[-1], float(np.mean([step["loss"] for step in group]))) for group in groups]


def curve(history: History, *, points: int = 40) -> dict:
    """Return a history short enough for a row: at most `points` means over equally many steps (but the last).

    "train" and "validation" are lists of `[step, loss]` (a mean stands at its last step), as is whatever else
    validation held, under its name; "seconds" and "tokens" are those of the whole run.
    """
    groups = grouped(history, size=math.ceil(len(history.steps) / points))
    curves = {"train": [[end["step"], _rounded(loss)] for end, loss in groups]}
    for name in history.validation[0] if history.validation else ():
        if name not in ("step", "targets"):
            points_seen = [[entry["step"], _rounded(entry[name])] for entry in history.validation]
            curves["validation" if name == "loss" else name] = points_seen
    last = history.steps[-1]
    return curves | {"seconds": round(last["seconds"], 1), "tokens": last["tokens"]}


def _rounded(loss: float) -> float:
    return float(f"{loss:.5g}")


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

    B - l in block l = 0 … B-1 (encoder, then decoder), B + 1 in embeddings and heads tied to them, else 0.
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
