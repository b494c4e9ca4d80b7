"""The one training loop of this project: all training, fine-tuning, distillation and recovery is `fit`.

A run can be stopped at any moment, by `kill -9` too, and resumes from its last checkpoint with the same
losses bit for bit, because batches, dropout and schedule depend only on the seed and the step.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import anatomy
from lmcompress.paths import naming_write_errors
from lmcompress.tasks.batching import pad_id
from lmcompress.train import batches as data
from lmcompress.train import checkpoint as saved
from lmcompress.train import parallel
from lmcompress.train.lora import adapted
from lmcompress.train.spec import History, TrainSpec, curve, layer_powers, optimizer_for
from lmcompress.train.switches import applied

__all__ = ["History", "LabelLoss", "TrainSpec", "curve", "fit"]
logger = logging.getLogger(__name__)
_LOG_EVERY_SECONDS = 30


@dataclass
class LabelLoss:
    """What `fit` minimises by default: the model's own loss on the labels, smoothed as the spec says."""

    spec: TrainSpec

    def begin(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return what else is to be trained, by name; called once, after the random state was seeded."""
        return {}

    def fingerprint(self, settings: str) -> str:
        """Return 16 hex digits of the run's settings and of what this loss depends on besides."""
        return settings

    def __call__(self, model: nn.Module, batch: data.Batch) -> dict[str, Tensor]:
        """Return the mean over the batch's targets as "loss", and its terms to be recorded by other names."""
        return {"loss": _loss(model, batch, self.spec, smoothing=self.spec.label_smoothing)}

    def without_targets(self) -> dict[str, float]:
        """Return what is recorded of a batch that holds nothing to predict; it changes no weight."""
        return {"loss": 0.0}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return what is recorded of `spec.evaluate`: its "loss" on hard labels and its "targets"."""
        return validation_loss(model, self.spec.evaluate, spec=self.spec)


def fit(
    model: nn.Module,
    spec: TrainSpec,
    *,
    masks: Mapping[str, Tensor] | None = None,
    objective: LabelLoss | None = None,
    before_step: Callable[[int, list[dict]], None] | None = None,
    progress: bool = False,
) -> History:
    """Train `model` in place, resuming from `spec.checkpoint` where that holds the same run.

    Args:
        model: a transformers model whose forward takes `labels` and returns `.loss`.
        masks: parameter name → tensor of its shape; where it is 0 (False) the weight is held at zero.
        objective: what to minimise; default `LabelLoss(spec)`.
        before_step: called with the number of the next step (from 1) and the history's steps so far;
            gradients it leaves behind are added to those of the loss.

    Raises:
        BadData: no features, or features without tokens or labels.
        BadSetting, CorruptCheckpoint: see `checkpoint.restore`; or a mask fits no parameter.
        BadWeights: the loss became NaN or infinite. The checkpoint before stays, as where the disk is full.
    """
    data.check_features(spec.features)
    objective = objective or LabelLoss(spec)
    settings = ""
    if spec.checkpoint:
        settings = objective.fingerprint(saved.fingerprint(trained(model), spec, masks or {}))
    powers = layer_powers(model, spec)
    device = next(model.parameters()).device
    before_adapters = anatomy(model) if spec.lora else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(spec.seed + parallel.rank())
        with adapted(model, spec.lora), applied(model, spec, before_adapters):
            parallel.shard(model)
            parameters = trained(model)
            masks = _checked_masks(parameters, masks or {})
            everything = parameters | objective.begin(model)
            state = saved.State(everything, *optimizer_for(everything, spec, powers), History())
            if spec.checkpoint:
                saved.restore(spec.checkpoint, settings, state, replace_other=spec.replace_other)
            hold(parameters, masks)
            with _curves(spec.log_dir, len(state.history.steps)) as log:
                for step in _steps(model, objective, state, masks, before_step, log, progress=progress):
                    if spec.checkpoint and (step % spec.checkpoint_every == 0 or step == spec.steps):
                        saved.save(spec.checkpoint, settings, state)
    model.eval()
    return state.history


def validation_loss(model: nn.Module, features: Sequence[data.Feature], *, spec: TrainSpec) -> dict:
    """Return the mean loss per target in nats, `{loss, targets}`; no target at all is a `BadData`."""
    total, targets = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in data.evaluation_batches(features, spec.batch_size, pad_id=pad_id(None, model)):
            loss, count = _loss(model, batch, spec), data.count_targets(batch, shifted=predicts_next(model))
            if count:
                total, targets = total + loss.item() * count, targets + count
    if not targets:
        raise BadData(data.NOTHING_TO_PREDICT)
    return {"loss": total / targets, "targets": targets}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold `model` in eval mode while inside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name → parameter of those that are to be trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _steps(
    model: nn.Module,
    objective: LabelLoss,
    state: saved.State,
    masks: Mapping[str, Tensor],
    before_step: Callable[[int, list[dict]], None] | None,
    log: Callable[[int, str, dict], None],
    *,
    progress: bool,
) -> Iterator[int]:
    """Make the steps from where `state` stands on, recording and validating; yield the number of each."""
    spec, history = objective.spec, state.history
    done, clipped = len(history.steps), list(trained(model).values())
    reading = {"pad_id": pad_id(None, model), "seed": spec.seed, "start": done}
    stream = data.batch_stream(spec.features, spec.batch_size, **reading)
    before = history.steps[-1] if done else {"seconds": 0.0, "tokens": 0}
    tokens, began, logged = before["tokens"], time.monotonic(), time.monotonic()
    model.train()
    for step in tqdm(range(done + 1, spec.steps + 1), initial=done, total=spec.steps, disable=not progress):
        batch = next(stream)
        if before_step:
            before_step(step, history.steps)
        losses, rate = _gradients(model, batch, objective), state.schedule.get_last_lr()[0]
        if not math.isfinite(losses["loss"]):
            raise BadWeights(
                f"the loss is {losses['loss']} at step {step}. Lower learning_rate ({spec.learning_rate}) or "
                f"clip ({spec.clip}), or lengthen warmup_steps ({spec.warmup_steps}); the last checkpoint "
                "stays."
            )
        _update(state, masks, spec.clip, clipped)
        mask = batch.get("attention_mask")
        tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        seconds = before["seconds"] + time.monotonic() - began
        record = {"step": step, "loss": losses.pop("loss"), "lr": rate, "seconds": seconds, "tokens": tokens}
        history.steps.append(record | losses)
        log(step, "train", history.steps[-1])
        if spec.evaluate and (step % spec.evaluate_every == 0 or step == spec.steps):
            history.validation.append({"step": step} | objective.validate(model))
            log(step, "validation", history.validation[-1])
            logger.info("validation %s", history.validation[-1])
        yield step
        if time.monotonic() - logged > _LOG_EVERY_SECONDS:
            logged = time.monotonic()
            logger.info("of %d: %s", spec.steps, record)


def _gradients(model: nn.Module, batch: data.Batch, objective: LabelLoss) -> dict[str, float]:
    """Run the backward pass of one step; return the objective's losses.

    Each is a mean over all targets of the step, however many pieces and processes share it.
    """
    shifted, ranks = predicts_next(model), parallel.world()
    targets = data.count_targets(batch, shifted=shifted)
    if not targets:
        return objective.without_targets()
    totals, micro_batches = {"loss": 0.0}, objective.spec.micro_batches
    for piece, count in data.pieces(batch, micro_batches, shifted=shifted, rank=parallel.rank(), ranks=ranks):
        shares = {name: loss * (count / targets) for name, loss in objective(model, piece).items()}
        (shares["loss"] * ranks).backward()  # the processes' gradients are averaged
        for name, loss in shares.items():
            totals[name] = totals.get(name, 0.0) + loss.item()
    return {name: sum(parallel.gathered(total)) for name, total in totals.items()}


def _update(state: saved.State, masks: Mapping[str, Tensor], clip: float, clipped: list) -> None:
    """Make one step of the optimizer; the gradients of `clipped`, the model's parameters, are clipped."""
    for name, mask in masks.items():  # before clipping: weights held at zero must not shrink others' steps
        if state.parameters[name].grad is not None:
            state.parameters[name].grad.mul_(mask)
    nn.utils.clip_grad_norm_(clipped, clip)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.schedule.step()
    hold(state.parameters, masks)


@contextmanager
def _curves(folder: Path | None, done: int) -> Iterator[Callable[[int, str, dict], None]]:
    """Yield a function that adds a record to TensorBoard's curves under `folder`; None: to nothing."""
    if folder is None or parallel.rank():
        yield lambda step, group, record: None
        return
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

    # `SummaryWriter` writes in a thread, which dies unseen on a full disk: the loop then waits for ever.
    # The suffix keeps two runs of one second from writing the same file.
    with naming_write_errors(folder / "events"):
        folder.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(folder / "events"), f".{done:08d}")

    def write(step: int, **event: object) -> None:
        with naming_write_errors(folder / "events"):
            writer.write_event(Event(wall_time=time.time(), step=step, **event))

    def log(step: int, group: str, record: dict) -> None:
        for name in sorted(record.keys() - {"step"}):
            write(step, summary=scalar(f"{group}/{name}", record[name]))

    # It replaces what a stopped run logged after its last checkpoint: those steps are made again.
    write(done + 1, session_log=SessionLog(status=SessionLog.START))
    try:
        yield log
    finally:
        with naming_write_errors(folder / "events"):
            writer.close()


