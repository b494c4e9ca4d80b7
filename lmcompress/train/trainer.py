"""The one training loop of this project: whatever is trained, fine-tuned or recovered goes through `fit`.

A run can be stopped at any moment, by `kill -9` too, and goes on from its last checkpoint with the same losses
bit for bit, because batches, dropout and schedule depend only on the seed and the step.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import anatomy
from lmcompress.tasks.batching import IGNORED
from lmcompress.train import batches as data
from lmcompress.train import checkpoint as saved
from lmcompress.train import parallel
from lmcompress.train.lora import adapted
from lmcompress.train.optimizer import layer_powers, optimizer_for
from lmcompress.train.spec import History, TrainSpec, curve
from lmcompress.train.switches import applied

__all__ = ["History", "TrainSpec", "curve", "fit"]
logger = logging.getLogger(__name__)
_LOG_EVERY_SECONDS = 30


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
    settings = saved.fingerprint(trained(model), spec, masks or {}) if spec.checkpoint else ""
    powers = layer_powers(model, spec)
    device = next(model.parameters()).device
    found = anatomy(model) if spec.lora else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(spec.seed + parallel.rank())
        with adapted(model, spec.lora), applied(model, spec, found):
            parallel.shard(model)
            parameters = trained(model)
            masks = checked_masks(parameters, masks or {})
            state = saved.State(parameters, *optimizer_for(parameters, spec, powers), History())
            if spec.checkpoint:
                saved.restore(spec.checkpoint, settings, state, replace_other=spec.replace_other)
            hold(parameters, masks)
            _run(model, spec, state, masks, settings, before_step, progress=progress)
    model.eval()
    return state.history


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
            loss, count = _loss(model, batch, spec), data.count_targets(batch, shifted=predicts_next(model))
            if count:
                total, targets = total + loss.item() * count, targets + count
    model.train(was_training)
    if not targets:
        raise BadData(
            "the features to evaluate hold nothing to predict: every label is masked out, or too short."
        )
    return {"loss": total / targets, "targets": targets}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of those that are to be trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _run(
    model: nn.Module, spec: TrainSpec, state: saved.State, masks: dict, settings, before_step, *, progress
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
    """Backward pass; returns the loss, a mean over all targets of the step however many pieces and processes share it."""
    shifted, ranks, total = predicts_next(model), parallel.world(), 0.0
    targets = data.count_targets(batch, shifted=shifted)
    own = {"rank": parallel.rank(), "ranks": ranks}
    for piece, count in data.pieces(batch, spec.micro_batches, shifted=shifted, **own) if targets else ():
        share = _loss(model, piece, spec, smoothing=spec.label_smoothing) * (count / targets)
        (share * ranks if ranks > 1 else share).backward()  # the processes' gradients are averaged
        total += share.item()
    return parallel.total(total)


def _update(state: saved.State, masks: Mapping[str, torch.Tensor], clip: float) -> None:
    for name, mask in masks.items():  # before clipping: weights that are gone must not shrink others' steps
        if state.parameters[name].grad is not None:
            state.parameters[name].grad.mul_(mask)
    nn.utils.clip_grad_norm_(state.parameters.values(), clip)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.schedule.step()
    hold(state.parameters, masks)


def _loss(model: nn.Module, batch: data.Batch, spec: TrainSpec, *, smoothing: float = 0.0) -> torch.Tensor:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=spec.dtype == torch.bfloat16):
        output = model(**batch)
    if not smoothing:
        return output.loss
    logits, labels = output.logits.float(), batch["labels"]
    if predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    classes = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(*classes, label_smoothing=smoothing, ignore_index=IGNORED)


def predicts_next(model: nn.Module) -> bool:
    """Whether the model shifts labels itself, so that the first of a row has no prediction."""
    return model.can_generate() and not model.config.is_encoder_decoder


def checked_masks(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> dict:
    """`masks` in the parameters' types, on their devices; `BadSetting` for one that fits none of them."""
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            here = tuple(parameters[name].shape) if name in parameters else "no such trained parameter"
            raise BadSetting(
                f"mask {name!r} of shape {tuple(mask.shape)} fits nothing ({here}). "
                f"Trained parameters begin {', '.join(list(parameters)[:5])}."
            )
    return {name: parallel.like(mask, parameters[name]) for name, mask in masks.items()}


@torch.no_grad()
def hold(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> None:
    """Set the weights that are masked out to zero, in place."""
    for name, mask in masks.items():
        parameters[name].mul_(mask)


def pad_id_of(model: nn.Module) -> int:
    """Any id will do: padding is masked out of attention and loss; but it must be one the model has."""
    pad_id = model.config.pad_token_id
    return 0 if pad_id is None else pad_id
