"""A head for a model that has none, trained on the training part: the dense model of a search then."""

import math
from pathlib import Path

from lmcompress.models import loading
from lmcompress.models.loading import LoadedModel
from lmcompress.paths import atomic_path
from lmcompress.tasks import Task
from lmcompress.train import fit
from lmcompress.train.recovery import Recovery

EPOCHS, BATCH, RATE = 3, 16, 5e-5


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
