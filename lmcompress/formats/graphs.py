"""Models exported as graphs that another library runs, in that library's own files.

`openvino` and `onnx` write the graphs and run them; here is the trace, and the model that stands in for the
original in evaluation, timing and storage: same calls, same outputs.
"""

import copy
import hashlib
import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
)

from lmcompress.errors import BadData, BadSetting, CorruptCheckpoint, UnknownFamily
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.models.packed import Packed, QuantizedEmbedding

_LIBRARIES = {"openvino_graphs": "openvino", "onnxruntime_graphs": "onnx"}  # as earlier models name them
_OUTPUTS = {"logits": CausalLMOutputWithPast, "last_hidden_state": BaseModelOutputWithPast}
# Of an encoder-decoder's model card.
_PAIR = (
    "Each of its outputs `present.N.encoder.key` and `.value` is an input `past_key_values.N.encoder.key` or "
    "`.value` of the decoder in every call, and the source's mask is `encoder_attention_mask`. The "
    "decoder's first token is"
)
SMALLEST_GROUP = 16  # of integers that share a scale, in the operations of ONNX Runtime
MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_model"  # what files are called


@dataclass
class Past:
    """Keys and values of `length` tokens, `state` as the library likes it; `copy.deepcopy` gives another.

    `cross`: those of an encoder's states, as inputs of the decoder's graph.
    """

    length: int = 0
    state: object | None = None
    cross: Mapping[str, np.ndarray] | None = None
    is_compileable = False  # as `generate` asks every cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens have been seen."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the beams `beam_idx` `(batch,)`, in place."""
        if self.state is not None:
            self.state.reorder(beam_idx.numpy())


@dataclass(frozen=True)
class StoredMatrix:
    """Integers of a graph: element type, how many, bytes with scales and zero points, distinct values."""

    element: str
    weights: int
    nbytes: int
    values: int


class GraphFolder:
    """The folder where a model's graphs lie; a temporary one goes with the last model that reads it."""

    def __init__(self, path: Path | None = None):
        self._temporary = None if path else tempfile.TemporaryDirectory(prefix="graphs-")
        self.path = Path(path or self._temporary.name)

    def __deepcopy__(self, memo: dict) -> "GraphFolder":
        return self


