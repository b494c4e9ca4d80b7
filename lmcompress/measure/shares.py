"""Where the time of a call goes: matrix products shrink with the FLOPs, the rest does not, so it says why."""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lmcompress.measure.calls import Shape, prepared_calls
from lmcompress.registry import analysis

VERSION = analysis(1, "time-shares")
PRODUCTS = {"aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear"}
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention")


def time_shares(model: nn.Module, *, kind: str, shape: Shape, calls: int = 5) -> dict[str, float]:
    """Return the fractions 0-1 of the time of one call of `shape`: "products", "attention" and "rest".

    torch's profiler adds its own cost to each operation, which makes the many small ones of "rest" look
    larger than they are. An attention that a model computes from single matrix products counts among these.
    """
    with torch.no_grad():
        call = prepared_calls({"model": model}, shape, kind=kind)["model"]
        on_gpu = next(model.parameters()).device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        call.prepare()
        call.run()
        with profile(activities=activities) as profiled:
            for _ in range(calls):
                call.prepare()
                call.run()
    spent = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in profiled.key_averages():
        group = "products" if event.key in PRODUCTS else "rest"
        if any(name in event.key for name in ATTENTION):
            group = "attention"
        spent[group] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    return {group: time / total for group, time in spent.items()}
