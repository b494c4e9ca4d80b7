"""Compress a language model and measure what that costs: what most programs need, imported at first use."""

from importlib import import_module
from typing import TYPE_CHECKING

from lmcompress.models.auto import install

if TYPE_CHECKING:  # for editors and type checkers; nothing heavy is imported before a name is used
    from lmcompress.compress import Context, TechniqueResult, registered, technique
    from lmcompress.fit import fit as fit_model
    from lmcompress.formats import load as load_compressed
    from lmcompress.formats import save
    from lmcompress.models.anatomy import anatomy, prunable
    from lmcompress.models.loading import load
    from lmcompress.results.frame import frame
    from lmcompress.results.store import published_rows
    from lmcompress.study.baseline import DENSE
    from lmcompress.study.study import Study
    from lmcompress.tasks import load_task
    from lmcompress.tasks.calibration import Calibration
    from lmcompress.train.recovery import Recovery

_HOMES = {
    "load": "models.loading",  # a model by Hub id or folder, checked
    "save": "formats",  # a compressed model into a folder, as transformers or others read it
    "load_compressed": "formats:load",  # that folder again, with its tokenizer
    "load_task": "tasks",  # a data set with its metric, by name or from your own file
    "Study": "study.study",  # baselines, compressed versions, and the rows recorded of them
    "fit_model": "fit:fit",  # the version of a model that loses at most so much on your data, saved
    "DENSE": "study.baseline",  # the technique that changes nothing: what recovery is compared with
    "Calibration": "tasks.calibration",  # how much training text a technique may look at
    "Recovery": "train.recovery",  # how long to fine-tune after compressing, or while
    "technique": "compress",  # registers a technique of your own
    "TechniqueResult": "compress",  # what a technique says it did
    "Context": "compress",  # what it is handed: calibration text, training budget, tokenizer, seed
    "registered": "compress",  # every technique by name
    "anatomy": "models.anatomy",  # blocks, heads and layers of a model of any family
    "prunable": "models.anatomy",  # the linear layers that may be compressed
    "published_rows": "results.store",  # the rows behind the committed report, or those of a folder
    "frame": "results.frame",  # rows as one pandas frame
}
__all__ = list(_HOMES)
install()  # transformers' Auto classes then load what `save` wrote


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
