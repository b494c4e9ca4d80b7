"""The combinations section: chains of techniques, the order of their steps, and whether a chain beats a single one."""

import json

from helpers.figures import combinations as p
from helpers.report import cards
from helpers.report import wording as w
from helpers.report.section import Drawing, Section
from helpers.report.structured import dense_sentence, rows_table
from lmcompress.results.rows import dense_and_others, model_task_of, model_tasks
from lmcompress.results.verdicts import adjusted, comparisons, without_loss

BMCOOK = "GPT-J, share of the dense score (Zhang et al. 2022)"
SHORT_NAMES = (
    "Short names: 4/128 is 4 bits in groups of 128, 4 alone one scale per row, +E the token table too; *distil* is "
    "training on the dense model's outputs. The full ones stand in the tables of all rows."
)
VERDICTS = {"no measurable difference": "consistent", "worse": "ordering reproduced", "better": "reversed"}
TIMES = (0.75, 0.5)  # of the dense time
COSTS = {"bytes": (p.size, p.BUDGETS), "time": (p.first_ratio, TIMES)}


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for pair in model_tasks(rows):
        dense, others = dense_and_others(rows, pair)
        if dense is None or not others:
            continue
        text += [f"### {pair[0]} on {pair[1]}", dense_sentence(dense)]
        text.append(_orders(rows, pair))
        text.append(_ablation(rows, pair))
        text += [_budgets(rows, pair, kind) for kind in COSTS]
        text.append(_zeros(rows, pair))
        text.append(_refusals(rows, pair))
        text.append(rows_table(dense, others, adjusted(others), share=_share))
    text = [SHORT_NAMES, *text] if text else text
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Per model and task: whether the order mattered, and whether a chain beat the best single technique."""
    sentences = []
    for pair in model_tasks(rows):
        ordered = [word for _, _, word in comparisons(rows, pair, is_order)]
        changed = sum(word != "no measurable difference" for word in ordered)
        said = f"the order of the steps mattered measurably in {changed} of {w.plural(len(ordered), 'comparison')}"
        parts = [said] if ordered else []
        met = [one for one in _contests(rows, pair, "bytes") if one[-1]]
        if met:
            told = [
                f"within {w.percent(share)} {_names(chain[0])}, against {_names(single[0])}: {_words(found)}"
                for share, single, chain, found in met
            ]
            parts.append(
                "the best chain against the best single technique, by share of the dense bytes: "
                + ", ".join(told)
            )
        else:
            parts += _smallest(rows, pair)
        if parts:
            sentences.append(f"**{pair[0]} on {pair[1]}.** Chains of techniques: {'; '.join(parts)}.")
    return sentences


def _smallest(rows: list[dict], pair: tuple[str, str]) -> list[str]:
    """The smallest single technique and the smallest chain without a measurable loss, where no test compares them."""
    dense, others = dense_and_others(rows, pair)
    if dense is None:
        return []
    verdicts = adjusted(others)
    safe = {row["key"] for row in without_loss(others, verdicts)}
    said = []
    for kind, title in ((p.is_chain, "chain"), (p.is_single, "single technique")):
        own = [own[0] for path, own in p.ways(rows, pair).items() if kind(path)]
        best = min((row for row in own if row["key"] in safe), key=p.size, default=None)
        if best is not None:
            said.append(f"the smallest {title} is {_names(best)}, {_share(best, dense)} of the dense bytes")
        elif own:
            said.append(f"there is no {title}")
    if len(said) == 2 and all("there is no" in one for one in said):
        return [
            f"every chain tried here shows a loss, and so does each technique tried here alone, {w.if_only(others, verdicts)}"
        ]
    return [f"without a measurable loss, {', and '.join(said)}"] if len(said) == 2 else []


def is_order(found: dict) -> bool:
    """Whether a comparison is of the same steps in two orders."""
    first, second = (p.path_of(found[place]) for place in ("first", "second"))
    return first != second and sorted(first) == sorted(second)


def left_out(found: dict) -> dict | None:
    """The one step that the first of a comparison has and the second has not; None if they differ in another way."""
    first, second = (list(p.path_of(found[place])) for place in ("first", "second"))
    for place, step in enumerate(first):
        if first[:place] + first[place + 1 :] == second:
            return json.loads(step)
    return None


def _grouped(found: list[tuple[dict, float, str]]) -> dict[tuple, list[tuple[dict, float, str]]]:
    """Comparisons by what is compared: one entry per seed."""
    groups: dict[tuple, list] = {}
    for one in found:
        groups.setdefault((p.path_of(one[0]["first"]), p.path_of(one[0]["second"])), []).append(one)
    return groups


def _words(own: list[tuple[dict, float, str]]) -> str:
    """`better in 2 of 3 seeds, no measurable difference in 1 (+0.8 points on average)`."""
    words = [word for _, _, word in own]
    metric, values = own[0][0]["metric"], [one["difference"] for one, _, _ in own]
    if len(own) == 1:
        return f"{words[0]} ({w.difference_text(values[0], metric)}, {w.p_text(own[0][1])})"
    counts = [f"{word} in {words.count(word)}" for word in sorted(set(words))]
    means = {name: sum(one[name] for one in values) / len(values) for name in ("value", "low", "high")}
    return f"{', '.join(counts)} of {len(own)} seeds ({w.difference_text(means, metric)} on average)"


def _names(place: dict) -> str:
    return p.label(p.path_of(place)) or "dense"


def _share(row: dict, dense: dict) -> str:
    return w.percent(p.size(row) / p.size(dense))


def _orders(rows: list[dict], pair: tuple[str, str]) -> str:
    groups = _grouped(comparisons(rows, pair, is_order))
    lines = [
        (
            f"- {_names(own[0][0]['first'])}, against {_names(own[0][0]['second'])}: {_words(own)}",
            [word for *_, word in own],
        )
        for own in groups.values()
    ]
    return w.tested_list("**The same steps in another order**, on the same examples", lines)


def _ablation(rows: list[dict], pair: tuple[str, str]) -> str:
    groups = _grouped(comparisons(rows, pair, lambda found: left_out(found) is not None))
    lines = [
        [_names(own[0][0]["first"]), p.short(left_out(own[0][0])), _words(own)] for own in groups.values()
    ]
    table = w.table(["Chain", "Step", "With the step, against the same chain without it"], lines)
    title = "**What a step does to the quality of a chain**"
    if len(lines) <= w.SHOWN:
        return f"{title}:\n\n{table}" if lines else ""
    words = [word for own in groups.values() for *_, word in own]
    return (
        f"{title}, with it against without, {w.plural(len(words), 'test')}: {w.tally(words)}.\n\n"
        + w.folded(f"All {w.plural(len(lines), 'comparison')}", table)
    )


def _contests(rows: list[dict], pair: tuple[str, str], kind: str) -> list[tuple]:
    """Per budget: share, rows of the best single, rows of the best chain, and their tested differences by seed."""
    cost, shares = COSTS[kind]
    met = [(share, *p.best_under_budget(rows, pair, share, cost)) for share in shares]
    wanted = {(c["key"], s["key"]) for _, single, chain in met for c in chain for s in single}
    keys = {"first", "second"}
    tested = comparisons(rows, pair, lambda one: keys <= set(one["keys"]) and _keys(one) in wanted)
    return [
        (share, single, chain, [
            one for one in tested if _keys(one[0]) in {(c["key"], s["key"]) for c in chain for s in single}
        ])
        for share, single, chain in met if single or chain
    ]  # fmt: skip


def _keys(found: dict) -> tuple[str, str]:
    return found["keys"]["first"], found["keys"]["second"]


def _budgets(rows: list[dict], pair: tuple[str, str], kind: str) -> str:
    lines, met = [], _contests(rows, pair, kind)
    tested = any(found for *_, found in met)
    for share, single, chain, found in met:
        cells = [_entrant(own, kind) for own in (single, chain)]
        lines.append(
            [w.percent(share), *cells, *([_words(found) if found else "not compared"] if tested else [])]
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
    return f"{_names(own[0])}: {cost}, {w.metric_name(metric)} {w.with_interval(own[0]['quality'], metric)}{seeds}"


def _zeros(rows: list[dict], pair: tuple[str, str]) -> str:
    """The share of zeros after each step of every chain, of the first seed; rounding makes some by itself."""
    parts = []
    for path, own in p.ways(rows, pair).items():
        zeros = [one["sparsity"] or 0.0 for one in own[0]["achieved"].get("steps", ())]
        if any(zeros):
            parts.append(f"- {p.label(path)}: {' → '.join(w.percent(round(one, 3)) for one in zeros)}")
    return (
        w.folded("Zeros among the weights of the blocks after each step", "\n".join(parts)) if parts else ""
    )


def _refusals(rows: list[dict], pair: tuple[str, str]) -> str:
    refused = [r for r in rows if r["technique"] == "refused" and model_task_of(r) == pair]
    lines = [f"- {' → '.join(row['settings']['steps'])}: {row['achieved']['reason']}" for row in refused]
    title = f"What cannot follow what: {w.plural(len(lines), 'chain')} refused, in the words of the refusal"
    return w.folded(title, "\n".join(lines)) if lines else ""


def _cards(rows: list[dict]) -> list[cards.Card]:
    made, note = [], "a small loss by the last step was published; consistent: none measurable"
    for pair in model_tasks(rows):
        dense = dense_and_others(rows, pair)[0]
        for own in _grouped(comparisons(rows, pair, _is_rounded)).values():
            last, before = (_kept(rows, own, place, dense) for place in ("first", "second"))
            text = "prune + distil 94.4 % at 2×, + quantize 94.1 % at 8×"
            words = {word for _, _, word in own}
            verdict = VERDICTS[words.pop()] if len(words) == 1 else f"mixed ({', '.join(sorted(words))})"
            ours, here = f"{before}, + quantize {last}: {_words(own)}", f"{pair[0]} on {pair[1]}; {note}"
            made.append(cards.Card(text, BMCOOK, ours, verdict, here, cards.SIGN))
    moe = cards.Card("+ MoEfication 91.3 % at 10×", BMCOOK, "`make report PROFILE=paper`", cards.CANNOT)
    return [*made, moe] if made else []


def _is_rounded(found: dict) -> bool:
    """Whether a comparison is of prune, distil, quantize with the same without quantizing."""
    steps, gone = p.steps_of(found["first"]), left_out(found)
    return bool(
        gone
        and len(steps) == 3
        and "bits" in steps[2]
        and steps[1].get("recovery", {}).get("teacher")
        and gone == steps[2]
    )


def _kept(rows: list[dict], own: list[tuple], place: str, dense: dict) -> str:
    """`98.2 % at 2.0×`: the mean quality over seeds as a share of dense, and how many times fewer bytes."""
    found = [
        row for row in rows if row["quality"] and row["key"] in {one["keys"][place] for one, _, _ in own}
    ]
    share = sum(row["quality"]["value"] for row in found) / len(found) / dense["quality"]["value"]
    share = share if dense["quality"]["higher_is_better"] else 1 / share
    return f"{w.percent(round(share, 3))} at {p.size(dense) / p.size(found[0]):.1f}×"


SECTION = Section(
    notebook="10_combinations",
    title="Combinations",
    question="Which techniques add up, in which order, and does a chain beat the best single technique at equal bytes?",
    method=(
        "A recipe is a list of steps; each works on what the one before left, zeros are held by all that follows, and the "
        "result is saved as one folder, reloaded and scored. The steps prune, distil and quantize run alone, in pairs and "
        "all three, in every order that is possible. Bytes are those of the smallest stored form; packed integers may "
        "leave out their zeros for one bit per weight."
    ),
    findings=findings,
    cards=_cards,
    summary=summary,
    drawings=(
        Drawing(
            "combinations-bytes",
            (
                "Paired difference to dense (95 % intervals) over bytes. Arrows lead from a chain to the next step; numbered: the "
                "best within a budget; open: trained; dots: further seeds."
            ),
            p.quality_by_bytes,
            lambda rows: any(p.ways(rows, pair) for pair in model_tasks(rows)),
        ),
        Drawing(
            "combinations-orders",
            "The same steps in every order: paired difference to dense (95 % intervals), one line per seed.",
            p.orders_figure,
            lambda rows: any(p.families(rows, pair) for pair in model_tasks(rows)),
        ),
    ),
    caveats=(
        "The best of a budget is chosen on the examples it is scored on, the single techniques from a shorter list than "
        "the chains may be made of. Training is short. Forms with a bit per weight are counted, not written."
    ),
)
