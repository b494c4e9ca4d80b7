"""Published training recipes, and longer contexts for models with rotary positions."""

import torch
from torch import nn

from helpers.errors import BadSetting, UnknownFamily

_KINDS = ("linear", "dynamic", "yarn")


def published() -> dict:
    """The sheared model's recipe at full scale (METHODS, section 9): everything of a `TrainSpec` but its data."""
    return {
        "steps": 100_000,
        "batch_size": 128,
        "micro_batches": 4,
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-5,
        "warmup_steps": 2000,
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "clip": 1.0,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "dtype": torch.bfloat16,
    }


def longer(model: nn.Module, factor: float, kind: str = "linear") -> nn.Module:
    """Stretch rotary positions in place, and in the config, for texts `factor` times as long as in training.

    "linear": all angles divided by `factor` (Chen et al. 2023). "dynamic": the base grows with the text once it is
    longer than in training (NTK-aware), short texts stay exactly as they were. "yarn": slow angles are divided, fast
    ones kept, and logits made sharper (Peng et al. 2023). Local attention, where a family has both, is left alone.

    Returns:
        `model`.

    Raises:
        UnknownFamily: no rotary positions.
        BadSetting: no such kind, a factor not above 1, or positions that are stretched already.
    """
    if kind not in _KINDS or factor <= 1:
        raise BadSetting(f"kind={kind!r}, factor={factor}: kinds are {', '.join(_KINDS)}; factor is above 1.")
    rotaries = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if not rotaries:
        raise UnknownFamily(
            f"{type(model).__name__} has no rotary positions to stretch; its length is fixed by its table of "
            "positions, or has no limit."
        )
    config = rotaries[0][1].config
    before, trained = config.rope_parameters, config.max_position_embeddings
    nested = "full_attention" in before
    old = before["full_attention"] if nested else before
    if old["rope_type"] != "default":
        raise BadSetting(f"positions are {old['rope_type']} already; begin with the model as it was trained.")
    new = old | {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        new["original_max_position_embeddings"] = trained
    config.rope_parameters = before | {"full_attention": new} if nested else new
    if kind != "dynamic":  # which measures texts against the length of training
        config.max_position_embeddings = round(factor * trained)
    for name, rotary in rotaries:
        model.set_submodule(name, type(rotary)(config=config).to(model.device))
    return model
