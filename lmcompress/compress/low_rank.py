"""Low rank: each linear layer as two narrow ones, by SVD, or as an element-wise product of two such pairs.

Also what `sharing` and `abaco` have in common with it: layers meant, what a rank costs, what it lost.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import calibrate
from lmcompress.compress.low_rank_layers import Factorised, Hadamard, matrix_of, replace_linear
from lmcompress.compress.quantization import compare_errors, output_errors
from lmcompress.compress.second_order import FactorCache, four_digits, relative_errors
from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models.anatomy import LinearLayer, prunable

Rank = int | float  # a fraction of the break-even rank; see `rank_for`
Blocks = Sequence[int] | None  # positions within a stack; None: all
KINDS = {"all": ("attention", "cross-attention", "feed-forward", "other")}
KINDS |= {"attention": KINDS["all"][:2], "ffn": KINDS["all"][2:3]}
_ROWS_BYTES = 64 << 20  # normal equations of `hadamard_factors` that are solved together


def break_even(out_features: int, in_features: int, *, layers: int = 1, pairs: int = 1) -> float:
    """Return the rank at which nothing is saved: seldom whole.

    `layers` share one `(rank, in)`; 1 gives r* = in·out/(in + out). A matrix is made of `pairs` of factors.
    """
    return layers * in_features * out_features / (pairs * (in_features + layers * out_features))


def rank_for(rank: Rank, out_features: int, in_features: int, *, layers: int = 1, pairs: int = 1) -> int:
    """Return `rank` itself if whole, or the largest that keeps at most this fraction of the break-even rank.

    So a fraction means the same bytes for every technique. At least 1, at most the full rank.
    """
    full = min(in_features, layers * out_features)
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not whole and not isinstance(rank, float) or not 0 < rank < float("inf") or whole and rank > full:
        raise BadSetting(
            f"rank={rank!r} does not suit a layer of {out_features} x {in_features}: give a whole number "
            f"from 1 to {full}, or a fraction of its break-even rank such as 0.5 (at 1.0 no bytes are saved)."
        )
    if whole:
        return rank
    budget = rank * break_even(out_features, in_features, layers=layers, pairs=pairs)
    return max(1, min(full, int(budget + 1e-9)))  # the sum keeps 2 · 16.0 from becoming 31


def select_layers(model: nn.Module, kinds: str = "all", blocks: Blocks = None) -> list[LinearLayer]:
    """Return the linear layers of `kinds` ("all", "attention", "ffn") in these blocks, at least one."""
    if kinds not in KINDS:
        raise BadSetting(f"kinds={kinds!r}; it takes {', '.join(map(repr, KINDS))}")
    layers = prunable(model)
    positions = sorted({layer.block for layer in layers})
    if blocks is not None and (unknown := [block for block in blocks if block not in positions]):
        raise BadSetting(f"no block {', '.join(map(str, unknown))}: a stack has blocks {positions}.")
    positions = positions if blocks is None else blocks
    layers = [layer for layer in layers if layer.kind in KINDS[kinds] and layer.block in positions]
    if not layers:
        raise NothingTouched(
            f"kinds={kinds!r} and blocks={blocks!r} leave no layer of {type(model).__name__}."
        )
    return layers


def weight_figures(model: nn.Module, originals: Mapping[str, Tensor]) -> dict:
    """Return how far matrices are from their `originals`, by layer's name, and how many weights hold them.

    "weight_error" is ‖W - Ŵ‖_F / ‖W‖_F over all layers, and by layer; "weight_error_geometric" divides by
    √(‖W‖‖Ŵ‖) (null where that is zero, and the error is not). Weights that are shared count once, biases not.
    """
    sums, by_layer, ranks, after = torch.zeros(3, dtype=torch.float64), {}, {}, {}
    for name, original in originals.items():
        module = model.get_submodule(name)
        was, now = original.detach().double(), matrix_of(module).detach().double()
        squares = torch.stack([matrix.square().sum() for matrix in (was - now, was, now)]).cpu()
        sums += squares
        by_layer[name] = four_digits(*relative_errors(squares[:2]))
        after |= {id(p): p.numel() for p in module.parameters() if p.dim() == 2}
        ranks |= {name: module.rank} if hasattr(module, "rank") else {}
    error, before, now = sums.sqrt().tolist()

    def relative(size: float) -> float | None:
        return error / size if size else None if error else 0.0

    return {
        "weight_error": relative(before),
        "weight_error_geometric": relative((before * now) ** 0.5),
        "weight_error_by_layer": by_layer,
        "weights_before": sum({t.data_ptr(): t.numel() for t in originals.values()}.values()),
        "weights_after": sum(after.values()),
    } | ({"rank_by_layer": ranks} if ranks else {})


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of `rank` (Eckart & Young 1936): U_r S_r and V_rᵀ, in float64.

    By the eigenvectors of the smaller Gram matrix: much faster than a whole SVD. The largest entry of every
    row of V_rᵀ is positive.

    Returns:
        `(out, rank)`, and `(rank, in)` with orthonormal rows, largest singular value first.
    """
    wide = matrix.detach().double()
    if wide.shape[0] <= wide.shape[1]:
        lefts = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :rank]
        right = lefts.T @ wide
        values = right.norm(dim=1).clamp_min(1e-300)
        lefts, right = lefts * values, right / values[:, None]
    else:
        right = torch.linalg.eigh(wide.T @ wide)[1].flip(1)[:, :rank].T
        lefts = wide @ right.T
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    signs[signs == 0] = 1
    return lefts * signs[:, 0], right * signs


