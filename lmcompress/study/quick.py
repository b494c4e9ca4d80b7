"""The shortest way in: load a model, train it with a few settings, let it write.

loaded = quick.load("pocket/llama-pydocs")
quick.train(loaded, steps=100, learning_rate=1e-3)
print(quick.generate(loaded, "Return the number of"))
"""

import torch

from lmcompress.errors import BadSetting
from lmcompress.models.loading import LoadedModel, load
from lmcompress.tasks import Task, load_task
from lmcompress.train import History, fit
from lmcompress.train.recovery import Recovery

__all__ = ["generate", "load", "train"]


def train(
    loaded: LoadedModel, task: str | Task = "pydocs-lm", *, seed: int = 0, progress: bool = False, **config
) -> History:
    """Train in place on the training text of a task (its name, a .csv or a .jsonl), as `Recovery` says."""
    loaded_task = load_task(task, model=loaded) if isinstance(task, str) else task
    loaded_task.check(loaded)
    budget = Recovery(**config)
    if budget.teacher:
        raise BadSetting(
            "teacher=True: here the model would be its own teacher. To distil from the dense model, measure "
            "a technique with recovery=Recovery(..., teacher=True), see lmcompress.Study."
        )
    spec = budget.spec(loaded_task, loaded.tokenizer, loaded.model, seed=seed, checkpoint=None)
    return fit(loaded.model, spec, progress=progress)


@torch.no_grad()
def generate(loaded: LoadedModel, prompt: str, *, tokens: int = 40, **sampling) -> str:
    """Write up to `tokens` tokens after `prompt`, greedily unless `sampling` (transformers') says else."""
    inputs = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(loaded.model.device)
    inputs.pop("token_type_ids", None)
    settings = {"do_sample": False, "pad_token_id": loaded.tokenizer.pad_token_id} | sampling
    written = loaded.model.generate(**inputs, max_new_tokens=tokens, **settings)[0]
    return loaded.tokenizer.decode(written[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
