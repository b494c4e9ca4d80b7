"""Rows that the section of sheared asks for."""

import numpy as np

SCRATCH = "scratch-shape"
WAYS = ("sheared", "lora-prune", "magnitude-shape", SCRATCH)
KINDS = {
    "none": ("as trained", "#000000", "o"),
    "linear": ("linear", "#0072B2", "s"),
    "dynamic": ("dynamic", "#009E73", "^"),
    "yarn": ("YaRN", "#D55E00", "D"),
}


def runs(rows: list[dict], adapters: str | None = None) -> dict[str, list[dict]]:
    """Return technique -> its rows by seed, of those that recovered all weights, or by `adapters`."""
    by_technique: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        if row["technique"] in WAYS and row["quality"] and row["settings"].get("adapters") == adapters:
            by_technique.setdefault(row["technique"], []).append(row)
    return {technique: by_technique[technique] for technique in WAYS if technique in by_technique}


def curve(run: dict) -> np.ndarray:
    """Return tokens and held-out losses, `(2, points)`, from the cut on."""
    return np.array(run["achieved"]["curve"]).T


def paired(runs: list[dict], other_runs: list[dict]) -> list[tuple[dict, dict]]:
    """Return the runs of two ways that share a seed."""
    by_seed = {run["seed"]: run for run in other_runs}
    return [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]


def switches(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Return switch -> seed -> what the run with it measured."""
    by_switch: dict[str, dict[int, dict]] = {}
    for row in rows:
        if row["technique"] == "switch":
            by_switch.setdefault(row["settings"]["switch"], {})[row["settings"]["seed"]] = row["achieved"]
    return by_switch


def contexts(rows: list[dict]) -> list[dict]:
    """Return the entries of the last row that looked at longer texts."""
    by_row = [row["achieved"]["contexts"] for row in rows if row["technique"] == "context-lengths"]
    return by_row[-1] if by_row else []
