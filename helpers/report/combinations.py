"""The combinations section: chains of techniques, their order, and chains against single techniques."""

import json

from helpers.report import cards
from helpers.report import rows_combinations as p
from helpers.report import wording as w
from helpers.report.section import Section, drawings
from helpers.report.structured import dense_sentence, rows_table
from lmcompress.results.rows import dense_and_others, dense_of, model_task_of, model_tasks
from lmcompress.results.verdicts import NO_DIFFERENCE, adjusted, comparisons, families, without_loss

BMCOOK = "GPT-J, share of the dense score (Zhang et al. 2022)"
SHORT_NAMES = (
    "Short names: 4/128 is 4 bits in groups of 128, 4 alone one scale per row, +E the token table too; "
    "*distil* is training on the dense model's outputs. The full ones stand in the tables of all rows."
)
VERDICTS = {NO_DIFFERENCE: "consistent", "worse": "ordering reproduced", "better": "reversed"}
TIMES = (0.75, 0.5)  # of the dense time
COSTS = {"bytes": (p.size, p.BUDGETS), "time": (p.first_ratio, TIMES)}


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for model_task, dense, compressed, verdicts in families(rows):
        if not compressed:
            continue
        text += [f"### {model_task[0]} on {model_task[1]}", dense_sentence(dense)]
        text.append(_orders(rows, model_task))
        text.append(_ablation(rows, model_task))
        text += [_budgets(rows, model_task, kind) for kind in COSTS]
        text.append(_zeros(rows, model_task))
        text.append(_refusals(rows, model_task))
        text.append(rows_table(dense, compressed, verdicts, share=_share))
    text = [SHORT_NAMES, *text] if text else text
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Per model and task: whether the order mattered, and whether a chain beat the best single technique."""
    sentences = []
    for model_task in model_tasks(rows):
        ordered = [word for _, _, word in comparisons(rows, model_task, is_order)]
        changed = sum(word != NO_DIFFERENCE for word in ordered)
        order = (
            f"the order of the steps mattered measurably in {changed} of "
            f"{w.plural(len(ordered), 'comparison')}"
        )
        parts = [order] if ordered else []
        met = [contest for contest in _contests(rows, model_task, "bytes") if contest[-1]]
        if met:
            answers = [
                f"within {w.percent(share)} {_names(chain[0])}, against {_names(single[0])}: "
                f"{_words(has_tests)}"
                for share, single, chain, has_tests in met
            ]
            parts.append(
                "the best chain against the best single technique, by share of the dense bytes: "
                + ", ".join(answers)
            )
        else:
            parts += _smallest(rows, model_task)
        if parts:
            sentences.append(
                f"**{model_task[0]} on {model_task[1]}.** Chains of techniques: {'; '.join(parts)}."
            )
    return sentences


def _smallest(rows: list[dict], model_task: tuple[str, str]) -> list[str]:
    """Name the smallest single technique and chain without a measurable loss that no test compares."""
    dense, compressed = dense_and_others(rows, model_task)
    if dense is None:
        return []
    verdicts = adjusted(compressed)
    safe = {row["key"] for row in without_loss(compressed, verdicts)}
    sentences = []
    for kind, title in ((p.is_chain, "chain"), (p.is_single, "single technique")):
        smallest_rows = [seeds[0] for path, seeds in p.ways(rows, model_task).items() if kind(path)]
        best = min((row for row in smallest_rows if row["key"] in safe), key=p.size, default=None)
        if best is not None:
            sentences.append(
                f"the smallest {title} is {_names(best)}, {_share(best, dense)} of the dense bytes"
            )
        elif smallest_rows:
            sentences.append(f"there is no {title}")
    if len(sentences) == 2 and all("there is no" in sentence for sentence in sentences):
        return [
            f"every chain tried here shows a loss, and so does each technique tried here alone, "
            f"{w.if_only(compressed, verdicts)}"
        ]
    return [f"without a measurable loss, {', and '.join(sentences)}"] if len(sentences) == 2 else []


def is_order(comparison: dict) -> bool:
    """Whether a comparison is of the same steps in two orders."""
    first, second = (p.path_of(comparison[side]) for side in ("first", "second"))
    return first != second and sorted(first) == sorted(second)


def left_out(comparison: dict) -> dict | None:
    """Return the one step that only the first of a comparison has; None if they differ otherwise."""
    first, second = (list(p.path_of(comparison[position])) for position in ("first", "second"))
    for position, step in enumerate(first):
        if first[:position] + first[position + 1 :] == second:
            return json.loads(step)
    return None


def _grouped(tests: list[tuple[dict, float, str]]) -> dict[tuple, list[tuple[dict, float, str]]]:
    """Comparisons by what is compared: one entry per seed."""
    groups: dict[tuple, list] = {}
    for test in tests:
        groups.setdefault((p.path_of(test[0]["first"]), p.path_of(test[0]["second"])), []).append(test)
    return groups


def _words(tests: list[tuple[dict, float, str]]) -> str:
    """`better in 2 of 3 seeds, no measurable difference in 1 (+0.8 points on average)`."""
    words = [word for _, _, word in tests]
    metric, values = tests[0][0]["metric"], [value["difference"] for value, _, _ in tests]
    if len(tests) == 1:
        return f"{words[0]} ({w.difference_text(values[0], metric)}, {w.p_text(tests[0][1])})"
    counts = [f"{word} in {words.count(word)}" for word in sorted(set(words))]
    means = {name: sum(value[name] for value in values) / len(values) for name in ("value", "low", "high")}
    return f"{', '.join(counts)} of {len(tests)} seeds ({w.difference_text(means, metric)} on average)"


def _names(entrant: dict) -> str:
    return p.label(p.path_of(entrant)) or "dense"


def _share(row: dict, dense: dict) -> str:
    return w.percent(p.size(row) / p.size(dense))


def _orders(rows: list[dict], model_task: tuple[str, str]) -> str:
    groups = _grouped(comparisons(rows, model_task, is_order))
    lines = [
        (
            f"- {_names(tests[0][0]['first'])}, against {_names(tests[0][0]['second'])}: {_words(tests)}",
            [word for *_, word in tests],
        )
        for tests in groups.values()
    ]
    return w.tested_list("**The same steps in another order**, on the same examples", lines)


def _ablation(rows: list[dict], model_task: tuple[str, str]) -> str:
    groups = _grouped(comparisons(rows, model_task, lambda comparison: left_out(comparison) is not None))
    lines = [
        [_names(tests[0][0]["first"]), p.short(left_out(tests[0][0])), _words(tests)]
        for tests in groups.values()
    ]
    table = w.table(["Chain", "Step", "With the step, against the same chain without it"], lines)
    title = "**What a step does to the quality of a chain**"
    if len(lines) <= w.SHOWN:
        return f"{title}:\n\n{table}" if lines else ""
    words = [word for tests in groups.values() for *_, word in tests]
    return (
        f"{title}, with it against without, {w.plural(len(words), 'test')}: {w.tally(words)}.\n\n"
        + w.folded(f"All {w.plural(len(lines), 'comparison')}", table)
    )


def _contests(rows: list[dict], model_task: tuple[str, str], kind: str) -> list[tuple]:
    """Return per budget: share, rows of the best single and the best chain, their tests by seed."""
    cost, shares = COSTS[kind]
    met = [(share, *p.best_under_budget(rows, model_task, share, cost)) for share in shares]
    contests = {(c["key"], s["key"]) for _, single, chain in met for c in chain for s in single}
    keys = {"first", "second"}
    tested = comparisons(
        rows, model_task, lambda comparison: keys <= set(comparison["keys"]) and _keys(comparison) in contests
    )
    return [
        (
            share,
            single,
            chain,
            [
                comparison
                for comparison in tested
                if _keys(comparison[0]) in {(c["key"], s["key"]) for c in chain for s in single}
            ],
        )
        for share, single, chain in met
        if single or chain
    ]


def _keys(comparison: dict) -> tuple[str, str]:
    return comparison["keys"]["first"], comparison["keys"]["second"]


def _budgets(rows: list[dict], model_task: tuple[str, str], kind: str) -> str:
    lines, met = [], _contests(rows, model_task, kind)
    tested = any(has_tests for *_, has_tests in met)
    for share, single, chain, has_tests in met:
        cells = [_entrant(entrant, kind) for entrant in (single, chain)]
        lines.append(
            [
                w.percent(share),
                *cells,
                *([_words(has_tests) if has_tests else "not compared"] if tested else []),
            ]
        )
    header = [f"{kind.capitalize()}, of dense", "Best single technique", "Best chain"]
    header += ["Chain against single"] if tested else []
    title = f"**Within the same {kind}**" + (
        ", of the smallest stored form" if kind == "bytes" else ", at the first shape timed"
    )
    return f"{title}:\n\n{w.table(header, lines)}" if lines else ""


def _entrant(own: list[dict], kind: str) -> str:
    if not own:
        return "nothing measured fits"
    metric = own[0]["quality"]["metric"]
    cost = w.bytes_text(p.size(own[0])) if kind == "bytes" else f"{p.first_ratio(own[0]):.2f} of the time"
    seeds = f", seed {own[0]['seed']} of {len(own)}" if len(own) > 1 else ""
    return (
        f"{_names(own[0])}: {cost}, {w.metric_name(metric)} "
        f"{w.with_interval(own[0]['quality'], metric)}{seeds}"
    )


def _zeros(rows: list[dict], model_task: tuple[str, str]) -> str:
    """The share of zeros after each step of every chain, of the first seed; rounding makes some by itself."""
    lines = []
    for path, seeds in p.ways(rows, model_task).items():
        zeros = [zero_share["sparsity"] or 0.0 for zero_share in seeds[0]["achieved"].get("steps", ())]
        if any(zeros):
            lines.append(
                f"- {p.label(path)}: {' → '.join(w.percent(round(zero_share, 3)) for zero_share in zeros)}"
            )
    return (
        w.folded("Zeros among the weights of the blocks after each step", "\n".join(lines)) if lines else ""
    )


def _refusals(rows: list[dict], model_task: tuple[str, str]) -> str:
    refused = [r for r in rows if r["technique"] == "refused" and model_task_of(r) == model_task]
    lines = [f"- {' → '.join(row['settings']['steps'])}: {row['achieved']['reason']}" for row in refused]
    title = f"What cannot follow what: {w.plural(len(lines), 'chain')} refused, in the words of the refusal"
    return w.folded(title, "\n".join(lines)) if lines else ""


def _cards(rows: list[dict]) -> list[cards.Card]:
    published, note = [], "a small loss by the last step was published; consistent: none measurable"
    for model_task in model_tasks(rows):
        dense = dense_of(rows, model_task)
        for tests in _grouped(comparisons(rows, model_task, _is_rounded)).values():
            last, before = (_kept(rows, tests, side, dense) for side in ("first", "second"))
            text = "prune + distil 94.4 % at 2×, + quantize 94.1 % at 8×"
            words = {word for _, _, word in tests}
            verdict = VERDICTS[words.pop()] if len(words) == 1 else f"mixed ({', '.join(sorted(words))})"
            kept_shares, where = (
                f"{before}, + quantize {last}: {_words(tests)}",
                f"{model_task[0]} on {model_task[1]}; {note}",
            )
            published.append(cards.Card(text, BMCOOK, kept_shares, verdict, where, cards.SIGN))
    moe = cards.Card("+ MoEfication 91.3 % at 10×", BMCOOK, "`make report PROFILE=paper`", cards.CANNOT)
    return [*published, moe] if published else []


def _is_rounded(comparison: dict) -> bool:
    """Whether a comparison is of prune, distil, quantize with the same without quantizing."""
    steps, omitted = p.steps_of(comparison["first"]), left_out(comparison)
    return bool(
        omitted
        and len(steps) == 3
        and "bits" in steps[2]
        and steps[1].get("recovery", {}).get("teacher")
        and omitted == steps[2]
    )


def _kept(rows: list[dict], tests: list[tuple], side: str, dense: dict) -> str:
    """`98.2 % at 2.0×`: the mean quality over seeds as a share of dense, and how many times fewer bytes."""
    shares = [
        row
        for row in rows
        if row["quality"] and row["key"] in {comparison["keys"][side] for comparison, _, _ in tests}
    ]
    share = sum(row["quality"]["value"] for row in shares) / len(shares) / dense["quality"]["value"]
    share = share if dense["quality"]["higher_is_better"] else 1 / share
    return f"{w.percent(round(share, 3))} at {p.size(dense) / p.size(shares[0]):.1f}×"


SECTION = Section(
    notebook="10_combinations",
    findings=findings,
    cards=_cards,
    summary=summary,
    drawings=drawings("combinations-orders"),
)
