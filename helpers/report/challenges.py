"""What makes language models hard to compress, as the rows show it: a sentence vanishes or turns round with its rows.

Each function takes all rows and gives one sentence, or none where the rows do not bear on it.
"""

import json
from collections import Counter
from statistics import mean

from helpers.figures import distillation as students
from helpers.figures import moefication as experts
from helpers.figures import quantization
from helpers.report import distillation, low_rank, unseen, zeros
from helpers.report import wording as w
from lmcompress.results.labels import SHAPE_NAMES, look_of
from lmcompress.results.rows import is_plain, is_recovered, model_task_of, model_tasks
from lmcompress.results.store import notebooks_apart
from lmcompress.results.verdicts import adjusted, comparisons, less_likely, loss_of, without_loss
from lmcompress.study.decision import comparable_rows, verdicts_of

ZEROING = ("random", "magnitude-layer", "magnitude-global", "wanda", "sparsegpt")
HALF = 0.5


def sentences(rows: list[dict]) -> list[str]:
    """The challenges of which the rows say something."""
    asked = (_zeros, _kinds, _start, _teacher, _bits, _work, _sharing, _blocks, _training, unseen.noise,
             unseen.likelihood)  # fmt: skip
    return [sentence for one in asked if (sentence := one(rows))]


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
        smaller = sum(one["csr_int32"] < one["dense"] for one in formats)
        if formats:
            files.append(f"with {w.percent(sparsity)} zeros{note}, in {smaller} of {len(formats)}")
    models = len({row["model"] for row in timed if not row["latency"].get("measured_on")})
    return (
        f"**{lead}.** Pruned weight by weight and run as before, {w.plural(models, 'model')} {'was' if models == 1 else 'were'} "
        f"faster in {faster} of {w.plural(len(words), 'shape')} timed."
        + (f" The CSR file was smaller than the dense one {'; '.join(files)}." if files else "")
    )


def _kinds(rows: list[dict]) -> str:
    """Whether the same pruning goes unnoticed on one model and not on another."""
    verdicts, lost = verdicts_of(rows), less_likely(comparable_rows(rows))
    own = [
        r
        for r in comparable_rows(rows)
        if r["technique"] in ZEROING[1:] and r["settings"].get("sparsity") == HALF
    ]
    own = [row for row in own if is_plain(row) and not is_recovered(row) and row["key"] in verdicts]
    worse = {
        pair: [
            verdicts[r["key"]] != "no measurable change" or r["key"] in lost
            for r in own
            if model_task_of(r) == pair
        ]
        for pair in model_tasks(own)
    }
    if len(worse) < 2:
        return ""
    told = "; ".join(
        f"{sum(found)} of {w.plural(len(found), 'rule')} on {model} ({task})"
        for (model, task), found in worse.items()
    )
    uneven = len({mean(found) for found in worse.values()}) > 1
    if uneven:
        lead = "What goes unnoticed on one model is noticed on another"
    else:
        lead = (
            "No rule was noticed on any model"
            if not any(map(any, worse.values()))
            else "Noticed on all alike"
        )
    return (
        f"**{lead}.** Half of the weights zero, one shot, by rules that look at them, changed the score measurably, or "
        f"how likely the right answers are, with {told}. What a rule cost elsewhere has to be measured again; how small a "
        "change the examples can show "
        "differs, too."
    )


def _start(rows: list[dict]) -> str:
    """Students that start from random weights against students of the same teacher that start from its blocks."""
    parts, dead = [], {}
    taught = {
        pair: {
            kind: own for (kind, how), own in students.groups(rows, pair).items() if how == "taught" and own
        }
        for pair in model_tasks(rows)
    }
    both = [kinds for kinds in taught.values() if "copied" in kinds and len(kinds) > 1]
    for kind in ("copied", "random", "narrow"):
        if own := [row for kinds in both for row in kinds.get(kind, [])]:
            count = sum(bool(row["quality"]["collapsed"]) for row in own)
            dead[kind] = count / len(own)
            parts.append(f"{students.KINDS[kind][0].lower()} {_share(count, len(own))}")
    if len(dead) < 2:
        return ""
    random = mean(value for kind, value in dead.items() if kind != "copied")
    lead = (
        "A student did better from its teacher's weights"
        if random > dead["copied"]
        else "A student can start from nothing"
    )
    models = w.listing([pair[0] for pair, kinds in taught.items() if kinds in both])
    return f"**{lead}**, at this budget of training. Students taught by {models} that collapsed: {'; '.join(parts)}."


