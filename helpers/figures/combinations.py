"""Combinations: the same steps alone and in every order."""

import json
from itertools import combinations

import pandas as pd
from matplotlib.figure import Figure

from helpers.figures import core

Path = tuple[str, ...]  # the steps that made a row, as JSON; rows of one path differ by seed


def path_of(recipe: str) -> Path:
    """Return the steps of a frame's `recipe`, recovery as a step of its own; () for the dense model."""
    steps = []
    for step in json.loads(recipe):
        recovery = step.get("recovery")
        plain = {name: step[name] for name in step if name not in ("recovery", "version")}
        steps += [plain] if plain and plain != {"technique": "dense"} else []
        steps += [{"recovery": recovery}] if recovery else []
    return tuple(json.dumps(step, sort_keys=True) for step in steps)


def orders(rows: list[dict]) -> Figure:
    """Draw steps recorded in several orders: each order, and each part of it, as relative differences."""
    table = core.scored(rows)
    table = table.assign(path=table["recipe"].map(path_of))
    shown = pd.Series(False, table.index)
    for _, lines in table.groupby("panel"):
        chains = list(dict.fromkeys(path for path in lines["path"] if len(path) > 1))
        sets = [tuple(sorted(a)) for a, b in combinations(chains, 2) if sorted(a) == sorted(b)]
        sets = sets or [max(chains, key=len, default=())]  # of several as long, the first recorded
        inside = lines["path"].map(
            lambda path, sets=sets: any(
                all(path.count(step) <= steps.count(step) for step in path) for steps in sets
            )
        )
        shown |= inside.reindex(table.index, fill_value=False)
    table = table[shown | table["is_dense"]]
    labels = [" → ".join(core.short_step(json.loads(step)) for step in path) for path in table["path"]]
    table = table.assign(short=labels, steps=table["path"].map(len))
    return core.forest(table.sort_values(["steps", "short"], kind="stable"), sort=False)
