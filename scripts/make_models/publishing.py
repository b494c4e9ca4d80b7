"""From a trained model to the committed folder: bf16 weights, tokenizer, training.json, a card."""

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from lmcompress.paths import atomic_path, write_json, write_text


def command_line(
    description: str, names: Iterable[str], arguments: Sequence[str] | None = None, *, budget: bool = True
) -> tuple[str, dict]:
    """Return the chosen one of `names`, and what was asked of the budget otherwise than as committed."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("name", choices=list(names))
    for name, number in (("steps", int), ("batch-size", int), ("learning-rate", float)) if budget else ():
        parser.add_argument(f"--{name}", type=number, default=argparse.SUPPRESS, help="default: as committed")
    changes = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return changes.pop("name"), changes


def publish(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    training: dict,
    judge: Callable[[nn.Module], dict],
    card: Callable[[str, dict], str],
) -> Path:
    """Write `folder` whole, with what `judge` returns of the weights as written, which are rounded to bf16.

    `card` makes the README.md of the model's name and what training.json holds.
    """
    model.to("cpu", torch.bfloat16).eval()
    training |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        training |= judge(load(temporary))
        write_json(temporary / "training.json", training)
        write_text(temporary / "README.md", card(folder.name, training))
    return folder


def load(folder: Path) -> nn.Module:
    """Return a pocket model in fp32, ready to be evaluated."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto = AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()
