"""The architecture section: what a nonlinearity on every head's output is worth, against a block more."""

from helpers.report import architecture_table, cards
from helpers.report import rows_architecture as p
from helpers.report import wording as w
from helpers.report.architecture_gaps import (
    at_equal_latency,
    loss_at,
    over_depths,
    over_seeds,
    perplexity,
    spread,
)
from helpers.report.section import Section, drawings
from helpers.report.seeds import gap_text, verdict
from lmcompress.results.verdicts import NO_DIFFERENCE, comparisons

PUBLISHED = {"5": 128_789_504, "6": 141_440_000, "7": 154_090_496, "8": 166_740_992}


def findings(rows: list[dict]) -> list[str]:
    """Return the section's paragraphs in Markdown, scale by scale where there are several."""
    scales = p.scales(rows) if p.trained(rows) else []
    paragraphs = [_counts(rows)] if scales else []
    for scale in scales:
        scale_rows = p.of_scale(rows, scale)
        paragraphs += [_scale_title(scale_rows, scale)] if len(scales) > 1 else []
        paragraphs += _of_one_scale(scale_rows)
    return paragraphs


def _scale_title(rows: list[dict], scale: str) -> str:
    sizes = [run["achieved"]["parameters"] for runs in p.trained(rows).values() for run in runs]
    return f"### Scale `{scale}`: {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} million parameters"


def _of_one_scale(rows: list[dict]) -> list[str]:
    trained = p.trained(rows)
    runs = [run for seeds in trained.values() for run in seeds]
    by_tokens = over_seeds(trained, perplexity)
    return [
        f"{len(runs)} models of {len(trained)} shapes, {max(run['achieved']['tokens'] for run in runs):,} "
        f"tokens each; runs of one seed saw the same batches.{_floor(runs)} In the table, brackets behind a "
        "quality are the range over seeds; milliseconds are of several minutes, ratios of the baseline "
        "timed beside each.",
        _speed(runs),
        architecture_table.shape_table(rows, trained),
        _gaps("At equal tokens**, perplexity", over_depths(by_tokens), by_tokens),
        _equal_time(rows, trained),
        _gaps("At equal latency** (per decoded token), perplexity", [], at_equal_latency(trained)),
        _one_seed(trained),
        _spread(trained, by_tokens),
        _control(by_tokens),
        _block(by_tokens),
        _same_text(rows, runs[0]),
    ]


def _floor(runs: list[dict]) -> str:
    """What a model that knows only how often each token occurs would score on the same text."""
    floors = {round(run["quality"]["floor"], 1) for run in runs if run["quality"]["floor"]}
    return (
        f" The unigram model has perplexity {w.listing([w.number(floor) for floor in sorted(floors)])}."
        if floors
        else ""
    )


def _speed(runs: list[dict]) -> str:
    """How fast the largest model was trained, and what share of the device's matrix products that is."""
    compiled = [
        run for run in runs if run["achieved"].get("compiled")
    ]  # small ones are timed apart, in turns
    if not compiled:
        return ""
    run = max(compiled, key=lambda compiled_run: compiled_run["achieved"]["parameters"])
    achieved = run["achieved"]
    name = p.name_of((run["settings"]["layers"], run["settings"]["phi"]))
    return (
        f"The largest ({name}) was trained at {achieved['step_tokens_per_s']:,.0f} tokens a second on "
        f"{achieved['device']} in {achieved['dtype']}{', compiled' if achieved['compiled'] else ''}: "
        f"{w.percent(achieved['matmul_share'])} of the {achieved['matmul_ceiling_gflops'] / 1e3:,.1f} "
        "TFLOP/s that matrix products reached there."
    )


def _one_seed(trained: dict[p.Shape, list[dict]]) -> str:
    seeds = {run["seed"] for runs in trained.values() for run in runs}
    return (
        "One seed only at this scale: the differences are of single models, and no test over seeds says how "
        "far chance alone carries. The smaller scale's spread over seeds is the nearest thing to it."
        if len(seeds) == 1
        else ""
    )


def summary(rows: list[dict]) -> list[str]:
    """Say whether φ bought back a block, over all depths, and whether SiLU has a part in it."""
    scales, sentences = p.scales(rows), []
    for scale in scales:
        words = _summed(p.of_scale(rows, scale))
        where = f" (scale `{scale}`)" if len(scales) > 1 else ""
        sentences += (
            [f"**A nonlinearity on every head, against a block more**{where}, by perplexity: {words}."]
            if words
            else []
        )
    return sentences


def _summed(rows: list[dict]) -> str:
    single = over_seeds(p.trained(rows), perplexity)
    deeper = [gap for gap in over_depths(single) if gap["more"] > 0] or [
        gap for gap in single if gap["second"][0] > gap["first"][0]
    ]
    alike = [gap for gap in over_depths(single) if gap["more"] == 0 and gap["kind"] != "linear"]
    words = [
        f"{gap['words']}: {verdict(gap)} ({gap_text(gap)})"
        for gap in alike + deeper + _controls(single) + _blocks(single)
    ]
    return "; ".join(words) if deeper else ""


