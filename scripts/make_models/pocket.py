"""The pocket models: small decoders trained from scratch on the harvested docs, then an encoder-decoder.

`python -m scripts.make_models.pocket gpt2|llama|t5` makes one, stops and goes on at will (checkpoints under
`runs/pocket-training/`), and ends by writing the folder under `models/pocket/` that is committed.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from lmcompress import device
from lmcompress.corpus import pydocs
from lmcompress.errors import BadSetting
from lmcompress.paths import MODELS, RUNS
from lmcompress.tasks import evaluate, load_task
from lmcompress.tasks.language_modelling import stream
from lmcompress.train import pretraining as data
from lmcompress.train.spec import grouped
from lmcompress.train.trainer import History, TrainSpec, fit
from scripts.make_models import MODELS_MADE
from scripts.make_models.cards import model_card
from scripts.make_models.publishing import command_line, publish

VOCABULARY, WINDOW = 6144, 256
KINDS = tuple(MODELS_MADE)
TRAINING = RUNS / "pocket-training"
WATCHED = {"docs": 96, "summary": 384}  # validation examples scored during training; many more at the end
PROMPTS = (
    "mean(a, axis=None)\n\n",
    "Return the",
    "class Estimator(alpha=1.0)\n\n",
    "Raises an error if",
    "plot(x, y)\n\nPlot",
)
logger = logging.getLogger(__name__)


def folder_of(kind: str) -> Path:
    """Return where the committed model lies."""
    return MODELS / "pocket" / f"{kind}-pydocs"


def build(kind: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> nn.Module:
    """Return a pocket model with fresh weights: 4 to 6 million parameters, tied embeddings counted once."""
    if kind not in MODELS_MADE:
        raise BadSetting(f"no pocket model {kind!r}; there are {', '.join(KINDS)}.")
    model_class = getattr(transformers, MODELS_MADE[kind]["class"])
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": end, "bos_token_id": end}
    ids |= {"tie_word_embeddings": True} | ({"decoder_start_token_id": pad} if kind == "t5" else {})
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**MODELS_MADE[kind]["config"], **ids))
    if kind == "t5":
        _start_quickly(model)
    return model


@torch.no_grad()
def _start_quickly(model: T5ForConditionalGeneration) -> None:
    """Change a T5's first weights so that a million tokens teach it what the usual ones need many more for.

    AdamW moves every weight by about the learning rate: too slow for embeddings of spread 1 over a division
    by sqrt(d), and for the position biases. So the division is undone in the last norm's gain, embeddings
    start small, what the blocks add to them smaller still, and the biases as ALiBi's (Press et al. 2022).
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

    T5 leaves the division out and draws small queries instead. Adam moves every weight by the same amount:
    within a few hundred steps each query then looks at one token only. (T5 itself was trained by Adafactor.)
    Inside, a query weight is 1/sqrt(d_kv) times what is trained; afterwards it is an ordinary one.
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


def make(kind: str, *, progress: bool = False, **changes: float) -> Path:
    """Return the folder of a pocket model; where it is not there, train it, or go on, and write it.

    `changes` are entries of its budget: `steps` in all, of `batch_size` windows, the peak `learning_rate`,
    and the `pretraining_share` of a T5's steps, on the docs before the summaries.
    """
    folder = folder_of(kind)
    if (folder / "training.json").exists():
        return folder
    budget, docs = MODELS_MADE[kind]["budget"] | changes, pydocs.harvest()
    model, histories = train(kind, budget, progress=progress)
    tok = tokenizer()
    if kind == "t5":
        tok = data.closing_with_end(tok)
        model.generation_config.update(max_new_tokens=64)
    training = {
        "budget": budget,
        "data": {"corpus": docs.hash, "train": docs.content_hash("train")},
        "phases": {name: _thinned(history, kind, name) for name, history in histories.items()},
    }

    def judge(rounded: nn.Module) -> dict:
        return {"validation": _scores(kind, rounded, tok), "samples": _samples(kind, rounded, tok)}

    return publish(folder, model, tok, training, judge, model_card)


def start_from_decoder(model: T5ForConditionalGeneration, folder: Path) -> None:
    """Take over the tied embeddings, and the norm before the head, of the pocket LLaMA."""
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


