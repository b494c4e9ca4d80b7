"""Language models of several depths from scratch: does a nonlinearity on every head buy back a block?

`python -m lmcompress.experiments.architecture --scale full` trains them one after the other, resumes where it
was stopped, and leaves finished runs as they are. All runs of a scale and seed see the same batches, at a
constant rate after the warm-up: so a curve may be read at any point as a run that ended there.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from lmcompress import device
from lmcompress.compress import Context, Technique, TechniqueResult
from lmcompress.corpus import pydocs
from lmcompress.errors import BadSetting
from lmcompress.experiments.architecture_scales import (
    SCALES,
    Scale,
    compiles,
    config_of,
    eight_models,
    scale_named,
)
from lmcompress.experiments.step_times import arithmetic
from lmcompress.models import loading
from lmcompress.models.anatomy import count_parameters
from lmcompress.models.headwise import HeadwiseForCausalLM
from lmcompress.paths import RUNS, atomic_path, write_json
from lmcompress.registry import analysis, register_look
from lmcompress.tasks import load_task
from lmcompress.train.pretraining import train_tokenizer
from lmcompress.train.trainer import History, TrainSpec, fit

register_look(name="architecture", title="Trained from scratch", colour="#EE7733", marker="8")
VERSION = analysis(1, "architecture")
EVERY = 4  # batches whose mean loss is one point of the curve
WATCHED, VALIDATIONS = 16, 10  # held-out windows, and how often their loss is taken
logger = logging.getLogger(__name__)


def train_architecture(
    layers: int,
    phi: str,
    *,
    scale: str = "pocket",
    seed: int = 42,
    folder: Path,
    tokens: int | None = None,
    progress: bool = False,
) -> Path:
    """Return the model's folder under `folder`; where it is not finished, train it, or resume its training.

    `tokens` are input tokens of the run, by default the scale's; text that is shorter is repeated.

    Raises:
        BadSetting: the folder holds a finished run of other settings, or there is no such scale.
    """
    sizes = replace(scale_named(scale), tokens=tokens or scale_named(scale).tokens)
    finished = Path(folder) / f"{scale}-{layers}-{phi}-seed{seed}"
    settings = {"layers": layers, "phi": phi, "seed": seed, "scale": asdict(sizes) | {"layers": None}}
    if (finished / "training.json").exists():
        if read(finished)["settings"] != settings:
            raise BadSetting(
                f"{finished} holds a finished run of other settings (see its training.json), which is not "
                "overwritten: name another folder, or move that one away."
            )
        return finished
    tokenizer = _tokenizer(scale, Path(folder))
    torch.manual_seed(seed)
    model = HeadwiseForCausalLM(config_of(scale, layers, phi)).to(device.choose().device)
    running = Path(folder) / "checkpoints" / finished.name
    spec = _spec(sizes, tokenizer, seed, running)
    history = fit(model, spec, progress=progress)
    record = {"settings": settings, "parameters": count_parameters(model)} | _curves(history)
    record |= arithmetic(config_of(scale, layers, phi), sizes.window, history, spec)
    rate, share = record["step_tokens_per_s"], 100 * record["matmul_share"]
    logger.info("%.0f tokens/s, %.0f %% of the matmul peak", rate, share)
    with atomic_path(finished) as temporary:
        model.cpu().save_pretrained(temporary)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(temporary)
        write_json(temporary / "training.json", record)
    shutil.rmtree(running, ignore_errors=True)
    return finished


def as_technique(folder: Path) -> Technique:
    """Return a technique that puts a trained model in the baseline's place, and reports its training.

    Its settings are `layers`, `phi`, `scale` and `tokens`; the row's seed is the run's.
    """

    def from_scratch(model, context: Context, *, layers: int, phi: str, scale: str, tokens: int | None):
        settings = {"scale": scale, "tokens": tokens, "seed": context.seed, "folder": folder}
        finished = train_architecture(layers, phi, **settings)
        achieved = {name: entry for name, entry in read(finished).items() if name != "settings"}
        return loading.load(finished).model, TechniqueResult("architecture", layers, achieved=achieved)

    return Technique("architecture", VERSION, from_scratch, needs=("seed",))


def read(finished: Path) -> dict:
    """Return what `train_architecture` wrote beside a model: settings, parameters, curves, times, tokens."""
    return json.loads((finished / "training.json").read_text(encoding="utf-8"))


def _tokenizer(scale: str, folder: Path) -> Path:
    """Return where the tokenizer lies that all runs of the scale in this folder share; maybe train it."""
    path, sizes = folder / f"{scale}-tokenizer", scale_named(scale)
    if not path.exists():
        texts = pydocs.harvest().documents("train", limit=sizes.vocabulary_texts)["body"]
        with atomic_path(path) as temporary:
            train_tokenizer(texts, vocab_size=sizes.vocabulary).save_pretrained(temporary)
    return path


@cache
def _features(tokenizer: Path, window: int, count: int) -> tuple[list[dict], list[dict]]:
    """Return windows of harvested training text, to train on and held out, which all runs share."""
    task = load_task("pydocs-lm", limit=1, window=window)
    encode, limits = AutoTokenizer.from_pretrained(tokenizer), {"rest": count, "held-out": WATCHED}
    return tuple(
        task.training_features(encode, limit=limit, subset=subset) for subset, limit in limits.items()
    )


def _spec(sizes: Scale, tokenizer: Path, seed: int, checkpoint: Path) -> TrainSpec:
    steps = max(1, sizes.tokens // (sizes.batch_size * sizes.window))
    every = max(1, steps // VALIDATIONS)
    features, held_out = _features(tokenizer, sizes.window, steps * sizes.batch_size)
    return TrainSpec(
        features,
        steps=steps,
        batch_size=sizes.batch_size,
        learning_rate=sizes.learning_rate,
        min_learning_rate=sizes.learning_rate,
        warmup_steps=max(1, steps // 25),
        seed=seed,
        dtype=torch.bfloat16 if sizes.bf16 else torch.float32,
        compile=compiles(sizes),
        checkpoint=checkpoint,
        checkpoint_every=every,
        evaluate=held_out,
        evaluate_every=every,
    )


def _curves(history: History) -> dict:
    """Return points `[step, loss, seconds, tokens]`: means of every few batches, and held-out losses."""
    steps, last = history.steps, history.steps[-1]

    def point(step: int, loss: float) -> list[float]:
        return [step, round(loss, 5), round(steps[step - 1]["seconds"], 3), steps[step - 1]["tokens"]]

    groups = [steps[i : i + EVERY] for i in range(0, len(steps), EVERY)]
    means = [float(np.mean([step["loss"] for step in group])) for group in groups]
    return {
        "curve": [point(group[-1]["step"], mean) for group, mean in zip(groups, means)],
        "validation": [point(entry["step"], entry["loss"]) for entry in history.validation],
        "seconds": last["seconds"],
        "tokens": last["tokens"],
        "tokens_per_s": last["tokens"] / last["seconds"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train the models of a scale, or those of one depth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=list(SCALES), default="pocket")
    parser.add_argument("--layers", type=int, help="one depth only")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--tokens", type=int, help="input tokens of a run (default: the scale's)")
    parser.add_argument("--folder", type=Path, default=RUNS / "architecture")
    options = vars(parser.parse_args(arguments))
    only = options.pop("layers")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for layers, phi in eight_models(options["scale"]):
        if only in (None, layers):
            logger.info("%s", train_architecture(layers, phi, progress=True, **options))


if __name__ == "__main__":
    main()
