"""Time `lmcompress.tasks.evaluate` against a `transformers` pipeline padding to 512, at equal predictions.

    python benchmarks/evaluate_sst2.py [--limit 872] [--rounds 4]

Runs MiniLM with a random classification head over SST-2's validation sentences ($ASSET_MIRROR or the Hub's
cache), else over the summary lines of pydocs-library. The examples are split into rounds; in each, every way
runs on the same examples, in random order, so that drift of the machine hits all alike. Fails if any
prediction differs.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, pipeline

from lmcompress.errors import AssetNotFound
from lmcompress.models import assets
from lmcompress.tasks import Task, evaluate, load_task

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PADDED = {"padding": "max_length", "truncation": True, "max_length": 512}
Way = Callable[[Task], list[int]]


def task_at_hand(limit: int | None) -> Task:
    """SST-2 where it is there, else harvested summaries."""
    try:
        return load_task("sst2", limit=limit)
    except AssetNotFound:
        return load_task("pydocs-library", limit=limit)


def model_for(task: Task) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """MiniLM with a head of random weights, large enough that no prediction hangs on rounding."""
    path = assets.resolve(MODEL, kind="models")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(task.labels)).eval()
    nn.init.normal_(model.classifier.weight)
    return model, AutoTokenizer.from_pretrained(path)


def ways(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Way]:
    """Name -> predicted labels of a task's examples."""
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=model.device)
    label_id = model.config.label2id

    def through_pipeline(task: Task, **settings) -> list[int]:
        return [label_id[r["label"]] for r in classify([e["text"] for e in task.examples], **settings)]

    return {
        "evaluate": lambda task: evaluate(model, tokenizer, task).columns["prediction"].astype(int).tolist(),
        "pipeline, padded to 512, batch 16": lambda task: through_pipeline(task, batch_size=16, **PADDED),
        "pipeline, one text at a time": through_pipeline,
    }


def seconds_by_round(task: Task, candidates: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way on every round's examples.

    Raises:
        AssertionError: two ways predict differently.
    """
    order, seconds = random.Random(0), {name: [] for name in candidates}
    for subset in np.array_split(np.arange(len(task.examples)), rounds):
        predictions = {}
        for name in order.sample(list(candidates), len(candidates)):
            fresh = replace(task, examples=[task.examples[i] for i in subset])
            started = time.perf_counter()
            predictions[name] = candidates[name](fresh)
            seconds[name].append(time.perf_counter() - started)
        assert len({tuple(p) for p in predictions.values()}) == 1, "the ways predict differently"
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, help="examples (default: all)")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    task = task_at_hand(arguments.limit)
    model, tokenizer = model_for(task)
    candidates = ways(model, tokenizer)
    warm = replace(task, examples=task.examples[:8])
    for method in candidates.values():
        method(warm)
    seconds = seconds_by_round(task, candidates, arguments.rounds)
    print(f"{task.name}: {len(task.examples)} examples, {torch.get_num_threads()} threads, equal predictions")
    for name, times in seconds.items():
        ratios = np.array(times) / np.array(seconds["evaluate"])
        print(
            f"{name:36} {sum(times):8.1f} s   {sum(times) / sum(seconds['evaluate']):5.1f}x evaluate's time "
            f"(rounds {ratios.min():.1f} to {ratios.max():.1f})"
        )


if __name__ == "__main__":
    main()
