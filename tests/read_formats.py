"""Reads folders as somebody else would: `read_formats.py with|without FOLDER…`, one line of JSON for each.

"with" imports lmcompress first; "without" makes that impossible. Beside each folder lies a batch with the
logits it has to give. A folder that holds a GGUF file is read by transformers' own reader.
"""

import json
import sys
from pathlib import Path

if sys.argv[1] == "with":
    import lmcompress  # noqa: F401
else:
    sys.modules["lmcompress"] = None  # importing it now raises ImportError

import torch
import transformers
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ENDS = {"ForSequenceClassification", "ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForConditionalGeneration"}
AUTO = {end: f"AutoModel{end}" for end in ENDS}
AUTO |= {"LMHeadModel": "AutoModelForCausalLM", "ForConditionalGeneration": "AutoModelForSeq2SeqLM"}


def outcome(folder: Path) -> dict:
    """Return the greatest difference of logits, or what the Auto class and the class by name say."""
    fields = json.loads((folder / "config.json").read_text())
    name = fields["architectures"][0].removeprefix("Lmcompress")
    auto = getattr(transformers, next((AUTO[end] for end in ENDS if name.endswith(end)), "AutoModel"))
    files = [file.name for file in folder.glob("*.gguf")]
    config = transformers.AutoConfig.from_pretrained(folder) if files else None
    options = {"gguf_file": files[0], "config": config} if files else {}
    try:
        model = auto.from_pretrained(folder, **options).eval()
    except ValueError as error:
        try:
            getattr(transformers, name).from_pretrained(folder)
        except ValueError as other:
            return {"auto": str(error), "by_name": str(other)}
        return {"auto": str(error), "by_name": "it loaded"}
    batch = load_file(folder.with_name(f"{folder.name}.batch.safetensors"))
    expected = batch.pop("logits").float()
    with torch.no_grad():
        found = model(**batch)[0].float()
    return {"difference": float((found - expected).abs().max()), "class": type(model).__name__}


for argument in sys.argv[2:]:
    print(json.dumps(outcome(Path(argument))))
