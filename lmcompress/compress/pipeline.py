"""A chain: techniques one after the other, each on the model that the one before left.

A step is a mapping as `lmcompress.study.recipes` completes it: a technique by name with its settings, or a
`recovery`. Weights that a pruning set to zero are held there by whatever trains or rounds after it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from torch import Tensor, nn

from lmcompress.compress import Context, Technique, TechniqueResult, get, technique
from lmcompress.compress.masks import kept_masks
from lmcompress.errors import BadSetting, StudyError, UnknownFamily
from lmcompress.models.anatomy import anatomy, count_parameters, prunable
from lmcompress.models.families import integer_layers
from lmcompress.train.trainer import History, TrainSpec, curve, fit

AFTER_INTEGERS = ("drop-blocks", "vocabulary", "cast")  # what needs no floating-point matrix in the blocks
NOT_SETTINGS = ("technique", "version", "calibration", "training", "seed")  # in a step, beside the settings
Step = Mapping[str, object]


@dataclass
class StepResult:
    """What one step left; `mask_policy`: of the pruning whose zeros are held from here on, if any."""

    model: nn.Module | None
    result: TechniqueResult
    mask_policy: str | None
    tokenizer: object | None


@dataclass
class StepCache:
    """The models that a chain's steps left, so that the next chain that begins alike goes on from there."""

    seed: int = 0
    steps: list[Step] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)

    def common(self, seed: int, steps: Sequence[Step]) -> list[StepResult]:
        """Return what the steps left with which both `steps` and the last chain begin."""
        pairs = zip(steps, self.steps, self.results) if seed == self.seed else ()
        return [result for step, known, result in takewhile(lambda pair: pair[0] == pair[1], pairs)]


@technique("chain", 1, "Chain of techniques", "#66A61E", "D", needs=("step_context", "seed"))
def chain(model: nn.Module, context: Context, *, steps: Sequence[Step]):
    """Run `steps` in order; `achieved` has each one's report, with parameters and share of zeros after it.

    Args:
        context: `step_context` makes that of each step; steps in the `step_cache` had the same `seed`.
        steps: complete ones (`recipes.read`). The teacher of a recovery is `model`.
    """
    cache = context.step_cache
    results = cache.common(context.seed, steps) if cache else []
    names = [str(step.get("technique", "recovery")) for step in steps]
    for position in range(len(results), len(steps)):
        previous = results[-1] if results else None
        after = f" after {' → '.join(names[:position])}" if position else ""
        where = f"step {position + 1} of {len(steps)}, {names[position]}{after}"
        try:
            results.append(_run_step(model, previous, steps[position], position, context))
        except StudyError as error:
            raise type(error)(f"{where}: {error}") from error
        except (AttributeError, IndexError, TypeError, RuntimeError) as error:
            if not position:
                raise
            raise BadSetting(f"{where}: {type(error).__name__}: {error}") from error
        if cache:
            cache.seed, cache.steps, cache.results = context.seed, [*steps[: position + 1]], [*results]
        elif previous:
            previous.model = None  # only the last is needed
    last, layers = results[-1], max(step.result.layers for step in results)
    achieved = {"steps": [step.result.as_dict() for step in results]}
    achieved["sparsity"] = last.result.achieved["sparsity"]
    return last.model, TechniqueResult("chain", layers, achieved, last.tokenizer)


def recover(
    model: nn.Module,
    spec: TrainSpec,
    *,
    teacher: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> History:
    """Fine-tune `model` in place on hard labels, or on `teacher`'s; weights where `masks` is 0 stay zero."""
    if teacher is None:
        return fit(model, spec, masks=masks)
    from lmcompress.train.distillation import distil  # it imports TextBrewer, which takes a while

    return distil(teacher, model, spec, masks=masks)


def share_of_zeros(model: nn.Module) -> float | None:
    """Return the share of zeros in the blocks' linear maps, packed ones too; None if they cannot be seen."""
    try:
        matrices = [layer.weight2d for layer in prunable(model)]
        inside = {m for block in anatomy(model).blocks for m in block.module.modules()}
    except UnknownFamily:
        return None
    matrices += [layer.dequantized for layer in integer_layers(model) if layer in inside]
    counts = [(int((matrix == 0).sum()), matrix.numel()) for matrix in (read() for read in matrices)]
    return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts) if counts else None


def _run_step(
    dense: nn.Module, previous: StepResult | None, step: Step, position: int, context: Context
) -> StepResult:
    previous = previous or StepResult(dense, TechniqueResult("dense", 1), None, None)
    model, mask_policy, tokenizer = previous.model, previous.mask_policy, previous.tokenizer
    step_context = context.step_context(step, position, tokenizer)
    if "recovery" in step:
        model = copy.deepcopy(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not trained:
            raise BadSetting("no parameter is left to train: put the recovery before what stored them away.")
        masks = kept_masks(model, policy=mask_policy) if mask_policy else None
        teacher = dense if step["recovery"].get("teacher") else None
        history = recover(model, step_context.train, teacher=teacher, masks=masks)
        figures = {"trained_share": trained / count_parameters(model), "curve": curve(history)}
        result = TechniqueResult("recovery", 1, figures)
    else:
        step_technique = get(step["technique"])
        _refuse(step_technique, model, mask_policy)
        settings = {name: value for name, value in step.items() if name not in NOT_SETTINGS}
        if mask_policy and "keep_zeros" in step_technique.settings:
            settings = {"keep_zeros": True} | settings
        model, result = step_technique(model, step_context, **settings)
        mask_policy = settings.get("policy", "blocks") if step_technique.masked else mask_policy
        tokenizer = result.tokenizer or tokenizer
    counts = {"parameters": count_parameters(model), "sparsity": share_of_zeros(model)}
    achieved = {"technique": result.technique} | result.achieved | counts
    result = TechniqueResult(result.technique, result.layers, achieved)
    return StepResult(model, result, mask_policy, tokenizer)


def _refuse(chosen: Technique, model: nn.Module, policy: str | None) -> None:
    """Raise `BadSetting` if `chosen` needs what the steps before took away, or would undo what they did."""
    if integer_layers(model) and chosen.name not in AFTER_INTEGERS:
        raise BadSetting(
            f"{chosen.name} cannot follow: the weights are packed integers (or a graph) by now, no matrix is "
            "left to prune, factorise, round or train. Put it before that step. What can follow integers: "
            f"{', '.join(AFTER_INTEGERS)}, and a recovery, which then trains everything else."
        )
    if policy and "train" in chosen.needs and not (chosen.masked or "keep_zeros" in chosen.settings):
        raise BadSetting(
            f"{chosen.name} cannot follow: it trains, and would fill the zeros of the pruning before it. Put "
            "it first, or use a recovery step (with `teacher: true` for distillation), which holds them."
        )
