"""Loads a pretrained model by id or folder, whole or as a difference to a base, checked.

Whoever gets a `LoadedModel` may rely on it: every tensor came from the file (only a task head that was asked
for is fresh), every number is finite, no code from the checkpoint was run, and dropout is off.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lmcompress.errors import (
    AssetNotFound,
    BadSetting,
    BadWeights,
    CorruptCheckpoint,
    UnknownFamily,
    WrongTask,
)
from lmcompress.models import assets, checkpoints

Head = Literal["classification", "regression", "lm"]
ModelKind = Literal["encoder", "decoder", "encoder-decoder"]

HEADS = ("classification", "regression", "lm")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
_TOKENIZER_PARTS = (
    *("tokenizer*.json", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.spm", "bpe.codes"),
)
_HEADS_OF_FILES = ("ForSequenceClassification", "ForMaskedLM", "ForPreTraining", "ForTokenClassification")
_AUTO_CLASSES = {suffix: getattr(transformers, f"AutoModel{suffix}") for suffix in _HEADS_OF_FILES}


@dataclass
class LoadedModel:
    """A model in eval mode with its tokenizer (None if the folder has none), its origin and content hash."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    path: Path
    family: str
    kind: ModelKind
    hash: str


def load(
    name: str | Path,
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
) -> LoadedModel:
    """Load a model; without `head` the one its checkpoint names, and a language model for (de/en)coders.

    A head that the checkpoint lacks is initialised from seed 0 and has to be trained. `attn_implementation`
    falls back to "eager" for families that have no other.

    Raises:
        AssetNotFound: nothing under that name. CorruptCheckpoint: weights that do not fit their header or
            model.
        UnsafeCheckpoint: unpickling code. BadWeights: NaN or infinity. WrongTask: no such head for this
            family.
        UnknownFamily: transformers has no such architecture. BadSetting: `head` and `num_labels` make no
            sense.
    """
    if head not in (None, *HEADS):
        raise BadSetting(f"head={head!r} is unknown; choose one of {', '.join(HEADS)}, or None.")
    if num_labels is not None and (head is None or (head != "classification" and num_labels != 1)):
        raise BadSetting(f"num_labels={num_labels} needs head='classification' (head is {head!r}).")
    path = assets.resolve(name, kind="models")
    base = _base_of(path)
    weights = base or path
    refs = {folder: {ref.name: ref for ref in checkpoints.tensors(folder)} for folder in {path, weights}}
    config = _config(path)
    kind = _kind(config)
    auto = _auto_class(config, kind, head, str(name))
    tokenizer = next((tokenizer_of(folder) for folder in (path, weights) if _has_tokenizer(folder)), None)
    _fit_config(config, head, num_labels, tokenizer)
    model, missing = _build(auto, weights, config, dtype, attn_implementation)
    if base:
        missing -= _override(model, refs[path], path, head)
    _check_missing(model, missing, head, str(name))
    _check_finite(model, path)
    model = model.to(device).eval()
    return LoadedModel(model, tokenizer, str(name), path, config.model_type, kind, _hash(path, base))


def identity(name: str | Path) -> str:
    """Return the content hash that `load(name)` would carry, without loading: 16 hex digits.

    Raises:
        AssetNotFound: nothing under that name.
    """
    path = assets.resolve(name, kind="models")
    return _hash(path, _base_of(path))


def tokenizer_identity(name: str | Path) -> str | None:
    """Return 16 hex digits over the tokenizer's files that `load(name)` would read; None where there are none."""
    path = assets.resolve(name, kind="models")
    folder = next((f for f in (path, _base_of(path) or path) if _has_tokenizer(f)), None)
    return folder and assets.folder_hash(folder, _TOKENIZER_PARTS)


