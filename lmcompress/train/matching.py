"""What a student and its teacher are compared by: the weights of the losses, and which of their outputs meet."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcompress.compress.calibration import token_masks
from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models.anatomy import anatomy
from lmcompress.train import batches as data
from lmcompress.train import trainer
from lmcompress.train.students import depths

MATCHES = ("none", "hidden", "hidden+attention")
SCHEDULES = {"constant": "none", "flsw": ["flsw", 1.0, 1.0]}  # as TextBrewer is told: beta, gamma


@dataclass(frozen=True)
class Losses:
    """What the student is to minimise: see `distil`."""

    temperature: float
    soft_weight: float
    hard_weight: float
    matches: str
    match_weight: float
    temperature_schedule: str = "constant"

    def __post_init__(self) -> None:
        """Raise `BadSetting` for what is out of range, or for nothing to learn."""
        weights = (self.soft_weight, self.hard_weight, self.match_weight)
        if self.temperature <= 0 or min(weights) < 0 or self.matches not in MATCHES:
            raise BadSetting(
                f"out of range: {self}. The temperature is above 0, weights are at least 0, and matches is one of "
                f"{', '.join(MATCHES)}."
            )
        if self.temperature_schedule not in SCHEDULES or (
            self.temperature_schedule == "flsw" and self.temperature <= 2
        ):
            raise BadSetting(
                f"temperature_schedule={self.temperature_schedule!r} at temperature {self.temperature}: available are "
                f"{', '.join(SCHEDULES)}; flsw lowers it by up to 2, so start above 2."
            )
        matched = self.matches != "none" and self.match_weight
        if not (self.soft_weight or self.hard_weight or matched):
            raise BadSetting(
                "soft_weight and hard_weight are 0 and nothing is matched: there is nothing to learn."
            )

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher has to run: not for hard labels alone."""
        return bool(self.soft_weight) or self.matches != "none"


def target_logits(model: nn.Module, batch: data.Batch, logits: Tensor) -> Tensor:
    """Those logits that predict a label, `(targets, classes)` in float32.

    Args:
        batch: `labels` are `(batch,)`, or `(batch, seq)` with -100 where nothing is predicted; a causal language
            model's logits predict the label one place on.
        logits: `(batch, classes)` or `(batch, seq, classes)`.
    """
    labels = batch["labels"]
    if labels.ndim == 1:
        return logits.float()
    if trainer.predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels.to(logits.device) != data.IGNORED].float()


class Adaptor:
    """What TextBrewer compares of a model: logits of targets, loss, hidden states and attentions without padding.

    Padding is taken out here, and not by TextBrewer's `inputs_mask`: that is one mask, and the two stacks of an
    encoder-decoder need two.
    """

    def __init__(self, model: nn.Module, wanted: Losses, *, hard: bool = False):
        self.model, self.wanted, self.hard = model, wanted, hard and bool(wanted.hard_weight)
        self.kind, self.depths = anatomy(model).kind, depths(model)

    def __call__(self, batch: data.Batch, outputs) -> dict[str, list[Tensor] | Tensor]:
        found = {}
        if not outputs:  # hard labels alone: the teacher did not run
            return found
        if self.wanted.soft_weight:
            found["logits"] = target_logits(self.model, batch, outputs["logits"])
        if self.hard:
            found["losses"] = outputs["loss"]
        if self.wanted.matches != "none":
            found["hidden"] = [
                one[mask].float() for mask, one in self._states(batch, outputs, "hidden_states", 1)
            ]
        if "attention" in self.wanted.matches:
            found["attention"] = [
                one.permute(0, 2, 3, 1)[mask[:, :, None] & mask[:, None, :]].float()
                for mask, one in self._states(batch, outputs, "attentions", 0)
            ]
        return found

    def _states(self, batch: data.Batch, outputs, name: str, more: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each state of each stack with the mask `(batch, seq)` of its tokens."""
        for stack, depth in self.depths.items():
            states = outputs.get(f"{stack}_{name}" if self.kind == "encoder-decoder" else name) or ()
            if len(states) != depth + more or any(one is None for one in states):
                raise UnknownFamily(
                    f"{type(self.model).__name__} gives {len(states)} {stack} {name}, not {depth + more}: "
                    'use matches="none" for it.'
                )
            mask = token_masks(batch, stack, self.kind)["own"]
            shape = states[0].shape[:2] if more else (states[0].shape[0], states[0].shape[2])
            here = states[0].device
            mask = torch.ones(shape, device=here) if mask is None else mask
            yield from ((mask.to(here).bool(), one) for one in states)


def matched_pairs(teacher: nn.Module, student: nn.Module, wanted: Losses) -> list[dict]:
    """TextBrewer's list of what is matched: student block j ends where the teacher is at the same share of its depth."""
    if wanted.matches == "none":
        return []
    ours, theirs = anatomy(student), anatomy(teacher)
    heads = {one.attention.heads for found in (ours, theirs) for one in found.blocks}
    if "attention" in wanted.matches and len(heads) > 1:
        raise BadSetting(
            f'attentions of {sorted(heads)} heads cannot be matched one to one: use matches="hidden".'
        )
    widths = (ours.hidden_size, theirs.hidden_size)
    found, (s, t) = [], (0, 0)
    for number, (stack, depth) in enumerate(depths(student).items()):
        deep = depths(teacher)[stack]
        for j in range(depth + 1):
            at = round(j * deep / depth)
            hidden = {
                "layer_S": s + j + number,
                "layer_T": t + at + number,
            }  # a stack has one state more than blocks
            proj = {"proj": ["linear", *widths]} if widths[0] != widths[1] else {}
            found.append({**hidden, "feature": "hidden", "loss": "hidden_mse"} | proj)
            if j and "attention" in wanted.matches:
                pair = {"layer_S": s + j - 1, "layer_T": t + at - 1}
                found.append({**pair, "feature": "attention", "loss": "attention_mse"})
        s, t = s + depth, t + deep
    return [one | {"weight": wanted.match_weight} for one in found]


@contextmanager
def eager(models: Sequence[nn.Module], needed: bool) -> Iterator[None]:
    """Run eager attention, the only one that gives its probabilities, while inside."""
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models if needed else ():
            model.set_attn_implementation("eager")
        yield
    finally:
        for model, name in zip(models, before) if needed else ():
            model.set_attn_implementation(name)
