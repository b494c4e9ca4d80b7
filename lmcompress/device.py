"""What the study runs on: device and dtype with a reason, this machine, its peak rates, versions."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from lmcompress import paths
from lmcompress.errors import BadSetting
from lmcompress.timing_lock import timing_lock

PACKAGE = "language-model-compression-study"
DTYPES = ("float32", "bfloat16", "float16")
_REPORTED = (
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "evaluate", "accelerate", "peft"),
    *("numpy", "scipy", "pandas", "scikit-learn", "matplotlib", "sacrebleu", "textpruner", "textbrewer"),
    *("torchao", "optimum-quanto", "bitsandbytes", "hqq", "onnxruntime", "openvino", "nncf"),
)


@dataclass(frozen=True)
class Device:
    """Where to run and in which number format, and why these."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose(device: str = "auto", dtype: str = "auto") -> Device:
    """Return the device and dtype to run on; "auto" takes the first CUDA device, else the CPU.

    The automatic dtype is float32, but bfloat16 on a CUDA device that computes in it. Raises `BadSetting` for
    a device or dtype that is not here, and lists what there is.
    """
    available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    available += ["mps"] if torch.backends.mps.is_available() else []
    automatic = "cuda:0" if "cuda:0" in available else "cpu"
    target = {"auto": automatic, "cuda": "cuda:0"}.get(device, device)
    sees = f"torch {torch.__version__} sees"
    if target not in available:
        raise BadSetting(f"device={device!r} is not here: {sees} {', '.join(available)}")
    if dtype not in ("auto", *DTYPES):
        raise BadSetting(f"dtype={dtype!r} is none of: auto, {', '.join(DTYPES)}")
    on_cuda = target.startswith("cuda")
    native = on_cuda and torch.cuda.get_device_capability(target) >= (8, 0)
    number = ("bfloat16" if native else "float32") if dtype == "auto" else dtype
    why = why_dtype = "was asked for"
    if device == "auto":
        why = "is the first CUDA device" if on_cuda else f"because {sees} no CUDA device"
    if dtype == "auto":
        why_dtype = f"is what {target} computes in without surprises"
    reason = f"{target} ({name(torch.device(target))}) {why}; {number} {why_dtype}"
    return Device(torch.device(target), getattr(torch, number), reason)


def name(device: torch.device) -> str:
    """Return what the maker calls the GPU, or the processor, that `device` is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(machine()["cpu"])


@cache
def machine() -> dict[str, object]:
    """Return what this machine is: processor, its instructions, cores of this process, memory, OS, GPU."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": gpu and gpu.name,
        "gpu_memory_bytes": gpu and gpu.total_memory,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    """Return the marketing name where the system tells one (ARM Linux does not), else the architecture."""
    if platform.system() == "Darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return name or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of the packages that can change a number; those not installed are left out."""
    versions = {}
    for package in _REPORTED:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def code_version() -> str:
    """Return this checkout's commit, with "-dirty" if tracked files differ, else the package's version.

    That of a package that pip installed from a repository ends with "+" and the commit.
    """
    describe = ("git", "-C", str(paths.CODE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    # Not the repository of somebody's environment around an installed copy.
    if (paths.CODE / ".git").exists() and (commit := _output(*describe)):
        return commit
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    source = json.loads(package.read_text("direct_url.json") or "{}").get("vcs_info", {})  # PEP 610
    return "+".join(filter(None, (package.version, source.get("commit_id", "")[:12])))


def _output(*command: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return run.stdout.strip() or None if run.returncode == 0 else None
    return None


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on `device` is done; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def ceiling(device: torch.device | str, dtype: torch.dtype, *, at_least: float = 0.0) -> dict[str, object]:
    """Return the peak rates of this machine: `gflops_per_s` of matmul and `bandwidth_gb_per_s`.

    Measured in under two seconds with the threads torch has now, and recorded in `runs/machine.json` for this
    machine, torch and thread count; taken again if a model was seen to reach `at_least` more GFLOP/s, because
    then it was taken on a busy machine. Bandwidth counts bytes read plus bytes written, as STREAM does
    (McCalpin 1995), so what a cache moves besides is not in it.
    """
    device = torch.device(device)
    card = {field: value for field, value in machine().items() if field not in ("memory_bytes", "python")}
    conditions = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    conditions |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    text = json.dumps({**card, **conditions}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = paths.RUNS / "machine.json"
    ceilings = _read_ceilings(path)
    if key not in ceilings or ceilings[key]["gflops_per_s"] < at_least:
        with timing_lock():
            rates = {"gflops_per_s": _matmul_gflops_per_s(device, dtype)}
            rates["bandwidth_gb_per_s"] = _bandwidth_gb_per_s(device)
            ceilings = {**_read_ceilings(path), key: {**conditions, "machine": card, **rates}}
            paths.write_json(path, ceilings)
    return ceilings[key]


@cache
def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 where its matrix products are faster than float32's on `device`, else float32.

    A processor without instructions for it multiplies bfloat16 up to a hundred times slower, unsaid. Takes
    hundredths of a second.
    """
    device, seconds = torch.device(device), {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.ones(shape, device=device, dtype=dtype) for shape in ((128, 256), (256, 256)))
        seconds[dtype] = _best_seconds(lambda a=a, b=b: a @ b, device, at_least_s=0.01)
    return min(seconds, key=seconds.get)


def _read_ceilings(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # absent or spoilt: a cache, so measure again
        return {}


def _matmul_gflops_per_s(device: torch.device, dtype: torch.dtype, *, budget_s: float = 1.0) -> float:
    """Return the best rate over square matmuls, doubling their size while the next still fits the budget."""
    best, began, size = 0.0, time.perf_counter(), 512
    generator = torch.Generator(device).manual_seed(0)  # leaves the caller's random state alone
    while True:
        a = torch.rand((size, size), device=device, dtype=dtype, generator=generator)
        out = torch.empty_like(a)
        seconds = _best_seconds(lambda a=a, out=out: torch.matmul(a, a, out=out), device)
        best = max(best, 2 * size**3 / seconds / 1e9)
        size *= 2
        # Eight times the work, warm-up and three calls of it.
        if size > 16384 or time.perf_counter() - began + 4 * 8 * seconds > budget_s:
            return best


def _bandwidth_gb_per_s(device: torch.device) -> float:
    """Return the better of a copy (two passes) and a triad a = b + s·c (three) over arrays past any cache."""
    size_bytes = (512 if device.type == "cuda" else 128) << 20
    a, b, c = (torch.ones(size_bytes // 4, device=device, dtype=torch.float32) for _ in range(3))
    copy = 2 * size_bytes / _best_seconds(lambda: a.copy_(b), device)
    triad = 3 * size_bytes / _best_seconds(lambda: torch.add(b, c, alpha=0.5, out=a), device)
    return max(copy, triad) / 1e9


def _best_seconds(call: Callable[[], object], device: torch.device, *, at_least_s: float = 0.1) -> float:
    """Return the fastest of three calls or more, after one to warm up, over `at_least_s` seconds."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least_s:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
