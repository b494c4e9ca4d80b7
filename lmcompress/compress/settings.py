"""What each setting means and which values it may have, alike for all techniques: checked before any work.

The type in a signature says what kind of value it takes (a `Literal` lists all), `RANGES` how far it goes.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from lmcompress.errors import BadSetting
from lmcompress.models.packed import BITS

Amount = int | float | None  # how many, or which fraction; None: as it is
Bits = int | dict[str, int]


def _amount(value: object) -> bool:
    return value >= 1 if _is(value, int) else not isinstance(value, float) or 0 < value < 1


def _within(least: float, most: float = math.inf, ends: str = "[]") -> Callable[[float], bool]:
    """Return a test for an interval; `ends` are its brackets, as in [0, 1)."""

    def inside(value: float) -> bool:
        above = value >= least if ends[0] == "[" else value > least
        return above and (value <= most if ends[1] == "]" else value < most)

    return inside


_BELOW_ONE = _within(0, 1, "[)")
# A row's key has 1.0 and 1 as the same, so the one may not mean all where the other means one.
_KEPT = "a whole number from 1, or a fraction above 0 and below 1 (leave it out to keep all; 1 keeps one)"
_GROUPS = {  # what several settings have in common
    ("heads", "ffn", "hidden", "layers", "kept_experts"): (_amount, f"how many are kept: {_KEPT}"),
    ("share", "min_rate"): (_within(0, 1), "a share from 0 to 1"),
    ("dropout", "memory"): (_BELOW_ONE, "a share from 0 to below 1"),
    ("temperature", "start", "rate"): (_within(0, ends="(]"), "above 0"),
    ("soft_weight", "hard_weight", "match_weight", "weight", "threshold", "joint_steps"): (
        _within(0),
        "0 or more",
    ),
    ("min_count", "n_iters", "every", "steps", "experts", "active", "multiple_of"): (
        _within(1),
        "a whole number from 1",
    ),
}
# Setting: whether a value of the right type is legal, and what it is. None is legal where it is the default.
RANGES: dict[str, tuple[Callable[[object], bool], str]] = {
    "sparsity": (_BELOW_ONE, "the fraction of weights set to zero, in [0, 1): write 0.5 for 50 %"),
    "pattern": (
        lambda text: (m := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(m[1]) < int(m[2]),
        '"N:M" with 0 < N < M: "2:4" keeps 2 of every 4 neighbouring inputs of a row',
    ),
    "allocation": (
        lambda value: all(map(_BELOW_ONE, value.values())),
        "a sparsity in [0, 1) per group of layers, with the mean `sparsity` (sensitivity.allocate)",
    ),
    "bits": (
        lambda value: {*(value.values() if isinstance(value, Mapping) else [value])} <= {*BITS},
        f"{', '.join(map(str, BITS))} bits per weight, for rtn, gptq and awq also per group of layers",
    ),
    "group_size": (_within(1), "a whole number of neighbouring inputs that share a scale; None: a row"),
    "damping": (
        _within(0, ends="(]"),
        "above 0, added to the Hessian's diagonal as a fraction of its mean: 0.01 is 1 %",
    ),
    "rank": (
        lambda value: value >= 1 if _is(value, int) else value > 0 and not value.is_integer(),
        "a whole rank from 1, or a fraction of the break-even rank, above 0 and not whole: 0.5 or 0.99",
    ),
    "blocks": (_amount, f"{_KEPT}; for some techniques a list of positions"),
    "width": (_within(0, 1, "(]"), "the fraction of hidden size, feed-forward and heads, up to 1.0"),
} | {name: entry for names, entry in _GROUPS.items() for name in names}
ALTERNATIVES = (("sparsity", "pattern"), ("blocks", "which"))  # a technique that has both takes exactly one
_TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text", type(None): "None"}
_TYPES |= dict.fromkeys((dict, Mapping), "a table") | dict.fromkeys((list, Sequence), "a list")


def check_setting(technique: str, name: str, value: object, annotation: object = float) -> None:
    """Raise `BadSetting`, which says what is legal, for a value of the wrong type or out of range."""
    legal, text = RANGES.get(name, (lambda value: True, ""))
    if not _is(value, annotation):
        text = f"{_text(annotation)}{f', {text}' if text else ''}"
    elif value is None or isinstance(value, Sequence) and not isinstance(value, str) or legal(value):
        return
    raise BadSetting(f"{technique} takes no {name}={value!r}: it is {text}.")


def check_values(technique: str, hints: Mapping[str, object], settings: Mapping[str, object]) -> None:
    """Check `settings`, and that one of `ALTERNATIVES` is given; `hints` are the types of all there are."""
    for name, value in settings.items():
        if name in hints:
            check_setting(technique, name, value, hints[name])
    for pair in ALTERNATIVES:
        if set(pair) <= set(hints) and sum(settings.get(name) is not None for name in pair) != 1:
            both = " and ".join(f"{name}={settings.get(name)!r}" for name in pair)
            legal = "; ".join(f"{name}: {RANGES[name][1]}" for name in pair if name in RANGES)
            raise BadSetting(f"{technique} got {both}: give one of them. {legal}.")


def _is(value: object, annotation: object) -> bool:
    """Tell whether `value` has a signature's type; a bool is no number, nor are NaN and infinity."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_is(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if annotation in (int, float):
        numeric = isinstance(value, Integral if annotation is int else Real) and not isinstance(value, bool)
        return numeric and math.isfinite(value)
    if origin is None:
        return not isinstance(annotation, type) or isinstance(value, annotation)
    if isinstance(value, str) or not isinstance(value, origin):
        return False
    if isinstance(value, Mapping):
        return all(_is(k, arguments[0]) and _is(v, arguments[1]) for k, v in value.items())
    return all(_is(element, arguments[0]) for element in value)


def _text(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(map(_text, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    return _TYPES.get(origin or annotation, str(annotation))
