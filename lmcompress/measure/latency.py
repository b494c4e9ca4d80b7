"""Times a model against its dense original so that drift, noise and order cannot pass for a speed-up.

Every round times the dense model, a second copy of it (the A/A control) and the variant, in random order, in
one process that holds the machine's timing lock.
"""

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from lmcompress.device import synchronize
from lmcompress.measure.calls import Call, Shape, default_shapes, prepared_calls, usable_length
from lmcompress.stats import (
    LEAST_CALLS,
    TOO_FEW_CALLS,
    Interval,
    Median,
    noise_floor,
    statistic_interval,
    timing_ratio,
    verdict,
)
from lmcompress.timing_lock import timing_lock

WARMUP = 3
PATIENCE_S = 45.0  # rounds that take longer in all are cut short, but to no fewer than `LEAST_CALLS`
DENSE, COPY, VARIANT = "dense", "dense_copy", "variant"


def latency(
    dense: nn.Module,
    variant: nn.Module | None = None,
    *,
    kind: str,
    shapes: Sequence[Shape] | None = None,
    calls: int = 30,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Time `variant` against `dense`, or `dense` against itself alone if there is no variant.

    Args:
        variant: takes the same inputs, on the same device, which is the one measured on.
        shapes: default `default_shapes(kind, model=dense)`; lengths are cut to the positions the models have.
        calls: timed rounds, each with one call of every model.
        clock: seconds; on a CUDA device events are used instead.

    Returns:
        {"device", "dtype", "threads", "calls", "shapes": {name: {"batch", "length", "median_ms", "low_ms",
        "high_ms", "p5_ms", "p95_ms", "dense_ms", "ratio", "ratio_low", "ratio_high", "aa_ratio", "aa_low",
        "aa_high", "noise_floor"}}}; the ratio is time over dense time. Without a variant the milliseconds
        are the dense model's and the ratio is null.
    """
    dense_copy = copy.deepcopy(dense)
    contenders = {DENSE: dense, COPY: dense_copy} | ({VARIANT: variant} if variant is not None else {})
    first = next(dense.parameters())
    timed, fewest = {}, calls
    with timing_lock(), torch.no_grad(), unchanged(*contenders.values()):
        for shape in shapes or default_shapes(kind, model=dense):
            work = prepared_calls(contenders, shape, kind=kind, seed=seed)
            times = interleave(work, calls=calls, seed=seed, clock=clock, device=first.device)
            length = usable_length(contenders.values(), shape)
            timed[shape.name] = {"batch": shape.batch, "length": length} | summarise(times)
            fewest = min(fewest, len(times[DENSE]))
    return {
        "device": first.device.type,
        "dtype": str(first.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "calls": fewest,
        "shapes": timed,
    }


def interleave(
    work: Mapping[str, Call],
    *,
    calls: int,
    warmup: int = WARMUP,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | None = None,
    patience_s: float = PATIENCE_S,
) -> dict[str, np.ndarray]:
    """Return the seconds per step `(calls,)` of each entry of `work`; each round has all, in random order.

    The first `warmup` rounds are not kept. Once `patience_s` are over, warming up ends and `LEAST_CALLS`
    rounds are enough, so that something far slower does not take hours.
    """
    rng = np.random.default_rng(seed)
    names = list(work)
    times: dict[str, list[float]] = {name: [] for name in names}
    timer = _cuda_seconds if device is not None and device.type == "cuda" else _clock_seconds
    began = time.perf_counter()
    for turn in count():
        for name in rng.permutation(names):
            call = work[str(name)]
            call.prepare()
            if device is not None:
                synchronize(device)
            collecting = gc.isenabled()
            gc.disable()
            try:
                seconds = timer(call.run, clock)
            finally:
                if collecting:
                    gc.enable()
            if turn >= warmup:
                times[str(name)].append(seconds / call.steps)
        late = time.perf_counter() - began > patience_s
        warmup = min(warmup, turn + 1) if late else warmup
        if turn + 1 >= warmup + (min(LEAST_CALLS, calls) if late else calls):
            break
    return {name: np.array(seconds_list) for name, seconds_list in times.items()}


def summarise(times: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Return one shape's figures from `interleave`'s seconds: "dense", "dense_copy", perhaps "variant"."""
    seconds = times.get(VARIANT, times[DENSE])
    median = statistic_interval(Median("time"), {"time": seconds}, least=1)
    aa = timing_ratio(times[COPY], times[DENSE])
    ratio = timing_ratio(seconds, times[DENSE]) if VARIANT in times else None
    milliseconds = {
        **{"median_ms": median.value, "low_ms": median.low, "high_ms": median.high},
        **dict(zip(("p5_ms", "p95_ms"), np.percentile(seconds, [5, 95]))),
        "dense_ms": np.median(times[DENSE]),
    }
    return {name: float(length) * 1e3 for name, length in milliseconds.items()} | {
        **{"ratio": ratio and ratio.value, "ratio_low": ratio and ratio.low},
        **{"ratio_high": ratio and ratio.high},
        **{"aa_ratio": aa.value, "aa_low": aa.low, "aa_high": aa.high},
        "noise_floor": noise_floor(aa),
    }


def verdicts(measured: dict) -> dict[str, str]:
    """Return "faster", "slower", "no measurable change" or "baseline" for each shape of `latency`'s result.

    Of fewer than `LEAST_CALLS` calls, "too few calls": of one, half of all noise is called a change.
    """
    words = {"better": "faster", "worse": "slower"}
    words_by_shape = {}
    for name, shape in measured["shapes"].items():
        if shape["ratio"] is None:
            words_by_shape[name] = "baseline"
        elif measured["calls"] < LEAST_CALLS:
            words_by_shape[name] = TOO_FEW_CALLS
        else:
            ratio = Interval(shape["ratio"], shape["ratio_low"], shape["ratio_high"])
            quality = verdict(ratio, floor=shape["noise_floor"], higher_is_better=False)
            words_by_shape[name] = words.get(quality, quality)
    return words_by_shape


def _clock_seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def _cuda_seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def unchanged(*models: nn.Module | None) -> Iterator[None]:
    """Put models in eval mode for a while; then give every module, and the config, the attributes it had.

    A forward may change a model for good: BigBird exchanges its sparse attention at a short input, dynamic
    RoPE replaces its frequencies. Modules, parameters and buffers come back as the same objects.
    """
    present = [model for model in models if model is not None]
    modules = [module for model in present for module in model.modules()]
    configs = [c for module in modules for c in vars(module).values() if isinstance(c, PreTrainedConfig)]
    before = {}
    for holder in (*modules, *configs):
        # Those inside (parameters, hooks) are emptied and filled again, as handles of hooks refer to them.
        for attributes in (vars(holder), *(d for d in vars(holder).values() if isinstance(d, dict))):
            before.setdefault(id(attributes), (attributes, attributes.copy()))
    for model in present:
        model.eval()
    try:
        yield
    finally:
        for attributes, content in before.values():
            attributes.clear()
            attributes.update(content)
