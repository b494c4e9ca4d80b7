"""The pruning section: what each rule did to quality, and what the zeros were worth in bytes and time."""

from helpers import plots
from helpers.plots import is_recovered, look, subject_of, subjects
from helpers.report import wording as w
from helpers.report.section import Drawing, Section


def _own(rows: list[dict], pair: tuple[str, str]) -> tuple[dict, list[dict]]:
    own = [row for row in rows if row["quality"] and subject_of(row) == pair]
    dense = next(row for row in own if row["technique"] == "dense" and not is_recovered(row))
    return dense, [row for row in own if row is not dense]


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    text = []
    for pair in subjects(rows):
        dense, others = _own(rows, pair)
        verdicts = w.adjusted(others)
        text.append(f"### {pair[0]} on {pair[1]}")
        text.append(_dense_sentence(dense))
        text.extend(_rule_sentences(others, verdicts))
        text.extend(_recovery_sentences(dense, others, verdicts))
        text.append(_bytes_sentence(dense, others))
        text.append(_time_sentence(others))
        text.append(_quality_table(dense, others, verdicts))
    text.extend(_kernel_sentences(rows))
    return [paragraph for paragraph in text if paragraph]


def summary(rows: list[dict]) -> list[str]:
    """Per model and task: how far pruning went unnoticed, one shot and recovered; then bytes and time."""
    sentences = []
    for pair in subjects(rows):
        dense, others = _own(rows, pair)
        verdicts = w.adjusted(others)
        parts = [_furthest(others, verdicts, recovered) for recovered in (False, True)]
        sentences.append(f"**{pair[0]} on {pair[1]}.** " + " ".join(part for part in parts if part))
    timed = [row for row in rows if row["latency"] and row["technique"] != "dense"]
    if words := _latency_verdicts(timed):
        still, total = words.count("no measurable change"), len(words)
        sentences.append(
            f"**Zeros and time.** Run as dense models, pruned ones showed no measurable change of time in {still} of "
            f"{total} shapes timed; the bytes of the dense file stay as they were whatever is zero."
        )
    return sentences


def _latency_verdicts(timed: list[dict]) -> list[str]:
    """The latency verdicts of rows that were timed themselves, not of those that took over a time."""
    own = [row for row in timed if not row["latency"].get("measured_on")]
    return [word for row in own for word in row["verdict"]["latency"].values()]


def _furthest(others: list[dict], verdicts: dict, recovered: bool) -> str:
    pruned = [row for row in others if row["settings"].get("sparsity") and is_recovered(row) == recovered]
    if not pruned:
        return ""
    how = "After recovery" if recovered else "One shot"
    unnoticed = [row for row in pruned if verdicts[row["key"]][1] in ("no measurable change", "better")]
    if not unnoticed:
        least = min(pruned, key=lambda row: row["settings"]["sparsity"])
        level = w.percent(least["settings"]["sparsity"])
        return f"{how}, no rule went unnoticed at any level measured; the lowest was {level}."
    best = max(unnoticed, key=lambda row: row["settings"]["sparsity"])
    return (
        f"{how}, the furthest without a measurable loss was {w.name_of(best).removesuffix(' + recovery').lower()} "
        f"({w.difference(best)})."
    )


def _dense_sentence(dense: dict) -> str:
    quality = dense["quality"]
    floor = ""
    if quality["floor"] is not None:
        name = (
            "the unigram model"
            if quality["metric"] == "perplexity"
            else "always answering the commonest class"
        )
        floor = f"; {name} gives {w.number(quality['floor'], quality['metric'])}"
    return (
        f"The dense model ({dense['memory']['parameters']:,} parameters) has {quality['metric']} "
        f"{w.with_interval(quality, quality['metric'])} on {quality['n']} examples of the "
        f"{dense['provenance']['split']} split{floor}."
    )


