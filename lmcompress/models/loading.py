"""Loads a pretrained model by id or folder, whole or as a difference to a base, checked.

Every tensor came from the file (only a task head that was asked for is fresh) and every tensor of the file is
used, every number is finite, no code from the checkpoint was run, every token has a row in the embedding, and
dropout is off.
"""

import glob
import hashlib
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import psutil
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lmcompress import errors
from lmcompress.errors import AssetNotFound, BadSetting, BadWeights, CorruptCheckpoint, WrongTask
from lmcompress.models import assets, checkpoints
from lmcompress.models.assets import few
from lmcompress.models.auto import MODEL_TYPE
from lmcompress.models.checkpoints import TensorRef
from lmcompress.models.families import is_buffer

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
_QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "quanto_qmap.json", "quantization_map.json")
# Parts of pretraining that published files hold and that the class named by their config leaves out.
_LEFT_OUT = re.compile(r"(^|\.)(pooler|seq_relationship|sop_classifier)(\.|$)")


@dataclass
class LoadedModel:
    """A model in eval mode with its tokenizer (None if the folder has none), its origin and content hash.

    `dtype` and `file_bytes` are the checkpoint's (bytes None if only a difference to a base).
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    path: Path
    family: str
    kind: ModelKind
    hash: str
    dtype: torch.dtype = torch.float32
    file_bytes: int | None = None


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
        AssetNotFound: nothing under that name. CorruptCheckpoint: weights, config and tokenizer do not fit.
        UnsafeCheckpoint: unpickling code, or shards outside the folder. BadWeights: NaN or quantized.
        WrongTask: no such head for this family. UnknownFamily: transformers has no such architecture.
        BadSetting: `head` and `num_labels` make no sense, or `name` is no folder of a whole model.
    """
    if head not in (None, *HEADS):
        raise BadSetting(f"head={head!r} is unknown; choose one of {', '.join(HEADS)}, or None.")
    if num_labels is not None and (head is None or (head != "classification" and num_labels != 1)):
        raise BadSetting(f"num_labels={num_labels} needs head='classification' (head is {head!r}).")
    path, base = _folders(name)
    weights = base or path
    refs = {folder: {ref.name: ref for ref in checkpoints.tensors(folder)} for folder in {path, weights}}
    stored = _check_dtypes(list(refs[weights].values()), weights, dtype)
    config = _config(path)
    kind = _kind(config)
    auto = _auto_class(config, kind, head, str(name))
    rows = getattr(config.get_text_config(), "vocab_size", None)
    tokenizer = next((tokenizer_of(f, rows) for f in (path, weights) if _has_tokenizer(f)), None)
    if head == "classification":
        config.num_labels = config.num_labels if num_labels is None else num_labels
        config.problem_type = "single_label_classification"
    elif head == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    # A decoder's classifier takes the last token that is not padding: -1 or another token would mislead it.
    misled = kind == "decoder" and auto is transformers.AutoModelForSequenceClassification
    pad = getattr(config, "pad_token_id", None)
    if tokenizer and (pad is None or pad < 0 or (misled and pad != tokenizer.pad_token_id)):
        config.pad_token_id = tokenizer.pad_token_id
    model, missing, unexpected = _build(auto, weights, config, dtype, attn_implementation)
    if base:
        missing -= _override(model, refs[path], path, head)
    _check_missing(model, missing, head, str(name))
    _check_unexpected(model, unexpected, refs[weights], weights)
    _check_finite(model, path)
    size = None if base else sum(file.stat().st_size for file in checkpoints.weight_files(path))
    origin = {"family": config.model_type, "kind": kind, "hash": _hash(path, base)}
    model = model.to(device).eval()
    return LoadedModel(model, tokenizer, str(name), path, **origin, dtype=stored, file_bytes=size)


def identity(name: str | Path) -> str:
    """Return the content hash that `load(name)` would carry, without loading: 16 hex digits."""
    return _hash(*_folders(name))


def tokenizer_identity(name: str | Path) -> str | None:
    """Return 16 hex digits over the tokenizer files that `load(name)` would read, or None."""
    path, base = _folders(name)
    folder = next(filter(_has_tokenizer, (path, base or path)), None)
    return folder and assets.folder_hash(folder, _TOKENIZER_PARTS)