def tokenizer_of(path: Path | str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model folder, with a padding token (end-of-text where it has none).

    Raises:
        AssetNotFound: the folder holds no tokenizer files.
    """
    if not _has_tokenizer(Path(path)):
        raise AssetNotFound(
            f"no tokenizer in {path}: looked for {', '.join(_TOKENIZER_FILES)}. Save one beside the weights "
            "with `tokenizer.save_pretrained(folder)`."
        )
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _base_of(path: Path) -> Path | None:
    """Return the folder of the base model if `path` holds only a difference to it, else None."""
    record = path / "compression.json"
    if not record.is_file():
        return None
    try:
        base = json.loads(record.read_text(encoding="utf-8")).get("base")
    except (ValueError, AttributeError) as error:
        raise CorruptCheckpoint(f"{record} is not a JSON object ({error}). Save the model again.") from error
    if base is None:
        raise BadSetting(
            f"{path} holds a compressed model: load it with lmcompress.models.storage.load(folder)."
        )
    return assets.resolve(base, kind="models")


def _config(path: Path) -> PretrainedConfig:
    file = path / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        if kind == "headwise-llama":
            import_module("lmcompress.models.headwise")  # this project's own: importing it registers it
        with _quiet():
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except FileNotFoundError as error:
        raise AssetNotFound(f"{path} has no config.json, so its architecture is unknown.") from error
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{file} is not a JSON object ({error}). Fetch it again.") from error
    except (ValueError, KeyError, OSError) as error:
        raise UnknownFamily(
            f"transformers {transformers.__version__} has no architecture {kind!r} ({file}), or would have "
            "to run code from the checkpoint for it, which this project never does. Register the "
            "architecture first (AutoConfig.register, AutoModelForCausalLM.register), or choose a model of a "
            "known family."
        ) from error


def _kind(config: PretrainedConfig) -> ModelKind:
    named = (config.architectures or [""])[0]
    if config.is_encoder_decoder and not named.endswith("EncoderModel"):
        return "encoder-decoder"
    causal = getattr(config, "is_decoder", False) or named.endswith(("ForCausalLM", "LMHeadModel"))
    causal = causal or type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return "decoder" if causal and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else "encoder"


def _auto_class(config: PretrainedConfig, kind: ModelKind, head: Head | None, name: str) -> type:
    named = (config.architectures or [""])[0]
    if head == "lm" and kind == "encoder":
        raise WrongTask(
            f"{name} ({config.model_type}) is a bidirectional encoder: it predicts no next token and has no "
            "perplexity. Use head='classification' or 'regression', or a decoder or encoder-decoder."
        )
    if head in ("classification", "regression"):
        if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise WrongTask(
                f"{name}: transformers has no sequence classifier for {config.model_type!r} models."
            )
        return transformers.AutoModelForSequenceClassification
    suffix = next((suffix for suffix in _AUTO_CLASSES if named.endswith(suffix)), None)
    if head is None and suffix and (kind == "encoder" or suffix != "ForPreTraining"):
        return _AUTO_CLASSES[suffix]
    if kind == "decoder":
        return transformers.AutoModelForCausalLM
    if kind == "encoder-decoder":
        return transformers.AutoModelForSeq2SeqLM
    return getattr(transformers, named) if named.endswith("EncoderModel") else transformers.AutoModel


def _fit_config(
    config: PretrainedConfig,
    head: Head | None,
    num_labels: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if head == "classification":
        config.num_labels = config.num_labels if num_labels is None else num_labels
        config.problem_type = "single_label_classification"
    elif head == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    if getattr(config, "pad_token_id", None) is None and tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id  # a decoder's classifier finds the last token through it


def _build(
    auto: type, weights: Path, config: PretrainedConfig, dtype: torch.dtype, attention: str
) -> tuple[nn.Module, set[str]]:
    """Build the model on the weights, and name its tensors that they did not fill."""

    def build(implementation: str) -> tuple[nn.Module, dict]:
        options = {"config": config, "dtype": dtype, "attn_implementation": implementation}
        options |= {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
        return auto.from_pretrained(weights, ignore_mismatched_sizes=True, **options)

    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                model, info = build(attention)
            except ValueError as error:
                if attention == "eager" or "attention" not in str(error):
                    raise
                model, info = build("eager")
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        lines = (str(error) or repr(error)).splitlines()
        raise CorruptCheckpoint(f"{weights} does not load as {config.model_type}: {lines[0]}") from error
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    return model, set(info["missing_keys"]) | mismatched


def _override(
    model: nn.Module, refs: dict[str, checkpoints.TensorRef], path: Path, head: Head | None
) -> set[str]:
    """Copy the tensors of a partial checkpoint over the base's, and return their names."""
    state = model.state_dict()
    fits = {name for name, ref in refs.items() if name in state and state[name].shape == ref.shape}
    # Who asks for a head of another kind or size gives up the one in the file.
    body = {name for name in refs if head is None or name.startswith(f"{model.base_model_prefix}.")}
    if wrong := sorted(body - fits):
        raise CorruptCheckpoint(
            f"{len(wrong)} tensors of {path} do not fit {type(model).__name__} on its base: "
            + ", ".join(f"{name} {list(refs[name].shape)}" for name in wrong[:4])
            + ". The folder was saved from another base or with another head: save it again."
        )
    with torch.no_grad():
        for name in fits:
            state[name].copy_(refs[name].read())
    return fits


def _check_missing(model: nn.Module, missing: set[str], head: Head | None, name: str) -> None:
    """Refuse tensors that would stay random, except those of a head that the caller means to train."""
    prefix = f"{model.base_model_prefix}."
    inside = model.base_model is model
    body = sorted(key for key in missing if (inside or key.startswith(prefix)) and "pooler" not in key)
    listed = ", ".join(sorted(missing)[:5])
    if body:
        raise CorruptCheckpoint(
            f"{name}: {len(body)} tensors of {type(model).__name__} are missing or have another shape in the "
            f"checkpoint: {', '.join(body[:5])}. They would be random: config.json and weights belong to "
            "different models, or this folder was compressed (then use lmcompress.models.storage.load)."
        )
    if missing and head in (None, "lm"):
        raise WrongTask(
            f"{name} has no trained head for {type(model).__name__}: {listed} would be random. Choose a "
            "checkpoint that has it, or head='classification' or 'regression' and train it."
        )


def _check_finite(model: nn.Module, path: Path) -> None:
    """Look at each parameter once, without a copy: `aminmax` passes NaN on and shows infinity."""
    tensors = ((name, p.detach()) for name, p in model.named_parameters() if p.numel())
    bad = [name for name, tensor in tensors if not torch.isfinite(torch.stack(tensor.aminmax())).all()]
    if bad:
        raise BadWeights(
            f"{len(bad)} tensors of {path} hold NaN or infinity: {', '.join(bad[:5])}. Training diverged or "
            "the file is damaged: fetch or train it again."
        )


def _hash(path: Path, base: Path | None) -> str:
    files = [file.name for file in checkpoints.weight_files(path)]
    digest = assets.folder_hash(path, ["config.json", *files])
    return hashlib.sha256(f"{digest} {_hash(base, None)}".encode()).hexdigest()[:16] if base else digest


def _has_tokenizer(path: Path) -> bool:
    return any(True for pattern in _TOKENIZER_FILES for _ in path.glob(pattern))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports out of notebooks.

    What they warn of is checked here.
    """
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
