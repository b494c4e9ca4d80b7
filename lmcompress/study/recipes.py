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
    """The complete steps of a recipe, every budget and version spelt out; reading them again changes nothing.

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
    return [_complete(step, f"step {place}") for place, step in enumerate(steps, 1)]


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


def _complete(step: object, place: str) -> dict:
    if not isinstance(step, Mapping) or ("technique" in step) == ("recovery" in step):
        raise BadSetting(f'{place} is {step!r}: it takes either "technique" with its settings or "recovery".')
    if "recovery" in step:
        if len(step) > 1:
            extra = ", ".join(name for name in step if name != "recovery")
            raise BadSetting(f"{place}: a recovery is a step of its own; {extra} belongs into another.")
        return {"recovery": _budget(Recovery, step["recovery"], f"{place}, recovery")}
    chosen, done = compress.get(str(step["technique"])), dict(step)
    where = f"{place}, {chosen.name}"
    if "step_context" in chosen.needs:
        raise BadSetting(f"{where}: there are no chains in a chain; write its steps out.")
    done["version"] = chosen.version
    for name, need, budget in (("calibration", "calibration", Calibration), ("training", "train", Recovery)):
        if need in chosen.needs:
            done[name] = _budget(budget, done.get(name, {}), f"{where}, {name}")
        elif name in done:
            raise BadSetting(f"{where} takes no {name}: leave it out.")
    if done.get("calibration", {}).get("scored") or done.get("training", {}).get("teacher"):
        raise BadSetting(f"{where}: no step calibrates on scored text, and only a recovery has a teacher.")
    beside = {"technique", "version", "calibration", "training"}
    if "seed" in chosen.needs:
        beside.add("seed")
    try:
        chosen.check(set(done) - beside)
    except BadSetting as error:
        raise BadSetting(f"{place}, {error}") from error
    return done


def _budget(kind: type, given: object, where: str) -> dict:
    """The settings of a `Calibration` or `Recovery` made of what the recipe says."""
    try:
        made = kind(**(given or {})).settings()
    except TypeError as error:
        there = ", ".join(inspect.signature(kind).parameters)
        raise BadSetting(f"{where}: {given!r} does not say how much; it takes {there}.") from error
    if text := [name for name, value in made.items() if isinstance(value, str)]:
        raise BadSetting(f"{where}: {', '.join(text)} is text to YAML; write 1.0e-4, not 1e-4.")
    return made
