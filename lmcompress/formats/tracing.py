"""Models as functions of tensors alone, to be traced: what becomes a graph each, and its named inputs."""

import copy
import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from lmcompress.errors import BadData, UnknownFamily
from lmcompress.models.anatomy import anatomy
from lmcompress.models.packed import Packed, QuantizedEmbedding

MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_model"  # what files are called


class Traced(nn.Module):
    """A model, or its encoder or decoder, as a function of tensors alone, to be traced.

    Attributes:
        stem: what its file is called.
        names: its inputs of ids and masks `(batch, seq)`; `past` and `cross` those of keys and values
            `(batch, heads, seq, width)`, which grow by each token, or are those of an encoder's states.
        outputs: names of its outputs; the first is the result, the last ones are the grown `past`.
        cache: heads and width of each of `past`; `widths` of each of `cross`.
        example: inputs to trace it with.
    """

    def __init__(self, model: PreTrainedModel, stem: str, names: Sequence[str]):
        super().__init__()
        self.model, self.stem, self.names = model, stem, list(names)
        self.past, self.cross, self.outputs = [], [], []
        self.cache, self.widths = [], []
        self.example: tuple[Tensor, ...] = ()

    @property
    def inputs(self) -> list[str]:
        """Names of all inputs, in order."""
        return [*self.names, *self.past, *self.cross]

    def export(self, function: Callable) -> object:
        """Return `function(self)`, without the tracer's warnings about shapes, which the tests check."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(self)

    def feeds(self, batches: Sequence[dict[str, Tensor]] | None) -> list[dict[str, np.ndarray]]:
        """Return calibration batches as inputs of the graph, no keys and values seen before."""
        if not batches:
            raise BadData("fixed scales need at least one batch of calibration text.")
        with torch.no_grad():
            return [self.feed_of(batch) | empty_past(self, len(batch["input_ids"])) for batch in batches]

    def feed_of(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Return what a batch gives of the graph's inputs."""
        return feed(self.names, **batch)


class TracedModel(Traced):
    """An encoder, a classifier or a decoder, whole."""

    def __init__(self, model: PreTrainedModel, *, grows: bool):
        accepted = inspect.signature(model.forward).parameters
        further = "position_ids" if grows else "token_type_ids"
        super().__init__(
            model, MODEL, ["input_ids", "attention_mask", *([further] if further in accepted else [])]
        )
        ids = torch.arange(6).reshape(2, 3) % 3 + 1
        with torch.no_grad():
            output = model(input_ids=ids, **({"past_key_values": DynamicCache()} if grows else {}))
        self.outputs = ["logits" if "logits" in output else "last_hidden_state"]
        past = _tensors(output.past_key_values) if grows else []
        _grow(self, past)
        inputs = feed(self.names, seen=3 if past else 0, input_ids=ids)
        self.example = (*(torch.from_numpy(inputs[name]) for name in self.names), *past)

    def forward(self, *tensors: Tensor):
        """Return the result, or a tuple of it and the keys and values."""
        inputs = dict(zip(self.names, tensors))
        if not self.cache:
            return self.model(**inputs)[self.outputs[0]]
        output = self.model(**inputs, past_key_values=_cache(tensors[len(self.names) :]), use_cache=True)
        return output[self.outputs[0]], *_tensors(output.past_key_values)


class TracedEncoder(Traced):
    """The encoder of an encoder-decoder, and what the decoder's attention makes of its states, once."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, ENCODER, ["input_ids", "attention_mask"])
        ids = torch.arange(6).reshape(2, 3) % 3 + 1
        self.example = (ids, torch.ones_like(ids))
        with torch.no_grad():
            states, *cross = self(*self.example)
        self.outputs = ["last_hidden_state", *cross_names(len(cross), "present")]

    def forward(self, ids: Tensor, mask: Tensor):
        """Return the states and the keys and values of each of the decoder's blocks."""
        cache = EncoderDecoderCache(*(Cache(layer_class_to_replicate=_Stored) for _ in range(2)))
        # One token for the decoder, on which no output depends: the graph has nothing of it.
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :1] * 0}
        output = self.model(**inputs, past_key_values=cache, use_cache=True)
        return output.encoder_last_hidden_state, *_tensors(cache.cross_attention_cache)