def _rule_sentences(others: list[dict], verdicts: dict) -> list[str]:
    sentences = []
    one_shot = [row for row in others if not is_recovered(row) and row["settings"].get("sparsity")]
    for rule in dict.fromkeys(row["technique"] for row in one_shot):
        own = sorted((r for r in one_shot if r["technique"] == rule), key=lambda r: r["settings"]["sparsity"])
        safe = []
        for row in own:
            if verdicts[row["key"]][1] not in ("no measurable change", "better"):
                break
            safe.append(row)
        parts = []
        if safe:
            levels = w.listing([w.percent(row["settings"]["sparsity"]) for row in safe])
            p = verdicts[safe[-1]["key"]][0]
            word = verdicts[safe[-1]["key"]][1]
            parts.append(f"at {levels}: {word} (at the last, {w.difference(safe[-1])}, {w.p_text(p)})")
        if len(safe) < len(own):
            first = own[len(safe)]
            p, word = verdicts[first["key"]]
            reason = f": {first['quality']['collapsed']}" if word == "collapsed" else ""
            parts.append(
                f"at {w.percent(first['settings']['sparsity'])}: {word}{reason} ({w.difference(first)}, {w.p_text(p)})"
            )
            collapsed = next((r for r in own[len(safe) + 1 :] if r["quality"]["collapsed"]), None)
            if collapsed and word != "collapsed":
                level = w.percent(collapsed["settings"]["sparsity"])
                parts.append(f"collapsed at {level} ({collapsed['quality']['collapsed']})")
        sentences.append(f"- **{look(rule)[0]}**, one shot: " + "; ".join(parts) + ".")
    return ["\n".join(sentences)] if sentences else []


def _recovery_sentences(dense: dict, others: list[dict], verdicts: dict) -> list[str]:
    recovered = [row for row in others if is_recovered(row)]
    if not recovered:
        return []
    metric = dense["quality"]["metric"]
    steps = recovered[0]["settings"]["recovery"]["steps"]
    control = next((row for row in recovered if row["technique"] == "dense"), None)
    parts = []
    for row in sorted(recovered, key=lambda r: r["settings"].get("sparsity", 0.0)):
        if row is control:
            continue
        before = next(
            (r for r in others if not is_recovered(r) and r["technique"] == row["technique"]
             and r["settings"].get("sparsity") == row["settings"].get("sparsity")), None,
        )  # fmt: skip
        if before:
            parts.append(
                f"{w.name_of(before).lower()}, from {w.with_interval(before['quality'], metric)} to "
                f"{w.with_interval(row['quality'], metric)} ({verdicts[row['key']][1]} against dense)"
            )
    sentence = (
        f"Fine-tuning for {steps} steps with the mask held took " + "; ".join(parts) + "." if parts else ""
    )
    if control:
        sentence += (
            f" The control, the dense model given the same {steps} steps, has "
            f"{w.with_interval(control['quality'], metric)} ({verdicts[control['key']][1]})."
        )
    return [sentence.strip()]


def _bytes_sentence(dense: dict, others: list[dict]) -> str:
    one_shot = [row for row in others if row["memory"] and not is_recovered(row)]
    own = sorted(
        (row for row in one_shot if row["technique"] == "magnitude-layer"),
        key=lambda r: r["settings"]["sparsity"],
    )
    if not own:
        return ""
    base = dense["memory"]["formats"]["dense"]
    last = own[-1]
    smallest, size = plots.smallest_form(last)
    crossings = []
    for name in ("bitmask", "csr_int32", "csr_int64"):
        below = next((r for r in own if r["memory"]["formats"][name] < base), None)
        title = plots.FORMATS[name][0]
        crossings.append(
            f"{title} first is smaller at {w.percent(below['achieved']['sparsity'])}"
            if below
            else f"{title} never is"
        )
    zstd = dense["memory"]["formats"]["dense_zstd"] / base
    note = (
        f" Zstandard shrinks even the dense file to {w.percent(zstd)}: these weights were published in bf16, so the "
        "lower half of every fp32 number is zero. It is left out where sizes are compared."
        if zstd < 0.6
        else ""
    )
    return (
        f"**Bytes.** Stored as dense, {w.percent(last['achieved']['sparsity'])} of zeros changed nothing: "
        f"{w.bytes_text(last['memory']['formats']['dense'])} against {w.bytes_text(base)}. The smallest form there is "
        f"{plots.FORMATS[smallest][0]}, {w.bytes_text(size)}. Of the levels measured, "
        f"{w.listing(crossings)} than the dense file.{note}"
    )


