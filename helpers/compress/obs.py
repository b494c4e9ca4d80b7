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
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float,
    pattern: str | None = None,
    damping: float = 0.01,
    factor: Tensor | None = None,
) -> Tensor:
    """`weight` with `sparsity` of its entries zero and the others moved so that X Wᵀ changes least.

    Column by column: what the entries that go would have added is spread over the columns to the right by the rows
    of U. The mask of each 128 columns is chosen when their turn comes, by W² / U_jj², over all rows together; that
    of an N:M pattern for M columns at a time.

    Args:
        weight: `(out, in)`; untouched.
        gram: XᵀX of the inputs, `(in, in)`.
        factor: `inverse_factor(gram)` if it is known: maps that read the same inputs share it.

    Returns:
        `(out, in)`, in `weight`'s dtype.
    """
    factor = inverse_factor(gram, damping=damping) if factor is None else factor
    new = (
        weight.detach().float().t().clone(memory_format=torch.contiguous_format)
    )  # (in, out): columns lie together
    new[gram.diagonal() == 0] = 0  # an input that is always zero: its weights cost nothing
    group = int(pattern.split(":")[1]) if pattern else BLOCK
    span, gone = BLOCK // group * group or group, 0
    for first in range(0, len(new), span):
        last = min(first + span, len(new))
        block, corner = new[first:last].clone(), factor[first:last, first:last]
        pivots, errors = corner.diagonal()[:, None], torch.zeros_like(block)
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not pattern:
            wanted = round(sparsity * new.shape[1] * last) - gone
            mask, gone = smallest((block / pivots).square(), wanted), gone + wanted
        taken = mask / pivots
        for j in range(last - first):
            if pattern and j % group == 0:
                part = slice(j, j + group)
                mask[part] = n_of_m((block[part] / pivots[part]).square().t(), pattern).t()
                taken[part] = mask[part] / pivots[part]
            torch.mul(block[j], taken[j], out=errors[j])
            block[j + 1 :].addr_(corner[j, j + 1 :], errors[j], alpha=-1)
        new[first:last] = block.masked_fill(mask, 0)
        new[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    return new.t().to(weight.dtype)