def _gaps(title: str, pooled: list[dict], single: list[dict]) -> str:
    """List tested gaps: pooled over depths first, then the control; single shapes where seeds can tell."""
    first = pooled + _controls(single) if pooled else single
    others_tested = [gap for gap in single if gap not in first and len(gap["gaps"]) > 1]
    lines, more = (
        "\n".join(f"- {gap['words']}: {verdict(gap)} ({gap_text(gap)})" for gap in gaps)
        for gaps in (first, others_tested)
    )
    lists = [
        f"**{title}:",
        lines,
        w.folded(f"Shape by shape: {len(others_tested)} more comparisons", more) if others_tested else "",
    ]
    return "\n\n".join(gaps for gaps in lists if gaps) if first else ""


def _equal_time(rows: list[dict], trained: dict[p.Shape, list[dict]]) -> str:
    """Read the curves where each shape had trained as long as the fastest in all; times are of a step."""
    steps = p.step_times(rows)
    timed = {shape: runs for shape, runs in trained.items() if shape in steps}
    if not timed:
        return ""
    fastest = min(timed, key=lambda shape: steps[shape]["ratio"])

    def value(run: dict) -> float:
        shape = run["settings"]["layers"], run["settings"]["phi"]
        return loss_at(run, run["achieved"]["tokens"] * steps[fastest]["ratio"] / steps[shape]["ratio"])

    single = over_seeds(timed, value)
    title = f"At equal training time**, held-out loss when {p.name_of(fastest)} ended"
    title += ", by the time of a training step taken in turns"
    return _gaps(title, over_depths(single), single)


def _spread(trained: dict[p.Shape, list[dict]], gaps: list[dict]) -> str:
    """How far chance alone carries: the spread over seeds beside the gaps."""
    between = spread(trained)
    if between is None or not gaps:
        return ""
    return (
        "**Chance.** Between seeds, the perplexity of one shape has a standard deviation of "
        f"{w.number(between)} (pooled over shapes): a gap of that size between two single runs says nothing."
    )


def _controls(single: list[dict]) -> list[dict]:
    return [gap for gap in single if gap["second"][1] == "linear"]


def _blocks(single: list[dict]) -> list[dict]:
    """Models without φ against those with one block less: over all depths, or the one there is."""
    alone = [gap for gap in single if gap["second"][0] < gap["first"][0]]
    return over_depths(alone) or alone


def _block(single: list[dict]) -> str:
    """What a block is worth where there is no φ: the price that φ is to pay."""
    lines = []
    for _block in _blocks(single):
        word = verdict(_block)
        why = {
            "better": ", so there is a block to buy back",
            "worse": ", so at this budget there is no block to buy back",
            NO_DIFFERENCE: f" ({gap_text(_block)}), so that there is no telling whether there is one to buy "
            f"back",
        }
        lines.append(f"{_block['words']}: {word}{why.get(word, '')}")
    return f"**What a block is worth**: {'; '.join(lines)}." if lines else ""


def _control(single: list[dict]) -> str:
    """What φ without its nonlinearity gives: the same parameters and the same further step per layer."""
    words = {
        "better": "so the nonlinearity itself has a part in what φ does",
        "worse": "so the nonlinearity is a loss",
        NO_DIFFERENCE: "so nothing here speaks for the nonlinearity itself",
    }
    lines = []
    for _control in _controls(single):
        word = verdict(_control)
        why = words.get(word, "which decides nothing")
        bare = next(
            (verdict(o) for o in single if o["first"] == _control["second"] and o["second"][1] == "none"),
            "not compared",
        )
        lines.append(
            f"{_control['words']}: {word}, {why}; {p.name_of(_control['second'])} against none: {bare}"
        )
    return f"**The control**, P z + p alone: {'; '.join(lines)}." if lines else ""


def _same_text(rows: list[dict], run: dict) -> str:
    """How the pairs of trained models compare on the windows they were both scored on."""
    words = [word for *_, word in comparisons(rows, (run["model"], run["task"]))]
    return (
        f"Of {w.plural(len(words), 'pair')} of single trained models, φ against none, same seed, same "
        f"windows of text, after Holm's correction: {w.tally(words)}. Such a test speaks of two trained "
        "models; only seeds speak of architectures."
        if words
        else ""
    )


def _counts(rows: list[dict]) -> str:
    row = next((row for row in rows if row["technique"] == "parameter-counts"), None)
    if row is None:
        return ""
    plain, with_phi = (row["achieved"]["counts"][phi] for phi in ("none", "shared"))
    right = sum(plain.get(layers) == published for layers, published in PUBLISHED.items())
    counts = w.listing(
        [f"{count:,} (φ adds {with_phi[layers] - count:,})" for layers, count in plain.items()]
    )
    return f"At full scale: {counts} parameters; as published without φ in {right} of {len(PUBLISHED)}."


def _cards(rows: list[dict]) -> list[cards.Card]:
    row = next((row for row in rows if row["technique"] == "parameter-counts"), None)
    if row is None:
        return []
    plain = row["achieved"]["counts"]["none"]
    same = all(plain.get(layers) == expected for layers, expected in PUBLISHED.items())
    counts = (", ".join(f"{count:,}" for count in by_layers.values()) for by_layers in (PUBLISHED, plain))
    word = "reproduced" if same else "not reproduced"
    return [
        cards.Card(
            f"{next(counts)} parameters",
            "5, 6, 7, 8 layers at full scale, no φ",
            next(counts),
            word,
            "counted, not trained",
            "none",
        )
    ]


SECTION = Section(
    notebook="08_architecture_training",
    findings=lambda rows: [paragraph for paragraph in findings(rows) if paragraph],
    summary=summary,
    cards=_cards,
    drawings=drawings("architecture-training"),
)
