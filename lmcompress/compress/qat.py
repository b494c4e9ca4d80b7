"""Quantization-aware training: fine-tuning the model as it will be stored, every forward on rounded weights.

Rounding has no useful gradient: that of the rounded weights is given to the floating-point ones behind them
(straight through: Bengio et al. 2013; Jacob et al. 2018).
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from lmcompress.compress import TechniqueResult, technique
from lmcompress.compress.quantization import INT8, achieved, check_kernel, store_nearest
from lmcompress.errors import BadSetting
from lmcompress.models.anatomy import prunable
from lmcompress.models.packed import QuantizedLinear, dequantize, quantize
from lmcompress.registry import register_look
from lmcompress.train.trainer import curve, fit


class OnGrid(nn.Module):
    """Rounds a parametrized weight to the nearest points of its grid; gradients pass straight through."""

    def __init__(self, conv1d: bool, **scheme):
        super().__init__()
        self.conv1d, self.scheme = conv1d, scheme

    def forward(self, weight: Tensor) -> Tensor:
        weight2d = weight.t() if self.conv1d else weight
        rounded = dequantize(*quantize(weight2d, **self.scheme), group_size=self.scheme["group_size"])
        # A zero with the weights' gradient: adding (rounded - weight) would be off by a rounding error.
        return (rounded.t() if self.conv1d else rounded) + (weight - weight.detach())


register_look(name="qat-after", title="Fine-tuned, then quantized", colour="#A79BC4", marker="o")


@technique("qat", 1, "QAT", "#6A3D9A", "H", needs=("train",))
def qat(
    model,
    context,
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = False,
    activations: bool = False,
    aware: bool = True,
    keep_zeros: bool = False,
):
    """Fine-tune with weights rounded in every forward to the grid of "rtn", scales taken anew; store them.

    Args:
        activations: the inputs too, as "int8-dynamic" rounds them; only with its grid.
        aware: False is the control: fine-tune in floating point, then round; its curve is the float model's.
        keep_zeros: weights that are zero stay zero, for a model that was pruned before.
    """
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    if activations and (bits != 8 or group_size or not symmetric):
        raise BadSetting(
            f"activations=True with bits={bits}, group_size={group_size}, symmetric={symmetric}: the integer "
            "kernel takes bits=8, group_size=None, symmetric=True. Leave activations out for the other grids."
        )
    backend, layers = check_kernel(model) if activations else QuantizedLinear.execution, prunable(model)
    if not layers:
        return model, TechniqueResult("qat", 0)
    weights = [layer.module.weight for layer in layers]
    nonzero = {id(weight): weight.detach() != 0 for weight in weights} if keep_zeros else {}
    with ExitStack() as undo:
        if aware:
            conv1d = {id(layer.module.weight): layer.conv1d for layer in layers}
            # Every module with such a weight: one that is shared is a parameter of several.
            for module in [m for m in model.modules() if id(getattr(m, "weight", None)) in conv1d]:
                rounding = OnGrid(conv1d[id(module.weight)], **grid)
                register_parametrization(module, "weight", rounding)
                undo.callback(remove_parametrizations, module, "weight", leave_parametrized=False)
                if activations:
                    undo.callback(module.register_forward_pre_hook(round_inputs).remove)
        masks = {name: nonzero[id(p)] for name, p in model.named_parameters() if id(p) in nonzero}
        history = fit(model, context.train, masks=masks)
    store_nearest(model, layers, **(INT8 if activations else grid))
    figures = achieved(model, backend) | {"curve": curve(history)}
    return model, TechniqueResult("qat", len(layers), figures)


def round_inputs(_: nn.Module, args: tuple) -> tuple:
    """Round inputs as `linear_dynamic` does in a call: 128 points from least to greatest, and zero."""
    x = args[0].detach()
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = torch.fake_quantize_per_tensor_affine(x, step, (-low / step).round().int(), 0, 127)
    return (rounded + (args[0] - x), *args[1:])
