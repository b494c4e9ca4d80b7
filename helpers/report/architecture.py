"""The architecture section: what a nonlinearity on every head's output is worth, against a block more."""

from functools import partial

from helpers.figures import architecture as p
from helpers.report import architecture_table, cards
from helpers.report import wording as w
from helpers.report.architecture_gaps import (
    at_equal_latency,
    loss_at,
    over_depths,
    over_seeds,
    perplexity,
    spread,
)
from helpers.report.section import Drawing, Section
from helpers.report.seeds import gap_text, verdict
from lmcompress.results.verdicts import comparisons

PUBLISHED = {"5": 128_789_504, "6": 141_440_000, "7": 154_090_496, "8": 166_740_992}


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row; scale by scale where there are several."""
    scales = p.scales(rows)
    found = [_counts(rows)] if scales else []
    for scale in scales:
        own = p.of_scale(rows, scale)
        found += [_scale_title(own, scale)] if len(scales) > 1 else []
        found += _of_one_scale(own)
    return found


def _scale_title(rows: list[dict], scale: str) -> str:
    sizes = [run["achieved"]["parameters"] for runs in p.trained(rows).values() for run in runs]
    return f"### Scale `{scale}`: {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} million parameters"


def _of_one_scale(rows: list[dict]) -> list[str]:
    found = p.trained(rows)
    runs = [run for ones in found.values() for run in ones]
    by_tokens = over_seeds(found, perplexity)
    return [
        f"{len(runs)} models of {len(found)} shapes, {max(run['achieved']['tokens'] for run in runs):,} tokens each; "
        f"runs of one seed saw the same batches.{_floor(runs)} In the table, brackets behind a quality are the range over "
        "seeds; milliseconds are of several minutes, ratios of the baseline timed beside each.",
        _speed(runs),
        architecture_table.shape_table(rows, found),
        _gaps("At equal tokens**, perplexity", over_depths(by_tokens), by_tokens),
        _equal_time(rows, found),
        _gaps("At equal latency** (per decoded token), perplexity", [], at_equal_latency(found)),
        _one_seed(found),
        _spread(found, by_tokens),
        _control(by_tokens),
        _block(by_tokens),
        _same_text(rows, runs[0]),
    ]


def _floor(runs: list[dict]) -> str:
    """What a model that knows only how often each token occurs would score on the same text."""
    floors = {round(run["quality"]["floor"], 1) for run in runs if run["quality"]["floor"]}
    return (
        f" The unigram model has perplexity {w.listing([w.number(one) for one in sorted(floors)])}."
        if floors
        else ""
    )


def _speed(runs: list[dict]) -> str:
    """How fast the largest model was trained, and what share of the device's matrix products that is."""
    told = [run for run in runs if run["achieved"].get("compiled")]  # small ones are timed apart, in turns
    if not told:
        return ""
    run = max(told, key=lambda one: one["achieved"]["parameters"])
    made = run["achieved"]
    name = p.name_of((run["settings"]["layers"], run["settings"]["phi"]))
    return (
        f"The largest ({name}) was trained at {made['step_tokens_per_s']:,.0f} tokens a second on {made['device']} in "
        f"{made['dtype']}{', compiled' if made['compiled'] else ''}: {w.percent(made['matmul_share'])} of the "
        f"{made['matmul_ceiling_gflops'] / 1e3:,.1f} TFLOP/s that matrix products reached there."
    )


def _one_seed(found: dict[p.Shape, list[dict]]) -> str:
    seeds = {run["seed"] for runs in found.values() for run in runs}
    return (
        "One seed only at this scale: the differences are of single models, and no test over seeds says how far chance "
        "alone carries. The smaller scale's spread over seeds is the nearest thing to it."
        if len(seeds) == 1
        else ""
    )


