"""Teaches transformers' Auto classes the folders that only this package can rebuild, on `import lmcompress`.

Nothing heavy is imported for it: the classes are registered as soon as a program imports transformers' own
Auto classes, by an import hook as importlib documents them, or at once where it has done so already.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

# Of a config whose structure plain transformers cannot rebuild: it prints the type that it does not know.
MODEL_TYPE = "lmcompress (import lmcompress first)"
# End of a model class's name -> the Auto class that loads it, and transformers' name for what that loads.
AUTO_CLASSES = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "QUESTION_ANSWERING"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "MASKED_LM"),
    "ForCausalLM": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "LMHeadModel": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "Model": ("AutoModel", None),
}
# Module of transformers -> what of `auto_classes` runs after it.
_HOOKED = {
    "transformers.models.auto.configuration_auto": "register_config",
    "transformers.models.auto.modeling_auto": "register_models",
}


class _Finder(MetaPathFinder):
    """Finds the modules in `_HOOKED` where they lie, to be loaded with a `_Loader`."""

    def find_spec(self, name: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _HOOKED else None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    """Registers this package's classes once the module is there."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _registration(module.__name__)()


def auto_class(class_name: str) -> str | None:
    """Return the Auto class that loads models of the class called `class_name`, if one does."""
    return next((auto for end, (auto, _) in AUTO_CLASSES.items() if class_name.endswith(end)), None)


def install() -> None:
    """Register with the Auto classes that are imported already, and with the others when they are."""
    for name in filter(sys.modules.__contains__, _HOOKED):
        _registration(name)()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _registration(name: str) -> Callable[[], None]:
    return getattr(import_module("lmcompress.models.auto_classes"), _HOOKED[name])