def _loss(model: nn.Module, batch: data.Batch, spec: TrainSpec, *, smoothing: float = 0.0) -> Tensor:
    batch = on_device(batch, model)
    with autocast(model, spec):
        output = model(**batch)
    if not smoothing:
        return output.loss
    logits, labels = output.logits.float(), batch["labels"]
    if predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    classes = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(*classes, label_smoothing=smoothing, ignore_index=data.IGNORED)


def on_device(batch: data.Batch, model: nn.Module) -> data.Batch:
    """Return the batch where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def autocast(model: nn.Module, spec: TrainSpec) -> torch.autocast:
    """Return the context of forward passes: bfloat16 where the spec says so."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=spec.dtype == torch.bfloat16)


def predicts_next(model: nn.Module) -> bool:
    """Return whether the model shifts labels itself, so that the first of a row has no prediction."""
    return model.can_generate() and not model.config.is_encoder_decoder


def _checked_masks(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `masks` in the parameters' dtypes, on their devices; one that fits none is a `BadSetting`."""
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            shape = tuple(parameters[name].shape) if name in parameters else "no such trained parameter"
            raise BadSetting(
                f"mask {name!r} of shape {tuple(mask.shape)} fits nothing ({shape}). "
                f"Trained parameters begin {', '.join(list(parameters)[:5])}."
            )
    return {name: parallel.like(mask, parameters[name]) for name, mask in masks.items()}


@torch.no_grad()
def hold(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    """Set the weights that are masked out to zero, in place."""
    for name, mask in masks.items():
        parameters[name].mul_(mask)
