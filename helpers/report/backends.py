"""What quantized files hold, and which work each backend makes faster, for the quantization section."""

from helpers.report import depth
from helpers.report import rows_quantization as p
from helpers.report import wording as w
from lmcompress.results.labels import SHAPE_NAMES
from lmcompress.results.rows import dense_of, model_task_of


def proof(rows: list[dict]) -> list[str]:
    """Say what the files hold: types, different numbers per matrix, bytes written, types reloaded."""
    lines = []
    for row in (candidate for candidate in rows if candidate["technique"] == "stored-integers"):
        achieved = row["achieved"]
        lines.append(
            [
                row["model"],
                w.label(achieved["technique"], achieved["settings"]),
                str(achieved["matrices"]),
                ", ".join(achieved["dtypes"]),
                f"{achieved['unique']} of {2 ** achieved['bits']}",
                w.bytes_text(achieved["file_bytes"]),
                w.percent(round(achieved["file_bytes"] / achieved["dense_bytes"], 3)),
                ", ".join(achieved["reloaded"]),
            ]
        )
    for row in (candidate for candidate in rows if candidate["achieved"].get("stored")):
        dense = dense_of(rows, model_task_of(row))
        share = depth.share(row, dense) if dense else ""
        for element, stored_tensor in row["achieved"]["stored"].items():
            lines.append(
                [
                    row["model"],
                    w.label_of(row),
                    str(stored_tensor["matrices"]),
                    element,
                    str(stored_tensor["most_distinct_values"]),
                    w.bytes_text(depth.size(row)),
                    share,
                    "the graph itself",
                ]
            )
    header = "Model|Asked|Packed matrices|Type in the file|Most different values|File|Of dense|Reloaded as"
    text = (
        "What the files hold was read back: the types of the packed matrices, and how many different numbers "
        "the richest of them has. 16 are 4 bits and 256 are 8."
    )
    title = f"Types and values in the files: {w.plural(len(lines), 'line')}"
    table = w.folded(title, w.table(header.split("|"), lines))
    return ["### Are the weights integers?", text, table] if lines else []


def verdicts(row: dict) -> dict[str, str]:
    """Of each kind of work a row was timed at, whether it got faster."""
    return {work: row["verdict"]["latency"][work] for work in p.ratios(row)}


def speed(rows: list[dict]) -> list[str]:
    """Tabulate per model each backend's time over dense by kind of work, or that it cannot do it."""
    timed, parts = p.timed_rows(rows), []
    for model in dict.fromkeys(row["model"] for row in timed):
        model_rows = [row for row in timed if row["model"] == model]
        works = list(dict.fromkeys(name for row in model_rows for name in row["latency"]["shapes"]))
        lines = [
            [
                w.label_of(row),
                row["achieved"].get("backend", "torch"),
                *(_time_cell(row, work) for work in works),
            ]
            for row in model_rows
        ]
        header = [model, "Computed by", *(SHAPE_NAMES.get(work, work) for work in works)]
        parts.append(w.table(header, lines))
    text = "Time over dense time, measured beside it; below 1 is faster."
    if any("bf16" in (row["achieved"].get("backend") or "") for row in timed):
        text += (
            " A backend that computes in bf16 stands beside a dense model in fp32: what it saves is the "
            "format's as much as the backend's."
        )
    return ["### Which work each backend helps", text, *parts] if parts else []


def _time_cell(row: dict, work: str) -> str:
    """`0.50 [0.48, 0.52]`, and the verdict where it is not faster."""
    if work not in row["latency"]["shapes"]:
        return ""
    if (shape := p.ratios(row).get(work)) is None:
        return "cannot do"
    word = verdicts(row)[work]
    time = w.ratio_text(shape)
    return time if word == "faster" else f"{time}, {word}"
