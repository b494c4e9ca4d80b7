"""Shares of time: they add up, and the operations they name are the ones that were run."""

import pytest
import torch
from tiny_models import tiny

from lmcompress.measure.calls import default_shapes
from lmcompress.measure.shares import ATTENTION, PRODUCTS, time_shares


@pytest.mark.parametrize(
    "family, kind", [("bert", "encoder"), ("gpt2", "decoder"), ("t5", "encoder-decoder")]
)
def test_shares_of_every_part_of_the_work_add_up_to_one(family, kind):
    for shape in default_shapes(kind, length=16, batches=(2,)):
        found = time_shares(tiny(family), kind=kind, shape=shape, calls=1)
        assert set(found) == {"products", "attention", "rest"}
        assert sum(found.values()) == pytest.approx(1) and all(0 <= one <= 1 for one in found.values())
        assert found["products"] > 0 and found["attention"] > 0 and found["rest"] > 0


def test_the_operations_a_model_runs_are_recognised():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        q = torch.randn(1, 2, 8, 4)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.nn.functional.linear(torch.randn(3, 8), torch.randn(5, 8), torch.randn(5))
    keys = {event.key for event in profiled.key_averages()}
    assert keys & PRODUCTS and any(part in key for part in ATTENTION for key in keys)


def test_wide_feed_forwards_move_time_to_the_products():
    shape = default_shapes("encoder", length=64, batches=(8,))[0]
    narrow, wide = (
        time_shares(tiny("bert", intermediate_size=width), kind="encoder", shape=shape, calls=3)
        for width in (8, 4096)
    )
    assert wide["products"] + wide["rest"] > narrow["products"] and wide["attention"] < narrow["attention"]
