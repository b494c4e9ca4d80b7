"""Kill a whole small study at random moments until it is done, and see what is lost: `python
benchmarks/kills.py --n 50`.

The study is a harvest of three packages, a training, the runner on two notebooks, and a publication, in a
temporary root of its own (`$STUDY_HOME`). A life of it ends by SIGKILL of the command, of its children
(kernels, workers), or of both, and the next begins at once; one that comes through is checked against an
uninterrupted one, and a new one begins. Prints one table; exit status 1 if a promise was broken.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

CHECKOUT = Path(__file__).resolve().parent.parent
WRITTEN = (
    "runs/machine.json",
    "runs/pocket",
    "runs/training",
    "data/raw/pydocs",
    "results",
    "images",
    "report.md",
    "report.html",
    "report",
    "tmp",
)
NOT_OURS = (
    "runs/pocket/notes.txt",
    "runs/other/rows/00_mine.jsonl",
    "data/raw/pydocs/notes.txt",
    "notes.txt",
)
ORPHANS_END_S = 60

HARVEST = """
from lmcompress.corpus import pydocs
everything = pydocs.installed_sources()[0]
pydocs.installed_sources = lambda: ({name: everything[name] for name in ("click", "jinja2", "tqdm")}, {})
pydocs.harvest(processes=2)
"""
TRAIN = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from lmcompress.paths import RUNS, write_json
from lmcompress.train import TrainSpec, fit
from lmcompress.train.checkpoint import tensors_digest
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=200, hidden_size=64, intermediate_size=128,
    num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.1,
    pad_token_id=0, bos_token_id=1, eos_token_id=1))
rows = torch.randint(2, 200, (64, 24)).tolist()
features = [{"input_ids": row, "labels": row} for row in rows]
spec = TrainSpec(features=features, steps=300, batch_size=8, learning_rate=1e-3, warmup_steps=10,
    checkpoint=RUNS / "training" / "checkpoint", checkpoint_every=10)
history = fit(model, spec)
losses = [step["loss"] for step in history.steps]
weights = tensors_digest(model.state_dict())
write_json(RUNS / "training" / "result.json", {"weights": weights, "losses": losses})
"""
SMALL = {"calls": 3, "encoder_examples": 32, "texts": '[["pydocs-lm", 4]]'}
NOTEBOOKS = ("00", "12")


def stages() -> dict[str, list[str]]:
    """Return the commands of the study by name, each of which skips what it has done."""
    python, runner = [sys.executable], ["-m", "helpers.run.runner", "--profile", "pocket"]
    chosen = [word for number in NOTEBOOKS for word in ("--only", number)]
    small = [word for name, budget in SMALL.items() for word in ("-p", f"{name}={budget}")]
    return {
        "harvest": [*python, "-c", HARVEST],
        "training": [*python, "-c", TRAIN],
        "runner": [*python, *runner, *chosen, *small],
        "publish": [*python, "-m", "helpers.report", "--publish", "pocket"],
    }


