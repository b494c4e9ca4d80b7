"""The comparison section: all techniques, what to use at which budget, the verdicts counted."""

from collections import Counter

from helpers.report import wording as w
from helpers.report.section import Section, drawings
from lmcompress.results.labels import SHAPE_NAMES, look_of
from lmcompress.results.rows import dense_of, model_task_of, model_tasks
from lmcompress.results.verdicts import BETTER, COLLAPSED, NO_CHANGE, WORSE, adjusted, less_likely
from lmcompress.study import decision, explain
from lmcompress.study.decision import Budget, Option, comparable_rows

SHARES = (0.5, 0.25, 0.15)  # of the dense bytes
FASTER = 0.6  # of the dense time
LESS_LIKELY = "of these, less likely right"
VERDICTS = (BETTER, NO_CHANGE, LESS_LIKELY, WORSE, COLLAPSED)


def findings(rows: list[dict]) -> list[str]:
    """Per model and task: what to use at each budget; then the verdicts of each technique, counted."""
    text, rows = [], comparable_rows(rows)
    if not rows:
        return text
    text.append(
        "**What to use.** The loss allowed is none that can be measured, in the score or in how likely the "
        f"right answers are, and at worst {w.percent(decision.TOLERATED)} of the dense model's quality; "
        "where nothing qualifies, ways with a measurable loss in either are named whose score's ends within "
        "as much. At worst means at the unfavourable end of the interval. Where nothing fits at all, what "
        "comes nearest from either side is named: it is no recommendation. Of the ways that fit, those whose "
        "interval overlaps the best one's are equals, and the smallest of them is named (the fastest, where "
        "only time is asked about). A time is the slower end of the ratio to the dense model timed beside "
        "it, times the dense model's median over all runs: where a model was timed on several machines (see "
        "the conditions), ratios of different machines stand beside each other, and what computes in bf16 is "
        "fast only where the processor does. For another budget: `python -m lmcompress.study.decision "
        "--model gpt2 --max-mb 5 --max-loss 1`, or the [page](report.html)."
    )
    for model_task in model_tasks(rows):
        scored = [row for row in rows if model_task_of(row) == model_task]
        text.append(f"### {model_task[0]} on {model_task[1]}")
        text.append(decision_table(scored))
    text.append("### Verdicts, counted")
    text.append(
        "How often each technique's score went unnoticed, and in how many of these cases the right answers "
        "became measurably less likely all the same. The counts say as much of the settings tried as of the "
        "technique: one that was tried at gentle settings only looks better here than it is."
    )
    text.append(w.folded("Verdicts by technique", verdict_table(rows)))
    return text


def budgets(choices: list[Option], allowed: float) -> list[tuple[str, list[Budget]]]:
    """The costs of the table in words, each without a measurable loss and then with the loss `allowed`.

    Args:
        choices: the dense model first, as `decision.options` gives them.
        allowed: `decision.allowance` of the dense model.
    """
    dense = choices[0]
    costs = [(w.percent(s) + f" of the bytes ({w.bytes_text(s * dense.bytes)})", s, None) for s in SHARES]
    faster = [s for s, ms in dense.ms.items() if any(choice.ms.get(s, ms) < ms for choice in choices)]
    costs += [(f"{w.percent(FASTER)} of the time at {SHAPE_NAMES.get(s, s)}", None, s) for s in faster]
    combined = f"{w.percent(SHARES[0])} of the bytes, {w.percent(FASTER)} of the time at "
    costs += [(combined + SHAPE_NAMES.get(s, s), SHARES[0], s) for s in faster[:1]]
    return [
        (
            label,
            [
                Budget(share and share * dense.bytes, shape and FASTER * dense.ms[shape], shape, loss)
                for loss in (None, allowed)
            ],
        )
        for label, share, shape in costs
    ]


def answers(rows: list[dict]) -> list[tuple[str, decision.Decision, Budget]]:
    """Per cost of the table the decision: without a measurable loss if there is one, else with the loss
    tolerated.

    Where nothing fits, what came nearest is of the loss tolerated, too.
    """
    choices, best_answers = decision.options(rows), []
    for label, budgets_asked in budgets(choices, decision.allowance(dense_of(rows))):
        decided = [(label, decision.decide(choices, budget), budget) for budget in budgets_asked]
        best_answers.append(
            next((decided_one for decided_one in decided if decided_one[1].chosen), decided[-1])
        )
    return best_answers


