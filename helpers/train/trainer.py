"""The one training loop of this project: whatever is trained, fine-tuned or recovered goes through `fit`.

A run can be stopped at any moment, by `kill -9` too, and goes on from its last checkpoint with the same losses
bit for bit, because batches, dropout and schedule depend only on the seed and the step.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from helpers.errors import BadData, BadSetting, BadWeights
from helpers.train import batches as data
from helpers.train import checkpoint as saved

logger = logging.getLogger(__name__)
_LOG_EVERY_SECONDS = 30


@dataclass(frozen=True)
class TrainSpec:
    """Everything that decides the outcome of a run, and where it is kept.

    Attributes:
        features: one dict per example: `input_ids`, `labels`, and whatever else the model's forward takes.
        steps: optimizer steps; the schedule is laid out over them.
        batch_size: examples per optimizer step.
        micro_batches: pieces a step is cut into, to fit memory; the update does not depend on it.
        learning_rate: peak, reached after `warmup_steps`; falls along a cosine to `min_learning_rate`.
        clip: largest global gradient norm.
        dtype: `bfloat16` runs the forward pass under autocast; the weights stay as they are.
        checkpoint: folder for checkpoints, or None to keep nothing.
        evaluate: features whose loss is recorded every `evaluate_every` steps and at the end.
    """

    features: Sequence[data.Feature]
    steps: int
    batch_size: int = 32
    micro_batches: int = 1
    learning_rate: float = 1e-4
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    checkpoint: Path | None = None
    checkpoint_every: int = 500
    evaluate: Sequence[data.Feature] | None = None
    evaluate_every: int = 500

    def __post_init__(self) -> None:
        """Check ranges once, so that the loop need not."""
        legal = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "micro_batches": 1 <= self.micro_batches <= self.batch_size,
            "learning_rate": self.learning_rate > 0,
            "min_learning_rate": 0 <= self.min_learning_rate <= self.learning_rate,
            "warmup_steps": 0 <= self.warmup_steps <= self.steps,
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip > 0,
            "dtype": self.dtype in (torch.float32, torch.bfloat16),
            "checkpoint_every": self.checkpoint_every >= 1,
            "evaluate_every": self.evaluate_every >= 1,
        }
        if wrong := [f"{name}={getattr(self, name)}" for name, ok in legal.items() if not ok]:
            raise BadSetting(
                f"out of range: {', '.join(wrong)}. Counts are at least 1, 0 <= min_learning_rate <= "
                "learning_rate, 0 <= warmup_steps <= steps, micro_batches <= batch_size, dtype float32 or bfloat16."
            )


@dataclass
class History:
    """What happened, step by step.

    Attributes:
        steps: `{step, loss, lr, seconds, tokens}`; loss is the mean over the step's targets, in nats; seconds
            and tokens (input tokens without padding) are totals since the start, over all resumptions.
        validation: `{step, loss, targets}`.
    """

    steps: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)


def fit(
    model: nn.Module,
    spec: TrainSpec,
    *,
    masks: Mapping[str, torch.Tensor] | None = None,
    before_step: Callable[[int, list[dict]], None] | None = None,
    progress: bool = False,
) -> History:
    """Train `model` in place, going on from `spec.checkpoint` where that holds the same run.

    Args:
        model: a transformers model whose forward takes `labels` and returns `.loss`.
        masks: parameter name → tensor of its shape; where it is 0 (False) the weight is held at zero.
        before_step: called with the number of the step that comes (from 1) and the history's steps so far; gradients
            it leaves behind (of a penalty, say) are added to those of the loss.
        progress: show a bar.

    Raises:
        BadData: no features, or features without tokens or labels.
        BadSetting: the checkpoint folder belongs to a run of other settings, or a mask fits no parameter.
        BadWeights: the loss became NaN or infinite; the last checkpoint is kept.
    """
    data.check_features(spec.features)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masks = checked_masks(parameters, masks or {})
    state = saved.State(parameters, *optimizer_for(parameters, spec), History())
    settings = saved.fingerprint(parameters, spec, masks) if spec.checkpoint else ""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(spec.seed)
        if spec.checkpoint:
            saved.restore(spec.checkpoint, settings, state)
        hold(parameters, masks)
        _run(model, spec, state, masks, settings, before_step=before_step, progress=progress)
    model.eval()
    return state.history


def curve(history: History, *, points: int = 40) -> dict:
    """A history short enough for a row: at most `points` means over equally many steps, and every validation.

    Returns:
        "train" and "validation": lists of `[step, loss]` (a mean stands at its last step); whatever else validation
        held, under its name; "seconds" and "tokens" of the whole run.
    """
    parts = np.array_split(history.steps, min(points, len(history.steps)))
    found = {"train": [[part[-1]["step"], _rounded([step["loss"] for step in part])] for part in parts]}
    for name in [*(history.validation[0] if history.validation else [])]:
        if name not in ("step", "targets"):
            seen = [[one["step"], _rounded([one[name]])] for one in history.validation]
            found["validation" if name == "loss" else name] = seen
    last = history.steps[-1]
    return found | {"seconds": round(last["seconds"], 1), "tokens": last["tokens"]}


def _rounded(values: list[float]) -> float:
    return float(f"{np.mean(values):.5g}")


def validation_loss(model: nn.Module, features: Sequence[data.Feature], *, spec: TrainSpec) -> dict:
    """Mean loss per target in nats: `{loss, targets}`; totals are summed in float64 over all batches.

    Raises:
        BadData: no feature has a target.
    """
    was_training = model.training
    model.eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for batch in data.evaluation_batches(features, spec.batch_size, pad_id=pad_id_of(model)):
            loss, count = _loss(model, batch, spec)
            if count:
                total, targets = total + loss.item() * count, targets + count
    model.train(was_training)
    if not targets:
        raise BadData(
            "the features to evaluate hold nothing to predict: every label is masked out, or too short."
        )
    return {"loss": total / targets, "targets": targets}


def _run(
    model: nn.Module,
    spec: TrainSpec,
    state: saved.State,
    masks: dict,
    settings: str,
    *,
    before_step: Callable | None,
    progress: bool,
) -> None:
    done = len(state.history.steps)
    last = state.history.steps[-1] if done else {"seconds": 0.0, "tokens": 0}
    stream = data.batch_stream(
        spec.features, spec.batch_size, pad_id=pad_id_of(model), seed=spec.seed, start=done
    )
    tokens, began, told = last["tokens"], time.monotonic(), time.monotonic()
    model.train()
    for step in tqdm(range(done + 1, spec.steps + 1), initial=done, total=spec.steps, disable=not progress):
        batch = next(stream)
        if before_step:
            before_step(step, state.history.steps)
        loss = _gradients(model, batch, spec)
        if not math.isfinite(loss):
            raise BadWeights(
                f"the loss is {loss} at step {step}. Lower learning_rate ({spec.learning_rate}) or clip "
                f"({spec.clip}), or lengthen warmup_steps ({spec.warmup_steps}); the last checkpoint is kept."
            )
        rate = state.schedule.get_last_lr()[0]
        _update(state, masks, spec.clip)
        mask = batch.get("attention_mask")
        tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        seconds = last["seconds"] + time.monotonic() - began
        record = {"step": step, "loss": loss, "lr": rate, "seconds": seconds, "tokens": tokens}
        state.history.steps.append(record)
        if spec.evaluate and (step % spec.evaluate_every == 0 or step == spec.steps):
            state.history.validation.append({"step": step} | validation_loss(model, spec.evaluate, spec=spec))
            logger.info("validation %s", state.history.validation[-1])
        if spec.checkpoint and (step % spec.checkpoint_every == 0 or step == spec.steps):
            saved.save(spec.checkpoint, settings, state)
        if time.monotonic() - told > _LOG_EVERY_SECONDS:
            told = time.monotonic()
            logger.info("of %d: %s", spec.steps, record)


def _gradients(model: nn.Module, batch: data.Batch, spec: TrainSpec) -> float:
    """Backward pass; returns the loss, a mean over all targets of the step however it was cut into pieces."""
    targets = max(data.count_targets(batch, shifted=predicts_next(model)), 1)
    total = 0.0
    for piece in _pieces(batch, spec.micro_batches):
        loss, count = _loss(model, piece, spec)
        if count:  # a mean over no target is NaN, and it has nothing to teach
            share = loss * (count / targets)
            share.backward()
            total += share.item()
    return total


def _update(state: saved.State, masks: Mapping[str, torch.Tensor], clip: float) -> None:
    for name, mask in masks.items():  # before clipping: weights that are gone must not shrink others' steps
        if state.parameters[name].grad is not None:
            state.parameters[name].grad.mul_(mask)
    nn.utils.clip_grad_norm_(state.parameters.values(), clip)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.schedule.step()
    hold(state.parameters, masks)


def _loss(model: nn.Module, batch: data.Batch, spec: TrainSpec) -> tuple[torch.Tensor, int]:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=spec.dtype == torch.bfloat16):
        loss = model(**batch).loss
    return loss, data.count_targets(batch, shifted=predicts_next(model))


def predicts_next(model: nn.Module) -> bool:
    """Whether the model shifts labels itself, so that the first of a row has no prediction."""
    return model.can_generate() and not model.config.is_encoder_decoder


def _pieces(batch: data.Batch, count: int) -> Iterator[data.Batch]:
    split = {name: value.tensor_split(count) for name, value in batch.items()}
    for index in range(count):
        piece = {name: parts[index] for name, parts in split.items()}
        if len(piece["input_ids"]):
            yield piece


def optimizer_for(parameters: Mapping[str, nn.Parameter], spec: TrainSpec):
    """AdamW without decay on vectors (norms, biases); cosine with warm-up to the minimum rate."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, fused=True)
    schedule = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=spec.warmup_steps,
        num_training_steps=spec.steps,
        scheduler_specific_kwargs={"min_lr": spec.min_learning_rate},
    )
    return optimizer, schedule


def checked_masks(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> dict:
    """`masks` in the parameters' types, on their devices; `BadSetting` for one that fits none of them."""
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            here = tuple(parameters[name].shape) if name in parameters else "no such trained parameter"
            raise BadSetting(
                f"mask {name!r} of shape {tuple(mask.shape)} fits nothing ({here}). "
                f"Trained parameters begin {', '.join(list(parameters)[:5])}."
            )
    return {name: mask.to(parameters[name].device, parameters[name].dtype) for name, mask in masks.items()}


@torch.no_grad()
def hold(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> None:
    """Set the weights that are masked out to zero, in place."""
    for name, mask in masks.items():
        parameters[name].mul_(mask)


def pad_id_of(model: nn.Module) -> int:
    """Any id will do: padding is masked out of attention and loss; but it must be one the model has."""
    pad_id = model.config.pad_token_id
    return 0 if pad_id is None else pad_id
