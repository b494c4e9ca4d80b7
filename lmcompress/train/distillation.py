"""Distillation with TextBrewer (Yang et al. 2020): a student learns what its teacher says.

TextBrewer gives the losses and the loop; batches, optimizer, schedule, masks, records and checkpoints are those of
`trainer.fit`, so that a distilled and a fine-tuned student differ in the loss only, and a stopped run goes on.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from torch import Tensor, nn
from tqdm.auto import tqdm

from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import anatomy
from lmcompress.train import batches as data
from lmcompress.train import checkpoint as saved
from lmcompress.train import trainer
from lmcompress.train.matching import SCHEDULES, Adaptor, Losses, eager, matched_pairs, target_logits
from lmcompress.train.optimizer import layer_powers, optimizer_for
from lmcompress.train.spec import History, TrainSpec
from lmcompress.train.switches import applied


def distil(
    teacher: nn.Module,
    student: nn.Module,
    train: TrainSpec,
    *,
    temperature: float = 4.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    matches: str = "none",
    match_weight: float = 1.0,
    temperature_schedule: str = "constant",
    cache: bool = True,
    masks: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> History:
    """Train `student` in place on what `teacher` says of the same batches, going on from `train.checkpoint`.

    The loss is `soft_weight · soft + hard_weight · hard + match_weight · Σ matched`, where soft is the mean over targets
    of `−Σ softmax(z_T/T) log softmax(z_S/T)`: TextBrewer leaves out the factor T² of Hinton et al. (2015), so that
    a higher temperature also weakens soft against hard (give `soft_weight=T**2` for their form). Hard is the model's own
    loss on the labels. Padding and ignored labels count in none. A single output (regression) has no distribution:
    soft is then the squared difference, at temperature 1.

    Args:
        teacher: put in eval mode meanwhile; same kind, vocabulary and labels as the student.
        student: of any width and depth.
        train: as for `fit`; `micro_batches` is 1.
        soft_weight: 0 is the control that learns from hard labels alone; without matches the teacher never runs.
        matches: "hidden": mean squared difference of hidden states after the embeddings and after each of the student's
            blocks, with those of the teacher at the same share of its depth, through a trained projection where widths
            differ. "hidden+attention": attention probabilities, too, for which both models run eager attention.
        temperature_schedule: "flsw" lowers it where teacher and student disagree more than on average, by at most 2,
            and raises it elsewhere (Wen et al. 2019, focal style).
        cache: keep the teacher's class logits, where examples come again; only the time depends on it.
        masks: as for `fit`: weights held at zero.
        progress: show a bar.

    Returns:
        The history as of `fit`; steps also hold the unweighted "soft", "hard" and "matched" that were computed, and
        `validation` (whose loss is that on hard labels) the "divergence" from the teacher.

    Raises:
        BadData: features without tokens or labels, or a batch without targets.
        BadSetting: weights or matches out of range, models that do not fit each other, or another run's checkpoint.
        BadWeights: the loss became NaN or infinite.
    """
    wanted = Losses(temperature, soft_weight, hard_weight, matches, match_weight, temperature_schedule)
    data.check_features(train.features)
    _check_pair(teacher, student, train)
    logging.getLogger("Distillation").setLevel(logging.WARNING)  # else two lines per step
    device = next(student.parameters()).device
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    masks = trainer.checked_masks(parameters, masks or {})
    hooks = [parameters[name].register_hook(mask.mul) for name, mask in masks.items()]  # before clipping
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            applied(student, train),
            eager((teacher, student), "attention" in matches),
        ):
            torch.manual_seed(train.seed)
            distiller = _Distiller(teacher, student, train, wanted, cache=cache)
            settings = _fingerprint(teacher, parameters, train, masks, wanted) if train.checkpoint else ""
            for index, projection in enumerate(filter(None, distiller.projs)):
                parameters |= {f"projection.{index}.{name}": p for name, p in projection.named_parameters()}
            optimizer, schedule = optimizer_for(parameters, train, layer_powers(student, train))
            state = saved.State(parameters, optimizer, schedule, History())
            if train.checkpoint:
                saved.restore(train.checkpoint, settings, state, replace_other=train.replace_other)
            trainer.hold(parameters, masks)
            _run(distiller, state, settings, progress=progress)
    finally:
        for hook in hooks:
            hook.remove()
    student.eval()
    return state.history


def divergence(
    teacher: nn.Module, student: nn.Module, features: Sequence[data.Feature], *, batch_size: int = 32
) -> float:
    """Mean over all targets of KL(teacher ‖ student) at temperature 1, in nats; both in eval mode.

    Of a single output (regression) the mean squared difference.

    Raises:
        BadData: no feature has a target.
    """
    total, targets = 0.0, 0
    for batch in data.evaluation_batches(features, batch_size, pad_id=trainer.pad_id_of(student)):
        theirs, ours = (
            target_logits(model, batch, _outputs(model, batch).logits) for model in (teacher, student)
        )
        if ours.shape[-1] == 1:
            total += float((theirs - ours).double().square().sum())
        else:
            log_p, log_q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        targets += len(ours)
    if not targets:
        raise BadData("the features hold nothing to predict: every label is masked out, or too short.")
    return total / targets


class _Distiller(GeneralDistiller):
    """TextBrewer's loop and losses, with this project's optimizer, records and checkpoints (no pickles)."""

    def __init__(self, teacher, student, train: TrainSpec, wanted: Losses, *, cache: bool):
        self.train_spec, self.wanted, self.record, self.cache = train, wanted, {}, cache
        single = student.config.num_labels == 1 and np.ndim(train.features[0]["labels"]) == 0
        config = DistillationConfig(
            temperature=1.0 if single else wanted.temperature,
            temperature_scheduler="none" if single else SCHEDULES[wanted.temperature_schedule],
            kd_loss_type="mse" if single else "ce",
            kd_loss_weight=wanted.soft_weight,
            hard_label_weight=wanted.hard_weight,
            intermediate_matches=matched_pairs(teacher, student, wanted),
        )
        device = next(student.parameters()).device
        place = TrainingConfig(device=device, output_dir=".", ckpt_steps=1)  # nothing is written
        super().__init__(
            place, config, teacher, student, Adaptor(teacher, wanted), Adaptor(student, wanted, hard=True)
        )

    def initialize_training(self, optimizer, scheduler_class, scheduler_args, scheduler):
        """As given: the optimizer has the projections already, and the bar is ours."""
        return optimizer, scheduler, True

    def train_on_batch(self, batch: dict, args: dict):
        """TextBrewer's loss, noted in `record`."""
        dtype, device = self.train_spec.dtype, self.t_config.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, parts = super().train_on_batch(batch, args)
        names = {"unweighted_kd_loss": "soft", "unweighted_hard_label_loss": "hard"}
        self.record = {"loss": loss.item()}
        for part, value in parts.items():
            name = names.get(part, "matched")
            self.record[name] = self.record.get(name, 0.0) + value.item()
        if not math.isfinite(self.record["loss"]):
            raise BadWeights(
                f"the loss became {self.record}. Lower learning_rate ({self.train_spec.learning_rate}) or lengthen "
                "warmup_steps; the last checkpoint is kept."
            )
        return loss, parts

    def write_loss(self, *_) -> None:
        """Records go to the history."""

    def save_and_callback(self, global_step, step, epoch, callback) -> None:
        """After every step, since `ckpt_steps` is 1."""
        callback()