class Home:
    """A root for one study: code and models are linked, everything that is written is its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("lmcompress", "helpers", "scripts", "models", "profiles", "notebooks"):
            (folder / name).symlink_to(CHECKOUT / name)
        for name in ("results", "images", "data/raw/pydocs", "runs", "tmp/jupyter"):
            (folder / name).mkdir(parents=True)
        for harvested in (CHECKOUT / "data" / "raw" / "pydocs").glob("*/docs.parquet"):
            shutil.copytree(harvested.parent, folder / "data/raw/pydocs" / harvested.parent.name)
        for name in NOT_OURS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("not yours\n")
        self.environment = os.environ | {
            "STUDY_HOME": str(folder), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder / "tmp"), "JUPYTER_RUNTIME_DIR": str(folder / "tmp/jupyter"),
            "STUDY_RUNS": str(folder / "runs"),
        }  # fmt: skip
        self.peak = self.bytes()

    def bytes(self) -> int:
        """Return the bytes of all files that are not linked; one that goes meanwhile counts nothing."""
        total = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of this study."""
        alive = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("STUDY_HOME") == str(self.folder) and process.status() != "zombie":
                    alive.append(process)
        return alive

    def live(self, command: list[str], *, end_after_s: float | None = None, kill: str = "both") -> int:
        """Run a command and return its status; `end_after_s` seconds later kill it, its children, or both."""
        with open(self.folder / "tmp" / "output.txt", "ab") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=output
            )
        began = time.monotonic()
        while process.poll() is None:
            self.peak = max(self.peak, self.bytes())
            if end_after_s is not None and time.monotonic() - began > end_after_s:
                victims = psutil.Process(process.pid).children(recursive=True) if kill != "command" else []
                victims += [psutil.Process(process.pid)] if kill != "children" or not victims else []
                for victim in victims:
                    with contextlib.suppress(psutil.Error):
                        victim.kill()
                end_after_s = None
            time.sleep(0.05)
        return process.returncode

    def faults(self, reference: "Home | None") -> Counter:
        """Return how many promises of each kind are broken in a study that is done."""
        end = time.monotonic() + ORPHANS_END_S
        while self.processes() and time.monotonic() < end:
            time.sleep(0.2)
        faults = Counter({"processes left": len(self.processes())})
        folder, keys = self.folder, self.keys()
        faults["rows twice"] = sum(count - 1 for count in keys.values())
        row_files = [file for file in folder.glob("r*/**/*.jsonl") if "other" not in file.parts]
        faults["torn lines"] = sum(not file.read_bytes().endswith(b"\n") for file in row_files)
        left = [*folder.glob("runs/**/scratch/*"), *folder.glob("runs/**/checkpoints/*")]
        left += [*folder.rglob(".lmcompress-unfinished-*"), *folder.glob("tmp/lmcompress-scratch-*")]
        faults["left behind"] = len(left)
        faults["not ours touched"] = sum((folder / name).read_bytes() != b"not yours\n" for name in NOT_OURS)
        named = [folder / name for name in (*WRITTEN, *NOT_OURS)]
        elsewhere = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        elsewhere = [path for path in elsewhere if not any(path.is_relative_to(place) for place in named)]
        faults["written elsewhere"] = len(elsewhere)
        if reference:
            faults["rows missing"] = len(set(reference.keys()) - set(keys))
            faults["training differs"] = int(self.training() != reference.training())
        if faults.total():
            paths = [str(path.relative_to(folder)) for path in left + elsewhere]
            print(f"  faults: {dict(+faults)} {paths[:8]}", flush=True)
        return faults

    def keys(self) -> Counter:
        """Return how often each file of rows has each key, published ones included; a torn line is no row."""
        keys: Counter = Counter()
        for file in [*self.folder.glob("runs/pocket/rows/*.jsonl"), *self.folder.glob("results/*/*.jsonl")]:
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    keys[f"{file.parent.name}/{file.stem}", json.loads(line)["key"]] += 1
        return keys

    def training(self) -> str:
        """Return a hash of the training's weights and losses."""
        return hashlib.sha256((self.folder / "runs/training/result.json").read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file of the checkout that git follows."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=folder, capture_output=True, text=True
    ).stdout.splitlines()
    return {name: (os.lstat(folder / name).st_size, os.lstat(folder / name).st_mtime_ns) for name in names}


def whole(home: Home) -> dict[str, float]:
    """Run the study without a kill; return the seconds of each stage."""
    seconds = {}
    for name, command in stages().items():
        began = time.monotonic()
        if home.live(command):
            sys.exit(f"{name} fails without a kill: {(home.folder / 'tmp/output.txt').read_text()[-2000:]}")
        seconds[name] = time.monotonic() - began
    return seconds


def main() -> int:
    """Print the table; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=50, help="kills (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    options = parser.parse_args()
    draw, kills, faults, studies, before = (
        random.Random(options.seed),
        Counter(),
        Counter(),
        0,
        tree(CHECKOUT),
    )
    with tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True) as parent:
        reference = Home(Path(tempfile.mkdtemp(dir=parent)))
        seconds = whole(reference)
        print("uninterrupted: " + ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()), flush=True)
        faults += reference.faults(None)
        sizes = Counter(peak=0, end=0)
        while kills.total() < options.n:
            home = Home(Path(tempfile.mkdtemp(dir=parent)))
            for name, command in stages().items():
                done = False
                while not done:
                    # Of what the whole stage takes, so that a life gets far enough, and most are killed
                    moment, kind = (
                        draw.uniform(0, seconds[name]),
                        draw.choice(("command", "children", "both")),
                    )
                    last = kills.total() >= options.n
                    status = home.live(command, end_after_s=None if last else moment, kill=kind)
                    done = status == 0
                    if not done:
                        if last:
                            print((home.folder / "tmp/output.txt").read_text()[-2000:])
                            return 1
                        kills[name, kind] += 1
                        print(f"  {kills.total()}: {name}, {kind} after {moment:.1f} s", flush=True)
            faults, studies = faults + home.faults(reference), studies + 1
            sizes["peak"], sizes["end"] = max(sizes["peak"], home.peak), max(sizes["end"], home.bytes())
            shutil.rmtree(home.folder, ignore_errors=True)
        faults["checkout changed"] = len(set(before.items()) ^ set(tree(CHECKOUT).items()))
        print(f"\n{kills.total()} kills over {studies} whole studies")
        for (name, kind), count in sorted(kills.items()):
            print(f"  {name + ', ' + kind:32} {count:6}")
        print(
            f"disk, MB: peak {sizes['peak'] / 1e6:.1f} (uninterrupted {reference.peak / 1e6:.1f}), "
            f"end {sizes['end'] / 1e6:.1f} (uninterrupted {reference.bytes() / 1e6:.1f})"
        )
        print(f"promises broken: {faults.total()}")
        for kind, count in faults.items():
            print(f"  {kind:32} {count:6}")
    return int(faults.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
