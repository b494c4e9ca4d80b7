"""The sheared section: is a shape better cut from a larger model, and up to how many tokens?"""

import numpy as np

from helpers.report import recipe, seeds
from helpers.report import rows_sheared as p
from helpers.report import wording as w
from helpers.report.section import Section, drawings
from lmcompress.results.labels import SHAPE_NAMES, look_of

QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of the tokens, where losses are compared and tested
Runs = dict[str, list[dict]]


def loss_at(run: dict, tokens: float) -> float:
    """Held-out loss of a run after so many tokens, between the points of its curve."""
    return float(np.interp(tokens, *p.curve(run)))


def marks(runs: Runs) -> list[int]:
    """Tokens at the quarters of the shortest run, from where every run has begun to recover."""
    every = [p.curve(run) for several in runs.values() for run in several]
    last, first = min(curve[0, -1] for curve in every), max(curve[0, 0] for curve in every)
    return [round(share * last) for share in QUARTERS if share * last >= first]


def compared(runs: Runs, pairs: list[tuple[str, str]]) -> list[dict]:
    """The gaps in loss of pairs of ways at every mark, over the seeds both have, tested as one family."""
    gaps_entries = []
    for first, second in pairs:
        run_pairs = p.paired(runs.get(first, []), runs.get(second, []))
        for tokens in marks(runs) if run_pairs else []:
            gaps = [loss_at(run, tokens) - loss_at(other, tokens) for run, other in run_pairs]
            gaps_entries.append(
                {
                    "first": first,
                    "second": second,
                    "tokens": tokens,
                    "gaps": gaps,
                    "value": float(np.mean(gaps)),
                }
            )
    return seeds.tested(gaps_entries)


def crossover(run: dict, other: dict) -> float | None:
    """Return the tokens from which `other` is no longer behind `run`, interpolated; None if never."""
    tokens = np.union1d(p.curve(run)[0], p.curve(other)[0])
    tokens = tokens[
        (tokens >= p.curve(run)[0, 0]) & (tokens <= min(p.curve(run)[0, -1], p.curve(other)[0, -1]))
    ]
    gap = np.array([loss_at(run, token) - loss_at(other, token) for token in tokens])
    behind = np.flatnonzero(gap < 0)
    if len(behind) == 0:
        return float(tokens[0])
    at = behind[-1]  # the last point at which it is behind
    if at == len(gap) - 1:
        return None
    return float(tokens[at] + (tokens[at + 1] - tokens[at]) * gap[at] / (gap[at] - gap[at + 1]))


def crossover_text(several: list[dict], from_scratch: list[dict]) -> str:
    """Where the curve from scratch meets that of a way, in words."""
    pairs = p.paired(several, from_scratch)
    met = [tokens for run_pair in pairs if (tokens := crossover(*run_pair)) is not None]
    last = min(p.curve(run)[0, -1] for run in several + from_scratch)
    if (
        met
        and all(tokens_met <= p.curve(run)[0, 0] for tokens_met, (run, _) in zip(met, pairs))
        and len(met) == len(pairs)
    ):
        return f"behind from scratch from the cut on in {_of_seeds(len(met), len(pairs))}"
    if not met:
        return f"no crossover up to {last:,.0f} tokens in {_of_seeds(len(pairs), len(pairs))}"
    span = f" [{min(met):,.0f}, {max(met):,.0f}]" if len(met) > 1 else ""
    return (
        f"from scratch catches up at {np.median(met):,.0f}{span} tokens in {_of_seeds(len(met), len(pairs))}"
    )


def _named(technique: str) -> str:
    """A way's title within a sentence."""
    title = look_of(technique).title
    return title[0].lower() + title[1:]


def _of_seeds(count: int, total: int) -> str:
    return f"{count} of {total} seed{'s' if total > 1 else ''}"


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    runs = p.runs(rows)
    paragraphs = [recipe.contexts(rows), recipe.switches(rows), recipe.counts(rows)]
    if runs:
        paragraphs = [
            _runs(rows, runs),
            _table(runs),
            _against_scratch(runs),
            _among(runs),
            _adapters(rows, runs),
            *paragraphs,
        ]
    return [text for text in paragraphs if text]


def summary(rows: list[dict]) -> list[str]:
    """Whether starting from the larger model paid, at the first and the last mark."""
    runs, words = p.runs(rows), []
    for technique in [technique for technique in runs if technique != p.SCRATCH]:
        entries = compared(runs, [(technique, p.SCRATCH)])
        if entries:
            gaps = ", ".join(
                f"after {entry['tokens']:,} tokens {seeds.verdict(entry)} ({seeds.gap_text(entry)})"
                for entry in (entries[0], entries[-1])
            )
            words.append(f"{_named(technique)}: {gaps}, {crossover_text(runs[technique], runs[p.SCRATCH])}")
    dead = _collapsed(runs.get(p.SCRATCH, []))
    note = (
        f" The model from scratch knows no more than word counts at the end{dead}: being ahead of it says "
        f"little yet."
        if dead
        else ""
    )
    return (
        [
            f"**A target shape from a larger model, against from scratch.**{note} By held-out loss, "
            f"{'; '.join(words)}."
        ]
        if words
        else []
    )


