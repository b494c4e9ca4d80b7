"""Rows that the section of moefication asks for."""

from lmcompress.results.rows import is_timed

MEASURES = {
    "zero": ("exactly 0", "#000000"),
    "below": ("below {:g} of the spread", "#7F7F7F"),
    "neurons_90": ("neurons with 90 % of a token's energy", "#0072B2"),
    "fixed_90": ("the same, one choice for all tokens", "#D55E00"),
}


def expert_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of models cut into experts."""
    return [row for row in rows if row["technique"] == "moefy" and row["quality"]]


def channel_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of models that lost channels for all tokens alike and no heads."""
    pruned = [row for row in rows if row["technique"] == "heads-ffn" and row["quality"]]
    return [row for row in pruned if row["settings"].get("heads") is None]


def ffn_share(row: dict) -> float:
    """Return the FFN FLOPs that a row's model spends, relative to dense."""
    return row["achieved"].get("ffn_flops_share") or row["settings"]["ffn"]


def timed_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of models cut into experts whose times were measured on themselves."""
    return [row for row in expert_rows(rows) if is_timed(row)]
