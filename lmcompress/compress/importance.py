"""First-order importance of attention heads and feed-forward channels: what the loss would be without each.

Read from one gradient (Michel et al. 2019; Molchanov et al. 2017). Scoring costs one forward and one backward
pass per batch; labels that come from another model's output cost one forward of that model besides.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lmcompress.compress.calibration import Batch
from lmcompress.errors import BadData, BadSetting, BadWeights
from lmcompress.models.anatomy import Attention, LinearLayer, ModelAnatomy, anatomy
from lmcompress.train.batches import token_masks

LOSSES = ("task", "soft", "sampled")
Scores = dict[str, Tensor]


@torch.enable_grad()
def importance(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    loss: str = "task",
    even: bool = True,
    dense: nn.Module | None = None,
    seed: int = 0,
) -> Scores:
    """Return how much the loss changes, to first order, without each head and each feed-forward channel.

    With g the gradient of one batch's loss, a head scores |Σ g∘W_O| over its columns of the output
    projection, a channel |Σ g∘W_out| over its column; if `even`, each input layer of the feed-forward adds |Σ
    g∘W_in + g_b b| over the channel's row (so does the gate of a gated one). The absolute value is taken per
    batch, then averaged.

    |Σ g∘W_O| is the derivative of the loss by a factor on the head's output. The term of W_in differs from
    that of W_out by the activation only: under ReLU, and for the ungated half of a gated feed-forward, both
    are the same.

    Args:
        model: any known family; put in eval mode meanwhile, on its device.
        batches: keyword arguments of the model's forward. `loss="task"` needs `labels`, -100 where none is.
        loss: "task": the model's own; "soft": cross-entropy to the output of `dense`; "sampled": to labels
            drawn once from that output. The last two need no labels and leave padding out. The gradient of
            "soft" is exactly zero where `model` is `dense`: its scores there are rounding noise.
        even: with the terms of the input layers; they are left out where blocks are compared with each other.
        dense: the model that gives soft and sampled labels; default `model` itself.
        seed: of the sampled labels.

    Returns:
        Attention name -> `(heads,)` and block name -> `(channels,)`, float32 on the CPU. Cross-attentions are
        attentions like others; blocks of experts have no channels.

    Raises:
        BadData: no batches, or no labels where they are needed.
        BadSetting: unknown loss, no logits to draw labels from, or a layer without a matrix.
        BadWeights: a loss or a score is NaN or infinite.
    """
    if loss not in LOSSES:
        raise BadSetting(f'loss {loss!r} is unknown; use "{LOSSES[0]}", "{LOSSES[1]}" or "{LOSSES[2]}".')
    require_labels(batches, needed=loss == "task")
    structure, generator = anatomy(model), torch.Generator().manual_seed(seed)
    parameters = _scored_parameters(structure, even)
    device, total = next(model.parameters()).device, {}
    with _scoring(model, dense, parameters):
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            batch_loss = _loss(model, batch, loss, structure, dense, generator)
            _refuse_infinite(set() if batch_loss.isfinite() else {"a calibration batch"})
            gradients = dict(zip(map(id, parameters), torch.autograd.grad(batch_loss, parameters)))
            for name, score in _first_order(structure, gradients, even):
                total[name] = total.get(name, 0) + score / len(batches)
    _refuse_infinite({name for name, score in total.items() if not score.isfinite().all()})
    return {name: score.cpu() for name, score in total.items()}


def require_labels(batches: Sequence[Batch], *, needed: bool) -> None:
    """Raise `BadData` if there are no batches, or if labels are `needed` and missing."""
    if not batches:
        raise BadData("no calibration batches: give at least one dictionary of tensors, such as input_ids")
    if needed and any("labels" not in batch for batch in batches):
        raise BadData(
            "the calibration batches have no labels, so there is no task loss: this model or task has none, "
            "or "
            'documents stand in for its texts. Use loss="sampled", which draws labels from the output.'
        )


def _refuse_infinite(names: set[str]) -> None:
    if names:
        raise BadWeights(
            f"the loss of, or the importance in, {', '.join(sorted(names)[:3])} is NaN or infinite: load the "
            "model in float32 or bfloat16, and see that every batch has a label that is not -100"
        )


def attentions(structure: ModelAnatomy) -> list[Attention]:
    """Return self- and cross-attentions of all blocks, in order."""
    return [attention for block in structure.blocks for attention in block.attentions]


def _scored_parameters(structure: ModelAnatomy, even: bool) -> list[nn.Parameter]:
    """Return weights and biases whose gradients the scores read, each once."""
    layers = [attention.o for attention in attentions(structure)]
    for block in structure.blocks:
        if block.ffn:
            layers += [block.ffn.output, *(block.ffn.inputs if even else ())]
    parameters: dict[int, nn.Parameter] = {}
    for layer in layers:
        module = layer.module
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            raise BadSetting(
                f"{layer.name} is a {type(module).__name__} without a weight matrix: prune heads and "
                "channels before factorizing or quantizing"
            )
        parameters[id(module.weight)] = module.weight
        if layer.role in ("in", "gate") and module.bias is not None:
            parameters[id(module.bias)] = module.bias
    return list(parameters.values())


@contextmanager
def _scoring(model: nn.Module, dense: nn.Module | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Put models in eval mode, and let `parameters` have gradients even where frozen, while inside."""
    modes = {module: module.training for module in (model, dense) if module is not None}
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for module in modes:
            module.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for module, training in modes.items():
            module.train(training)
        for parameter in frozen:
            parameter.requires_grad_(False)


