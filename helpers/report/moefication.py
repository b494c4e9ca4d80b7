"""The MoEfication section: sparse activations, what experts and routers keep, what time they save."""

from helpers.report import rows_moefication as p
from helpers.report import wording as w
from helpers.report.section import Section, drawings
from lmcompress.results.labels import SHAPE_NAMES
from lmcompress.results.verdicts import comparisons, families, without_loss


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for model_task, dense, compressed, verdicts in families(rows):
        paragraphs = [
            _sparsity_sentence(rows, model_task),
            _relu_sentence(compressed, verdicts),
            _table(dense, compressed, verdicts),
            _comparison_sentence(comparisons(rows, model_task)),
        ]
        text += [f"### {model_task[0]} on {model_task[1]}", *paragraphs] if any(paragraphs) else []
    return [paragraph for paragraph in [*text, _time_sentence(rows)] if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Name per model and task the least unnoticed FFN work of a usable router; then the times."""
    sentences = []
    for model_task, _, compressed, verdicts in families(rows):
        usable = [row for row in p.expert_rows(compressed) if row["settings"]["router"] != "oracle"]
        if not usable:
            continue
        safe = without_loss(usable, verdicts)
        best = min(safe, key=p.ffn_share) if safe else max(usable, key=p.ffn_share)
        lost = w.likelihood_loss(best)
        reach = w.if_only(usable, verdicts)
        lead = f"Every share of feed-forward work tried shows a loss, {reach}, even the largest"
        lead = "The least feed-forward work without a measurable loss" if safe else lead
        sentences.append(
            f"**{model_task[0]} on {model_task[1]}, experts.** {lead}: {_share(best)} of the dense FLOPs "
            f"({w.label_of(best)}; {w.difference(best)}{lost and f'; {lost}'})."
        )
    if shapes := _shapes(rows):
        faster = sum(word == "faster" for *_, word in shapes)
        sentences.append(
            f"**Experts and time.** Of {w.plural(len(shapes), 'time')} measured, {faster} "
            f"{'was' if faster == 1 else 'were'} faster than dense."
        )
    return sentences


def _share(row: dict) -> str:
    return w.percent(round(p.ffn_share(row), 3))


def _range(values: list[float]) -> str:
    return f"{w.percent(round(min(values), 3))} to {w.percent(round(max(values), 3))}"


def _sparsity_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    shares = [
        r for r in rows if r["technique"] == "activation-sparsity" and (r["model"], r["task"]) == model_task
    ]
    if not shares:
        return ""
    ranges = {
        name: _range([block[name] for block in shares[0]["achieved"]["blocks"]])
        for name in p.MEASURES
        if name != "below"
    }
    return (
        f"**Activations**, over the blocks: {ranges['zero']} are exactly 0; 90 % of a token's energy lies in "
        f"{ranges['neurons_90']} of the neurons; one choice for all tokens would need {ranges['fixed_90']}."
    )


def _relu_sentence(compressed: list[dict], verdicts: dict) -> str:
    """What ReLU and fine-tuning changed, beside the control that was only fine-tuned."""
    row = next((row for row in compressed if row["technique"] == "relufy"), None)
    if not row:
        return ""
    achieved, budget = row["achieved"], row["settings"]["training"]
    shares = [w.percent(round(achieved[f"zero_{when}"], 3)) for when in ("before", "swapped", "after")]
    same = [r for r in compressed if r["technique"] == "dense" and r["settings"].get("recovery") == budget]
    note = "".join(
        f" The control, as many steps with its own activation: {verdicts[control['key']][1]} "
        f"({w.difference(control)})."
        for control in same
    )
    return (
        f"**ReLU** in place of the activation: exact zeros go from {shares[0]} to {shares[1]}, and after "
        f"{budget['steps']} steps of fine-tuning to {shares[2]}. Against dense: {verdicts[row['key']][1]} "
        f"({w.difference(row)}, {w.p_text(verdicts[row['key']][0])}).{note}"
    )


def _table(dense: dict, compressed: list[dict], verdicts: dict) -> str:
    experts, metric = p.expert_rows(compressed), dense["quality"]["metric"]
    lines = [["Dense", "100 %", "", "", w.with_interval(dense["quality"], metric), "", "", "baseline"]]
    shown = [*experts, *p.channel_rows(compressed)]
    for row in shown:
        a, (value, word) = row["achieved"], verdicts[row["key"]]
        masses = (
            [f"{a['mass']:.2f} ({a['mass_oracle']:.2f})", f"{a['recall']:.2f}"] if "mass" in a else ["", ""]
        )
        measured = [w.with_interval(row["quality"], metric), w.difference(row), w.p_text(value), word]
        lines.append([w.label_of(row), _share(row), *masses, *measured])
    header = [
        "Asked",
        "FFN FLOPs / dense",
        "Mass (best)",
        "Recall",
        w.metric_name(metric),
        "Difference to dense",
        "p (Holm)",
    ]
    table = w.with_column(
        [[*header, "Verdict"], *lines], w.likelihood_column(dense, [[row] for row in shown])
    )
    table = table if len(lines) <= w.SHOWN else w.folded(f"All {w.plural(len(lines), 'row')}", table)
    return table if experts else ""


def _comparison_sentence(compared: list[tuple[dict, float, str]]) -> str:
    lines = []
    for test in compared:
        apart = test[0]["first"].get("model") != test[0]["second"].get("model")
        lines.append(
            w.test_line(test, lambda e, apart=apart: w.entrant_label(e) + f" ({e.get('model')})" * apart)
        )
    return w.tested_list("**One way against another**, on the same examples", lines)


def _shapes(rows: list[dict]) -> list[tuple[dict, str, dict, str]]:
    return [
        (row, SHAPE_NAMES.get(name, name), shape, row["verdict"]["latency"][name])
        for row in p.timed_rows(rows)
        for name, shape in row["latency"]["shapes"].items()
    ]


def _time_sentence(rows: list[dict]) -> str:
    """The real times of computing only the chosen experts."""
    lines = [
        [row["model"], w.label_of(row), _share(row), name, w.ratio_text(shape), word]
        for row, name, shape, word in _shapes(rows)
    ]
    header = ["Model", "Asked", "FFN FLOPs / dense", "At", "Time / dense time", "Verdict"]
    return f"### Time\n\n{w.table(header, lines)}" if lines else ""


SECTION = Section(
    notebook="07_moefication",
    findings=findings,
    summary=summary,
    drawings=drawings("moefication-quality"),
)