def decision_table(scored: list[dict]) -> str:
    """For each cost what to use, its bytes, time, quality and verdict; or that nothing fits, and what came
    nearest.

    Costs that follow each other and have the same answer share a line.
    """
    rows, metric = {row["key"]: row for row in scored}, scored[0]["quality"]["metric"]
    dense = decision.options(scored)[0]
    answered = [(label, _lines(answer, budget, rows, dense)) for label, answer, budget in answers(scored)]
    lines = [
        [label if first else "″", *cells]
        for label, several in _merged(answered)
        for first, cells in zip([True, False], several, strict=False)
    ]
    header = ["At most", "Use this", "Bytes", "ms", w.metric_name(metric), "Against dense"]
    return w.table(header, lines)


def _lines(
    answer: decision.Decision, budget: Budget, rows: dict[str, dict], dense: Option
) -> list[list[str]]:
    """Return the cells after the cost: the choice, or the nearest from either side, if cheaper than dense."""
    if answer.chosen:
        return [_cells("", answer.chosen, budget, rows)]
    nearest = [
        (f"the least loss at this cost{', of those timed' if budget.max_ms else ''}: ", answer.least_loss),
        ("the lowest cost at the loss allowed: ", answer.least_cost),
    ]
    lines = [
        _cells(lead, option, budget, rows)
        for lead, option in nearest
        if option is not None
        and decision.excess(option, budget) < decision.excess(dense, budget)
        and _faster(option, dense, budget)
    ]
    if not lines:
        return [["nothing measured fits, and nothing comes near", "", "", "", ""]]
    lines[0][0] = f"nothing measured fits; {lines[0][0]}"
    return lines


def _faster(option: Option, dense: Option, budget: Budget) -> bool:
    """Whether a way is nearer than dense to the time that is asked for, if one is."""
    return budget.max_ms is None or option.ms.get(budget.shape, decision.NOTHING) < dense.ms[budget.shape]


def _cells(lead: str, option: Option, budget: Budget, rows: dict[str, dict]) -> list[str]:
    row, shape = rows[option.key], budget.shape or next(iter(option.ms), None)
    lent = ", of its shape" if option.ms and row["latency"].get("measured_on") else ""
    time = (
        f"{option.ms[shape]:.1f} ({SHAPE_NAMES.get(shape, shape)}{lent})"
        if shape in option.ms
        else "not timed"
    )
    value = w.with_interval(row["quality"], row["quality"]["metric"])
    lost = f"; {option.less_likely}" if option.less_likely else ""
    change = option.verdict if option.baseline else f"{option.verdict} ({w.difference(row)}){lost}"
    return [lead + option.name, explain.size_text(option), time, value, change]


def _merged(answered: list[tuple[str, list]]) -> list[tuple[str, list]]:
    """Costs that follow each other and have the same answer, as one."""
    merged: list[tuple[str, list]] = []
    for label, answer in answered:
        if merged and merged[-1][1] == answer:
            merged[-1] = (f"{merged[-1][0]}<br>{label}", answer)
        else:
            merged.append((label, answer))
    return merged


def verdict_table(rows: list[dict]) -> str:
    """Count how often each technique was better, not different (less likely right), worse, collapsed."""
    counts: dict[str, Counter] = {}
    lost = less_likely(rows)
    for model_task in model_tasks(rows):
        scored = [row for row in rows if model_task_of(row) == model_task]
        verdicts = adjusted(scored)
        for row in scored:
            if row["key"] in verdicts:
                name = look_of(row["technique"], row["settings"]).title + (
                    " + recovery" if row["settings"].get("recovery") else ""
                )
                word = verdicts[row["key"]][1]
                counts.setdefault(name, Counter())[word] += 1
                counts[name][LESS_LIKELY] += word == NO_CHANGE and row["key"] in lost
    lines = [[name, *(str(counter[word]) for word in VERDICTS)] for name, counter in counts.items()]
    return w.table(["Technique", *VERDICTS], lines)


SECTION = Section(
    notebook="11_comparison",
    findings=findings,
    drawings=drawings("comparison-overview", opening=True),
    reads=("*",),
)
