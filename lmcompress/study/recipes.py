"""Recipes: chains of techniques as data, in a list or a YAML file, checked before anything is computed.

Each step is a mapping: `technique: NAME` with that technique's settings, beside them `calibration` (how much text it
may look at) and `training` (the budget of one that trains); or `recovery` with its budget, `teacher: true` for
distillation from the dense model. Names and numbers are those of `Baseline.measure`.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lmcompress import compress
from lmcompress.errors import BadSetting
from lmcompress.tasks.calibration import Calibration
from lmcompress.train.recovery import Recovery

Recipe = str | Path | Sequence[Mapping[str, object]]


def read(recipe: Recipe) -> list[dict]:
    """Return the complete steps of a recipe, every budget and version spelt out; reading them again changes nothing.

    Args:
        recipe: a YAML file, or the list that is in one.

    Raises:
        BadSetting: no such file, or a step that is no step; the message says which and what is there to choose from.
    """
    steps = recipe
    if isinstance(recipe, str | Path):
        if not Path(recipe).is_file():
            raise BadSetting(f"no recipe file {recipe}: give a .yaml file with a list of steps.")
        steps = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise BadSetting(f"a recipe is a list of at least one step, not {steps!r}.")
    return [_complete(step, f"step {number}") for number, step in enumerate(steps, 1)]


def as_one(steps: Sequence[Mapping]) -> dict | None:
    """Return the arguments with which `Baseline.measure` does `steps` in one row; None if it takes a chain.

    One row is that of a single technique, of a recovery (then without "technique": of the dense model), or of both.
    """
    kinds = ["recovery" if "recovery" in step else "technique" for step in steps]
    if kinds not in (["technique"], ["recovery"], ["technique", "recovery"]) or "seed" in steps[0]:
        return None
    arguments = {name: setting for step in steps for name, setting in step.items() if name != "version"}
    for name, budget in (("calibration", Calibration), ("training", Recovery), ("recovery", Recovery)):
        if name in arguments:
            arguments[name] = budget(**arguments[name])
    return arguments


def _complete(step: object, position: str) -> dict:
    """Return a step with every budget and its version spelt out; `position` ("step 2") begins each message."""
    if not isinstance(step, Mapping) or ("technique" in step) == ("recovery" in step):
        raise BadSetting(
            f'{position} is {step!r}: it takes either "technique" with its settings or "recovery".'
        )
    if "recovery" in step:
        if len(step) > 1:
            extra = ", ".join(name for name in step if name != "recovery")
            raise BadSetting(f"{position}: a recovery is a step of its own; {extra} belongs into another.")
        return {"recovery": _budget(Recovery, step["recovery"], f"{position}, recovery")}
    technique, complete = compress.get(str(step["technique"])), dict(step)
    position = f"{position}, {technique.name}"
    if "step_context" in technique.needs:
        raise BadSetting(f"{position}: there are no chains in a chain; write its steps out.")
    complete["version"] = technique.version
    for name, need, budget in (("calibration", "calibration", Calibration), ("training", "train", Recovery)):
        if need in technique.needs:
            complete[name] = _budget(budget, complete.get(name, {}), f"{position}, {name}")
        elif name in complete:
            raise BadSetting(f"{position} takes no {name}: leave it out.")
    if complete.get("calibration", {}).get("scored") or complete.get("training", {}).get("teacher"):
        raise BadSetting(f"{position}: no step calibrates on scored text, and only a recovery has a teacher.")
    seed = {"seed"} & set(technique.needs)
    try:
        beside = {"technique", "version", "calibration", "training"} | seed
        settings = {name: value for name, value in complete.items() if name not in beside}
        technique.check(settings, also=seed)
    except BadSetting as error:
        raise BadSetting(f"{position}: {error}") from error
    return complete


def _budget(kind: type, asked: object, position: str) -> dict:
    """Return the settings of the `Calibration` or `Recovery` that the recipe asks for."""
    try:
        budget = kind(**(asked or {})).settings()
    except TypeError as error:
        legal = ", ".join(inspect.signature(kind).parameters)
        raise BadSetting(f"{position}: {asked!r} does not say how much; it takes {legal}.") from error
    if text := [name for name, setting in budget.items() if isinstance(setting, str)]:
        raise BadSetting(f"{position}: {', '.join(text)} is text to YAML; write 1.0e-4, not 1e-4.")
    return budget
