"""Fine-tuning a pretrained encoder for classes, several labels a text or numbers, whole or in part."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lmcompress import device
from lmcompress.errors import BadSetting, WrongTask
from lmcompress.models import anatomy, loading
from lmcompress.paths import RUNS, atomic_path, claimed, write_json, write_text
from lmcompress.tasks import Task, evaluate, load_task
from lmcompress.train.trainer import History, LabelLoss, TrainSpec, fit, trained

SENTENCE_TOKENS = 128
CURVE_POINTS = 200
PROBLEMS = {  # kind of task -> how transformers calls the loss of its head
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
_PARTIAL_NOTE = """The folder holds only the trained tensors, in bf16; `lmcompress.models.loading.load` puts
them over the base (`{base}`, Apache-2.0), `transformers` alone would leave the rest at random.

"""

_ACCURACY = """Validation accuracy **{accuracy:.3f}** (macro F1 {macro_f1:.3f}) on {examples} examples; always
naming the most frequent class gives {majority:.3f}."""


def finetune_encoder(
    name: str,
    task_name: str,
    folder: Path,
    *,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    last_blocks: int | None = None,
    best_epoch: bool = False,
    stored: torch.dtype = torch.float32,
    seed: int = 0,
    note: str = "",
    progress: bool = False,
    task_settings: dict | None = None,
) -> Path:
    """Return the folder of `name` fine-tuned on a task; train and write it if it is not there yet.

    Args:
        name: of the pretrained encoder, or its folder.
        task_name: a task of a kind in `PROBLEMS`; trained on its `train`, scored on its `validation` split.
        folder: holds weights, tokenizer, training.json and a model card once the training is finished. If it
            was trained otherwise, a folder beside it is used, named after what is asked.
        last_blocks: train only so many blocks from the top, the pooler and the classifier, and write only
            those tensors, in bf16 (a partial checkpoint of `name`); None trains and writes everything.
        best_epoch: hold every 20th training example out, and keep the weights of the epoch after which their
            loss is lowest.
        stored: dtype of the written weights, and of those that are scored.
        note: Markdown that the model card adds.
        task_settings: further settings of `load_task`, such as the `train_path` of an own file.
    """
    task = load_task(task_name, **{"split": "validation"} | (task_settings or {}))
    settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    inputs = settings | {"seed": seed, "last_blocks": last_blocks, "data_hash": task.data_hash}
    inputs |= {"training_hash": task.training_hash, "base_hash": loading.identity(name)}
    if best_epoch or stored != torch.float32:  # others were trained before these settings were there
        inputs |= {"best_epoch": best_epoch, "stored": str(stored).removeprefix("torch.")}
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
    if _was_trained_otherwise(folder, inputs, name):
        folder = folder.with_name(f"{folder.name}-{digest}")
    with claimed(folder.with_name(f".{folder.name}.lock")):  # notebooks of one run may ask at once
        if (folder / "training.json").exists():
            return folder
        loaded = with_head(name, task)
        model, tokenizer = loaded.model, loaded.tokenizer
        if last_blocks is not None:
            _freeze_below(model, last_blocks)
        checkpoint = RUNS / "training" / f"{folder.name}-{digest}"
        options = settings | {"seed": seed, "best_epoch": best_epoch, "progress": progress}
        examples, history = finetune(loaded, task, checkpoint, length=SENTENCE_TOKENS, **options)
        stored = stored if last_blocks is None else torch.bfloat16
        for parameter in trained(model).values():  # what is scored is what is written
            parameter.data = parameter.data.to(stored).float()
        training = {"base": name, "task": task_name, "examples": examples, "last_blocks": last_blocks}
        training |= inputs | _outcome(model, tokenizer, task, history)
        with atomic_path(folder) as temporary:
            write(model.to(stored), tokenizer, temporary, base=None if last_blocks is None else name)
            write_json(temporary / "training.json", training)
            write_text(temporary / "README.md", encoder_card(folder.name, training, note=note))
        shutil.rmtree(checkpoint, ignore_errors=True)
    return folder


def finetune(
    loaded: loading.LoadedModel, task: Task, checkpoint: Path, *, epochs: float, batch_size: int, **options
) -> tuple[int, History]:
    """Train a model with a head in place on a task's training text; return how many texts, and the history.

    `options`: "learning_rate", "seed"; perhaps "length" (tokens of a text; else as many as the model takes),
    "best_epoch" as for `finetune_encoder`, and "progress".
    """
    model, best_epoch, seed = loaded.model, options.get("best_epoch", False), options["seed"]
    which = {"length": options.get("length"), "seed": seed, "model": model}
    features = task.training_features(loaded.tokenizer, subset="rest" if best_epoch else "all", **which)
    held_out = task.training_features(loaded.tokenizer, subset="held-out", **which) if best_epoch else None
    steps = max(1, round(epochs * len(features) / batch_size))
    spec = TrainSpec(
        features,
        steps=steps,
        batch_size=batch_size,
        learning_rate=options["learning_rate"],
        warmup_steps=steps // 10,
        seed=seed,
        dtype=device.fast_dtype(device.choose().device),
        checkpoint=checkpoint,
        checkpoint_every=200,
        replace_other=not best_epoch,  # such as one in a dtype that was faster then
        evaluate=held_out,
        evaluate_every=max(1, round(len(features) / batch_size)),
    )
    objective = _BestWeights(spec) if best_epoch else LabelLoss(spec)
    history = fit(model, spec, objective=objective, progress=options.get("progress", False))
    if best_epoch:
        model.load_state_dict(load_file(objective.file))
    return len(features), history


class _BestWeights(LabelLoss):
    """The labels' loss; leaves the weights of lowest validation loss in a file beside the checkpoint."""

    @property
    def file(self) -> Path:
        return self.spec.checkpoint / "best.safetensors"

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return the validation loss; write the weights if it is the lowest so far, of earlier starts too."""
        losses = super().validate(model)
        lowest = math.inf
        if self.file.is_file():
            with safe_open(self.file, "pt") as best:
                lowest = float(best.metadata()["loss"])
        if losses["loss"] < lowest:
            with atomic_path(self.file) as temporary:
                save_file(model.state_dict(), temporary, metadata={"loss": repr(losses["loss"])})
        return losses


def encoder_card(name: str, training: dict, *, note: str = "") -> str:
    """Return the Markdown card of a fine-tuned encoder, from what its training.json holds."""
    blocks, minutes, scope, notes = training["last_blocks"], training["seconds"] / 60, "the whole model", note
    if blocks is not None:
        scope = f"the last {blocks} blocks, the pooler and the classifier"
        notes = _PARTIAL_NOTE.format(base=training["base"]) + note
    card = Path(__file__).with_name("encoder_card.md").read_text(encoding="utf-8")
    validation = training["validation"]
    if validation["majority"] is not None:
        scores = _ACCURACY.format(**validation)
    else:
        numbers = [f"{n} {v:.3f}" for n, v in validation.items() if n not in ("majority", "examples")]
        scores = f"Validation: {', '.join(numbers)} on {validation['examples']} examples."
    return card.format(name=name, scope=scope, minutes=minutes, notes=notes, scores=scores, **training)


def _was_trained_otherwise(folder: Path, inputs: dict, base: str) -> bool:
    """Return whether `folder` holds another model than of `inputs`; for older ones the base's name counts."""
    if not folder.exists():
        return False
    try:
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return any(folder.iterdir()) if folder.is_dir() else True
    if "base_hash" not in training:
        training |= {"base_hash": inputs["base_hash"] if training.get("base") == str(base) else None}
    training = {"seed": 0, "training_hash": None} | training
    return any(training.get(name) != value for name, value in inputs.items())


