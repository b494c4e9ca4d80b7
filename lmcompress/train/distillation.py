"""Distillation: a student learns from its teacher's outputs, by the losses of TextBrewer (Yang et al. 2020).

Losses, projections and temperature schedules are TextBrewer's; the loop is `trainer.fit`, so that a distilled
and a fine-tuned student differ in the loss only, and a stopped run resumes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from textbrewer.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, PROJ_MAP, TEMPERATURE_SCHEDULER
from torch import Tensor, nn

from lmcompress.errors import BadData, BadSetting, UnknownFamily
from lmcompress.models.anatomy import anatomy
from lmcompress.tasks.batching import pad_id
from lmcompress.train import batches as data
from lmcompress.train import checkpoint as saved
from lmcompress.train import parallel, trainer
from lmcompress.train.spec import History, TrainSpec
from lmcompress.train.students import depths
from lmcompress.train.switches import attention

MATCHES = ("none", "hidden", "hidden+attention")
SCHEDULES = {"constant": None, "flsw": ["flsw", 1.0, 1.0]}  # TextBrewer's name, with its beta and gamma


@dataclass(frozen=True)
class Losses:
    """What the student minimises: `soft_weight · soft + hard_weight · hard + match_weight · Σ matched`.

    Soft is the mean over targets of `−Σ softmax(z_T/T) log softmax(z_S/T)`, without the factor T² of Hinton
    et al. (2015) (their form: `soft_weight=T**2`); of a single output (regression) the squared difference, at
    temperature 1. Hard is the model's own loss on the labels. Padding and ignored labels count in none.

    Attributes:
        soft_weight: 0 is the control that learns from hard labels; without matches the teacher never runs.
        matches: "hidden": mean squared difference of hidden states after the embeddings and after each of the
            student's blocks, with those of the teacher at the same share of its depth, through a trained
            projection where widths differ. "hidden+attention": attention probabilities, too, for which both
            models run eager attention.
        temperature_schedule: "flsw" lowers it where teacher and student disagree more than on average, by at
            most 2, and raises it elsewhere (Wen et al. 2019, focal style).
    """

    temperature: float = 4.0
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    matches: str = "none"
    match_weight: float = 1.0
    temperature_schedule: str = "constant"

    def __post_init__(self) -> None:
        weights = (self.soft_weight, self.hard_weight, self.match_weight)
        if not (self.temperature > 0 and min(weights) >= 0 and self.matches in MATCHES):
            raise BadSetting(
                f"out of range: {self}. The temperature is above 0, weights are at least 0, and matches is "
                f"one of {', '.join(MATCHES)}."
            )
        too_low = self.temperature_schedule == "flsw" and self.temperature <= 2
        if self.temperature_schedule not in SCHEDULES or too_low:
            raise BadSetting(
                f"temperature_schedule={self.temperature_schedule!r} at temperature {self.temperature}: "
                f"available are {', '.join(SCHEDULES)}; flsw lowers it by up to 2, so start above 2."
            )
        if not (self.soft_weight or self.hard_weight or (self.matches != "none" and self.match_weight)):
            raise BadSetting(
                "soft_weight and hard_weight are 0, nothing is matched: there is nothing to learn."
            )

    @property
    def asks_teacher(self) -> bool:
        """Return whether the teacher has to run: not for hard labels alone."""
        return bool(self.soft_weight) or self.matches != "none"


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
        cache: keep the teacher's class logits, where examples come again; only the time depends on it.
        losses: fields of `Losses`, which says what is minimised.

    Returns:
        The history as of `fit`; steps also hold the unweighted "soft", "hard" and "matched" that were
        computed, and `validation` (whose loss is that on hard labels) the "divergence" from the teacher.

    Raises:
        BadData: a batch without targets.
        BadSetting: losses out of range, or models that do not fit each other.
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
            target_logits(model, batch, _logits(model, batch)) for model in (teacher, student)
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


def target_logits(model: nn.Module, batch: data.Batch, logits: Tensor) -> Tensor:
    """Return the logits that predict a label, `(targets, classes)` in fp32, of `(batch[, seq], classes)`."""
    labels = batch["labels"]
    if labels.ndim == 1:
        return logits.float()
    if labels.is_floating_point():
        return data.binary(logits.float())
    if trainer.predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels.to(logits.device) != data.IGNORED].float()


class Adaptor:
    """What TextBrewer compares of a model: logits of targets, loss, hidden states and attentions.

    Padding is taken out here: TextBrewer's `inputs_mask` is one, the stacks of an encoder-decoder need two.
    """

    def __init__(self, model: nn.Module, losses: Losses, *, hard: bool = False):
        self.model, self.losses, self.hard = model, losses, hard and bool(losses.hard_weight)
        self.kind, self.depths = anatomy(model).kind, depths(model)

    def __call__(self, batch: data.Batch, outputs) -> dict[str, list[Tensor] | Tensor]:
        """Return the compared outputs by TextBrewer's names: "logits", "losses", "hidden", "attention"."""
        compared: dict[str, list[Tensor] | Tensor] = {}
        if not outputs:  # of the teacher, which did not run for hard labels alone
            return compared
        if self.losses.soft_weight:
            compared["logits"] = target_logits(self.model, batch, outputs["logits"])
        if self.hard:
            compared["losses"] = outputs["loss"]
        if self.losses.matches != "none":
            hidden = self._states(batch, outputs, "hidden_states", extra=1)
            compared["hidden"] = [state[mask].float() for mask, state in hidden]
        if "attention" in self.losses.matches:
            compared["attention"] = [
                probabilities.permute(0, 2, 3, 1)[mask[:, :, None] & mask[:, None, :]].float()
                for mask, probabilities in self._states(batch, outputs, "attentions")
            ]
        return compared

    def _states(self, batch: data.Batch, outputs, name: str, extra: int = 0) -> Iterator[tuple]:
        """Yield each state of each stack, its blocks' and `extra`, after its tokens' mask `(batch, seq)`."""
        for stack, depth in self.depths.items():
            states = outputs.get(f"{stack}_{name}" if self.kind == "encoder-decoder" else name) or ()
            if len(states) != depth + extra or any(state is None for state in states):
                raise UnknownFamily(
                    f"{type(self.model).__name__} gives {len(states)} {stack} {name}, not {depth + extra}: "
                    'use matches="none" for it.'
                )
            mask, device = data.token_masks(batch, stack, self.kind)["own"], states[0].device
            if mask is None:  # (batch, seq, width) of hidden states, (batch, heads, seq, seq) of attentions
                mask = torch.ones(states[0].shape[0], states[0].shape[-2], device=device)
            yield from ((mask.to(device).bool(), state) for state in states)


