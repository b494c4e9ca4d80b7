"""How long training steps of models from scratch take, by shape and over the device's best rate."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmcompress import device
from lmcompress.experiments.architecture_scales import Scale, compiles, config_of, scale_named
from lmcompress.measure.calls import Call
from lmcompress.measure.latency import COPY, DENSE, VARIANT, interleave, summarise
from lmcompress.models.headwise import HeadwiseConfig, HeadwiseForCausalLM
from lmcompress.timing_lock import timing_lock
from lmcompress.train.optimizer import optimizer_for
from lmcompress.train.switches import applied
from lmcompress.train.trainer import History, TrainSpec, trained


def arithmetic(config: HeadwiseConfig, window: int, history: History, spec: TrainSpec) -> dict:
    """Return how fast the steps of a run were, and their share of the device's best rate of matrix products.

    A step is counted as three forward passes: its backward pass needs two products for each one (Kaplan et
    al. 2020). Causal attention is counted in full, element-wise work is not.

    Returns:
        "step_tokens_per_s" (median over the second half of the steps, so without compilation and validation),
        "training_flops_per_token", "matmul_ceiling_gflops", "matmul_share" (a fraction), "device", "dtype"
        and "compiled".
    """
    with torch.device("meta"):
        model, ids = HeadwiseForCausalLM(config), torch.zeros(1, window, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    per_token = 3 * counter.get_total_flops() / window
    seconds, tokens = (np.diff([step[name] for step in history.steps]) for name in ("seconds", "tokens"))
    rates, last = (tokens / np.maximum(seconds, 1e-9))[len(seconds) // 2 :], history.steps[-1]
    per_second = float(np.median(rates)) if len(rates) else last["tokens"] / last["seconds"]
    on = device.choose().device
    ceiling = device.ceiling(on, spec.dtype, at_least=per_token * per_second / 1e9)["gflops_per_s"]
    return {
        "step_tokens_per_s": per_second,
        "training_flops_per_token": per_token,
        "matmul_ceiling_gflops": ceiling,
        "matmul_share": per_token * per_second / 1e9 / ceiling,
        "device": device.name(on),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "compiled": spec.compile,
    }


def step_times(
    shapes: Sequence[tuple[int, str]],
    *,
    scale: str,
    calls: int = 30,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Time training steps of all shapes in turns: a fair measure, as runs one by one are not.

    Args:
        shapes: pairs of layers and kind of φ; the others are compared with the first, which is timed twice.
        calls: timed steps of each, forward, backward and update, on random ids.

    Returns:
        {"batch", "window", "threads", "calls", "shapes"}: for each shape `layers`, `phi` and the numbers of
        `latency`, the ratio being step time over the first shape's.
    """
    sizes, on = scale_named(scale), device.choose().device
    ids = torch.randint(sizes.vocabulary, (sizes.batch_size, sizes.window)).to(on)
    configs = [config_of(scale, *shape) for shape in shapes]
    with ExitStack() as stack:
        calls_of = {str(index): _step(config, sizes, ids, stack) for index, config in enumerate(configs)}
        with timing_lock():
            calls_of[COPY] = _step(configs[0], sizes, ids, stack)
            times = interleave(calls_of, calls=calls, clock=clock, device=on)
    rows = []
    for index, (layers, phi) in enumerate(shapes):
        of_shape = {DENSE: times["0"], COPY: times[COPY], VARIANT: times[str(index)]}
        rows.append({"layers": layers, "phi": phi} | summarise(of_shape))
    conditions = {"batch": sizes.batch_size, "window": sizes.window, "threads": torch.get_num_threads()}
    return conditions | {"calls": calls, "shapes": rows}


def _step(config: HeadwiseConfig, sizes: Scale, ids: torch.Tensor, stack: ExitStack) -> Call:
    """Return a training step of a fresh model, whose switches are on until `stack` closes."""
    model = HeadwiseForCausalLM(config).to(ids.device).train()
    spec = TrainSpec([], steps=1, learning_rate=sizes.learning_rate, compile=compiles(sizes))
    optimizer, _ = optimizer_for(trained(model), spec)
    stack.enter_context(applied(model, spec))

    def run() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=sizes.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Call(run)
