"""What formats need of a model: its integers made floating-point, and a reading by plain transformers."""

import copy
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import BadSetting
from lmcompress.models import loading, serialization, storage
from lmcompress.models.auto import auto_class
from lmcompress.models.packed import Packed, QuantizedEmbedding


def dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose packed integers are floating-point layers of the classes that the config names."""
    config = type(model.config).from_dict(model.config.to_dict())
    twin = serialization.skeleton(type(model), config, serialization.attention_of(model))
    model, weights, layers = copy.deepcopy(model), {}, dict(twin.named_modules(remove_duplicate=False))
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Packed):
            matrix = weights.setdefault(id(module.packed), nn.Parameter(module.dequantized()))
            model.set_submodule(name, _dense_layer(layers.get(name), module, matrix))
    return model


def undescribed(model: PreTrainedModel) -> str | None:
    """Return a sentence if plain transformers could not rebuild the dense copy of `model`, else None."""
    try:
        if storage.is_plain(dense_copy(model)):
            return None
        reason = "blocks of different widths, factors, shared or other layers"
    except (BadSetting, AttributeError) as error:  # a layer that the config does not know, by name or kind
        reason = str(error).partition(". ")[0]
    return (
        f"its structure is not what a {model.config.model_type} config describes ({reason}): this format "
        'holds plain architectures only. Use format="transformers".'
    )


def read_back(folder: Path, *, device, dtype, **options) -> tuple:
    """Return the model that plain transformers reads from `folder`, and the tokenizer or None."""
    name = storage.read_record(folder)["class"].rpartition(":")[2]
    auto = getattr(transformers, auto_class(name) or "AutoModel")
    model = auto.from_pretrained(folder, dtype=dtype or "auto", **options).to(device).eval()
    tokenizer = loading.tokenizer_of(folder) if (folder / "tokenizer_config.json").is_file() else None
    return model, tokenizer


def reading_code(model: PreTrainedModel, **options: str) -> list[str]:
    """Return the lines that load `model` with plain transformers."""
    auto = auto_class(type(model).__name__) or "AutoModel"
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    return [
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("this folder"{arguments})',
    ]


def _dense_layer(twin: nn.Module | None, module: Packed, matrix: nn.Parameter) -> nn.Module:
    """Return a layer of the class of `twin`, else a Linear, with `matrix` and the bias of `module`."""
    is_table = isinstance(module, QuantizedEmbedding)
    if not isinstance(twin, nn.Embedding if is_table else nn.Linear | Conv1D):
        twin = (nn.Embedding if is_table else nn.Linear)(1, 1)
    layer = copy.deepcopy(twin)
    layer.weight = nn.Parameter(matrix.t().contiguous()) if isinstance(twin, Conv1D) else matrix
    if not is_table:
        layer.bias = module.bias
    sizes = dict.fromkeys(("in_features", "nx", "embedding_dim"), module.width)
    sizes |= dict.fromkeys(("out_features", "nf", "num_embeddings"), module.rows)
    for name in sizes.keys() & vars(layer).keys():
        setattr(layer, name, sizes[name])
    return layer