def _run(distiller: _Distiller, state: saved.State, settings: str, *, progress: bool) -> None:
    spec, student, teacher = distiller.train_spec, distiller.model_S, distiller.model_T
    history, done = state.history, len(state.history.steps)
    if done == spec.steps:
        return
    last = history.steps[-1] if done else {"seconds": 0.0, "tokens": 0}
    tokens, rate, began = last["tokens"], 0.0, time.monotonic()
    state.optimizer.zero_grad()

    def stream() -> Iterator[dict]:
        nonlocal tokens, rate
        for batch in _batches(distiller, start=done):
            mask = batch["student"].get("attention_mask")
            tokens += batch["student"]["input_ids"].numel() if mask is None else int(mask.sum())
            rate = state.schedule.get_last_lr()[0]
            yield batch

    def after_step() -> None:
        step = len(history.steps) + 1
        seconds = last["seconds"] + time.monotonic() - began
        record = {"step": step, "lr": rate, "seconds": seconds, "tokens": tokens}
        history.steps.append(record | distiller.record)
        bar.update()
        if spec.evaluate and (step % spec.evaluate_every == 0 or step == spec.steps):
            loss = trainer.validation_loss(student, spec.evaluate, spec=spec)
            gap = divergence(teacher, student, spec.evaluate, batch_size=spec.batch_size)
            history.validation.append({"step": step, "divergence": gap} | loss)
        if spec.checkpoint and (step % spec.checkpoint_every == 0 or step == spec.steps):
            saved.save(spec.checkpoint, settings, state)

    more = {"output_hidden_states": True} if distiller.wanted.matches != "none" else {}
    more |= {"output_attentions": True} if "attention" in distiller.wanted.matches else {}
    more |= {} if distiller.adaptor_S.kind == "encoder" else {"use_cache": False}
    with distiller, tqdm(total=spec.steps, initial=done, disable=not progress) as bar:
        distiller.train(
            state.optimizer,
            stream(),
            scheduler=state.schedule,
            max_grad_norm=spec.clip,
            num_steps=spec.steps - done,
            callback=after_step,
            **more,
        )


