"""The low-rank section: forms of equal bytes compared, and whether layers have anything to share."""

import itertools
from collections import Counter
from statistics import mean

from helpers.report import cards
from helpers.report import rows_low_rank as p
from helpers.report import wording as w
from helpers.report.distillation import quality_words, tested
from helpers.report.section import Section, drawings
from lmcompress.results.labels import SHAPE_NAMES
from lmcompress.results.rows import is_timed, model_task_of, model_tasks
from lmcompress.results.verdicts import comparisons, families

SHARED = ("global-basis", "mass", "mass-trained", "glam")
OWN = ("low-rank", "low-rank-aware")
FAR = 0.3  # shares of a ceiling below which it is not what holds a map back
CACHED = 1.1  # shares of the memory bandwidth above which a map cannot have come from memory


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = [_redundancy(rows)]
    for model_task, dense, _, verdicts in families(rows):
        if not verdicts:
            continue
        quality, size = dense["quality"], dense["memory"]["formats"]["dense"]
        value = w.with_interval(quality, quality["metric"])
        text.append(f"### {model_task[0]} on {model_task[1]}")
        text.append(f"Dense: {w.bytes_text(size)}, {w.metric_name(quality['metric'])} {value}.")
        text += [
            _differences(rows, model_task),
            _parts(rows, model_task, dense, verdicts),
            _times(rows, model_task),
        ]
        text.append(_table(rows, model_task, dense, verdicts))
    text += [_merges(rows), _crossings(rows)]
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Whether sharing across layers paid."""
    return [sentence] if (sentence := _verdict(rows)) else []


def _cards(rows: list[dict]) -> list[cards.Card]:
    published = []
    for model_task in model_tasks(rows):
        tests = comparisons(
            rows, model_task, lambda comparison: _is_sharing(comparison) and not _after(comparison)
        )
        published += cards.ordering(
            "layers that share a basis lose to layers of their own at equal bytes, without fine-tuning",
            "GlobaL Fact, MASS: earlier studies of shared bases",
            tests,
            "worse",
            here=f"{model_task[0]} on {model_task[1]}",
        )
    return published


def _list(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title}\n", *lines]) if lines else ""


def _is_sharing(comparison: dict) -> bool:
    return comparison["first"]["technique"] in SHARED and comparison["second"]["technique"] in OWN


def _after(comparison: dict) -> bool:
    return bool({"recovery", "training"} & set(comparison["first"]["settings"]))


def _verdict(rows: list[dict]) -> str:
    """How often layers that share were better or worse than layers of their own at the same bytes."""
    tests = [
        test
        for model_task in model_tasks(rows)
        for test in comparisons(rows, model_task)
        if _is_sharing(test[0])
    ]
    phrases, total = [], Counter(word for _, _, word in tests)
    for when, trained in (("one shot", False), ("after the same training", True)):
        counts = Counter(word for comparison, _, word in tests if _after(comparison) == trained)
        if counts:
            phrases.append(f"{when}, {w.tally(list(counts.elements()))}")
    if not phrases:
        return ""
    better, worse = total["better"], total["worse"]
    close = "did not pay" if worse > better else "paid" if better > worse else "neither paid nor cost"
    return (
        f"**Sharing across layers {close} here.** Layers that share a basis or a map against layers that "
        f"were factorised "
        f"each by itself, at about the same bytes, {w.plural(len(tests), 'test')}: {'; '.join(phrases)}."
    )


def _redundancy(rows: list[dict]) -> str:
    """In how many series a shared form would hold the same energy in fewer weights."""
    lines = []
    for row in (
        candidate
        for candidate in rows
        if candidate["technique"] == "redundancy" and candidate["achieved"]["series"]
    ):
        series = row["achieved"]["series"]
        fewer = sum(min(p.held(s, f) for f in p.FORMS if f != "own") < p.held(s, "own") for s in series)
        shares = {form: mean(p.held(candidate, form) for candidate in series) for form in p.FORMS}
        means = w.listing([f"{p.FORMS[form][0]} {shares[form]:.2f}" for form in p.FORMS])
        lines.append(
            f"- {row['model']}: some shared form needs fewer weights than a basis for each map in {fewer} of "
            f"{len(series)} series. Means over the series, as shares of the weights: {means}."
        )
    energy = next((row["settings"]["energy"] for row in rows if row["technique"] == "redundancy"), 0)
    title = (
        f"**Redundancy in the weights alone**: how many of the weights hold {w.percent(energy)} of the "
        "energy, over series of the same map in all blocks (above 1 nothing is saved):"
    )
    return _list(title, lines)


def _differences(rows: list[dict], model_task: tuple[str, str]) -> str:
    """Every tested difference, over its seeds."""
    by_names: dict[tuple[str, str], list] = {}
    for comparison, _, word in comparisons(rows, model_task):
        names = tuple(w.entrant_label(comparison[side]) for side in ("first", "second"))
        by_names.setdefault(names, []).append((comparison, word))
    lines = [
        (f"- {first}, against {second}: {tested(tests)}", [word for _, word in tests])
        for (first, second), tests in by_names.items()
    ]
    return w.tested_list("**At equal bytes**, on the same examples", lines)


def _parts(rows: list[dict], model_task: tuple[str, str], dense: dict, verdicts: dict) -> str:
    """What one layer type or a third of the blocks costs."""
    phrases = [
        f"{p.part_name(row)} ({w.percent(round(1 - p.share(row, dense), 3))} of the bytes saved), "
        f"{verdicts[row['key']][1]} ({w.difference(row)})"
        for row in p.part_rows(rows)
        if model_task_of(row) == model_task and row["key"] in verdicts
    ]
    return f"**Only a part**, plain SVD at the same fraction: {'; '.join(phrases)}." if phrases else ""


def _times(rows: list[dict], model_task: tuple[str, str]) -> str:
    """The whole model's time at the settings that were timed, and the best quality among what was faster."""
    scored = [row for row in rows if row["quality"] and model_task_of(row) == model_task]
    timed = [row for row in scored if is_timed(row) and row["technique"] != "dense"]
    if not timed:
        return ""
    lines = [f"- {w.label_of(row)}: {_ratios(row)}" for row in timed]
    places: dict[str, list[str]] = {}
    for shape in timed[0]["latency"]["shapes"]:
        faster = [row for row in timed if row["verdict"]["latency"].get(shape) == "faster"]
        answer = "none of them was faster"
        if faster:
            best = (max if faster[0]["quality"]["higher_is_better"] else min)(
                faster, key=lambda row: row["quality"]["value"]
            )
            answer = (
                f"{len(faster)} of {len(timed)} faster, and of these the best in quality is "
                f"{w.label_of(best)} ({w.difference(best)})"
            )
        places.setdefault(answer, []).append(SHAPE_NAMES.get(shape, shape))
    lines += [f"- At {' and at '.join(shapes)}: {answer}." for answer, shapes in places.items()]
    return _list("**At equal latency**, one shot (a factor of dense time; below 1 is faster):", lines)


