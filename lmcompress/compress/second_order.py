"""Second-order compression of one matrix: what its other weights do to make up for the one that goes.

Outputs' error is quadratic in the weights, with the Hessian H = XᵀX of the inputs (optimal brain surgeon,
Hassibi & Stork 1993). SparseGPT and GPTQ are the one step of `_column_by_column` with different targets ŵ.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lmcompress.compress.masks import n_of_m, smallest
from lmcompress.errors import BadWeights
from lmcompress.models.packed import from_grid, quantize, to_grid

BLOCK = 128  # columns whose weights are compared together, and updated before the rest


def inverse_factor(gram: Tensor, *, damping: float = 0.01) -> Tensor:
    """Return the upper triangular U with (H + λI)⁻¹ = UᵀU, in float32.

    Args:
        gram: H = XᵀX, `(in, in)`. An input that is always zero gets 1 on the diagonal.
        damping: λ as a fraction of the mean diagonal; ten times more while H + λI is not positive definite.
            `BadWeights` is raised where that does not help, or H is not finite.
    """
    hessian = gram.float().clone()
    if not hessian.isfinite().all():
        raise BadWeights("the Hessian holds NaN or infinity: check the calibration text and earlier blocks.")
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean()
    for attempt in range(8):
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper
    raise BadWeights(f"the Hessian is not positive definite even with damping {damping * 10**attempt:g}.")


def relative_errors(squares: Tensor) -> list[float | None]:
    """Return √(squared error / squared size) of each error in `squares`, whose last entry is the size.

    Of nothing (a zero matrix, say of a block added by expansion): 0.0 where no error was made, else None.
    """
    *errors, size = squares.clamp(min=0).tolist()
    return [math.sqrt(error / size) if size else None if error else 0.0 for error in errors]


def four_digits(value: float | None) -> float | None:
    """Return `value` with four significant digits, as rows hold figures of single layers."""
    return None if value is None else float(f"{value:.4g}")


class FactorCache:
    """The last Hessian and its factor: q, k and v read the same inputs, the factor is most of the work."""

    def __init__(self, damping: float):
        self.damping, self.gram, self.factor = damping, None, None

    def of(self, gram: Tensor, order: Tensor | None = None) -> Tensor:
        """Return `inverse_factor` of `gram`, columns in `order`, which has to be the same for one gram."""
        if self.gram is None or self.gram.shape != gram.shape or not torch.equal(self.gram, gram):
            ordered = gram if order is None else gram[order][:, order]
            self.gram, self.factor = gram, inverse_factor(ordered, damping=self.damping)
        return self.factor


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
    """Return `weight` with `sparsity` of its entries zero and the others moved so that X Wᵀ changes least.

    The mask of each 128 columns is chosen when their turn comes, by w_j² / U_jj² (Frantar & Alistarh 2023,
    alg. 1), over all rows together; that of an N:M pattern for M columns at a time.

    Args:
        weight: `(out, in)`; untouched. What is returned has its dtype.
        gram: XᵀX of the inputs, `(in, in)`.
        factor: `inverse_factor(gram)` if it is known: layers that read the same inputs share it.
    """
    factor = inverse_factor(gram, damping=damping) if factor is None else factor
    pruned = _columns_first(weight)
    pruned[gram.diagonal() == 0] = 0  # an input that is always zero: its weights cost nothing
    group = int(pattern.split(":")[1]) if pattern else BLOCK
    removed = 0

    def prune(first: int, block: Tensor, pivots: Tensor) -> Iterator[Tensor]:
        nonlocal removed
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not pattern:  # counted from the start, so that the blocks' roundings do not add up
            count = round(sparsity * block.shape[1] * (first + len(block))) - removed
            mask, removed = smallest((block / pivots).square(), count), removed + count
        over_pivot = mask / pivots
        for j in range(len(block)):
            if pattern and j % group == 0:
                span = slice(j, j + group)
                mask[span] = n_of_m((block[span] / pivots[span]).square().t(), pattern).t()
                over_pivot[span] = mask[span] / pivots[span]
            yield block[j] * over_pivot[j]
        block.masked_fill_(mask, 0)

    _column_by_column(pruned, factor, group, prune)
    return pruned.t().to(weight.dtype)


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
    """Return `weight` as integers whose rounding the next columns make up for (GPTQ, Frantar et al. 2023).

    A group's scale is taken from its weights as they are when its turn comes; with `act_order`, where its
    columns come at different times, from the original ones, as that of a whole row.

    Args:
        weight, bits, group_size, symmetric: as `packed.quantize` takes them; what is returned as well.
        gram: XᵀX of the inputs, `(in, in)`.
        act_order: the columns with the largest inputs come first; the result is in the original order.
        factor: `inverse_factor` of the gram in the order of rounding (`rounding_order`), if it is known.
        keep_zeros: a weight that is zero is rounded to zero; the next ones make up for it.
    """
    order = rounding_order(gram, act_order)
    if factor is None:
        factor = inverse_factor(gram[order][:, order], damping=damping)
    integers, scales, zeros = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    size = min(group_size or weight.shape[1], weight.shape[1])
    scales_in_turn = group_size is not None and not act_order
    fixed = (weight.detach() == 0).t()[order] if keep_zeros else None

    def with_zeros(columns: Tensor, rows: slice | int) -> Tensor:
        return columns if fixed is None else columns.masked_fill(fixed[rows], 0)

    def round_columns(first: int, block: Tensor, pivots: Tensor) -> Iterator[Tensor]:
        for j, column in enumerate(order[first : first + len(block)].tolist()):
            group = slice(column // size, column // size + 1)
            if scales_in_turn and column % size == 0:
                now = with_zeros(block[j : j + size], slice(first + j, first + j + size))
                _, new_scales, new_zeros = quantize(now.t().to(weight.dtype), bits=bits, symmetric=symmetric)
                scales[:, group] = new_scales
                if zeros is not None:
                    zeros[:, group] = new_zeros
            zero = None if zeros is None else zeros[:, group]
            target = with_zeros(block[j], first + j)
            rounded = to_grid(target[:, None], scales[:, group], zero, bits)
            integers[:, column] = rounded[:, 0]
            yield (block[j] - from_grid(rounded, scales[:, group].float(), zero)[:, 0]) / pivots[j]

    columns, block_unit = _columns_first(weight)[order], size if scales_in_turn else BLOCK
    _column_by_column(columns, factor, block_unit, round_columns)
    return integers, scales, zeros


def rounding_order(gram: Tensor, act_order: bool) -> Tensor:
    """Return the columns in the order of rounding: largest inputs first, or as they come; `(in,)`."""
    if act_order:
        return gram.diagonal().argsort(descending=True, stable=True)
    return torch.arange(len(gram), device=gram.device)


def _columns_first(weight: Tensor) -> Tensor:
    """Return a float32 copy of `weight` `(out, in)` as contiguous `(in, out)`."""
    return weight.detach().float().t().clone(memory_format=torch.contiguous_format)


def _column_by_column(columns: Tensor, factor: Tensor, group: int, errors_of: Callable) -> None:
    """Change `columns` `(in, out)` one by one, and spread each one's error over those still to come.

    Removing or rounding w_j costs (w_j − ŵ_j)² / [H⁻¹]_jj, and the others move by −(w_j − ŵ_j) / [H⁻¹]_jj ·
    H⁻¹_j (Frantar & Alistarh 2022, eq. 2 and 3). With one order of columns for all rows, the inverses of the
    columns to come are the rows of one Cholesky factor U, H⁻¹ = UᵀU, [H⁻¹]_jj = U_jj² (2023, section 3).

    Args:
        columns: the weights; changed in place.
        factor: `inverse_factor` of the columns as they are ordered here.
        group: columns that must be in one block.
        errors_of: given the number of a block's first column, the block `(columns, out)` and its pivots U_jj
            `(columns, 1)`, yields each column's error (w_j − ŵ_j) / U_jj, `(out,)`; it may change the block,
            and goes on once that is updated.
    """
    span = BLOCK // group * group or group
    for first in range(0, len(columns), span):
        last = min(first + span, len(columns))
        block, corner = columns[first:last].clone(), factor[first:last, first:last]
        errors = torch.zeros_like(block)
        for j, error in enumerate(errors_of(first, block, corner.diagonal()[:, None])):
            errors[j] = error
            # w_k −= (w_j − ŵ_j) / U_jj · U_jk for the k > j of this block (GPTQ, alg. 1) …
            block[j + 1 :].addr_(corner[j, j + 1 :], error, alpha=-1)
        columns[first:last] = block
        # … and for all blocks after it at once, which is what makes it fast.
        columns[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
