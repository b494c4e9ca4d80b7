"""The sheared section: whether a target shape is better reached from a larger model, and after how many tokens."""

import numpy as np

from helpers.figures import sheared as p
from helpers.report import recipe, seeds
from helpers.report import wording as w
from helpers.report.section import Drawing, Section
from lmcompress.results.labels import SHAPE_NAMES, look_of

QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of the tokens, where losses are compared and tested
Runs = dict[str, list[dict]]


def loss_at(run: dict, tokens: float) -> float:
    """Held-out loss of a run after so many tokens, between the points of its curve."""
    return float(np.interp(tokens, *p.curve(run)))


def marks(found: Runs) -> list[int]:
    """Tokens at the quarters of the shortest run, from where every run has begun to recover."""
    every = [p.curve(run) for several in found.values() for run in several]
    last, first = min(one[0, -1] for one in every), max(one[0, 0] for one in every)
    return [round(share * last) for share in QUARTERS if share * last >= first]


def compared(found: Runs, pairs: list[tuple[str, str]]) -> list[dict]:
    """The gaps in loss of pairs of ways at every mark, over the seeds both have, tested as one family."""
    made = []
    for first, second in pairs:
        both = p.paired(found.get(first, []), found.get(second, []))
        for tokens in marks(found) if both else []:
            gaps = [loss_at(one, tokens) - loss_at(other, tokens) for one, other in both]
            made.append({"first": first, "second": second, "tokens": tokens, "gaps": gaps,
                         "value": float(np.mean(gaps))})  # fmt: skip
    return seeds.tested(made)


def crossover(run: dict, other: dict) -> float | None:
    """Tokens from which `other` is no longer behind `run`, between the points of both curves; None if it stays behind."""
    tokens = np.union1d(p.curve(run)[0], p.curve(other)[0])
    tokens = tokens[
        (tokens >= p.curve(run)[0, 0]) & (tokens <= min(p.curve(run)[0, -1], p.curve(other)[0, -1]))
    ]
    gap = np.array([loss_at(run, one) - loss_at(other, one) for one in tokens])
    behind = np.flatnonzero(gap < 0)
    if len(behind) == 0:
        return float(tokens[0])
    at = behind[-1]  # the last point at which it is behind
    if at == len(gap) - 1:
        return None
    return float(tokens[at] + (tokens[at + 1] - tokens[at]) * gap[at] / (gap[at] - gap[at + 1]))


def crossover_text(several: list[dict], others: list[dict]) -> str:
    """Where the curve from scratch meets that of a way, in words."""
    pairs = p.paired(several, others)
    met = [found for pair in pairs if (found := crossover(*pair)) is not None]
    most = min(p.curve(run)[0, -1] for run in several + others)
    if met and all(one <= p.curve(run)[0, 0] for one, (run, _) in zip(met, pairs)) and len(met) == len(pairs):
        return f"behind from scratch from the cut on in {_of_seeds(len(met), len(pairs))}"
    if not met:
        return f"no crossover up to {most:,.0f} tokens in {_of_seeds(len(pairs), len(pairs))}"
    span = f" [{min(met):,.0f}, {max(met):,.0f}]" if len(met) > 1 else ""
    return (
        f"from scratch catches up at {np.median(met):,.0f}{span} tokens in {_of_seeds(len(met), len(pairs))}"
    )


def _named(way: str) -> str:
    """A way's title within a sentence."""
    title = look_of(way).title
    return title[0].lower() + title[1:]


def _of_seeds(count: int, total: int) -> str:
    return f"{count} of {total} seed{'s' if total > 1 else ''}"


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    found = p.runs(rows)
    parts = [recipe.contexts(rows), recipe.switches(rows), recipe.counts(rows)]
    if found:
        parts = [
            _runs(rows, found),
            _table(found),
            _against_scratch(found),
            _among(found),
            _adapters(rows, found),
            *parts,
        ]
    return [text for text in parts if text]


def summary(rows: list[dict]) -> list[str]:
    """Whether starting from the larger model paid, at the first and the last mark."""
    found, words = p.runs(rows), []
    for way in [way for way in found if way != p.SCRATCH]:
        own = compared(found, [(way, p.SCRATCH)])
        if own:
            said = ", ".join(
                f"after {one['tokens']:,} tokens {seeds.verdict(one)} ({seeds.gap_text(one)})"
                for one in (own[0], own[-1])
            )
            words.append(f"{_named(way)}: {said}, {crossover_text(found[way], found[p.SCRATCH])}")
    dead = _collapsed(found.get(p.SCRATCH, []))
    note = (
        f" The model from scratch knows no more than word counts at the end{dead}: being ahead of it says little yet."
        if dead
        else ""
    )
    return (
        [
            f"**A target shape from a larger model, against from scratch.**{note} By held-out loss, {'; '.join(words)}."
        ]
        if words
        else []
    )


def _runs(rows: list[dict], found: Runs) -> str:
    run = next(iter(found.values()))[0]
    shape, achieved = run["achieved"]["shape"], run["achieved"]
    dense = next(
        (r for r in rows if r["technique"] == "dense" and r["model"] == run["model"] and r["memory"]), None
    )
    share = (
        f", {w.percent(achieved['parameters'] / dense['memory']['parameters'])} of the larger model's"
        if dense
        else ""
    )
    pruned = max(one["achieved"]["pruning_tokens"] for several in found.values() for one in several)
    return (
        f"{run['model']} is brought to {w.plural(shape['layers'], 'block')} of {w.plural(shape['heads'], 'head')}, "
        f"{w.plural(shape['hidden'], 'hidden dimension')} and {w.plural(shape['ffn'], 'channel')}: {achieved['parameters']:,} parameters{share}. Every run of a seed sees the "
        f"same {achieved['tokens']:,} tokens; of the ways that prune while they train, {pruned:,} of them go into that. Perplexity is "
        f"of {w.plural(run['quality']['n'], 'window')} of text, which need not be those of other sections."
        + _time(found)
    )


