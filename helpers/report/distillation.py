"""The distillation section: what a small student keeps, and how much of that its teacher gave it."""

from collections import Counter
from statistics import mean

from helpers.figures import distillation as p
from helpers.report import cards, depth
from helpers.report import wording as w
from helpers.report.section import Drawing, Section
from lmcompress.results.labels import SHAPE_NAMES, loss_words
from lmcompress.results.rows import dense_of, model_task_of, model_tasks
from lmcompress.results.verdicts import adjusted, comparisons

HELD = 0.913 / 0.927  # DistilBERT's share of BERT's accuracy on SST-2 (Sanh et al. 2019, table 2)
CLOSE = 0.02  # how far from that share ours may be


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for pair in model_tasks(rows):
        dense, found = dense_of(rows, pair), p.groups(rows, pair)
        if dense is None or not found:
            continue
        quality = dense["quality"]
        verdicts = adjusted([row for row in rows if model_task_of(row) == pair])
        tests = _tests(rows, pair)
        text.append(f"### {pair[0]} on {pair[1]}")
        text.append(
            f"The dense model, which is the teacher: {dense['memory']['parameters']:,} parameters, "
            f"{w.bytes_text(depth.size(dense))}, {w.metric_name(quality['metric'])} "
            f"{w.with_interval(quality, quality['metric'])}."
        )
        lines = [_kind_line(kind, found, dense, verdicts, tests) for kind in p.KINDS]
        text.append("\n".join(line for line in lines if line))
        text.append(_ablation(rows, pair, tests))
        text.append(_table(rows, pair, dense, verdicts))
    text += _cache(rows)
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Per model and task: the first student that was both taught and trained on hard labels."""
    sentences = []
    for pair in model_tasks(rows):
        dense, found = dense_of(rows, pair), p.groups(rows, pair)
        kind = next((one for one in p.KINDS if {(one, "hard"), (one, "taught")} <= set(found)), None)
        if dense is None or kind is None:
            continue
        tests = _tests(rows, pair)
        taught, hard = found[kind, "taught"], found[kind, "hard"]
        sentences.append(
            f"**{pair[0]} on {pair[1]}.** A student ({p.KINDS[kind][0].lower()}, {depth.share(taught[0], dense)} of the "
            f"dense file), {quality_words(taught)}; on hard labels only, {quality_words(hard)}; dense "
            f"{w.number(dense['quality']['value'], dense['quality']['metric'])}. Taught against hard labels: "
            f"{_gain(taught, hard, tests)}."
        )
    return sentences


def _tests(rows: list[dict], pair: tuple[str, str]) -> dict:
    """Keys of two rows -> their tested difference, and a word for it."""
    return {tuple(one["keys"].values()): (one, word) for one, _, word in comparisons(rows, pair)}


def quality_words(own: list[dict]) -> str:
    """`accuracy 81.0 % [79.1, 82.9] (1 seed)`, or the mean and the range over several."""
    metric = own[0]["quality"]["metric"]
    name = w.metric_name(metric)
    values = [row["quality"]["value"] for row in own if row["quality"]["value"] is not None]
    collapsed = sum(bool(row["quality"]["collapsed"]) for row in own)
    note = f", collapsed in {collapsed} of {len(own)}" if collapsed else ""
    if len(own) == 1 or not values:
        return f"{name} {w.with_interval(own[0]['quality'], metric)} ({_seeds(len(own))}{note})"
    low, high = (w.number(end(values), metric).removesuffix(" %") for end in (min, max))
    return f"{name} {w.number(mean(values), metric)} (mean of {_seeds(len(own))}, {low} to {high}{note})"


def _seeds(count: int) -> str:
    return w.plural(count, "seed")


def _kind_line(kind: str, found: dict, dense: dict, verdicts: dict, tests: dict) -> str:
    """One student: what it is, its quality each way, and the tested differences."""
    ways = {way: found[kind, way] for way in p.WAYS if (kind, way) in found}
    if not ways:
        return ""
    first = next(iter(ways.values()))[0]
    parts = [f"{p.WAYS[way][0].lower()}, {quality_words(own)}" for way, own in ways.items()]
    blocks = first["achieved"].get("blocks") if kind != "pruned" else None
    size = f"{depth.share(first, dense)} of the bytes"
    if blocks:
        size = (
            ", ".join(f"{w.plural(count, 'block')} in the {stack}" for stack, count in blocks.items())
            + f", {size}"
        )
    text = f"- **{p.KINDS[kind][0]}** ({size}{speed(first)}): " + "; ".join(parts) + "."
    if {"hard", "taught"} <= set(ways):
        text += f" Taught against hard labels: {_gain(ways['taught'], ways['hard'], tests)}."
    if "taught" in ways:
        text += f" Taught against the dense model: {_to_dense(ways['taught'], verdicts)}."
    return text


def _gain(taught: list[dict], hard: list[dict], tests: dict) -> str:
    """The paired differences of taught minus hard labels, seed by seed."""
    by_seed = {row["seed"]: row for row in hard}
    pairs = [(row["key"], by_seed[row["seed"]]["key"]) for row in taught if row["seed"] in by_seed]
    return tested([tests[pair] for pair in pairs if pair in tests])


def tested(found: list[tuple[dict, str]]) -> str:
    """Tested differences over seeds: `better in 2 of 3 seeds, no measurable difference in 1 (mean +1.20 points)`."""
    if not found:
        return "not tested"
    (one, word), metric = found[0], found[0][0]["metric"]
    if len(found) == 1:
        return f"{word} ({w.difference_text(one['difference'], metric)}, 1 seed)"
    (word, count), *rest = Counter(word for _, word in found).most_common()
    words = ", ".join(
        [f"{word} in {count} of {_seeds(len(found))}", *(f"{other} in {n}" for other, n in rest)]
    )
    average = mean(one["difference"]["value"] for one, _ in found)
    text = w.difference_text(dict.fromkeys(("value", "low", "high"), average), metric)
    return f"{words} (mean {text.partition(' [')[0]})"


def _to_dense(own: list[dict], verdicts: dict) -> str:
    return tested([(row["quality"], verdicts[row["key"]][1]) for row in own if row["key"] in verdicts])


def samples_per_s(row: dict) -> tuple[str, float, float] | None:
    """The shape of the largest batch that is not decoding, and samples per second of the model and of the dense one."""
    shapes = {
        name: one
        for name, one in ((row["latency"] or {}).get("shapes") or {}).items()
        if "decode" not in name
    }
    if not shapes:
        return None
    name, shape = max(shapes.items(), key=lambda one: one[1]["batch"])
    return name, *(1e3 * shape["batch"] / shape[time] for time in ("median_ms", "dense_ms"))


def speed(row: dict) -> str:
    """`; 1,600 samples/s against 800 at batch 8, time 0.50 [0.48, 0.53] of dense`, or nothing."""
    rates = samples_per_s(row)
    if not rates:
        return ""
    name, ours, theirs = rates
    return (
        f"; {ours:,.0f} samples/s against {theirs:,.0f} at {SHAPE_NAMES.get(name, name)}, time "
        f"{_ratio(row, name)} of dense"
    )


def _ratio(row: dict, name: str) -> str:
    """`0.50 [0.48, 0.53]`: time over that of the dense model beside it, which drift leaves alone."""
    shape = row["latency"]["shapes"][name]
    return f"{shape['ratio']:.2f} [{shape['ratio_low']:.2f}, {shape['ratio_high']:.2f}]"


def _ablation(rows: list[dict], pair: tuple[str, str], tests: dict) -> str:
    """Other losses against the usual one, on the same student."""
    by_key = {row["key"]: row for row in p.ablation_rows(rows) if model_task_of(row) == pair}
    found: dict[str, list] = {}
    for (first, _), one in tests.items():
        if first in by_key:
            found.setdefault(", ".join(loss_words(by_key[first]["settings"])), []).append(one)
    lines = [
        (f"- {name}: {tested(several)}", [word for _, word in several]) for name, several in found.items()
    ]
    return w.tested_list(
        "**Other losses**, against soft labels alone at temperature 4, on the same student", lines
    )


def _table(rows: list[dict], pair: tuple[str, str], dense: dict, verdicts: dict) -> str:
    """Every setting once, over its seeds."""
    settings: dict[str, list[dict]] = {}
    for row in rows:
        if model_task_of(row) == pair and row["key"] in verdicts:
            settings.setdefault(f"{row['technique']} {sorted(row['settings'].items(), key=str)}", []).append(
                row
            )
    lines = [["Dense", f"{dense['memory']['parameters']:,}", w.bytes_text(depth.size(dense)), "",
              quality_words([dense]).partition(" (")[0], "baseline"]]  # fmt: skip
    for own in settings.values():
        rate = samples_per_s(own[0])
        lines.append([
            w.label_of(own[0]), f"{own[0]['memory']['parameters']:,}", w.bytes_text(depth.size(own[0])),
            _ratio(own[0], rate[0]) if rate else "", quality_words(own), _to_dense(own, verdicts),
        ])  # fmt: skip
    header = ["Asked", "Parameters", "Bytes", "Time / dense time", "Quality", "Against dense (Holm)"]
    table = w.with_column([header, *lines], w.likelihood_column(dense, list(settings.values())))
    return w.folded(f"All {w.plural(len(lines), 'setting')}", table)


def _cache(rows: list[dict]) -> list[str]:
    """What it saved to keep the teacher's outputs."""
    text = []
    for row in (one for one in rows if one["technique"] == "teacher-cache"):
        found, asked = row["achieved"], row["settings"]
        fresh, kept = ([min(found[name]), max(found[name])] for name in ("asked_s", "kept_s"))
        seen = asked["steps"] * asked["batch_size"] / asked["examples"]
        saved = w.percent(round(1 - mean(found["kept_s"]) / mean(found["asked_s"]), 2))
        verdict = (
            f"{saved} less on average" if kept[1] < fresh[0] else "the runs overlap, no measurable saving"
        )
        gap = f"differ by at most {found['loss_gap']:.0e}" if found["loss_gap"] else "are the same"
        text.append(
            f"**The teacher's outputs kept** ({row['model']}). {w.plural(asked['steps'], 'step')} of {asked['batch_size']} that see each "
            f"of {asked['examples']} examples {w.plural(round(seen), 'time')}: {fresh[0]:.1f} to {fresh[1]:.1f} s with the teacher asked "
            f"at every step, {kept[0]:.1f} to {kept[1]:.1f} s with its logits computed once at the start (included): "
            f"{verdict}. The losses {gap}."
        )
    return text


