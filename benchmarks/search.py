"""A whole search of `lmcompress.fit` on sentences as a user has them: what it answers, and how long it takes.

`python benchmarks/search.py`: SST-2's validation split and the 2,000 sentences held out of training
(`$ASSET_MIRROR` or the Hub) as a .csv of texts and labels. Other options are those of the command:
`python benchmarks/search.py --for size --max-loss 2`.
"""

import csv
import random
import sys
import tempfile
import time
from pathlib import Path

from lmcompress.fit.__main__ import main
from lmcompress.tasks import load_task

ASKED = ["--for", "batch1", "--max-mb", "12.5", "--max-loss", "1", "--no-train"]


def write_sentences(file: Path) -> int:
    """Write both sets as one file in random order; return how many sentences there are."""
    task = load_task("sst2")
    examples = [*task.examples, *task.selection().examples]
    random.Random(5).shuffle(examples)
    with open(file, "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["text", "label"])
        writer.writerows([example["text"], task.labels[example["label"]]] for example in examples)
    return len(examples)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file, began = Path(folder, "sentences.csv"), time.monotonic()
        print(f"{write_sentences(file):,} sentences")
        options = [
            "--model",
            "reference/minilm-sst2",
            "--task",
            str(file),
            "--save",
            str(Path(folder, "found")),
        ]
        status = main([*options, *(sys.argv[1:] or ASKED)])
        print(f"{time.monotonic() - began:.0f} s")
        sys.exit(status)
