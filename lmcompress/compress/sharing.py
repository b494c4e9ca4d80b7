"""Layers that share weights: one basis for a series (global basis, GLAM), or one layer for all of it (MASS).

A series is the linear layers of one stack, role and shape, block after block.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.low_rank import (
    factorise,
    factorise_by_svd,
    rank_for,
    select_layers,
    truncated_svd,
    weight_figures,
)
from lmcompress.compress.low_rank_layers import Factorised, linear, replace_linear
from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models.anatomy import LinearLayer
from lmcompress.train.trainer import curve, fit

INITS = ("mean", "stacked", "random")


def series_of(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """Return the series with at least two layers.

    Raises:
        NothingTouched: there is none.
    """
    by_place: dict[tuple, list[LinearLayer]] = {}
    for layer in layers:
        tail = layer.name.rpartition(".")[2]
        key = layer.stack, layer.kind, layer.role, tail, layer.out_features, layer.in_features
        by_place.setdefault(key, []).append(layer)
    if not (series := [members for members in by_place.values() if len(members) > 1]):
        raise NothingTouched(
            "no two blocks have a layer of the same role and shape with weights of its own: there is nothing "
            "to share. ALBERT shares already; else choose at least two blocks."
        )
    return series


@technique("global-basis", 1, "Global basis", "#D55E00", "h", needs=("seed",))
def global_basis(
    model: nn.Module,
    context: Context,
    *,
    rank: int | float,
    init: str = "mean",
    joint_steps: int = 0,
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
):
    """Give each series one basis G, W_l ≈ L_l G with L_l = W_l G⁺; the layers share the Parameter G.

    Args:
        rank: of the bases, or a fraction of their break-even rank: the bytes that this fraction has in "low-
            rank".
        init: G from the right singular vectors of the series' mean ("mean", whose rank ends at min(in, out)),
            or of its stacked matrices ("stacked", the least squares optimum); "random" is normal and never
            trained.
        joint_steps: rounds of alternating least squares over all L_l and G.
        kinds, blocks: as for "low-rank"; a layer without another to share with is left alone.
        context.seed: of a random G.
    """
    if init not in INITS or joint_steps < 0 or (init == "random" and joint_steps):
        raise BadSetting(
            f"init={init!r}, joint_steps={joint_steps!r}: init is one of {', '.join(INITS)}, joint_steps at "
            f"least 0, "
            'and 0 with "random", whose basis stays as drawn.'
        )
    originals, draw = {}, torch.Generator().manual_seed(context.seed)
    for series in series_of(select_layers(model, kinds, blocks)):
        matrices = torch.stack([layer.weight2d().detach() for layer in series])
        count, out_features, in_features = matrices.shape
        basis_rank = rank_for(rank, out_features, in_features, layers=count)
        if init == "mean":
            basis_rank = min(basis_rank, out_features, in_features)
        basis = first_basis(matrices.double(), basis_rank, init, draw)
        basis, lefts = joint_fit(matrices.double(), basis, joint_steps)
        shared = nn.Parameter(basis.to(matrices.dtype).contiguous(), requires_grad=init != "random")
        for layer, left_factor in zip(series, lefts, strict=True):
            originals[layer.name] = layer.weight2d().detach()
            factorise(model, layer, left_factor, shared)
    return model, TechniqueResult("global-basis", len(originals), weight_figures(model, originals))


@torch.no_grad()
def first_basis(matrices: Tensor, rank: int, init: str, draw: torch.Generator | None = None) -> Tensor:
    """Return G `(rank, in)` for `matrices` `(layers, out, in)` in float64; see `global_basis` for `init`."""
    if init == "random":
        shape = rank, matrices.shape[2]
        drawn = torch.randn(shape, generator=draw, dtype=matrices.dtype) / shape[1] ** 0.5
        return drawn.to(matrices.device)
    return truncated_svd(matrices.mean(0) if init == "mean" else matrices.flatten(0, 1), rank)[1]


@torch.no_grad()
def joint_fit(matrices: Tensor, basis: Tensor, steps: int = 0) -> tuple[Tensor, Tensor]:
    """Return G and L_l = W_l G⁺ `(layers, out, rank)`; `steps` rounds minimise Σ‖W_l - L_l G‖² in turn."""
    for _ in range(steps):
        lefts = matrices @ torch.linalg.pinv(basis)
        basis = torch.linalg.pinv(lefts.flatten(0, 1)) @ matrices.flatten(0, 1)
    return basis, matrices @ torch.linalg.pinv(basis)


@technique("glam", 1, "GLAM", "#E69F00", "*", needs=("train",))
def glam(
    model: nn.Module,
    context: Context,
    *,
    rank: int | float,
    weight: float = 0.1,
    every: int = 10,
    threshold: float = 0.5,
    distance: str = "relative",
    kinds: str = "all",
    blocks: Sequence[int] | None = None,
):
    """Factorise by SVD, fine-tune with λ Σ_{i<j} ‖G_i - G_j‖₁ over bases of one shape, merge the closest.

    λ rises linearly from 0 to where the first penalty would be `weight` times the last recorded loss. Merged
    bases become their mean, each counting with the layers that use it, and one Parameter.

    Args:
        context.train: data, steps and rate; the run is not checkpointed, since the bases that are one are not
        either.
        rank, kinds, blocks: as for "low-rank"; the rank of each layer before any merge.
        weight: of the penalty at the end.
        every: steps between two merges, of one pair each.
        threshold: the distance below which the closest pair is merged.
        distance: "l1", ‖G_i - G_j‖₁, or "relative", that over √‖G_i‖₁ √‖G_j‖₁.
    """
    if distance not in ("l1", "relative") or weight < 0 or every < 1 or threshold < 0:
        raise BadSetting(
            f'distance={distance!r} is "l1" or "relative"; weight={weight} and threshold={threshold} are at '
            f"least 0, every={every} at least 1."
        )
    layers = select_layers(model, kinds, blocks)
    originals = factorise_by_svd(model, layers, rank)
    stacks = {layer.name: layer.stack for layer in layers}
    bases = _Bases({name: model.get_submodule(name) for name in originals}, stacks)
    if not bases.groups():
        raise NothingTouched(
            "no two bases have one shape within a stack: choose more layers, or another rank."
        )
    first, merges = float(bases.penalty().detach()), []
    history_of_bases = [[0, bases.assignment()]]

    def before_step(step: int, done: list[dict]) -> None:
        if done and len(done) % every == 0 and (merged := bases.merge(threshold, distance)):
            merges.append({"step": len(done), **merged})
            history_of_bases.append([len(done), bases.assignment()])
        if done and first and weight and bases.groups():
            scale = weight * (step / context.train.steps) * done[-1]["loss"] / first
            (scale * bases.penalty()).backward()

    history = fit(model, replace(context.train, checkpoint=None), before_step=before_step)
    figures = weight_figures(model, originals) | {
        "merges": merges,
        "bases": len(set(bases.assignment())),
        "basis_layers": list(originals),
        "basis_by_layer": history_of_bases,
        "curve": curve(history),
    }
    return model, TechniqueResult("glam", len(originals), figures)


class _Bases:
    """The bases of factorised layers by shape within a stack, as they become one another."""

    def __init__(self, layers: dict[str, Factorised], stacks: dict[str, str]):
        self.layers, self.stacks = layers, stacks
        self.numbers = {id(layer.first.weight): n for n, layer in enumerate(layers.values())}

    def groups(self) -> list[list[list[str]]]:
        """Return for each stack and shape the layers of each basis, in groups of at least two bases."""
        by_shape: dict[tuple, dict[int, list[str]]] = {}
        for name, layer in self.layers.items():
            basis = layer.first.weight
            shape = self.stacks[name], *basis.shape
            by_shape.setdefault(shape, {}).setdefault(id(basis), []).append(name)
        return [list(users.values()) for users in by_shape.values() if len(users) > 1]

    def assignment(self) -> list[int]:
        """Return for each layer the number of the layer whose basis it uses."""
        return [self.numbers[id(layer.first.weight)] for layer in self.layers.values()]

    def penalty(self) -> Tensor:
        """Return Σ_{i<j} ‖G_i - G_j‖₁ in each group, from sorted entries: Σ_k (2k - n + 1) g_(k)."""
        total = next(iter(self.layers.values())).first.weight.new_zeros(())
        for users in self.groups():
            together = torch.stack([self.layers[names[0]].first.weight for names in users])
            ranks = torch.arange(len(users), device=together.device, dtype=together.dtype)
            signs = (2 * ranks - len(users) + 1)[:, None, None]
            total = total + (together.sort(0).values * signs).sum()
        return total

    @torch.no_grad()
    def merge(self, threshold: float, distance: str) -> dict | None:
        """Make the closest two bases one if they are closer than `threshold`; return which and how close."""
        closest: tuple[float, list[str], list[str]] | None = None
        for users in self.groups():
            flat = torch.stack([self.layers[names[0]].first.weight.flatten() for names in users])
            apart = torch.cdist(flat, flat, p=1)
            if distance == "relative":
                norms = flat.abs().sum(1).sqrt()
                apart = apart / (norms[:, None] * norms).clamp_min(torch.finfo(norms.dtype).tiny)
            apart.fill_diagonal_(float("inf"))
            i, j = divmod(int(apart.argmin()), len(users))
            if closest is None or float(apart[i, j]) < closest[0]:
                closest = float(apart[i, j]), users[i], users[j]
        if closest is None or closest[0] >= threshold:
            return None
        apart, users, absorbed = closest
        basis, other = (self.layers[names[0]].first.weight for names in (users, absorbed))
        basis.lerp_(other, len(absorbed) / (len(users) + len(absorbed)))
        for name in absorbed:
            self.layers[name].first.weight = basis
        return {"layers": [users, absorbed], "distance": float(f"{apart:.4g}")}


@torch.no_grad()
def share_means(
    model: nn.Module, kinds: str, blocks: Sequence[int] | None
) -> tuple[dict[str, Tensor], list[nn.Linear]]:
    """Point every layer of a series at one new layer, the mean of their weights and biases.

    Returns:
        The matrices before by name, and the new layers, one per series.
    """
    originals, shared = {}, []
    for series in series_of(select_layers(model, kinds, blocks)):
        originals |= {layer.name: layer.weight2d().detach() for layer in series}
        dtype, bias = series[0].module.weight.dtype, series[0].module.bias
        mean = torch.stack([layer.weight2d().double() for layer in series]).mean(0).to(dtype)
        if bias is not None:
            bias = torch.stack([layer.module.bias.double() for layer in series]).mean(0).to(dtype)
        shared.append(linear(mean, bias))
        for layer in series:
            replace_linear(model, layer.module, lambda _, new=shared[-1]: new)
    return originals, shared


@technique("mass", 1, "Shared mean layers", "#8C6D31", "D")
def mass(model: nn.Module, context: Context, *, kinds: str = "all", blocks: Sequence[int] | None = None):
    """Share one layer per series, the mean over the blocks: MASS before any recovery.

    Args:
        kinds: which layers; "all", "attention" or "ffn".
        blocks: positions of the blocks that take part, two or more; the others keep their own layers.
    """
    originals, shared = share_means(model, kinds, blocks)
    figures = weight_figures(model, originals) | {"maps": len(shared)}
    return model, TechniqueResult("mass", len(originals), figures)
