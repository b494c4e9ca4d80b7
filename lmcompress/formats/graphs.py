"""Models exported as a graph that another library runs: traced once, its bytes stored like any weights.

`openvino` and `onnx` make the graphs and run them; here is the trace, and the model that stands in for the
original in evaluation, timing and storage: same calls, same outputs.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lmcompress.errors import BadData, BadSetting, UnknownFamily
from lmcompress.models.anatomy import anatomy, count_parameters

_LIBRARIES = {"openvino_graphs": "openvino", "onnxruntime_graphs": "onnx"}  # as earlier models name them
_OUTPUTS = {"logits": CausalLMOutputWithPast, "last_hidden_state": BaseModelOutputWithPast}


@dataclass
class Past:
    """Keys and values of `length` tokens, `state` as the library likes it; `copy.deepcopy` gives another."""

    length: int
    state: object


@dataclass(frozen=True)
class StoredMatrix:
    """Integers of a graph: element type, how many, bytes with scales and zero points, distinct values."""

    element: str
    weights: int
    nbytes: int
    values: int


class GraphModel(PreTrainedModel):
    """A `transformers` model whose work another library does, on the CPU, from the graph in its buffers.

    Attributes:
        library: module beside this one that runs the graph.
        stands_for: class of the original.
        inputs: names of its tensor inputs; `output` that of its result.
        cache: heads and width of each of the keys and values (layer by layer, keys first), if there are any.
        weight_count: parameters of the original.
    """

    config_class = AutoConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # as the original's config says

    def __init__(self, config):
        super().__init__(config)
        self.library, self.stands_for, self.output = "", "", ""
        self.inputs, self.cache, self.weight_count = [], [], 0
        self.empty = nn.Parameter(torch.empty(0))  # says device and dtype to who asks; holds nothing
        for name in ("graph", "packed"):  # an OpenVINO graph and its weights; ONNX has both in the first
            self.register_buffer(name, torch.empty(0, dtype=torch.uint8))
        self._session, self._threads = None, 0

    def get_input_embeddings(self) -> None:
        """Return None: the table is inside the graph."""

    def get_output_embeddings(self) -> None:
        """Return None: the head is inside the graph."""

    def runtime(self) -> ModuleType:
        """Return the module that runs the graph."""
        return import_module(f"{__package__}.{_LIBRARIES.get(self.library, self.library)}")

    def session(self) -> Callable:
        """Return the graph, ready to run on as many threads as torch uses now; made at the first call."""
        if self._session is None or self._threads != torch.get_num_threads():
            self._threads = torch.get_num_threads()
            buffers = self.graph.numpy(), self.packed.numpy()
            self._session = self.runtime().session(*buffers, threads=self._threads, cache=self.cache)
        return self._session

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
    ):
        """Return what the original does for ids `(batch, seq)`: logits or last states, a decoder's `Past`."""
        seen = past_key_values.length if past_key_values else 0
        masks = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = feed(self.inputs, seen=seen, input_ids=input_ids, **masks)
        keep = bool(self.cache) and use_cache is not False
        output, past = self.session()(inputs, past_key_values, keep)
        return _OUTPUTS[self.output](**{self.output: torch.from_numpy(output)}, past_key_values=past)

    def train(self, mode: bool = True) -> "GraphModel":
        """Refuse all but `mode=False`: train first, and export last."""
        if mode:
            raise BadSetting(
                f"{self.library} runs a finished graph, which cannot be trained: train the model first."
            )
        return super().train(False)

    def __getstate__(self) -> dict:
        """Return the state without the session: it cannot be copied, and is made again."""
        return self.__dict__ | {"_session": None}


