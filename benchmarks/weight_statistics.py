"""Speed and memory of `statistics.moments` on a large sharded checkpoint, against reading and summing it.

Run `python benchmarks/weight_statistics.py`. It writes a checkpoint of random weights into a temporary
folder, times both in fresh processes in turn (files cached by the system for both), repeats with a quarter of
the size to show that memory does not grow, and removes everything.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_RSS_MB = 400
LIMIT_GB_PER_S = 1.0  # with two idle cores; faster than a disk is enough
WIDTH, SHARD_BYTES = 2048, 500 << 20


def write_checkpoint(folder: Path, size_bytes: int, dtype: str = "float32") -> None:
    """Write blocks of LLaMA-like weights in shards with an index, until `size_bytes` are reached."""
    import torch
    from safetensors.torch import save_file

    shapes = {f"self_attn.{role}_proj": (WIDTH, WIDTH) for role in "qkvo"}
    shapes |= {"mlp.gate_proj": (4 * WIDTH, WIDTH), "mlp.down_proj": (WIDTH, 4 * WIDTH)}
    generator = torch.Generator().manual_seed(0)
    shard, weight_map, written, block = {}, {}, 0, 0
    folder.mkdir()
    while written < size_bytes:
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator).mul_(0.05).to(getattr(torch, dtype))
            shard[f"model.layers.{block}.{name}.weight"] = tensor
            written += tensor.nbytes
        block += 1
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES or written >= size_bytes:
            file = f"model-{block:05d}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def child(pass_name: str, folder: Path, chunk_bytes: int | None) -> dict[str, float]:
    """Run one measurement in this process: seconds, and peak resident memory above the bare import's."""
    import psutil
    import torch
    from safetensors.torch import load_file

    from lmcompress.weights import statistics

    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    if pass_name == "moments":
        statistics.moments(folder, **({"chunk_bytes": chunk_bytes} if chunk_bytes else {}))
    else:
        for file in sorted(folder.glob("*.safetensors")):
            for tensor in load_file(file).values():
                tensor.sum().item()
    seconds = time.perf_counter() - start
    # The kernel's own high-water mark of this process; getrusage would include the parent's before exec.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {"seconds": seconds, "extra_mb": (peak - before) / 1e6, "threads": torch.get_num_threads()}


def measure(folder: Path, rounds: int, chunk_bytes: int | None) -> dict[str, list[dict[str, float]]]:
    """Time both in turn, each in a fresh process."""
    measurements: dict[str, list] = {"sum": [], "moments": []}
    for _ in range(rounds):
        for pass_name, results in measurements.items():
            command = [sys.executable, __file__, "--child", pass_name, str(folder)]
            command += ["--chunk-bytes", str(chunk_bytes)] if chunk_bytes else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return measurements


def main() -> int:
    """Print the figures; exit status 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the checkpoint; a quarter is run too"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--chunk-bytes", type=int, help="passed to moments")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], Path(args.child[1]), args.chunk_bytes)))
        return 0
    passed = True
    for gigabytes in (args.gigabytes / 4, args.gigabytes):
        with tempfile.TemporaryDirectory() as holder:
            folder = Path(holder) / "checkpoint"
            write_checkpoint(folder, int(gigabytes * 1e9), args.dtype)
            size_gb = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
            measurements = measure(folder, args.rounds, args.chunk_bytes)
        seconds = {
            pass_name: statistics.median(r["seconds"] for r in results)
            for pass_name, results in measurements.items()
        }
        speed = statistics.median(
            a["seconds"] / b["seconds"] for a, b in zip(measurements["sum"], measurements["moments"])
        )
        extra_mb = max(result["extra_mb"] for result in measurements["moments"])
        passed &= size_gb / seconds["moments"] >= LIMIT_GB_PER_S and extra_mb <= LIMIT_RSS_MB
        print(
            f"{size_gb:.2f} GB of {args.dtype}, {measurements['sum'][0]['threads']} threads: "
            f"read and sum {seconds['sum']:.2f} s, "
            f"moments {seconds['moments']:.2f} s "
            f"({size_gb / seconds['moments']:.2f} GB/s, limit {LIMIT_GB_PER_S}), "
            f"speed ratio {speed:.2f}, "
            f"peak memory above import {extra_mb:.0f} MB (limit {LIMIT_RSS_MB})"
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
