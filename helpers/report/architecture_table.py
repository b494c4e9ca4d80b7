"""The table of trained architectures: size, quality and speed of every shape."""

import numpy as np

from helpers.report import rows_architecture as p
from helpers.report import wording as w
from helpers.report.architecture_gaps import Value, perplexity


def shape_table(rows: list[dict], trained: dict[p.Shape, list[dict]]) -> str:
    """A line per shape: size, quality, speed; mean and range over seeds."""
    texts, steps, lines = p.trained(rows, "bleu"), p.step_times(rows), []

    def ends_of(runs: list[dict], value: Value) -> str:
        values = [value(run) for run in runs]
        ends = f" [{w.number(min(values))}, {w.number(max(values))}]" if len(values) > 1 else ""
        return w.number(float(np.mean(values))) + ends if values else ""

    def secondary(name: str) -> Value:
        return lambda run: run["quality"]["secondary"][name]["value"]

    for shape, runs in trained.items():
        generated = texts.get(shape, [])
        times = [p.timed(runs, name) for name in ("prefill_b1", "decode_b1")]
        lines.append(
            [
                p.name_of(shape),
                f"{runs[0]['achieved']['parameters']:,}",
                ends_of(runs, perplexity),
                ends_of(runs, secondary("bits_per_byte")),
                ends_of(generated, perplexity),
                ends_of(generated, secondary("rougeL")),
                _step(steps.get(shape)),
                *(f"{t['median_ms']:.2f} [{t['p5_ms']:.2f}, {t['p95_ms']:.2f}]" if t else "" for t in times),
                _step(times[1]),
            ]
        )
    header = "Model|Parameters|Perplexity|Bits per byte|BLEU|ROUGE-L|Training step / baseline"
    header += "|Prefill (ms; 5 and 95 %)|Per token (ms; 5 and 95 %)|Per token / baseline"
    return w.table(header.split("|"), lines)


def _step(time: dict | None) -> str:
    return w.ratio_text(time) if time else ""
