"""The pocket models: small decoders trained from scratch on the harvested docs, then an encoder-decoder.

`python -m scripts.make_models.pocket tokenizer|gpt2|llama|t5` makes one, stops and goes on at will
(checkpoints under `runs/pocket-training/`), and ends by writing the folder under `models/pocket/` that is
committed.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lmcompress import device
from lmcompress.corpus import pydocs
from lmcompress.errors import BadSetting
from lmcompress.paths import MODELS, RUNS
from lmcompress.tasks import load_task
from lmcompress.train import pretraining as data
from lmcompress.train.trainer import History, TrainSpec, fit

VOCABULARY, WINDOW = 6144, 256
KINDS = ("gpt2", "llama", "t5")
TRAINING = RUNS / "pocket-training"
WATCHED = {"docs": 96, "summary": 384}  # validation examples scored during training; many more at the end
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How long a pocket model trains: `steps` in all, of `batch_size` windows of 256 tokens."""

    steps: int
    batch_size: int = 8
    learning_rate: float = 2e-3
    pretraining_share: float = 0.4  # of the steps of a T5, on the docs before the summaries


# What the committed weights were trained with; those of the T5 before its queries were scaled.
BUDGETS = {
    "gpt2": Budget(3000, learning_rate=2e-3),
    "llama": Budget(3000, learning_rate=3e-3),
    "t5": Budget(3600, batch_size=16, learning_rate=2.5e-3, pretraining_share=0.45),
}


def folder_of(kind: str) -> Path:
    """Return where the committed model lies."""
    return MODELS / "pocket" / f"{kind}-pydocs"


