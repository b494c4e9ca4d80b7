"""Language models of several depths from scratch: does a nonlinearity on every head buy back a block?

`python -m lmcompress.experiments.architecture --scale full` trains them one after the other, resumes where it
was stopped, and leaves finished runs as they are. All runs of a scale and seed see the same batches, at a
constant rate after the warm-up: so a curve may be read at any point as a run that ended there.
"""

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

from lmcompress import device
from lmcompress.compress import Context, Technique, TechniqueResult
from lmcompress.corpus import pydocs
from lmcompress.errors import BadSetting
from lmcompress.experiments import command_line
from lmcompress.measure.calls import Call
from lmcompress.measure.latency import COPY, DENSE, VARIANT, interleave, summarise
from lmcompress.models import loading
from lmcompress.models.anatomy import count_parameters
from lmcompress.models.headwise import HeadwiseConfig, HeadwiseForCausalLM
from lmcompress.paths import RUNS, atomic_path, write_json
from lmcompress.registry import analysis, register_look
from lmcompress.tasks import load_task
from lmcompress.timing_lock import timing_lock
from lmcompress.train.pretraining import train_tokenizer
from lmcompress.train.spec import grouped, optimizer_for
from lmcompress.train.switches import applied
from lmcompress.train.trainer import History, TrainSpec, fit, trained

register_look(name="architecture", title="Trained from scratch", colour="#EE7733", marker="8")
VERSION = analysis(1, "architecture")
EVERY = 4  # batches whose mean loss is one point of the curve
WATCHED, VALIDATIONS = 16, 10  # held-out windows, and how often their loss is taken
logger = logging.getLogger(__name__)
PHIS = ("none", "shared")
LINEAR = "linear"  # the control: φ without its nonlinearity, P z + p, shared by the heads of a layer


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

    @property
    def compiles(self) -> bool:
        """Return whether the runs of a scale are compiled on the device of this process."""
        return self.bf16 and device.choose().device.type == "cuda"


SCALES = {
    "pocket": Scale(32, 4, 512, 128, 8, 50_000, 5e-3, 500),
    "middle": Scale(64, 4, 1024, 128, 8, 250_000, 3e-3, 2000),
    "full": Scale(1024, 8, 32_000, 512, 32, 100_000_000, 3e-4, 50_000, bf16=True),
}


def config_of(scale: str, layers: int, phi: str) -> HeadwiseConfig:
    """Return LLaMA-2's block at the widths of a scale; `phi` as in `HeadwiseConfig`, or "linear": no SiLU."""
    sizes = scale_named(scale)
    return HeadwiseConfig(
        **({"phi": "shared", "phi_activation": "linear"} if phi == LINEAR else {"phi": phi}),
        num_hidden_layers=layers,
        hidden_size=sizes.hidden,
        intermediate_size=64 * -(-(8 * sizes.hidden // 3) // 64),
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=2 * sizes.window,
        rms_norm_eps=1e-5,
        initializer_range=0.64 * sizes.hidden**-0.5,  # 0.02 at full scale; as wide a signal in small
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False},
    )


def eight_models(scale: str) -> dict[tuple[int, str], HeadwiseConfig]:
    """Return every depth of a scale, without φ and with one that the heads of a layer share."""
    return {(depth, phi): config_of(scale, depth, phi) for depth in scale_named(scale).layers for phi in PHIS}


def scale_named(name: str) -> Scale:
    """Return a scale by name; another name is a `BadSetting`."""
    if name not in SCALES:
        raise BadSetting(f"no scale {name!r}; there are {', '.join(SCALES)}.")
    return SCALES[name]


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

    `tokens` are input tokens of the run, by default the scale's; text that is shorter is repeated. A finished
    run of other settings in the folder is a `BadSetting`.
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
    record |= _arithmetic(config_of(scale, layers, phi), sizes.window, history, spec)
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
    task, encode = load_task("pydocs-lm", limit=1, window=window), AutoTokenizer.from_pretrained(tokenizer)
    limits = (("rest", count), ("held-out", WATCHED))
    return tuple(task.training_features(encode, limit=limit, subset=subset) for subset, limit in limits)


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
        compile=sizes.compiles,
        checkpoint=checkpoint,
        checkpoint_every=every,
        evaluate=held_out,
        evaluate_every=every,
    )


