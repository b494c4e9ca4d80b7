"""Batches for techniques that look at activations or gradients: of training text, never scored text."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lmcompress.errors import BadData
from lmcompress.tasks import harvested
from lmcompress.tasks.base import Task
from lmcompress.tasks.batching import batches_by_length, max_length, pad_batch, pad_id
from lmcompress.tasks.capabilities import capabilities

BATCH_TOKENS = 4096
_STAND_INS = {"language-modelling": "pydocs-lm", "minimal-pairs": "pydocs-lm"}
_STAND_INS |= {"multiple-choice": "pydocs-lm", "generation": "pydocs-summary"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """How much text a technique may look at: `n` sequences of at most `length` tokens, drawn by `seed`.

    `scored` takes them from the examples that are scored, as several published studies did. It exists to show
    what that does to a result; a row made with it says so in its settings.
    """

    n: int = 128
    length: int = 128
    seed: int = 0
    scored: bool = False

    def settings(self) -> dict:
        """Return what goes into the row's settings, and so into its key."""
        return {name: value for name, value in asdict(self).items() if name != "scored" or value}


def calibration_batches(
    task: Task,
    tokenizer: Any,
    *,
    n: int = 128,
    length: int = 128,
    seed: int = 0,
    labels: bool = False,
    scored: bool = False,
    model: nn.Module | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Return `n` sequences of at most `length` tokens of training text, in padded batches on the CPU.

    Language models get packed windows of exactly `length` tokens, classifiers texts, encoder-decoders prompts
    with the target tokens as `labels` (their decoder needs them). Where the task has nothing to train on,
    harvested documents stand in (`calibration_source`), without their labels for a classifier.

    Args:
        labels: with the task's `labels`, for techniques that need a loss.
        scored: from the evaluated examples instead (see `Calibration`).
        model: that is to run on them: its positions, padding and classes count.

    Raises:
        BadData: fewer than `n` sequences.
    """
    source, size = _source(task, model), max_length(tokenizer, model, cap=length)
    if size < length:
        log.warning("calibrating on sequences of %d tokens, not %d: the model holds no more", size, length)
    if scored:
        features = task.features(tokenizer, task.examples, length=size, model=model)[:n]
    else:  # the classes of documents that stand in are not the model's
        trained = model if source is task else None
        features = source.training_features(tokenizer, limit=n, seed=seed, length=size, model=trained)
    if len(features) < n:
        raise BadData(
            f"{calibration_source(task, model)} gives {len(features)} sequences for calibration, {n} were "
            "asked for."
        )
    labels = labels and (source is task or source.kind == "language-modelling")
    inputs = {"input_ids", "token_type_ids"} | ({"labels"} if labels or task.kind == "generation" else set())
    features = [{name: tokens for name, tokens in row.items() if name in inputs} for row in features]
    batches = batches_by_length([len(row["input_ids"]) for row in features], BATCH_TOKENS)
    pad = pad_id(tokenizer, model)
    return [pad_batch([features[i] for i in indices], pad_id=pad) for indices in batches]


def calibration_source(task: Task, model: nn.Module | None = None) -> str:
    """Return where `calibration_batches` of `model` come from, for a row's provenance."""
    if task.has_training():
        return f"{task.training_source} train"
    return f"{_source(task, model).training_source} train ({task.source} has no training split here)"


def _source(task: Task, model: nn.Module | None) -> Task:
    if task.has_training():
        return task
    name = _STAND_INS.get(task.kind, "pydocs-library")
    if task.needs == "writing" and model is not None and "language modelling" in capabilities(model):
        name = "pydocs-lm"  # a decoder reads one text
    return harvested.TASKS[name](limit=100)
