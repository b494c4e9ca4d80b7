"""The pruning section: what each rule did to quality, and what the zeros were worth in bytes and time."""

from helpers.report import cards, zeros
from helpers.report import rows_pruning as pruning
from helpers.report import wording as w
from helpers.report.section import Section, drawings
from helpers.report.structured import rows_table
from lmcompress.results.labels import look_of
from lmcompress.results.rows import is_plain, is_recovered, model_task_of, model_tasks
from lmcompress.results.verdicts import (
    BETTER,
    COLLAPSED,
    NO_CHANGE,
    NO_DIFFERENCE,
    comparisons,
    families,
    without_loss,
)

PUBLISHED_ORDERS = {  # (first, second): what was published about them, and the word it predicts for the first
    ("wanda", "magnitude-layer"): ("Wanda 6.42 ahead of magnitude 14.89", "better"),
    ("sparsegpt", "magnitude-layer"): ("SparseGPT 6.51 ahead of magnitude 14.89", "better"),
    ("wanda", "sparsegpt"): ("Wanda 6.42, SparseGPT 6.51: about equal", NO_DIFFERENCE),
    ("2:4", "4:8"): ("2:4 worse than 4:8 (Wanda: 11.02, 7.97)", "worse"),
    ("2:4", "unstructured"): ("2:4 worse than unstructured (Wanda: 11.02, 6.42)", "worse"),
    ("4:8", "unstructured"): ("4:8 worse than unstructured (Wanda: 7.97, 6.42)", "worse"),
}


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for model_task, dense, compressed, verdicts in families(rows):
        text.append(f"### {model_task[0]} on {model_task[1]}")
        text.append(_dense_sentence(dense))
        text.extend(_rule_sentences(compressed, verdicts))
        text.append(_pattern_sentence(compressed, verdicts))
        text.append(_sensitivity_sentence(rows, model_task))
        text.extend(_recovery_sentences(dense, compressed, verdicts))
        text.append(_comparison_sentence(rows, model_task))
        text.append(zeros.bytes_sentence(dense, compressed))
        text.append(zeros.time_sentence(compressed))
        text.append(rows_table(dense, compressed, verdicts, share=_zeros_of, share_of="Zeros"))
    text.extend(zeros.kernel_sentences(rows))
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Per model and task: how far pruning went unnoticed, one shot and recovered; then bytes and time."""
    sentences = []
    for model_task, _, compressed, verdicts in families(rows):
        phrases = [_furthest(compressed, verdicts, recovered) for recovered in (False, True)]
        sentences.append(
            f"**{model_task[0]} on {model_task[1]}.** " + " ".join(phrase for phrase in phrases if phrase)
        )
    timed = [row for row in rows if row["latency"] and row["technique"] != "dense"]
    if words := zeros.latency_verdicts(timed):
        unchanged, total = words.count(NO_CHANGE), len(words)
        sentences.append(
            "**Zeros and time.** Run as dense models, pruned ones showed no measurable change of time in "
            f"{unchanged} of {w.plural(total, 'shape')} timed; stored as dense, they have as many bytes as "
            "before. A zero must be left out by the format or skipped by the kernel to be worth anything."
        )
    return sentences


def _furthest(compressed: list[dict], verdicts: dict, recovered: bool) -> str:
    pruned = [
        r
        for r in compressed
        if r["settings"].get("sparsity") and is_plain(r) and is_recovered(r) == recovered
    ]
    if not pruned:
        return ""
    stage = "After recovery" if recovered else "One shot"
    unnoticed = without_loss(pruned, verdicts)
    if not unnoticed:
        gentlest = min(pruned, key=lambda row: row["settings"]["sparsity"])
        level = w.percent(gentlest["settings"]["sparsity"])
        return (
            f"{stage}, every rule shows a loss, {w.if_only(pruned, verdicts)}, even at the lowest "
            f"level measured, {level}."
        )
    sign = 1 if unnoticed[0]["quality"]["higher_is_better"] else -1
    best = max(unnoticed, key=lambda row: (row["settings"]["sparsity"], sign * row["quality"]["value"]))
    return (
        f"{stage}, the furthest without a measurable loss was {w.label_of(best).removesuffix(' + recovery')} "
        f"({w.difference(best)})."
    )


def _dense_sentence(dense: dict) -> str:
    quality = dense["quality"]
    floor = ""
    if quality["floor"] is not None:
        unigram = quality["metric"] == "perplexity"
        name = "the unigram model" if unigram else "always answering the commonest class"
        floor = f"; {name} gives {w.number(quality['floor'], quality['metric'])}"
    return (
        f"The dense model ({dense['memory']['parameters']:,} parameters) has "
        f"{w.metric_name(quality['metric'])} {w.with_interval(quality, quality['metric'])} on "
        f"{w.plural(quality['n'], 'example')} of the {dense['provenance']['split']} split{floor}."
    )


def _rule_sentences(compressed: list[dict], verdicts: dict) -> list[str]:
    sentences = []
    one_shot = [
        row
        for row in compressed
        if not is_recovered(row) and row["settings"].get("sparsity") and is_plain(row)
    ]
    for rule in dict.fromkeys(row["technique"] for row in one_shot):
        rule_rows = sorted(
            (r for r in one_shot if r["technique"] == rule), key=lambda r: r["settings"]["sparsity"]
        )
        safe = []
        for row in rule_rows:
            if verdicts[row["key"]][1] not in (NO_CHANGE, BETTER):
                break
            safe.append(row)
        phrases = []
        if safe:
            levels = w.listing([w.percent(row["settings"]["sparsity"]) for row in safe])
            p = verdicts[safe[-1]["key"]][0]
            word = verdicts[safe[-1]["key"]][1]
            last = f"at {w.percent(safe[-1]['settings']['sparsity'])}, " if len(safe) > 1 else ""
            phrases.append(f"at {levels}: {word} ({last}{w.difference(safe[-1])}, {w.p_text(p)})")
        if len(safe) < len(rule_rows):
            first = rule_rows[len(safe)]
            p, word = verdicts[first["key"]]
            reason = f": {first['quality']['collapsed']}" if word == COLLAPSED else ""
            phrases.append(
                f"at {w.percent(first['settings']['sparsity'])}: {word}{reason} ({w.difference(first)}, "
                f"{w.p_text(p)})"
            )
            collapsed = next((r for r in rule_rows[len(safe) + 1 :] if r["quality"]["collapsed"]), None)
            if collapsed and word != COLLAPSED:
                level = w.percent(collapsed["settings"]["sparsity"])
                phrases.append(f"collapsed at {level} ({collapsed['quality']['collapsed']})")
        sentences.append(f"- **{look_of(rule).title}**, one shot: " + "; ".join(phrases) + ".")
    return ["\n".join(sentences)] if sentences else []


def _pattern_sentence(compressed: list[dict], verdicts: dict) -> str:
    """What N:M patterns cost, rule by rule, at half the weights."""
    patterned = [row for row in pruning.pattern_rows(compressed) if row["settings"].get("pattern")]
    if not patterned:
        return ""
    phrases = [f"{w.label_of(row)} {verdicts[row['key']][1]} ({w.difference(row)})" for row in patterned]
    return (
        "**Patterns.** Half of the weights, evenly spread as sparse hardware needs it: "
        + "; ".join(phrases)
        + "."
    )


def _sensitivity_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    """Which group of layers is most and least sensitive."""
    scan = next((r for r in rows if r["technique"] == "sensitivity" and model_task_of(r) == model_task), None)
    if not scan:
        return ""
    levels, change = scan["achieved"]["levels"], scan["achieved"]["change"]
    at = len(levels) // 2
    order = sorted(change, key=lambda group: change[group][at])
    highest, lowest = (
        f"{group.replace('.', ' ')} ({change[group][at]:.2g})" for group in (order[-1], order[0])
    )
    return (
        f"**Sensitivity.** With {w.percent(levels[at])} of one group of layers zero by magnitude and the "
        f"others dense, the outputs on training text (KL divergence in nats) move most for {highest} and "
        f"least for {lowest}."
    )


def _comparison_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    """The tested differences that are no published order: allocation, movement."""
    tests = [test for test in comparisons(rows, model_task) if _order(test[0]) not in PUBLISHED_ORDERS]
    return w.tested_list("**One way against another**, on the same examples", list(map(w.test_line, tests)))


def _order(comparison: dict) -> tuple[str, str]:
    """The key of `PUBLISHED_ORDERS` that two compared rows fall under: by pattern, or by rule."""
    sides = [comparison["first"], comparison["second"]]
    if any(side["settings"].get("pattern") for side in sides):
        return tuple(side["settings"].get("pattern", "unstructured") for side in sides)
    if any(side["settings"].get("allocation") or side["settings"].get("recovery") for side in sides):
        return ("", "")
    return tuple(side["technique"] for side in sides)


def _cards(rows: list[dict]) -> list[cards.Card]:
    published_cards = []
    for model_task in model_tasks(rows):
        for test in comparisons(rows, model_task):
            if published_order := PUBLISHED_ORDERS.get(_order(test[0])):
                published_cards += cards.ordering(
                    published_order[0],
                    cards.published()["wanda"],
                    [test],
                    published_order[1],
                    here=f"{model_task[0]} on {model_task[1]}",
                )
    return published_cards + [cards.figures(figures, rows) for figures in cards.published()["pruning"]]


def _recovery_sentences(dense: dict, compressed: list[dict], verdicts: dict) -> list[str]:
    recovered = [row for row in compressed if row["settings"].get("recovery")]
    control = next((row for row in recovered if row["technique"] == "dense"), None)
    steps = (control or recovered[0])["settings"]["recovery"]["steps"] if recovered else 0
    recovered = [row for row in recovered if row["settings"]["recovery"]["steps"] == steps]
    if not recovered:
        return []
    metric = dense["quality"]["metric"]
    phrases = []
    for row in sorted(recovered, key=lambda r: r["settings"].get("sparsity", 0.0)):
        if row is control:
            continue
        before = next(
            (
                r
                for r in compressed
                if not is_recovered(r)
                and r["technique"] == row["technique"]
                and is_plain(r)
                and r["settings"].get("sparsity") == row["settings"].get("sparsity")
            ),
            None,
        )
        if before:
            phrases.append(
                f"{w.label_of(before)}, from {w.with_interval(before['quality'], metric)} to "
                f"{w.with_interval(row['quality'], metric)} ({verdicts[row['key']][1]} against dense)"
            )
    lead = f"**Recovery.** Fine-tuning for {w.plural(steps, 'step')} with the zeros held took "
    sentence = lead + "; ".join(phrases) + "." if phrases else ""
    if control:
        sentence += (
            f" The control, the dense model given the same {w.plural(steps, 'step')}, has "
            f"{w.with_interval(control['quality'], metric)} ({verdicts[control['key']][1]})."
        )
    return [sentence.strip()]


def _zeros_of(row: dict, dense: dict) -> str:
    sparsity = 0 if row is dense else row["achieved"].get("sparsity")
    return "" if sparsity is None else w.percent(sparsity)


SECTION = Section(
    notebook="02_pruning",
    findings=findings,
    summary=summary,
    cards=_cards,
    drawings=drawings("pruning-quality", "pruning-zeros", "sensitivity"),
)
