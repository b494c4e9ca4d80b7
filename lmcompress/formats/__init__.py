"""Files that others can run: what a compressed model is written as, and which library reads it.

A format is a module with `refusal(model, **options) -> str | None`; `write(model, folder, tokenizer,
**options)`, which returns the names of its weight files and the lines of code that read them; and
`load(folder, device=, dtype=)`. One of graphs has `exported(model)` instead, a model that saves and loads its
own files. Folder, record and model card are the same for all of them, and made here.
"""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from lmcompress.errors import BadSetting


class Format(NamedTuple):
    """A format: its module in this package, what reads it, and the options of `write`."""

    module: str
    reader: str
    options: dict[str, str] = {}


FORMATS = {
    "transformers": Format(
        "transformers", "transformers; what its config cannot say, after import lmcompress"
    ),
    "compressed-tensors": Format("compressed_tensors", "transformers, vLLM"),
    "openvino": Format("openvino", "OpenVINO"),
    "onnx": Format("onnx", "ONNX Runtime"),
    "gguf-f16": Format("gguf", "llama.cpp, transformers", {"encoding": "F16"}),
    "gguf-q8_0": Format("gguf", "llama.cpp, transformers", {"encoding": "Q8_0"}),
    "gguf-q4_0": Format("gguf", "llama.cpp, transformers", {"encoding": "Q4_0"}),
}


def save(
    model,
    folder: str | Path,
    *,
    format: str = "transformers",
    tokenizer=None,
    report=None,
    base_name: str | None = None,
    replace: bool = False,
) -> Path:
    """Write `model` to `folder` as one of `FORMATS`, wholly or not at all.

    `folder`, `report`, `base_name`, `replace` as for `models.storage.save`, which writes "transformers".
    Raises `BadSetting` for an unknown format, with the sentence of `refusal`, and as `storage.save` does.
    """
    from lmcompress.models import storage

    if reason := refusal(model, format):
        raise BadSetting(reason)
    origin = {"report": report, "base_name": base_name}
    is_graph = format != "transformers" and hasattr(_module(format), "exported")
    if is_graph:
        model = _module(format).exported(model)
    if is_graph or format == "transformers":
        return storage.save(model, folder, tokenizer=tokenizer, replace=replace, **origin)
    with storage.new_folder(folder, source=model.name_or_path, replace=replace) as temporary:
        storage.write_config(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        files, code = _module(format).write(model, temporary, tokenizer, **FORMATS[format].options)
        usage = ["```python", *code, "```"]
        storage.finish(temporary, model, usage=usage, weight_files=files, format=format, **origin)
    return Path(folder)


def refusal(model, format: str) -> str | None:
    """Return why `model` cannot be written as `format`, in a sentence, or None if it can.

    Raises `BadSetting` for an unknown format, or a library that is not installed.
    """
    from transformers import PreTrainedModel

    if format not in FORMATS:
        raise BadSetting(f"no format {format!r}; available: {', '.join(FORMATS)}.")
    if not isinstance(model, PreTrainedModel):
        return f"a {type(model).__name__} has no transformers config to rebuild it from."
    return None if format == "transformers" else _module(format).refusal(model, **FORMATS[format].options)


def load(folder: str | Path, *, device="cpu", dtype=None, unpack: bool | str = "auto") -> tuple:
    """Return the model in a folder of any format, in eval mode, and its tokenizer or None.

    `dtype`: cast floating-point weights to it; `unpack` as for `models.storage.load`, of its own format only.
    Raises what that does.
    """
    from lmcompress.models import storage

    record = storage.read_record(Path(folder)) or {}
    if (format := record.get("format", "transformers")) == "transformers":
        return storage.load(folder, device=device, dtype=dtype, unpack=unpack)
    return _module(format).load(Path(folder), device=device, dtype=dtype)


def round_trip(model, folder: str | Path, batches: list[dict]) -> dict[str, float]:
    """Return how the model read back from `folder` compares with `model` on `batches`, as inputs of both.

    "difference": the greatest one of logits; "spread": their standard deviation; "agreement": the share of
    "predictions" (tokens that are no padding, or examples) with the same highest logit; "examples"; "bytes"
    of the weight files.
    """
    import torch

    from lmcompress.models import storage

    files = storage.read_record(Path(folder)).get("weight_files", [storage.WEIGHTS])
    again, _ = load(folder)
    found, expected = [], []
    for batch in batches:
        inputs = {
            name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch
        }
        mask = batch["attention_mask"]
        if model.config.is_encoder_decoder:
            inputs["labels"] = batch["labels"]
            mask = batch["labels"] != -100
        with torch.no_grad():
            for reader, rows in ((again, found), (model, expected)):
                logits = reader(**inputs)
                logits = (logits.logits if "logits" in logits else logits[0]).float()
                rows.append(logits[mask.bool()] if logits.dim() == 3 else logits)
    found, expected = torch.cat(found), torch.cat(expected)
    return {
        "difference": float((found - expected).abs().max()),
        "spread": float(expected.std()),
        "agreement": float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        "predictions": len(found),
        "bytes": sum((Path(folder) / name).stat().st_size for name in files),
        "examples": sum(len(batch["input_ids"]) for batch in batches),
    }


def _module(format: str):
    if format not in FORMATS:
        raise BadSetting(f"a model as {format!r} needs a later version; this one reads {', '.join(FORMATS)}.")
    try:
        return import_module(f"{__name__}.{FORMATS[format].module}")
    except ImportError as error:
        raise BadSetting(
            f"format {format!r} needs {error.name}: pip install -e '.[formats,deploy]' -c constraints.txt"
        ) from error