def summary(rows: list[dict]) -> list[str]:
    """Whether φ bought back a block, over all depths where there are several, and whether SiLU has a part in it."""
    scales, found = p.scales(rows), []
    for scale in scales:
        words = _summed(p.of_scale(rows, scale))
        place = f" (scale `{scale}`)" if len(scales) > 1 else ""
        found += (
            [f"**A nonlinearity on every head, against a block more**{place}, by perplexity: {words}."]
            if words
            else []
        )
    return found


def _summed(rows: list[dict]) -> str:
    single = over_seeds(p.trained(rows), perplexity)
    deeper = [one for one in over_depths(single) if one["more"] > 0] or [
        one for one in single if one["second"][0] > one["first"][0]
    ]
    alike = [one for one in over_depths(single) if one["more"] == 0 and one["kind"] != "linear"]
    words = [
        f"{one['words']}: {verdict(one)} ({gap_text(one)})"
        for one in alike + deeper + _controls(single) + _blocks(single)
    ]
    return "; ".join(words) if deeper else ""


def _gaps(title: str, pooled: list[dict], single: list[dict]) -> str:
    """Tested gaps: what is pooled over depths first, and then the control; shape by shape only where seeds can tell."""
    first = pooled + _controls(single) if pooled else single
    rest = [one for one in single if one not in first and len(one["gaps"]) > 1]
    lines, more = (
        "\n".join(f"- {one['words']}: {verdict(one)} ({gap_text(one)})" for one in part)
        for part in (first, rest)
    )
    parts = [
        f"**{title}:",
        lines,
        w.folded(f"Shape by shape: {len(rest)} more comparisons", more) if rest else "",
    ]
    return "\n\n".join(part for part in parts if part) if first else ""


def _equal_time(rows: list[dict], found: dict[p.Shape, list[dict]]) -> str:
    """The curves read where each shape had trained as long as the fastest did in all; times are those of a step."""
    steps = p.step_times(rows)
    known = {shape: runs for shape, runs in found.items() if shape in steps}
    if not known:
        return ""
    fastest = min(known, key=lambda shape: steps[shape]["ratio"])

    def value(run: dict) -> float:
        shape = run["settings"]["layers"], run["settings"]["phi"]
        return loss_at(run, run["achieved"]["tokens"] * steps[fastest]["ratio"] / steps[shape]["ratio"])

    single = over_seeds(known, value)
    title = f"At equal training time**, held-out loss when {p.name_of(fastest)} ended"
    title += ", by the time of a training step taken in turns"
    return _gaps(title, over_depths(single), single)


def _spread(found: dict[p.Shape, list[dict]], made: list[dict]) -> str:
    """How far chance alone carries: the spread over seeds beside the gaps."""
    between = spread(found)
    if between is None or not made:
        return ""
    return (
        f"**Chance.** Between seeds, the perplexity of one shape has a standard deviation of {w.number(between)} "
        "(pooled over shapes): a gap of that size between two single runs says nothing."
    )


def _controls(single: list[dict]) -> list[dict]:
    return [one for one in single if one["second"][1] == "linear"]


def _blocks(single: list[dict]) -> list[dict]:
    """Models without φ against those with one block less: over all depths, or the one there is."""
    alone = [one for one in single if one["second"][0] < one["first"][0]]
    return over_depths(alone) or alone


def _block(single: list[dict]) -> str:
    """What a block is worth where there is no φ: the price that φ is to pay."""
    lines = []
    for one in _blocks(single):
        word = verdict(one)
        why = {
            "better": ", so there is a block to buy back",
            "worse": ", so at this budget there is no block to buy back",
            "no measurable difference": f" ({gap_text(one)}), so that there is no telling whether there is one to buy back",
        }
        lines.append(f"{one['words']}: {word}{why.get(word, '')}")
    return f"**What a block is worth**: {'; '.join(lines)}." if lines else ""


