"""Replay the search of `lmcompress.fit` on the published scores of every example: is its promise kept?

`python benchmarks/replay.py`. Each replay draws the examples of search and confirmation anew, with
replacement from all that were scored, so that the truth of each candidate is its loss on all of them, and no
draw of one part favours the other. Beside it stands the rule of a point estimate: the cheapest that loses at
most the margin on the examples it is chosen by.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from lmcompress.fit.decision import RUNGS, Contender, confirm, finalists, halving
from lmcompress.fit.loss import Loss, Margin
from lmcompress.fit.power import predicted_chance
from lmcompress.paths import RESULTS
from lmcompress.results.rows import is_dense, model_task_of
from lmcompress.results.scores import SELECTION, columns_of, read_scores
from lmcompress.results.store import published_rows
from lmcompress.tasks.classification import Classification

ENCODER = ("reference/minilm-sst2", "sst2")  # whose rows are candidates
LOOKED_AT = 64  # training texts by which rung 0 knows a candidate
FEW_CHANGES = 0.02
GOALS = ("size", "batch1", "worst")  # the last: as if a candidate were the cheaper the more it loses


def pool(folder: Path = RESULTS / "reference" / "scores") -> dict[str, dict]:
    """Return per candidate "correct" and "cross_entropy" `(n,)` of all examples, and its cost by goal.

    The dense model is called "dense"; both sets of the report are one pool.
    """
    scores = read_scores(folder)
    rows = [row for row in published_rows() if model_task_of(row) == ENCODER and row["key"] in scores]
    rows = {row["key"]: row for row in rows}
    dense_row = next(row for row in rows.values() if is_dense(row))
    candidates = {}
    for key, row in rows.items():
        both = [columns_of(scores[key], part) for part in (SELECTION.rstrip("."), "quality")]
        columns = {
            name: np.concatenate([part[name] for part in both]) for name in ("correct", "cross_entropy")
        }
        size = row["memory"]["file_bytes"] / dense_row["memory"]["file_bytes"]
        shape = (row["latency"] or {"shapes": {}})["shapes"].get("batch1") or {}
        cost = {"size": size, "batch1": shape.get("ratio")}
        candidates["dense" if row is dense_row else key] = {"columns": columns, "cost": cost}
    by_right = sorted(candidates, key=lambda name: candidates[name]["columns"]["correct"].mean())
    for place, name in enumerate(by_right, 1):
        candidates[name]["cost"]["worst"] = 1.0 if name == "dense" else place / (len(candidates) + 1)
    return candidates


def replay(
    candidates: dict[str, dict], *, goal: str, margin: Margin, search: int, confirmation: int, seed: int
) -> tuple[str | None, str | None]:
    """Return the answer of one search on examples drawn by `seed`, and that of the point rule."""
    rng = np.random.default_rng(seed)
    n = len(candidates["dense"]["columns"]["correct"])
    looked, searched, confirmed = (rng.integers(0, n, size) for size in (LOOKED_AT, search, confirmation))
    task = Classification(name="replay", split="all", examples=[{}], source="", labels=["0", "1"])
    loss = Loss(task, margin)
    correct = {name: candidate["columns"]["correct"] for name, candidate in candidates.items()}

    def on(name: str, which: np.ndarray) -> tuple[dict, dict]:
        return {"correct": correct[name][which]}, {"correct": correct["dense"][which]}

    def divergence(name: str) -> float:
        likelihoods = [candidates[side]["columns"]["cross_entropy"][looked] for side in (name, "dense")]
        return float(np.abs(likelihoods[0] - likelihoods[1]).mean())

    contenders = [
        Contender(name, candidate["cost"][goal], divergence(name))
        for name, candidate in candidates.items()
        if name != "dense" and candidate["cost"][goal] is not None
    ]
    alive = halving(
        contenders, lambda c, share: loss.misses(*on(c.name, searched[: int(share * search)])), rungs=RUNGS
    )
    estimates = [loss.estimate(*on(c.name, searched)) for c in alive]
    chances = [predicted_chance(*e, margin.amount, scored=search, n=confirmation) for e in estimates]
    order = finalists(alive, chances) if alive else []
    answer = confirm(order, lambda c: loss.is_within(*on(c.name, confirmed)))
    cheapest = sorted((c for c in contenders if c.cost < 1), key=lambda c: c.cost)
    by_point = (c.name for c in cheapest if loss.value(*on(c.name, searched)) <= margin.amount)
    return answer and answer.name, next(by_point, None)


def main() -> None:
    """Print, per goal and margin, how often each rule breaks its promise, and how often it has no answer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replays", type=int, default=2000)
    parser.add_argument("--search", type=int, default=872)
    parser.add_argument("--confirmation", type=int, default=2000)
    parser.add_argument("--margins", default="0.5,1,2", help="points")
    options = parser.parse_args()
    candidates = pool()
    correct = {name: candidate["columns"]["correct"] for name, candidate in candidates.items()}
    truth = {name: float((correct["dense"] - right).mean()) for name, right in correct.items()}
    changes = {name: float((correct["dense"] != right).mean()) for name, right in correct.items()}
    sizes = {"search": options.search, "confirmation": options.confirmation}
    print(
        f"{len(candidates) - 1} candidates, {len(correct['dense'])} examples, {options.replays} replays of "
        f"{sizes}"
    )
    for goal in GOALS:
        for asked in options.margins.split(","):
            margin = Margin.parse(asked, "accuracy")
            eligible = [
                name
                for name, candidate in candidates.items()
                if name != "dense" and (candidate["cost"][goal] or 1) < 1
            ]
            lossless = [name for name in eligible if truth[name] <= 0 and changes[name] <= FEW_CHANGES]
            drawn = {"goal": goal, "margin": margin, **sizes}
            answers = list(zip(*(replay(candidates, seed=seed, **drawn) for seed in range(options.replays))))
            print(f"\n--for {goal} --max-loss {asked}; without loss and with few changes: {len(lossless)}")
            for rule, names in zip(("fit", "point rule"), answers):
                answered = [name for name in names if name]
                broken = sum(truth[name] > margin.amount for name in answered)
                cost = np.exp(np.mean([np.log(candidates[name]["cost"][goal]) for name in answered] or [0.0]))
                print(
                    f"  {rule:10} promise broken {broken / len(names):6.1%}, an answer "
                    f"{len(answered) / len(names):6.1%}, its cost {cost:.2f} of dense, "
                    f"{len(Counter(answered))} different"
                )


if __name__ == "__main__":
    main()