def matched_layers(teacher: nn.Module, student: nn.Module, losses: Losses) -> list[dict]:
    """Return TextBrewer's `intermediate_matches`: states at equal shares of the two models' depths."""
    if losses.matches == "none":
        return []
    models = {"S": anatomy(student), "T": anatomy(teacher)}
    heads = {block.attention.heads for model in models.values() for block in model.blocks}
    if "attention" in losses.matches and len(heads) > 1:
        raise BadSetting(
            f'attentions of {sorted(heads)} heads cannot be matched one to one: use matches="hidden".'
        )
    widths = [model.hidden_size for model in models.values()]
    projection = {"proj": ["linear", *widths]} if widths[0] != widths[1] else {}
    matches, start_s, start_t = [], 0, 0
    for number, (stack, depth) in enumerate(depths(student).items()):
        teacher_depth = depths(teacher)[stack]
        for j in range(depth + 1):
            s, t = start_s + j, start_t + round(j * teacher_depth / depth)
            hidden = {"layer_S": s + number, "layer_T": t + number}  # a stack has one state more than blocks
            matches.append({**hidden, "feature": "hidden", "loss": "hidden_mse"} | projection)
            if j and "attention" in losses.matches:
                blocks = {"layer_S": s - 1, "layer_T": t - 1}
                matches.append({**blocks, "feature": "attention", "loss": "attention_mse"})
        start_s, start_t = start_s + depth, start_t + teacher_depth
    return [match | {"weight": losses.match_weight} for match in matches]


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
        self.teacher, self.losses = teacher, losses
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
        if self.cached:  # the logits of every example, `(examples, classes)` in float32 on the CPU
            rows, reading = {}, {"pad_id": pad_id(None, self.teacher)}
            for batch in data.evaluation_batches(self.spec.features, self.spec.batch_size, **reading):
                indices = batch.pop("index").tolist()
                rows |= dict(zip(indices, _logits(self.teacher, batch).float().cpu()))
            self.known = torch.stack([rows[i] for i in range(len(rows))])
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
        batch = trainer.on_device(batch, model)
        index = batch.pop("index", None)
        with trainer.autocast(model, self.spec):
            theirs = self.adaptors[0](batch, self._teacher_outputs(batch, index))
            ours = self.adaptors[1](batch, model(**batch, **self.forward_settings))
            terms, total = {}, 0.0
            if "logits" in ours:
                logits = ours["logits"], theirs["logits"]
                temperature = self.schedule(*logits, self.temperature) if self.schedule else self.temperature
                terms["soft"] = self.soft(*logits, temperature)
                total = total + terms["soft"] * self.losses.soft_weight
            for match, projection in zip(self.matches, self.projections, strict=True):
                state = ours[match["feature"]][match["layer_S"]]
                state = projection(state) if projection else state
                distance = MATCH_LOSS_MAP[match["loss"]](state, theirs[match["feature"]][match["layer_T"]])
                terms["matched"] = terms.get("matched", 0.0) + distance
                total = total + distance * match["weight"]
            if "losses" in ours:
                terms["hard"] = ours["losses"]
                total = total + terms["hard"] * self.losses.hard_weight
        return {"loss": total} | terms

    def without_targets(self) -> dict[str, float]:
        """Refuse a batch that holds nothing to predict: the mean of its soft losses is NaN."""
        raise BadData("a batch holds nothing to predict: drop the examples whose labels are all ignored.")

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return "divergence", "loss" and "targets" of `spec.evaluate`."""
        gap = divergence(self.teacher, model, self.spec.evaluate, batch_size=self.spec.batch_size)
        return {"divergence": gap} | super().validate(model)

    @torch.no_grad()
    def _teacher_outputs(self, batch: data.Batch, index: Tensor | None) -> Mapping:
        """Run the teacher, or look up its logits; nothing where hard labels alone are learnt."""
        if not self.losses.asks_teacher:
            return {}
        if not self.cached:
            return self.teacher(**batch, **self.forward_settings)
        return {"logits": self.known[index.cpu()].to(index.device)}


@torch.no_grad()
def _logits(model: nn.Module, batch: data.Batch) -> Tensor:
    """Return the model's logits in eval mode."""
    with trainer.evaluating(model):
        return model(**trainer.on_device(batch, model)).logits


def _check_models(teacher: nn.Module, student: nn.Module, train: TrainSpec) -> None:
    """Raise `BadSetting` if the two cannot read the same batches, or for settings distillation has not."""
    if train.micro_batches > 1 or train.lora or train.label_smoothing or parallel.world() > 1:
        raise BadSetting(
            "distillation runs in one process, cuts no steps, trains no adapters and smooths no labels: "
            "micro_batches is 1, lora None, label_smoothing 0."
        )
    if teacher.base_model is teacher and teacher.get_output_embeddings() is None:
        raise BadSetting("the teacher has no head, so no logits to distil: take one for labels or numbers.")
    theirs, ours = (
        {"kind": anatomy(m).kind, "vocabulary": m.config.vocab_size, "labels": m.config.num_labels}
        for m in (teacher, student)
    )
    if theirs != ours:
        advice = "a student needs the same of each. Make one with lmcompress.train.students."
        raise BadSetting(f"the teacher has {theirs}, the student {ours}: {advice}")