def _control(single: list[dict]) -> str:
    """What φ without its nonlinearity gives: the same parameters and the same further step per layer."""
    said = {
        "better": "so the nonlinearity itself has a part in what φ does",
        "worse": "so the nonlinearity is a loss",
        "no measurable difference": "so nothing here speaks for the nonlinearity itself",
    }
    lines = []
    for one in _controls(single):
        word = verdict(one)
        why = said.get(word, "which decides nothing")
        bare = next(
            (verdict(o) for o in single if o["first"] == one["second"] and o["second"][1] == "none"),
            "not compared",
        )
        lines.append(f"{one['words']}: {word}, {why}; {p.name_of(one['second'])} against none: {bare}")
    return f"**The control**, P z + p alone: {'; '.join(lines)}." if lines else ""


def _same_text(rows: list[dict], run: dict) -> str:
    """How the pairs of trained models compare on the windows they were both scored on."""
    made = [word for *_, word in comparisons(rows, (run["model"], run["task"]))]
    return (
        f"Of {w.plural(len(made), 'pair')} of single trained models, φ against none, same seed, same windows of text, after "
        f"Holm's correction: {w.tally(made)}. Such a test speaks of two trained models; only seeds speak of architectures."
        if made
        else ""
    )


def _counts(rows: list[dict]) -> str:
    row = next((row for row in rows if row["technique"] == "parameter-counts"), None)
    if row is None:
        return ""
    plain, with_phi = (row["achieved"]["counts"][phi] for phi in ("none", "shared"))
    right = sum(plain.get(layers) == wanted for layers, wanted in PUBLISHED.items())
    said = w.listing([f"{one:,} (φ adds {with_phi[layers] - one:,})" for layers, one in plain.items()])
    return f"At full scale: {said} parameters; as published without φ in {right} of {len(PUBLISHED)}."


def _cards(rows: list[dict]) -> list[cards.Card]:
    row = next((row for row in rows if row["technique"] == "parameter-counts"), None)
    if row is None:
        return []
    plain = row["achieved"]["counts"]["none"]
    same = all(plain.get(layers) == wanted for layers, wanted in PUBLISHED.items())
    counts = (", ".join(f"{one:,}" for one in found.values()) for found in (PUBLISHED, plain))
    word = "reproduced" if same else "not reproduced"
    return [cards.Card(f"{next(counts)} parameters", "5, 6, 7, 8 layers at full scale, no φ", next(counts), word,
                       "counted, not trained", "none")]  # fmt: skip


SECTION = Section(
    notebook="08_architecture_training",
    title="A nonlinearity on every head",
    question="Does a nonlinearity on every attention head's output, before the heads are joined, buy back a block?",
    method=(
        "LLaMA-shaped models of several depths are trained from scratch, without and with φ(z) = SiLU(P z + p) on every "
        "head's output, P shared by the heads of a layer, and where said, as a control, without SiLU. Perplexity is of held-out text; BLEU and ROUGE compare greedy "
        "continuations with what followed. A difference is tested over seeds, each with its own weights and batches, with Holm's correction in each list. The "
        "learning rate is constant, so that a curve may be read anywhere as a run that ended there."
    ),
    findings=lambda rows: [paragraph for paragraph in findings(rows) if paragraph],
    summary=summary,
    cards=_cards,
    drawings=(
        Drawing(
            "architecture-training",
            "Held-out loss over tokens and over time, a line per run; perplexity over parameters and over latency.",
            partial(p.architecture_figure, scale=0),
            lambda rows: bool(p.scales(rows)),
        ),
        Drawing(
            "architecture-full",
            "The same at the published widths, one run of each shape.",
            partial(p.architecture_figure, scale=-1),
            lambda rows: len(p.scales(rows)) > 1,
        ),
    ),
    caveats=(
        "Small models, few seeds, one learning rate for all shapes, which may suit one kind better than another. Training time is that of a step, taken in turns; "
        "the clock of the runs themselves is not used. BLEU against a single reference says little of open-ended text."
    ),
)
