"""Fine-tuning a pretrained encoder for a classification task, whole or in its last blocks."""

import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn

from lmcompress import device
from lmcompress.errors import BadSetting, WrongTask
from lmcompress.models import anatomy, loading
from lmcompress.paths import RUNS, atomic_path, write_json, write_text
from lmcompress.tasks import Task, evaluate, load_task
from lmcompress.train.trainer import History, TrainSpec, fit, trained

SENTENCE_TOKENS = 128
CURVE_POINTS = 200

_CARD = """---
license: apache-2.0
library_name: transformers
language: en
base_model: {base}
pipeline_tag: text-classification
---

# {name}

`{base}` fine-tuned by this project on its task `{task}`: {part}, {examples} examples,
{epochs:g} epochs in batches of {batch_size}, peak learning rate {learning_rate:g},
{minutes:.0f} minutes on a CPU with other work on it. {notes}

Validation accuracy **{validation[accuracy]:.3f}** (macro F1 {validation[macro_f1]:.3f}) \
on {validation[examples]} examples; always
naming the most frequent class gives {validation[majority]:.3f}. \
Data hash of the validation examples `{data_hash}`.
"""
_PARTIAL_NOTE = """The folder holds only the trained tensors, in bf16; `lmcompress.models.loading.load` puts
them over the base (`{base}`, Apache-2.0), `transformers` alone would leave the rest at random.

"""


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
    note: str = "",
    progress: bool = False,
    task_settings: dict | None = None,
) -> Path:
    """Return the folder of `name` fine-tuned on a classification task; train and write it if it is not there yet.

    Args:
        name: of the pretrained encoder, or its folder.
        task_name: a task of kind classification; trained on its `train`, scored on its `validation` split.
        folder: holds weights, tokenizer, training.json and a model card once the training is finished. If what it
            holds was trained otherwise, a folder beside it is used, named after what is asked.
        task_settings: further settings of `load_task`, such as the `train_path` of an own file.
        last_blocks: train only so many blocks from the top, the pooler and the classifier, and write only
            those tensors, in bf16 (a partial checkpoint of `name`); None trains and writes everything.
        note: Markdown that the model card adds.

    Raises:
        BadSetting: `last_blocks` is not between 1 and the model's number of blocks.
        WrongTask: the task has no classes.
    """
    task = load_task(task_name, split="validation", **(task_settings or {}))
    if task.kind != "classification" or not task.labels:
        raise WrongTask(f"{task.name} has no classes to fine-tune an encoder for (it is {task.kind}).")
    settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    asked = settings | {"seed": seed, "last_blocks": last_blocks, "data_hash": task.data_hash}
    asked |= {"training_hash": task.training_hash, "base_hash": loading.identity(name)}
    if _was_trained_otherwise(folder, asked, name):
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        folder = folder.with_name(f"{folder.name}-{digest}")
    written = folder / "training.json"
    if written.exists():
        return folder
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # notebooks of one run may ask at once
        if written.exists():
            return folder
        model, tokenizer = _with_head(name, task)
        if last_blocks is not None:
            _freeze_below(model, last_blocks)
        features = task.training_features(tokenizer, length=SENTENCE_TOKENS, seed=seed, model=model)
        spec = _spec(features, **settings, seed=seed, checkpoint=RUNS / "training" / folder.name)
        history = fit(model, spec, progress=progress)
        if last_blocks is not None:
            _round(model)
        training = {"base": name, "task": task_name, "examples": len(features), "last_blocks": last_blocks}
        training |= asked | _outcome(model, tokenizer, task, history)
        with atomic_path(folder) as temporary:
            _write(model, tokenizer, temporary, base=None if last_blocks is None else name)
            write_json(temporary / "training.json", training)
            write_text(temporary / "README.md", encoder_card(folder.name, training, note=note))
    return folder


def _was_trained_otherwise(folder: Path, asked: dict, base: str) -> bool:
    """Return whether something lies in `folder` that is not what is `asked`; of older ones the base's name counts."""
    if not folder.exists():
        return False
    try:
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return any(folder.iterdir()) if folder.is_dir() else True
    if "base_hash" not in training:
        training |= {"base_hash": asked["base_hash"] if training.get("base") == str(base) else None}
    training = {"seed": 0, "training_hash": None} | training
    return any(training.get(name) != value for name, value in asked.items())


def encoder_card(name: str, training: dict, *, note: str = "") -> str:
    """Return the Markdown card of a fine-tuned encoder, from what its training.json holds."""
    blocks = training["last_blocks"]
    whole = blocks is None
    scope = "the whole model" if whole else f"the last {blocks} blocks, the pooler and the classifier"
    notes = ("" if whole else _PARTIAL_NOTE.format(base=training["base"])) + note
    return _CARD.format(name=name, part=scope, minutes=training["seconds"] / 60, notes=notes, **training)


def _with_head(name: str, task: Task) -> tuple[nn.Module, object]:
    """Load the encoder with a fresh head for the task's labels, and its tokenizer."""
    loaded = loading.load(name, head="classification", num_labels=len(task.labels))
    config = loaded.model.config
    config.architectures = [type(loaded.model).__name__]
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {label: i for i, label in enumerate(task.labels)}
    return loaded.model, loaded.tokenizer


def _freeze_below(model: nn.Module, last_blocks: int) -> None:
    blocks = anatomy.anatomy(model).stacks["encoder"]
    if not 1 <= last_blocks <= len(blocks):
        raise BadSetting(
            f"last_blocks={last_blocks}: the model has {len(blocks)} blocks; choose 1 to {len(blocks)}."
        )
    model.base_model.requires_grad_(False)
    pooler = getattr(model.base_model, "pooler", None)
    for module in [*(block.module for block in blocks[-last_blocks:]), *([pooler] if pooler else [])]:
        module.requires_grad_(True)


def _spec(
    features: list[dict],
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
) -> TrainSpec:
    steps = max(1, round(epochs * len(features) / batch_size))
    return TrainSpec(
        features,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        seed=seed,
        dtype=device.fast_dtype(device.choose().device),
        checkpoint=checkpoint,
        checkpoint_every=200,
    )


def _round(model: nn.Module) -> None:
    """Round what was trained to bf16, so that what is scored is what is written."""
    for parameter in trained(model).values():
        parameter.data = parameter.data.to(torch.bfloat16).float()


def _outcome(model: nn.Module, tokenizer, task: Task, history: History) -> dict:
    """Return what training.json holds of the curve, and of the scores on `task`."""
    scores = evaluate(model, tokenizer, task)
    every = max(1, len(history.steps) // CURVE_POINTS)
    return {
        "data_hash": task.data_hash,
        "seconds": history.steps[-1]["seconds"],
        "validation": {
            "accuracy": scores.value,
            "majority": scores.floor,
            "examples": len(task.examples),
            "macro_f1": scores.secondary["macro_f1"],
        },
        "loss": [{name: step[name] for name in ("step", "loss")} for step in history.steps[::every]],
    }


def _write(model: nn.Module, tokenizer, folder: Path, *, base: str | None) -> None:
    """Write weights and tokenizer: everything, or the trained tensors of a partial checkpoint of `base` in
    bf16.
    """
    if base is None:
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        tensors = {name: p.detach().to(torch.bfloat16) for name, p in trained(model).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        write_text(folder / "compression.json", json.dumps({"base": base}) + "\n")
    tokenizer.save_pretrained(folder)