def _cards(rows: list[dict]) -> list[cards.Card]:
    """Published figures of students beside ours."""
    ours, share, random = "", None, ""
    for pair in (one for one in model_tasks(rows) if one[1] == "sst2"):
        dense, found = dense_of(rows, pair), p.groups(rows, pair)
        if dense and (own := found.get(("copied", "taught"))):
            share = mean(row["quality"]["value"] for row in own) / dense["quality"]["value"]
            ours = f"{pair[0]}, {quality_words(own)}: {w.percent(share)} of its teacher's"
        if dense and (own := found.get(("random", "taught"))):
            random = f"; {pair[0]}: {w.number(dense['quality']['value'], 'accuracy')} to {quality_words(own)}"
    near = share is not None and abs(share - HELD) <= CLOSE
    return [
        cards.Card(
            f"DistilBERT on SST-2: 91.3 of BERT's 92.7, {w.percent(HELD)}",
            "half the blocks copied, distilled on a large corpus, then fine-tuned",
            ours or "`make report PROFILE=reference`",
            "reproduced" if near else "not reproduced" if ours else cards.CANNOT,
            "hundreds of steps on SST-2 alone",
            w.percent(CLOSE),
        ),
        cards.Card(
            "accuracy .96 to .90, 1355.6 to 346.5 MB, 56.5 to 545 samples/s",
            "RoBERTa-large to a random student of 3 blocks, SST-2, 20 epochs",
            "`make notebook NB=04 PROFILE=paper`" + random,
            cards.CANNOT,
            "needs the Hub and a GPU",
        ),
        cards.Card(
            "MNLI accuracy 83.7 to 83.5 (6 blocks), 81.8 (3 blocks), 82.0 (4, narrower)",
            "BERT, TextBrewer (Yang et al. 2020)",
            "`python -m helpers.run.runner --only 04 -p encoder=<BERT fine-tuned on MNLI> -p encoder_task=mnli.csv`",
            cards.CANNOT,
            "needs the Hub and a GPU; MNLI is a file of one's own here",
        ),
    ]


