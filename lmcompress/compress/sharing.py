"""Layers that share weights: one basis for a series (global basis, GLAM), or one layer for all of it (MASS).

A series is the linear layers of one stack, role and shape, block after block.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, low_rank, technique
from lmcompress.compress.low_rank_layers import Factorised, linear, replace_linear
from lmcompress.errors import BadSetting, NothingTouched
from lmcompress.models.anatomy import LinearLayer
from lmcompress.train.trainer import curve, fit


def series_of(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """Return the series with at least two layers; refuse where there is none."""
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
    rank: low_rank.Rank,
    init: Literal["mean", "stacked", "random"] = "mean",
    joint_steps: int = 0,
    kinds: str = "all",
    blocks: low_rank.Blocks = None,
):
    """Give each series one basis G, W_l ≈ L_l G with L_l = W_l G⁺; the layers share the Parameter G.

    A layer without another to share with is left alone.

    Args:
        init: G from the right singular vectors of the series' mean ("mean", whose rank ends at min(in, out)),
            or of its stacked matrices ("stacked", the least squares optimum); "random" stays as drawn.
        joint_steps: rounds of alternating least squares over all L_l and G.
    """
    if init == "random" and joint_steps:
        raise BadSetting(f'joint_steps={joint_steps} with init="random", whose basis stays as drawn: give 0.')
    originals, draw = {}, torch.Generator().manual_seed(context.seed)
    for series in series_of(low_rank.select_layers(model, kinds, blocks)):
        matrices = torch.stack([layer.weight2d().detach() for layer in series])
        count, out_features, in_features = matrices.shape
        basis_rank = low_rank.rank_for(rank, out_features, in_features, layers=count)
        if init == "mean":
            basis_rank = min(basis_rank, out_features, in_features)
        basis = first_basis(matrices.double(), basis_rank, init, draw)
        basis, lefts = joint_fit(matrices.double(), basis, joint_steps)
        shared = nn.Parameter(basis.to(matrices.dtype).contiguous(), requires_grad=init != "random")
        for layer, left_factor in zip(series, lefts, strict=True):
            originals[layer.name] = layer.weight2d().detach()
            low_rank.factorise(model, layer, left_factor, shared)
    return model, TechniqueResult("global-basis", len(originals), low_rank.weight_figures(model, originals))


@torch.no_grad()
def first_basis(matrices: Tensor, rank: int, init: str, draw: torch.Generator | None = None) -> Tensor:
    """Return G `(rank, in)` for `matrices` `(layers, out, in)` in float64; see `global_basis` for `init`."""
    if init == "random":
        shape = rank, matrices.shape[2]
        drawn = torch.randn(shape, generator=draw, dtype=matrices.dtype) / shape[1] ** 0.5
        return drawn.to(matrices.device)
    return low_rank.truncated_svd(matrices.mean(0) if init == "mean" else matrices.flatten(0, 1), rank)[1]


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
    rank: low_rank.Rank,
    weight: float = 0.1,
    every: int = 10,
    threshold: float = 0.5,
    distance: Literal["l1", "relative"] = "relative",
    kinds: str = "all",
    blocks: low_rank.Blocks = None,
):
    """Factorise by SVD, fine-tune with λ Σ_{i<j} ‖G_i - G_j‖₁ over bases of one shape, merge the closest.

    λ rises linearly from 0 to where the first penalty would be `weight` times the last recorded loss. Merged
    bases become their mean, each counting with the layers that use it, and one Parameter.

    Args:
        weight: of the penalty at the end.
        every: steps between two merges, of one pair each.
        threshold: the distance below which the closest pair is merged.
        distance: "l1", ‖G_i - G_j‖₁, or "relative", that over √‖G_i‖₁ √‖G_j‖₁.
    """
    layers = low_rank.select_layers(model, kinds, blocks)
    originals = low_rank.factorise_each(model, layers, rank, low_rank.truncated_svd)
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

    # Not checkpointed: a checkpoint would not know which bases are one.
    history = fit(model, replace(context.train, checkpoint=None), before_step=before_step)
    figures = low_rank.weight_figures(model, originals) | {
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
            shape = self.stacks[name], *layer.first.weight.shape
            by_shape.setdefault(shape, {}).setdefault(id(layer.first.weight), []).append(name)
        return [list(users.values()) for users in by_shape.values() if len(users) > 1]

    def stacked(self, users: list[list[str]]) -> Tensor:
        """Return the bases of a group, `(bases, rank, in)`."""
        return torch.stack([self.layers[names[0]].first.weight for names in users])

    def assignment(self) -> list[int]:
        """Return for each layer the number of the layer whose basis it uses."""
        return [self.numbers[id(layer.first.weight)] for layer in self.layers.values()]

    def penalty(self) -> Tensor:
        """Return Σ_{i<j} ‖G_i - G_j‖₁ in each group, from sorted entries: Σ_k (2k - n + 1) g_(k)."""
        total = next(iter(self.layers.values())).first.weight.new_zeros(())
        for users in self.groups():
            together = self.stacked(users)
            ranks = torch.arange(len(users), device=together.device, dtype=together.dtype)
            signs = (2 * ranks - len(users) + 1)[:, None, None]
            total = total + (together.sort(0).values * signs).sum()
        return total

    @torch.no_grad()
    def merge(self, threshold: float, distance: str) -> dict | None:
        """Make the closest two bases one if they are closer than `threshold`; return which and how close."""
        closest: tuple[float, list[str], list[str]] | None = None
        for users in self.groups():
            flat = self.stacked(users).flatten(1)
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
def share_means(model, kinds: str, blocks: low_rank.Blocks) -> tuple[dict[str, Tensor], list[nn.Linear]]:
    """Replace each series by one mean layer; return the matrices before by name, and the new layers."""
    originals, shared = {}, []
    for series in series_of(low_rank.select_layers(model, kinds, blocks)):
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
def mass(model: nn.Module, context: Context, *, kinds: str = "all", blocks: low_rank.Blocks = None):
    """Share one layer per series, the mean over the two or more `blocks`: MASS before any recovery."""
    originals, shared = share_means(model, kinds, blocks)
    figures = low_rank.weight_figures(model, originals) | {"maps": len(shared)}
    return model, TechniqueResult("mass", len(originals), figures)
