"""The distillation section: what a small student keeps, and how much of that its teacher gave it."""

from collections import Counter
from statistics import mean

from helpers.report import cards, depth
from helpers.report import rows_distillation as p
from helpers.report import wording as w
from helpers.report.section import Section, drawings
from lmcompress.results.labels import SHAPE_NAMES, loss_words
from lmcompress.results.rows import dense_of, model_task_of, model_tasks, scored_rows, shapes_of
from lmcompress.results.verdicts import comparisons, families

HELD = 0.913 / 0.927  # DistilBERT's share of BERT's accuracy on SST-2 (Sanh et al. 2019, table 2)
CLOSE = 0.02  # how far from that share ours may be


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for model_task, dense, _, verdicts in families(rows):
        quality, groups = dense["quality"], p.groups(rows, model_task)
        if not groups:
            continue
        tests = _tests(rows, model_task)
        text.append(f"### {model_task[0]} on {model_task[1]}")
        text.append(
            f"The dense model, which is the teacher: {dense['memory']['parameters']:,} parameters, "
            f"{w.bytes_text(depth.size(dense))}, {w.metric_name(quality['metric'])} "
            f"{w.with_interval(quality, quality['metric'])}."
        )
        lines = [_kind_line(kind, groups, dense, verdicts, tests) for kind in p.KINDS]
        text.append("\n".join(line for line in lines if line))
        text.append(_ablation(rows, model_task, tests))
        text.append(_table(rows, model_task, dense, verdicts))
    text += _cache(rows)
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Per model and task: the first student that was both taught and trained on hard labels."""
    sentences = []
    for model_task in model_tasks(rows):
        dense, groups = dense_of(rows, model_task), p.groups(rows, model_task)
        kind = next(
            (student for student in p.KINDS if {(student, "hard"), (student, "taught")} <= set(groups)), None
        )
        if dense is None or kind is None:
            continue
        tests = _tests(rows, model_task)
        taught, hard = groups[kind, "taught"], groups[kind, "hard"]
        sentences.append(
            f"**{model_task[0]} on {model_task[1]}.** A student ({p.KINDS[kind][0].lower()}, "
            f"{depth.share(taught[0], dense)} of the "
            f"dense file), {quality_words(taught)}; on hard labels only, {quality_words(hard)}; dense "
            f"{w.number(dense['quality']['value'], dense['quality']['metric'])}. Taught against hard labels: "
            f"{_gain(taught, hard, tests)}."
        )
    return sentences


def _tests(rows: list[dict], model_task: tuple[str, str]) -> dict:
    """Keys of two rows -> their tested difference, and a word for it."""
    return {
        tuple(comparison["keys"].values()): (comparison, word)
        for comparison, _, word in comparisons(rows, model_task)
    }


def quality_words(seeds: list[dict]) -> str:
    """`accuracy 81.0 % [79.1, 82.9] (1 seed)`, or the mean and the range over several."""
    metric = seeds[0]["quality"]["metric"]
    name = w.metric_name(metric)
    values = [row["quality"]["value"] for row in seeds if row["quality"]["value"] is not None]
    collapsed = sum(bool(row["quality"]["collapsed"]) for row in seeds)
    note = f", collapsed in {collapsed} of {len(seeds)}" if collapsed else ""
    if len(seeds) == 1 or not values:
        return f"{name} {w.with_interval(seeds[0]['quality'], metric)} ({_seeds(len(seeds))}{note})"
    low, high = (w.number(end(values), metric).removesuffix(" %") for end in (min, max))
    return f"{name} {w.number(mean(values), metric)} (mean of {_seeds(len(seeds))}, {low} to {high}{note})"


def _seeds(count: int) -> str:
    return w.plural(count, "seed")


def _kind_line(kind: str, groups: dict, dense: dict, verdicts: dict, tests: dict) -> str:
    """One student: what it is, its quality each way, and the tested differences."""
    by_training = {training: groups[kind, training] for training in p.WAYS if (kind, training) in groups}
    if not by_training:
        return ""
    first = next(iter(by_training.values()))[0]
    phrases = [
        f"{p.WAYS[training][0].lower()}, {quality_words(seeds)}" for training, seeds in by_training.items()
    ]
    blocks = first["achieved"].get("blocks") if kind != "pruned" else None
    size = f"{depth.share(first, dense)} of the bytes"
    if blocks:
        size = (
            ", ".join(f"{w.plural(count, 'block')} in the {stack}" for stack, count in blocks.items())
            + f", {size}"
        )
    text = f"- **{p.KINDS[kind][0]}** ({size}{speed(first)}): " + "; ".join(phrases) + "."
    if {"hard", "taught"} <= set(by_training):
        text += f" Taught against hard labels: {_gain(by_training['taught'], by_training['hard'], tests)}."
    if "taught" in by_training:
        text += f" Taught against the dense model: {_to_dense(by_training['taught'], verdicts)}."
    return text


def _gain(taught: list[dict], hard: list[dict], tests: dict) -> str:
    """The paired differences of taught minus hard labels, seed by seed."""
    by_seed = {row["seed"]: row for row in hard}
    pairs = [(row["key"], by_seed[row["seed"]]["key"]) for row in taught if row["seed"] in by_seed]
    return tested([tests[model_task] for model_task in pairs if model_task in tests])


def tested(tests: list[tuple[dict, str]]) -> str:
    """Count tests over seeds: `better in 2 of 3 seeds, no measurable difference in 1 (mean +1.20 points)`."""
    tests = [(comparison, word) for comparison, word in tests if comparison["difference"]]
    if not tests:
        return "not tested"
    (comparison, word), metric = tests[0], tests[0][0]["metric"]
    if len(tests) == 1:
        return f"{word} ({w.difference_text(comparison['difference'], metric)}, 1 seed)"
    (word, count), *further = Counter(word for _, word in tests).most_common()
    words = ", ".join(
        [f"{word} in {count} of {_seeds(len(tests))}", *(f"{other} in {n}" for other, n in further)]
    )
    average = mean(comparison["difference"]["value"] for comparison, _ in tests)
    text = w.difference_text(dict.fromkeys(("value", "low", "high"), average), metric)
    return f"{words} (mean {text.partition(' [')[0]})"


def _to_dense(seeds: list[dict], verdicts: dict) -> str:
    return tested([(row["quality"], verdicts[row["key"]][1]) for row in seeds if row["key"] in verdicts])


def samples_per_s(row: dict) -> tuple[str, float, float] | None:
    """Return the largest batch's shape but for decoding, and samples per second, dense and compressed."""
    shapes = {name: timing for name, timing in shapes_of(row).items() if "decode" not in name}
    if not shapes:
        return None
    name, shape = max(shapes.items(), key=lambda timing: timing[1]["batch"])
    return name, *(1e3 * shape["batch"] / shape[time] for time in ("median_ms", "dense_ms"))


