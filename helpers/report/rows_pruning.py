"""Rows that the section of pruning asks for."""

from lmcompress.results.labels import FORMAT_NAMES
from lmcompress.results.rows import is_recovered, model_task_of

FORMATS = {  # storage format: (title, colour, break-even sparsity by arithmetic in fp32)
    name: (FORMAT_NAMES[name], colour, break_even)
    for name, colour, break_even in (
        ("dense", "#000000", None),
        ("dense_zstd", "#E69F00", None),
        ("bitmask", "#0072B2", 1 / 32),
        ("csr_int32", "#009E73", 1 / 2),
        ("csr_int64", "#CC79A7", 2 / 3),
        ("bitmask_integers", "#56B4E9", None),
    )
}
KERNELS = {  # kernel of one linear layer: (title, colour)
    "dense_fp32": ("dense fp32", "#000000"),
    "dense_bf16": ("dense bf16", "#E69F00"),
    "csr": ("CSR, drop-in", "#009E73"),
    "csr_matmul": ("CSR, product alone", "#CC79A7"),
    "semi_structured": ("2:4, semi-structured", "#56B4E9"),
    "rows_removed": ("rows removed", "#0072B2"),
}


def pattern_rows(rows: list[dict]) -> list[dict]:
    """Return the one-shot rows at half the weights, unstructured or N:M, of criteria tried with a pattern."""
    half = [
        row
        for row in rows
        if row["quality"]
        and not is_recovered(row)
        and not row["settings"].get("allocation")
        and (row["settings"].get("pattern") in ("2:4", "4:8") or row["settings"].get("sparsity") == 0.5)
    ]
    tried = {(model_task_of(row), row["technique"]) for row in half if row["settings"].get("pattern")}
    return [row for row in half if (model_task_of(row), row["technique"]) in tried]


def crossing(x: list[float], y: list[float]) -> float | None:
    """Return where a falling line through the points (x, y) reaches 1 between two of them, or None."""
    for (x0, y0), (x1, y1) in zip(zip(x, y), list(zip(x, y))[1:]):
        if y0 >= 1 > y1 and y0 > y1:
            return x0 + (x1 - x0) * (y0 - 1) / (y0 - y1)
    return None