def factorise(model: nn.Module, layer: LinearLayer, *factors: Tensor) -> None:
    """Put L, G (`(out, rank)`, `(rank, in)`) in place of `layer`, or a Hadamard product's A₁, B₁, A₂, B₂.

    A factor that is a Parameter is used as it is, so that layers can share it.
    """
    dtype = layer.module.weight.dtype
    stored = [f if isinstance(f, nn.Parameter) else nn.Parameter(f.to(dtype).contiguous()) for f in factors]
    kind, ordered = (Factorised, stored[::-1]) if len(stored) == 2 else (Hadamard, stored)
    replace_linear(model, layer.module, lambda bias: kind(*ordered, bias))


def factorise_each(
    model: nn.Module, layers: Sequence[LinearLayer], rank: Rank, factors: Callable, pairs: int = 1
) -> dict[str, Tensor]:
    """Put `factors(matrix, rank)` in place of each layer; return the matrices before by layer's name."""
    originals = {}
    for layer in layers:
        originals[layer.name] = layer.weight2d().detach()
        layer_rank = rank_for(rank, layer.out_features, layer.in_features, pairs=pairs)
        factorise(model, layer, *factors(originals[layer.name], layer_rank))
    return originals


@technique("low-rank", 1, "SVD", "#5E3C99", "s")
def low_rank(model: nn.Module, context: Context, *, rank: Rank, kinds: str = "all", blocks: Blocks = None):
    """Replace each layer by U_r S_r and V_rᵀ, two linear layers, the bias on one: no text looked at."""
    originals = factorise_each(model, select_layers(model, kinds, blocks), rank, truncated_svd)
    return model, TechniqueResult("low-rank", len(originals), weight_figures(model, originals))