def with_head(name: str | Path, task: Task) -> loading.LoadedModel:
    """Return the model with a new head for the task, its outputs called as the labels; not trained yet.

    Raises:
        WrongTask: the task is of no kind that has a head.
    """
    if task.kind not in PROBLEMS:
        raise WrongTask(f"a head is for {', '.join(PROBLEMS)}; {task.name} is {task.kind}.")
    head = "regression" if task.kind == "regression" else "classification"
    loaded = loading.load(name, head=head, num_labels=len(task.labels) if task.labels else None)
    config = loaded.model.config
    config.architectures, config.problem_type = [type(loaded.model).__name__], PROBLEMS[task.kind]
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
    return loaded


def _freeze_below(model: nn.Module, last_blocks: int) -> None:
    blocks = anatomy.anatomy(model).stacks["encoder"]
    if not 1 <= last_blocks <= (count := len(blocks)):
        raise BadSetting(f"last_blocks={last_blocks}: the model has {count} blocks; choose 1 to {count}.")
    model.base_model.requires_grad_(False)
    pooler = getattr(model.base_model, "pooler", None)
    for module in [*(block.module for block in blocks[-last_blocks:]), *([pooler] if pooler else [])]:
        module.requires_grad_(True)


def _outcome(model: nn.Module, tokenizer, task: Task, history: History) -> dict:
    """Return what training.json holds of the curve, and of the scores on `task`."""
    scores = evaluate(model, tokenizer, task)
    validation = {task.metric: scores.value, "majority": scores.floor, "examples": len(task.examples)}
    every = max(1, len(history.steps) // CURVE_POINTS)
    return {
        "seconds": history.steps[-1]["seconds"],
        "validation": validation
        | {name: s for name, s in scores.secondary.items() if name != "cross_entropy"},
        "loss": [{name: step[name] for name in ("step", "loss")} for step in history.steps[::every]],
        **({"held_out_loss": history.validation} if history.validation else {}),
    }


def write(model: nn.Module, tokenizer, folder: Path, *, base: str | None = None) -> None:
    """Write weights and tokenizer: all, or the trained tensors in bf16 of a partial checkpoint of `base`."""
    if base is None:
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        tensors = {name: p.detach().to(torch.bfloat16) for name, p in trained(model).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        write_text(folder / "compression.json", json.dumps({"base": base}) + "\n")
    tokenizer.save_pretrained(folder)
