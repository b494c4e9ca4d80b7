"""Low rank: each linear map of the blocks as two narrow ones, by SVD, or as an element-wise product of two such pairs.

Also what `sharing` and `adapters` have in common with it: which maps are meant, what a rank costs, what it lost.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import calibrate
from lmcompress.compress.low_rank_layers import Factorised, Hadamard, matrix_of, replace_maps
from lmcompress.compress.second_order import inverse_factor
from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models.anatomy import LinearLayer, prunable

KINDS = {"all": ("attention", "cross-attention", "feed-forward")}
KINDS |= {"attention": KINDS["all"][:2], "ffn": KINDS["all"][2:]}
_ROWS_BYTES = 64 << 20  # normal equations of `hadamard_factors` that are solved together


def break_even(out_features: int, in_features: int, *, layers: int = 1, pairs: int = 1) -> float:
    """The rank at which nothing is saved: layers·in·out / (pairs·(in + layers·out)), seldom a whole number.

    Args:
        layers: how many maps share one `(rank, in)`; 1 gives r* = in·out/(in + out).
        pairs: how many products of two factors a map is made of; a Hadamard product has 2.
    """
    return layers * in_features * out_features / (pairs * (in_features + layers * out_features))


def rank_for(
    rank: int | float, out_features: int, in_features: int, *, layers: int = 1, pairs: int = 1
) -> int:
    """The rank asked for: itself if whole, or the largest that keeps at most this fraction of the weights.

    A fraction is one of the break-even rank, so that it means the same bytes for every technique; from 2.0 on every
    map of its own (`layers=1, pairs=1`) has full rank. At least 1 and at most the full rank, min(in, layers·out).

    Raises:
        BadSetting: no number, not above 0, or a whole number above the full rank.
    """
    full = min(in_features, layers * out_features)
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not whole and not isinstance(rank, float) or not 0 < rank < float("inf") or whole and rank > full:
        raise BadSetting(
            f"rank={rank!r} does not suit a map of {out_features} x {in_features}: give a whole number from 1 to "
            f"{full}, or a fraction of its break-even rank such as 0.5 (at 1.0 no bytes are saved)."
        )
    if whole:
        return rank
    budget = rank * break_even(out_features, in_features, layers=layers, pairs=pairs)
    return max(1, min(full, int(budget + 1e-9)))  # the sum keeps 2 · 16.0 from becoming 31


def chosen_maps(
    model: nn.Module, kinds: str = "all", blocks: Sequence[int] | None = None
) -> list[LinearLayer]:
    """The linear maps of `kinds` ("all", "attention" or "ffn") in the blocks with these positions (None: all).

    Raises:
        BadSetting: no such kinds or blocks.
        NothingTouched: there is no such map.
    """
    if kinds not in KINDS:
        raise BadSetting(f"kinds={kinds!r}; it takes {', '.join(map(repr, KINDS))}")
    maps = prunable(model)
    there = sorted({one.block for one in maps})
    if blocks is not None and (strange := [one for one in blocks if one not in there]):
        raise BadSetting(f"no block {', '.join(map(str, strange))}: a stack has blocks {there}.")
    wanted = there if blocks is None else blocks
    maps = [one for one in maps if one.kind in KINDS[kinds] and one.block in wanted]
    if not maps:
        raise NothingTouched(f"kinds={kinds!r} and blocks={blocks!r} leave no map of {type(model).__name__}.")
    return maps


def weight_figures(model: nn.Module, originals: Mapping[str, Tensor]) -> dict:
    """How far the matrices are from what they were, and how many weights hold them now.

    Args:
        originals: map's name -> its matrix `(out, in)` before.

    Returns:
        "weight_error" ‖W - Ŵ‖_F / ‖W‖_F over all maps, and by layer; "weight_error_geometric", over √(‖W‖‖Ŵ‖)
        instead (null if Ŵ is zero); "weights_before" and "weights_after", shared ones counted once, biases not;
        "rank_by_layer" where there are ranks.
    """
    sums, by_layer, ranks, after = torch.zeros(3, dtype=torch.float64), {}, {}, {}
    for name, original in originals.items():
        module = model.get_submodule(name)
        was, now = original.detach().double(), matrix_of(module).detach().double()
        parts = torch.stack([(was - now).square().sum(), was.square().sum(), now.square().sum()]).cpu()
        sums += parts
        by_layer[name] = _digits((parts[0] / parts[1]).sqrt())
        after |= {id(p): p.numel() for p in module.parameters() if p.dim() == 2}
        ranks |= {name: module.rank} if hasattr(module, "rank") else {}
    error, before, now = sums.sqrt().tolist()
    return {
        "weight_error": error / before,
        "weight_error_geometric": error / (before * now) ** 0.5 if now else None,
        "weight_error_by_layer": by_layer,
        "weights_before": sum({t.data_ptr(): t.numel() for t in originals.values()}.values()),
        "weights_after": sum(after.values()),
    } | ({"rank_by_layer": ranks} if ranks else {})


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `rank` in the Frobenius norm (Eckart & Young 1936): U_r S_r and V_rᵀ, in float64.

    From the eigenvectors of the smaller Gram matrix, onto which the matrix itself is projected: much faster than a
    whole SVD. Signs are such that the largest entry of every row of V_rᵀ is positive.

    Returns:
        `(out, rank)`, and `(rank, in)` with orthonormal rows, largest singular value first.
    """
    wide = matrix.detach().double()
    if wide.shape[0] <= wide.shape[1]:
        left = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :rank]
        right = left.T @ wide
        values = right.norm(dim=1).clamp_min(1e-300)
        left, right = left * values, right / values[:, None]
    else:
        right = torch.linalg.eigh(wide.T @ wide)[1].flip(1)[:, :rank].T
        left = wide @ right.T
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    signs[signs == 0] = 1
    return left * signs[:, 0], right * signs


