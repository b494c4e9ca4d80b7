"""A chain: techniques one after the other, each on the model that the one before left.

A step is a mapping as `lmcompress.study.recipes` completes it: a technique by name with its settings, or a `recovery`. What one
step did is kept by the next: weights that a pruning set to zero are held there by whatever trains or rounds after it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lmcompress.compress import Technique, TechniqueResult, get, technique
from lmcompress.compress.pruning import kept_masks
from lmcompress.errors import BadSetting, StudyError, UnknownFamily
from lmcompress.models.anatomy import anatomy, count_parameters, prunable
from lmcompress.models.families import integer_layers
from lmcompress.train.trainer import History, TrainSpec, curve, fit

AFTER_INTEGERS = ("drop-blocks", "vocabulary", "cast")  # what needs no floating-point matrix in the blocks
BUDGETS = ("calibration", "training")  # of a step: `supply` makes text and training of them
Step = Mapping[str, object]


@dataclass
class Made:
    """What a step left: `mark` says which it was; `policy`: of the pruning whose zeros are held, if there was one."""

    mark: tuple
    model: nn.Module | None
    report: TechniqueResult
    policy: str | None
    tokenizer: object | None


@technique(name="chain", version=1, title="Chain of techniques", colour="#66A61E", marker="D")
def chain(
    model: nn.Module,
    *,
    steps: Sequence[Step],
    supply: Callable[..., dict],
    seed: int = 0,
    trail: list[Made] | None = None,
):
    """Run `steps` in order; `achieved` has each one's report, with parameters and share of zeros after it.

    Args:
        steps: complete ones (`recipes.read`). The teacher of a recovery is `model`.
        supply: called with a technique (None: a recovery), its step, its place and a new tokenizer (or None); returns
            what the technique asks for by name, or the recovery's `train`.
        seed: part of what makes a step the same as one in `trail`.
        trail: what the steps of the last chain left. A chain that begins alike goes on from there, and leaves its own.

    Raises:
        BadSetting: a step cannot follow the one before it; the message says which and why.
    """
    made = [] if trail is None else trail
    same = 0
    while same < min(len(made), len(steps)) and made[same].mark == (seed, steps[same]):
        same += 1
    del made[same:]
    for place in range(same, len(steps)):
        try:
            made.append(_next(model, made[-1] if made else None, steps[place], place, supply, seed))
        except StudyError as error:
            raise type(error)(f"{_where(steps, place)}: {error}") from error
        except (AttributeError, IndexError, TypeError, RuntimeError) as error:
            if not place:
                raise
            raise BadSetting(f"{_where(steps, place)}: {type(error).__name__}: {error}") from error
        if trail is None and place:
            made[place - 1].model = None  # only the last is needed
    last = made[-1]
    figures = {"steps": [one.report.as_dict() for one in made], "sparsity": last.report.achieved["sparsity"]}
    return last.model, TechniqueResult(
        "chain", max(one.report.layers for one in made), figures, last.tokenizer
    )


def recover(
    model: nn.Module,
    spec: TrainSpec,
    *,
    teacher: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> History:
    """Fine-tune `model` in place on hard labels, or on what `teacher` says; weights where `masks` is 0 stay zero."""
    if teacher is None:
        return fit(model, spec, masks=masks)
    from lmcompress.train.distillation import distil  # it imports TextBrewer, which takes a while

    return distil(teacher, model, spec, masks=masks)


def share_of_zeros(model: nn.Module) -> float | None:
    """Zeros among the weights of the blocks' linear maps, packed ones included; None where they cannot be seen."""
    try:
        matrices = [one.weight2d for one in prunable(model)]
        inside = {id(m) for block in anatomy(model).blocks for m in block.module.modules()}
    except UnknownFamily:
        return None
    matrices += [one.dequantized for one in integer_layers(model) if id(one) in inside]
    counts = [(int((matrix == 0).sum()), matrix.numel()) for matrix in (read() for read in matrices)]
    return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts) if counts else None


def _next(
    dense: nn.Module, last: Made | None, step: Step, place: int, supply: Callable[..., dict], seed: int
) -> Made:
    model, policy, tokenizer = (last.model, last.policy, last.tokenizer) if last else (dense, None, None)
    if "recovery" in step:
        model, report = _recovered(model, dense, supply(None, step, place, tokenizer), step, policy)
    else:
        chosen = get(step["technique"])
        _refuse(chosen, model, policy)
        settings = {n: v for n, v in step.items() if n not in ("technique", "version", *BUDGETS)}
        zeros = {"keep_zeros": True} if policy and chosen.takes("keep_zeros") else {}
        model, report = chosen(model, **(supply(chosen, step, place, tokenizer) | zeros | settings))
        policy = settings.get("policy", "blocks") if chosen.masked else policy
        tokenizer = report.tokenizer or tokenizer
    figures = {"parameters": count_parameters(model), "sparsity": share_of_zeros(model)}
    report = TechniqueResult(
        report.technique, report.layers, {"technique": report.technique} | report.achieved | figures
    )
    return Made((seed, step), model, report, policy, tokenizer)


def _recovered(model: nn.Module, dense: nn.Module, supplied: dict, step: Step, policy: str | None):
    model = copy.deepcopy(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise BadSetting(
            "no parameter is left to train: put the recovery before the step that stored them away."
        )
    masks = kept_masks(model, policy=policy) if policy else None
    teacher = dense if step["recovery"].get("teacher") else None
    history = recover(model, supplied["train"], teacher=teacher, masks=masks)
    share = trained / count_parameters(model)
    return model, TechniqueResult("recovery", 1, {"trained_share": share, "curve": curve(history)})


def _refuse(chosen: Technique, model: nn.Module, policy: str | None) -> None:
    """Raise `BadSetting` if `chosen` needs what the steps before have taken away, or would undo what they did."""
    if integer_layers(model) and chosen.name not in AFTER_INTEGERS:
        raise BadSetting(
            f"{chosen.name} cannot follow: the weights are packed integers (or a graph) by now, and no floating-point "
            "matrix is left to prune, factorise, round or train. Put it before that step. What can follow integers: "
            f"{', '.join(AFTER_INTEGERS)}, and a recovery, which then trains everything else."
        )
    if policy and chosen.takes("train") and not (chosen.masked or chosen.takes("keep_zeros")):
        raise BadSetting(
            f"{chosen.name} cannot follow: it trains, and would fill the zeros of the pruning before it. Put it first, "
            "or use a recovery step (with `teacher: true` for distillation), which holds them."
        )


def _where(steps: Sequence[Step], place: int) -> str:
    names = [str(step.get("technique", "recovery")) for step in steps]
    after = f" after {' → '.join(names[:place])}" if place else ""
    return f"step {place + 1} of {len(steps)}, {names[place]}{after}"
