"""Fine-tuning a pretrained encoder for a classification task, whole or in its last blocks.

`python -m lmcompress.train.encoder pydocs` makes the committed `models/pocket/minilm-pydocs`, and `... sst2` the
`models/pocket/minilm-sst2` of the reference profile; both hold only the tensors that differ from all-MiniLM-L6-v2.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn

from lmcompress import device
from lmcompress.errors import BadSetting
from lmcompress.models import anatomy, loading
from lmcompress.paths import MODELS, RUNS, atomic_path, write_json, write_text
from lmcompress.tasks import evaluate, load_task
from lmcompress.train.card import encoder_card
from lmcompress.train.trainer import TrainSpec, fit

BASE = "sentence-transformers/all-MiniLM-L6-v2"
# Task of each committed encoder, and how it was trained; three blocks in bf16 are what 12 MB hold.
BUDGETS = {
    "pydocs": ("pydocs-library", {"epochs": 3.0, "learning_rate": 5e-4, "last_blocks": 2}),
    "sst2": ("sst2", {"epochs": 1.0, "learning_rate": 3e-4, "last_blocks": 3}),
}
SENTENCE_TOKENS = 128


def finetune_encoder(
    name: str,
    task_name: str,
    folder: Path,
    *,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    last_blocks: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """The folder of `name` fine-tuned on a classification task: as it is there, else trained and written.

    Args:
        task_name: a task of kind classification; trained on its `train`, scored on its `validation` split.
        last_blocks: train only so many blocks from the top, the pooler and the classifier, and write only those
            tensors, in bf16 (a partial checkpoint of `name`); None trains and writes everything.

    Raises:
        BadSetting: `last_blocks` is not between 1 and the model's number of blocks.
    """
    asked, done = locals(), folder / "training.json"
    if done.exists():
        return folder
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # notebooks of one run may ask at once
        return folder if done.exists() else _finetune(**asked)


def _finetune(
    name, task_name, folder, *, epochs, batch_size, learning_rate, last_blocks, seed, progress
) -> Path:
    task = load_task(task_name, split="validation")
    loaded = loading.load(name, head="classification", num_labels=len(task.labels))
    model, config = loaded.model, loaded.model.config
    config.architectures = [type(model).__name__]
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {label: i for i, label in enumerate(task.labels)}
    if last_blocks is not None:
        _freeze_below(model, last_blocks)
    features = task.training_features(loaded.tokenizer, length=SENTENCE_TOKENS, seed=seed)
    steps = max(1, round(epochs * len(features) / batch_size))
    spec = TrainSpec(
        features,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        seed=seed,
        dtype=device.fast_dtype(model.device),
        checkpoint=RUNS / "training" / folder.name,
        checkpoint_every=200,
    )
    history = fit(model, spec, progress=progress)
    partial = last_blocks is not None
    scored = evaluate(_rounded(model) if partial else model, loaded.tokenizer, task)
    training = {
        "base": name,
        "task": task_name,
        "data_hash": task.data_hash,
        "examples": len(features),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "last_blocks": last_blocks,
        "seconds": history.steps[-1]["seconds"],
        "validation": {
            "accuracy": scored.value,
            "majority": scored.floor,
            "examples": len(task.examples),
            "macro_f1": scored.secondary["macro_f1"],
        },
        "loss": [
            {k: record[k] for k in ("step", "loss")} for record in history.steps[:: max(1, steps // 200)]
        ],
    }
    with atomic_path(folder) as temporary:
        _write(model, loaded.tokenizer, temporary, base=name if partial else None)
        write_json(temporary / "training.json", training)
        write_text(temporary / "README.md", encoder_card(folder.name, training))
    return folder


def make_pocket(kind: str = "pydocs", *, progress: bool = False) -> Path:
    """A committed encoder, "pydocs" or "sst2": all-MiniLM-L6-v2 with its last blocks fine-tuned for the task."""
    task, settings = BUDGETS[kind]
    return finetune_encoder(BASE, task, MODELS / "pocket" / f"minilm-{kind}", progress=progress, **settings)


def _freeze_below(model: nn.Module, last_blocks: int) -> None:
    blocks = anatomy.anatomy(model).stacks["encoder"]
    if not 1 <= last_blocks <= len(blocks):
        raise BadSetting(
            f"last_blocks={last_blocks}: the model has {len(blocks)} blocks; choose 1 to {len(blocks)}."
        )
    model.base_model.requires_grad_(False)
    for module in (
        *(block.module for block in blocks[-last_blocks:]),
        getattr(model.base_model, "pooler", None),
    ):
        if module is not None:
            module.requires_grad_(True)


def _rounded(model: nn.Module) -> nn.Module:
    """Round what was trained to bf16, so that what is scored is what is written."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


def _write(model: nn.Module, tokenizer, folder: Path, *, base: str | None) -> None:
    if base is None:
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        trained = {
            name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters() if p.requires_grad
        }
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        write_text(folder / "compression.json", json.dumps({"base": base}) + "\n")
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: make one of the committed encoders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=list(BUDGETS))
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    make_pocket(chosen.task)


if __name__ == "__main__":
    main()
