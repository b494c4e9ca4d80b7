"""Distillation as a technique: a smaller student of the model takes its place, taught by it or not."""

from typing import Literal

from torch import nn

from lmcompress.compress import TechniqueResult, technique
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import count_parameters
from lmcompress.registry import register_look
from lmcompress.train import students
from lmcompress.train.spec import History
from lmcompress.train.trainer import curve

Student = Literal["copied", "random", "narrow"]


@technique(
    name="student", version=1, title="Student, untrained", colour="#999933", marker="1", needs=("seed",)
)
def student(
    model,
    context,
    *,
    student: Student = "copied",
    blocks: int | float | None = None,
    width: float | None = None,
):
    """Return the student that `distil` would train, as it begins: the control that has learnt nothing.

    Args:
        student: "copied" (blocks of the model, evenly spaced), "random" (its shape, fresh weights) or
            "narrow" (smaller widths, fresh weights); see `lmcompress.train.students`.
        blocks: how many of each stack, or which fraction; "narrow" may leave it out.
        width: of "narrow", the fraction of hidden size, feed-forward and heads.
    """
    small_model = _student(model, student, blocks, width, context.seed)
    return small_model, _report("student", model, small_model, student, {})


register_look(name="distil-hard", title="Student, hard labels only", colour="#DDAA33", marker="+")


@technique(name="distil", version=1, title="Distilled", colour="#882255", marker="X", needs=("train", "seed"))
def distil(
    model,
    context,
    *,
    student: Student = "copied",
    blocks: int | float | None = None,
    width: float | None = None,
    temperature: float = 4.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    matches: str = "none",
    match_weight: float = 1.0,
    temperature_schedule: str = "constant",
):
    """Train a student (see `student`) on what the model says: see `train.distillation.distil` for the loss.

    `soft_weight=0, hard_weight=1` is the control that learns from hard labels alone.
    """
    from lmcompress.train.distillation import distil as teach  # these import TextBrewer, which takes a while

    small_model = _student(model, student, blocks, width, context.seed)
    history = teach(
        model,
        small_model,
        context.train,
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        matches=matches,
        match_weight=match_weight,
        temperature_schedule=temperature_schedule,
    )
    learnt = {"final_losses": _mean_losses(history), "curve": curve(history)}
    return small_model, _report("distil", model, small_model, student, learnt)


def _mean_losses(history: History) -> dict[str, float]:
    """Return means over the last tenth of the steps of the loss and of its parts that were computed."""
    last = history.steps[-max(1, len(history.steps) // 10) :]
    names = [name for name in ("loss", "soft", "hard", "matched") if name in last[-1]]
    return {name: sum(step[name] for step in last) / len(last) for name in names}


def _student(model: nn.Module, kind: str, blocks, width: float | None, seed: int) -> nn.Module:
    if (width is not None) != (kind == "narrow") or (blocks is None and kind != "narrow"):
        raise BadSetting(
            f"student={kind!r} with blocks={blocks!r} and width={width!r}: copied and random take blocks, "
            "such as blocks=3 or 0.5; narrow takes width, such as 0.5, and blocks if it is to be shallower."
        )
    if kind == "copied":
        return students.copied_blocks(model, blocks)
    if kind == "random":
        return students.same_shape_random(model, blocks, seed=seed)
    return students.narrower(model, hidden=width, ffn=width, heads=width, blocks=blocks, seed=seed)


def _report(name: str, model: nn.Module, small_model: nn.Module, kind: str, more: dict) -> TechniqueResult:
    depth = students.depths(small_model)
    figures = {"parameters_share": count_parameters(small_model) / count_parameters(model), "blocks": depth}
    if kind == "copied":
        figures["kept"] = {
            stack: students.spread(count, depth[stack]) for stack, count in students.depths(model).items()
        }
    return TechniqueResult(name, sum(depth.values()), figures | more)
