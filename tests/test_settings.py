"""Settings are refused at the door, with the legal values, alike for every technique."""

import json
import math
from typing import get_type_hints

import pytest
import torch
from tiny_models import calibration_batches, tiny
from torch import nn

from lmcompress import compress
from lmcompress.compress import Context, get
from lmcompress.compress.second_order import relative_errors
from lmcompress.compress.settings import RANGES, _is
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import anatomy
from lmcompress.study import recipes
from lmcompress.train.trainer import TrainSpec
from lmcompress.weights import spectra

TECHNIQUES = compress.registered()
WRONG = {
    "sparsity": (-0.1, 1, 1.5, 50, "half", math.nan, True),
    "pattern": ("4:2", "2:2", "0:4", "2-4", "a:b", "2:4:8", 24),
    "allocation": ({"decoder.0.attention": 1.0}, {"decoder.0.attention": "0.5"}, 0.5),
    "bits": (0, 5, 16, 4.0, "4", True, {"decoder.0.attention": 5}),
    "group_size": (0, -32, 32.0, "32", True),
    "damping": (0, -1, math.nan, math.inf, "0.01", True),
    "rank": (0, -4, -0.5, 0.0, 1.0, 2.0, math.nan, "0.5", True),
    "blocks": (0, -1, 2.0, 1.0, 0.0, "1"),
    "steps": (0, -5, 2.5, "10"),
    "temperature": (0, -1, math.nan, math.inf),
    "heads": (0, 1.0, 1.5, "half"),
    "width": (0, 2.0, "half"),
    "dtype": ("int8", "float32", 16),
    "policy": ("rows", None),
    "symmetric": (1, "yes", None),
    "min_count": (0, 1.5, True),
    "experts": (0, 4.0),
}
OF_TECHNIQUES = [
    (technique, n) for technique, entry in TECHNIQUES.items() for n in WRONG if n in entry.settings
]
CASES = [
    (technique, n, value) for technique, n in OF_TECHNIQUES if technique != "chain" for value in WRONG[n]
]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_out_of_range_is_refused_by_every_technique_that_has_the_setting(name):
    cases = [case for case in CASES if case[1] == name]
    assert cases
    for technique, _, value in cases:
        entry = TECHNIQUES[technique]
        if name == "bits" and technique not in ("rtn", "gptq", "awq") and isinstance(value, dict):
            value = {"decoder.0.attention": 4}  # the others take none by group
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
    legal = {"sparsity": 0, "pattern": "4:8", "bits": {"a": 3}, "rank": 1.5, "group_size": 1, "heads": 4}
    assert all(RANGES[name][0](value) for name, value in legal.items())


@pytest.mark.parametrize("technique", ["random", "magnitude-layer", "wanda", "sparsegpt", "movement"])
def test_sparsity_and_pattern_exclude_each_other(technique):
    for settings in ({}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": None}):
        pytest.raises(BadSetting, TECHNIQUES[technique].check, settings).match("give one of them")
    TECHNIQUES[technique].check({"pattern": "2:4"})


def test_names_are_checked_and_listed():
    with pytest.raises(BadSetting, match="no setting pattern.*sparsity"):
        TECHNIQUES["magnitude-global"].check({"pattern": "2:4"})
    pytest.raises(BadSetting, TECHNIQUES["gptq"].check, {}).match("gptq needs bits")
    steps = [{"technique": "rtn", "bits": 4}, {"technique": "wanda", "sparsity": 1.5}]
    pytest.raises(BadSetting, recipes.read, steps).match("step 2, wanda: wanda takes no sparsity=1.5")
    pytest.raises(BadSetting, compress.get, "magnitud").match("magnitude-global")


SETTINGS = {
    "magnitude-layer": {"sparsity": 0.5},
    "magnitude-global": {"sparsity": 0.5},
    "wanda": {"sparsity": 0.5},
    "sparsegpt": {"sparsity": 0.5},
    "rtn": {"bits": 4, "group_size": 16},
    "gptq": {"bits": 4},
    "awq": {"bits": 4},
    "smoothquant": {},
    "int8-dynamic": {},
    "nf4": {},
    "low-rank": {"rank": 0.5},
    "low-rank-aware": {"rank": 0.5},
    "hadamard": {"rank": 0.5, "steps": 2},
    "global-basis": {"rank": 0.5, "joint_steps": 1},
    "mass": {},
    "abaco": {"rank": 0.5},
    "glam": {"rank": 0.5, "every": 1, "threshold": 10.0},
    "moefy": {"experts": 4, "active": 2},
    "heads-ffn": {"heads": 2, "ffn": 0.5},
    "magnitude-shape": {"heads": 2, "ffn": 0.5},
}


def expanded(*, everything: bool = False) -> nn.Module:
    """A LLaMA whose second block writes nothing, or whose blocks hold nothing at all."""
    model = tiny("llama")
    for block in anatomy(model).blocks if everything else anatomy(model).blocks[1:]:
        for layer in block.linears:
            if everything or layer.role in ("o", "out"):
                nn.init.zeros_(layer.module.weight)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("everything", [False, True], ids=["expanded", "all zero"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_figure_is_a_number(name, everything):
    batches = calibration_batches()
    features = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [5, 6, 7, 8]}] * 4
    train = TrainSpec(features=features, steps=2, batch_size=2, learning_rate=1e-3)
    model, result = get(name).function(
        expanded(everything=everything), Context(calibration=batches, train=train), **SETTINGS[name]
    )
    json.dumps(result.achieved, allow_nan=False)
    with torch.no_grad():
        assert all(model(**batch).logits.isfinite().all() for batch in batches)


def test_relative_errors_of_nothing():
    assert relative_errors(torch.tensor([1.0, 0.0, 4.0])) == [0.5, 0.0]
    assert relative_errors(torch.tensor([1.0, 0.0, 0.0])) == [None, 0.0]


def test_blocks_of_zeros_resemble_nothing(tmp_path):
    expanded().save_pretrained(tmp_path)
    tables = spectra.redundancy(tmp_path)["similarity"]
    json.dumps(tables, allow_nan=False)
    assert [table["cosine"][1] for table in tables if table["role"] in ("o", "out")] == [[0, 0]] * 2
