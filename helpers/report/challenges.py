"""What makes language models hard to compress, as the rows show it: a sentence vanishes or turns round with
its rows.

Each function takes all rows and gives one sentence, or none where the rows do not bear on it.
"""

import json
from collections import Counter
from statistics import mean

from helpers.report import distillation, low_rank, unseen, zeros
from helpers.report import rows_distillation as students
from helpers.report import rows_moefication as experts
from helpers.report import rows_quantization as quantization
from helpers.report import wording as w
from lmcompress.results.labels import SHAPE_NAMES, look_of
from lmcompress.results.rows import is_plain, is_recovered, model_task_of, model_tasks
from lmcompress.results.store import notebooks_apart
from lmcompress.results.verdicts import (
    COLLAPSED,
    NO_CHANGE,
    WORSE,
    adjusted,
    comparisons,
    less_likely,
    loss_of,
    without_loss,
)
from lmcompress.study.decision import comparable_rows, verdicts_of

ZEROING = ("random", "magnitude-layer", "magnitude-global", "wanda", "sparsegpt")
HALF = 0.5


def sentences(rows: list[dict]) -> list[str]:
    """The challenges of which the rows say something."""
    questions = (
        _zeros,
        _kinds,
        _start,
        _teacher,
        _bits,
        _work,
        _sharing,
        _blocks,
        _training,
        unseen.noise,
        unseen.likelihood,
    )
    return [sentence for question in questions if (sentence := question(rows))]


def _share(count: int, total: int) -> str:
    return f"{count} of {total}"


def _zeros(rows: list[dict]) -> str:
    """Whether zeros make dense kernels faster, and whether half of them make a file smaller."""
    timed = [row for row in comparable_rows(rows) if row["technique"] in ZEROING and row["latency"]]
    words = zeros.latency_verdicts(timed)
    if not words:
        return ""
    faster = words.count("faster")
    lead = "A zero is not skipped" if faster <= len(words) / 2 else "Zeros were skipped"
    pruned = [r for r in comparable_rows(rows) if r["technique"] in ZEROING and r["memory"] and is_plain(r)]
    files = []
    for sparsity, note in ((HALF, ", where CSR breaks even by arithmetic"), (0.9, "")):
        formats = [r["memory"]["formats"] for r in pruned if r["settings"].get("sparsity") == sparsity]
        smaller = sum(format["csr_int32"] < format["dense"] for format in formats)
        if formats:
            files.append(f"with {w.percent(sparsity)} zeros{note}, in {smaller} of {len(formats)}")
    models = len({row["model"] for row in timed if not row["latency"].get("measured_on")})
    return (
        f"**{lead}.** Pruned weight by weight and run as before, {w.plural(models, 'model')} "
        f"{'was' if models == 1 else 'were'} faster in {faster} of {w.plural(len(words), 'shape')} timed."
        + (f" The CSR file was smaller than the dense one {'; '.join(files)}." if files else "")
    )


def _kinds(rows: list[dict]) -> str:
    """Whether the same pruning goes unnoticed on one model and not on another."""
    verdicts, lost = verdicts_of(rows), less_likely(comparable_rows(rows))
    halved = [
        r
        for r in comparable_rows(rows)
        if r["technique"] in ZEROING[1:] and r["settings"].get("sparsity") == HALF
    ]
    halved = [row for row in halved if is_plain(row) and not is_recovered(row) and row["key"] in verdicts]
    worse = {
        model_task: [
            verdicts[r["key"]] != NO_CHANGE or r["key"] in lost
            for r in halved
            if model_task_of(r) == model_task
        ]
        for model_task in model_tasks(halved)
    }
    if len(worse) < 2:
        return ""
    counts = "; ".join(
        f"{sum(changed)} of {w.plural(len(changed), 'rule')} on {model} ({task})"
        for (model, task), changed in worse.items()
    )
    uneven = len({mean(changed) for changed in worse.values()}) > 1
    if uneven:
        lead = "What goes unnoticed on one model is noticed on another"
    else:
        lead = (
            "No rule was noticed on any model"
            if not any(map(any, worse.values()))
            else "Noticed on all alike"
        )
    return (
        f"**{lead}.** Half of the weights zero, one shot, by rules that look at them, changed the score "
        f"measurably, or how likely the right answers are, with {counts}. What a rule cost elsewhere has to "
        "be measured again; how small a change the examples can show differs, too."
    )