def _time_sentence(others: list[dict]) -> str:
    timed = next((row for row in others if row["latency"] and not row["latency"].get("measured_on")), None)
    if not timed:
        return ""
    parts = []
    for name, shape in timed["latency"]["shapes"].items():
        parts.append(
            f"{plots.SHAPES.get(name, name)} {shape['ratio']:.2f} [{shape['ratio_low']:.2f}, {shape['ratio_high']:.2f}], "
            f"{timed['verdict']['latency'][name]} (noise floor ±{100 * shape['noise_floor']:.1f} %)"
        )
    return (
        f"**Time.** Run as a dense model, {w.name_of(timed).lower()} took, relative to dense: "
        + "; ".join(parts)
        + "."
    )


def _quality_table(dense: dict, others: list[dict], verdicts: dict) -> str:
    metric = dense["quality"]["metric"]
    lines = [["Dense", "0 %", w.with_interval(dense["quality"], metric), "", "", "baseline"]]
    for row in others:
        p, word = verdicts[row["key"]]
        sparsity = row["achieved"].get("sparsity")
        lines.append(
            [
                w.name_of(row), w.percent(sparsity) if sparsity is not None else "",
                w.with_interval(row["quality"], metric), w.difference(row), w.p_text(p), word,
            ]
        )  # fmt: skip
    header = ["Asked", "Achieved sparsity", metric, "Difference to dense", "p (Holm)", "Verdict"]
    return f"<details><summary>All {len(lines)} rows</summary>\n\n{w.table(header, lines)}\n\n</details>"


def _kernel_sentences(rows: list[dict]) -> list[str]:
    row = next((row for row in rows if row["technique"] == "kernels"), None)
    if not row:
        return []
    timings, parts = row["achieved"]["timings"], []
    for kernel in dict.fromkeys(entry["kernel"] for entry in timings if entry["kernel"] != "dense_fp32"):
        title = plots.KERNELS.get(kernel, (kernel,))[0]
        own = sorted((e for e in timings if e["kernel"] == kernel), key=lambda e: e["sparsity"])
        wins = [entry for entry in own if entry["ratio_high"] < 1 - entry["noise_floor"]]
        if not wins:
            parts.append(f"- {title}: nowhere measurably faster than dense fp32.")
            continue
        best = min(wins, key=lambda entry: entry["ratio"])
        parts.append(
            f"- {title}: measurably faster from {w.percent(wins[0]['sparsity'])} on "
            f"({wins[0]['rows']} tokens of input), at best {1 / best['ratio']:.1f} times "
            f"(at {w.percent(best['sparsity'])}, {best['rows']} tokens)."
        )
    return [
        "### What a zero is worth in time",
        f"One linear map, `{row['achieved']['layer']}` of {row['model']}, against dense fp32:",
        "\n".join(parts),
    ]


SECTION = Section(
    notebook="02_pruning",
    title="Unstructured pruning",
    question="How many single weights can be set to zero before the model notices, and what does a zero save?",
    method=(
        "Every level starts from the dense weights. A rule scores the weights of the attention and feed-forward "
        "maps and the lowest scores become zero: at random (the control), by magnitude within each layer, or by "
        "magnitude over all layers together. The pruned model is saved, reloaded, and scored on the same examples "
        "as the dense one. Recovery means fine-tuning on training data with the zeros held."
    ),
    findings=findings,
    summary=summary,
    drawings=(
        Drawing(
            "pruning-quality",
            "Quality over achieved sparsity, 95 % intervals; dashed and open: after recovery.",
            plots.quality_against_sparsity,
        ),
        Drawing(
            "pruning-bytes",
            "Bytes of the whole model by storage format, relative to the dense file; dotted: break-even by arithmetic.",
            plots.bytes_against_sparsity,
        ),
        Drawing(
            "pruning-latency",
            "Time of pruned models run as dense ones; grey is what two copies of the same model differ by.",
            plots.latency_ratios,
            lambda rows: any(row["latency"] and row["technique"] != "dense" for row in rows),
        ),
        Drawing(
            "pruning-kernels",
            "One linear map through the kernels this machine has; above one is faster than dense fp32.",
            lambda rows: plots.kernel_times(next(row for row in rows if row["technique"] == "kernels")),
            lambda rows: any(row["technique"] == "kernels" for row in rows),
        ),
    ),
    caveats=(
        "Magnitude pruning in one shot is the weakest of the informed rules; rules that look at activations are not "
        "part of this section. A sparse kernel's time is that of one linear map, not of a whole model."
    ),
)