@technique("low-rank-aware", 2, "Activation-aware SVD", "#17BECF", "H", needs=("calibration",))
@torch.no_grad()
def low_rank_aware(
    model, context: Context, *, rank: Rank, kinds: str = "all", blocks: Blocks = None, damping: float = 0.01
):
    """Factorise W C = U S Vᵀ, C Cᵀ = XXᵀ + λI, for the least output error (SVD-LLM, Wang et al. 2024).

    The layers are U_r S_r and V_rᵀ C⁻¹. `achieved` has ‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration text as
    "output_error", with that of a plain SVD on the same inputs, which it is never above.
    """
    layers = {layer.name: layer for layer in select_layers(model, kinds, blocks)}
    ranks = {name: rank_for(rank, layer.out_features, layer.in_features) for name, layer in layers.items()}
    originals, errors, factors = {}, {}, FactorCache(damping)
    for step in calibrate(model, context.calibration, collect=("gram",)):
        for name, gram in ((name, stat.gram) for name, stat in step.stats.items() if name in layers):
            weight = originals[name] = layers[name].weight2d().detach()
            factor = factors.of(gram).double()  # C⁻¹: (H + λI)⁻¹ = UᵀU
            whitened = torch.linalg.solve_triangular(factor, weight.double(), upper=True, left=False)
            second, first = truncated_svd(whitened, ranks[name])
            first = first @ factor
            # Rows get unit length, as a plain SVD's have: else they are as short as C is large (it grows with
            # the text), and one step of an optimizer sweeps them away.
            lengths = first.norm(dim=1).clamp_min(1e-300)
            factorise(model, layers[name], second * lengths, first / lengths[:, None])
            plain = torch.mm(*truncated_svd(weight, ranks[name]))
            errors[name] = output_errors(weight, gram.double(), [matrix_of(model.get_submodule(name)), plain])
    figures = weight_figures(model, originals) | compare_errors("aware", errors, "svd")
    return model, TechniqueResult("low-rank-aware", len(layers), figures)


@technique("hadamard", 1, "Hadamard product", "#332288", "1", needs=("seed",))
def hadamard(
    model, context: Context, *, rank: Rank, kinds: str = "all", blocks: Blocks = None, steps: int = 10
):
    """Replace each matrix by (A₁B₁) ∘ (A₂B₂), of rank up to rank². Calls multiply it out: saves bytes only.

    `rank` is that of each product; the time of one of the `steps` of least squares grows with in·out·rank².
    """
    factors = partial(hadamard_factors, steps=steps, seed=context.seed)
    originals = factorise_each(model, select_layers(model, kinds, blocks), rank, factors, pairs=2)
    return model, TechniqueResult("hadamard", len(originals), weight_figures(model, originals))


@torch.no_grad()
def hadamard_factors(matrix: Tensor, rank: int, *, steps: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return A₁ `(out, rank)`, B₁ `(rank, in)`, A₂, B₂ by alternating least squares, in float64.

    Begins with the truncated SVD times a second product of ones, disturbed so that its rank can be used; the
    best round is returned, never worse than the SVD.
    """
    wide = matrix.detach().double()
    draw = torch.Generator().manual_seed(seed)
    a1, b1 = truncated_svd(wide, rank)
    all_ones = torch.zeros_like(a1), torch.zeros_like(b1)  # two factors whose product is 1 everywhere
    all_ones[0][:, 0], all_ones[1][0] = 1, 1
    noise = (torch.randn(f.shape, generator=draw, dtype=f.dtype).to(f.device) for f in all_ones)
    a2, b2 = (factor + 0.1 * change for factor, change in zip(all_ones, noise, strict=True))
    best, best_error = (a1, b1, *all_ones), (wide - a1 @ b1).norm()
    for _ in range(steps):
        a1 = _rows(wide, b1, a2 @ b2)
        b1 = _rows(wide.T, a1.T, (a2 @ b2).T).T
        a2 = _rows(wide, b2, a1 @ b1)
        b2 = _rows(wide.T, a2.T, (a1 @ b1).T).T
        if (error := (wide - (a1 @ b1) * (a2 @ b2)).norm()) < best_error:
            best, best_error = (a1, b1, a2, b2), error
    return best


def _rows(target: Tensor, basis: Tensor, factor: Tensor) -> Tensor:
    """Return the A that minimises ‖target - (A basis) ∘ factor‖: one small least-squares system per row."""
    rank, solutions = len(basis), []
    i, j = torch.triu_indices(rank, rank, device=basis.device)
    pairs = (basis[i] * basis[j]).T  # (columns, pairs): the systems of all rows are one product with it
    size = max(1, _ROWS_BYTES // (8 * rank**2))
    for goal, by in zip(target.split(size), factor.split(size), strict=True):
        normal = basis.new_empty(len(goal), rank, rank)
        normal[:, i, j] = normal[:, j, i] = by.square() @ pairs
        scale = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
        normal.diagonal(dim1=1, dim2=2).add_(1e-10 * scale[:, None])
        solutions.append(torch.linalg.solve(normal, (by * goal) @ basis.T))
    return torch.cat(solutions)
