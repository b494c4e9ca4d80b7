"""Rows that the section of comparison asks for."""

from lmcompress.results.rows import is_dense, model_task_of

NEAR = 0.12  # of the dense quality: the loss that a panel reaches down to
KINDS = {"encoder": "batch1", "decoder": "prefill_b1", "encoder-decoder": "encode_b1"}  # the shape that tells


def pareto_front(points: list[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Return the indices of the points (cost, quality) that no other point beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    front, best = [], float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[index][1] > best:
            front.append(index)
            best = sign * points[index][1]
    return front


def kind_rows(rows: list[dict], kind: str) -> list[dict]:
    """Return the rows of the models of one kind, told by the shapes that their dense model was timed at."""
    timed = {model_task_of(r) for r in rows if r["latency"] and KINDS[kind] in r["latency"]["shapes"]}
    return [row for row in rows if model_task_of(row) in timed]


def ratio(row: dict, shape: str) -> tuple[float, float, float] | None:
    """Return time over dense at a shape with its interval; 1 for dense, None if it was not timed."""
    if is_dense(row):
        return 1.0, 1.0, 1.0
    timed = row["latency"] and row["latency"]["shapes"].get(shape)
    return (timed["ratio"], timed["ratio_low"], timed["ratio_high"]) if timed and timed["ratio"] else None
