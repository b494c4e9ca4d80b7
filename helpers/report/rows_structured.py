"""Rows that the section of structured asks for."""

import numpy as np

from lmcompress.results.rows import is_recovered

PARTS = {"heads": "Heads kept per attention", "ffn": "Feed-forward channels\nkept per block"}
SHARES = {
    "products": ("matrix products", "#0072B2"),
    "attention": ("attention", "#E69F00"),
    "rest": ("rest", "#7F7F7F"),
}
TOLERANCE = 0.15  # how far a time ratio may lie from the ratio of FLOPs


def sweep_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of the sweep over heads and channels: those chosen as most rows are."""
    plain = [
        row
        for row in rows
        if row["technique"] == "heads-ffn"
        and row["quality"]
        and not is_recovered(row)
        and row["settings"].get("even", True)
        and row["settings"].get("loss", "task") == "task"
        and not (row["settings"].get("calibration") or {}).get("scored")
    ]
    iterations = [row["settings"].get("n_iters", 1) for row in plain]
    return [
        row for row in plain if row["settings"].get("n_iters", 1) == max(iterations, key=iterations.count)
    ]


def kept(row: dict, dimension: str) -> float:
    """Return the heads per attention, or channels per block, that a row kept: the mean over its blocks."""
    entries = row["achieved"][f"{dimension}_kept"].values()
    return float(
        np.mean([len(kept_units) if isinstance(kept_units, list) else kept_units for kept_units in entries])
    )


def timed_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Return rows with a measured time, each with the analysis of where that time goes, at the same shape."""

    def matches(row: dict, shares: dict) -> bool:
        asked = [[side["settings"].get(dimension) for dimension in PARTS] for side in (row, shares)]
        timed = row["technique"] == "heads-ffn" and row["latency"] and row["model"] == shares["model"]
        return timed and asked[0] == asked[1] and shares["achieved"]["shape"] in row["latency"]["shapes"]

    profiles = [row for row in rows if row["technique"] == "time-shares"]
    firsts = ((next((row for row in rows if matches(row, shares)), None), shares) for shares in profiles)
    return [(row, shares) for row, shares in firsts if row]