def speed(row: dict) -> str:
    """`; 1,600 samples/s against 800 at batch 8, time 0.50 [0.48, 0.53] of dense`, or nothing."""
    rates = samples_per_s(row)
    if not rates:
        return ""
    name, rate, dense_rate = rates
    return (
        f"; {rate:,.0f} samples/s against {dense_rate:,.0f} at {SHAPE_NAMES.get(name, name)}, time "
        f"{_ratio(row, name)} of dense"
    )


def _ratio(row: dict, name: str) -> str:
    """`0.50 [0.48, 0.53]`: time over that of the dense model beside it, which drift leaves alone."""
    return w.ratio_text(row["latency"]["shapes"][name])


def _ablation(rows: list[dict], model_task: tuple[str, str], tests: dict) -> str:
    """Other losses against the usual one, on the same student."""
    by_key = {row["key"]: row for row in p.ablation_rows(rows) if model_task_of(row) == model_task}
    by_loss: dict[str, list] = {}
    for (first, _), test in tests.items():
        if first in by_key:
            by_loss.setdefault(", ".join(loss_words(by_key[first]["settings"])), []).append(test)
    lines = [
        (f"- {name}: {tested(several)}", [word for _, word in several]) for name, several in by_loss.items()
    ]
    return w.tested_list(
        "**Other losses**, against soft labels alone at temperature 4, on the same student", lines
    )


