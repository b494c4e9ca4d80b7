"""Settings are refused at the door: before a model is compressed, with the legal values, alike for every
technique.
"""

import math
from typing import get_type_hints

import pytest

from lmcompress import compress
from lmcompress.compress.settings import RANGES, _is
from lmcompress.errors import BadSetting
from lmcompress.study import recipes

TECHNIQUES = compress.registered()
WRONG = {
    "sparsity": (-0.1, 1, 1.5, 50, "half", math.nan, True),
    "pattern": ("4:2", "2:2", "0:4", "2-4", "a:b", "2:4:8", 24),
    "allocation": ({"decoder.0.attention": 1.0}, {"decoder.0.attention": "0.5"}, 0.5),
    "bits": (0, 5, 16, 4.0, "4", True, {"decoder.0.attention": 5}),
    "group_size": (0, -32, 32.0, "32", True),
    "damping": (0, -1, math.nan, math.inf, "0.01", True),
    "rank": (0, -4, -0.5, 0.0, math.nan, "0.5", True),
    "blocks": (0, -1, 2.0, 0.0, "1"),
    "steps": (0, -5, 2.5, "10"),
    "temperature": (0, -1, math.nan, math.inf),
    "heads": (0, 1.5, "half"),
    "width": (0, 2.0, "half"),
    "dtype": ("int8", "float32", 16),
    "policy": ("rows", None),
    "symmetric": (1, "yes", None),
    "min_count": (0, 1.5, True),
    "experts": (0, 4.0),
}
CASES = [
    (technique, name, value)
    for technique, entry in TECHNIQUES.items()
    for name, values in WRONG.items()
    if name in entry.settings and technique != "chain"
    for value in values
]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_out_of_range_is_refused_by_every_technique_that_has_the_setting(name):
    cases = [case for case in CASES if case[1] == name]
    assert cases
    for technique, _, value in cases:
        entry = TECHNIQUES[technique]
        if name == "bits" and technique != "rtn" and isinstance(value, dict):
            value = {"decoder.0.attention": 4}  # only "rtn" takes one by group
        required = {n: None for n, p in entry.settings.items() if p.default is p.empty}
        with pytest.raises(BadSetting, match=f"^{technique} takes no {name}="):
            entry.check({name: value} | {n: v for n, v in required.items() if n != name})


def test_every_number_of_a_signature_has_a_range_and_every_default_is_legal():
    for technique, entry in TECHNIQUES.items():
        hints = get_type_hints(entry.function)
        for name, parameter in entry.settings.items():
            numeric = any(_is(number, hints[name]) for number in (1, 0.5))
            assert not numeric or name in RANGES, (technique, name)
            if (default := parameter.default) is not parameter.empty:
                assert _is(default, hints[name]), (technique, name)
                assert default is None or name not in RANGES or RANGES[name][0](default), (technique, name)
    legal = {"sparsity": 0, "pattern": "4:8", "bits": {"a": 3}, "rank": 1.0, "group_size": 1, "heads": 4}
    assert all(RANGES[name][0](value) for name, value in legal.items())


@pytest.mark.parametrize("technique", ["random", "magnitude-layer", "wanda", "sparsegpt", "movement"])
def test_sparsity_and_pattern_exclude_each_other(technique):
    for settings in ({}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": None}):
        with pytest.raises(BadSetting, match="give one of them"):
            TECHNIQUES[technique].check(settings)
    TECHNIQUES[technique].check({"pattern": "2:4"})


def test_names_are_checked_and_listed():
    with pytest.raises(BadSetting, match="no setting pattern.*sparsity"):
        TECHNIQUES["magnitude-global"].check({"pattern": "2:4"})
    with pytest.raises(BadSetting, match="gptq needs bits"):
        TECHNIQUES["gptq"].check({})
    with pytest.raises(BadSetting, match="magnitude-global"):
        compress.get("magnitud")


def test_a_recipe_is_refused_when_it_is_read():
    with pytest.raises(BadSetting, match="step 2, wanda: wanda takes no sparsity=1.5"):
        recipes.read([{"technique": "rtn", "bits": 4}, {"technique": "wanda", "sparsity": 1.5}])
