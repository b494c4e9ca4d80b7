"""What a zero is worth in time: one linear layer through every kernel this machine has, against dense.

Each result is checked against the dense one; then all are interleaved with a second copy, as in `latency`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcompress.errors import BadSetting, StudyError
from lmcompress.measure.calls import Call
from lmcompress.measure.latency import COPY, DENSE, VARIANT, interleave, summarise
from lmcompress.registry import analysis
from lmcompress.timing_lock import timing_lock

VERSION = analysis(1, "kernels", "layer-speed")
_PERCENTILES = ("p5_ms", "p95_ms")


@dataclass
class Kernel:
    """A way to compute `x Wᵀ + b`: `run()` gives `(rows, out)`, or the first `kept` columns of it.

    `tolerance` is the largest error allowed, relative to the largest dense output.
    """

    run: Callable[[], Tensor]
    kept: int | None = None
    tolerance: float = 1e-4


def linear_kernels(
    weight2d: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Sequence[int] = (128, 1024),
    kernels: Sequence[str] = ("dense_bf16", "csr", "csr_matmul", "semi_structured", "rows_removed"),
    calls: int = 30,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict]:
    """Time `x Wᵀ + b` through each of `kernels` and dense fp32, for each number of input rows.

    Args:
        weight2d: `(out, in)`, its zeros exact.
        bias: `(out,)`; zeros if there is none, since a drop-in replacement adds one.
        rows: input rows (tokens) per call.
        kernels: of `KERNELS`; one that cannot run here is left out.

    Returns:
        Per kernel and row count "kernel", "rows", "error" (the largest deviation over the largest dense
        output) and the numbers of `latency` but the percentiles; dense fp32 comes first with ratio 1.

    Raises:
        BadSetting: an unknown kernel.
        StudyError: a kernel computes something else than the dense map.
    """
    if unknown := [name for name in kernels if name not in KERNELS]:
        raise BadSetting(f"no kernel {', '.join(unknown)}; there are {', '.join(KERNELS)}")
    weight = weight2d.detach().float().contiguous()
    bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias.detach().float()
    draw = torch.Generator().manual_seed(seed)
    timing = {"calls": calls, "seed": seed, "clock": clock}
    timings = []
    with timing_lock(), torch.no_grad():
        for count in rows:
            x = torch.randn(count, weight.shape[1], generator=draw).to(weight.device)
            built = {name: KERNELS[name](x, weight, bias) for name in kernels}
            timings += _timed({n: kernel for n, kernel in built.items() if kernel}, x, weight, bias, **timing)
    return timings


def layer_speed(
    out_features: int,
    in_features: int,
    *,
    ranks: Sequence[int],
    rows: Sequence[int] = (1, 128, 1024),
    calls: int = 30,
    device: str | torch.device = "cpu",
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Time a layer as two narrow ones, `(rank, in)` and `(out, rank)`, against dense fp32, over `ranks`.

    All compute one layer, whose own rank is the smallest of `ranks` (from 1), so that each result is checked.

    Returns:
        {"out", "in", "break_even" (rank at which nothing is saved), "timings": as `linear_kernels` gives
        them, with "rank" (null for dense), "crossover": [{"rows", "rank"}]}: the rank from which the two are
        no faster than dense, by a line between the tried ranks; null if all are faster, 0 if none is.
    """
    ranks = sorted(set(ranks))
    if not ranks or ranks[0] < 1:
        raise BadSetting(f"ranks={ranks}: give at least one, each from 1, such as [32, 64, 128].")
    draw = torch.Generator().manual_seed(seed)
    first = torch.zeros(ranks[-1], in_features)
    first[: ranks[0]] = torch.randn(ranks[0], in_features, generator=draw)
    second = torch.randn(out_features, ranks[-1], generator=draw) / ranks[0] ** 0.5
    bias = torch.randn(out_features, generator=draw).to(device)
    pairs = {rank: (first[:rank].to(device), second[:, :rank].contiguous().to(device)) for rank in ranks}
    timings, crossover = [], []
    with timing_lock(), torch.no_grad():
        for count in rows:
            x = torch.randn(count, in_features, generator=draw).to(device)
            ready = {f"rank {rank}": Kernel(_two_layers(x, *pair, bias)) for rank, pair in pairs.items()}
            weight = pairs[ranks[0]][1] @ pairs[ranks[0]][0]
            timed = _timed(ready, x, weight, bias, calls=calls, seed=seed, clock=clock)
            timings += [{**entry, "rank": rank} for entry, rank in zip(timed, [None, *ranks], strict=True)]
            ratios = [entry["ratio"] for entry in timed[1:]]
            crossover.append({"rows": count, "rank": _crossing(ranks, ratios)})
    even = out_features * in_features / (out_features + in_features)
    sizes = {"out": out_features, "in": in_features, "break_even": even}
    return {**sizes, "timings": timings, "crossover": crossover}


