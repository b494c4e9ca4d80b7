"""Recipes: chains of techniques as data, in a list or a YAML file, checked before anything is computed.

Each step is a mapping: `technique: NAME` with its settings, beside them `calibration` (how much text it may
look at) and `training` (the budget of one that trains); or `recovery` with its budget, `teacher: true` for
distillation from the dense model. Names and numbers are those of `Baseline.measure`.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import yaml

from lmcompress import compress
from lmcompress.errors import BadData, BadSetting
from lmcompress.results.rows import chain_steps
from lmcompress.results.store import canonical
from lmcompress.tasks.calibration import Calibration
from lmcompress.train.recovery import Recovery

Recipe = str | Path | Sequence[Mapping[str, object]]
_BUDGETS = ("calibration", "training")
DTYPES = ("float32", "bfloat16", None)  # of products while training; None: what is faster
_LEAST = {"n": 1, "length": 1, "steps": 1, "trial_steps": 0, "batch_size": 1, "validation": 0, "seed": 0}


def read(recipe: Recipe) -> list[dict]:
    """Return the complete steps of a recipe, every budget and version spelt out; else `BadSetting`.

    `recipe` is a YAML file, or the list that is in one; what this returns reads as itself.
    """
    steps = recipe
    if isinstance(recipe, str | Path):
        if not Path(recipe).is_file():
            raise BadSetting(f"no recipe file {recipe}: give a .yaml file with a list of steps.")
        try:
            steps = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise BadSetting(f"{recipe} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date such as 2026-13-40
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise BadSetting(f"{recipe}{line} is not YAML: {reason}.") from error
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise BadSetting(f"a recipe is a list of at least one step, not {str(steps)[:80]!r}.")
    return [_complete(step, f"step {number}") for number, step in enumerate(steps, 1)]


def of_row(row: Mapping) -> list[dict]:
    """Return the recipe that a recorded row was made by; measuring it again gives a row of the same key."""
    settings = dict(row["settings"])
    if steps := chain_steps(settings):
        return read(steps)
    recovery = [{"recovery": settings.pop("recovery")}] if "recovery" in settings else []
    step = [] if row["technique"] == "dense" else [{"technique": row["technique"], **settings}]
    return read(step + recovery)


def as_one(steps: Sequence[Mapping]) -> dict | None:
    """Return the arguments with which `Baseline.measure` does `steps` in one row; None if it takes a chain.

    One row is that of a single technique, of a recovery (of the dense model), or of both.
    """
    kinds = ["recovery" if "recovery" in step else "technique" for step in steps]
    if kinds not in (["technique"], ["recovery"], ["technique", "recovery"]) or "seed" in steps[0]:
        return None
    arguments = {name: setting for step in steps for name, setting in step.items() if name != "version"}
    for name, budget in (("calibration", Calibration), ("training", Recovery), ("recovery", Recovery)):
        if name in arguments:
            arguments[name] = budget(**arguments[name])
    return arguments


def check_budget(budget: Calibration | Recovery) -> None:
    """Raise `BadSetting` for a count that is not whole or too small, or a learning rate not above 0."""
    for name, least in _LEAST.items():
        amount = getattr(budget, name, least)
        if isinstance(amount, bool) or not isinstance(amount, Integral) or amount < least:
            raise BadSetting(f"{name}={amount!r}: give a whole number of at least {least}.")
    for rate in budget.rates() if isinstance(budget, Recovery) else ():
        if isinstance(rate, str):
            raise BadSetting(f"learning_rate={rate!r} is text to YAML; write 1.0e-4, not 1e-4.")
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate < math.inf:
            raise BadSetting(f"learning_rate={rate!r}: give a number above 0, such as 1.0e-4.")
    if (dtype := getattr(budget, "dtype", None)) not in DTYPES:
        raise BadSetting(f"dtype={dtype!r}: choose one of {', '.join(map(str, DTYPES))}.")
    for name in ("teacher", "scored"):
        if not isinstance(getattr(budget, name, False), bool):
            raise BadSetting(f"{name}={getattr(budget, name)!r}: give true or false.")


def _complete(step: object, position: str) -> dict:
    """Return a step with all budgets and its version spelt out; `position` ("step 2") begins each message."""
    if not isinstance(step, Mapping) or ("technique" in step) == ("recovery" in step):
        raise BadSetting(
            f'{position} is {step!r}: it takes either "technique" with its settings or "recovery".'
        )
    if "recovery" in step:
        if extra := ", ".join(str(name) for name in step if name != "recovery"):
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
    given = {
        name: complete[name] for name in complete if name not in {"technique", "version", *_BUDGETS, *seed}
    }
    try:
        technique.check(given, also=seed)
        canonical(complete)
    except (BadSetting, BadData) as error:
        raise BadSetting(f"{position}: {error}") from error
    return complete


def _budget(kind: type, asked: object, position: str) -> dict:
    """Return the settings of the `Calibration` or `Recovery` that the recipe asks for."""
    try:
        budget = kind(**(asked or {}))
    except TypeError as error:
        legal = ", ".join(inspect.signature(kind).parameters)
        raise BadSetting(f"{position}: {asked!r} does not say how much; it takes {legal}.") from error
    try:
        check_budget(budget)
    except BadSetting as error:
        raise BadSetting(f"{position}: {error}") from error
    return budget.settings()
