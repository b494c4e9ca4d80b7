"""How long the training steps of models from scratch take: shape beside shape, and against what the device can do."""

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
    """How fast the steps of a run were, and what share of the matrix products a second that the device can do at best.

    A step is counted as three forward passes: its backward pass needs two products for each one (Kaplan et al. 2020).
    Causal attention is counted in full, element-wise work is not.

    Returns:
        "step_tokens_per_s" (median over the second half of the steps, so without compilation and validation),
        "training_flops_per_token", "matmul_ceiling_gflops", "matmul_share" (a fraction), "device", "dtype", "compiled".
    """
    with torch.device("meta"):
        model, ids = HeadwiseForCausalLM(config), torch.zeros(1, window, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    per_token = 3 * counter.get_total_flops() / window
    seconds, tokens = (np.diff([step[name] for step in history.steps]) for name in ("seconds", "tokens"))
    rates = (tokens / np.maximum(seconds, 1e-9))[len(seconds) // 2 :]
    per_second = (
        float(np.median(rates)) if len(rates) else history.steps[-1]["tokens"] / history.steps[-1]["seconds"]
    )
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
    """How long a training step takes, all shapes in turns: a fair measure of training time, as runs apart are not.

    Args:
        shapes: pairs of layers and kind of φ; the first is what the others are held against, and is timed twice.
        calls: timed steps of each, forward, backward and update, on random ids.

    Returns:
        {"batch", "window", "threads", "calls", "shapes"}: for each `layers`, `phi` and the figures of `latency`, the
        ratio being step time over the first shape's.
    """
    chosen, on = scale_named(scale), device.choose().device
    ids = torch.randint(chosen.vocabulary, (chosen.batch_size, chosen.window)).to(on)
    with ExitStack() as stack:
        work = {
            str(place): _step(config_of(scale, *shape), chosen, ids, stack)
            for place, shape in enumerate(shapes)
        }
        with timing_lock():
            copied = {COPY: _step(config_of(scale, *shapes[0]), chosen, ids, stack)}
            times = interleave(work | copied, calls=calls, clock=clock, device=on)
    figures = [
        summarise({DENSE: times["0"], COPY: times[COPY], VARIANT: times[str(place)]})
        for place in range(len(shapes))
    ]
    named = [{"layers": layers, "phi": phi} | one for (layers, phi), one in zip(shapes, figures, strict=True)]
    conditions = {"batch": chosen.batch_size, "window": chosen.window, "threads": torch.get_num_threads()}
    return conditions | {"calls": calls, "shapes": named}


def _step(config: HeadwiseConfig, chosen: Scale, ids: torch.Tensor, stack: ExitStack) -> Call:
    model = HeadwiseForCausalLM(config).to(ids.device).train()
    spec = TrainSpec([], steps=1, learning_rate=chosen.learning_rate, compile=compiles(chosen))
    optimizer, _ = optimizer_for(trained(model), spec)
    stack.enter_context(applied(model, spec))

    def run() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=chosen.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Call(run)
