"""From a trained pocket model to the committed folder: bf16 weights, curves, scores, samples, a card."""

import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from lmcompress.corpus import pydocs
from lmcompress.paths import atomic_path, write_json, write_text
from lmcompress.tasks import evaluate, load_task
from lmcompress.tasks.language_modelling import stream
from lmcompress.train import pretraining as data
from lmcompress.train.trainer import History
from scripts.make_models import pocket
from scripts.make_models.cards import model_card

CURVE_POINTS = 200
PROMPTS = (
    "mean(a, axis=None)\n\n",
    "Return the",
    "class Estimator(alpha=1.0)\n\n",
    "Raises an error if",
    "plot(x, y)\n\nPlot",
)


def publish(kind: str, model: nn.Module, histories: dict[str, History], budget) -> Path:
    """Write `models/pocket/<kind>-pydocs` whole: weights in bf16, tokenizer, training.json, README.md.

    The scores are those of the weights as written (rounded to bf16), on the whole validation split.
    """
    tokenizer, docs = pocket.tokenizer(), pydocs.harvest()
    tokenizer = data.closing_with_end(tokenizer) if kind == "t5" else tokenizer
    model.to("cpu", torch.bfloat16).eval()
    if kind == "t5":
        model.generation_config.update(max_new_tokens=64)
    training = {
        "budget": vars(budget),
        "data": {"corpus": docs.hash, "train": docs.content_hash("train")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "phases": {name: _thinned(history, kind, name) for name, history in histories.items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with atomic_path(pocket.folder_of(kind)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        rounded = load(folder)
        training["validation"] = scores(kind, rounded, tokenizer)
        training["samples"] = samples(kind, rounded, tokenizer)
        write_json(folder / "training.json", training)
        write_text(folder / "README.md", model_card(kind, training))
    return pocket.folder_of(kind)


def load(folder: Path) -> nn.Module:
    """Return a pocket model in fp32, ready to be evaluated."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto = AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def scores(
    kind: str, model: nn.Module, tokenizer: PreTrainedTokenizerFast, *, limit: int | None = None
) -> dict:
    """Return bits per byte on the validation split, of the model and of n-grams of the same training tokens.

    `limit` documents (or summaries) are scored: all documents and 500 summaries by default.

    Returns:
        `model`, `unigram`, `bigram` in bits per byte; the task's own metrics; `tokens` and `bytes` scored.
    """
    if kind == "t5":
        task = load_task("pydocs-summary", split="validation", limit=limit or 500)
        summaries = (
            pocket.features(kind, "summary", "train", pocket.tokenizer()),
            task.features(tokenizer, task.examples, length=None),
        )
        start = [tokenizer.eos_token_id]  # what the n-grams see before a summary's first token
        seen, rows = ([np.array(start + row["labels"]) for row in features] for features in summaries)
    else:
        task = load_task("pydocs-lm", split="validation", limit=limit, window=pocket.WINDOW)
        seen = [feature["labels"] for feature in pocket.features(kind, "docs", "train", tokenizer)]
        rows = [stream(tokenizer, task.examples)[0]]
    measured = evaluate(model, tokenizer, task)
    size, targets = measured.columns["bytes"].sum(), sum(len(row) - 1 for row in rows)
    nats = data.ngram_baselines(seen, rows, vocab_size=len(tokenizer))
    return {
        "model": measured.secondary["bits_per_byte"],
        **{name: value * targets / math.log(2) / size for name, value in nats.items()},
        "task": {measured.metric: measured.value} | measured.secondary,
        "tokens": targets,
        "bytes": int(size),
    }


def samples(kind: str, model: nn.Module, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> list[dict]:
    """Return samples `{prompt, text}`, or greedy summaries `{prompt, text, reference}`."""
    if kind == "t5":
        return _summaries(model, tokenizer, count=8)
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 60, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    written = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, **settings, pad_token_id=tokenizer.pad_token_id)[0]
        text = tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        written.append({"prompt": prompt, "text": text})
    return written


def _summaries(model: nn.Module, tokenizer: PreTrainedTokenizerFast, *, count: int) -> list[dict]:
    written = []
    for feature in pocket.features("t5", "summary", "validation", pocket.tokenizer(), limit=count):
        out = model.generate(torch.tensor([feature["input_ids"]]), max_new_tokens=64)[0]
        ids = {"prompt": feature["input_ids"], "text": out, "reference": feature["labels"]}
        written.append({n: tokenizer.decode(row, skip_special_tokens=True) for n, row in ids.items()})
    return written


def _thinned(history: History, kind: str, phase: str) -> dict:
    """Return at most `CURVE_POINTS` mean losses, and the validation in bits per byte."""
    size = -(-len(history.steps) // CURVE_POINTS)
    groups = [history.steps[i : i + size] for i in range(0, len(history.steps), size)]
    curve = [
        {key: round(float(group[-1][key]), 6) for key in ("step", "lr", "seconds", "tokens")}
        | {"loss": round(float(np.mean([record["loss"] for record in group])), 4)}
        for group in groups
    ]
    if kind == "t5" and phase == "docs":
        return {"training": curve, "validation": history.validation}  # hidden spans code no text
    tokenizer = pocket.tokenizer()
    watched = pocket.features(kind, phase, "validation", tokenizer, limit=pocket.WATCHED[phase])
    first = 0 if kind == "t5" else 1  # target of a row
    size_bytes = float(sum(data.token_bytes(tokenizer)[row["labels"][first:]].sum() for row in watched))
    validation = [
        entry | {"bits_per_byte": entry["loss"] * entry["targets"] / math.log(2) / size_bytes}
        for entry in history.validation
    ]
    return {"training": curve, "validation": validation}