class TracedDecoder(Traced):
    """The decoder of an encoder-decoder, given keys and values of the encoder's states."""

    def __init__(self, model: PreTrainedModel, encoder: TracedEncoder):
        super().__init__(model, DECODER, ["input_ids", "encoder_attention_mask"])
        self.encoder = [encoder]  # in a list, so that it is no submodule
        ids, mask = encoder.example
        with torch.no_grad():
            _, *cross = encoder(*encoder.example)
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            model(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
        past = _tensors(cache.self_attention_cache)
        self.outputs, self.cross = ["logits"], cross_names(len(cross))
        self.widths = [[tensor.shape[1], tensor.shape[3]] for tensor in cross]
        _grow(self, past, ".decoder")
        self.example = (ids, mask, *past, *cross)

    def forward(self, ids: Tensor, mask: Tensor, *tensors: Tensor):
        """Return the logits and the grown keys and values."""
        past, cross = tensors[: len(self.past)], tensors[len(self.past) :]
        cache = EncoderDecoderCache(_cache(past), _cache(cross))
        # Only their shape is looked at: their keys and values are in the cache.
        states = mask[..., None].float().expand(-1, -1, self.model.config.hidden_size)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *_tensors(cache.self_attention_cache)

    def feed_of(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Return what a batch gives of the graph's inputs: its labels, else its own ids, one later."""
        (encoder,) = self.encoder
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        _, *cross = encoder(batch["input_ids"], mask)
        ids = shifted(self.model.config, batch.get("labels", batch["input_ids"]))
        arrays = dict(zip(self.cross, (tensor.numpy() for tensor in cross)))
        return feed(self.names, input_ids=ids, encoder_attention_mask=mask) | arrays


def trace(model: PreTrainedModel) -> list[Traced]:
    """Return what becomes a graph each: the whole model, or encoder and decoder of one that writes.

    Raises `UnknownFamily` for an encoder-decoder that does not, and for a model that is not on the CPU.
    """
    kind = anatomy(model).kind
    if model.device.type != "cpu" or (kind == "encoder-decoder" and not model.can_generate()):
        raise UnknownFamily(
            f"{type(model).__name__} on {model.device.type!r}: encoders, decoders, and encoder-decoders with "
            'a language-model head are exported as graphs, on a CPU. Use "int8-dynamic", or "rtn" for the '
            "bytes alone."
        )
    model = model.float().eval()
    if kind != "encoder-decoder":
        return [TracedModel(model, grows=kind == "decoder")]
    encoder = TracedEncoder(model)
    return [encoder, TracedDecoder(model, encoder)]


def floating(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Packed]]:
    """Return a copy with floating-point layers in the place of integers, and those by what they stand for.

    The keys are the `digest` of each matrix: in the traced graph it is found by its values again.
    """
    model, layers, replaced = copy.deepcopy(model), {}, {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, Packed):
            continue
        if id(layer) not in replaced:
            matrix = layer.dequantized().float()
            layers[digest(matrix.numpy())] = layer
            replaced[id(layer)] = _floating_layer(layer, matrix)
        model.set_submodule(name, replaced[id(layer)])
    return model, layers


def digest(matrix: np.ndarray) -> str:
    """Return what two equal matrices of float32 have in common."""
    return hashlib.sha256(np.ascontiguousarray(matrix)).hexdigest()


class _ScaledTable(nn.Embedding):
    """A token table whose rows are multiplied by a number."""

    scale = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


def _floating_layer(layer: Packed, matrix: Tensor) -> nn.Module:
    with torch.device("meta"):
        if isinstance(layer, QuantizedEmbedding):
            new = _ScaledTable(*matrix.shape)
            new.scale = layer.embed_scale
        else:
            new = nn.Linear(layer.width, layer.rows, bias=layer.bias is not None)
            new.bias = layer.bias
    new.weight = nn.Parameter(matrix)
    return new


def feed(names: Sequence[str], *, seen: int = 0, **tensors: Tensor | None) -> dict[str, np.ndarray]:
    """Return the inputs `names` as int64 arrays; a mask not given sees all, `seen` earlier tokens too."""
    batch, length = tensors["input_ids"].shape
    inputs = {}
    for name in names:
        tensor = tensors.get(name)
        inputs[name] = (
            _DEFAULTS[name](batch, length, seen) if tensor is None else tensor.long().contiguous().numpy()
        )
    return inputs


_DEFAULTS = {
    "attention_mask": lambda batch, length, seen: np.ones((batch, seen + length), dtype=np.int64),
    "token_type_ids": lambda batch, length, seen: np.zeros((batch, length), dtype=np.int64),
    "position_ids": lambda batch, length, seen: np.tile(np.arange(seen, seen + length), (batch, 1)),
}


def empty_past(traced: Traced, batch: int) -> dict[str, np.ndarray]:
    """Return keys and values of no token, by the name of the graph's input."""
    return {name: empty(batch, *shape) for name, shape in zip(traced.past, traced.cache)}


def empty(batch: int, heads: int, width: int) -> np.ndarray:
    """Return keys or values `(batch, heads, 0, width)` of no token."""
    return np.zeros((batch, heads, 0, width), dtype=np.float32)


def cross_names(count: int, prefix: str = "past_key_values") -> list[str]:
    """Return the names of the keys and values of an encoder's states."""
    return _names(prefix, count, ".encoder")


def shifted(config: PreTrainedConfig, labels: Tensor) -> Tensor:
    """Return the decoder's inputs for `labels` `(batch, seq)`: one later, ignored ones as padding."""
    ids = torch.cat([torch.full_like(labels[:, :1], config.decoder_start_token_id), labels[:, :-1]], dim=1)
    return ids.masked_fill(ids == -100, config.pad_token_id)


class _Stored(DynamicLayer):
    """A layer of a cache that holds what it is given: `update` would concatenate it to a list of nothing."""

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


def _cache(tensors: Sequence[Tensor]) -> DynamicCache:
    """Return a cache of `tensors`, by hand: `update` would concatenate to a list, exporting to nothing."""
    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2]):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        cache.layers.append(layer)
    return cache


def _tensors(cache: Cache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _names(prefix: str, count: int, stack: str = "") -> list[str]:
    """Return the names that others give keys and values, in order."""
    return [f"{prefix}.{i // 2}{stack}.{('key', 'value')[i % 2]}" for i in range(count)]


def _grow(traced: Traced, past: Sequence[Tensor], stack: str = "") -> None:
    """Add keys and values to a traced model's inputs and outputs."""
    traced.cache = [[tensor.shape[1], tensor.shape[3]] for tensor in past]
    traced.past = _names("past_key_values", len(past), stack)
    traced.outputs = traced.outputs + _names("present", len(past), stack)
