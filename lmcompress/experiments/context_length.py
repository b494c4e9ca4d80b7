"""Texts longer than those a model was trained on: RoPE scaling, and perplexity by window."""

from pathlib import Path

import torch
from torch import nn

from lmcompress import measure
from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models import loading
from lmcompress.stats import statistic_interval
from lmcompress.tasks import load_task
from lmcompress.tasks.base import Run

KINDS = ("linear", "dynamic", "yarn")


def context_lengths(
    name: str | Path,
    task: str,
    *,
    trained: int,
    factors: list[int],
    kinds: list[str] = KINDS,
    limit: int | None = None,
    batch_tokens: int = 8192,
) -> list[dict]:
    """Return the perplexity of the same text in windows of `factors` (1, 2 …) times `trained` tokens.

    A window scores its second half (and the first window all), so that each target sees at least half a
    window: in one of twice the length of training, all of them stand beyond that length. The model has rotary
    positions and is loaded anew for every scaling; a scaled one reads short windows, too.

    Returns:
        Entries "window", "kind" ("none": as trained), "stretch", "value", "low", "high", and "difference",
        paired, to the model as trained at the same window (None for itself).
    """
    scalings = [("none", 1), *((kind, factor) for factor in factors if factor > 1 for kind in kinds)]
    entries, as_trained = [], {}
    for kind, factor in scalings:
        loaded = loading.load(name)
        if kind != "none":
            longer(loaded.model, factor, kind, trained=trained)
        for window_factor in factors if kind == "none" else (1, factor):
            window = window_factor * trained
            model_task = load_task(task, limit=limit, window=window, stride=window // 2)
            with torch.no_grad():
                columns, _ = model_task.score(Run(loaded.model, loaded.tokenizer, batch_tokens, False))
            interval = statistic_interval(model_task.statistic, columns, block=model_task.block)
            unscaled = as_trained.setdefault(window, columns)
            difference = None if unscaled is columns else measure.compare(model_task, columns, unscaled)
            entry = {"window": window, "kind": kind, "stretch": factor, "difference": difference}
            entries.append(entry | interval.as_dict())
    return entries


def longer(model: nn.Module, factor: float, kind: str = "linear", *, trained: int | None = None) -> nn.Module:
    """Scale rotary positions of `model`, in its config, too, for texts `factor` times as long; return it.

    "linear": all angles divided by `factor` (Chen et al. 2023). "dynamic": the base grows with the text once
    it is longer than in training (NTK-aware), short texts stay exactly as they were. "yarn": slow angles are
    divided, fast ones kept, and logits made sharper (Peng et al. 2023). Local attention, where a family has
    both, is left alone. `trained` are tokens of a text in training, by default the config's limit.

    Raises:
        UnknownFamily: no rotary positions.
        BadSetting: no such kind, a factor not above 1, or positions that are scaled already.
    """
    if kind not in KINDS or factor <= 1:
        raise BadSetting(f"kind={kind!r}, factor={factor}: kinds are {', '.join(KINDS)}; factor is above 1.")
    rotaries = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if not rotaries:
        raise UnknownFamily(
            f"{type(model).__name__} has no rotary positions to stretch; its length is fixed by its table of "
            "positions, or has no limit."
        )
    config = rotaries[0][1].config
    parameters, trained = config.rope_parameters, trained or config.max_position_embeddings
    by_layer_type = "full_attention" in parameters
    unscaled = parameters["full_attention"] if by_layer_type else parameters
    if unscaled["rope_type"] != "default":
        raise BadSetting(
            f"positions are {unscaled['rope_type']} already; begin with the model as it was trained."
        )
    config.max_position_embeddings = trained
    scaled = unscaled | {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = trained
    config.rope_parameters = parameters | {"full_attention": scaled} if by_layer_type else scaled
    if kind != "dynamic":  # which measures texts against the length of training, read from the config
        config.max_position_embeddings = round(factor * trained)
    for name, rotary in rotaries:
        model.set_submodule(name, type(rotary)(config=config).to(model.device))
    return model
