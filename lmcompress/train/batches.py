"""From token features to batches: who goes with whom, in which order, padded to what.

The order is a pure function of the seed and the step, so a resumed run sees the batches it would have seen.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from lmcompress.errors import BadData
from lmcompress.tasks.batching import IGNORED, pad_batch

NOTHING_TO_PREDICT = "the features hold nothing to predict: every label is masked out, or too short."
_POOL_BATCHES = 50  # batches that are sorted by length together; more saves padding, fewer mixes better

Feature = Mapping[str, Sequence[int] | int | float]
Batch = dict[str, torch.Tensor]


def grouped_order(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the indices of one epoch's batches, shuffled, of `lengths` `(examples,)` similar in each."""
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), pool := batch_size * _POOL_BATCHES):
        group = shuffled[start : start + pool]
        group = group[np.argsort(-lengths[group], kind="stable")]
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batch_stream(
    features: Sequence[Feature], batch_size: int, *, pad_id: int, seed: int, start: int = 0
) -> Iterator[Batch]:
    """Yield batches without end, epoch after epoch, beginning with the `start`-th of the whole run."""
    lengths = np.array([len(feature["input_ids"]) for feature in features])
    per_epoch = len(grouped_order(lengths, batch_size, seed=seed, epoch=0))
    epoch, skip = divmod(start, per_epoch)
    while True:
        for indices in grouped_order(lengths, batch_size, seed=seed, epoch=epoch)[skip:]:
            yield collate([features[i] for i in indices], pad_id=pad_id)
        epoch, skip = epoch + 1, 0


def evaluation_batches(features: Sequence[Feature], batch_size: int, *, pad_id: int) -> Iterator[Batch]:
    """Yield every example once, longest first, so that the first batch shows the memory that is needed."""
    order = np.argsort([-len(feature["input_ids"]) for feature in features], kind="stable")
    for start in range(0, len(order), batch_size):
        yield collate([features[i] for i in order[start : start + batch_size]], pad_id=pad_id)


def collate(features: Sequence[Feature], *, pad_id: int) -> Batch:
    """Pad as `pad_batch`, without the mask when nothing is padded: SDPA then takes its causal kernel."""
    batch = pad_batch(features, pad_id=pad_id)
    if bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    return batch


def count_targets(batch: Batch, *, shifted: bool) -> int:
    """Return how many targets the mean loss has: predicted tokens (`shifted`: not a row's first), or rows."""
    labels = batch["labels"]
    if labels.ndim == 1:
        return len(labels)
    return int((labels[:, 1:] if shifted else labels).ne(IGNORED).sum())


def binary(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits of yes and no of each class by itself, `(batch * classes, 2)`, of a multi-label head.

    The softmax of (z, 0) is the sigmoid of z, by which such a head is trained.
    """
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(0, 1)


def token_masks(batch: Batch, stack: str, kind: str) -> dict[str, torch.Tensor | None]:
    """Return which tokens count, `(batch, seq)`: "own" of the stack, "other" its cross-attention reads."""
    mask = batch.get("attention_mask")
    if kind != "encoder-decoder" or stack == "encoder":
        return {"own": mask, "other": None}
    decoder_mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if decoder_mask is None and labels is not None and labels.dim() == 2:
        decoder_mask = labels != IGNORED
    elif decoder_mask is None and mask is not None and "decoder_input_ids" not in batch:
        decoder_mask = mask  # the model feeds its decoder the input, shifted right
    return {"own": decoder_mask, "other": mask}


def pieces(
    batch: Batch, count: int, *, shifted: bool, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Batch, int]]:
    """Yield the `count` pieces of a step for process `rank` of `ranks`, each with its number of targets.

    A mean over no target is NaN: one process leaves such a piece out. Several have to run equally often:
    there it is a row with made-up labels, to be weighted by its 0 targets.
    """
    split = {name: tensor.tensor_split(count * ranks) for name, tensor in batch.items()}
    for index in range(rank, count * ranks, ranks):
        piece = {name: pieces[index] for name, pieces in split.items()}
        if targets := count_targets(piece, shifted=shifted):
            yield piece, targets
        elif ranks > 1:
            row = {name: tensor[:1] for name, tensor in batch.items()}
            yield row | {"labels": row["labels"].clamp(min=0)}, 0


def check_features(features: Sequence[Feature]) -> None:
    """Raise `BadData` for no features, no labels, or an example without tokens."""
    if not len(features):
        raise BadData("no training features: the list is empty. Check the task's split and limit.")
    for index, feature in enumerate(features):
        if "input_ids" not in feature or "labels" not in feature:
            raise BadData(f"feature {index} has {sorted(feature)}; input_ids and labels are needed.")
        if not len(feature["input_ids"]):
            raise BadData(f"feature {index} holds no tokens; drop empty examples before training.")