def _batches(distiller: _Distiller, *, start: int) -> Iterator[dict]:
    """Plain dicts `{"student", "teacher"[, "teacher_cache"]}` (TextBrewer takes no other mapping).

    Where each example is seen twice or more and the teacher gives one row for it (classes), its logits are computed
    once, before the first step.
    """
    spec, teacher, student = distiller.train_spec, distiller.model_T, distiller.model_S
    shifted = trainer.predicts_next(student)
    features, known = [{**one, "index": index} for index, one in enumerate(spec.features)], None
    again = spec.steps * spec.batch_size >= 2 * len(features)
    if distiller.wanted.asks_teacher and distiller.wanted.matches == "none" and again and distiller.cache:
        known = _known_logits(teacher, features, spec)
    pad_id = trainer.pad_id_of(student)
    for batch in data.batch_stream(features, spec.batch_size, pad_id=pad_id, seed=spec.seed, start=start):
        index = batch.pop("index")
        if not data.count_targets(batch, shifted=shifted):
            raise BadData("a batch holds nothing to predict: drop the examples whose labels are all ignored.")
        found = {"student": batch, "teacher": batch}
        if not distiller.wanted.asks_teacher:
            found["teacher_cache"] = {}
        elif known is not None:
            found["teacher_cache"] = {"logits": known[index]}
        yield found


@torch.no_grad()
def _known_logits(teacher: nn.Module, features: Sequence[dict], spec: TrainSpec) -> Tensor | None:
    """The teacher's logits `(examples, classes)`, or None where labels are sequences."""
    if np.ndim(features[0]["labels"]):
        return None
    rows = {}
    for batch in data.evaluation_batches(features, spec.batch_size, pad_id=trainer.pad_id_of(teacher)):
        index = batch.pop("index")
        rows |= dict(zip(index.tolist(), _outputs(teacher, batch).logits.float().cpu()))
    return torch.stack([rows[i] for i in range(len(features))])


@torch.no_grad()
def _outputs(model: nn.Module, batch: data.Batch):
    """What the model gives in eval mode; it is left in the mode it was in."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found = model(**{name: value.to(device) for name, value in batch.items()})
    model.train(training)
    return found


def _check_pair(teacher: nn.Module, student: nn.Module, train: TrainSpec) -> None:
    """Raise `BadSetting` if the two do not speak of the same things, or a step is to be cut."""
    if train.micro_batches > 1 or train.lora or train.label_smoothing:
        raise BadSetting(
            "distillation cuts no steps, trains no adapters and smooths no labels: micro_batches is 1, lora None, "
            "label_smoothing 0."
        )
    said = []
    for model in (teacher, student):
        kind, config = anatomy(model).kind, model.config
        said.append({"kind": kind, "vocabulary": config.vocab_size, "labels": config.num_labels})
    if said[0] != said[1]:
        raise BadSetting(
            f"the teacher has {said[0]}, the student {said[1]}: a student needs the same of each. Make one with "
            "lmcompress.train.students."
        )


def _fingerprint(teacher: nn.Module, parameters: dict, train: TrainSpec, masks: dict, wanted: Losses) -> str:
    named = {f"teacher.{name}": p for name, p in teacher.named_parameters()} if wanted.asks_teacher else {}
    whole = saved.fingerprint(parameters | named, train, masks) + repr(wanted)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]
