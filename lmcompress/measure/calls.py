"""What one timed call does: a part of a model's work at a stated shape, for `latency` and `compute` alike."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from lmcompress.errors import BadSetting
from lmcompress.models.serialization import plain_values

_PARTS = {"encoder": ("forward",), "decoder": ("prefill", "decode"), "encoder-decoder": ("encode", "decode")}


@dataclass(frozen=True)
class Shape:
    """What one timed call does: `part` of the work ("forward", "prefill", "encode", "decode") on random ids.

    `length` is the number of input tokens per example; a "decode" call makes `tokens` single-token steps
    with a key/value cache and is reported per step. Prefill computes the logits of every position.
    """

    part: str
    batch: int
    length: int = 128
    tokens: int = 16

    @property
    def name(self) -> str:
        """The key in rows: "batch8", "prefill_b1", …"""
        return f"batch{self.batch}" if self.part == "forward" else f"{self.part}_b{self.batch}"


@dataclass
class Call:
    """Something to time: `prepare` is not timed, `run` is, and makes `steps` of what is reported."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    steps: int = 1


def default_shapes(
    kind: str, *, length: int = 128, batches: Sequence[int] = (1, 8), model: nn.Module | None = None
) -> list[Shape]:
    """Return batch 1 and a batch that fills the machine, for each part of the work of this `kind` of model.

    A sequence classifier (`model`) of any kind reads its input once: "forward" is all its work.
    """
    if kind not in _PARTS:
        raise BadSetting(f"kind={kind!r} is none of {', '.join(_PARTS)}")
    parts = ("forward",) if model is not None and classifies(model) else _PARTS[kind]
    return [Shape(part, batch, length) for batch in batches for part in parts]


def classifies(model: nn.Module) -> bool:
    """Tell whether `model` is the sequence classifier that `transformers` has for its config."""
    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(getattr(model, "config", None)), ())
    return isinstance(model, classifier)


def prepared_calls(
    models: Mapping[str, nn.Module], shape: Shape, *, kind: str, seed: int = 0
) -> dict[str, Call]:
    """Return a `Call` of `shape` for each model, all on the same random token ids, which all of them have."""
    legal = ("forward",) if any(map(classifies, models.values())) else _PARTS[kind]
    if shape.part not in legal:
        raise BadSetting(f"no part {shape.part!r} of the work of this {kind}; it has {', '.join(legal)}")
    vocabulary = min(_vocabulary(model) for model in models.values())
    device = next(next(iter(models.values())).parameters()).device
    draw = torch.Generator().manual_seed(seed)
    length = usable_length(models.values(), shape)
    ids = torch.randint(vocabulary, (shape.batch, length), generator=draw).to(device)
    return {name: _call(model, ids, shape, kind) for name, model in models.items()}


def shape_signature(model: nn.Module) -> str:
    """Return 16 hex digits that two models share if they do the same work: the time of one holds for both.

    Covers module classes, their plain attributes and how packed layers say they compute (`execution`),
    parameter shapes, dtypes, strides and layouts (with the number of values where it is sparse), and the
    config without names; not the values.
    """
    config = model.config.to_dict() if hasattr(model, "config") else {}
    seen = {k: v for k, v in config.items() if k not in ("_name_or_path", "architectures", "dtype")}
    described = [json.dumps(seen, sort_keys=True, default=str)]
    described += [
        f"{name} {type(module).__qualname__} {sorted(plain_values(module).items(), key=str)}"
        f"{getattr(module, 'execution', '')}"
        for name, module in model.named_modules()
    ]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # No public name counts the values of every sparse layout.
        layout = tensor._nnz() if tensor.layout is not torch.strided else tensor.stride()
        described.append(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.layout} {layout} {tensor.device.type}"
        )
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _call(model: nn.Module, ids: torch.Tensor, shape: Shape, kind: str) -> Call:
    mask = torch.ones_like(ids)
    if shape.part == "forward":
        if getattr(model.config, "is_encoder_decoder", False):  # such a classifier reads the one end token
            end = model.config.eos_token_id
            ids = ids.masked_fill(ids == end, end - 1 if end else 1)
            ids[:, -1] = end
        return Call(lambda: model(input_ids=ids, attention_mask=mask))
    if shape.part == "prefill":
        return Call(lambda: model(input_ids=ids, use_cache=True))
    if shape.part == "encode":
        encoder = model.get_encoder()
        return Call(lambda: encoder(input_ids=ids, attention_mask=mask))
    if kind == "decoder":
        return _steps(model(input_ids=ids, use_cache=True), "input_ids", {}, model, ids, shape)
    inputs = {"encoder_outputs": model.get_encoder()(input_ids=ids), "attention_mask": mask}
    started = model(decoder_input_ids=ids[:, :1], use_cache=True, **inputs)
    return _steps(started, "decoder_input_ids", inputs, model, ids, shape)


def _steps(started, argument: str, inputs: dict, model: nn.Module, ids: torch.Tensor, shape: Shape) -> Call:
    """Single-token steps after `started`; the tokens are given, so that every model does the same work."""
    cache = {"start": started.past_key_values}

    def prepare() -> None:
        # A copy each time, because cutting a cache back is refused by sliding-window layers.
        cache["now"] = copy.deepcopy(cache["start"])

    def run() -> None:
        for step in range(shape.tokens):
            token = {argument: ids[:, step % ids.shape[1], None]}
            output = model(**token, **inputs, past_key_values=cache["now"], use_cache=True)
            cache["now"] = output.past_key_values

    return Call(run, prepare, shape.tokens)


def _vocabulary(model: nn.Module) -> int:
    try:
        table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # no single table (CANINE hashes characters)
        table = None
    size = getattr(table, "num_embeddings", None) or getattr(model.config, "vocab_size", None)
    return size or model.config.num_hash_buckets


def usable_length(models: Iterable[nn.Module], shape: Shape) -> int:
    """Return `shape.length`, or what the models have positions for, decoded tokens included, at least one."""
    limits = [getattr(model.config, "max_position_embeddings", None) for model in models]
    extra = shape.tokens if shape.part == "decode" else 2  # RoBERTa keeps two positions for itself
    length = min([shape.length, *(limit - extra for limit in limits if limit and limit > 0)])
    if length < 1:
        raise BadSetting(
            f"{shape.name} needs {extra} positions beside its input, and a model has "
            f"{min(filter(None, limits))} in all: time a shape with fewer tokens, such as Shape(part, batch, "
            "length, tokens=1)."
        )
    return length
