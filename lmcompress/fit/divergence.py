"""How far a candidate's outputs are from the dense model's on a few texts: what needs no labels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcompress.tasks.base import Run
from lmcompress.tasks.batching import IGNORED

TEXTS = 64
POSITIONS = 16  # of a text, where a model answers at each


def outputs(model: nn.Module, tokenizer: object, items: Sequence[dict]) -> list[np.ndarray]:
    """Return each text's outputs, `(positions, width)`: logits at some positions, or last states."""
    takes_labels = model.config.is_encoder_decoder and np.ndim(items[0].get("labels", 0)) == 1
    inputs = [{k: v for k, v in item.items() if k != "labels" or takes_labels} for item in items]

    @torch.no_grad()
    def rows(batch: dict[str, Tensor]) -> list[np.ndarray]:
        output = model(**batch)
        values = output.logits if "logits" in output else output.last_hidden_state
        values = values.float()
        if values.dim() == 2:
            return list(values[:, None].cpu().numpy())
        is_answer = batch["labels"] != IGNORED if takes_labels else batch["attention_mask"].bool()
        answers = [row[mask] for row, mask in zip(values, is_answer, strict=True)]
        places = [np.linspace(0, len(row) - 1, min(len(row), POSITIONS)).astype(int) for row in answers]
        return [row[indices].cpu().numpy() for row, indices in zip(answers, places, strict=True)]

    return Run(model, tokenizer).batches(inputs, rows)


def compared(
    dense: Sequence[np.ndarray], candidate: Sequence[np.ndarray], model: nn.Module
) -> tuple[float, float]:
    """Return the mean KL divergence from dense, and the share of flipped answers.

    Of several labels at once it is the sum over the labels; where an output is a number or a vector and no
    distribution, half the squared distance over the dense outputs' variance, and no answer to flip.
    """
    dense_rows, rows = (torch.from_numpy(np.concatenate(side)) for side in (dense, candidate))
    if not rows.isfinite().all():
        return float("inf"), 1.0
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        p = torch.sigmoid(dense_rows)
        distance = F.binary_cross_entropy_with_logits(rows, p, reduction="none")
        distance = distance - F.binary_cross_entropy_with_logits(dense_rows, p, reduction="none")
        return float(distance.sum(-1).mean()), float(((rows > 0) != (dense_rows > 0)).any(-1).float().mean())
    has_answers = model.get_output_embeddings() is not None or getattr(model.config, "num_labels", 0) > 1
    if rows.shape[-1] == 1 or not has_answers:
        variance = dense_rows.var(0, correction=0).sum().clamp(min=1e-12)
        return float((rows - dense_rows).square().sum(-1).mean() / (2 * variance)), 0.0
    dense_p, p = F.log_softmax(dense_rows, -1), F.log_softmax(rows, -1)
    divergence = (dense_p.exp() * (dense_p - p)).sum(-1).mean().clamp(min=0)
    return float(divergence), float((rows.argmax(-1) != dense_rows.argmax(-1)).float().mean())
