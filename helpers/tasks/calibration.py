"""Batches for techniques that look at activations: text to train on, never text that is scored."""

from typing import Any

import torch

from helpers.errors import BadData
from helpers.tasks import pydocs_tasks
from helpers.tasks.base import Task
from helpers.tasks.batching import batches_by_length, pad_batch

BATCH_TOKENS = 4096


def calibration_batches(
    task: Task, tokenizer: Any, *, n: int = 128, length: int = 128, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """`n` sequences of at most `length` tokens from the task's training split, in padded batches on the CPU.

    Language models get packed windows of exactly `length` tokens without labels, classifiers texts without labels,
    encoder-decoders prompts with the target tokens as `labels` (their decoder needs them). Where the task has
    nothing to train on, harvested documents stand in: see `calibration_source`.

    Raises:
        BadData: fewer than `n` sequences.
    """
    source = _source(task)
    features = source.training_features(tokenizer, limit=n, seed=seed, length=length)
    if len(features) < n:
        raise BadData(
            f"{calibration_source(task)} gives {len(features)} sequences for calibration, {n} were asked for."
        )
    kept = (
        ("input_ids", "token_type_ids", "labels")
        if task.kind == "generation"
        else ("input_ids", "token_type_ids")
    )
    items = [{name: value for name, value in feature.items() if name in kept} for feature in features]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batches = batches_by_length([len(item["input_ids"]) for item in items], BATCH_TOKENS)
    return [pad_batch([items[i] for i in indices], pad_id=pad) for indices in batches]


def calibration_source(task: Task) -> str:
    """Where `calibration_batches` come from, for a row's provenance."""
    if task.has_training():
        return f"{task.training_source} train"
    return f"{_source(task).training_source} train ({task.source} has no training split here)"


def _source(task: Task) -> Task:
    if task.has_training():
        return task
    kinds = {"language-modelling": "pydocs-lm", "minimal-pairs": "pydocs-lm", "generation": "pydocs-summary"}
    return pydocs_tasks.TASKS[kinds.get(task.kind, "pydocs-library")](limit=100)
