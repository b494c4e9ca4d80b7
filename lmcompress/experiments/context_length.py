"""Texts longer than those a model was trained on: its perplexity by window, positions stretched or as they were."""

from pathlib import Path

import torch

from lmcompress import measure
from lmcompress.models import loading
from lmcompress.stats import statistic_interval
from lmcompress.tasks import load_task
from lmcompress.tasks.base import Run
from lmcompress.train import presets

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
    """Perplexity of the same text in windows of 1, and of every factor above it, times `trained` tokens.

    A window scores its second half, so that each of its targets sees at least half a window: in one of twice the length of
    training, all of them stand beyond that length. The first half of the text's first window is scored, too.

    Args:
        name: a model with rotary positions; loaded anew for every way.
        task: of language modelling.
        trained: tokens of a text in training.
        factors: windows, and the factors by which positions are stretched; a stretched model reads short windows, too.
        kinds: ways to stretch, of `recipes.longer`.
        limit: documents.

    Returns:
        Entries "window", "kind" ("none": as trained), "stretch", "value", "low", "high", and "difference", paired, to the
        model as trained at the same window (None for itself).
    """
    ways = [("none", 1), *((kind, factor) for factor in factors if factor > 1 for kind in kinds)]
    found, as_trained = [], {}
    for kind, stretch in ways:
        loaded = loading.load(name)
        model = (
            loaded.model if kind == "none" else presets.longer(loaded.model, stretch, kind, trained=trained)
        )
        for factor in factors if kind == "none" else (1, stretch):
            window = factor * trained
            scored = load_task(task, limit=limit, window=window, stride=window // 2)
            with torch.no_grad():
                columns, _ = scored.score(Run(model, loaded.tokenizer, batch_tokens, False))
            interval = statistic_interval(scored.statistic, columns, block=scored.block)
            other = as_trained.setdefault(window, columns)
            difference = None if other is columns else measure.compare(scored, columns, other)
            place = {"window": window, "kind": kind, "stretch": stretch, "difference": difference}
            found.append(place | interval.as_dict())
    return found
