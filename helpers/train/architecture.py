"""Language models of eight shapes from scratch, to ask whether a nonlinearity on every head's output buys a block.

`python -m helpers.train.architecture --scale full` trains them one after the other, stops and goes on at will, and
leaves a finished run as it is. All runs of a scale and seed see the same batches in the same order, at a constant rate
after the warm-up: so a curve may be read at any number of tokens, or of seconds, as a run that ended there.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers import corpus, device, models
from helpers.compress import Report, Technique
from helpers.errors import BadSetting
from helpers.headwise import HeadwiseConfig, HeadwiseForCausalLM
from helpers.layers import count_parameters
from helpers.paths import RUNS, atomic_path, write_json
from helpers.tasks import load_task
from helpers.train.pretraining import train_tokenizer
from helpers.train.trainer import History, TrainSpec, fit

VERSION = 1
PHIS = ("none", "shared")
RECORD = "training.json"
EVERY = 4  # batches whose mean loss is one point of the curve
WATCHED, VALIDATIONS = 32, 20  # held-out windows, and how often their loss is taken
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scale:
    """What the runs of a scale have in common: shape, text and recipe; `tokens` are input tokens of a run."""

    hidden: int
    heads: int
    vocabulary: int
    window: int
    batch_size: int
    tokens: int
    learning_rate: float
    vocabulary_texts: int  # training documents the tokenizer is made from
    bf16: bool = False
    layers: tuple[int, ...] = (5, 6, 7, 8)


SCALES = {
    "pocket": Scale(32, 4, 512, 128, 8, 100_000, 1e-2, 500),
    "middle": Scale(64, 4, 1024, 128, 16, 1_000_000, 5e-3, 2000),
    "full": Scale(1024, 8, 32_000, 512, 32, 100_000_000, 3e-4, 50_000, bf16=True),
}


def config_of(scale: str, layers: int, phi: str) -> HeadwiseConfig:
    """LLaMA-2's block at the widths of a scale, with φ on the heads or without.

    Raises:
        BadSetting: no such scale.
    """
    chosen = _scale(scale)
    return HeadwiseConfig(
        phi=phi,
        num_hidden_layers=layers,
        hidden_size=chosen.hidden,
        intermediate_size=64 * -(-(8 * chosen.hidden // 3) // 64),
        num_attention_heads=chosen.heads,
        vocab_size=chosen.vocabulary,
        max_position_embeddings=2 * chosen.window,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def eight_models(scale: str) -> dict[tuple[int, str], HeadwiseConfig]:
    """The shapes that are compared, by layers and φ: each depth without φ and with one that its heads share."""
    return {
        (layers, phi): config_of(scale, layers, phi) for layers in _scale(scale).layers for phi in PHIS
    }


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
    """The folder of one trained model under `folder`: as it is there, else trained, going on where it was stopped.

    Args:
        tokens: input tokens of the run; default the scale's. The text is repeated if it has fewer.

    Raises:
        BadSetting: the folder holds a finished run of other settings, or there is no such scale.
    """
    chosen = replace(_scale(scale), tokens=tokens or _scale(scale).tokens)
    made = Path(folder) / f"{scale}-{layers}-{phi}-seed{seed}"
    settings = {"layers": layers, "phi": phi, "seed": seed, "scale": json.loads(json.dumps(asdict(chosen)))}
    if (made / RECORD).exists():
        if _read(made)["settings"] != settings:
            raise BadSetting(
                f"{made} holds a finished run of other settings ({RECORD} there says which), which is not overwritten: "
                "name another folder, or move that one away."
            )
        return made
    tok = _tokenizer(scale, Path(folder))
    torch.manual_seed(seed)
    model = HeadwiseForCausalLM(config_of(scale, layers, phi)).to(device.choose().device)
    steps = max(1, chosen.tokens // (chosen.batch_size * chosen.window))
    running = Path(folder) / "checkpoints" / made.name
    spec = _spec(chosen, steps, tok, seed=seed, checkpoint=running)
    history = fit(model, spec, progress=progress)
    record = {"settings": settings, "parameters": count_parameters(model)} | _curves(history)
    record["text"] = corpus.harvest().content_hash("train")
    with atomic_path(made) as temporary:
        model.cpu().save_pretrained(temporary)
        tok.save_pretrained(temporary)
        write_json(temporary / RECORD, record)
    shutil.rmtree(running, ignore_errors=True)
    return made


def as_technique(folder: Path, *, progress: bool = False) -> Technique:
    """A trained model as a row: stands in for the one it is compared with, and says how its training went.

    Its settings are `layers`, `phi`, `scale` and `tokens`; the row's seed is the run's.
    """

    def trained(model, *, layers: int, phi: str, scale: str, tokens: int | None, seed: int):
        made = train_architecture(
            layers, phi, scale=scale, seed=seed, folder=folder, tokens=tokens, progress=progress
        )
        record = {name: value for name, value in _read(made).items() if name not in ("settings", "text")}
        return models.load(made).model, Report("architecture", layers, achieved=record)

    return Technique("architecture", VERSION, trained, "Trained from scratch")


def at(curve: list[list[float]], place: float, *, column: int) -> float | None:
    """Loss of a curve `[step, loss, seconds, tokens]` where `column` (2 or 3) has the value `place`, between its points.

    None outside of the curve: nothing is extrapolated.
    """
    x, y = [point[column] for point in curve], [point[1] for point in curve]
    return float(np.interp(place, x, y)) if x[0] <= place <= x[-1] else None


def _scale(name: str) -> Scale:
    if name not in SCALES:
        raise BadSetting(f"no scale {name!r}; there are {', '.join(SCALES)}.")
    return SCALES[name]


def _read(made: Path) -> dict:
    return json.loads((made / RECORD).read_text(encoding="utf-8"))


def _tokenizer(scale: str, folder: Path) -> PreTrainedTokenizerFast:
    """The one that all runs of the scale in this folder share."""
    kept, chosen = folder / f"{scale}-tokenizer", _scale(scale)
    if not (kept / "tokenizer.json").exists():
        texts = corpus.harvest().documents("train", limit=chosen.vocabulary_texts)["body"]
        with atomic_path(kept) as temporary:
            train_tokenizer(texts, vocab_size=chosen.vocabulary).save_pretrained(temporary)
    return AutoTokenizer.from_pretrained(kept)


@cache
def _task(window: int):
    return load_task("pydocs-lm", split="validation", limit=1, window=window)


@cache
def _features(tokenizer_file: Path, window: int, count: int, part: str) -> list[dict]:
    """Windows of harvested training text, one more token each than predicted; kept, as runs share them."""
    tok = AutoTokenizer.from_pretrained(tokenizer_file)
    return _task(window).training_features(tok, limit=count, part=part)


def _spec(chosen: Scale, steps: int, tok, *, seed: int, checkpoint: Path) -> TrainSpec:
    where, window = Path(tok.name_or_path), chosen.window
    return TrainSpec(
        _features(where, window, steps * chosen.batch_size, "rest"),
        steps=steps,
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        min_learning_rate=chosen.learning_rate,
        warmup_steps=max(1, steps // 25),
        seed=seed,
        dtype=torch.bfloat16 if chosen.bf16 else torch.float32,
        checkpoint=checkpoint,
        checkpoint_every=max(50, steps // 10),
        evaluate=_features(where, window, WATCHED, "held-out"),
        evaluate_every=max(1, steps // VALIDATIONS),
    )


def _curves(history: History) -> dict:
    """Points `[step, loss, seconds, tokens]`: of training the mean of every few batches, of held-out text as taken."""
    steps = history.steps
    parts = [steps[i : i + EVERY] for i in range(0, len(steps), EVERY)]
    place = lambda one: [round(one["seconds"], 3), one["tokens"]]  # noqa: E731
    last = steps[-1]
    return {
        "curve": [
            [part[-1]["step"], round(float(np.mean([s["loss"] for s in part])), 4), *place(part[-1])]
            for part in parts
        ],
        "validation": [
            [v["step"], round(v["loss"], 5), *place(steps[v["step"] - 1])] for v in history.validation
        ],
        "seconds": round(last["seconds"], 2),
        "tokens": last["tokens"],
        "tokens_per_s": round(last["tokens"] / last["seconds"], 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train the models of a scale, or some of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=list(SCALES), default="pocket")
    parser.add_argument("--layers", type=int, nargs="+", help="default: those of the scale")
    parser.add_argument("--phi", nargs="+", default=list(PHIS), help="none, shared, per-head")
    parser.add_argument("--seed", type=int, nargs="+", default=[42])
    parser.add_argument("--tokens", type=int, help="input tokens of a run (default: the scale's)")
    parser.add_argument("--folder", type=Path, default=RUNS / "architecture")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = {"scale": chosen.scale, "tokens": chosen.tokens, "folder": chosen.folder}
    for seed in chosen.seed:
        for layers in chosen.layers or _scale(chosen.scale).layers:
            for phi in chosen.phi:
                made = train_architecture(layers, phi, seed=seed, progress=True, **settings)
                logger.info("%s: %s", made, _read(made)["validation"][-1])


if __name__ == "__main__":
    main()
