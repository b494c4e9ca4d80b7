import pytest
import torch
from torch.nn import functional as F

from lmcompress.errors import BadSetting, StudyError
from lmcompress.measure import kernels
from lmcompress.measure.kernels import KERNELS, Kernel, linear_kernels


def sparse_weight(sparsity: float, shape=(64, 32), seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw)
    return weight * (torch.rand(shape, generator=draw) >= sparsity)


HERE = [name for name in KERNELS if name != "semi_structured"]  # that one needs a CUDA device


def test_the_semi_structured_kernel_is_left_out_without_a_cuda_device():
    weight = torch.tensor([1.0, 0, 2, 0]).repeat(32, 16)
    found = linear_kernels(weight, rows=(3,), calls=2, kernels=("semi_structured", "csr"))
    expected = ["dense_fp32", "csr"] if not weight.is_cuda else ["dense_fp32", "semi_structured", "csr"]
    assert [entry["kernel"] for entry in found] == expected


@pytest.mark.parametrize("bias", [None, torch.arange(64.0)])
@pytest.mark.parametrize("name", HERE)
def test_every_kernel_computes_the_dense_map(name, bias):
    weight, x = sparse_weight(0.7), torch.randn(5, 32)
    offset = torch.zeros(64) if bias is None else bias
    kernel = KERNELS[name](x, weight, offset)
    expected = F.linear(x, weight, bias)
    tolerance = 0.05 if name == "dense_bf16" else 1e-4
    for _ in range(2):  # a reused output buffer must not add up
        result = kernel.run().float()
        torch.testing.assert_close(
            result, expected[:, : kernel.kept], atol=tolerance * expected.abs().max().item(), rtol=0
        )


def test_rows_removed_has_as_many_weights_as_there_are_nonzeros():
    weight = torch.zeros(64, 32)
    weight.view(-1)[:512] = 1.0
    assert KERNELS["rows_removed"](torch.randn(3, 32), weight, torch.zeros(64)).kept == 16
    assert KERNELS["rows_removed"](torch.randn(3, 32), torch.zeros(64, 32), torch.zeros(64)).kept == 1


def test_entries_are_complete_with_dense_first():
    found = linear_kernels(sparse_weight(0.9).t(), rows=(3, 7), calls=3, kernels=tuple(KERNELS))
    names = ["dense_fp32", *HERE]
    assert [(e["kernel"], e["rows"]) for e in found] == [(name, rows) for rows in (3, 7) for name in names]
    for entry in found:
        assert entry["ratio_low"] <= entry["ratio"] <= entry["ratio_high"]
        assert entry["median_ms"] > 0 and entry["noise_floor"] >= 0 and entry["error"] < 0.02
    assert found[0]["ratio"] == 1


def test_sizes_that_are_no_multiple_of_a_block_have_no_bsr():
    found = linear_kernels(sparse_weight(0.9, (40, 32)), rows=(3,), calls=2, kernels=("bsr", "csr"))
    assert [entry["kernel"] for entry in found] == ["dense_fp32", "csr"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w, b: Kernel(lambda: F.linear(x, w * 1.01, b)),
        lambda x, w, b: Kernel(lambda: F.linear(x, w, b).t()),
        lambda x, w, b: Kernel(lambda: F.linear(x, w, b) * float("nan")),
    ],
)
def test_a_wrong_kernel_is_refused_and_not_timed(wrong, monkeypatch):
    monkeypatch.setitem(KERNELS, "wrong", wrong)
    monkeypatch.setattr(kernels, "interleave", lambda *_, **__: pytest.fail("timed a wrong kernel"))
    with pytest.raises(StudyError, match="kernel wrong"):
        linear_kernels(sparse_weight(0.5), rows=(4,), kernels=("csr", "wrong"))


def test_an_unknown_kernel_is_refused_with_those_there_are():
    with pytest.raises(BadSetting, match="rows_removed"):
        linear_kernels(sparse_weight(0.5), kernels=("cusparse",))