def factorise(model: nn.Module, one: LinearLayer, second: Tensor, first: Tensor) -> None:
    """Put second · first (`(out, rank)`, `(rank, in)`) in the place of the map `one`; a Parameter is used as it is."""
    first, second = as_parameters(one.module.weight.dtype, first, second)
    replace_maps(model, one.module, lambda bias: Factorised(first, second, bias))


def as_parameters(dtype: torch.dtype, *parts: Tensor) -> list[nn.Parameter]:
    """Each part as a contiguous Parameter of `dtype`; those that are one already untouched."""
    return [p if isinstance(p, nn.Parameter) else nn.Parameter(p.to(dtype).contiguous()) for p in parts]


@technique(name="low-rank", version=1, title="Low rank, SVD", colour="#5E3C99", marker="s")
def low_rank(
    model: nn.Module,
    context: Context,
    *,
    rank: int | float,
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
):
    """Each map as U_r S_r and V_rᵀ, two linear maps, with the bias on the second: no text looked at.

    Args:
        rank: of every map, or a fraction of its break-even rank; see `rank_for`.
        kinds, blocks: which maps; see `chosen_maps`.
    """
    originals = {}
    for one in chosen_maps(model, kinds, blocks):
        originals[one.name] = one.weight2d().detach()
        wanted = rank_for(rank, one.out_features, one.in_features)
        factorise(model, one, *truncated_svd(originals[one.name], wanted))
    return model, TechniqueResult("low-rank", len(originals), weight_figures(model, originals))


@technique(
    name="low-rank-aware",
    version=2,
    title="Low rank, activation-aware",
    colour="#17BECF",
    marker="H",
    needs=("calibration",),
)
@torch.no_grad()
def low_rank_aware(
    model: nn.Module,
    context: Context,
    *,
    rank: int | float,
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
    damping: float = 0.01,
):
    """SVD of W C with C Cᵀ = XXᵀ + λI, then V_rᵀ C⁻¹: the smallest error of the outputs (SVD-LLM, Wang et al. 2024).

    The rows of V_rᵀ C⁻¹ get unit length, as a plain SVD's have: C grows with the text looked at, and left as they come
    out they are so short that one step of an optimizer sweeps them away. Block by block, with the inputs that the factorised blocks before give. `achieved` has ‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ over
    the calibration text as "output_error", beside that of a plain SVD on the same inputs, which it is never above.

    Args:
        context.calibration: batches of text whose activations are looked at.
        rank, kinds, blocks: as for "low-rank".
        damping: λ as a fraction of the mean diagonal of XXᵀ.
    """
    maps = {one.name: one for one in chosen_maps(model, kinds, blocks)}
    ranks = {name: rank_for(rank, one.out_features, one.in_features) for name, one in maps.items()}
    originals, errors = {}, {}
    for step in calibrate(model, context.calibration, collect=("gram",)):
        factors: dict[str, Tensor] = {}  # q, k and v read the same inputs
        for one, gram in ((maps[name], stat.gram) for name, stat in step.stats.items() if name in maps):
            weight = originals[one.name] = one.weight2d().detach()
            same = next((known for known in factors if torch.equal(step.stats[known].gram, gram)), one.name)
            if same not in factors:
                factors[same] = inverse_factor(gram, damping=damping).double()  # C⁻¹: (H + λI)⁻¹ = UᵀU
            whitened = torch.linalg.solve_triangular(factors[same], weight.double(), upper=True, left=False)
            second, first = _levelled(*truncated_svd(whitened, ranks[one.name]), factors[same])
            factorise(model, one, second, first)
            plain = torch.mm(*truncated_svd(weight, ranks[one.name]))
            moved = [weight - matrix_of(model.get_submodule(one.name)), weight - plain, weight]
            errors[one.name] = torch.stack([((m.double() @ gram.double()) * m).sum() for m in moved]).cpu()
    return model, TechniqueResult(
        "low-rank-aware", len(maps), weight_figures(model, originals) | _output_errors(errors)
    )


