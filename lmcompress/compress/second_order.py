"""Second-order compression of one matrix: what its other weights do to make up for the one that goes.

The error of a layer's outputs is quadratic in its weights with the Hessian H = XXᵀ of its inputs, so the best change
of the remaining weights is known in closed form: the optimal brain surgeon (Hassibi & Stork 1993), made cheap by a
fixed order of columns and one Cholesky factor (SparseGPT, Frantar & Alistarh 2023). Rounding to a grid is the same
step with another target (GPTQ). Both go column by column: what a column loses is spread over the columns to its
right by the rows of U.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lmcompress.compress.pruning import n_of_m, smallest
from lmcompress.errors import BadWeights
from lmcompress.models.packing import from_grid, quantize, to_grid

BLOCK = 128  # columns whose weights are compared together, and updated before the rest
_RETRIES = 8
ErrorsOf = Callable[[int, Tensor, Tensor], Iterator[Tensor]]


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

    The mask of each 128 columns is chosen when their turn comes, by W² / U_jj², over all rows together; that of an
    N:M pattern for M columns at a time.

    Args:
        weight: `(out, in)`; untouched.
        gram: XᵀX of the inputs, `(in, in)`.
        factor: `inverse_factor(gram)` if it is known: maps that read the same inputs share it.

    Returns:
        `(out, in)`, in `weight`'s dtype.
    """
    factor = inverse_factor(gram, damping=damping) if factor is None else factor
    new = _columns_together(weight)
    new[gram.diagonal() == 0] = 0  # an input that is always zero: its weights cost nothing
    group = int(pattern.split(":")[1]) if pattern else BLOCK
    gone = 0

    def prune(first: int, block: Tensor, pivots: Tensor) -> Iterator[Tensor]:
        nonlocal gone
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not pattern:
            wanted = round(sparsity * block.shape[1] * (first + len(block))) - gone
            mask, gone = smallest((block / pivots).square(), wanted), gone + wanted
        taken = mask / pivots
        for j in range(len(block)):
            if pattern and j % group == 0:
                part = slice(j, j + group)
                mask[part] = n_of_m((block[part] / pivots[part]).square().t(), pattern).t()
                taken[part] = mask[part] / pivots[part]
            yield block[j] * taken[j]
        block.masked_fill_(mask, 0)

    _column_by_column(new, factor, group, prune)
    return new.t().to(weight.dtype)


@torch.no_grad()
def round_matrix(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    factor: Tensor | None = None,
    keep_zeros: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`weight` as integers whose rounding the columns still to come make up for (GPTQ, Frantar et al. 2023, alg. 1).

    A group's scale is taken from its weights as they are when its turn comes; with `act_order`, where a group's
    columns come at different times, from the original ones, as that of a whole row. An input that is always zero
    is rounded to nearest.

    Args:
        weight: `(out, in)`; untouched.
        gram: XᵀX of the inputs, `(in, in)`.
        bits, group_size, symmetric: as `packing.quantize` takes them.
        act_order: the columns with the largest inputs come first; the result is in the original order.
        factor: `inverse_factor` of the gram in the order of rounding (`rounding_order`), if it is known.
        keep_zeros: a weight that is zero is rounded to zero, whatever it should make up for; the next ones do.

    Returns:
        Integers `(out, in)`, scales and zero points `(out, groups)`, as `packing.quantize` returns them.
    """
    order = rounding_order(gram, act_order)
    if factor is None:
        factor = inverse_factor(gram[order][:, order], damping=damping)
    integers, scales, zeros = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    size = min(group_size or weight.shape[1], weight.shape[1])
    fresh = group_size is not None and not act_order
    gone = (weight.detach() == 0).t()[order] if keep_zeros else None

    def rounded(first: int, block: Tensor, pivots: Tensor) -> Iterator[Tensor]:
        for j, column in enumerate(order[first : first + len(block)].tolist()):
            group = slice(column // size, column // size + 1)
            if fresh and column % size == 0:
                part = block[j : j + size]
                part = part if gone is None else part.masked_fill(gone[first + j : first + j + size], 0)
                own = quantize(part.t().to(weight.dtype), bits=bits, symmetric=symmetric)
                scales[:, group] = own[1]
                if zeros is not None:
                    zeros[:, group] = own[2]
            zero = None if zeros is None else zeros[:, group]
            column_now = block[j] if gone is None else block[j].masked_fill(gone[first + j], 0)
            whole = to_grid(column_now[:, None], scales[:, group], zero, bits)
            integers[:, column] = whole[:, 0]
            yield (block[j] - from_grid(whole, scales[:, group].float(), zero)[:, 0]) / pivots[j]

    _column_by_column(_columns_together(weight)[order], factor, size if fresh else BLOCK, rounded)
    return integers, scales, zeros


def rounding_order(gram: Tensor, act_order: bool) -> Tensor:
    """The columns in the order in which they are rounded: largest inputs first, or as they come; `(in,)`."""
    if act_order:
        return gram.diagonal().argsort(descending=True, stable=True)
    return torch.arange(len(gram), device=gram.device)


def _columns_together(weight: Tensor) -> Tensor:
    """A float32 copy of `weight` `(out, in)` as contiguous `(in, out)`."""
    return weight.detach().float().t().clone(memory_format=torch.contiguous_format)


def _column_by_column(new: Tensor, factor: Tensor, group: int, errors_of: ErrorsOf) -> None:
    """Change `new` `(in, out)` column by column, and spread each one's error over those to the right.

    Args:
        new: the weights, columns as rows; changed in place.
        factor: `inverse_factor` of the columns as they are ordered here.
        group: columns that must be in one block.
        errors_of: called with the first column of a block, the block `(columns, out)` and its pivots U_jj
            `(columns, 1)`; yields each column's change over its pivot, `(out,)`, and may change the block. It goes on
            once the block is updated.
    """
    span = BLOCK // group * group or group
    for first in range(0, len(new), span):
        last = min(first + span, len(new))
        block, corner = new[first:last].clone(), factor[first:last, first:last]
        errors = torch.zeros_like(block)
        for j, error in enumerate(errors_of(first, block, corner.diagonal()[:, None])):
            errors[j] = error
            block[j + 1 :].addr_(corner[j, j + 1 :], error, alpha=-1)
        new[first:last] = block
        new[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
