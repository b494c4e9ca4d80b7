"""MoEfication (Zhang et al. 2022): a feed-forward's neurons as experts, of which each token uses a few.

It lives from activations that are mostly zero, so that comes first: how sparse they are, and ReLU in place of
smoother ones.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import Batch, calibrate
from lmcompress.compress.expert_layers import HIDDEN, ROUTERS, ExpertInput, ExpertOutput, Plan, Router
from lmcompress.errors import BadSetting, NothingTouched, UnknownFamily
from lmcompress.models.anatomy import Block, anatomy
from lmcompress.models.surgery import replace_modules
from lmcompress.registry import analysis
from lmcompress.train.trainer import curve, fit

VERSION = analysis(1, "activation-sparsity")
THRESHOLDS = (0.01, 0.1, 0.5)  # of the spread of a layer's activations
ENERGY = 0.9
CLUSTERINGS = ("balanced-kmeans", "co-activation", "random")
TOKENS = 2048  # that clustering by activations, and energies, look at
HELD_OUT = 0.2  # of the calibration tokens: routers are judged on them and do not learn from them
STEPS, BATCH, RATE = 400, 512, 3e-3  # of a small MLP's training

_ACTIVATIONS = (BloomGelu, *(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()))
_FIELDS = ("hidden_act", "activation_function", "hidden_activation", "activation", "dense_act_fn")


def activation_sparsity(model: nn.Module, batches: Sequence[Batch]) -> dict:
    """Return how few neurons of each feed-forward matter to a token of `batches` that is not padding.

    Returns:
        "blocks": per block its "stack" and "index"; "zero", share of activations (what enters the output
        layer, after the gate) that are exactly 0; "below", shares with |a| under each of "thresholds" times
        the block's standard deviation; "neurons_90", share of neurons that carry 90 % of a token's Σa², mean
        over tokens; "fixed_90", the same of one choice of neurons for all tokens.
    """
    blocks = []
    for step in calibrate(model, batches, collect=("rows",)):
        a = torch.cat(step.stats[step.block.ffn.output.name].rows)
        spread, energy = a.std(), _thinned(a).square()
        figures = {
            "stack": step.block.stack,
            "index": step.block.index,
            "zero": float((a == 0).float().mean()),
            "below": [float((a.abs() < t * spread).float().mean()) for t in THRESHOLDS],
            "neurons_90": float(_share_needed(energy).mean()),
            "fixed_90": float(_share_needed(energy.sum(0, keepdim=True))),
        }
        blocks.append(figures)
    return {"thresholds": list(THRESHOLDS), "blocks": blocks}


def _share_needed(energy: Tensor) -> Tensor:
    """Return per row of `energy` `(n, neurons)`, the smallest share of neurons that holds `ENERGY` of it."""
    running = energy.sort(dim=1, descending=True).values.cumsum(1)
    needed = (running < ENERGY * running[:, -1:]).sum(1) + 1
    return needed.where(running[:, -1] > 0, torch.zeros_like(needed)) / energy.shape[1]


def _or_one(size: Tensor) -> Tensor:
    """Return `size`, or 1 where it is 0 (a block of zero matrices) and nothing can be divided by it."""
    return size.where(size > 0, torch.ones_like(size))


def _thinned(rows: Tensor) -> Tensor:
    return rows[:: max(1, len(rows) // TOKENS)][:TOKENS]


def _mean(entries: list[dict], name: str) -> float:
    return sum(entry[name] for entry in entries) / len(entries)


@technique("relufy", 1, "ReLU-fied", "#648FFF", "8", needs=("train", "calibration"))
def relufy(model: nn.Module, context: Context):
    """Put ReLU in place of every feed-forward's activation, in the config too, then fine-tune."""
    activations = []
    for block in anatomy(model).blocks:
        attention = {inner for outer in block.attentions for inner in outer.module.modules()}
        outside = [module for module in block.module.modules() if module not in attention]
        activations += [m for m in outside if isinstance(m, _ACTIVATIONS) and not isinstance(m, nn.ReLU)]
    if not activations:
        raise NothingTouched(
            f"{type(model).__name__}'s feed-forwards have ReLU: there is nothing to replace."
        )
    sparsity = {"before": activation_sparsity(model, context.calibration)}
    replace_modules(model, activations.__contains__, lambda _: ACT2FN["relu"])
    for name in _FIELDS:
        if isinstance(getattr(model.config, name, None), str):
            setattr(model.config, name, "relu")
    if hasattr(model.config, "feed_forward_proj"):  # T5: "gated-gelu"
        model.config.feed_forward_proj = "gated-relu" if model.config.is_gated_act else "relu"
    sparsity["swapped"] = activation_sparsity(model, context.calibration)
    history = fit(model, context.train)
    sparsity["after"] = activation_sparsity(model, context.calibration)
    names = ("zero", "neurons_90")
    figures = {f"{name}_{when}": _mean(s["blocks"], name) for when, s in sparsity.items() for name in names}
    return model, TechniqueResult("relufy", len(activations), figures | {"curve": curve(history)})