def _levelled(second: Tensor, first: Tensor, whitening: Tensor) -> tuple[Tensor, Tensor]:
    """`second` and `first · whitening`, whose product stays, with the lengths of the latter's rows moved to the former."""
    first = first @ whitening
    lengths = first.norm(dim=1).clamp_min(1e-300)
    return second * lengths, first / lengths[:, None]


def _output_errors(errors: dict[str, Tensor]) -> dict:
    """Relative errors from sums of squares (activation-aware, plain, whole output) by layer."""

    def relative(sums: Tensor) -> list[float]:
        return (sums[:2] / sums[2]).clamp(min=0).sqrt().tolist()

    ours, plain = relative(sum(errors.values()))
    pairs = {name: [_digits(one) for one in relative(sums)] for name, sums in errors.items()}
    return {
        "output_error": ours,
        "output_error_svd": plain,
        "output_error_by_layer": {name: {"aware": a, "svd": b} for name, (a, b) in pairs.items()},
    }


@technique(
    name="hadamard", version=1, title="Hadamard product", colour="#332288", marker="1", needs=("seed",)
)
def hadamard(
    model: nn.Module,
    context: Context,
    *,
    rank: int | float,
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
    steps: int = 10,
):
    """Each map as (A₁B₁) ∘ (A₂B₂), of rank up to rank²; every call multiplies the matrices out, so only bytes are saved.

    Args:
        rank: of each of the two products, or a fraction of the rank at which nothing is saved.
        kinds, blocks: as for "low-rank".
        steps: rounds of alternating least squares; the time of one grows with in·out·rank².
        context.seed: of the first A₂ and B₂.
    """
    originals = {}
    for one in chosen_maps(model, kinds, blocks):
        originals[one.name] = one.weight2d().detach()
        wanted = rank_for(rank, one.out_features, one.in_features, pairs=2)
        found = hadamard_factors(originals[one.name], wanted, steps=steps, seed=context.seed)
        parts = as_parameters(one.module.weight.dtype, *found)
        replace_maps(model, one.module, lambda bias, parts=parts: Hadamard(*parts, bias))
    return model, TechniqueResult("hadamard", len(originals), weight_figures(model, originals))


@torch.no_grad()
def hadamard_factors(matrix: Tensor, rank: int, *, steps: int, seed: int = 0) -> tuple[Tensor, ...]:
    """A₁ `(out, rank)`, B₁ `(rank, in)`, A₂, B₂ by alternating least squares, in float64.

    Begins with the truncated SVD times a second product of ones, disturbed so that its rank can be used; the best
    round is kept, so the result is never worse than the SVD of this rank.
    """
    wide = matrix.detach().double()
    draw = torch.Generator().manual_seed(seed)
    a1, b1 = truncated_svd(wide, rank)
    ones = torch.zeros_like(a1), torch.zeros_like(b1)
    ones[0][:, 0], ones[1][0] = 1, 1
    noise = (torch.randn(one.shape, generator=draw, dtype=one.dtype).to(one.device) for one in ones)
    a2, b2 = (one + 0.1 * other for one, other in zip(ones, noise, strict=True))
    best, least = (a1, b1, *ones), (wide - a1 @ b1).norm()
    for _ in range(steps):
        a1 = _rows(wide, b1, a2 @ b2)
        b1 = _rows(wide.T, a1.T, (a2 @ b2).T).T
        a2 = _rows(wide, b2, a1 @ b1)
        b2 = _rows(wide.T, a2.T, (a1 @ b1).T).T
        if (error := (wide - (a1 @ b1) * (a2 @ b2)).norm()) < least:
            best, least = (a1, b1, a2, b2), error
    return best


def _rows(target: Tensor, basis: Tensor, factor: Tensor) -> Tensor:
    """The A that minimises ‖target - (A basis) ∘ factor‖: weighted least squares, one small system per row."""
    rank, found = len(basis), []
    i, j = torch.triu_indices(rank, rank, device=basis.device)
    pairs = (basis[i] * basis[j]).T  # (columns, pairs): the systems of all rows are one product with it
    size = max(1, _ROWS_BYTES // (8 * rank**2))
    for goal, by in zip(target.split(size), factor.split(size), strict=True):
        normal = basis.new_empty(len(goal), rank, rank)
        normal[:, i, j] = normal[:, j, i] = by.square() @ pairs
        scale = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
        normal.diagonal(dim1=1, dim2=2).add_(1e-10 * scale[:, None])
        found.append(torch.linalg.solve(normal, (by * goal) @ basis.T))
    return torch.cat(found)


def _digits(value: Tensor | float) -> float:
    return float(f"{float(value):.4g}")
