"""How long Wanda and SparseGPT take, by width and by calibration length, and how much of it is matrix work.

`python benchmarks/pruning_speed.py [--widths 256 512 1024] [--tokens 2048 8192]` prunes the two blocks of
random decoders. Matrix work is what no implementation can leave out: the products of the forward passes
(without norms and activation functions), XᵀX, the Cholesky factors, and the rank-one and block updates; its
share is that of these operations' own time (torch.profiler) in the whole. Random weights and tokens: the time
depends on shapes only.
"""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.models.anatomy import prunable

LENGTH = 128
MATRIX_WORK = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "addr",
    "linear",
    "matmul",
    "cholesky",
    "triangular",
    "scaled_dot_product",
    "mkl",
)


def main() -> None:
    """Print a line per width, calibration length and rule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    options = parser.parse_args()
    print(
        "criterion   width  tokens  seconds  ms per layer  ns per weight  matrix work  against its first line"
    )
    first: dict[str, float] = {}
    for tokens in options.tokens:
        for width in options.widths:
            model, batches = decoder(width), calibration(tokens)
            layers = prunable(model)
            weights = sum(layer.weight2d().numel() for layer in layers)
            for rule in ("wanda", "sparsegpt"):
                seconds, share = timed(rule, model, batches)
                first.setdefault(rule, seconds)
                print(
                    f"{rule:<10} {width:>6} {tokens:>7} {seconds:>8.2f} {1e3 * seconds / len(layers):>11.1f} "
                    f"{1e9 * seconds / weights:>14.0f} {share:>12.0%} {seconds / first[rule]:>10.1f}x"
                )


def decoder(width: int) -> GPT2LMHeadModel:
    """Two blocks of GPT-2's proportions."""
    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_head": width // 64, "n_layer": 2, "vocab_size": 1000, "n_positions": LENGTH}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def calibration(tokens: int) -> list[dict[str, torch.Tensor]]:
    """Random token ids in batches of 8 rows."""
    draw = torch.Generator().manual_seed(0)
    count = max(1, tokens // (8 * LENGTH))
    return [{"input_ids": torch.randint(1000, (8, LENGTH), generator=draw)} for _ in range(count)]


def timed(rule: str, model: torch.nn.Module, batches: list) -> tuple[float, float]:
    """Return seconds at 50 % (best of two, unprofiled), and the share of matrix work in a profiled run."""
    technique, seconds = compress.get(rule), []
    for _ in range(2):
        start = time.perf_counter()
        technique(model, Context(calibration=batches), sparsity=0.5)
        seconds.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        technique(model, Context(calibration=batches), sparsity=0.5)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    matrix_us = sum(e.self_cpu_time_total for e in events if any(name in e.key for name in MATRIX_WORK))
    return min(seconds), matrix_us / total


if __name__ == "__main__":
    main()