def train(kind: str, budget: dict, *, progress: bool = False) -> tuple[nn.Module, dict[str, History]]:
    """Train one pocket model, going on from its checkpoints; return it with one history per phase."""
    tok = tokenizer()
    model = build(kind, tok).to(device.choose().device)
    steps, batch_size, rate = (budget[name] for name in ("steps", "batch_size", "learning_rate"))
    phases = {"docs": (steps, batch_size)}
    if kind == "t5":  # pairs are half as long as windows
        start_from_decoder(model, make("llama", progress=progress))
        first = round(steps * budget["pretraining_share"])
        phases = {"docs": (first, batch_size), "summary": (steps - first, 2 * batch_size)}
    histories = {}
    for phase, (steps, batch_size) in phases.items():
        spec = TrainSpec(
            features(kind, phase, "train", tok),
            steps=steps,
            batch_size=batch_size,
            learning_rate=rate,
            min_learning_rate=rate / 20,
            warmup_steps=max(1, steps // 25),
            weight_decay=0.1,
            betas=(0.9, 0.98),
            dtype=device.fast_dtype(device.choose().device),
            checkpoint=TRAINING / kind / phase,
            checkpoint_every=250,
            evaluate=features(kind, phase, "validation", tok, limit=WATCHED[phase]),
            evaluate_every=250,
        )
        logger.info("%s: %d examples", phase, len(spec.features))
        with scaled_queries(model) if kind == "t5" else nullcontext():
            histories[phase] = fit(model, spec, progress=progress)
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


def _scores(kind: str, model: nn.Module, tok: PreTrainedTokenizerFast) -> dict:
    """Return the bits per byte on the validation split, as those of n-grams of the same training tokens.

    `model`, `unigram` and `bigram` in bits per byte; the task's own metrics; `tokens` and `bytes` scored: all
    documents, or 500 summaries.
    """
    if kind == "t5":
        task = load_task("pydocs-summary", split="validation", limit=500)
        summaries = features(kind, "summary", "train", tok), task.features(tok, task.examples, length=None)
        start = [tok.eos_token_id]  # what the n-grams see before a summary's first token
        seen, rows = ([np.array(start + row["labels"]) for row in pairs] for pairs in summaries)
    else:
        task = load_task("pydocs-lm", split="validation", window=WINDOW)
        seen = [feature["labels"] for feature in features(kind, "docs", "train", tok)]
        rows = [stream(tok, task.examples)[0]]
    measured = evaluate(model, tok, task)
    size, targets = measured.columns["bytes"].sum(), sum(len(row) - 1 for row in rows)
    nats = data.ngram_baselines(seen, rows, vocab_size=len(tok))
    return {
        "model": measured.secondary["bits_per_byte"],
        **{name: loss * targets / math.log(2) / size for name, loss in nats.items()},
        "task": {measured.metric: measured.value} | measured.secondary,
        "tokens": targets,
        "bytes": int(size),
    }


def _samples(kind: str, model: nn.Module, tok: PreTrainedTokenizerFast) -> list[dict]:
    """Return samples `{prompt, text}`, or greedy summaries `{prompt, text, reference}`."""
    if kind == "t5":
        asked, settings = (
            features(kind, "summary", "validation", tokenizer(), limit=8),
            {"max_new_tokens": 64},
        )
    else:
        asked = [{"input_ids": tok(prompt)["input_ids"]} for prompt in PROMPTS]
        settings = {"max_new_tokens": 60, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    torch.manual_seed(0)
    written = []
    for feature in asked:
        prompt = torch.tensor([feature["input_ids"]])
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0]
        ids = {"prompt": prompt[0], "text": text if kind == "t5" else text[prompt.shape[1] :]}
        if kind == "t5":
            ids["reference"] = feature["labels"]
        written.append({name: tok.decode(row, skip_special_tokens=True) for name, row in ids.items()})
    return written


def _thinned(history: History, kind: str, phase: str) -> dict:
    """Return at most 200 mean losses, and the validation in bits per byte."""
    curve = [
        {name: round(float(last[name]), 6) for name in ("step", "lr", "seconds", "tokens")}
        | {"loss": round(loss, 4)}
        for last, loss in grouped(history, size=math.ceil(len(history.steps) / 200))
    ]
    if kind == "t5" and phase == "docs":
        return {"training": curve, "validation": history.validation}  # hidden spans code no text
    tok, first = tokenizer(), 0 if kind == "t5" else 1  # target of a row
    watched = features(kind, phase, "validation", tok, limit=WATCHED[phase])
    bits = math.log(2) * float(sum(data.token_bytes(tok)[row["labels"][first:]].sum() for row in watched))
    validation = [e | {"bits_per_byte": e["loss"] * e["targets"] / bits} for e in history.validation]
    return {"training": curve, "validation": validation}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: make one pocket model, or go on making it."""
    kind, changes = command_line(__doc__, KINDS, arguments)
    if changes and (folder_of(kind) / "training.json").exists():
        raise BadSetting(f"{folder_of(kind)} is there already: move it away to train another one.")
    logger.info("%s", make(kind, **changes))


if __name__ == "__main__":
    main()
