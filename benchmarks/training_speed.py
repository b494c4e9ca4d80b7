"""Tokens per second of this project's training loop against a plain `transformers.Trainer` on the same model.

`python benchmarks/training_speed.py [--scale middle] [--layers 6] [--rounds 5] [--steps 20] [--bf16]` trains
the LLaMA-shaped model of notebook 08, in turns with the one loop and the other: same weights, windows, batch,
AdamW (fused), clipping and precision; no padding, logging, validation or checkpoints. The first steps of a
turn are left out. The last lines hold the rate against the machine's best matmul rate: what the products of a
step need, as torch counts them.
"""

import argparse
import tempfile
import time
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lmcompress import device
from lmcompress.experiments.architecture import SCALES, config_of
from lmcompress.measure.latency import synchronize
from lmcompress.models.headwise import HeadwiseForCausalLM
from lmcompress.timing_lock import timing_lock
from lmcompress.train.trainer import TrainSpec, fit

WARMUP = 5  # steps of a turn that are not counted
RATE = 1e-3


def main() -> None:
    """Print tokens/s of both loops per round, their ratio, and the share of the matmul rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=list(SCALES), default="middle")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--bf16", action="store_true", help="autocast to bfloat16 (default on a GPU of its own)"
    )
    options = parser.parse_args()
    on, scale = device.choose().device, SCALES[options.scale]
    bf16 = options.bf16 or device.choose().dtype == torch.bfloat16
    rows = windows(scale, WARMUP + options.steps)
    tokens = options.steps * scale.batch_size * scale.window
    rates_by_loop: dict[str, list[float]] = {"ours": [], "Trainer": []}
    print(
        f"{options.scale}, {options.layers} layers, {on}, {'bf16' if bf16 else 'fp32'}, "
        f"{torch.get_num_threads()} threads"
    )
    with timing_lock():
        for turn in range(options.rounds):
            for name in ("ours", "Trainer") if turn % 2 else ("Trainer", "ours"):
                torch.manual_seed(0)
                model = HeadwiseForCausalLM(config_of(options.scale, options.layers, "none")).to(on)
                run = ours if name == "ours" else plain
                rates_by_loop[name].append(tokens / run(model, rows, scale.batch_size, options.steps, bf16))
            print(
                f"round {turn + 1}: "
                + ", ".join(f"{name} {rates[-1]:,.0f} tokens/s" for name, rates in rates_by_loop.items())
            )
    ratios = [
        ours / trainers
        for ours, trainers in zip(rates_by_loop["ours"], rates_by_loop["Trainer"], strict=True)
    ]
    print(
        f"ours / Trainer: {median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f}); "
        "the aim is 1 or more"
    )
    best = device.ceiling(on, torch.bfloat16 if bf16 else torch.float32)["gflops_per_s"]
    needed = flops(model, rows, scale.batch_size) / (scale.batch_size * scale.window)
    for name, rates in rates_by_loop.items():
        print(
            f"{name}: {needed * median(rates) / 1e9:,.1f} GFLOP/s, "
            f"{needed * median(rates) / 1e9 / best:.1%} of matmul"
        )


def windows(scale, steps: int) -> list[dict]:
    """Random ids, full windows: nothing is padded, and every step has as many tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(
        2, scale.vocabulary, (steps * scale.batch_size, scale.window), generator=draw
    ).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def ours(model, rows: list[dict], batch_size: int, steps: int, bf16: bool) -> float:
    """Seconds of the counted steps with `lmcompress.train.fit`."""
    settings = {"learning_rate": RATE, "min_learning_rate": RATE, "batch_size": batch_size}
    dtype = torch.bfloat16 if bf16 else torch.float32
    done = fit(model, TrainSpec(rows, steps=WARMUP + steps, dtype=dtype, **settings)).steps
    return done[-1]["seconds"] - done[WARMUP - 1]["seconds"]


class Clock(TrainerCallback):
    """The time after every step."""

    def __init__(self, on: torch.device):
        """Of a model on device `on`, whose queue is emptied first."""
        self.on, self.times = on, []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        synchronize(self.on)
        self.times.append(time.monotonic())


def plain(model, rows: list[dict], batch_size: int, steps: int, bf16: bool) -> float:
    """Seconds of the counted steps with `transformers.Trainer`."""
    clock = Clock(model.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=WARMUP + steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=bf16,
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=model.device.type == "cuda",
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.times[-1] - clock.times[WARMUP - 1]


def flops(model, rows: list[dict], batch_size: int) -> int:
    """Operations of the products of one step, forward and backward."""
    ids = torch.tensor([row["input_ids"] for row in rows[:batch_size]], device=model.device)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
