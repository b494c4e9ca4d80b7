"""Distillation: a student learns from its teacher's outputs, by the losses of TextBrewer (Yang et al. 2020).

The losses, projections and temperature schedules are TextBrewer's; the loop is `trainer.fit`, so that a
distilled and a fine-tuned student differ in the loss only, and a stopped run resumes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from textbrewer.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, PROJ_MAP, TEMPERATURE_SCHEDULER
from torch import Tensor, nn

from lmcompress.errors import BadData, BadSetting
from lmcompress.models.anatomy import anatomy
from lmcompress.tasks.batching import pad_id
from lmcompress.train import batches as data
from lmcompress.train import checkpoint as saved
from lmcompress.train import parallel, trainer
from lmcompress.train.matching import SCHEDULES, Adaptor, Losses, matched_layers, target_logits
from lmcompress.train.spec import History, TrainSpec
from lmcompress.train.switches import attention


def distil(
    teacher: nn.Module,
    student: nn.Module,
    train: TrainSpec,
    *,
    cache: bool = True,
    masks: Mapping[str, Tensor] | None = None,
    progress: bool = False,
    **losses: float | str,
) -> History:
    """Train `student` in place on `teacher`'s outputs for the same batches, resuming from `train.checkpoint`.

    Args:
        teacher: put in eval mode meanwhile; same kind, vocabulary and labels as the student.
        train: as for `fit`; `micro_batches` is 1.
        cache: keep the teacher's class logits, where examples come again; only the time depends on it.
        masks: as for `fit`: weights held at zero.
        losses: fields of `matching.Losses`, which says what is minimised.

    Returns:
        The history as of `fit`; steps also hold the unweighted "soft", "hard" and "matched" that were
        computed, and `validation` (whose loss is that on hard labels) the "divergence" from the teacher.

    Raises:
        BadData: features without tokens or labels, or a batch without targets.
        BadSetting: losses out of range, models that do not fit each other, or another run's checkpoint.
        BadWeights: the loss became NaN or infinite.
    """
    losses = Losses(**losses)
    data.check_features(train.features)
    _check_models(teacher, student, train)
    attends = "attention" in losses.matches
    if attends:  # the only implementation that returns its probabilities
        train = replace(train, attention="eager")
    with trainer.evaluating(teacher), attention(teacher, "eager") if attends else nullcontext():
        objective = DistillationLoss(teacher, student, train, losses, cache=cache)
        return trainer.fit(student, objective.spec, masks=masks, objective=objective, progress=progress)


def divergence(
    teacher: nn.Module, student: nn.Module, features: Sequence[data.Feature], *, batch_size: int = 32
) -> float:
    """Return the mean over all targets of KL(teacher ‖ student) at temperature 1, in nats; both in eval mode.

    Of a single output (regression) it is the mean squared difference. No target at all is `BadData`.
    """
    total, targets = 0.0, 0
    for batch in data.evaluation_batches(features, batch_size, pad_id=pad_id(None, student)):
        teacher_logits, student_logits = (
            target_logits(model, batch, _outputs(model, batch).logits) for model in (teacher, student)
        )
        if student_logits.shape[-1] == 1:
            total += float((teacher_logits - student_logits).double().square().sum())
        else:
            log_p, log_q = teacher_logits.double().log_softmax(-1), student_logits.double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        targets += len(student_logits)
    if not targets:
        raise BadData(data.NOTHING_TO_PREDICT)
    return total / targets


class DistillationLoss(trainer.LabelLoss):
    """What a student minimises: TextBrewer's losses between its outputs and those of its teacher."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, spec: TrainSpec, losses: Losses, *, cache: bool = True
    ):
        classes = not np.ndim(spec.features[0]["labels"])  # one row of logits for each example
        seen_again = spec.steps * spec.batch_size >= 2 * len(spec.features)
        self.cached = cache and classes and seen_again and losses.matches == "none" and losses.asks_teacher
        if self.cached:
            spec = replace(spec, features=[{**row, "index": i} for i, row in enumerate(spec.features)])
        super().__init__(spec)
        self.teacher, self.losses, self.known = teacher, losses, None
        self.adaptors = Adaptor(teacher, losses), Adaptor(student, losses, hard=True)
        self.matches = matched_layers(teacher, student, losses)
        single = student.config.num_labels == 1 and classes
        self.soft = KD_LOSS_MAP["mse" if single else "ce"]
        self.temperature = 1.0 if single else losses.temperature
        schedule = None if single else SCHEDULES[losses.temperature_schedule]
        self.schedule = schedule and TEMPERATURE_SCHEDULER[schedule]
        self.forward_settings = {"output_hidden_states": True} if losses.matches != "none" else {}
        if "attention" in losses.matches:
            self.forward_settings["output_attentions"] = True
        if self.adaptors[0].kind != "encoder":
            self.forward_settings["use_cache"] = False

    def begin(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Draw the projections to the teacher's width, where there are any; return their parameters."""
        device = next(model.parameters()).device
        self.projections = [
            PROJ_MAP[match["proj"][0]](*match["proj"][1:]).to(device) if "proj" in match else None
            for match in self.matches
        ]
        return {
            f"projection.{index}.{name}": parameter
            for index, projection in enumerate(filter(None, self.projections))
            for name, parameter in projection.named_parameters()
        }

    def fingerprint(self, settings: str) -> str:
        """Return 16 hex digits of the run's settings, the weights of the losses and those of the teacher."""
        teacher = dict(self.teacher.named_parameters()) if self.losses.asks_teacher else {}
        text = settings + saved.tensors_digest(teacher) + repr(self.losses)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(self, model: nn.Module, batch: data.Batch) -> dict[str, Tensor]:
        """Return the weighted sum as "loss", and its unweighted parts "soft", "matched" and "hard"."""
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in batch.items()}
        index = batch.pop("index", None)
        if self.cached and self.known is None:
            self.known = _known_logits(self.teacher, self.spec)
        with trainer.autocast(device, self.spec):
            target = self.adaptors[0](batch, self._teacher_outputs(batch, index))
            output = self.adaptors[1](batch, model(**batch, **self.forward_settings))
            return self._compared(output, target)

    def without_targets(self) -> dict[str, float]:
        """Refuse a batch that holds nothing to predict: the mean of its soft losses is NaN."""
        raise BadData("a batch holds nothing to predict: drop the examples whose labels are all ignored.")

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return "divergence", "loss" and "targets" of `spec.evaluate`."""
        gap = divergence(self.teacher, model, self.spec.evaluate, batch_size=self.spec.batch_size)
        return {"divergence": gap} | super().validate(model)

    def _compared(self, output: dict, target: dict) -> dict[str, Tensor]:
        """Compare the student's `output` with the teacher's `target`; both as an `Adaptor` returns them."""
        terms: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        if "logits" in output:
            logits = output["logits"], target["logits"]
            temperature = self.schedule(*logits, self.temperature) if self.schedule else self.temperature
            terms["soft"] = self.soft(*logits, temperature)
            total = total + terms["soft"] * self.losses.soft_weight
        for match, projection in zip(self.matches, self.projections, strict=True):
            state = output[match["feature"]][match["layer_S"]]
            state = projection(state) if projection else state
            distance = MATCH_LOSS_MAP[match["loss"]](state, target[match["feature"]][match["layer_T"]])
            terms["matched"] = terms.get("matched", 0.0) + distance
            total = total + distance * match["weight"]
        if "losses" in output:
            terms["hard"] = output["losses"]
            total = total + terms["hard"] * self.losses.hard_weight
        return {"loss": total} | terms

    @torch.no_grad()
    def _teacher_outputs(self, batch: data.Batch, index: Tensor | None) -> Mapping:
        """Run the teacher, or look up its logits; nothing where hard labels alone are learnt."""
        if not self.losses.asks_teacher:
            return {}
        if not self.cached:
            return self.teacher(**batch, **self.forward_settings)
        return {"logits": self.known[index.cpu()].to(index.device)}


def _known_logits(teacher: nn.Module, spec: TrainSpec) -> Tensor:
    """Return the teacher's logits of every example, `(examples, classes)` in float32 on the CPU."""
    rows = {}
    for batch in data.evaluation_batches(spec.features, spec.batch_size, pad_id=pad_id(None, teacher)):
        index = batch.pop("index")
        rows |= dict(zip(index.tolist(), _outputs(teacher, batch).logits.float().cpu()))
    return torch.stack([rows[i] for i in range(len(spec.features))])


@torch.no_grad()
def _outputs(model: nn.Module, batch: data.Batch):
    """Return what the model gives in eval mode."""
    device = next(model.parameters()).device
    with trainer.evaluating(model):
        return model(**{name: tensor.to(device) for name, tensor in batch.items()})


def _check_models(teacher: nn.Module, student: nn.Module, train: TrainSpec) -> None:
    """Raise `BadSetting` if the two cannot read the same batches, or for settings distillation has not."""
    if train.micro_batches > 1 or train.lora or train.label_smoothing or parallel.world() > 1:
        raise BadSetting(
            "distillation runs in one process, cuts no steps, trains no adapters and smooths no labels: "
            "micro_batches is 1, lora None, label_smoothing 0."
        )
    shapes = [
        {"kind": anatomy(m).kind, "vocabulary": m.config.vocab_size, "labels": m.config.num_labels}
        for m in (teacher, student)
    ]
    if shapes[0] != shapes[1]:
        raise BadSetting(
            f"the teacher has {shapes[0]}, the student {shapes[1]}: a student needs the same of each. "
            "Make one with lmcompress.train.students."
        )
