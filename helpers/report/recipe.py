"""The recipe of the sheared section: longer texts, its switches one by one, the published shape."""

import numpy as np

from helpers.report import rows_sheared as p
from helpers.report import seeds
from helpers.report import wording as w
from lmcompress.results.verdicts import tested_p
from lmcompress.stats import holm

PUBLISHED = 1_345_423_360  # parameters
PARTS = ("tokens_per_s", "peak_bytes", "loss")


def contexts(rows: list[dict]) -> str:
    """Perplexity by window, positions stretched or as they were."""
    contexts = p.contexts(rows)
    if not contexts:
        return ""
    trained = next(row for row in rows if row["technique"] == "context-lengths")["settings"]["trained"]
    compared = [one for one in contexts if one["difference"]]
    values = dict(
        zip(map(id, compared), holm([tested_p(one["difference"]) for one in compared]), strict=True)
    )
    lines = []
    for one in contexts:
        title = p.KINDS[one["kind"]][0] + ("" if one["kind"] == "none" else f", × {one['stretch']:g}")
        gap = one["difference"]
        change = f"{w.difference_text(gap, '')}, {w.p_text(values[id(one)])}" if gap else ""
        lines.append([str(one["window"]), title, w.with_interval(one), change])
    sizes = {one["window"]: one["difference"]["n"] for one in compared}
    scored = w.listing([f"{count} windows of {window}" for window, count in sizes.items()]) if sizes else ""
    title = f"**Texts longer than the {trained} tokens it was trained on**, positions stretched or not"
    title += f", on {scored} tokens:" if scored else ":"
    return f"{title}\n\n" + w.table(["Window", "Positions", "Perplexity", "Minus that as trained"], lines)


def switches(rows: list[dict]) -> str:
    """Each switch against the baseline: speed, memory and loss, a family of tests each."""
    runs_by_switch = p.switches(rows)
    baseline = runs_by_switch.get("baseline", {})
    gaps_by_switch = []
    for name, several in runs_by_switch.items():
        shared = [seed for seed in several if seed in baseline and name != "baseline"]
        for quantity in PARTS if shared else ():
            pairs = [(several[seed][quantity], baseline[seed][quantity]) for seed in shared]
            gaps = [
                gap_entry - other
                if quantity == "loss"
                else 1 - gap_entry / other
                if quantity == "tokens_per_s"
                else gap_entry / other - 1
                for gap_entry, other in pairs
            ]
            gaps_by_switch.append(
                {"switch": name, "part": quantity, "gaps": gaps, "value": float(np.mean(gaps))}
            )
    if not gaps_by_switch:
        return ""
    for quantity in PARTS:
        seeds.tested([gap_entry for gap_entry in gaps_by_switch if gap_entry["part"] == quantity])
    lines = []
    for name in dict.fromkeys(gap_entry["switch"] for gap_entry in gaps_by_switch):
        by_quantity = {
            gap_entry["part"]: gap_entry for gap_entry in gaps_by_switch if gap_entry["switch"] == name
        }
        speed, memory, loss = (by_quantity[quantity] for quantity in PARTS)
        lines.append(
            [
                name,
                f"{1 - speed['value']:.2f}",
                _word(speed),
                f"{1 + memory['value']:.2f}",
                _word(memory),
                f"{loss['value']:+.3f}".replace("-", "−"),
                _word(loss),
            ]
        )
    runs = [run for several in runs_by_switch.values() for run in several.values()]
    first = next(iter(baseline.values()))
    title = (
        f"**The switches of the recipe, one at a time**, {first['tokens']:,} tokens each, {len(baseline)} "
        f"seed{'s' if len(baseline) > 1 else ''}; the baseline's "
        f"{w.number(float(np.mean([run['tokens_per_s'] for run in baseline.values()])))} tokens/s, "
        f"{w.bytes_text(float(np.mean([run['peak_bytes'] for run in baseline.values()])))} of peak "
        f"memory{' with the libraries' if runs[0]['peak_kind'] == 'rss' else ''}:"
    )
    header = ["Switch", "Tokens/s / baseline", "", "Peak memory / baseline", "", "Loss − baseline", ""]
    return f"{title}\n\n" + w.table(header, lines)


def _word(entry: dict) -> str:
    return "one seed, no test" if "p" not in entry and len(entry["gaps"]) == 1 else seeds.verdict(entry)


def counts(rows: list[dict]) -> str:
    """Parameters of the published shape."""
    row = next((row for row in rows if row["technique"] == "shape-counts"), None)
    if row is None:
        return ""
    parameters = row["achieved"]["parameters"]
    same = "as published" if parameters == PUBLISHED else f"not the {PUBLISHED:,} that were published"
    return f"The published shape, built without numbers, has {parameters:,} parameters, {same}."
