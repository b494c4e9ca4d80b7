"""A head for a model that has none, trained on the training part: the dense model of a search then."""

import math
from pathlib import Path

from lmcompress.errors import BadSetting
from lmcompress.models import loading
from lmcompress.models.loading import LoadedModel
from lmcompress.paths import atomic_path
from lmcompress.tasks import Task
from lmcompress.train import fit
from lmcompress.train.recovery import Recovery

HEADS = {"classification": "classification", "regression": "regression"}  # by the kind of task
EPOCHS, BATCH, RATE = 3, 16, 5e-5


def with_head(model: str | Path, task: Task) -> LoadedModel:
    """Return the model with a new head for the task, its outputs called as the labels; not trained yet.

    Raises:
        BadSetting: the task needs no head.
    """
    if task.kind not in HEADS:
        raise BadSetting(f"--finetune gives a head to {' and '.join(HEADS)}; {task.name} is {task.kind}.")
    classes = {"num_labels": len(task.labels)} if task.labels else {}
    loaded = loading.load(model, head=HEADS[task.kind], **classes)
    if task.labels:
        loaded.model.config.id2label = dict(enumerate(task.labels))
        loaded.model.config.label2id = {label: index for index, label in enumerate(task.labels)}
    return loaded


def finetuned(loaded: LoadedModel, task: Task, folder: Path, seed: int) -> LoadedModel:
    """Return the model in `folder`: as it is there, else trained on the task's training text."""
    if not folder.exists():
        steps = math.ceil(EPOCHS * len(task.training_examples()) / BATCH)
        budget = Recovery(steps=steps, learning_rate=RATE, batch_size=BATCH)
        spec = budget.spec(
            task, loaded.tokenizer, loaded.model, seed=seed, checkpoint=folder.with_name("training")
        )
        fit(loaded.model, spec)
        with atomic_path(folder) as temporary:
            loaded.model.save_pretrained(temporary)
            loaded.tokenizer.save_pretrained(temporary)
    return loading.load(folder)
