import pytest
import torch

from lmcompress import compress, device
from lmcompress.measure.calls import Shape, default_shapes
from lmcompress.measure.compute import compute, flops, weight_bytes_read
from tests.tiny_models import FAMILIES, kind, tiny

CEILING = {"gflops_per_s": 100.0, "bandwidth_gb_per_s": 10.0}
SDPA = [family for family in FAMILIES if family not in ("gpt_neo", "gemma2")]  # those two have eager only


def test_an_encoder_counted_by_hand():
    """d 32, two blocks, FFN 48, vocabulary 100, 7 tokens in each of 3 sentences; attention included."""
    tokens, d, width, vocabulary, length = 3 * 7, 32, 48, 100, 7
    block = 2 * tokens * (4 * d * d + 2 * d * width) + 2 * tokens * 2 * length * d
    head = 2 * tokens * (d * d + d * vocabulary)
    assert flops(tiny("bert"), kind="encoder", shape=Shape("forward", 3, 7)) == 2 * block + head


def test_a_decoded_token_counted_by_hand():
    """Grouped keys and values, gated FFN; step t attends to 7 + t tokens; 3 steps from 7 cached tokens."""
    d, kv, width, vocabulary, batch = 32, 16, 48, 100, 2
    weights = 2 * (2 * d * d + 2 * d * kv + 3 * d * width) + d * vocabulary
    attended = sum(7 + step for step in (1, 2, 3)) / 3
    by_hand = 2 * batch * (weights + 2 * 2 * d * attended)
    assert flops(tiny("llama"), kind="decoder", shape=Shape("decode", batch, 7, 3)) == by_hand


@pytest.mark.parametrize("family", SDPA)
def test_fused_attention_counts_as_much_as_eager(family):
    """torch's counter has no formula for the CPU's fused kernel, so by itself it would count none of it."""
    for shape in default_shapes(kind(family), length=9, batches=(2,)):
        counts = []
        for implementation in ("sdpa", "eager"):
            model = tiny(family)
            model.set_attn_implementation(implementation)
            counts.append(flops(model, kind=kind(family), shape=shape))
        assert counts[0] == counts[1] > 0


def test_zeros_do_not_lower_the_count_but_fewer_rows_do():
    model, shape = tiny("bert"), Shape("forward", 1, 7)
    dense = flops(model, kind="encoder", shape=shape)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.zero_()
    assert flops(model, kind="encoder", shape=shape) == dense
    assert flops(tiny("bert", intermediate_size=24), kind="encoder", shape=shape) < dense


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_integer_products_count_like_those_of_floats(family, monkeypatch):
    """They were taken for nothing once, which drew a quantized model far left of its dense one."""
    dense = tiny(family)
    rounded, _ = compress.get("int8-dynamic")(dense)
    for shape in default_shapes(kind(family)):
        small = Shape(shape.part, shape.batch, 7, 2)
        assert flops(rounded, kind=kind(family), shape=small) == flops(dense, kind=kind(family), shape=small)
    monkeypatch.setattr(
        device, "ceiling", lambda *_, at_least: pytest.fail("raised") if at_least else CEILING
    )
    found = compute(rounded, kind=kind(family), shape=small, seconds=1e-9)
    assert found["matmul_share"] is None and found["flops"] > 0


def test_weights_read_leave_out_tables_that_are_only_looked_up():
    d, width, vocabulary = 32, 48, 100
    block = 4 * (d * d + d) + (d * width + width) + (width * d + d) + 4 * d
    bert = tiny("bert", None)
    pooler, norm = d * d + d, 2 * d
    position_ids = sum(buffer.nbytes for buffer in bert.buffers())
    assert weight_bytes_read(bert, Shape("forward", 1)) == 4 * (2 * block + pooler + norm) + position_ids
    llama = tiny("llama", tie_word_embeddings=True)
    untied = tiny("llama", tie_word_embeddings=False)
    shape = Shape("decode", 1)
    assert weight_bytes_read(llama, shape) == weight_bytes_read(untied, shape)
    assert weight_bytes_read(llama.bfloat16(), shape) == weight_bytes_read(untied, shape) / 2
    t5 = tiny("t5")
    whole = sum(p.nbytes for p in t5.parameters())
    tables = sum(
        m.weight.nbytes for m in t5.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == 8
    )
    parts = weight_bytes_read(t5, Shape("encode", 1)) + weight_bytes_read(t5, Shape("decode", 1))
    assert parts == whole - tables
    assert weight_bytes_read(t5, Shape("decode", 1)) > 4 * vocabulary * d


def test_shares_are_of_the_machines_ceiling(monkeypatch):
    monkeypatch.setattr(device, "ceiling", lambda *_, **__: {"gflops_per_s": 10.0, "bandwidth_gb_per_s": 2.0})
    model, shape = tiny("bert"), Shape("forward", 8, 16)
    found = compute(model, kind="encoder", shape=shape, seconds=0.01)
    assert found["shape"] == "batch8"
    assert found["gflops_per_s"] == pytest.approx(found["flops"] / 0.01 / 1e9)
    assert found["matmul_share"] == pytest.approx(found["gflops_per_s"] / 10)
    assert found["bandwidth_share"] == pytest.approx(weight_bytes_read(model, shape) / 0.01 / 2e9)
    unknown = compute(model, kind="encoder", shape=shape, seconds=None)
    assert (
        unknown["flops"] == found["flops"]
        and unknown["matmul_share"] is None
        and unknown["bandwidth_share"] is None
    )
