"""Distillation as a technique: a smaller student of the model takes its place, taught by it or not."""

from typing import Literal

from torch import nn

from lmcompress.compress import TechniqueResult, technique
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import count_parameters
from lmcompress.registry import register_look
from lmcompress.train import students
from lmcompress.train.trainer import curve

Student = Literal["copied", "random", "narrow"]


@technique("student", 1, "Student, untrained", "#999933", "1", needs=("seed",))
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
    small_model, figures = _student(model, student, blocks, width, context.seed)
    return small_model, TechniqueResult("student", sum(figures["blocks"].values()), figures)


register_look(name="distil-hard", title="Student on labels", colour="#DDAA33", marker="+")


@technique("distil", 1, "Distilled", "#882255", "X", needs=("train", "seed"))
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

    small_model, figures = _student(model, student, blocks, width, context.seed)
    losses = {"temperature": temperature, "soft_weight": soft_weight, "hard_weight": hard_weight}
    losses |= {"matches": matches, "match_weight": match_weight, "temperature_schedule": temperature_schedule}
    history = teach(model, small_model, context.train, **losses)
    last = history.steps[-max(1, len(history.steps) // 10) :]  # a tenth: batches differ
    names = [name for name in ("loss", "soft", "hard", "matched") if name in last[-1]]
    means = {name: sum(step[name] for step in last) / len(last) for name in names}
    figures |= {"final_losses": means, "curve": curve(history)}
    return small_model, TechniqueResult("distil", sum(figures["blocks"].values()), figures)


def _student(
    model: nn.Module, kind: Student, blocks: int | float | None, width: float | None, seed: int
) -> tuple[nn.Module, dict]:
    """Return the student, and what it is beside the model."""
    if (width is not None) != (kind == "narrow") or (blocks is None and kind != "narrow"):
        raise BadSetting(
            f"student={kind!r} with blocks={blocks!r} and width={width!r}: copied and random take blocks, "
            "such as blocks=3 or 0.5; narrow takes width, such as 0.5, and blocks if it is to be shallower."
        )
    if kind == "copied":
        small_model = students.copied_blocks(model, blocks)
    elif kind == "random":
        small_model = students.same_shape_random(model, blocks, seed=seed)
    else:
        small_model = students.narrower(model, hidden=width, ffn=width, heads=width, blocks=blocks, seed=seed)
    depth, dense = students.depths(small_model), students.depths(model)
    figures = {"parameters_share": count_parameters(small_model) / count_parameters(model), "blocks": depth}
    if kind == "copied":
        figures["kept"] = {stack: students.spread(dense[stack], depth[stack]) for stack in dense}
    return small_model, figures
