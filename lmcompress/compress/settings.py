"""What each setting means and which values it may have: checked before a model is loaded, alike for every
technique.

A setting of one name means the same wherever a signature has it. The type in the signature says what kind of
value it takes (a `Literal` lists them all); `RANGES` says how far it goes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from numbers import Integral, Real
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from lmcompress.errors import BadSetting
from lmcompress.models.packing import BITS

Amount = int | float | None  # how many, or which fraction; None: as it is
Bits = int | dict[str, int]


def _amount(value: object) -> bool:
    return value >= 1 if _is(value, int) else not isinstance(value, float) or 0 < value <= 1


def _rank(value: object) -> bool:
    return value >= 1 if _is(value, int) else 0 < value < math.inf


def _bits(value: object) -> bool:
    widths = value.values() if isinstance(value, Mapping) else [value]
    return all(width in BITS for width in widths)


def _pattern(value: str) -> bool:
    numbers = value.split(":")
    return len(numbers) == 2 and all(map(str.isdecimal, numbers)) and 0 < int(numbers[0]) < int(numbers[1])


def _number(
    least: float, most: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> Callable:
    def inside(value: float) -> bool:
        above = value > least if open_low else value >= least
        return above and (value < most if open_high else value <= most)

    return inside


_COUNT, _POSITIVE, _NOT_NEGATIVE, _SHARE = _number(1), _number(0, open_low=True), _number(0), _number(0, 1)
_BELOW_ONE = _number(0, 1, open_high=True)
_KEPT = "a whole number from 1, or a fraction above 0 and up to 1.0"

# Setting: whether a value of the right type is legal, and what it is. None is legal where the default is
# None.
RANGES: dict[str, tuple[Callable[[object], bool], str]] = {
    "sparsity": (_BELOW_ONE, "the fraction of weights set to zero, in [0, 1): write 0.5 for 50 %"),
    "pattern": (_pattern, '"N:M" with 0 < N < M: "2:4" keeps 2 of every 4 neighbouring inputs of a row'),
    "allocation": (
        lambda value: all(map(_BELOW_ONE, value.values())),
        "a sparsity in [0, 1) per group of layers, with the mean `sparsity` (sensitivity.allocate)",
    ),
    "bits": (_bits, f"{', '.join(map(str, BITS))} bits per weight, for rtn also per group of layers"),
    "group_size": (_COUNT, "a whole number of neighbouring inputs that share a scale; None: a row"),
    "damping": (_POSITIVE, "above 0, added to the Hessian's diagonal as a fraction of its mean: 0.01 is 1 %"),
    "rank": (_rank, "a whole rank from 1, or a fraction of the break-even rank, above 0, such as 0.5"),
    "blocks": (_amount, f"{_KEPT}; for some techniques a list of positions"),
    **dict.fromkeys(("heads", "ffn", "hidden", "layers"), (_amount, f"how many are kept: {_KEPT}")),
    "width": (_number(0, 1, open_low=True), "the fraction of hidden size, feed-forward and heads, up to 1.0"),
    **dict.fromkeys(("share", "min_rate"), (_SHARE, "a share from 0 to 1")),
    **dict.fromkeys(("dropout", "memory"), (_BELOW_ONE, "a share from 0 to below 1")),
    **dict.fromkeys(("temperature", "start", "rate"), (_POSITIVE, "above 0")),
    **dict.fromkeys(
        ("soft_weight", "hard_weight", "match_weight", "weight", "threshold", "joint_steps"),
        (_NOT_NEGATIVE, "0 or more"),
    ),
    **dict.fromkeys(
        ("min_count", "n_iters", "every", "steps", "experts", "active"), (_COUNT, "a whole number from 1")
    ),
}
# Of these a technique that has both takes exactly one.
ALTERNATIVES = (("sparsity", "pattern"), ("blocks", "which"))
_TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a table",
    Mapping: "a table",
    Sequence: "a list",
    list: "a list",
    type(None): "None",
}


def check_setting(technique: str, name: str, value: object, annotation: object = float) -> None:
    """Refuse a value of the wrong type, and one out of range.

    Raises:
        BadSetting: the message says which values are legal.
    """
    legal, text = RANGES.get(name, (lambda value: True, ""))
    if not _is(value, annotation):
        text = f"{_text(annotation)}{f', {text}' if text else ''}"
    elif value is None or isinstance(value, Sequence) and not isinstance(value, str) or legal(value):
        return
    raise BadSetting(f"{technique} takes no {name}={value!r}: it is {text}.")


def check_alternatives(technique: str, names: Sequence[str], settings: Mapping[str, object]) -> None:
    """Refuse both, or none, of two `ALTERNATIVES` that are both among a technique's setting `names`."""
    for pair in ALTERNATIVES:
        if set(pair) <= set(names) and sum(settings.get(name) is not None for name in pair) != 1:
            both = " and ".join(f"{name}={settings.get(name)!r}" for name in pair)
            legal = "; ".join(f"{name}: {RANGES[name][1]}" for name in pair if name in RANGES)
            raise BadSetting(f"{technique} got {both}: give one of them. {legal}.")


def check_values(
    technique: str,
    parameters: Mapping[str, Parameter],
    hints: Mapping[str, object],
    settings: Mapping[str, object],
) -> None:
    """Refuse settings out of range; `parameters` and `hints` are those of the technique's function."""
    for name, value in settings.items():
        if name in parameters:
            check_setting(technique, name, value, hints.get(name, object))
    check_alternatives(technique, list(parameters), settings)


def _is(value: object, annotation: object) -> bool:
    """Tell whether `value` has a signature's type; a bool is no number, nor are NaN and infinity."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_is(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value is choice or type(value) is type(choice) and value == choice for choice in arguments)
    if annotation in (int, float):
        numeric = isinstance(value, Integral if annotation is int else Real) and not isinstance(value, bool)
        return numeric and math.isfinite(value)
    if annotation is None or annotation is type(None):
        return value is None
    if origin and isinstance(value, origin) and not isinstance(value, str):
        if isinstance(value, Mapping):
            return all(_is(k, arguments[0]) and _is(v, arguments[1]) for k, v in value.items())
        return all(_is(element, arguments[0]) for element in value)
    return isinstance(value, annotation) if isinstance(annotation, type) and not origin else not origin


def _text(annotation: object) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_text, arguments))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    return _TYPES.get(get_origin(annotation) or annotation, str(annotation))
