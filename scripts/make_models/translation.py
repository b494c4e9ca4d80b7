"""The encoder-decoder of the reference profile: a small T5 trained from scratch to translate image captions.

`python -m scripts.make_models.translation` makes the committed `models/reference/t5-multi30k-en-de`: it stops
and goes on at will (checkpoints under `runs/training/`), and what is there already is not trained again.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lmcompress import device
from lmcompress.errors import BadData
from lmcompress.measure.quality import quality
from lmcompress.paths import MODELS, RUNS, atomic_path, write_json, write_text
from lmcompress.tasks import evaluate, load_task
from lmcompress.tasks.base import Task
from lmcompress.tasks.generation import TARGET_TOKENS
from lmcompress.train import pretraining as data
from lmcompress.train.trainer import TrainSpec, curve, fit
from scripts.make_models import pocket
from scripts.make_models.cards import translation_card
from scripts.make_models.publishing import load

PAIRS = ("en-de", "en-fr")
STEPS, BATCH_SIZE, LEARNING_RATE = 4200, 128, 1e-3  # 19 epochs of 29,000 pairs
REGULARIZED = {"hidden_dropout": 0.25, "label_smoothing": 0.1}


def folder_of(languages: str) -> Path:
    """Return where the model lies; profiles name it `reference/t5-multi30k-<languages>`."""
    return MODELS / "reference" / f"t5-multi30k-{languages}"


def tokenizer_for(examples: Sequence[dict], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return one byte-level BPE for both languages; the instruction, the same in every prompt, is a token.

    `vocab_size` counts all tokens, the instruction (up to a prompt's first colon) and T5's sentinels too.

    Raises:
        BadData: the prompts do not begin alike.
    """
    beginnings = {example["text"].partition(":")[0] + ":" for example in examples}
    if len(beginnings) != 1:
        raise BadData(f"prompts begin in {len(beginnings)} ways; one instruction up to a colon was expected.")
    (instruction,) = beginnings
    texts = [text for e in examples for text in (e["text"].removeprefix(instruction), e["target"])]
    tokenizer = data.train_tokenizer(texts, vocab_size=vocab_size - 1)
    tokenizer.add_tokens([instruction])
    return data.closing_with_end(tokenizer)


def make(
    languages: str = "en-de",
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    progress: bool = False,
) -> Path:
    """Return the folder of the translator of `languages`: train it, or go on, where it is not there.

    It is trained on Multi30k's `train`, watched on `validation`, and scored once on `test`, as written (in
    bf16). "en-fr" takes a data set with that column.
    """
    folder = folder_of(languages)
    if (folder / "training.json").exists():
        return folder
    name = f"multi30k-{languages}"
    watched, test = load_task(name, split="validation"), load_task(name)
    scored = set(map(test.text_key, test.examples))
    examples = [example for example in watched.training_examples() if test.text_key(example) not in scored]
    tokenizer = tokenizer_for(examples, vocab_size=pocket.VOCABULARY)
    model = pocket.build("t5", tokenizer).to(device.choose().device)
    spec = TrainSpec(
        watched.features(tokenizer, examples, length=None),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        min_learning_rate=learning_rate / 50,
        warmup_steps=max(1, steps // 20),
        weight_decay=0.05,
        betas=(0.9, 0.98),
        checkpoint=RUNS / "training" / folder.name,
        checkpoint_every=250,
        evaluate=watched.features(tokenizer, watched.examples, length=None),
        evaluate_every=500,
        **REGULARIZED,
    )
    with pocket.scaled_queries(model):
        history = fit(model, spec, progress=progress)
    training = {
        "task": name,
        "examples": len(examples),
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate} | REGULARIZED,
        "curve": curve(history, points=200),
        "device": device.name(next(model.parameters()).device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    _write(model, tokenizer, folder, training, {"validation": watched, "test": test})
    return folder


def _write(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, training: dict, tasks: dict[str, Task]
) -> None:
    model.to("cpu", torch.bfloat16).eval()
    model.generation_config.update(max_new_tokens=TARGET_TOKENS)
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        rounded = load(temporary)
        for split, task in tasks.items():
            training[split] = quality(evaluate(rounded, tokenizer, task)) | {"data_hash": task.data_hash}
        write_json(temporary / "training.json", training)
        write_text(temporary / "README.md", translation_card(folder.name, training))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: make one translator, or go on making it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("languages", nargs="?", choices=PAIRS, default=PAIRS[0])
    for name, kind in (("steps", int), ("batch-size", int), ("learning-rate", float)):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger(__name__).info("%s", make(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