def _start(rows: list[dict]) -> str:
    """Compare students from random weights with students that start from blocks of the same teacher."""
    phrases, dead = [], {}
    taught = {
        model_task: {
            kind: students_of_kind
            for (kind, training), students_of_kind in students.groups(rows, model_task).items()
            if training == "taught" and students_of_kind
        }
        for model_task in model_tasks(rows)
    }
    comparable_kinds = [kinds for kinds in taught.values() if "copied" in kinds and len(kinds) > 1]
    for kind in ("copied", "random", "narrow"):
        if students_of_kind := [row for kinds in comparable_kinds for row in kinds.get(kind, [])]:
            count = sum(bool(row["quality"]["collapsed"]) for row in students_of_kind)
            dead[kind] = count / len(students_of_kind)
            phrases.append(f"{students.KINDS[kind][0].lower()} {_share(count, len(students_of_kind))}")
    if len(dead) < 2:
        return ""
    random = mean(value for kind, value in dead.items() if kind != "copied")
    lead = (
        "A student did better from its teacher's weights"
        if random > dead["copied"]
        else "A student can start from nothing"
    )
    models = w.listing([model_task[0] for model_task, kinds in taught.items() if kinds in comparable_kinds])
    return (
        f"**{lead}**, at this budget of training. Students taught by {models} that collapsed: "
        f"{'; '.join(phrases)}."
    )


def _teacher(rows: list[dict]) -> str:
    """What a teacher gave over the labels alone, tested."""
    words: dict[str, Counter] = {}
    rows = [
        row for row in rows if row["notebook"] == distillation.SECTION.notebook
    ]  # corrected over, as there
    for model_task in model_tasks(rows):
        tests = {
            tuple(comparison["keys"].values()): word
            for comparison, _, word in comparisons(rows, model_task)
            if comparison["keys"]
        }
        groups = students.groups(rows, model_task)
        for kind in students.KINDS:
            seed_pairs = zip(groups.get((kind, "taught"), []), groups.get((kind, "hard"), []), strict=False)
            verdicts = [tests[keys] for a, b in seed_pairs if (keys := (a["key"], b["key"])) in tests]
            if verdicts:
                words.setdefault(model_task[0], Counter()).update(verdicts)
    if not words:
        return ""
    whole = sum(words.values(), Counter())
    if {"better", "worse"} <= {max(counts, key=counts.get) for counts in words.values()}:
        lead = "Whether a teacher beats the labels depends on the model"
    elif whole["better"] <= whole.total() / 2:
        lead = "A teacher rarely beats the labels"
    else:
        lead = "A teacher beats the labels"
    counted = "; ".join(f"{w.tally(list(counts.elements()))} with {model}" for model, counts in words.items())
    return (
        f"**{lead}**, in runs this short. The same student, taught against trained on hard labels, "
        f"{w.plural(whole.total(), 'test')}: {counted}."
    )


def _bits(rows: list[dict]) -> str:
    """Which quantized models are smaller and slower."""
    slow: dict[str, list[str]] = {}
    total, by_title, models = 0, Counter(), set()
    for row in quantization.timed_rows([r for r in rows if r["notebook"].startswith("05")]):
        shapes, words = quantization.ratios(row), row["verdict"]["latency"]
        total += len(shapes)
        models.add(row["model"])
        by_title[look_of(row["technique"], row["settings"]).title] += len(shapes)
        slower = [
            f"{timing['ratio']:.2f} ({SHAPE_NAMES.get(s, s)})"
            for s, timing in shapes.items()
            if words[s] == "slower"
        ]
        backend = row["achieved"].get("backend")
        name = f"{w.label_of(row)} ({row['model']}{f', {backend}' if backend else ''})"
        slow |= {name: slower} if slower else {}
    if not total:
        return ""
    lead = "Fewer bytes are not always fewer milliseconds" if slow else "Fewer bytes were fewer milliseconds"
    slower = "; ".join(f"{name} took {', '.join(ratios)} of the dense time" for name, ratios in slow.items())
    count = sum(map(len, slow.values()))
    return (
        f"**{lead}.** Of {w.plural(total, 'time')} measured in other number formats and backends "
        f"({'; '.join(by_title)}), on {w.plural(len(models), 'model')}, {count} "
        f"{'was' if count == 1 else 'were'} slower than dense{f': {slower}' if slower else ''}."
    )


