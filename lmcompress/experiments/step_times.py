"""How long training steps of models from scratch take, by shape and over the device's best rate."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from lmcompress import device
from lmcompress.experiments.architecture import Scale, config_of, scale_named
from lmcompress.measure.calls import Call
from lmcompress.measure.latency import COPY, DENSE, VARIANT, interleave, summarise
from lmcompress.models.headwise import HeadwiseConfig, HeadwiseForCausalLM
from lmcompress.timing_lock import timing_lock
from lmcompress.train.spec import optimizer_for
from lmcompress.train.switches import applied
from lmcompress.train.trainer import TrainSpec, trained


def step_times(
    shapes: Sequence[tuple[int, str]],
    *,
    scale: str,
    calls: int = 30,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Time training steps on random ids of all shapes in turns: a fair measure, as runs one by one are not.

    `shapes` are pairs of layers and kind of φ; the others are compared with the first, which is timed twice.

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
    spec = TrainSpec([], steps=1, learning_rate=sizes.learning_rate, compile=sizes.compiles)
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