class Traced(nn.Module):
    """A model as a function of tensors alone, to be traced: first those in `names`, then keys and values."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        kind = anatomy(model).kind
        if kind == "encoder-decoder" or model.device.type != "cpu":
            raise UnknownFamily(
                f"{type(model).__name__} on {model.device.type!r}: encoders and decoders on a CPU are "
                'exported as a graph, encoder-decoders are not. Use "int8-dynamic", or "rtn" for the bytes '
                "alone."
            )
        self.model = model.float().eval()
        self.names = ["input_ids", "attention_mask"]
        if kind == "encoder" and "token_type_ids" in inspect.signature(model.forward).parameters:
            self.names.append("token_type_ids")
        ids = torch.arange(6).reshape(2, 3) % 3 + 1
        cache = {"past_key_values": DynamicCache()} if kind == "decoder" else {}
        with torch.no_grad():
            output = model(input_ids=ids, **cache)
        self.output = "logits" if "logits" in output else "last_hidden_state"
        head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
        self.tied = table.numel() if head is not None and head.weight is table else 0
        past = _tensors(output.past_key_values) if kind == "decoder" else []
        self.cache = [[tensor.shape[1], tensor.shape[3]] for tensor in past]
        inputs = feed(self.names, seen=3 if past else 0, input_ids=ids)
        self.example = (*(torch.from_numpy(inputs[name]) for name in self.names), *past)
        self.inputs = [*self.names, *(f"past.{i}" for i in range(len(past)))]
        self.outputs = [self.output, *(f"present.{i}" for i in range(len(past)))]

    def forward(self, *tensors: Tensor):
        """Return the result, or a tuple of it and the keys and values."""
        inputs = dict(zip(self.names, tensors))
        if not self.cache:
            return self.model(**inputs)[self.output]
        output = self.model(**inputs, past_key_values=_cache(tensors[len(self.names) :]), use_cache=True)
        return output[self.output], *_tensors(output.past_key_values)

    def export(self, function: Callable) -> object:
        """Return `function(self)`, without the tracer's warnings about shapes, which the tests check."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(self)

    def feeds(self, batches: Sequence[dict[str, Tensor]] | None) -> list[dict[str, np.ndarray]]:
        """Return calibration batches as inputs of the graph, no keys and values seen before."""
        if not batches:
            raise BadData("fixed scales need at least one batch of calibration text.")
        return [
            feed(self.names, **batch) | empty_past(self.cache, len(batch["input_ids"])) for batch in batches
        ]


def feed(names: Sequence[str], *, seen: int = 0, **tensors: Tensor | None) -> dict[str, np.ndarray]:
    """Return the inputs `names` as int64 arrays; a mask not given sees all, `seen` earlier tokens too."""
    batch, length = tensors["input_ids"].shape
    defaults = {
        "attention_mask": torch.ones(batch, seen + length),
        "token_type_ids": torch.zeros(batch, length),
    }
    tensors = defaults | {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {name: tensors[name].long().contiguous().numpy() for name in names}


def empty_past(cache: Sequence[Sequence[int]], batch: int) -> dict[str, np.ndarray]:
    """Return keys and values of no token, by the name of the graph's input."""
    return {f"past.{i}": np.zeros((batch, h, 0, w), dtype=np.float32) for i, (h, w) in enumerate(cache)}


def deployed(
    library: str, backend: str, traced: Traced, graph: bytes, packed: bytes
) -> tuple[GraphModel, dict]:
    """Return the model that runs `graph` in the place of the traced one, and what it holds as integers.

    `stored` by element type proves it. A token table that the graph holds twice, for the head too, counts as
    the weights it is: its bits are those of both.
    """
    replacement = GraphModel(copy.deepcopy(traced.model.config))
    replacement.library, replacement.output = library, traced.output
    replacement.stands_for = type(traced.model).__name__
    replacement.inputs, replacement.cache = traced.names, traced.cache
    replacement.weight_count = count_parameters(traced.model)
    buffers = [
        torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8) for content in (graph, packed)
    ]
    replacement.graph, replacement.packed = buffers
    by_element: dict[str, list[StoredMatrix]] = {}
    stored = replacement.runtime().stored_matrices(*(buffer.numpy() for buffer in buffers))
    for matrix in sorted(stored, key=lambda matrix: matrix.element):
        by_element.setdefault(matrix.element, []).append(matrix)
    weights = sum(matrix.weights for matrix in stored)
    weights -= traced.tied * (sum(matrix.weights == traced.tied for matrix in stored) > 1)
    figures = {
        "bits_per_weight": 8 * sum(matrix.nbytes for matrix in stored) / weights if weights else 32.0,
        "share_quantized": weights / replacement.weight_count,
        "weights_quantized": weights,
        "backend": backend,
        "stored": {
            element: {
                "matrices": len(matrices),
                "weights": sum(matrix.weights for matrix in matrices),
                "most_distinct_values": max(matrix.values for matrix in matrices),
            }
            for element, matrices in by_element.items()
        },
    }
    return replacement.eval(), figures


def imported(package: str) -> ModuleType:
    """Return the package, or raise `BadSetting` with the command that installs it."""
    try:
        return import_module(package)
    except ImportError as error:
        command = "pip install -e '.[deploy]' -c constraints.txt"
        raise BadSetting(f"{package} cannot be imported ({error}): {command} installs it.") from error


def _cache(tensors: Sequence[Tensor]) -> DynamicCache:
    """Return a cache of `tensors`, by hand: `update` would concatenate to a list, exporting to nothing."""
    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2]):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        cache.layers.append(layer)
    return cache


def _tensors(cache: DynamicCache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
