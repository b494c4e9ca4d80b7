"""Language models of several depths from scratch: does a nonlinearity on every head's output buy back a block?

`python -m helpers.train.architecture --scale full` trains them one after the other, goes on where it was stopped, and
leaves finished runs as they are. All runs of a scale and seed see the same batches, at a constant rate after the
warm-up: so a curve may be read at any number of tokens, or of seconds, as a run that ended there.
"""

import argparse
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from helpers import corpus, device, models
from helpers.compress import Report, Technique
from helpers.errors import BadSetting
from helpers.headwise import HeadwiseConfig, HeadwiseForCausalLM
from helpers.layers import count_parameters
from helpers.measure.calls import Call
from helpers.measure.latency import COPY, DENSE, VARIANT, interleave, summarise
from helpers.paths import RUNS, atomic_path, write_json
from helpers.tasks import load_task
from helpers.timing import timing_lock
from helpers.train.optimizer import optimizer_for
from helpers.train.pretraining import train_tokenizer
from helpers.train.switches import applied
from helpers.train.trainer import History, TrainSpec, fit, trained

VERSION = 1
PHIS = ("none", "shared")
LINEAR = "linear"  # the control: φ without its nonlinearity, P z + p, shared by the heads of a layer
EVERY = 4  # batches whose mean loss is one point of the curve
WATCHED, VALIDATIONS = 16, 10  # held-out windows, and how often their loss is taken
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scale:
    """What the runs of a scale have in common; `tokens` are input tokens of a run."""

    hidden: int
    heads: int
    vocabulary: int
    window: int
    batch_size: int
    tokens: int
    learning_rate: float
    vocabulary_texts: int  # training documents the tokenizer is made from
    bf16: bool = False  # and compiled, on a GPU
    layers: tuple[int, ...] = (5, 6, 7, 8)


SCALES = {
    "pocket": Scale(32, 4, 512, 128, 8, 50_000, 5e-3, 500),
    "middle": Scale(64, 4, 1024, 128, 8, 250_000, 3e-3, 2000),
    "full": Scale(1024, 8, 32_000, 512, 32, 100_000_000, 3e-4, 50_000, bf16=True),
}