def build(kind: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> nn.Module:
    """Return a pocket model with fresh weights: 4 to 6 million parameters, tied embeddings counted once."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": end, "bos_token_id": end}
    ids["tie_word_embeddings"] = True
    torch.manual_seed(seed)
    if kind == "gpt2":
        # Less than one epoch: no dropout is needed.
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=8, n_positions=512, **dropout, **ids))
    if kind == "llama":
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5, **ids))
    if kind == "t5":
        sizes = {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 512, "num_layers": 3}
        extra = {"dropout_rate": 0.0, "decoder_start_token_id": pad}
        model = T5ForConditionalGeneration(T5Config(**sizes, **extra, **ids))
        _start_quickly(model)
        return model
    raise BadSetting(f"no pocket model {kind!r}; there are {', '.join(KINDS)}.")


@torch.no_grad()
def _start_quickly(model: T5ForConditionalGeneration) -> None:
    """Change a T5's first weights so that a million tokens teach it what the usual ones need many more for.

    T5 divides the tied head's input by sqrt(d) and draws embeddings with spread 1, and its only sense of
    position is a bias added to attention logits. AdamW moves every weight by about the learning rate, which
    is too slow for both. So the division is undone in the last norm's gain, embeddings start small, what the
    blocks add to them smaller still, and the biases start as ALiBi's: each head prefers what is near, over
    ranges from one token to hundreds (Press et al. 2022).
    """
    model.shared.weight.mul_(0.05)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            parameter.mul_(0.1)
    model.decoder.final_layer_norm.weight.fill_(model.config.d_model**0.5)
    for stack in (model.encoder, model.decoder):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
        one_way = len(bias) // (1 if stack.is_decoder else 2)
        exact = one_way // 2  # from here on buckets widen, up to a distance of 128
        bucket = torch.arange(one_way)
        distance = torch.where(bucket < exact, bucket, exact * (128 / exact) ** ((bucket - exact) / exact))
        near = -distance[:, None] * 2.0 ** -torch.arange(bias.shape[1])
        bias.copy_(near.repeat(len(bias) // one_way, 1))


class _Scaled(nn.Module):
    """A weight as a constant times what is trained."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.scale

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / self.scale


@contextmanager
def scaled_queries(model: T5ForConditionalGeneration) -> Iterator[None]:
    """Train a T5's queries as if its attention were divided by sqrt(d_kv), as that of other transformers is.

    T5 leaves the division out and draws small queries instead. Adam moves every weight by the same amount, so
    that logits then move sqrt(d_kv) times as fast as elsewhere: within a few hundred steps each query looks
    at one token only, and no gradient tells it of another. (T5 itself was trained by Adafactor, which moves a
    weight by a share of its size.) Inside, a query weight is 1/sqrt(d_kv) times what is trained; afterwards
    it is an ordinary one.
    """
    queries = [module for name, module in model.named_modules() if name.endswith(".q")]
    for query in queries:
        register_parametrization(query, "weight", _Scaled(model.config.d_kv**-0.5))
    try:
        yield
    finally:
        for query in queries:
            remove_parametrizations(query, "weight")


def tokenizer(*, vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return the tokenizer the pocket models share: that of a committed model, or one trained on the docs."""
    for folder in (*map(folder_of, ("llama", "gpt2")), TRAINING / "tokenizer"):
        if (folder / "tokenizer.json").exists():
            return AutoTokenizer.from_pretrained(folder)
    trained = data.train_tokenizer(pydocs.harvest().text("train"), vocab_size=vocab_size)
    trained.save_pretrained(folder)
    return trained


def make(kind: str, budget: Budget | None = None, *, progress: bool = False) -> Path:
    """Return the folder of a pocket model; where it is not there, train it, or go on, and write it."""
    from scripts.make_models.publishing import publish  # it asks this module for shapes and features

    folder = folder_of(kind)
    if not (folder / "training.json").exists():
        budget = budget or BUDGETS[kind]
        publish(kind, *train(kind, budget, folder=TRAINING / kind, progress=progress), budget)
    return folder


def start_from_decoder(model: T5ForConditionalGeneration, folder: Path) -> None:
    """Take over the tied embeddings, and the norm before the head, of the pocket LLaMA.

    Most of what a short training learns first is in the embeddings, and these have learned it.
    """
    decoder = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.shared.weight.copy_(decoder.model.embed_tokens.weight)
        model.decoder.final_layer_norm.weight.copy_(model.config.d_model**0.5 * decoder.model.norm.weight)


def features(
    kind: str, phase: str, split: str, tok: PreTrainedTokenizerFast, *, limit: int | None = None
) -> list[dict]:
    """Return what a phase trains on (`train`) or is watched on: `limit` windows of docs, or summary pairs."""
    if phase == "summary":
        closing = data.closing_with_end(tok)
        if split == "train":
            return load_task("pydocs-summary").training_features(closing, limit=limit)
        task = load_task("pydocs-summary", split=split, limit=limit)
        return task.features(closing, task.examples, length=None)
    rows = data.windows(list(pydocs.harvest().text(split)), tok, length=WINDOW)[:limit]
    return _denoising(rows, tok) if kind == "t5" else data.causal_features(rows)


def train(
    kind: str, budget: Budget, *, folder: Path, progress: bool = False
) -> tuple[nn.Module, dict[str, History]]:
    """Train one pocket model, going on from `folder`; return it with one history per phase."""
    tok = tokenizer()
    model = build(kind, tok).to(device.choose().device)
    if kind == "t5":
        start_from_decoder(model, make("llama", progress=progress))
    first = round(budget.steps * budget.pretraining_share) if kind == "t5" else budget.steps
    phases = {"docs": replace(budget, steps=first)}
    if kind == "t5":  # pairs are half as long as windows
        phases["summary"] = replace(budget, steps=budget.steps - first, batch_size=2 * budget.batch_size)
    histories = {}
    for phase, share in phases.items():
        rows = features(kind, phase, "train", tok)
        watched = features(kind, phase, "validation", tok, limit=WATCHED[phase])
        parameters = sum(p.numel() for p in model.parameters())
        logger.info("%s: %d examples, %d parameters", phase, len(rows), parameters)
        with scaled_queries(model) if kind == "t5" else nullcontext():
            histories[phase] = fit(model, _spec(rows, watched, share, folder / phase), progress=progress)
    return model, histories


def _denoising(rows: np.ndarray, tok: PreTrainedTokenizerFast) -> list[dict[str, np.ndarray]]:
    """Return a quarter span corruption (reading both ways), the rest continuations (writing)."""
    cut, end = len(rows) // 4, np.array([tok.eos_token_id], dtype=np.int32)
    start = 3 * rows.shape[1] // 8
    continued = [
        {"input_ids": np.concatenate([row[:start], end]), "labels": np.concatenate([row[start:], end])}
        for row in rows[cut:]
    ]
    return data.span_corruption(rows[:cut], tok, seed=0) + continued


def _spec(features: Sequence, watched: Sequence, budget: Budget, checkpoint: Path) -> TrainSpec:
    return TrainSpec(
        features,
        steps=budget.steps,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rate,
        min_learning_rate=budget.learning_rate / 20,
        warmup_steps=max(1, budget.steps // 25),
        weight_decay=0.1,
        betas=(0.9, 0.98),
        dtype=device.fast_dtype(device.choose().device),
        checkpoint=checkpoint,
        checkpoint_every=250,
        evaluate=watched,
        evaluate_every=250,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: make one pocket model, or go on making it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["tokenizer", *KINDS])
    for name, number in (("steps", int), ("batch-size", int), ("learning-rate", float)):
        parser.add_argument(f"--{name}", type=number, default=argparse.SUPPRESS, help="default: as committed")
    budget = vars(parser.parse_args(arguments))
    kind = budget.pop("kind")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if kind == "tokenizer":
        logger.info("%d tokens", len(tokenizer()))
        return
    if budget and (folder_of(kind) / "training.json").exists():
        raise BadSetting(f"{folder_of(kind)} is there already: move it away to train another one.")
    logger.info("%s", make(kind, replace(BUDGETS[kind], **budget)))


if __name__ == "__main__":
    main()