def _teacher(rows: list[dict]) -> str:
    """What a teacher gave over the labels alone, tested."""
    words: dict[str, Counter] = {}
    rows = [
        row for row in rows if row["notebook"] == distillation.SECTION.notebook
    ]  # corrected over, as there
    for pair in model_tasks(rows):
        tests = {tuple(one["keys"].values()): word for one, _, word in comparisons(rows, pair) if one["keys"]}
        found = students.groups(rows, pair)
        for kind in students.KINDS:
            both = zip(found.get((kind, "taught"), []), found.get((kind, "hard"), []), strict=False)
            said = [tests[keys] for a, b in both if (keys := (a["key"], b["key"])) in tests]
            if said:
                words.setdefault(pair[0], Counter()).update(said)
    if not words:
        return ""
    whole = sum(words.values(), Counter())
    if {"better", "worse"} <= {max(counts, key=counts.get) for counts in words.values()}:
        lead = "Whether a teacher beats the labels depends on the model"
    elif whole["better"] <= whole.total() / 2:
        lead = "A teacher rarely beats the labels"
    else:
        lead = "A teacher beats the labels"
    told = "; ".join(f"{w.tally(list(counts.elements()))} with {model}" for model, counts in words.items())
    return (
        f"**{lead}**, in runs this short. The same student, taught against trained on hard labels, "
        f"{w.plural(whole.total(), 'test')}: {told}."
    )


def _bits(rows: list[dict]) -> str:
    """Which quantized models are smaller and slower."""
    slow: dict[str, list[str]] = {}
    total, ways, models = 0, Counter(), set()
    for row in quantization.timed_rows([r for r in rows if r["notebook"].startswith("05")]):
        shapes, words = quantization.ratios(row), row["verdict"]["latency"]
        total += len(shapes)
        models.add(row["model"])
        ways[look_of(row["technique"], row["settings"]).title] += len(shapes)
        told = [
            f"{part['ratio']:.2f} ({SHAPE_NAMES.get(s, s)})"
            for s, part in shapes.items()
            if words[s] == "slower"
        ]
        backend = row["achieved"].get("backend")
        name = f"{w.label_of(row)} ({row['model']}{f', {backend}' if backend else ''})"
        slow |= {name: told} if told else {}
    if not total:
        return ""
    lead = "Fewer bytes are not always fewer milliseconds" if slow else "Fewer bytes were fewer milliseconds"
    told = "; ".join(f"{name} took {', '.join(found)} of the dense time" for name, found in slow.items())
    count = sum(map(len, slow.values()))
    return (
        f"**{lead}.** Of {w.plural(total, 'time')} measured in other number formats and backends ({'; '.join(ways)}), on "
        f"{w.plural(len(models), 'model')}, {count} "
        f"{'was' if count == 1 else 'were'} slower than dense{f': {told}' if told else ''}."
    )


def _work(rows: list[dict]) -> str:
    """Work left out against time saved by experts."""
    parts = [
        (row, shape, part["ratio"], row["verdict"]["latency"][shape])
        for row in experts.timed_rows(rows) for shape, part in row["latency"]["shapes"].items()
    ]  # fmt: skip
    if not parts:
        return ""
    least, worst = (pick(parts, key=lambda one: one[2]) for pick in (min, max))
    slower = sum(one[3] == "slower" for one in parts)
    lead = "Work left out is not time saved" if slower else "Work left out was time saved, in part"
    told = ", ".join(
        f"{name} {ratio:.2f} ({row['model']}, {SHAPE_NAMES.get(shape, shape)}, "
        f"{w.percent(round(experts.ffn_share(row), 3))} of the "
        "feed-forward FLOPs)"
        for name, (row, shape, ratio, _) in (("best", least), ("worst", worst))
    )
    return (
        f"**{lead}.** Computing only some experts was slower than dense in {slower} of "
        f"{w.plural(len(parts), 'time')}: {told}."
    )