def _time(found: Runs) -> str:
    """What the shape costs, which is the same whatever way led to it."""
    timed = next(
        (run["latency"]["shapes"] for runs in found.values() for run in runs if run["latency"]), None
    )
    if timed is None:
        return ""
    said = [
        f"{SHAPE_NAMES[name]}: {shape['ratio']:.2f} [{shape['ratio_low']:.2f}, {shape['ratio_high']:.2f}]"
        for name, shape in timed.items()
    ]
    return f" Time over the larger model's: {'; '.join(said)}."


def _table(found: Runs) -> str:
    """A line per way: loss after the cut and at the marks, perplexity, speed; mean and range over seeds."""

    def spread(values: list[float]) -> str:
        ends = f" [{w.number(min(values))}, {w.number(max(values))}]" if len(values) > 1 else ""
        return w.number(float(np.mean(values))) + ends

    places, lines = marks(found), []
    for way, several in found.items():
        lines.append([
            look_of(way).title, spread([p.curve(run)[1, 0] for run in several]),
            *(spread([loss_at(run, tokens) for run in several]) for tokens in places),
            spread([run["quality"]["value"] for run in several]) + _collapsed(several),
            spread([run["achieved"]["tokens_per_s"] for run in several]),
        ])  # fmt: skip
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


def _against_scratch(found: Runs) -> str:
    ways = [way for way in found if way != p.SCRATCH]
    made, lines = compared(found, [(way, p.SCRATCH) for way in ways]), []
    for way in ways:
        own = [one for one in made if one["first"] == way]
        said = [f"after {one['tokens']:,} tokens {seeds.verdict(one)} ({seeds.gap_text(one)})" for one in own]
        if said:
            lines.append(
                f"- {look_of(way).title}: {'; '.join(said)}; {crossover_text(found[way], found[p.SCRATCH])}."
            )
    title = "**Does it pay to start from the larger model?** Held-out loss minus that of the target shape from scratch"
    dead = _collapsed(found.get(p.SCRATCH, []))
    note = (
        f", which knows no more than word counts at the end{dead}: being ahead of it says little yet"
        if dead
        else ""
    )
    return f"{title}{note}:\n\n" + "\n".join(lines) if lines else ""


def _among(found: Runs) -> str:
    control = "magnitude-shape"
    made = compared(found, [(way, control) for way in ("sheared", "lora-prune")])
    last = [one for one in made if one["tokens"] == marks(found)[-1]]
    said = [f"{_named(one['first'])}: {seeds.verdict(one)} ({seeds.gap_text(one)})" for one in last]
    return (
        f"**Which units stay, against those of largest weights**, after all tokens: {'; '.join(said)}."
        if said
        else ""
    )


def _adapters(rows: list[dict], found: Runs) -> str:
    made = []
    for adapters in ("lora", "qlora"):
        for way, several in p.runs(rows, adapters).items():
            both = p.paired(several, found.get(way, []))
            gaps = [float(p.curve(one)[1, -1] - p.curve(other)[1, -1]) for one, other in both]
            if gaps:
                made.append({"way": way, "adapters": adapters, "gaps": gaps, "value": float(np.mean(gaps))})
    named = {"lora": "LoRA", "qlora": "QLoRA (4-bit weights under it)"}
    said = [
        f"{_named(one['way'])} with {named[one['adapters']]}: {seeds.verdict(one)} ({seeds.gap_text(one)})"
        for one in seeds.tested(made)
    ]
    return (
        f"**Recovery by adapters, against all weights**, last held-out loss: {'; '.join(said)}."
        if said
        else ""
    )


SECTION = Section(
    notebook="09_sheared_llama",
    title="Sheared to a target shape",
    question="Is a small model of a given shape better cut out of a larger one than trained from scratch, and up to how many tokens?",
    method=(
        "A LLaMA is brought to a target shape: by L0 masks with Lagrange multipliers (blocks, heads, hidden dimensions, "
        "channels), by importance read from adapters' gradients, by the size of its weights, or not at all: from random "
        "weights. Then all train on, on the same text, at a rate that stays constant after the warm-up, so that a curve may "
        "be read anywhere as a run that ended there. Differences are tested over seeds."
    ),
    findings=findings,
    summary=summary,
    drawings=(
        Drawing(
            "sheared-curves",
            "Held-out loss over tokens, a line per run; and how far each way is ahead of the target shape from scratch.",
            p.curves_figure,
            lambda rows: bool(p.runs(rows)),
        ),
        Drawing(
            "sheared-contexts",
            "Perplexity on texts as long as in training and longer, positions stretched or as they were.",
            p.contexts_figure,
            lambda rows: bool(p.contexts(rows)),
        ),
    ),
    caveats=(
        "A small model and short runs; the tokens that the larger model was trained on are not counted. The text is that which "
        "it was trained on, too. One learning rate for all that begins with trained weights, another for random ones, neither "
        "tuned for each. Peak memory includes the libraries."
    ),
)
