"""The structured section: heads, channels, blocks, words removed; does time fall with FLOPs?"""

from collections.abc import Callable

from helpers.report import cards, choosing, depth
from helpers.report import rows_structured as p
from helpers.report import wording as w
from helpers.report.section import Section, drawings
from lmcompress.results.labels import SHAPE_NAMES
from lmcompress.results.rows import model_tasks
from lmcompress.results.verdicts import COLLAPSED, comparisons, families, without_loss

ROBERTA = "RoBERTa-large, SST-2, calibrated on the 872 examples that it scores"
TEXTPRUNER = "XLM-R, 8 heads and 2,048 channels (Yang et al. 2022)"


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for model_task, dense, compressed, verdicts in families(rows):
        text.append(f"### {model_task[0]} on {model_task[1]}")
        text.append(dense_sentence(dense))
        levels = [
            _level_sentence(compressed, verdicts, dense, dimension) for dimension in ("heads", "ffn", "both")
        ]
        text.append("\n".join(level for level in levels if level))
        text.append(choosing.tool_sentence(rows, model_task))
        text.append(choosing.comparison_sentence(rows, model_task))
        text.append(depth.influence_sentence(rows, model_task))
        text.append(depth.replacement_sentence(rows, model_task))
        text.append(depth.depth_sentence(compressed, verdicts, dense))
        text.append(depth.vocabulary_sentence(compressed, verdicts, dense))
        text.append(rows_table(dense, compressed, verdicts))
    text += _time_sentences(rows)
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Per model and task: the smallest model whose loss could not be measured; then the times."""
    sentences = []
    for model_task, dense, compressed, verdicts in families(rows):
        structural = [row for row in compressed if _structural(row)]
        safe = without_loss(structural, verdicts)
        if not safe:
            largest = max(structural, key=depth.size, default=None)
            words = (
                f"Every structurally pruned model shows a loss, {w.if_only(structural, verdicts)}, "
                f"even the largest measured"
            )
            if largest:
                share = depth.share(largest, dense)
                sentences.append(
                    f"**{model_task[0]} on {model_task[1]}.** {words}, {share} of the dense file."
                )
            continue
        best = min(safe, key=depth.size)
        sentences.append(
            f"**{model_task[0]} on {model_task[1]}.** The smallest structurally pruned model without a "
            f"measurable loss: "
            f"{w.label_of(best)}, {depth.share(best, dense)} of the dense file ({w.difference(best)})."
        )
    if timed := p.timed_pairs(rows):
        within = [row for row, shares in timed if abs(_excess(row, shares)) <= p.TOLERANCE]
        sentences.append(
            "**Structure and time.** At batch 8 the time fell with the FLOPs to within "
            f"{w.percent(p.TOLERANCE)} in {len(within)} of {w.plural(len(timed), 'model')} timed."
        )
    return sentences


def _structural(row: dict) -> bool:
    scored = (row["settings"].get("calibration") or {}).get("scored")
    return row["technique"] != "dense" and bool(row["memory"]) and not scored


def dense_sentence(dense: dict) -> str:
    """Parameters, bytes and quality of the dense model."""
    quality = dense["quality"]
    return (
        f"The dense model ({dense['memory']['parameters']:,} parameters, {w.bytes_text(depth.size(dense))}) "
        f"has {w.metric_name(quality['metric'])} {w.with_interval(quality, quality['metric'])}."
    )


def _level_sentence(compressed: list[dict], verdicts: dict, dense: dict, dimension: str) -> str:
    """The sweep over heads, over channels, or over both, from the most that is kept to the least."""
    swept = p.sweep_rows(compressed)
    varied = {"heads": {"heads"}, "ffn": {"ffn"}, "both": {"heads", "ffn"}}[dimension]
    level_rows = [
        row for row in swept if {name for name in ("heads", "ffn") if row["settings"].get(name)} == varied
    ]
    phrases = []
    for row in sorted(level_rows, key=depth.size, reverse=True):
        counts = [
            w.plural(p.kept(row, name), word)
            for name, word in (("heads", "head"), ("ffn", "channel"))
            if name in varied
        ]
        reason = f": {row['quality']['collapsed']}" if verdicts[row["key"]][1] == COLLAPSED else ""
        phrases.append(
            f"with {w.listing(counts)}, {depth.share(row, dense)} of the bytes, "
            f"{verdicts[row['key']][1]}{reason} ({w.difference(row)}, {w.p_text(verdicts[row['key']][0])})"
        )
    title = {"heads": "Heads", "ffn": "Channels", "both": "Heads and channels"}[dimension]
    return f"- **{title}** kept in each block: " + "; ".join(phrases) + "." if phrases else ""


def rows_table(
    dense: dict,
    compressed: list[dict],
    verdicts: dict,
    *,
    share: Callable[[dict, dict], str] = depth.share,
    share_of: str = "Bytes / dense",
    name_of: Callable[[dict], str] = w.label_of,
) -> str:
    """Every row of a model and task, folded away: asked, bytes (`share` of dense), quality, difference,
    verdict.

    And how likely the right answers are, where that is recorded. `share_of` heads the column of `share`.
    """
    metric = dense["quality"]["metric"]
    compared = [one for one in compressed if one["key"] in verdicts]
    lines = [["Dense", share(dense, dense), w.with_interval(dense["quality"], metric), "", "", "baseline"]]
    for row in compared:
        value, word = verdicts[row["key"]]
        lines.append(
            [
                name_of(row),
                share(row, dense),
                w.with_interval(row["quality"], metric),
                w.difference(row),
                w.p_text(value),
                word,
            ]
        )
    header = ["Asked", share_of, w.metric_name(metric), "Difference to dense", "p (Holm)", "Verdict"]
    table = w.with_column([header, *lines], w.likelihood_column(dense, [[row] for row in compared]))
    return w.folded(f"All {w.plural(len(lines), 'row')}", table)


def _ratios(row: dict, shares: dict) -> tuple[float, float]:
    """Time and FLOPs, relative to dense, at the shape that was profiled."""
    profile = shares["achieved"]
    return row["latency"]["shapes"][profile["shape"]]["ratio"], profile["flops"][1] / profile["flops"][0]


def _excess(row: dict, shares: dict) -> float:
    time, work = _ratios(row, shares)
    return time / work - 1


def _time_sentences(rows: list[dict]) -> list[str]:
    """Time against FLOPs per timed model, and what eats the rest where they differ."""
    lines = []
    for row, shares in p.timed_pairs(rows):
        profile, (time, work) = shares["achieved"], _ratios(row, shares)
        shape = row["latency"]["shapes"][profile["shape"]]
        before, after = ({kind: w.percent(share[kind]) for kind in p.SHARES} for share in profile["shares"])
        excess = _excess(row, shares)
        verdict = (
            f"within {w.percent(p.TOLERANCE)}"
            if abs(excess) <= p.TOLERANCE
            else f"{w.percent(round(abs(excess), 2))} {'more' if excess > 0 else 'less'} than the FLOPs say"
        )
        lines.append(
            f"- {row['model']}, {w.label_of(row)}, {SHAPE_NAMES.get(profile['shape'], profile['shape'])}: "
            f"time {time:.2f} [{shape['ratio_low']:.2f}, {shape['ratio_high']:.2f}] of dense, FLOPs "
            f"{work:.2f}: {verdict}.{_elsewhere(row, profile)} Matrix products take {before['products']} of "
            f"the dense model's time and {after['products']} of the pruned one's, attention "
            f"{before['attention']} and {after['attention']}, all else {before['rest']} and {after['rest']}."
        )
    return ["### Time against FLOPs", "\n".join(lines)] if lines else []


def _elsewhere(row: dict, profile: dict) -> str:
    """The ratio at the other shapes timed, where the FLOPs are the same share."""
    ratios = [
        f"{timing['ratio']:.2f} at {SHAPE_NAMES.get(name, name)}"
        for name, timing in row["latency"]["shapes"].items()
        if name != profile["shape"] and timing["ratio"]
    ]
    return f" Elsewhere the time was {w.listing(ratios)}." if ratios else ""


def _cards(rows: list[dict]) -> list[cards.Card]:
    made = []
    for model_task in model_tasks(rows):
        for test in comparisons(rows, model_task):
            first, second = (test[0][side]["settings"] for side in ("first", "second"))
            fewer = first.get("n_iters") == 1 and second.get("n_iters", 1) > 1 and "loss" not in first
            if fewer and test[0]["first"]["technique"] == "heads-ffn":
                made += cards.ordering(
                    "1 iteration 93.30, 16 iterations 94.25",
                    TEXTPRUNER,
                    [test],
                    "worse",
                    here=f"{model_task[0]} on {model_task[1]}, {second['n_iters']} iterations",
                )
    if not made and not p.sweep_rows(rows):
        return []
    published = (
        "FFN 4096, heads 16/10/8/6/4/2/1: accuracy .9644/.9622/.9610/.9530/.9289/.8658/.6170; 12 heads, FFN "
        "2048/1024/512: .9507/.8200/.5206; FFN 1536, heads 10/8/6/4: .8406/.7557/.7523/.7133"
    )
    away = "needs the Hub and a GPU; calibrates on training text"
    return [*made, cards.Card(published, ROBERTA, "`make notebook NB=03 PROFILE=paper`", cards.CANNOT, away)]


SECTION = Section(
    notebook="03_structured_pruning",
    findings=findings,
    summary=summary,
    cards=_cards,
    drawings=drawings("structured-quality"),
)
