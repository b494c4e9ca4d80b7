"""Second-order compression of one matrix: what its other weights do to make up for the one that goes.

The error of a layer's outputs is quadratic in its weights with the Hessian H = XXᵀ of its inputs, so the best change
of the remaining weights is known in closed form: the optimal brain surgeon (Hassibi & Stork 1993), made cheap by a
fixed order of columns and one Cholesky factor (SparseGPT, Frantar & Alistarh 2023). Rounding to a grid is the same
step with another target.
"""

import torch
from torch import Tensor

from helpers.compress.pruning import n_of_m, smallest
from helpers.errors import BadWeights

BLOCK = 128  # columns whose weights are compared together, and updated before the rest
_RETRIES = 8


def inverse_factor(gram: Tensor, *, damping: float = 0.01) -> Tensor:
    """Upper triangular U with (H + λI)⁻¹ = UᵀU, in float32.

    Args:
        gram: H = XᵀX, `(in, in)`. An input that is always zero gets 1 on the diagonal.
        damping: λ as a fraction of the mean diagonal; ten times more at each retry while H + λI is not positive
            definite in float32.

    Raises:
        BadWeights: H is not finite, or no damping helped.
    """
    hessian = gram.float().clone()
    if not hessian.isfinite().all():
        raise BadWeights(
            "the Hessian holds NaN or infinity: check the calibration text and the blocks before."
        )
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean()
    for attempt in range(_RETRIES):
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper
    raise BadWeights(f"the Hessian is not positive definite even with damping {damping * 10**attempt:g}.")


@torch.no_grad()
def prune_matrix(
    weight: Tensor, gram: Tensor, *, sparsity: float, pattern: str | None = None, damping: float = 0.01
) -> Tensor:
    """`weight` with `sparsity` of its entries zero and the others moved so that X Wᵀ changes least.

    Column by column: what the entries that go would have added is spread over the columns to the right by the rows
    of U. The mask of each 128 columns is chosen when their turn comes, by W² / U_jj², over all rows together; that
    of an N:M pattern for M columns at a time.

    Args:
        weight: `(out, in)`; untouched.
        gram: XᵀX of the inputs, `(in, in)`.

    Returns:
        `(out, in)`, in `weight`'s dtype.
    """
    factor, new = inverse_factor(gram, damping=damping), weight.detach().float().clone()
    new[:, gram.diagonal() == 0] = 0  # an input that is always zero: its weights cost nothing
    width = new.shape[1]
    group = int(pattern.split(":")[1]) if pattern else BLOCK
    span = BLOCK // group * group or group
    gone = 0
    for first in range(0, width, span):
        last = min(first + span, width)
        block, corner = new[:, first:last].clone(), factor[first:last, first:last]
        if not pattern:
            wanted = round(sparsity * len(new) * last) - gone
            mask = smallest((block / corner.diagonal()).square(), wanted)
            gone += wanted
        errors = torch.zeros_like(block)
        for j in range(last - first):
            if pattern and j % group == 0:
                part = slice(j, j + group)
                mask_now = n_of_m((block[:, part] / corner.diagonal()[part]).square(), pattern)
                mask = mask_now if j == 0 else torch.cat([mask, mask_now], dim=1)
            column = block[:, j]
            errors[:, j] = column.masked_fill(~mask[:, j], 0) / corner[j, j]
            block[:, j + 1 :].addr_(errors[:, j], corner[j, j + 1 :], alpha=-1)
        new[:, first:last] = block.masked_fill(mask, 0)
        new[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return new.to(weight.dtype)
