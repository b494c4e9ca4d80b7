"""The registry of techniques: one function per way to compress, `(model, context, *, settings) -> (model,
result)`.

A technique never mutates its argument, knows nothing of measuring or recording, and raises when it would
touch nothing. Families of techniques are modules beside this one that use `@technique`. Which fields of the
`Context` a technique needs (calibration text, a training run, the tokenizer, a seed) stands at its
`@technique` line; the keyword-only parameters of the function are its settings.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import get_type_hints

from torch import nn

from lmcompress.compress.context import NEEDS, Context
from lmcompress.compress.settings import check_values
from lmcompress.errors import BadSetting, BadWeights, NothingTouched
from lmcompress.registry import UNKNOWN_COLOUR, UNKNOWN_MARKER, register_look

_MODULES = (
    "pruning",
    "depth",
    "vocabulary",
    "structured",
    "textpruner",
    "distillation",
    "quantization",
    "export.openvino_graphs",
    "export.onnxruntime_graphs",
    "qat",
    "awq_smoothquant",
    "low_rank",
    "sharing",
    "abaco",
    "moefication",
    "sheared",
    "lora_prune",
    "pipeline",
)
_REGISTRY: dict[str, "Technique"] = {}


@dataclass(frozen=True)
class TechniqueResult:
    """What a technique did: `layers` maps touched and figures measured on the result (fractions 0-1, bits).

    `tokenizer` is set by a technique that changed the vocabulary: it replaces the model's.
    """

    technique: str
    layers: int
    achieved: dict = field(default_factory=dict)
    tokenizer: object | None = None

    def as_dict(self) -> dict:
        """The row's `achieved` field."""
        return {"layers": self.layers, **self.achieved}


@dataclass(frozen=True)
class Technique:
    """A registered function with the name and version that go into a row's key.

    `needs` are the fields of its `Context` that it reads. `masked` says that the result's zeros have to be
    held while it is fine-tuned.
    """

    name: str
    version: int
    function: Callable
    needs: tuple[str, ...] = ()
    masked: bool = False

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """Return the settings by name, in the order of the function's signature."""
        parameters = inspect.signature(self.function).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def check(self, settings: Mapping[str, object], *, also: Iterable[str] = ()) -> None:
        """Refuse names that are no settings of this technique, a lack of those without a default, illegal
        values.

        Args:
            settings: name to value, as given.
            also: names that the caller takes beside them, for the message.

        Raises:
            BadSetting: the message lists the legal names, or says which values are legal (`settings.RANGES`).
        """
        names = set(settings)
        legal = [*self.settings, *also]
        if unknown := sorted(names - set(legal)):
            has = ", ".join(legal) or "none"
            raise BadSetting(f"{self.name} has no setting {', '.join(unknown)}; it has {has}.")
        required = [name for name, p in self.settings.items() if p.default is p.empty]
        if missing := [name for name in required if name not in names]:
            raise BadSetting(f"{self.name} needs {', '.join(missing)}; its settings are {', '.join(legal)}.")
        check_values(self.name, self.settings, get_type_hints(self.function), settings)

    def __call__(
        self, model: nn.Module, context: Context | None = None, **settings
    ) -> tuple[nn.Module, TechniqueResult]:
        """Run the technique on a deep copy of `model`.

        Raises:
            BadSetting: a setting the technique does not have or lacks, or a need the context does not fill.
            BadWeights: the model holds NaN or infinity.
            NothingTouched: no layer matched.
        """
        self.check(settings)
        context = context or Context()
        if missing := context.missing(self.needs):
            raise BadSetting(f"{self.name} needs {', '.join(missing)} in its Context.")
        refuse_bad_weights(model)
        compressed, result = self.function(copy.deepcopy(model), context, **settings)
        if result.layers == 0:
            raise NothingTouched(
                f"{self.name} matched no layer of {type(model).__name__}; with policy 'blocks' it looks for "
                "attention and feed-forward maps, policy 'all' adds embeddings."
            )
        return compressed.eval(), result


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
    """Register `function(model, context, *, settings) -> (model, TechniqueResult)`; it may change the model
    it gets.

    Bump `version` when the numbers change: rows of the old version are then measured again. `title`, `colour`
    and `marker` are those of every table and figure; `needs` and `masked` are explained at `Technique`.

    Raises:
        BadSetting: a technique of that name is there already, or a need is no field of `Context`.
    """

    def register(function: Callable) -> Technique:
        if name in _REGISTRY:
            raise BadSetting(f"a technique named {name!r} is registered already")
        if unknown := sorted(set(needs) - set(NEEDS)):
            raise BadSetting(f"{name} needs {', '.join(unknown)}; a Context has {', '.join(NEEDS)}.")
        register_look(name=name, title=title, colour=colour, marker=marker)
        _REGISTRY[name] = Technique(name, version, function, tuple(needs), masked)
        return _REGISTRY[name]

    return register


def get(name: str) -> Technique:
    """The technique called `name`.

    Raises:
        BadSetting: there is none; the message lists those there are.
    """
    if name not in registered():
        raise BadSetting(f"no technique {name!r}; available: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def registered() -> dict[str, Technique]:
    """Every technique by name."""
    for module in _MODULES:
        import_module(f"{__name__}.{module}")
    return dict(_REGISTRY)


def refuse_bad_weights(model: nn.Module) -> None:
    """Raise `BadWeights` naming the parameters that hold NaN or infinity."""
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if bad:
        raise BadWeights(
            f"NaN or infinity in {len(bad)} parameters ({', '.join(bad[:3])}…): a score of such a weight "
            "means nothing. Load a sound checkpoint, or in float32 if this one overflowed in half precision."
        )
