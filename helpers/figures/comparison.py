"""Figures of the comparison: the loss against everything that a model costs, with the fronts.

A row is on the front if none that costs no more loses less. Losses are paired differences to the dense model. Panels
show its neighbourhood; what lies further away is counted at their edge.
"""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures.core import common_legend, look, panels
from lmcompress.results.labels import metric_name
from lmcompress.results.rows import dense_of, is_recovered, model_task_of, model_tasks, smallest_format
from lmcompress.results.verdicts import loss_of, loss_scale
from lmcompress.study.decision import Budget, decide, options

NEAR = 0.12  # of the dense quality: the loss that a panel reaches down to
GREY = "#7F7F7F"
RELIED_ON = "Smallest to rely on"
KINDS = {"encoder": "batch1", "decoder": "prefill_b1", "encoder-decoder": "encode_b1"}  # the shape that tells
Cost = Callable[[dict], tuple[float, float, float] | None]  # a row's cost with the ends of its interval


def pareto_front(points: list[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Indices of the points (cost, quality) that no other point beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    front, best = [], float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[index][1] > best:
            front.append(index)
            best = sign * points[index][1]
    return front


def kind_rows(rows: list[dict], kind: str) -> list[dict]:
    """The rows of the models of one kind, told by the shapes that their dense model was timed at."""
    timed = {model_task_of(r) for r in rows if r["latency"] and KINDS[kind] in r["latency"]["shapes"]}
    return [row for row in rows if model_task_of(row) in timed]


def _exact(value: float) -> tuple[float, float, float]:
    return value, value, value


def ratio(row: dict, shape: str) -> tuple[float, float, float] | None:
    """Time over dense at a shape with its interval; 1 for the dense model, None if not timed or not possible."""
    if row["technique"] == "dense" and not is_recovered(row):
        return _exact(1.0)
    timed = row["latency"] and row["latency"]["shapes"].get(shape)
    return (timed["ratio"], timed["ratio_low"], timed["ratio_high"]) if timed and timed["ratio"] else None


def overview(rows: list[dict]) -> Figure:
    """The loss over the bytes left, one panel per model and task; only what is on a front is coloured."""
    pairs = model_tasks(rows)
    figure, axes = panels(len(pairs), height=3.3)
    for axis, pair in zip(axes, pairs, strict=True):
        own = [row for row in _judged(rows, pair) if row["memory"]]
        base = smallest_format(dense_of(own))[1]
        chosen = decide(options(own), Budget()).chosen
        _panel(
            axis, own, lambda row, base=base: _exact(smallest_format(row)[1] / base),
            front_only=True, ringed=chosen.key,
        )  # fmt: skip
        if not chosen.baseline:
            place = chosen.bytes / base, chosen.loss
            axis.plot(*place, "o", ms=15, mfc="none", mec="#000000", label=RELIED_ON, zorder=6)
        axis.set(title=f"{pair[0]}\n{pair[1]}", xlabel="Bytes / dense bytes, lower is better")
        axis.set_ylabel(_loss_label(own))
    common_legend(figure, axes, columns=4)
    return figure


def _judged(rows: list[dict], pair: tuple[str, str]) -> list[dict]:
    """The dense row of a subject and those that were compared with it."""
    own = [row for row in rows if model_task_of(row) == pair]
    return [row for row in own if row["quality"]["difference"] or row is dense_of(own)]


def _loss_label(own: list[dict]) -> str:
    metric = own[0]["quality"]["metric"]
    unit = loss_scale(metric)[1]
    return f"Loss of {metric_name(metric)}\n({'points, ' if unit == 'points' else ''}up is better)"


def _panel(
    axis: Axes, own: list[dict], cost: Cost, *, front_only: bool = False, ringed: str | None = None
) -> None:
    """One panel: intervals of both axes, the dense model as a star and a line, the front as a line.

    With `front_only` the others are faint, but for the one with the key `ringed`.
    """
    dense = dense_of(own)
    losses = [(0.0, 0.0, 0.0) if row is dense else loss_of(row) for row in own]
    points = [(cost(row)[0], loss[0]) for row, loss in zip(own, losses, strict=True)]
    front = pareto_front(points, higher_is_better=False)
    limit = NEAR * dense["quality"]["value"] * loss_scale(dense["quality"]["metric"])[0]
    if others := [loss[0] for row, loss in zip(own, losses, strict=True) if row is not dense]:
        limit = max(limit, 1.2 * min(others))  # one way at least is to be seen
    for index, (row, (y, *ends)) in enumerate(zip(own, losses, strict=True)):
        title, colour, marker = look(row["technique"], row["settings"])
        recovered, (x, low, high) = is_recovered(row), cost(row)
        faint = front_only and index not in front and row is not dense and row["key"] != ringed
        if ends[0] > limit:  # out of the panel with its whole interval: counted below
            continue
        axis.errorbar(
            x, y, yerr=[[max(0.0, y - ends[0])], [max(0.0, ends[1] - y)]], xerr=[[x - low], [high - x]],
            ls="", color="#cccccc" if faint else colour, marker="." if faint else marker,
            zorder=5 if row is dense or row["key"] == ringed else 1 if faint else 3,
            ms=11 if row is dense else 6, mfc="white" if recovered else None,
            label=None if faint else title + (" + recovery" if row["settings"].get("recovery") else ""),
        )  # fmt: skip
    axis.plot([points[i][0] for i in front], [points[i][1] for i in front], color=GREY, lw=1, zorder=2.5)
    axis.axhline(0.0, color="#000000", lw=0.8, zorder=2.4)  # above the grid
    axis.set_ylim(limit, min(-limit / 5, *(loss[1] for loss in losses)))
    if away := sum(loss[0] > limit for loss in losses):
        axis.annotate(
            f"{away} lose more", (0.02, 0.02), xycoords="axes fraction", fontsize=8, color=GREY, zorder=6,
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
        )  # fmt: skip
