"""How a number of the frame is written in a table cell or in the prose: one function per kind of number."""

from collections.abc import Callable, Iterable

import pandas

from lmcompress.results.labels import change_text, difference_text, metric_name, number, shape_name
from lmcompress.results.labels import model_name as model_name
from lmcompress.results.store import superseded

NOT_TIMED = "not timed"
MISSING = "not measured"


def interval(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Return ` [low, high]`; nothing where there is none."""
    return "" if pandas.isna(low) or pandas.isna(high) else f" [{write(low)}, {write(high)}]"


def quality(line: dict) -> str:
    """Return `89.4 % [87.2, 91.3]`."""
    if pandas.isna(line["value"]):
        return MISSING
    write = lambda value: number(value, line["metric"])  # noqa: E731
    ends = lambda value: write(value).removesuffix(" %")  # noqa: E731
    return write(line["value"]) + interval(line["low"], line["high"], ends)


def change(line: dict) -> str:
    """Return the paired difference from dense: `−1.15 pp [−2.38, +0.04]`."""
    if line["verdict"] == "baseline":
        return "dense"
    return difference(line["delta"], line["delta_low"], line["delta_high"], line["metric"])


def difference(value: float, low: float, high: float, metric: str) -> str:
    """Return a difference of a metric with its interval."""
    if value is None or pandas.isna(value):
        return MISSING
    return difference_text({"value": value, "low": low, "high": high}, metric)


def likelihood(line: dict) -> str:
    """Return the change of cross-entropy or bits per byte, which moves before a score does."""
    if pandas.isna(line["likelihood_delta"]):
        return ""
    ends = (line["likelihood_delta"], line["likelihood_low"], line["likelihood_high"])
    return change_text(*ends, metric_name(line["likelihood"]))


def size(line: dict) -> str:
    """Return the megabytes (10⁶ bytes) of the written file."""
    return MISSING if pandas.isna(line["size_mb"]) else f"{line['size_mb']:.1f} MB"


def ratio(line: dict, shape: str) -> str:
    """Return time over dense time: `0.50 [0.48, 0.53]`."""
    centre = line.get(f"ratio.{shape}")
    if centre is None or pandas.isna(centre):
        return ""
    return f"{centre:.2f}" + interval(
        line[f"ratio_low.{shape}"], line[f"ratio_high.{shape}"], lambda end: f"{end:.2f}"
    )


def large_batch(line: dict) -> str:
    """Return time over dense time at batch 8, of a decoder's prefill, of a translator's encoder."""
    shapes = ("batch8", "prefill_b8", "encode_b8")
    return next((f"time {text}" for shape in shapes if (text := ratio(line, shape))), NOT_TIMED)


def ratios(line: dict) -> str:
    """Return every timed shape's ratio: `batch1 0.50, batch8 0.61`."""
    shapes = [name.partition(".")[2] for name in line if name.startswith("ratio.")]
    texts = [
        f"{shape_name(shape)} {ratio(line, shape).partition(' [')[0]}"
        for shape in shapes
        if ratio(line, shape)
    ]
    return ", ".join(texts) or NOT_TIMED


def bound(line: dict) -> str:
    """Return the upper one-sided 95 % bound of the loss, in percent of the dense quality."""
    return (
        "–"
        if line["bound_share"] is None or pandas.isna(line["bound_share"])
        else f"{100 * line['bound_share']:.1f} %"
    )


def p_value(p: float) -> str:
    """Return `< 0.001` or `0.032`."""
    return "" if p is None or pandas.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def margins(line: dict) -> str:
    """Return at which margins the configuration is non-inferior: `1 %, 5 %`."""
    names = [
        text for name, text in (("noninferior_1", "1 %"), ("noninferior_5", "5 %")) if line[name] is True
    ]
    return ", ".join(names) or "–"


KINDS: dict[str, Callable[[dict], str]] = {
    "quality": quality,
    "change": change,
    "likelihood": likelihood,
    "size": size,
    "ratios": ratios,
    "time": large_batch,
    "bound": bound,
    "verdict": lambda line: line["verdict"] or MISSING,
    "margins": margins,
    "metric": lambda line: metric_name(line["metric"]),
    "p": lambda line: p_value(line["p_holm"]),
}


def written(line: dict, kind: str) -> str:
    """Return a kind of `KINDS`, `ratio.SHAPE`, or the plain number of a column."""
    if kind in KINDS:
        return KINDS[kind](line)
    if kind.startswith("ratio."):
        return ratio(line, kind.partition(".")[2]) or NOT_TIMED
    cell = line.get(kind)
    return MISSING if cell is None or pandas.isna(cell) else cell if isinstance(cell, str) else number(cell)


def table(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def current(models: Iterable[str]) -> list[str]:
    """Return the models, each once, without those that another of them has replaced."""
    models, replaced = list(dict.fromkeys(models)), superseded()
    return [model for model in models if replaced.get(model) not in models]