class GraphModel(PreTrainedModel):
    """A `transformers` model whose work another library does, on the CPU, from the graphs in its folder.

    Attributes:
        library: module beside this one that runs the graphs.
        stands_for: class of the original.
        inputs: names of its tensor inputs; `output` that of its result.
        cache: heads and width of each of the keys and values (layer by layer, keys first), if there are any.
        weight_count: parameters of the original.
        files: names and bytes of the files.
    """

    config_class = AutoConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # as the original's config says

    def __init__(self, config):
        super().__init__(config)
        self.library, self.stands_for, self.output = "", "", ""
        self.inputs, self.cache, self.weight_count, self.files = [], [], 0, []
        self.empty = nn.Parameter(torch.empty(0))  # says device and dtype to who asks; holds nothing
        for name in ("graph", "packed"):  # contents of the files, in what was saved before there were files
            self.register_buffer(name, None)
        self._folder: GraphFolder | None = None
        self._sessions: dict[str, Callable] = {}
        self._threads = 0

    def get_input_embeddings(self) -> None:
        """Return None: the table is inside the graph."""

    def get_output_embeddings(self) -> None:
        """Return None: the head is inside the graph."""

    def runtime(self) -> ModuleType:
        """Return the module that runs the graphs."""
        return import_module(f"{__package__}.{_LIBRARIES.get(self.library, self.library)}")

    def folder(self) -> Path:
        """Return where the files lie; of a model saved when its tensors held them, they are written first."""
        if self._folder is None:
            folder, names = GraphFolder(), self.runtime().file_names(MODEL)
            for name, content in zip(names, (self.graph, self.packed)):
                (folder.path / name).write_bytes(content.numpy().tobytes())
            self.graph = self.packed = None
            self.read_files(folder, names)
        return self._folder.path

    def read_files(self, folder: "GraphFolder | Path", names: Sequence[str]) -> None:
        """Run the graphs in `folder` from now on, which the files `names` are."""
        self._folder = folder if isinstance(folder, GraphFolder) else GraphFolder(folder)
        self._sessions, self.empty = {}, nn.Parameter(torch.empty(0))
        self.files = [[name, (self._folder.path / name).stat().st_size] for name in names]

    def write_files(self, folder: Path) -> list[str]:
        """Copy the graphs' files into `folder`, and return their names."""
        source = self.folder()
        for name, _ in self.files:
            shutil.copyfile(source / name, folder / name)
        return [name for name, _ in self.files]

    def usage(self) -> list[str]:
        """Return the lines of a model card that say how the runtime alone runs the files, in Markdown."""
        runtime, is_pair = self.runtime(), isinstance(self, GraphEncoderDecoder)
        files = [runtime.file_names(stem)[0] for stem in ((ENCODER, DECODER) if is_pair else (MODEL,))]
        inputs = ", ".join(f"`{name}`" for name in self.inputs)
        lines = ["Runs without this package:", "", "```python", *runtime.loading(files), "```", ""]
        lines += [f"Inputs {inputs}: int64 `(batch, seq)`, 1 for a token and 0 for padding in a mask."]
        if self.cache:
            mask = "" if is_pair else ", the mask those of all tokens so far"
            lines += [
                "",
                f"They are those of the tokens that the decoder has not seen yet{mask}. {runtime.STATE}",
            ]
        if is_pair:
            start = self.config.decoder_start_token_id
            lines += [
                "",
                f"{files[0]} takes `input_ids` and `attention_mask` of the source, once. {_PAIR} {start}.",
            ]
        return lines

    def session(self, stem: str = MODEL) -> Callable:
        """Return a graph, ready to run on as many threads as torch uses now; made at the first call."""
        if self._threads != torch.get_num_threads():
            self._threads, self._sessions = torch.get_num_threads(), {}
        if stem not in self._sessions:
            file = self.folder() / self.runtime().file_names(stem)[0]
            if not file.is_file():
                raise CorruptCheckpoint(f"{file} is gone: load the model again from where it lies now.")
            cache = self.cache if stem != ENCODER else []
            self._sessions[stem] = self.runtime().session(file, threads=self._threads, cache=cache)
        return self._sessions[stem]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
    ):
        """Return what the original does for ids `(batch, seq)`: logits or last states, a decoder's `Past`."""
        seen = past_key_values.length if past_key_values is not None else 0
        inputs = feed(
            self.inputs,
            seen=seen,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        keep = bool(self.cache) and use_cache is not False
        (output, *_), past = self.session()(inputs, past_key_values, keep)
        return _OUTPUTS[self.output](**{self.output: torch.from_numpy(output)}, past_key_values=past)

    def train(self, mode: bool = True) -> "GraphModel":
        """Refuse all but `mode=False`: train first, and export last."""
        if mode:
            raise BadSetting(
                f"{self.library} runs a finished graph, which cannot be trained: train the model first."
            )
        return super().train(False)

    def __getstate__(self) -> dict:
        """Return the state without the sessions: they cannot be copied, and are made again."""
        return self.__dict__ | {"_sessions": {}}


class GraphDecoder(GraphModel, GenerationMixin):
    """A decoder as a graph, which `generate` works on."""

    def generate(self, *arguments, **settings) -> Tensor:
        """Return what `transformers` generates, its keys and values in a `Past`."""
        if settings.get("use_cache") is not False:
            settings = {"past_key_values": Past()} | settings
        return super().generate(*arguments, **settings)


class GraphEncoderDecoder(GraphDecoder):
    """An encoder-decoder as two graphs: the encoder's, which also gives the keys and values of its states."""

    def get_encoder(self, modality: str | None = None) -> "GraphEncoder":
        """Return the first graph as a module."""
        return GraphEncoder(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
    ) -> Seq2SeqLMOutput:
        """Return logits `(batch, seq, vocabulary)` of the decoder, and its `Past`; no loss.

        Without `decoder_input_ids` they are the `labels` one position later.
        """
        encoded = encoder_outputs or self.get_encoder()(input_ids, attention_mask)
        ids = self.shifted(labels) if decoder_input_ids is None else decoder_input_ids
        past = past_key_values if past_key_values is not None else Past()
        keep, states = use_cache is not False, encoded.last_hidden_state
        if past.cross is None:
            past.cross = _repeated(encoded.cross, ids.shape[0])
        mask = torch.ones(states.shape[:2]) if attention_mask is None else attention_mask
        inputs = feed(self.inputs, seen=past.length, input_ids=ids, encoder_attention_mask=mask)
        (output, *_), past = self.session(DECODER)(inputs | past.cross, past, keep)
        return Seq2SeqLMOutput(
            logits=torch.from_numpy(output), past_key_values=past, encoder_last_hidden_state=states
        )

    def shifted(self, labels: Tensor) -> Tensor:
        """Return the decoder's inputs for `labels` `(batch, seq)`: one later, ignored ones as padding."""
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return ids.masked_fill(ids == -100, padding)


class GraphEncoder(nn.Module):
    """The encoder of a `GraphEncoderDecoder`; its output holds the keys and values for the decoder, too."""

    main_input_name = "input_ids"

    def __init__(self, model: GraphEncoderDecoder):
        super().__init__()
        self._model = [model]  # in a list, so that it is no submodule

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> BaseModelOutput:
        """Return the states `(batch, seq, hidden)` of ids `(batch, seq)`."""
        (model,) = self._model
        inputs = feed(["input_ids", "attention_mask"], input_ids=input_ids, attention_mask=attention_mask)
        (states, *cross), _ = model.session(ENCODER)(inputs, None, False)
        output = BaseModelOutput(last_hidden_state=torch.from_numpy(states))
        output.cross = dict(zip(cross_names(len(cross)), cross))
        return output


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
        ids = GraphEncoderDecoder.shifted(self.model, batch.get("labels", batch["input_ids"]))
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


def refusal(model: PreTrainedModel, library: str) -> str | None:
    """Return why `model` cannot become a graph of `library`, or None."""
    if isinstance(model, GraphModel):
        is_other = _LIBRARIES.get(model.library, model.library) != library
        return (
            f"it is a graph of {model.library} already: export the model it was made from."
            if is_other
            else None
        )
    for name, layer in model.named_modules():
        if not isinstance(layer, Packed):
            continue
        size = layer.group_size or layer.width
        if layer.nf4 or layer.bits == 3:
            kind = "NF4" if layer.nf4 else "3 bits"
            return f"{name} has {kind}, which {library} does not know: use rtn, gptq or awq with 4 or 8."
        if layer.width % size or (layer.group_size and (size & -size) < SMALLEST_GROUP):
            return (
                f"{name} has {layer.width} inputs in groups of {size}: a group is a multiple of "
                f"{SMALLEST_GROUP} that divides them."
            )
    try:
        trace(floating(model)[0])
    except UnknownFamily as error:
        return str(error)
    return None


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


def deployed(
    library: str, backend: str, traces: Sequence[Traced], folder: GraphFolder, files: Sequence[str]
) -> tuple[GraphModel, dict]:
    """Return the model that runs the graphs in the place of the traced one, and what they hold as integers.

    `stored` by element type proves it. A token table that the graphs hold twice, for the head too, counts as
    the weights it is: its bits are those of both.
    """
    last, model = traces[-1], traces[-1].model
    cls = GraphEncoderDecoder if len(traces) > 1 else GraphDecoder if last.cache else GraphModel
    replacement = cls(copy.deepcopy(model.config))
    if cls is not GraphModel and model.generation_config is not None:
        replacement.generation_config = copy.deepcopy(model.generation_config)
    replacement.library, replacement.output = library, last.outputs[0]
    replacement.stands_for = type(model).__name__
    replacement.inputs, replacement.cache = last.names, last.cache
    replacement.weight_count = count_parameters(model)
    replacement.read_files(folder, files)
    runtime = replacement.runtime()
    by_element: dict[str, list[StoredMatrix]] = {}
    paths = [folder.path / runtime.file_names(traced.stem)[0] for traced in traces]
    stored = [matrix for path in paths for matrix in runtime.stored_matrices(path)]
    for matrix in sorted(stored, key=lambda matrix: matrix.element):
        by_element.setdefault(matrix.element, []).append(matrix)
    weights = sum(matrix.weights for matrix in stored) - _repeated_weights(model, stored)
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


def _repeated(arrays: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """Return `arrays` with a row for each of the `batch`: beams of an example stand together."""
    return {
        name: array if len(array) == batch else np.repeat(array, batch // len(array), axis=0)
        for name, array in arrays.items()
    }


def _repeated_weights(model: PreTrainedModel, stored: Sequence[StoredMatrix]) -> int:
    """Return how many weights of tied token tables the graphs hold more than once."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight is not table:
        return 0
    return table.numel() * max(0, sum(matrix.weights == table.numel() for matrix in stored) - 1)
