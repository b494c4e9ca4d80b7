"""The sheared model's published shape, trained by its published recipe over the processes of `torchrun`:

    python -m torch.distributed.run --nproc-per-node 8 \\
        -m lmcompress.experiments.sheared_training --scale full --folder runs/sheared

Begins with random weights, or with a model that was cut to its shape (`--start`); stops and goes on at will.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lmcompress.corpus import pydocs
from lmcompress.errors import BadSetting
from lmcompress.experiments import command_line
from lmcompress.models import storage
from lmcompress.paths import RUNS, atomic_path
from lmcompress.train import launch, parallel
from lmcompress.train.pretraining import causal_features, train_tokenizer, windows
from lmcompress.train.spec import History, TrainSpec
from lmcompress.train.trainer import fit

CHECKPOINTS = 100  # in a run
HELD_OUT = 64  # windows whose loss is taken as often
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FIELDS += ("vocab_size", "max_position_embeddings")
SHAPES = {
    "full": dict(zip(_FIELDS, (2048, 5504, 24, 16, 32_000, 2048))),
    "tiny": dict(zip(_FIELDS, (32, 64, 2, 4, 400, 32))),
}
SMALLER = {"full": {}, "tiny": {"steps": 6, "batch_size": 8, "warmup_steps": 2}}  # than the published recipe


def published() -> dict:
    """Return the sheared model's recipe at full scale: everything of a `TrainSpec` but its data."""
    return {
        "steps": 100_000,
        "batch_size": 128,
        "micro_batches": 4,
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-5,
        "warmup_steps": 2000,
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "clip": 1.0,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "dtype": torch.bfloat16,
    }


def config_of(scale: str) -> LlamaConfig:
    """Return the LLaMA of a scale: "full" has 1,345,423,360 parameters."""
    if scale not in SHAPES:
        raise BadSetting(f"no scale {scale!r}; there are {', '.join(SHAPES)}.")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False}
    return LlamaConfig(**SHAPES[scale], rms_norm_eps=1e-5, **ids)


def train(
    scale: str,
    folder: Path,
    *,
    text: Path | None = None,
    start: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> History:
    """Train in the processes there are; leave `trained/` and `history.json` in `folder`.

    `text` is a file of documents apart by empty lines (default: the harvested text), repeated if short;
    `start` a saved model with its tokenizer, in the place of random weights; `steps` by default the recipe's.
    """
    device = parallel.start()
    model, tokenizer = _beginning(scale, folder, text, start, seed)
    recipe = published() | SMALLER[scale] | ({"steps": steps} if steps else {})
    recipe["warmup_steps"] = min(recipe["warmup_steps"], recipe["steps"])
    every = max(1, recipe["steps"] // CHECKPOINTS)
    rows = windows(_documents(text), tokenizer, length=model.config.max_position_embeddings)
    held_out = min(HELD_OUT, len(rows) // 2)
    spec = TrainSpec(
        causal_features(rows[held_out:]),
        **recipe,
        seed=seed,
        evaluate=causal_features(rows[:held_out]),
        evaluate_every=every,
        checkpoint=folder / "checkpoints",
        checkpoint_every=every,
        gradient_checkpointing=scale == "full",
    )
    history = fit(model.to(device), spec)
    launch.keep(model, history, folder, whole=lambda: type(model)(model.config), tokenizer=tokenizer)
    return history


def _beginning(
    scale: str, folder: Path, text: Path | None, start: Path | None, seed: int
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Return the model to begin with, and its tokenizer, which the first process makes if there is none."""
    if start:
        return storage.load(start)
    tokenizer, config = folder / "tokenizer", config_of(scale)
    if not parallel.rank() and not tokenizer.exists():
        with atomic_path(tokenizer) as temporary:
            train_tokenizer(_documents(text), vocab_size=config.vocab_size).save_pretrained(temporary)
    parallel.gathered(None)  # the others wait for it
    torch.manual_seed(seed)
    return LlamaForCausalLM(config), AutoTokenizer.from_pretrained(tokenizer)


def _documents(text: Path | None) -> list[str]:
    if text is None:
        return list(pydocs.harvest().text("train"))
    return [document for document in text.read_text(encoding="utf-8").split("\n\n") if document.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    asked = {
        "text": (Path, None, "documents apart by empty lines (default: harvested)"),
        "start": (Path, None, "a model that was cut to its shape"),
        "steps": (int, None, "optimizer steps (default: the recipe's)"),
        "seed": (int, 0, "of weights and batches"),
    }
    options = command_line(__doc__, arguments, scales=SHAPES, folder=RUNS / "sheared", **asked)
    train(**options)


if __name__ == "__main__":
    main()
