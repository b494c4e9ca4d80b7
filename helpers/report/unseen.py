"""What scores of few examples cannot show: how large a loss may hide; where likelihood shows one."""

from helpers.report import wording as w
from lmcompress.results.rows import model_task_of, model_tasks
from lmcompress.results.verdicts import NO_CHANGE, less_likely, likelihood_of, loss_of, loss_scale
from lmcompress.study.decision import comparable_rows, verdicts_of


def noise(rows: list[dict]) -> str:
    """How large a loss the examples cannot show."""
    comparable, phrases, verdicts = comparable_rows(rows), [], verdicts_of(rows)
    for model, task in model_tasks(comparable):
        scored = [row for row in comparable if model_task_of(row) == (model, task)]
        if unchanged := [row for row in scored if verdicts.get(row["key"]) == NO_CHANGE]:
            unit, n = loss_scale(unchanged[0]["quality"]["metric"])[1], unchanged[0]["quality"]["n"]
            halves = sorted((high - low) / 2 for _, low, high in map(loss_of, unchanged))
            ends = dict.fromkeys(f"{half:.2g}" for half in (halves[0], halves[-1]))
            sample = f"{model}, {w.plural(n, 'example')}, {w.plural(len(unchanged), 'way')}"
            phrases.append(f"{' to '.join(ends)} {unit} on {task} ({sample})")
    if not phrases:
        return ""
    return (
        "**Small losses hide in few examples.** The paired interval of a way that cannot be told from dense "
        f"reaches this far to either side: {w.listing(phrases)}. It is narrow where a model hardly differs "
        "from dense, and wide where it does: a loss smaller than that can well have gone unseen."
    )


def likelihood(rows: list[dict]) -> str:
    """How often the right answers became less likely under a score that cannot be told from dense."""
    comparable, phrases, verdicts, hidden = comparable_rows(rows), [], verdicts_of(rows), 0
    lost = less_likely(comparable)
    for model, task in model_tasks(comparable):
        scored = [row for row in comparable if model_task_of(row) == (model, task) and likelihood_of(row)]
        if unchanged := [row for row in scored if verdicts.get(row["key"]) == NO_CHANGE]:
            count = sum(row["key"] in lost for row in unchanged)
            names = [
                w.metric_name(name)
                for name in (unchanged[0]["quality"]["metric"], likelihood_of(unchanged[0])[0])
            ]
            phrases.append(f"{count} of {len(unchanged)} on {task} ({model}, {names[1]} beside {names[0]})")
            hidden += count
    if not phrases:
        return ""
    text = (
        "**A score that stands still can hide a loss.**"
        if hidden
        else "**No loss was found under a score that stood still.**"
    )
    text += (
        " Of the ways whose score cannot be told from dense, the right answers became measurably less likely "
        f"in {w.listing(phrases)}."
    )
    return text + (" Such a way is not recommended as one without a measurable loss." if hidden else "")