SECTION = Section(
    notebook="04_distillation",
    title="Distillation",
    question="How small can a student be, and what does its teacher give it that the labels alone do not?",
    method=(
        "A student with some of the dense model's blocks, one of that shape with random weights, a narrower one, and a "
        "pruned model learn from the dense model's softened outputs (TextBrewer). The controls get the same steps on hard "
        "labels alone, or none. The soft loss is TextBrewer's, which leaves out the factor T² of Hinton et al. (2015). "
        "Ranges are over seeds, which draw training examples, their order, and random weights; differences between two "
        "students are tested per seed, on the same examples."
    ),
    findings=findings,
    summary=summary,
    cards=_cards,
    drawings=(
        Drawing(
            "distillation-quality",
            "Quality of students; a marker with its 95 % interval per seed, a bar at the mean; star and band: dense.",
            p.quality_figure,
            lambda rows: any(p.way_of(row) for row in rows),
        ),
        Drawing(
            "distillation-curves",
            "Training and held-out losses; bands: range over seeds.",
            p.curve_figure,
            lambda rows: any(p.way_of(row) and p.curves(row) for row in rows),
        ),
        Drawing(
            "distillation-ablation",
            "The same student under other losses, 95 % intervals; band: the usual loss.",
            p.ablation_figure,
            lambda rows: bool(p.ablation_rows(rows)),
        ),
    ),
    caveats=(
        "Few steps, where published students train for many epochs on a large corpus: a longer run may change "
        "the order. Learning rates were given, not tuned for each student. Seeds vary training, not the text scored."
    ),
)
