"""The committed encoders: all-MiniLM-L6-v2 fine-tuned.

`python -m scripts.make_models.encoder pydocs` makes `models/pocket/minilm-pydocs`, and `... sst2-clean` the
`models/reference/minilm-sst2` of the reference profile. Of the pocket models only the last blocks were
trained, and only the tensors that differ from all-MiniLM-L6-v2 are kept.
"""

from pathlib import Path

import torch

from lmcompress.paths import MODELS
from lmcompress.train.encoder import finetune_encoder
from scripts.make_models.publishing import command_line

BASE = "sentence-transformers/all-MiniLM-L6-v2"
# Task of each committed encoder, and how it was trained.
BUDGETS = {
    "pydocs": ("pydocs-library", {"epochs": 3.0, "learning_rate": 5e-4, "last_blocks": 2}),
    "sst2": ("sst2", {"epochs": 1.0, "learning_rate": 3e-4, "last_blocks": 3}),
    "sst2-clean": (
        "sst2",
        {"epochs": 2.0, "learning_rate": 1e-4, "best_epoch": True, "stored": torch.bfloat16},
    ),
}
FOLDERS = {
    "pydocs": MODELS / "pocket/minilm-pydocs",
    "sst2": MODELS / "pocket/minilm-sst2",
    "sst2-clean": MODELS / "reference/minilm-sst2",
}


def note(kind: str) -> str:
    """Return what the model card says of the task and of making the model again."""
    return (Path(__file__).parent / "cards" / f"encoder_{kind}.md").read_text(encoding="utf-8").rstrip("\n")


def make(kind: str = "pydocs", *, progress: bool = False) -> Path:
    """Return the folder of a committed encoder, one of `BUDGETS`; train and write it if it is not there."""
    task, settings = BUDGETS[kind]
    return finetune_encoder(BASE, task, FOLDERS[kind], note=note(kind), progress=progress, **settings)


if __name__ == "__main__":
    make(command_line(__doc__, BUDGETS, budget=False)[0])
