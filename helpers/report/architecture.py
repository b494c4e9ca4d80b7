"""The architecture section: what a nonlinearity on every head's output is worth, against a block more."""

from collections.abc import Callable

import numpy as np

from helpers import plots_architecture as p
from helpers.report import cards, seeds
from helpers.report import wording as w
from helpers.report.section import Drawing, Section

PUBLISHED = {"5": 128_789_504, "6": 141_440_000, "7": 154_090_496, "8": 166_740_992}
Value = Callable[[dict], float]


def perplexity(run: dict) -> float:
    """What a run scored."""
    return run["quality"]["value"]


def loss_at(run: dict, seconds: float) -> float:
    """Held-out loss of a run when it had trained for so long, between the points of its curve."""
    _, losses, times, _ = np.array(run["achieved"]["validation"]).T
    return float(np.interp(seconds, times, losses))


def over_seeds(found: dict[p.Shape, list[dict]], value: Value) -> list[dict]:
    """Depths with φ against as deep and one block deeper without: the mean gap of `value` over seeds, and its test.

    The interval is the t-test's over the seeds' gaps, p is Holm-adjusted; with one seed there is neither.
    """
    made = []
    for first in (shape for shape in found if shape[1] != "none"):
        for second in ((first[0], "none"), (first[0] + 1, "none")):
            other = {run["seed"]: value(run) for run in found.get(second, [])}
            gaps = [value(run) - other[run["seed"]] for run in found[first] if run["seed"] in other]
            if gaps:
                made.append({"first": first, "second": second, "gaps": gaps, "value": float(np.mean(gaps))})
    return seeds.tested(made)


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    found = p.trained(rows)
    if not found:
        return []
    runs = [run for ones in found.values() for run in ones]
    budget = min(run["achieved"]["seconds"] for run in runs)
    return [
        f"{len(runs)} models of {len(found)} shapes, {max(run['achieved']['tokens'] for run in runs):,} tokens each; "
        "runs of one seed saw the same batches.",
        _counts(rows),
        _table(rows, found),
        _gaps("At equal tokens**, perplexity", over_seeds(found, perplexity)),
        _gaps(
            f"At equal time**, held-out loss after {w.number(budget)} s, when the fastest run ended",
            over_seeds(found, lambda run: loss_at(run, budget)),
        ),
        _same_text(rows, runs[0]),
    ]


def summary(rows: list[dict]) -> list[str]:
    """Whether φ bought back a block."""
    made = [one for one in over_seeds(p.trained(rows), perplexity) if one["second"][0] > one["first"][0]]
    words = [
        f"{p.name_of(one['first'])}, against {p.name_of(one['second'])}: {seeds.verdict(one)}" for one in made
    ]
    return [f"**A nonlinearity on every head, against a block more**: {'; '.join(words)}."] if words else []


def _gaps(title: str, made: list[dict]) -> str:
    lines = [
        f"- {p.name_of(one['first'])}, against {p.name_of(one['second'])}: {seeds.verdict(one)} ({seeds.gap_text(one)})"
        for one in made
    ]
    return f"**{title}:\n\n" + "\n".join(lines) if lines else ""


def _same_text(rows: list[dict], run: dict) -> str:
    """How the pairs of trained models compare on the windows they were both scored on."""
    made = [word for *_, word in w.comparisons(rows, (run["model"], run["task"]))]
    counts = [f"{made.count(word)} {word}" for word in dict.fromkeys(made)]
    return (
        "Of pairs of single trained models (φ against none, same seed, same windows of text, Holm's correction) "
        f"{w.listing(counts)}. Such a test speaks of two trained models; only seeds speak of architectures."
        if made
        else ""
    )


def _table(rows: list[dict], found: dict[p.Shape, list[dict]]) -> str:
    """A line per shape: size, quality, speed; mean and range over seeds."""
    texts, lines = p.trained(rows, "bleu"), []

    def spread(runs: list[dict], value: Value) -> str:
        values = [value(run) for run in runs]
        ends = f" [{w.number(min(values))}, {w.number(max(values))}]" if len(values) > 1 else ""
        return w.number(float(np.mean(values))) + ends if values else ""

    def secondary(name: str) -> Value:
        return lambda run: run["quality"]["secondary"][name]["value"]

    for shape, runs in found.items():
        generated, times = texts.get(shape, []), [p.timed(runs, part) for part in ("prefill_b1", "decode_b1")]
        lines.append([
            p.name_of(shape), f"{runs[0]['achieved']['parameters']:,}", spread(runs, perplexity),
            spread(runs, secondary("bits_per_byte")), spread(generated, perplexity),
            spread(generated, secondary("rougeL")), spread(runs, lambda run: run["achieved"]["tokens_per_s"]),
            *(f"{t['median_ms']:.2f} [{t['p5_ms']:.2f}, {t['p95_ms']:.2f}]" if t else "" for t in times),
            f"{times[1]['ratio']:.2f} [{times[1]['ratio_low']:.2f}, {times[1]['ratio_high']:.2f}]" if times[1] else "",
        ])  # fmt: skip
    header = ["Model", "Parameters", "Perplexity", "Bits per byte", "BLEU", "ROUGE-L", "Trained tokens/s"]
    header += ["Prefill (ms; 5 and 95 %)", "Per token (ms; 5 and 95 %)", "Per token / baseline"]
    return w.table(header, lines)


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
    verdict = "reproduced" if same else "not reproduced"
    return [cards.Card(f"{next(counts)} parameters", "5, 6, 7, 8 layers at full scale, no φ", next(counts), verdict,
                       "counted, not trained", "none")]  # fmt: skip


SECTION = Section(
    notebook="08_architecture_training",
    title="A nonlinearity on every head",
    question="Does a nonlinearity on every attention head's output, before the heads are joined, buy back a block?",
    method=(
        "LLaMA-shaped models of several depths are trained from scratch, without and with φ(z) = SiLU(P z + p) on every "
        "head's output, P shared by the heads of a layer. Perplexity is of held-out text; BLEU and ROUGE compare greedy "
        "continuations with what followed. A difference is tested over seeds, each with its own weights and batches."
    ),
    findings=lambda rows: [paragraph for paragraph in findings(rows) if paragraph],
    summary=summary,
    cards=_cards,
    drawings=(
        Drawing(
            "architecture-training",
            "Held-out loss over tokens and over time, a line per run; perplexity over parameters and over latency.",
            p.architecture_figure,
            lambda rows: bool(p.trained(rows)),
        ),
    ),
    caveats=(
        "Small models, few seeds, one learning rate for all shapes. Training times include validation, and runs came one "
        "after the other. BLEU against a single reference says little of open-ended text."
    ),
)