@technique("moefy", 1, "MoEfication", "#DC267F", "H", needs=("calibration", "seed"))
def moefy(
    model: nn.Module,
    context: Context,
    *,
    experts: int,
    active: int,
    clustering: Literal[CLUSTERINGS] = "balanced-kmeans",
    router: Literal[ROUTERS] = "mlp",
):
    """Cut every feed-forward into `experts` of equal size, of which a token uses `active`, block by block.

    Neurons of one expert have like rows of W_in ("balanced-kmeans"; rows normalised, a gate's beside them),
    or like activations on the calibration text ("co-activation"), or nothing in common ("random": the
    control). For the routers see `expert_layers.Router`.
    """
    blocks = anatomy(model).blocks
    for block in blocks:
        _check(block, experts, active)
    qualities, used, dense, layers = [], 0, 0, 0  # operations per token used, and of the dense model
    generator = torch.Generator().manual_seed(context.seed)
    for step in calibrate(model, context.calibration, collect=("rows",)):
        ffn = step.block.ffn
        if ffn.output.name not in step.stats:  # shared with a block before, and replaced with it
            continue
        x, a = (torch.cat(step.stats[layer.name].rows) for layer in (ffn.inputs[0], ffn.output))
        members = _members(step.block, a.abs(), clustering, experts, generator)
        mass = a.abs()[:, members].sum(2)
        fitted = max(1, int((1 - HELD_OUT) * len(x)))
        held_out = min(fitted, len(x) - 1)
        trained = _router(router, step.block, x[:fitted], mass[:fitted], members, active, generator)
        qualities.append(_quality(trained, x[held_out:], mass[held_out:]))
        _replace(model, step.block, members, trained)
        costs = [2 * layer.in_features * layer.out_features for layer in (*ffn.inputs, ffn.output)]
        unsaved = sum(costs[:-1]) if router == "oracle" else 0
        used += trained.flops() + unsaved + (sum(costs) - unsaved) * active / experts
        dense, layers = dense + sum(costs), layers + len(costs)
    sizes = sorted({block.ffn.width // experts for block in blocks})
    figures = {"experts": experts, "active": active, "sizes": sizes, "ffn_flops_share": used / dense}
    for name in qualities[0]:
        figures |= {name: _mean(qualities, name), f"{name}_by_block": [block[name] for block in qualities]}
    return model, TechniqueResult("moefy", layers, figures)


def balanced_kmeans(rows: Tensor, groups: int, *, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Return indices `(groups, n / groups)` of `rows` `(n, features)`: k-means with clusters of equal size.

    Starts as k-means++ does. A round joins the closest row and centre with room first, and so on, then moves
    the centres; the best round is taken.
    """
    starts = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = torch.full((len(rows),), torch.inf)
    while len(starts) < groups:
        nearest = torch.minimum(nearest, (rows - rows[starts[-1]]).square().sum(1).cpu())
        weights = (nearest + 1e-12).index_fill(0, torch.tensor(starts), 0)
        starts.append(int(torch.multinomial(weights, 1, generator=generator)))
    centres, best, best_total, before = rows[starts], None, float("inf"), None
    for _ in range(rounds):
        distances = torch.cdist(rows, centres).square()
        owner = _filled(distances, len(rows) // groups)
        total = float(distances.gather(1, owner[:, None]).sum())
        if total < best_total:
            best, best_total = owner, total
        if before is not None and torch.equal(owner, before):
            break
        before, centres = owner, torch.stack([rows[owner == group].mean(0) for group in range(groups)])
    return best.argsort(stable=True).view(groups, -1)


def _filled(distances: Tensor, size: int) -> Tensor:
    """Return for each row of `distances` `(n, groups)` a group of at most `size`, closest pairs first."""
    n, groups = distances.shape
    owner, room = [-1] * n, [size] * groups
    for index in distances.flatten().argsort(stable=True).tolist():
        row, group = divmod(index, groups)
        if owner[row] < 0 and room[group]:
            owner[row], room[group] = group, room[group] - 1
    return torch.tensor(owner, device=distances.device)


def _input_rows(block: Block) -> list[Tensor]:
    """Return normalised rows `(width, in)` of each input layer in float32, the gate's first."""
    return [F.normalize(layer.weight2d().detach().float(), dim=1) for layer in block.ffn.inputs]


def _members(block: Block, a: Tensor, clustering: str, experts: int, generator: torch.Generator) -> Tensor:
    """Return neurons `(experts, size)` of each expert; `a` `(tokens, width)`: sizes of the activations."""
    if clustering == "random":
        return torch.randperm(block.ffn.width, generator=generator).view(experts, -1)
    if clustering == "co-activation":
        a = _thinned(a)  # centred, so that inner products are correlations: smooth ones are large together
        rows = F.normalize((a - a.mean(0)).T, dim=1)
    else:
        rows = torch.cat(_input_rows(block), 1)
    return balanced_kmeans(rows, experts, generator=generator).cpu()


@torch.enable_grad()
def _router(
    kind: str, block: Block, x: Tensor, mass: Tensor, members: Tensor, active: int, generator: torch.Generator
) -> Router:
    """Return a router; where `x` `(tokens, in)` enters, Σ|activations| are `mass` `(tokens, experts)`.

    An MLP regresses the masses: the largest expected ones capture most in expectation (Zhang et al.: BCE).
    """
    router = Router(kind, len(members), active, x.shape[1]).to(x)
    if kind == "centroid":  # of the gate, where there is one: it decides what is near zero
        router.first.data = F.normalize(_input_rows(block)[0][members].mean(1), dim=1)
    elif kind == "mlp":
        mean, spread, scale = mass.mean(0), _or_one(mass.std()), _or_one(x.square().mean().sqrt())
        for parameter, width in ((router.first, x.shape[1]), (router.second, HIDDEN)):
            parameter.data = (torch.randn(parameter.shape, generator=generator) / width**0.5).to(x)
        router.bias.data = torch.zeros_like(mean)
        targets, optimizer = (mass - mean) / spread, torch.optim.Adam(router.parameters(), lr=RATE)
        for _ in range(STEPS):
            drawn = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
            loss = F.mse_loss(router.scores(x[drawn] / scale), targets[drawn])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        router.first.data /= scale
        router.bias.data += mean / spread
    return router.to(block.ffn.output.module.weight)


@torch.no_grad()
def _quality(router: Router, x: Tensor, mass: Tensor) -> dict[str, float]:
    """Return the share of the best experts routed to, and the mass in those routed to and in the best."""
    scores = mass if router.kind == "oracle" else router.scores(x.to(router.first.dtype))
    routed, best = (Plan.of(figures, router.active).experts for figures in (scores, mass))
    recall = (routed[:, :, None] == best[:, None, :]).any(2).float().mean()
    total = mass.sum(1).clamp(min=1e-12)
    shares = [(mass.gather(1, experts).sum(1) / total).mean() for experts in (routed, best)]
    return {"recall": float(recall), "mass": float(shares[0]), "mass_oracle": float(shares[1])}


def _replace(model: nn.Module, block: Block, members: Tensor, router: Router) -> None:
    """Put experts in place of the block's feed-forward layers, wherever these are used."""
    experts, index = {}, members.to(block.ffn.output.module.weight.device)
    for layer in (*block.ffn.inputs, block.ffn.output):
        bias, weight = getattr(layer.module, "bias", None), layer.weight2d().detach()
        bias = None if bias is None else bias.detach().clone()
        if layer is block.ffn.output:
            experts[layer.module] = ExpertOutput(weight.t()[index], bias, router)
        else:
            experts[layer.module] = ExpertInput(weight[index], None if bias is None else bias[index], router)
    replace_modules(model, experts.__contains__, experts.__getitem__)


def _check(block: Block, experts: int, active: int) -> None:
    if block.ffn.fused:
        raise UnknownFamily(f"{block.name} has gate and input in one layer; moefication needs them apart.")
    weight, width = block.ffn.output.module.weight, block.ffn.width
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise BadSetting(
            f"{block.name} holds no dense feed-forward matrices: use moefy before other formats."
        )
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    if experts not in divisors:
        near = sorted(sorted(divisors, key=lambda n: abs(n - experts))[:4])
        raise BadSetting(
            f"{experts!r} experts of equal size cannot be made of the {width} neurons of {block.name}; "
            f"numbers that divide it: {', '.join(map(str, near))}."
        )
    if active > experts:
        raise BadSetting(f"active={active!r}: a token uses 1 to {experts} of {experts} experts.")