def tokenizer_of(path: Path | str, rows: int | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model folder; one without a usable padding token pads by end-of-text.

    Raises `AssetNotFound` if there are no tokenizer files, `CorruptCheckpoint` if they do not load, or if
    text may become tokens beyond `rows`.
    """
    if not _has_tokenizer(Path(path)):
        raise AssetNotFound(
            f"no tokenizer in {path}: looked for {', '.join(_TOKENIZER_FILES)}. Save one beside the weights "
            "with `tokenizer.save_pretrained(folder)`."
        )
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions
        raise CorruptCheckpoint(
            f"the tokenizer in {path} does not load ({_reason(error)}). Fetch it again, or save it anew with "
            "`tokenizer.save_pretrained(folder)`."
        ) from error
    if rows and len(tokenizer) > rows:
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        special -= set(tokenizer("")["input_ids"])  # the others are in no text
        beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
        if words := [beyond[number] for number in sorted(set(beyond) - special)]:
            raise CorruptCheckpoint(
                f"the tokenizer in {path} has {len(words)} tokens that the embedding of {rows} rows does "
                f"not hold: {few(words)}. Tokens were added without `model.resize_token_embeddings("
                "len(tokenizer))`, or it is another model's: resize and train, or save the right tokenizer."
            )
    limit = rows or len(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= limit:
        ids = (tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
        usable = next(number for number in ids if number is not None and number < limit)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable)
    return tokenizer


def _folders(name: str | Path) -> tuple[Path, Path | None]:
    """Return the folder of a model, and that of its base if it is only a difference to one; both checked."""
    path, base = assets.resolve(name, kind="models"), None
    if not path.is_dir():
        raise BadSetting(f"{path} is no folder. Give the one with config.json, such as {path.parent}.")
    if (record := path / "compression.json").is_file():
        base = checkpoints.read_json(record).get("base")
        if base is None:
            raise BadSetting(f"{path} holds a compressed model: use lmcompress.models.storage.load(folder).")
        base = assets.resolve(base, kind="models")
    for folder in filter(None, (path, base)):
        checkpoints.check_files(folder)
        if (adapter := folder / "adapter_config.json").is_file():
            of = checkpoints.read_json(adapter).get("base_model_name_or_path")
            raise BadSetting(
                f"{folder} holds an adapter for {of!r}, which transformers would add unseen. Merge it: "
                "`PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(new_folder)`, "
                "with the tokenizer; or, to do without it, move adapter_config.json."
            )
    return path, base


def _config(path: Path) -> PretrainedConfig:
    file = path / "config.json"
    if not file.is_file():
        raise AssetNotFound(f"{path} has no config.json, so its architecture is unknown.")
    fields = checkpoints.read_json(file)
    if (family := fields.get("model_type")) == MODEL_TYPE:
        lost = f"{path} lacks compression.json, which says how its layers were changed"
        raise CorruptCheckpoint(f"{lost}: copy the whole folder again.")
    scheme = fields.get("quantization_config") or fields.get("compression_config")
    files = [name for name in _QUANTIZED_FILES if (path / name).is_file()]
    if scheme or files:
        method = scheme.get("quant_method") if isinstance(scheme, dict) else None
        raise BadWeights(
            f"{path} is quantized already ({method or ', '.join(files) or 'bitsandbytes'}): techniques start "
            "from floating-point weights. Give the model it was made from, or write it out with its library: "
            "`AutoModel….from_pretrained(folder).dequantize().save_pretrained(new_folder)`."
        )
    if fields.get("transformers_weights"):
        raise BadSetting(f"{file} names other weights in transformers_weights: remove it, rename them.")
    try:
        if family == "headwise-llama":
            import_module("lmcompress.models.headwise")  # this project's own: importing it registers it
        with _quiet():
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a value of a wrong type fails in a class of its own
        if family in transformers.CONFIG_MAPPING:
            raise CorruptCheckpoint(f"{file} is no config of {family!r}: {_reason(error)}.") from error
        raise errors.UnknownFamily(
            f"transformers {transformers.__version__} has no architecture {family!r} ({file}), or would run "
            "code from the checkpoint for it, which this project never does. Register it first "
            "(AutoConfig.register, AutoModelForCausalLM.register), or choose a model of a known family."
        ) from error


def _check_dtypes(refs: list[TensorRef], path: Path, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of most of the file; refuse matrices of integers, and more than fits into memory."""
    weights = [ref for ref in refs if ref.name.endswith("weight")]
    if integers := [ref.name for ref in weights if not ref.dtype.is_floating_point]:
        raise BadWeights(
            f"{path} holds {len(integers)} weights as integers: {few(integers)}. It is quantized already: "
            "give the model it was made from."
        )
    needed, memory = sum(ref.numel for ref in refs) * dtype.itemsize, psutil.virtual_memory().total
    if needed > memory:
        raise BadSetting(
            f"{path} takes {needed / 1e9:.1f} GB as {dtype}, the machine has {memory / 1e9:.1f} GB: "
            "choose a smaller dtype or model, or another machine."
        )
    sizes = Counter()
    for ref in refs:
        sizes[ref.dtype] += ref.nbytes if ref.dtype.is_floating_point else 0
    return max(sizes, key=sizes.get, default=dtype)


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
        if type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return transformers.AutoModelForSequenceClassification
        raise WrongTask(f"{name}: transformers has no sequence classifier for {config.model_type!r} models.")
    suffix = next((suffix for suffix in _AUTO_CLASSES if named.endswith(suffix)), None)
    if head is None and suffix and (kind == "encoder" or suffix != "ForPreTraining"):
        return _AUTO_CLASSES[suffix]
    if kind == "encoder":
        return getattr(transformers, named) if named.endswith("EncoderModel") else transformers.AutoModel
    return transformers.AutoModelForCausalLM if kind == "decoder" else transformers.AutoModelForSeq2SeqLM


def _build(
    auto: type, weights: Path, config: PretrainedConfig, dtype: torch.dtype, attention: str
) -> tuple[nn.Module, set[str], set[str]]:
    """Build the model on the weights; name its tensors that they did not fill, and theirs that it lacks."""
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
    options |= {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                model, info = auto.from_pretrained(weights, attn_implementation=attention, **options)
            except ValueError as error:
                if attention == "eager" or "attention" not in str(error):
                    raise
                model, info = auto.from_pretrained(weights, attn_implementation="eager", **options)
    except Exception as error:  # whatever config and weights make transformers do
        reason = f"{weights} does not load as {config.model_type}: {_reason(error)}"
        raise CorruptCheckpoint(reason) from error
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    return model, set(info["missing_keys"]) | mismatched, set(info["unexpected_keys"])


def _override(model: nn.Module, refs: dict[str, TensorRef], path: Path, head: Head | None) -> set[str]:
    """Copy the tensors of a partial checkpoint over the base's, and return their names."""
    state = model.state_dict()
    fits = {name for name, ref in refs.items() if name in state and state[name].shape == ref.shape}
    # Who asks for a head of another kind or size gives up the one in the file.
    body = {name for name in refs if head is None or name.startswith(f"{model.base_model_prefix}.")}
    if wrong := sorted(body - fits):
        raise CorruptCheckpoint(
            f"{len(wrong)} tensors of {path} do not fit {type(model).__name__} on its base: "
            f"{few([f'{name} {list(refs[name].shape)}' for name in wrong])}. It was saved from another "
            "base or with another head: save it again."
        )
    with torch.no_grad():
        for name in fits:
            state[name].copy_(refs[name].read())
    return fits


def _check_missing(model: nn.Module, missing: set[str], head: Head | None, name: str) -> None:
    """Refuse tensors that would stay random, except those of a head that the caller means to train."""
    prefix, inside = f"{model.base_model_prefix}.", model.base_model is model
    body = sorted(key for key in missing if (inside or key.startswith(prefix)) and "pooler" not in key)
    if body:
        raise CorruptCheckpoint(
            f"{name}: {len(body)} tensors of {type(model).__name__} are missing or have another shape in the "
            f"checkpoint: {few(body)}. They would be random: config.json and weights are of two models, "
            "or this folder was compressed (then use lmcompress.models.storage.load)."
        )
    if missing and head in (None, "lm"):
        raise WrongTask(
            f"{name} has no trained head for {type(model).__name__}: {few(sorted(missing))} would be random. "
            "Choose a checkpoint that has it, or head='classification' or 'regression' and train it."
        )


def _check_unexpected(model: nn.Module, unexpected: set[str], refs: dict[str, TensorRef], path: Path) -> None:
    """Refuse tensors of the file that no parameter takes, but for buffers and the head of another class."""
    is_named = (_config(path).architectures or [""])[0] == type(model).__name__
    prefix, inside = f"{model.base_model_prefix}.", dict(model.base_model.named_children())

    def is_missed(key: str) -> bool:
        ref = refs.get(key) or refs.get(prefix + key)
        if _LEFT_OUT.search(key) or is_buffer(key, ref.shape if ref else ()):
            return False
        return is_named or key.startswith(prefix) or key.split(".")[0] in inside

    if missed := sorted(filter(is_missed, unexpected)):
        raise CorruptCheckpoint(
            f"{path}: {len(missed)} tensors of it have no place in {type(model).__name__} as config.json "
            f"describes it: {few(missed)}. The config is of another model (fewer blocks, no biases), or a "
            "value was left out of it: fetch or correct config.json."
        )


def _check_finite(model: nn.Module, path: Path) -> None:
    # `aminmax` looks at each parameter once, without a copy: it passes NaN on and shows infinity.
    tensors = ((name, p.detach()) for name, p in model.named_parameters() if p.numel())
    if bad := [name for name, tensor in tensors if not torch.isfinite(torch.stack(tensor.aminmax())).all()]:
        raise BadWeights(
            f"{len(bad)} tensors of {path} hold NaN or infinity: {few(bad)}. Training diverged, or it is "
            "damaged: fetch or train it again."
        )


def _hash(path: Path, base: Path | None) -> str:
    files = [glob.escape(str(file.relative_to(path))) for file in checkpoints.weight_files(path)]
    digest = assets.folder_hash(path, ["config.json", *files])
    return hashlib.sha256(f"{digest} {_hash(base, None)}".encode()).hexdigest()[:16] if base else digest


def _has_tokenizer(path: Path) -> bool:
    return any(True for pattern in _TOKENIZER_FILES for _ in path.glob(pattern))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.') or 'no message'}"


def _quiet() -> ExitStack:
    """Return a context without transformers' bars and load reports: what they warn of is checked here."""
    logging, stack = transformers.utils.logging, ExitStack()
    stack.callback(logging.set_verbosity, logging.get_verbosity())
    if logging.is_progress_bar_enabled():
        stack.callback(logging.enable_progress_bar)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return stack