def _loss(
    model: nn.Module,
    batch: Batch,
    loss: str,
    structure: ModelAnatomy,
    dense: nn.Module | None,
    generator: torch.Generator,
) -> Tensor:
    options = {} if structure.kind == "encoder" else {"use_cache": False}
    output = model(**batch, **options)
    if loss == "task":
        return output.loss
    logits = _logits(output)
    with torch.no_grad():
        reference = logits.detach() if dense is None else _logits(dense(**batch, **options))
    mask = token_masks(batch, list(structure.stacks)[-1], structure.kind)["own"]
    if logits.dim() == 3 and mask is not None:
        logits, reference = logits[mask.bool()], reference[mask.bool()]
    target = reference.flatten(0, -2).float().softmax(-1)
    if loss == "sampled":
        target = torch.multinomial(target.cpu(), 1, generator=generator).squeeze(1).to(logits.device)
    return cross_entropy(logits.flatten(0, -2).float(), target)


def _logits(output) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[-1] == 1:
        raise BadSetting(
            f"a {type(output).__name__} has no distribution over labels (a regression, or a model without a "
            f"head): "
            'use loss="task"'
        )
    return logits


def _first_order(
    structure: ModelAnatomy, gradients: dict[int, Tensor], even: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and scores of each attention and feed-forward for one batch."""
    for attention in attentions(structure):
        columns = _summed(attention.o, gradients, 0)
        yield attention.name, columns.view(attention.heads, attention.head_dim).sum(1).abs()
    for block in structure.blocks:
        if block.ffn:
            inputs = sum(_summed(layer, gradients, 1).abs() for layer in block.ffn.inputs) if even else 0
            yield block.name, _summed(block.ffn.output, gradients, 0).abs() + inputs


def _summed(layer: LinearLayer, gradients: dict[int, Tensor], dim: int) -> Tensor:
    """Return Σ g∘W of a layer, by input (`dim` 0) or by output (1, with its bias), in float32."""
    weight, bias = layer.module.weight, layer.module.bias
    product = weight.detach().float() * gradients[id(weight)].float()
    sums = (product.t() if layer.conv1d else product).sum(dim)
    if dim and bias is not None:
        sums = sums + bias.detach().float() * gradients[id(bias)].float()
    return sums