def _table(rows: list[dict], model_task: tuple[str, str], dense: dict, verdicts: dict) -> str:
    """Every setting once, over its seeds."""
    settings: dict[str, list[dict]] = {}
    for row in scored_rows(rows, model_task):
        if row["key"] in verdicts:
            asked_for = f"{row['technique']} {sorted(row['settings'].items(), key=str)}"
            settings.setdefault(asked_for, []).append(row)
    lines = [
        [
            "Dense",
            f"{dense['memory']['parameters']:,}",
            w.bytes_text(depth.size(dense)),
            "",
            quality_words([dense]).partition(" (")[0],
            "baseline",
        ]
    ]
    for seeds in settings.values():
        rate = samples_per_s(seeds[0])
        lines.append(
            [
                w.label_of(seeds[0]),
                f"{seeds[0]['memory']['parameters']:,}",
                w.bytes_text(depth.size(seeds[0])),
                _ratio(seeds[0], rate[0]) if rate else "",
                quality_words(seeds),
                _to_dense(seeds, verdicts),
            ]
        )
    header = ["Asked", "Parameters", "Bytes", "Time / dense time", "Quality", "Against dense (Holm)"]
    table = w.with_column([header, *lines], w.likelihood_column(dense, list(settings.values())))
    return w.folded(f"All {w.plural(len(lines), 'setting')}", table)


def _cache(rows: list[dict]) -> list[str]:
    """What it saved to keep the teacher's outputs."""
    text = []
    for row in (candidate for candidate in rows if candidate["technique"] == "teacher-cache"):
        achieved, settings = row["achieved"], row["settings"]
        fresh, cached = ([min(achieved[name]), max(achieved[name])] for name in ("asked_s", "kept_s"))
        seen = settings["steps"] * settings["batch_size"] / settings["examples"]
        saved = w.percent(round(1 - mean(achieved["kept_s"]) / mean(achieved["asked_s"]), 2))
        verdict = (
            f"{saved} less on average" if cached[1] < fresh[0] else "the runs overlap, no measurable saving"
        )
        gap = f"differ by at most {achieved['loss_gap']:.0e}" if achieved["loss_gap"] else "are the same"
        text.append(
            f"**The teacher's outputs kept** ({row['model']}). {w.plural(settings['steps'], 'step')} of "
            f"{settings['batch_size']} that see each of {settings['examples']} examples "
            f"{w.plural(round(seen), 'time')}: {fresh[0]:.1f} to {fresh[1]:.1f} s with the teacher asked at "
            f"every step, {cached[0]:.1f} to {cached[1]:.1f} s with its logits computed once at the start "
            f"(included): {verdict}. The losses {gap}."
        )
    return text


def _cards(rows: list[dict]) -> list[cards.Card]:
    """Published figures of students beside ours."""
    copied, share, random = "", None, ""
    for sst2 in (model_task for model_task in model_tasks(rows) if model_task[1] == "sst2"):
        dense, groups = dense_of(rows, sst2), p.groups(rows, sst2)
        if dense and (seeds := groups.get(("copied", "taught"))):
            share = mean(row["quality"]["value"] for row in seeds) / dense["quality"]["value"]
            copied = f"{sst2[0]}, {quality_words(seeds)}: {w.percent(share)} of its teacher's"
        if dense and (seeds := groups.get(("random", "taught"))):
            random = (
                f"; {sst2[0]}: {w.number(dense['quality']['value'], 'accuracy')} to {quality_words(seeds)}"
            )
    near = share is not None and abs(share - HELD) <= CLOSE
    return [
        cards.Card(
            f"DistilBERT on SST-2: 91.3 of BERT's 92.7, {w.percent(HELD)}",
            "half the blocks copied, distilled on a large corpus, then fine-tuned",
            copied or "`make report PROFILE=reference`",
            "reproduced" if near else "not reproduced" if copied else cards.CANNOT,
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
            "`python -m helpers.run.runner --only 04 -p encoder=<BERT fine-tuned on MNLI> -p "
            "encoder_task=mnli.csv`",
            cards.CANNOT,
            "needs the Hub and a GPU; MNLI is a file of one's own here",
        ),
    ]


SECTION = Section(
    notebook="04_distillation",
    findings=findings,
    summary=summary,
    cards=_cards,
    drawings=drawings("distillation-quality"),
)