def _ratios(row: dict) -> str:
    return ", ".join(
        f"{SHAPE_NAMES.get(name, name)} {w.ratio_text(shape)}"
        for name, shape in row["latency"]["shapes"].items()
    )


def _table(rows: list[dict], model_task: tuple[str, str], dense: dict, verdicts: dict) -> str:
    """Every form on the whole model once, over its seeds."""
    lines, seeds = [], []
    for trained in (False, True):
        for form_rows in p.forms(rows, model_task, trained=trained).values():
            groups: dict[str, list[dict]] = {}
            for row in (candidate for candidate in form_rows if candidate["key"] in verdicts):
                groups.setdefault(w.label_of(row), []).append(row)
            for name, same in groups.items():
                words = tested([(row["quality"], verdicts[row["key"]][1]) for row in same])
                share = w.percent(round(mean(p.share(row, dense) for row in same), 3))
                lines.append([name, share, quality_words(same), words])
                seeds.append(same)
    header = ["Asked", "Bytes / dense", "Quality", "Against dense (Holm)"]
    head, *cells = w.likelihood_column(dense, seeds) or [""]
    table = w.with_column([header, *lines], [head, *cells[1:]] if head else [])
    return w.folded(f"All {w.plural(len(lines), 'setting')}", table)


def _merges(rows: list[dict]) -> str:
    """What GLAM merged, and how far apart it was."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in (merge for merge in rows if merge["technique"] == "glam" and merge["quality"]):
        groups.setdefault((row["model"], p.way(row)), []).append(row)
    lines = []
    for (model, name), runs in groups.items():
        counts = [len(row["achieved"]["merges"]) for row in runs]
        text = (
            f"- {model}, {name}: {w.plural(mean(counts), 'merge')} on average over "
            f"{w.plural(len(runs), 'run')}"
        )
        if merges := [merge for row in runs for merge in row["achieved"]["merges"]]:
            distances = [merge["distance"] for merge in merges]
            text += (
                f", at distances of {min(distances):.2f} to {max(distances):.2f} (two random bases lie "
                f"near 1.41)"
            )
        lines.append(
            text + f", {w.plural(mean(row['achieved']['bases'] for row in runs), 'basis', 'bases')} left"
        )
    return _list("**GLAM's merges**, of the bases that training had brought closest:", lines)


def _crossings(rows: list[dict]) -> str:
    """From which rank two narrow maps are no faster, and what the dense map waits for."""
    lines = []
    for row in (crossing for crossing in rows if crossing["technique"] == "layer-speed"):
        achieved = row["achieved"]
        for crossing in achieved["crossover"]:
            dense = next(
                t for t in achieved["timings"] if t["rows"] == crossing["rows"] and t["rank"] is None
            )
            where = _where(achieved, crossing)
            lines.append(
                f"- {achieved['out']} × {achieved['in']}, {w.plural(crossing['rows'], 'row')}: {where}; "
                f"{limit(achieved, dense)}"
            )
    return _list(
        "**When two narrow maps are faster** than the dense one (they save bytes up to the break-even rank):",
        lines,
    )


def _where(achieved: dict, crossing: dict) -> str:
    """Up to which of the ranks tried the narrow maps are measurably faster, and where the ratio passes 1."""
    tried = [
        timing for timing in achieved["timings"] if timing["rows"] == crossing["rows"] and timing["rank"]
    ]
    tried.sort(key=lambda timing: timing["rank"])
    won = list(itertools.takewhile(lambda timing: timing["ratio_high"] < 1 - timing["noise_floor"], tried))
    if not won:
        return "measurably faster at no rank tried"
    if len(won) == len(tried):
        return f"measurably faster at every rank tried, up to {won[-1]['rank']}"
    at = crossing["rank"]
    passes = (
        f"; the ratio passes 1 at rank {at:.0f}, {w.percent(round(at / achieved['break_even'], 2))} of "
        f"break-even"
        if at
        else ""
    )
    return f"measurably faster up to rank {won[-1]['rank']}{passes}"


def limit(achieved: dict, dense: dict) -> str:
    """Which of the machine's two ceilings the dense map is nearer to."""
    seconds, count = dense["dense_ms"] / 1e3, dense["rows"]
    work = 2 * count * achieved["out"] * achieved["in"] / seconds / 1e9 / achieved["ceiling"]["gflops_per_s"]
    traffic = (
        4 * (achieved["out"] * achieved["in"] + count * (achieved["out"] + achieved["in"])) / seconds / 1e9
    )
    moved = traffic / achieved["ceiling"]["bandwidth_gb_per_s"]
    near = f"nearer to the limit of {'memory' if moved > work else 'arithmetic'}"
    return (
        f"the dense map is {near if max(work, moved) >= FAR else 'far from both limits'} "
        f"({w.percent(round(work, 2))} of the machine's matmul rate, {w.percent(round(moved, 2))} of its "
        f"memory bandwidth{', so it lies in the cache' if moved > CACHED else ''})"
    )


SECTION = Section(
    notebook="06_low_rank_and_sharing",
    findings=findings,
    summary=summary,
    cards=_cards,
    drawings=drawings("low-rank-quality", "low-rank-speed"),
)
