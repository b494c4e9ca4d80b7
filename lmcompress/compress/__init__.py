"""The registry of techniques, functions `(model, context, *, settings) -> (model, result)`.

Keyword-only parameters are the settings. A technique knows nothing of measuring or recording.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import get_type_hints

from torch import nn
from transformers import PreTrainedTokenizerBase

from lmcompress.compress.settings import check_values
from lmcompress.errors import BadSetting, BadWeights, NothingTouched, UnknownFamily
from lmcompress.models.anatomy import anatomy
from lmcompress.models.mixtures import close_experts, open_experts
from lmcompress.models.slicing_check import refuse_failure
from lmcompress.registry import UNKNOWN_COLOUR, UNKNOWN_MARKER, register_look
from lmcompress.train.batches import Batch
from lmcompress.train.spec import TrainSpec

_MODULES = ("pruning", "depth", "vocabulary", "structured", "textpruner", "distillation", "quantization")
_MODULES += ("export", "qat", "low_rank", "sharing", "abaco", "moefication", "sheared")
_MODULES += ("pipeline", "expert_pruning")
_REGISTRY: dict[str, "Technique"] = {}
NEEDS = (
    "calibration",
    "train",
    "tokenizer",
    "seed",
    "step_context",
)  # of a Context: what a technique may declare


@dataclass(frozen=True)
class Context:
    """What a technique is given beside the model and its settings; a field it does not need stays None.

    `step_context`, of a chain, returns the context of a step, given the step, its position from 0, and the
    tokenizer that an earlier step put in place of the model's (else None).
    """

    calibration: Sequence[Batch] | None = None  # padded, with `labels` where model and task have a loss
    train: TrainSpec | None = None  # data, steps and learning rate of a technique that trains
    tokenizer: PreTrainedTokenizerBase | None = None
    seed: int = 0  # of whatever is drawn
    step_context: Callable[..., "Context"] | None = None
    step_cache: object | None = None  # a `pipeline.StepCache`: what the steps of the last chain left


@dataclass(frozen=True)
class TechniqueResult:
    """What a technique did: `layers` touched, and figures measured on the result (fractions 0-1, bits)."""

    technique: str
    layers: int
    achieved: dict = field(default_factory=dict)
    tokenizer: object | None = None  # replaces the model's, if the vocabulary changed

    def as_dict(self) -> dict:
        """Return the row's `achieved` field."""
        return {"layers": self.layers, **self.achieved}


@dataclass(frozen=True)
class Technique:
    """A registered function with the name and version that go into a row's key."""

    name: str
    version: int
    function: Callable
    needs: tuple[str, ...] = ()  # the fields of its `Context` that it reads
    masked: bool = False  # the result's zeros have to be held while it is fine-tuned

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """Return the settings by name, in the order of the function's signature."""
        parameters = inspect.signature(self.function).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def check(self, settings: Mapping[str, object], *, also: Iterable[str] = ()) -> None:
        """Raise `BadSetting` for unknown names (`also`: other legal ones), missing ones, illegal values."""
        parameters = self.settings
        legal = ", ".join([*parameters, *also]) or "none"
        if unknown := sorted(set(settings) - {*parameters, *also}):
            raise BadSetting(f"{self.name} has no setting {', '.join(unknown)}; it has {legal}.")
        required = [name for name, p in parameters.items() if p.default is p.empty]
        if missing := [name for name in required if name not in settings]:
            raise BadSetting(f"{self.name} needs {', '.join(missing)}; its settings are {legal}.")
        hints = get_type_hints(self.function)
        check_values(self.name, {name: hints.get(name, object) for name in parameters}, settings)

    def __call__(
        self, model: nn.Module, context: Context | None = None, **settings
    ) -> tuple[nn.Module, TechniqueResult]:
        """Run the technique on a deep copy of `model`.

        Raises:
            BadSetting: a setting that is unknown, missing or illegal, or a need the context does not fill.
            BadWeights: the model holds NaN or infinity.
            NothingTouched: no layer matched.
            UnknownFamily, BadData: the technique cannot do such a model, or text.
        """
        self.check(settings)
        context = context or Context()
        if missing := [name for name in self.needs if getattr(context, name) is None]:
            raise BadSetting(f"{self.name} needs {', '.join(missing)} in its Context.")
        refuse_bad_weights(model)
        copied = copy.deepcopy(model)
        open_experts(copied)  # techniques treat linear layers
        compressed, result = self.function(copied, context, **settings)
        close_experts(compressed)
        _refuse_broken(compressed)
        if result.layers == 0:
            looked = "policy 'blocks' looks for attention and feed-forward maps, 'all' adds embeddings"
            raise NothingTouched(f"{self.name} matched no layer of {type(model).__name__}; {looked}.")
        return compressed.eval(), result


def _refuse_broken(compressed: nn.Module) -> None:
    """Raise `UnknownFamily` if a model with parts that are not known does not run with layers replaced."""
    try:
        structure = anatomy(compressed)
    except UnknownFamily:  # it is another runtime's
        return
    if structure.embeddings and any(block.unknown for block in structure.blocks):
        refuse_failure(compressed, replaced=True)


def technique(
    name: str,
    version: int,
    title: str,
    colour: str = UNKNOWN_COLOUR,
    marker: str = UNKNOWN_MARKER,
    *,
    needs: tuple[str, ...] = (),
    masked: bool = False,
) -> Callable[[Callable], Technique]:
    """Register `function(model, context, *, settings) -> (model, TechniqueResult)`; it may change the model.

    Raise `version` when the numbers change: rows of the old version are then measured again. `title`,
    `colour` and `marker` are those of every table and figure; for `needs` and `masked` see `Technique`.
    """

    def register(function: Callable) -> Technique:
        if name in _REGISTRY:
            raise BadSetting(f"a technique named {name!r} is registered already")
        if unknown := sorted({*needs} - {*NEEDS}):
            raise BadSetting(f"{name} needs {', '.join(unknown)}; a Context has {', '.join(NEEDS)}.")
        register_look(name=name, title=title, colour=colour, marker=marker)
        _REGISTRY[name] = Technique(name, version, function, tuple(needs), masked)
        return _REGISTRY[name]

    return register


def get(name: str) -> Technique:
    """Return the technique called `name`; the `BadSetting` of an unknown one lists those there are."""
    if name not in registered():
        raise BadSetting(f"no technique {name!r}; available: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def registered() -> dict[str, Technique]:
    """Return every technique by name."""
    for module in _MODULES:
        import_module(f"{__name__}.{module}")
    return dict(_REGISTRY)


def refuse_bad_weights(model: nn.Module) -> None:
    """Raise `BadWeights` naming the parameters that hold NaN or infinity."""
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if bad:
        raise BadWeights(
            f"NaN or infinity in {len(bad)} parameters ({', '.join(bad[:3])}…). Load a sound checkpoint, or "
            "in float32 if this one overflowed in half precision."
        )