def _work(rows: list[dict]) -> str:
    """Work left out against time saved by experts."""
    timings = [
        (row, shape, timing["ratio"], row["verdict"]["latency"][shape])
        for row in experts.timed_rows(rows)
        for shape, timing in row["latency"]["shapes"].items()
    ]
    if not timings:
        return ""
    best, worst = (pick(timings, key=lambda entry: entry[2]) for pick in (min, max))
    slower = sum(entry[3] == "slower" for entry in timings)
    lead = "Work left out is not time saved" if slower else "Work left out was time saved, in part"
    ends = ", ".join(
        f"{name} {ratio:.2f} ({row['model']}, {SHAPE_NAMES.get(shape, shape)}, "
        f"{w.percent(round(experts.ffn_share(row), 3))} of the feed-forward FLOPs)"
        for name, (row, shape, ratio, _) in (("best", best), ("worst", worst))
    )
    return (
        f"**{lead}.** Computing only some experts was slower than dense in {slower} of "
        f"{w.plural(len(timings), 'time')}: {ends}."
    )


def _sharing(rows: list[dict]) -> str:
    """Whether layers repeat each other."""
    section_rows = [row for row in rows if row["notebook"] == low_rank.SECTION.notebook]
    return next(iter(low_rank.summary(section_rows)), "") if section_rows else ""


def _blocks(rows: list[dict]) -> str:
    """Whether whole blocks are to spare."""
    verdicts = verdicts_of(rows)
    dropped = [
        row for row in comparable_rows(rows) if row["technique"] == "drop-blocks" and row["key"] in verdicts
    ]
    if not dropped:
        return ""
    quiet = {row["key"] for row in without_loss(dropped, {key: (1, word) for key, word in verdicts.items()})}
    phrases, spared = [], 0
    for lead, recovered in (("one shot", False), ("after recovery", True)):
        if subset := [row for row in dropped if is_recovered(row) == recovered]:
            spared_count = sum(row["key"] in quiet for row in subset)
            phrases.append(f"{lead} in {spared_count} of {w.plural(len(subset), 'case')}")
            spared += spared_count
    lead = (
        "Small models have no block to spare"
        if spared <= len(dropped) / 2
        else "Dropped blocks went unnoticed"
    )
    return f"**{lead}.** Blocks dropped by influence, without a measurable loss: {', '.join(phrases)}."


def _training(rows: list[dict]) -> str:
    """Ways that collapsed although they were trained, and training that did harm."""
    dead = [row for row in comparable_rows(rows) if row["quality"]["collapsed"] and is_recovered(row)]
    worse, controls = _controls(rows)
    below, tried = _below_one_shot(rows)
    sentences = []
    if dead:
        names = Counter(look_of(row["technique"], row["settings"]).title for row in dead)
        collapsed = w.listing([f"{name} ({count})" for name, count in names.items()])
        sentences.append(f"Collapsed although trained while or after compressing: {collapsed}.")
    if below:
        sentences.append(
            f"After recovery the value was worse than in one shot in {_share(below, tried)} (counted, not "
            f"tested)."
        )
    if worse:
        sentences.append(
            f"The dense models themselves, trained on as controls, became measurably worse in "
            f"{_share(worse, controls)}."
        )
    return f"**Training does not mend everything.** {' '.join(sentences)}" if sentences else ""


def _controls(rows: list[dict]) -> tuple[int, int]:
    """In how many of the dense models' further trainings they became measurably worse, each counted once."""
    controls = {
        json.dumps([model_task_of(row), row["settings"], row["seed"]], sort_keys=True): row
        for row in rows
        if row["technique"] == "dense"
        and is_recovered(row)
        and row["quality"]
        and row["notebook"] not in notebooks_apart()
    }
    words = [
        word
        for model_task in model_tasks(rows)
        for _, word in adjusted(
            [row for row in controls.values() if model_task_of(row) == model_task]
        ).values()
    ]
    return sum(word in (WORSE, COLLAPSED) for word in words), len(words)


def _below_one_shot(rows: list[dict]) -> tuple[int, int]:
    """Count the techniques whose value after recovery is worse than in one shot."""
    before: dict[str, float] = {}
    after: list[tuple[str, float]] = []
    for row in (candidate for candidate in comparable_rows(rows) if candidate["quality"]["difference"]):
        plain = {name: value for name, value in row["settings"].items() if name != "recovery"}
        identity = json.dumps([model_task_of(row), row["technique"], plain], sort_keys=True)
        if row["settings"].get("recovery"):
            after.append((identity, loss_of(row)[0]))
        else:
            before[identity] = loss_of(row)[0]
    pairs = [(loss, before[identity]) for identity, loss in after if identity in before]
    return sum(loss > plain for loss, plain in pairs), len(pairs)
