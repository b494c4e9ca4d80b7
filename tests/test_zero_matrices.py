"""Matrices that are zero, as expansion by blocks leaves them: figures stay numbers, in every technique."""

import json

import pytest
import torch
from tiny_models import calibration_batches, tiny
from torch import nn

from lmcompress.compress import Context, get
from lmcompress.compress.second_order import relative_errors
from lmcompress.models.anatomy import anatomy
from lmcompress.train.trainer import TrainSpec
from lmcompress.weights import spectra

SETTINGS = {
    "magnitude-global": {"sparsity": 0.5},
    "wanda": {"sparsity": 0.5},
    "sparsegpt": {"sparsity": 0.5},
    "rtn": {"bits": 4, "group_size": 16},
    "gptq": {"bits": 4},
    "awq": {"bits": 4},
    "smoothquant": {},
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
