"""Models exported as graphs that another library runs, in that library's own files.

`tracing` says what becomes a graph, `openvino` and `onnx` write the graphs and run them; here is the model
that stands in for the original in evaluation, timing and storage: same calls, same outputs.
"""

import copy
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
)

from lmcompress.errors import BadSetting, CorruptCheckpoint, UnknownFamily
from lmcompress.formats.tracing import (
    DECODER,
    ENCODER,
    MODEL,
    Traced,
    cross_names,
    feed,
    floating,
    shifted,
    trace,
)
from lmcompress.models.anatomy import count_parameters
from lmcompress.models.packed import Packed
from lmcompress.paths import scratch_folder

_LIBRARIES = {"openvino_graphs": "openvino", "onnxruntime_graphs": "onnx"}  # as earlier models name them
_OUTPUTS = {"logits": CausalLMOutputWithPast, "last_hidden_state": BaseModelOutputWithPast}
# Of an encoder-decoder's model card.
_PAIR = (
    "Each of its outputs `present.N.encoder.key` and `.value` is an input `past_key_values.N.encoder.key` or "
    "`.value` of the decoder in every call, and the source's mask is `encoder_attention_mask`. The "
    "decoder's first token is"
)
SMALLEST_GROUP = 16  # of integers that share a scale, in the operations of ONNX Runtime


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
        if path is None:
            stack = ExitStack()
            path = stack.enter_context(scratch_folder())
            weakref.finalize(self, stack.close)
        self.path = Path(path)

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
        names = ["encoder", "model"] if is_pair else ["model"]
        code = [f"import {runtime.LIBRARY}", ""]
        code += [f"{name} = {runtime.OPENED.format(file)}" for name, file in zip(names, files)]
        code += [f"outputs = {runtime.CALLED.format(names[0])}  # arrays by name"]
        lines = ["Runs without this package:", "", "```python", *code, "```", ""]
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
        ids = shifted(self.config, labels) if decoder_input_ids is None else decoder_input_ids
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
    if cls is not GraphModel and getattr(model, "generation_config", None) is not None:
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
