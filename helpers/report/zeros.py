"""What zeros are worth: bytes by storage format, time of the whole model and of one linear layer."""

from helpers.report import rows_pruning as pruning
from helpers.report import wording as w
from lmcompress.results.labels import SHAPE_NAMES
from lmcompress.results.rows import is_plain, is_recovered, is_timed, smallest_format


def bytes_sentence(dense: dict, compressed: list[dict]) -> str:
    """What the zeros save in each storage format, and where each breaks even, measured and by arithmetic."""
    one_shot = [row for row in compressed if row["memory"] and not is_recovered(row) and is_plain(row)]
    sparse = sorted(
        (row for row in one_shot if row["technique"] == "magnitude-layer"),
        key=lambda r: r["settings"]["sparsity"],
    )
    if not sparse:
        return ""
    base = dense["memory"]["formats"]["dense"]
    last = sparse[-1]
    smallest, size = smallest_format(last)
    line = [(0.0, dense), *((row["achieved"]["sparsity"], row) for row in sparse)]
    crossings = []
    for name in ("bitmask", "csr_int32", "csr_int64"):
        title, _, arithmetic = pruning.FORMATS[name]
        x, y = [level for level, _ in line], [row["memory"]["formats"][name] / base for _, row in line]
        at = pruning.crossing(x, y)
        reached = f"{w.percent(at)}" if at is not None else "no level measured"
        crossings.append(f"{title} at {reached} (by arithmetic {w.percent(arithmetic)})")
    zstd = dense["memory"]["formats"]["dense_zstd"] / base
    note = (
        f" Zstandard shrinks even the dense file to {w.percent(zstd)}: these weights were published in bf16, "
        "so the lower half of every fp32 number is zero. It is left out where sizes are compared."
        if half_empty(dense["memory"]["formats"])
        else f" Packed with Zstandard, which is left out where sizes are compared, the dense file has "
        f"{w.percent(zstd)} of "
        f"its bytes, the one with these zeros {w.percent(last['memory']['formats']['dense_zstd'] / base)}."
    )
    return (
        f"**Bytes.** Stored as dense, {w.percent(last['achieved']['sparsity'])} of zeros changed nothing: "
        f"{w.bytes_text(last['memory']['formats']['dense'])} against {w.bytes_text(base)}. The smallest form "
        f"that is not entropy-coded is {pruning.FORMATS[smallest][0]} there, {w.bytes_text(size)}. Against "
        f"the dense file, {w.listing(crossings)} break even, by a line between the levels measured.{note}"
    )


def half_empty(formats: dict[str, int]) -> bool:
    """Whether fp32 weights hold no more than bf16 does: an entropy coder then halves even the dense file."""
    return formats.get("dense_zstd", formats["dense"]) < 0.6 * formats["dense"]


def time_sentence(compressed: list[dict]) -> str:
    """The time of a pruned model run as a dense one, at every shape."""
    timed = next((row for row in compressed if is_timed(row)), None)
    if not timed:
        return ""
    phrases = []
    for name, shape in timed["latency"]["shapes"].items():
        phrases.append(
            f"{SHAPE_NAMES.get(name, name)} {w.ratio_text(shape)}, "
            f"{timed['verdict']['latency'][name]} (noise floor ±{100 * shape['noise_floor']:.1f} %)"
        )
    return (
        f"**Time.** Run as a dense model, {w.label_of(timed)} took, relative to dense: {'; '.join(phrases)}."
    )


def kernel_sentences(rows: list[dict]) -> list[str]:
    """From which sparsity on each kernel is measurably faster on one linear map."""
    row = next((row for row in rows if row["technique"] == "kernels"), None)
    if not row:
        return []
    timings, phrases = row["achieved"]["timings"], []
    for kernel in dict.fromkeys(entry["kernel"] for entry in timings if entry["kernel"] != "dense_fp32"):
        title = pruning.KERNELS.get(kernel, (kernel,))[0]
        kernel_timings = sorted((e for e in timings if e["kernel"] == kernel), key=lambda e: e["sparsity"])
        wins = [entry for entry in kernel_timings if entry["ratio_high"] < 1 - entry["noise_floor"]]
        if kernel.startswith("dense"):  # skips nothing: the same work at every sparsity
            best = min((entry["ratio"] for entry in wins), default=1)
            fast = f", at best {1 / best:.1f} times as fast" if wins else ""
            phrases.append(
                f"- {title}, which skips no zero: measurably faster in {len(wins)} of "
                f"{w.plural(len(kernel_timings), 'timing')}{fast}."
            )
            continue
        if not wins:
            phrases.append(f"- {title}: nowhere measurably faster than dense fp32.")
            continue
        best = min(wins, key=lambda entry: entry["ratio"])
        phrases.append(
            f"- {title}: measurably faster from {w.percent(wins[0]['sparsity'])} on "
            f"({wins[0]['rows']} tokens of input), at best {1 / best['ratio']:.1f} times "
            f"(at {w.percent(best['sparsity'])}, {best['rows']} tokens)."
        )
    return [
        "### What a zero is worth in time",
        f"One linear map, `{row['achieved']['layer']}` of {row['model']}, against dense fp32:",
        "\n".join(phrases),
    ]


def latency_verdicts(timed: list[dict]) -> list[str]:
    """The latency verdicts of rows that were timed themselves, not of those that took over a time."""
    return [word for row in filter(is_timed, timed) for word in row["verdict"]["latency"].values()]