def config_of(scale: str, layers: int, phi: str) -> HeadwiseConfig:
    """LLaMA-2's block at the widths of a scale; `phi` as in `HeadwiseConfig`, or "linear": as "shared" without SiLU.

    Raises:
        BadSetting: no such scale.
    """
    chosen = _scale(scale)
    return HeadwiseConfig(
        **({"phi": "shared", "phi_activation": "linear"} if phi == LINEAR else {"phi": phi}),
        num_hidden_layers=layers,
        hidden_size=chosen.hidden,
        intermediate_size=64 * -(-(8 * chosen.hidden // 3) // 64),
        num_attention_heads=chosen.heads,
        vocab_size=chosen.vocabulary,
        max_position_embeddings=2 * chosen.window,
        rms_norm_eps=1e-5,
        initializer_range=0.64
        * chosen.hidden**-0.5,  # 0.02 at full scale, and there as wide a signal as in small
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False},
    )


def eight_models(scale: str) -> dict[tuple[int, str], HeadwiseConfig]:
    """Every depth of a scale, without φ and with one that the heads of a layer share."""
    return {(depth, phi): config_of(scale, depth, phi) for depth in _scale(scale).layers for phi in PHIS}


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
    """The model's folder under `folder`: as it is there, else trained, going on where it was stopped.

    Args:
        tokens: input tokens of the run; default the scale's. Text that is shorter is repeated.

    Raises:
        BadSetting: the folder holds a finished run of other settings, or there is no such scale.
    """
    chosen = replace(_scale(scale), tokens=tokens or _scale(scale).tokens)
    made = Path(folder) / f"{scale}-{layers}-{phi}-seed{seed}"
    settings = {"layers": layers, "phi": phi, "seed": seed, "scale": asdict(chosen) | {"layers": None}}
    if (made / "training.json").exists():
        if read(made)["settings"] != settings:
            raise BadSetting(
                f"{made} holds a finished run of other settings (its training.json says which), which is not "
                "overwritten: name another folder, or move that one away."
            )
        return made
    tokenizer = _tokenizer(scale, Path(folder))
    torch.manual_seed(seed)
    model = HeadwiseForCausalLM(config_of(scale, layers, phi)).to(device.choose().device)
    running = Path(folder) / "checkpoints" / made.name
    spec = _spec(chosen, tokenizer, seed, running)
    history = fit(model, spec, progress=progress)
    record = {"settings": settings, "parameters": count_parameters(model)} | _curves(history)
    record |= arithmetic(config_of(scale, layers, phi), chosen.window, history, spec)
    logger.info(
        "%.0f tokens/s, %.0f %% of the matmul peak", record["step_tokens_per_s"], 100 * record["matmul_share"]
    )
    with atomic_path(made) as temporary:
        model.cpu().save_pretrained(temporary)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(temporary)
        write_json(temporary / "training.json", record)
    shutil.rmtree(running, ignore_errors=True)
    return made


def arithmetic(config: HeadwiseConfig, window: int, history: History, spec: TrainSpec) -> dict:
    """How fast the steps of a run were, and what share of the matrix products a second that the device can do at best.

    A step is counted as three forward passes: its backward pass needs two products for each one (Kaplan et al. 2020).
    Causal attention is counted in full, element-wise work is not.

    Returns:
        "step_tokens_per_s" (median over the second half of the steps, so without compilation and validation),
        "training_flops_per_token", "matmul_ceiling_gflops", "matmul_share" (a fraction), "device", "dtype", "compiled".
    """
    with torch.device("meta"):
        model, ids = HeadwiseForCausalLM(config), torch.zeros(1, window, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    per_token = 3 * counter.get_total_flops() / window
    seconds, tokens = (np.diff([step[name] for step in history.steps]) for name in ("seconds", "tokens"))
    rates = (tokens / np.maximum(seconds, 1e-9))[len(seconds) // 2 :]
    per_second = (
        float(np.median(rates)) if len(rates) else history.steps[-1]["tokens"] / history.steps[-1]["seconds"]
    )
    on = device.choose().device
    ceiling = device.ceiling(on, spec.dtype, at_least=per_token * per_second / 1e9)["gflops_per_s"]
    return {
        "step_tokens_per_s": per_second,
        "training_flops_per_token": per_token,
        "matmul_ceiling_gflops": ceiling,
        "matmul_share": per_token * per_second / 1e9 / ceiling,
        "device": device.name(on),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "compiled": spec.compile,
    }


def as_technique(folder: Path) -> Technique:
    """A trained model as a row of a baseline's subject: it stands in for the baseline, and says how training went.

    Its settings are `layers`, `phi`, `scale` and `tokens`; the row's seed is the run's.
    """

    def from_scratch(model, *, layers: int, phi: str, scale: str, tokens: int | None, seed: int):
        settings = {"scale": scale, "tokens": tokens, "seed": seed, "folder": folder}
        made = train_architecture(layers, phi, **settings)
        achieved = {name: value for name, value in read(made).items() if name != "settings"}
        return models.load(made).model, Report("architecture", layers, achieved=achieved)

    return Technique("architecture", VERSION, from_scratch, "Trained from scratch")


def step_times(
    shapes: Sequence[tuple[int, str]],
    *,
    scale: str,
    calls: int = 30,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """How long a training step takes, all shapes in turns: a fair measure of training time, as runs apart are not.

    Args:
        shapes: pairs of layers and kind of φ; the first is what the others are held against, and is timed twice.
        calls: timed steps of each, forward, backward and update, on random ids.

    Returns:
        {"batch", "window", "threads", "calls", "shapes"}: for each `layers`, `phi` and the figures of `latency`, the
        ratio being step time over the first shape's.
    """
    chosen, on = _scale(scale), device.choose().device
    ids = torch.randint(chosen.vocabulary, (chosen.batch_size, chosen.window)).to(on)
    with ExitStack() as stack:
        work = {
            str(place): _step(config_of(scale, *shape), chosen, ids, stack)
            for place, shape in enumerate(shapes)
        }
        with timing_lock():
            copied = {COPY: _step(config_of(scale, *shapes[0]), chosen, ids, stack)}
            times = interleave(work | copied, calls=calls, clock=clock, device=on)
    figures = [
        summarise({DENSE: times["0"], COPY: times[COPY], VARIANT: times[str(place)]})
        for place in range(len(shapes))
    ]
    named = [{"layers": layers, "phi": phi} | one for (layers, phi), one in zip(shapes, figures, strict=True)]
    conditions = {"batch": chosen.batch_size, "window": chosen.window, "threads": torch.get_num_threads()}
    return conditions | {"calls": calls, "shapes": named}


def _step(config: HeadwiseConfig, chosen: Scale, ids: torch.Tensor, stack: ExitStack) -> Call:
    model = HeadwiseForCausalLM(config).to(ids.device).train()
    spec = TrainSpec([], steps=1, learning_rate=chosen.learning_rate, compile=_compiles(chosen))
    optimizer, _ = optimizer_for(trained(model), spec)
    stack.enter_context(applied(model, spec))

    def run() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=chosen.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Call(run)


def read(made: Path) -> dict:
    """What `train_architecture` wrote beside a model: settings, parameters, curves, seconds, tokens."""
    return json.loads((made / "training.json").read_text(encoding="utf-8"))


def _compiles(chosen: Scale) -> bool:
    return chosen.bf16 and device.choose().device.type == "cuda"


def _scale(name: str) -> Scale:
    if name not in SCALES:
        raise BadSetting(f"no scale {name!r}; there are {', '.join(SCALES)}.")
    return SCALES[name]


def _tokenizer(scale: str, folder: Path) -> Path:
    """Where the tokenizer lies that all runs of the scale in this folder share."""
    kept, chosen = folder / f"{scale}-tokenizer", _scale(scale)
    if not kept.exists():
        texts = corpus.harvest().documents("train", limit=chosen.vocabulary_texts)["body"]
        with atomic_path(kept) as temporary:
            train_tokenizer(texts, vocab_size=chosen.vocabulary).save_pretrained(temporary)
    return kept


@cache
def _features(tokenizer: Path, window: int, count: int) -> tuple[list[dict], list[dict]]:
    """Windows of harvested training text, to train on and held out; kept because all runs share them."""
    task, made = load_task("pydocs-lm", limit=1, window=window), AutoTokenizer.from_pretrained(tokenizer)
    limits = {"rest": count, "held-out": WATCHED}
    return tuple(task.training_features(made, limit=limit, part=part) for part, limit in limits.items())


def _spec(chosen: Scale, tokenizer: Path, seed: int, checkpoint: Path) -> TrainSpec:
    steps = max(1, chosen.tokens // (chosen.batch_size * chosen.window))
    features, held_out = _features(tokenizer, chosen.window, steps * chosen.batch_size)
    return TrainSpec(
        features,
        steps=steps,
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        min_learning_rate=chosen.learning_rate,
        warmup_steps=max(1, steps // 25),
        seed=seed,
        dtype=torch.bfloat16 if chosen.bf16 else torch.float32,
        compile=_compiles(chosen),
        checkpoint=checkpoint,
        checkpoint_every=max(1, steps // VALIDATIONS),
        evaluate=held_out,
        evaluate_every=max(1, steps // VALIDATIONS),
    )


def _curves(history: History) -> dict:
    """Points `[step, loss, seconds, tokens]`: the mean of every few batches in training, and held-out losses."""
    steps, last = history.steps, history.steps[-1]

    def point(step: int, loss: float) -> list[float]:
        return [step, round(loss, 5), round(steps[step - 1]["seconds"], 3), steps[step - 1]["tokens"]]

    parts = [steps[i : i + EVERY] for i in range(0, len(steps), EVERY)]
    return {
        "curve": [point(part[-1]["step"], float(np.mean([one["loss"] for one in part]))) for part in parts],
        "validation": [point(one["step"], one["loss"]) for one in history.validation],
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
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = {"scale": chosen.scale, "seed": chosen.seed, "tokens": chosen.tokens, "folder": chosen.folder}
    for layers, phi in eight_models(chosen.scale):
        if chosen.layers in (None, layers):
            logger.info("%s", train_architecture(layers, phi, progress=True, **settings))


if __name__ == "__main__":
    main()