def _arithmetic(config: HeadwiseConfig, window: int, history: History, spec: TrainSpec) -> dict:
    """Return how fast the steps of a run were, and their share of the device's best rate of matrix products.

    A step counts as three forward passes (Kaplan et al. 2020), with causal attention in full, without
    element-wise work; its tokens per second are the median over the second half of the steps, so without
    compilation and validation.
    """
    with torch.device("meta"):
        model, ids = HeadwiseForCausalLM(config), torch.zeros(1, window, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    per_token = 3 * counter.get_total_flops() / window
    seconds, tokens = (np.diff([step[name] for step in history.steps]) for name in ("seconds", "tokens"))
    rates, last = (tokens / np.maximum(seconds, 1e-9))[len(seconds) // 2 :], history.steps[-1]
    per_second = float(np.median(rates)) if len(rates) else last["tokens"] / last["seconds"]
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


def _curves(history: History) -> dict:
    """Return points `[step, loss, seconds, tokens]`: means of every few batches, and held-out losses."""
    steps, last = history.steps, history.steps[-1]

    def point(step: int, loss: float) -> list[float]:
        return [step, round(loss, 5), round(steps[step - 1]["seconds"], 3), steps[step - 1]["tokens"]]

    return {
        "curve": [point(end["step"], mean) for end, mean in grouped(history, size=EVERY)],
        "validation": [point(entry["step"], entry["loss"]) for entry in history.validation],
        "seconds": last["seconds"],
        "tokens": last["tokens"],
        "tokens_per_s": last["tokens"] / last["seconds"],
    }


def step_times(
    shapes: Sequence[tuple[int, str]], *, scale: str, calls: int = 30, clock: Callable = time.perf_counter
) -> dict:
    """Time training steps on random ids of all shapes in turns: a fair measure, as runs one by one are not.

    `shapes` are pairs of layers and kind of φ; the others are compared with the first, which is timed twice.

    Returns:
        {"batch", "window", "threads", "calls", "shapes"}: for each shape `layers`, `phi` and the numbers of
        `latency`, the ratio being step time over the first shape's.
    """
    sizes, on = scale_named(scale), device.choose().device
    ids = torch.randint(sizes.vocabulary, (sizes.batch_size, sizes.window)).to(on)
    configs = [config_of(scale, *shape) for shape in shapes]
    with ExitStack() as stack:
        calls_of = {str(index): _step(config, sizes, ids, stack) for index, config in enumerate(configs)}
        with timing_lock():
            calls_of[COPY] = _step(configs[0], sizes, ids, stack)
            times = interleave(calls_of, calls=calls, clock=clock, device=on)
    rows = []
    for index, (layers, phi) in enumerate(shapes):
        of_shape = {DENSE: times["0"], COPY: times[COPY], VARIANT: times[str(index)]}
        rows.append({"layers": layers, "phi": phi} | summarise(of_shape))
    conditions = {"batch": sizes.batch_size, "window": sizes.window, "threads": torch.get_num_threads()}
    return conditions | {"calls": calls, "shapes": rows}


def _step(config: HeadwiseConfig, sizes: Scale, ids: torch.Tensor, stack: ExitStack) -> Call:
    """Return a training step of a fresh model, whose switches are on until `stack` closes."""
    model = HeadwiseForCausalLM(config).to(ids.device).train()
    spec = TrainSpec([], steps=1, learning_rate=sizes.learning_rate, compile=sizes.compiles)
    optimizer, _ = optimizer_for(trained(model), spec)
    stack.enter_context(applied(model, spec))

    def run() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=sizes.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Call(run)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train the models of a scale, or those of one depth."""
    asked = {
        "layers": (int, None, "one depth only"),
        "seed": (int, 42, "of weights and batches"),
        "tokens": (int, None, "input tokens of a run (default: the scale's)"),
    }
    options = command_line(__doc__, arguments, scales=SCALES, folder=RUNS / "architecture", **asked)
    only = options.pop("layers")
    for layers, phi in eight_models(options["scale"]):
        if only in (None, layers):
            logger.info("%s", train_architecture(layers, phi, progress=True, **options))


if __name__ == "__main__":
    main()
