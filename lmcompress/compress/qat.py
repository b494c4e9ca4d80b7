"""Quantization-aware training: the model is fine-tuned as it will be stored, every forward on rounded weights.

Rounding has no useful gradient, so the gradient of the rounded weights is given to the floating-point ones behind them
(straight through: Bengio et al. 2013; Jacob et al. 2018). What is stored is what the last forward computed with.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.quantization import UNPACKED, achieved, check_kernel
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import prunable
from lmcompress.models.packed import Int8DynamicLinear, QuantizedLinear, store_as_integers
from lmcompress.models.packing import check_grid, dequantize, quantize
from lmcompress.registry import register_look
from lmcompress.train.trainer import curve, fit


class _OnGrid(nn.Module):
    """The points of the grid that are nearest to the weights now; gradients pass straight through."""

    def __init__(self, conv1d: bool, **grid):
        super().__init__()
        self.conv1d, self.grid = conv1d, grid

    def forward(self, weight: Tensor) -> Tensor:
        """Rounded weights, shaped as they are stored."""
        weight2d = weight.t() if self.conv1d else weight
        rounded = dequantize(*quantize(weight2d, **self.grid), group_size=self.grid["group_size"])
        # A zero with the weights' gradient: to move them by (rounded - weight) would be off by a rounding error.
        return (rounded.t() if self.conv1d else rounded) + (weight - weight.detach())


register_look(name="qat-after", title="Fine-tuned, then rounded", colour="#A79BC4", marker="o")


@technique(
    name="qat", version=1, title="Quantization-aware training", colour="#6A3D9A", marker="H", needs=("train",)
)
def qat(
    model: nn.Module,
    context: Context,
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = False,
    activations: bool = False,
    aware: bool = True,
    keep_zeros: bool = False,
):
    """Fine-tune with weights rounded in every forward, on the grid of "rtn", its scales taken anew; then store them.

    `achieved` is that of "rtn", and the "curve" of the losses, which are those of the rounded model.

    Args:
        context.train: data, steps and rate.
        bits, group_size, symmetric: as for "rtn".
        activations: the inputs too, as "int8-dynamic" rounds them: 8 bits, symmetric, one scale per row of weights.
        aware: False is the control: fine-tune in floating point, then round; its curve is the float model's.
        keep_zeros: weights that are zero stay zero, for a model that was pruned before.

    Raises:
        BadSetting: no such grid, or one that the integer kernel does not have.
    """
    check_grid(bits, group_size, symmetric)
    if activations and (bits != 8 or group_size or not symmetric):
        raise BadSetting(
            f"activations=True with bits={bits}, group_size={group_size}, symmetric={symmetric}: the integer kernel "
            "takes bits=8, group_size=None, symmetric=True. Leave activations out for the other grids."
        )
    engine = check_kernel(model) if activations else None
    maps, grid = prunable(model), {"bits": bits, "group_size": group_size}
    if not maps:
        return model, TechniqueResult("qat", 0)
    known, undo = {id(one.module.weight): one.conv1d for one in maps}, []
    held = {id(p): p.detach() != 0 for p in (one.module.weight for one in maps)} if keep_zeros else {}
    for layer in [m for m in model.modules() if id(m._parameters.get("weight")) in known] if aware else ():
        on_grid = _OnGrid(known[id(layer.weight)], symmetric=symmetric, **grid)
        parametrize.register_parametrization(layer, "weight", on_grid)
        undo.append(partial(parametrize.remove_parametrizations, layer, "weight", leave_parametrized=False))
        if activations:
            undo.append(layer.register_forward_pre_hook(_round_inputs).remove)
    try:
        masks = {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}
        history = fit(model, context.train, masks=masks)
    finally:
        for step in undo:
            step()
    kind = Int8DynamicLinear if activations else QuantizedLinear
    for one in maps:
        tensors = quantize(one.weight2d(), symmetric=symmetric, **grid)
        store_as_integers(model, one.module.weight, tensors, kind=kind, **grid)
    return model, TechniqueResult(
        "qat", len(maps), achieved(model, engine or UNPACKED) | {"curve": curve(history)}
    )


def _round_inputs(_: nn.Module, args: tuple) -> tuple:
    """Inputs on the grid that `linear_dynamic` lays over a call: 128 points from the least to the greatest, and zero."""
    x = args[0].detach()
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = torch.fake_quantize_per_tensor_affine(x, step, (-low / step).round().int(), 0, 127)
    return (rounded + (args[0] - x), *args[1:])
