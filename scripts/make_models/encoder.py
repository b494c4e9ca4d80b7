"""The committed encoders: all-MiniLM-L6-v2 with its last blocks fine-tuned.

`python -m scripts.make_models.encoder pydocs` makes `models/pocket/minilm-pydocs`, and `... sst2` the
`models/pocket/minilm-sst2` of the reference profile; both hold only the tensors that differ from
all-MiniLM-L6-v2.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from lmcompress.paths import MODELS
from lmcompress.train.encoder import finetune_encoder

BASE = "sentence-transformers/all-MiniLM-L6-v2"
# Task of each committed encoder, and how it was trained; three blocks in bf16 are what 12 MB hold.
BUDGETS = {
    "pydocs": ("pydocs-library", {"epochs": 3.0, "learning_rate": 5e-4, "last_blocks": 2}),
    "sst2": ("sst2", {"epochs": 1.0, "learning_rate": 3e-4, "last_blocks": 3}),
}


def note(kind: str) -> str:
    """Return what the model card says of the task and of making the model again."""
    return (Path(__file__).parent / "cards" / f"encoder_{kind}.md").read_text(encoding="utf-8").rstrip("\n")


def make(kind: str = "pydocs", *, progress: bool = False) -> Path:
    """Return the folder of a committed encoder, "pydocs" or "sst2"; train and write it if it is not there."""
    task, settings = BUDGETS[kind]
    folder = MODELS / "pocket" / f"minilm-{kind}"
    return finetune_encoder(BASE, task, folder, note=note(kind), progress=progress, **settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: make one of the committed encoders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=list(BUDGETS))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    make(parser.parse_args(arguments).task)


if __name__ == "__main__":
    main()
