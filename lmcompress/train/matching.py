"""What a student and its teacher are compared by: weights of the losses, and which outputs are matched."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models.anatomy import anatomy
from lmcompress.train import batches as data
from lmcompress.train import trainer
from lmcompress.train.students import depths

MATCHES = ("none", "hidden", "hidden+attention")
SCHEDULES = {"constant": None, "flsw": ["flsw", 1.0, 1.0]}  # TextBrewer's name, with its beta and gamma


@dataclass(frozen=True)
class Losses:
    """What the student minimises: `soft_weight · soft + hard_weight · hard + match_weight · Σ matched`.

    Soft is the mean over targets of `−Σ softmax(z_T/T) log softmax(z_S/T)`: TextBrewer leaves out the factor
    T² of Hinton et al. (2015), so that a higher temperature also weakens soft against hard (their form:
    `soft_weight=T**2`). Hard is the model's own loss on the labels. Padding and ignored labels count in none.
    A single output (regression) has no distribution: soft is then the squared difference, at temperature 1.

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
        """Raise `BadSetting` for what is out of range, or for nothing to learn."""
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
                "soft_weight and hard_weight are 0 and nothing is matched: there is nothing to learn."
            )

    @property
    def asks_teacher(self) -> bool:
        """Return whether the teacher has to run: not for hard labels alone."""
        return bool(self.soft_weight) or self.matches != "none"


def target_logits(model: nn.Module, batch: data.Batch, logits: Tensor) -> Tensor:
    """Return those logits that predict a label, `(targets, classes)` in float32.

    `logits` are `(batch, classes)` with labels `(batch,)`, or `(batch, seq, classes)` with `(batch, seq)`,
    -100 where nothing is predicted; a causal language model's logits predict the label one position on.
    """
    labels = batch["labels"]
    if labels.ndim == 1:
        return logits.float()
    if trainer.predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels.to(logits.device) != data.IGNORED].float()


class Adaptor:
    """What TextBrewer compares of a model: logits of targets, loss, hidden states and attentions.

    Padding is taken out here, and not by TextBrewer's `inputs_mask`: that is one mask, and the two stacks of
    an encoder-decoder need two.
    """

    def __init__(self, model: nn.Module, losses: Losses, *, hard: bool = False):
        self.model, self.losses, self.hard = model, losses, hard and bool(losses.hard_weight)
        self.kind, self.depths = anatomy(model).kind, depths(model)

    def __call__(self, batch: data.Batch, outputs) -> dict[str, list[Tensor] | Tensor]:
        """Return the compared outputs by TextBrewer's names: "logits", "losses", "hidden", "attention"."""
        compared: dict[str, list[Tensor] | Tensor] = {}
        if not outputs:  # hard labels alone: the teacher did not run
            return compared
        if self.losses.soft_weight:
            compared["logits"] = target_logits(self.model, batch, outputs["logits"])
        if self.hard:
            compared["losses"] = outputs["loss"]
        if self.losses.matches != "none":
            hidden = self._states(batch, outputs, "hidden_states", after_embeddings=1)
            compared["hidden"] = [state[mask].float() for mask, state in hidden]
        if "attention" in self.losses.matches:
            compared["attention"] = [
                probabilities.permute(0, 2, 3, 1)[mask[:, :, None] & mask[:, None, :]].float()
                for mask, probabilities in self._states(batch, outputs, "attentions", after_embeddings=0)
            ]
        return compared

    def _states(
        self, batch: data.Batch, outputs, name: str, *, after_embeddings: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each state of each stack with the mask `(batch, seq)` of its tokens."""
        for stack, depth in self.depths.items():
            states = outputs.get(f"{stack}_{name}" if self.kind == "encoder-decoder" else name) or ()
            expected = depth + after_embeddings
            if len(states) != expected or any(state is None for state in states):
                raise UnknownFamily(
                    f"{type(self.model).__name__} gives {len(states)} {stack} {name}, not {expected}: "
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
