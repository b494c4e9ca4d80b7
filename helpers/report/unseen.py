"""What the scores of few examples cannot show: how large a loss may hide, and where the likelihood shows one."""

from helpers.report import wording as w
from lmcompress.results.rows import model_task_of, model_tasks
from lmcompress.results.verdicts import less_likely, likelihood_of, loss_of, loss_scale
from lmcompress.study.decision import comparable_rows, verdicts_of


def noise(rows: list[dict]) -> str:
    """How large a loss the examples cannot show."""
    kept, parts, verdicts = comparable_rows(rows), [], verdicts_of(rows)
    for model, task in model_tasks(kept):
        own = [row for row in kept if model_task_of(row) == (model, task)]
        if still := [row for row in own if verdicts.get(row["key"]) == "no measurable change"]:
            unit, n = loss_scale(still[0]["quality"]["metric"])[1], still[0]["quality"]["n"]
            halves = sorted((high - low) / 2 for _, low, high in map(loss_of, still))
            ends = dict.fromkeys(f"{half:.2g}" for half in (halves[0], halves[-1]))
            asked = f"{model}, {w.plural(n, 'example')}, {w.plural(len(still), 'way')}"
            parts.append(f"{' to '.join(ends)} {unit} on {task} ({asked})")
    if not parts:
        return ""
    return (
        "**Small losses hide in few examples.** The paired interval of a way that cannot be told from dense reaches this far "
        f"to either side: {w.listing(parts)}. It is narrow where a model hardly differs from dense, and wide where it does: a "
        "loss smaller than that can well have gone unseen."
    )


def likelihood(rows: list[dict]) -> str:
    """How often the right answers became less likely under a score that cannot be told from dense."""
    kept, parts, verdicts, hidden = comparable_rows(rows), [], verdicts_of(rows), 0
    lost = less_likely(kept)
    for model, task in model_tasks(kept):
        own = [row for row in kept if model_task_of(row) == (model, task) and likelihood_of(row)]
        if still := [row for row in own if verdicts.get(row["key"]) == "no measurable change"]:
            count = sum(row["key"] in lost for row in still)
            names = [
                w.metric_name(name) for name in (still[0]["quality"]["metric"], likelihood_of(still[0])[0])
            ]
            parts.append(f"{count} of {len(still)} on {task} ({model}, {names[1]} beside {names[0]})")
            hidden += count
    if not parts:
        return ""
    said = (
        "**A score that stands still can hide a loss.**"
        if hidden
        else "**No loss was found under a score that stood still.**"
    )
    said += (
        " Of the ways whose score cannot be told from dense, the right answers became measurably less likely in "
        f"{w.listing(parts)}."
    )
    return said + (" Such a way is not recommended as one without a measurable loss." if hidden else "")