def _crossing(ranks: list[int], ratios: list[float]) -> float | None:
    """Where the line through (rank, ratio) passes 1 for the first time after the last rank below it."""
    below = [i for i, ratio in enumerate(ratios) if ratio < 1]
    if not below:
        return 0.0
    if (i := below[-1]) == len(ranks) - 1:
        return None
    share = (1 - ratios[i]) / (ratios[i + 1] - ratios[i])
    return round(ranks[i] + share * (ranks[i + 1] - ranks[i]), 1)


def _two_layers(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(F.linear(x, first), second, bias)


def _timed(ready: dict[str, Kernel], x: Tensor, weight: Tensor, bias: Tensor, **timing) -> list[dict]:
    """Return the entries of dense fp32 and the `ready` kernels; refuse one that computes something else."""
    expected, weight_copy = F.linear(x, weight, bias), weight.clone()
    errors = {"dense_fp32": 0.0}
    for name, kernel in ready.items():
        computed, reference = kernel.run().float(), expected[:, : kernel.kept]
        if computed.shape != reference.shape:
            raise StudyError(f"kernel {name} gives {tuple(computed.shape)}, dense {tuple(reference.shape)}")
        errors[name] = float((computed - reference).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not errors[name] <= kernel.tolerance:
            raise StudyError(
                f"kernel {name} is off by {errors[name]:.2g} of the largest output (allowed "
                f"{kernel.tolerance:g}): it computes something else here, so its time means nothing. Leave "
                "it out of `kernels`."
            )
    work = {
        DENSE: Call(lambda: F.linear(x, weight, bias)),
        COPY: Call(lambda: F.linear(x, weight_copy, bias)),
    }
    work |= {name: Call(kernel.run) for name, kernel in ready.items()}
    times = interleave(work, device=x.device, patience_s=10.0, **timing)
    entries = []
    for name, error in errors.items():
        of_kernel = {DENSE: times[DENSE], COPY: times[COPY], VARIANT: times.get(name, times[DENSE])}
        figures = {name: number for name, number in summarise(of_kernel).items() if name not in _PERCENTILES}
        entries.append({"kernel": name, "rows": len(x), "error": error, **figures})
    return entries


def _dense_bf16(x: Tensor, weight: Tensor, bias: Tensor) -> Kernel:
    half = [tensor.bfloat16() for tensor in (x, weight, bias)]
    return Kernel(lambda: F.linear(*half), tolerance=2e-2)


def _csr(x: Tensor, weight: Tensor, bias: Tensor, *, layout: Callable = Tensor.to_sparse_csr) -> Kernel:
    # Not F.linear(x, csr), which is several times slower than this product.
    sparse, out = layout(weight), torch.empty(len(x), len(weight), device=x.device)
    return Kernel(lambda: torch.add((sparse @ x.t()).t(), bias, out=out))


def _csr_matmul(x: Tensor, weight: Tensor, bias: Tensor) -> Kernel:
    sparse, columns = weight.to_sparse_csr(), x.t().contiguous()
    if not bias.any():
        return Kernel(lambda: (sparse @ columns).t())
    return Kernel(lambda: torch.add(sparse @ columns, bias[:, None]).t())


def _bsr(x: Tensor, weight: Tensor, bias: Tensor) -> Kernel | None:
    if any(size % 32 for size in weight.shape):
        return None
    return _csr(x, weight, bias, layout=lambda matrix: matrix.to_sparse_bsr((32, 32)))


def _semi_structured(x: Tensor, weight: Tensor, bias: Tensor) -> Kernel | None:
    halves = weight.shape[1] % 4 == 0 and int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2
    if not (weight.is_cuda and halves and weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0):
        return None
    sparse = torch.sparse.to_sparse_semi_structured(weight.half())
    half, offset = x.half(), bias.half()
    return Kernel(lambda: F.linear(half, sparse, offset), tolerance=2e-2)


def _rows_removed(x: Tensor, weight: Tensor, bias: Tensor) -> Kernel:
    kept = max(1, round(int(weight.count_nonzero()) / weight.shape[1]))
    smaller, offset = weight[:kept].clone(), bias[:kept].clone()
    return Kernel(lambda: F.linear(x, smaller, offset), kept=kept)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Kernel | None]] = {
    "dense_bf16": _dense_bf16,
    "csr": _csr,  # a drop-in with transposes and bias
    "csr_matmul": _csr_matmul,  # the sparse product alone, of an input that lies ready transposed
    "bsr": _bsr,  # blocks of 32 x 32, if the sizes are multiples
    "semi_structured": _semi_structured,  # fp16 on a CUDA device where W is 2:4
    "rows_removed": _rows_removed,  # a smaller dense layer with as many weights as W has nonzeros
}