def _sharing(rows: list[dict]) -> str:
    """Whether layers repeat each other."""
    own = [row for row in rows if row["notebook"] == low_rank.SECTION.notebook]
    return next(iter(low_rank.summary(own)), "") if own else ""


def _blocks(rows: list[dict]) -> str:
    """Whether whole blocks are to spare."""
    verdicts = verdicts_of(rows)
    own = [
        row for row in comparable_rows(rows) if row["technique"] == "drop-blocks" and row["key"] in verdicts
    ]
    if not own:
        return ""
    quiet = {row["key"] for row in without_loss(own, {key: (1, word) for key, word in verdicts.items()})}
    parts, spared = [], 0
    for lead, recovered in (("one shot", False), ("after recovery", True)):
        if part := [row for row in own if is_recovered(row) == recovered]:
            still = sum(row["key"] in quiet for row in part)
            parts.append(f"{lead} in {still} of {w.plural(len(part), 'case')}")
            spared += still
    lead = (
        "Small models have no block to spare" if spared <= len(own) / 2 else "Dropped blocks went unnoticed"
    )
    return f"**{lead}.** Blocks dropped by influence, without a measurable loss: {', '.join(parts)}."


def _training(rows: list[dict]) -> str:
    """Ways that collapsed although they were trained, and training that did harm."""
    dead = [row for row in comparable_rows(rows) if row["quality"]["collapsed"] and is_recovered(row)]
    worse, controls = _controls(rows)
    below, both = _below_one_shot(rows)
    parts = []
    if dead:
        names = Counter(look_of(row["technique"], row["settings"]).title for row in dead)
        told = w.listing([f"{name} ({count})" for name, count in names.items()])
        parts.append(f"Collapsed although trained while or after compressing: {told}.")
    if below:
        parts.append(
            f"After recovery the value was worse than in one shot in {_share(below, both)} (counted, not tested)."
        )
    if worse:
        parts.append(
            f"The dense models themselves, trained on as controls, became measurably worse in {_share(worse, controls)}."
        )
    return f"**Training does not mend everything.** {' '.join(parts)}" if parts else ""


def _controls(rows: list[dict]) -> tuple[int, int]:
    """In how many of the dense models' further trainings they became measurably worse, each counted once."""
    own = {
        json.dumps([model_task_of(row), row["settings"], row["seed"]], sort_keys=True): row
        for row in rows
        if row["technique"] == "dense"
        and is_recovered(row)
        and row["quality"]
        and row["notebook"] not in notebooks_apart()
    }
    words = [word for pair in model_tasks(rows) for _, word in
             adjusted([row for row in own.values() if model_task_of(row) == pair]).values()]  # fmt: skip
    return sum(word in ("worse", "collapsed") for word in words), len(words)


def _below_one_shot(rows: list[dict]) -> tuple[int, int]:
    """Of the ways measured both in one shot and after recovery, in how many the recovered value is the worse one."""
    before: dict[str, float] = {}
    after: list[tuple[str, float]] = []
    for row in (one for one in comparable_rows(rows) if one["quality"]["difference"]):
        plain = {name: value for name, value in row["settings"].items() if name != "recovery"}
        place = json.dumps([model_task_of(row), row["technique"], plain], sort_keys=True)
        if row["settings"].get("recovery"):
            after.append((place, loss_of(row)[0]))
        else:
            before[place] = loss_of(row)[0]
    pairs = [(loss, before[place]) for place, loss in after if place in before]
    return sum(loss > plain for loss, plain in pairs), len(pairs)