def _runs(rows: list[dict], runs: Runs) -> str:
    run = next(iter(runs.values()))[0]
    shape, achieved = run["achieved"]["shape"], run["achieved"]
    dense = next(
        (r for r in rows if r["technique"] == "dense" and r["model"] == run["model"] and r["memory"]), None
    )
    share = (
        f", {w.percent(achieved['parameters'] / dense['memory']['parameters'])} of the larger model's"
        if dense
        else ""
    )
    pruned = max(
        pruning_run["achieved"]["pruning_tokens"] for several in runs.values() for pruning_run in several
    )
    return (
        f"{run['model']} is brought to {w.plural(shape['layers'], 'block')} of "
        f"{w.plural(shape['heads'], 'head')}, {w.plural(shape['hidden'], 'hidden dimension')} and "
        f"{w.plural(shape['ffn'], 'channel')}: {achieved['parameters']:,} parameters{share}. Every run of a "
        f"seed sees the same {achieved['tokens']:,} tokens; of the ways that prune while they train, "
        f"{pruned:,} of them go into that. Perplexity is of {w.plural(run['quality']['n'], 'window')} of "
        "text, which need not be those of other sections." + _time(runs)
    )


def _time(runs_by_way: Runs) -> str:
    """What the shape costs, which is the same whatever way led to it."""
    timed = next(
        (run["latency"]["shapes"] for runs in runs_by_way.values() for run in runs if run["latency"]), None
    )
    if timed is None:
        return ""
    ratios = [f"{SHAPE_NAMES[name]}: {w.ratio_text(shape)}" for name, shape in timed.items()]
    return f" Time over the larger model's: {'; '.join(ratios)}."


def _table(runs: Runs) -> str:
    """A line per way: loss after the cut and at the marks, perplexity, speed; mean and range over seeds."""

    def spread(values: list[float]) -> str:
        ends = f" [{w.number(min(values))}, {w.number(max(values))}]" if len(values) > 1 else ""
        return w.number(float(np.mean(values))) + ends

    places, lines = marks(runs), []
    for technique, several in runs.items():
        lines.append(
            [
                look_of(technique).title,
                spread([p.curve(run)[1, 0] for run in several]),
                *(spread([loss_at(run, tokens) for run in several]) for tokens in places),
                spread([run["quality"]["value"] for run in several]) + _collapsed(several),
                spread([run["achieved"]["tokens_per_s"] for run in several]),
            ]
        )
    header = ["Way", "Loss after the cut", *(f"after {tokens:,} tokens" for tokens in places)]
    return w.table([*header, "Perplexity at the end", "Tokens/s"], lines)


def _collapsed(several: list[dict]) -> str:
    """` (collapsed)`, or in how many of the runs: no better than knowing only how often each token occurs."""
    dead = sum(bool(run["quality"]["collapsed"]) for run in several)
    return (
        ""
        if not dead
        else " (collapsed)"
        if dead == len(several)
        else f" (collapsed in {dead} of {len(several)})"
    )


def _against_scratch(runs: Runs) -> str:
    techniques = [technique for technique in runs if technique != p.SCRATCH]
    entries, lines = compared(runs, [(technique, p.SCRATCH) for technique in techniques]), []
    for technique in techniques:
        own_entries = [entry for entry in entries if entry["first"] == technique]
        gaps = [
            f"after {entry['tokens']:,} tokens {seeds.verdict(entry)} ({seeds.gap_text(entry)})"
            for entry in own_entries
        ]
        if gaps:
            lines.append(
                f"- {look_of(technique).title}: {'; '.join(gaps)}; "
                f"{crossover_text(runs[technique], runs[p.SCRATCH])}."
            )
    title = (
        "**Does it pay to start from the larger model?** Held-out loss minus that of the target shape "
        "from scratch"
    )
    dead = _collapsed(runs.get(p.SCRATCH, []))
    note = (
        f", which knows no more than word counts at the end{dead}: being ahead of it says little yet"
        if dead
        else ""
    )
    return f"{title}{note}:\n\n" + "\n".join(lines) if lines else ""


def _among(runs: Runs) -> str:
    control = "magnitude-shape"
    entries = compared(runs, [(technique, control) for technique in ("sheared", "lora-prune")])
    last = [entry for entry in entries if entry["tokens"] == marks(runs)[-1]]
    gaps = [f"{_named(entry['first'])}: {seeds.verdict(entry)} ({seeds.gap_text(entry)})" for entry in last]
    return (
        f"**Which units stay, against those of largest weights**, after all tokens: {'; '.join(gaps)}."
        if gaps
        else ""
    )


def _adapters(rows: list[dict], runs: Runs) -> str:
    entries = []
    for adapters in ("lora", "qlora"):
        for technique, several in p.runs(rows, adapters).items():
            run_pairs = p.paired(several, runs.get(technique, []))
            gaps = [float(p.curve(first)[1, -1] - p.curve(other)[1, -1]) for first, other in run_pairs]
            if gaps:
                entries.append(
                    {"way": technique, "adapters": adapters, "gaps": gaps, "value": float(np.mean(gaps))}
                )
    named = {"lora": "LoRA", "qlora": "QLoRA (4-bit weights under it)"}
    said = [
        f"{_named(first['way'])} with {named[first['adapters']]}: {seeds.verdict(first)} "
        f"({seeds.gap_text(first)})"
        for first in seeds.tested(entries)
    ]
    return (
        f"**Recovery by adapters, against all weights**, last held-out loss: {'; '.join(said)}."
        if said
        else ""
    )


SECTION = Section(
    notebook="09_sheared_llama",
    findings=findings,
    summary=summary,
    drawings=drawings("sheared-training"),
)
