"""The registry of techniques: one function per way to compress, model in, model and report out.

A technique never mutates its argument, knows nothing of measuring or recording, and raises when it
would touch nothing. Families of techniques are modules beside this one that use `@technique`. What a function
asks for by name is given to it: `calibration` (batches of text it may look at, with labels where the task has
them), `train` (a `TrainSpec`), `tokenizer`, `seed`; a chain `supply` and `trail`; everything else is a setting.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from torch import nn

from lmcompress.errors import BadSetting, BadWeights, NothingTouched
from lmcompress.registry import UNKNOWN_COLOUR, UNKNOWN_MARKER, register_look

_MODULES = (
    "pruning",
    "activation_pruning",
    "movement",
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

    `masked` says that the result's zeros have to be held while it is fine-tuned.
    """

    name: str
    version: int
    function: Callable
    masked: bool = False

    def takes(self, name: str) -> bool:
        """Whether the function asks for `name`: "seed", "calibration", "train" or "tokenizer"."""
        return name in inspect.signature(self.function).parameters

    def __call__(self, model: nn.Module, **settings) -> tuple[nn.Module, TechniqueResult]:
        """Run the technique on a deep copy of `model`.

        Raises:
            BadSetting: a setting the technique does not have.
            BadWeights: the model holds NaN or infinity.
            NothingTouched: no layer matched.
        """
        known = list(inspect.signature(self.function).parameters)[1:]
        if unknown := sorted(set(settings) - set(known)):
            raise BadSetting(f"{self.name} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
        refuse_bad_weights(model)
        compressed, report = self.function(copy.deepcopy(model), **settings)
        if report.layers == 0:
            raise NothingTouched(
                f"{self.name} matched no layer of {type(model).__name__}; with policy 'blocks' it looks for "
                "attention and feed-forward maps, policy 'all' adds embeddings."
            )
        return compressed.eval(), report


def technique(
    *,
    name: str,
    version: int,
    title: str,
    colour: str = UNKNOWN_COLOUR,
    marker: str = UNKNOWN_MARKER,
    masked: bool = False,
) -> Callable:
    """Register `function(model, **settings) -> (model, TechniqueResult)`; it is handed a copy it may change.

    Bump `version` when the numbers change: rows of the old version are then measured again. `title`, `colour` and
    `marker` are those of every table and figure.
    """

    def register(function: Callable) -> Technique:
        if name in _REGISTRY:
            raise BadSetting(f"a technique named {name!r} is registered already")
        register_look(name=name, title=title, colour=colour, marker=marker)
        _REGISTRY[name] = Technique(name, version, function, masked)
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
            f"NaN or infinity in {len(bad)} parameters ({', '.join(bad[:3])}…): a score of such a weight means "
            "nothing. Load a sound checkpoint, or in float32 if this one overflowed in half precision."
        )
