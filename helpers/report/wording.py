"""How numbers become words: one place that formats a value, an interval, a difference and a verdict.

A sentence says "no measurable change" when, after Holm's correction over all comparisons of its model and
task, the paired difference to the dense model could be chance.
"""

from collections.abc import Callable
from statistics import NormalDist, mean

from helpers.figures.core import metric_name as metric_name
from helpers.report.names import grid_words as grid_words
from helpers.report.names import name_of as name_of
from helpers.report.names import named as named
from helpers.report.names import percent as percent
from lmcompress.stats import holm

ALPHA = 0.05
COARSE = 0.02  # below this, too few of a thousand resamples stand behind a bootstrap's p
PERCENT = {"accuracy"}
POINTS = {"accuracy", "spearman"}  # whose differences are told in hundredths, called points
WORDS = ("better", "no measurable difference", "worse")
SHOWN = 4  # lines of a list that is printed whole
UNITS = {"perplexity": "of perplexity", "chrf": "chrF", "bleu": "BLEU"}


def number(value: float, metric: str = "") -> str:
    """A value in its metric's customary form: accuracies as percent, others to sensible digits."""
    if metric in PERCENT:
        return f"{100 * value:.1f} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def with_interval(part: dict, metric: str = "") -> str:
    """`91.2 % [89.1, 93.0]` from a value with its 95 % interval."""
    if part["value"] is None:
        return "not defined"
    low, high = (number(part[end], metric).removesuffix(" %") for end in ("low", "high"))
    return f"{number(part['value'], metric)} [{low}, {high}]"


def difference(row: dict) -> str:
    """`−2.1 points [−3.0, −1.2]`: the paired difference to the dense model with its interval."""
    return difference_text(row["quality"]["difference"], row["quality"]["metric"])


def difference_text(part: dict, metric: str) -> str:
    """A paired difference with its interval, in points where the metric is a fraction or a correlation."""
    scale, unit = scale_of(metric)
    name = " points" if unit == "points" else ""
    texts = [_signed(scale * part[field]) for field in ("value", "low", "high")]
    return f"{texts[0]}{name} [{texts[1]}, {texts[2]}]"


def scale_of(metric: str) -> tuple[float, str]:
    """What a difference of a metric is multiplied by, and the unit it then has."""
    return (100.0, "points") if metric in POINTS else (1.0, UNITS.get(metric, metric))


def _signed(value: float) -> str:
    text = (
        f"{abs(value):,.0f}"
        if abs(value) >= 1000
        else f"{abs(value):.1f}"
        if abs(value) >= 10
        else f"{abs(value):.2f}"
    )
    return ("−" if value < 0 else "+") + text


def bytes_text(size: float) -> str:
    """Bytes as MB (10⁶ bytes)."""
    return f"{size / 1e6:.1f} MB"


def tested_p(difference: dict) -> float:
    """The p of a recorded difference, fine enough to be corrected over dozens of comparisons.

    A bootstrap of a thousand resamples cannot tell 0.001 from less. Where its p is below `COARSE`, that of the normal
    curve with the width of the interval is taken.
    """
    if difference["p"] >= COARSE or "bootstrap" not in difference["test"]:
        return difference["p"]
    spread = (difference["high"] - difference["low"]) / (2 * NormalDist().inv_cdf(0.975))
    return 2 * NormalDist().cdf(-abs(difference["value"]) / spread) if spread else difference["p"]


def adjusted(rows: list[dict]) -> dict[str, tuple[float, str]]:
    """Per row key: Holm-adjusted p over these rows' comparisons with dense, and the verdict it leads to."""
    compared = [row for row in rows if row["quality"] and row["quality"]["difference"]]
    values = [tested_p(row["quality"]["difference"]) for row in compared]
    return {row["key"]: (p, _verdict(row, p)) for row, p in zip(compared, holm(values), strict=True)}


def comparisons(
    rows: list[dict], pair: tuple[str, str], keep: Callable[[dict], bool] = lambda found: True
) -> list[tuple[dict, float, str]]:
    """The tested differences between two ways on one model and task: `achieved`, Holm-adjusted p, and a word.

    The word is "better", "worse" or "no measurable difference", of the first against the second. `keep` chooses the
    family of comparisons that Holm's correction is over. "keys" holds the keys of both rows.
    """
    own = [
        r["achieved"] | {"keys": r["settings"]}
        for r in rows
        if r["technique"] == "paired-difference" and (r["model"], r["task"]) == pair
    ]
    own = [found for found in own if found["difference"] and keep(found)]
    adjusted_p = holm([tested_p(found["difference"]) for found in own])
    return [(found, p, _direction(found, p)) for found, p in zip(own, adjusted_p, strict=True)]


def _direction(found: dict, p: float) -> str:
    if p >= ALPHA:
        return "no measurable difference"
    return "better" if (found["difference"]["value"] > 0) == found["higher_is_better"] else "worse"


def _verdict(row: dict, p: float) -> str:
    quality = row["quality"]
    if quality["collapsed"]:
        return "collapsed"
    if p >= ALPHA:
        return "no measurable change"
    return "better" if (quality["difference"]["value"] > 0) == quality["higher_is_better"] else "worse"


def p_text(p: float) -> str:
    """`p < 0.001` or `p = 0.032`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def with_column(lines: list[list[str]], column: list[str]) -> str:
    """A Markdown table of `lines`, the head first, with a further column, unless that is empty."""
    header, *rest = [
        [*line, *more]
        for line, more in zip(lines, [[one] for one in column] or [[]] * len(lines), strict=True)
    ]
    return table(header, rest)


def listing(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def plural(count: float, one: str, many: str = "") -> str:
    """`1 head`, `2 heads`, `1,500 examples`."""
    return f"{count:,.10g} {one if count == 1 else many or one + 's'}"


def tally(words: list[str], order: tuple[str, ...] = WORDS) -> str:
    """`2 better and 5 no measurable difference`: how often each word came out, those of `order` first."""
    known = [word for word in dict.fromkeys((*order, *words)) if word in words]
    return listing([f"{words.count(word)} {word}" for word in known])


def folded(title: str, body: str) -> str:
    """A part that is read by who asks for it."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def tested_list(title: str, entries: list[tuple[str, list[str]]]) -> str:
    """Tested differences, a line and its words each: counted, those that are measurable shown, the others folded away."""
    if not entries:
        return ""
    if len(entries) <= SHOWN:
        return f"{title}:\n\n" + "\n".join(line for line, _ in entries)
    words = [word for _, several in entries for word in several]
    still = [line for line, several in entries if set(several) <= {WORDS[1]}]
    shown = [line for line, several in entries if not set(several) <= {WORDS[1]}]
    count = plural(len(words), "test")
    text = (
        f"{title}, {count}: {tally(words)}."
        if shown
        else f"{title}: none of {count} shows a measurable difference."
    )
    text += "\n\n" + "\n".join(shown) if shown else ""
    fold = folded(f"{plural(len(still), 'comparison')} without a measurable difference", "\n".join(still))
    return f"{text}\n\n{fold}" if still else text


def likelihood_of(row: dict) -> tuple[str, dict] | None:
    """The metric that says how likely the right answers are, lower is better, and its part of a row that was compared."""
    parts = (row["quality"] or {}).get("secondary") or {}
    return next(((name, part) for name, part in parts.items() if "difference" in part), None)


def likelihood_loss(row: dict) -> str:
    """How much less likely the right answers became, `cross-entropy from 0.269 to 0.311`, where its own interval shows it.

    `cross-entropy not defined` where it is no number; nothing where no loss shows, or no likelihood is recorded.
    """
    found = likelihood_of(row)
    if found is None:
        return ""
    name, part = metric_name(found[0]), found[1]
    change = part["difference"]
    if change is None:
        return f"{name} not defined"
    ends = (number(value) for value in (part["value"] - change["value"], part["value"]))
    return f"{name} from {' to '.join(ends)}" if change["low"] > 0 else ""


def less_likely(rows: list[dict]) -> set[str]:
    """The keys of the rows to which the right answers are measurably less likely than to the dense model.

    Corrected over all of these rows of a model and task that record it.
    """
    families: dict[tuple, list] = {}
    lost = set()
    for row in rows:
        found = likelihood_of(row)
        if found and found[1]["difference"]:
            families.setdefault((row["model"], row["task"]), []).append((row, found[1]["difference"]))
        elif found:
            lost.add(row["key"])
    for family in families.values():
        adjusted_p = holm([tested_p(change) for _, change in family])
        lost |= {
            row["key"]
            for (row, _), p in zip(family, adjusted_p, strict=True)
            if p < ALPHA and likelihood_loss(row)
        }
    return lost


def likelihood_column(dense: dict, groups: list[list[dict]]) -> list[str]:
    """A table's column of how likely the right answers are: head, dense model, and a cell for each group of seeds.

    Empty where that is not recorded.
    """
    rows = [row for group in groups for row in group]
    likely, lost = next(filter(None, map(likelihood_of, rows)), None), less_likely(rows)
    if likely is None:
        return []
    name, cells = likely[0], []
    for group in ([dense], *groups):
        values = [row["quality"]["secondary"][name]["value"] for row in group]
        worse = sum(row["key"] in lost for row in group)
        text = "not defined" if None in values else number(mean(values)) + (", worse" if worse else "")
        cells.append(text + (f" in {worse} of {len(group)}" if 0 < worse < len(group) else ""))
    return [metric_name(name), *cells]


def if_only(rows: list[dict], verdicts: dict) -> str:
    """Where a loss may show that `unnoticed` sees and the score's test does not, within a sentence."""
    alone = any(likelihood_loss(row) and _stands(row, verdicts) for row in rows)
    return "if only in its own interval" + (" or in how likely the right answers are" if alone else "")


def unnoticed(rows: list[dict], verdicts: dict) -> list[dict]:
    """The rows a summary may recommend: no loss after Holm's correction, nor in the interval of the one difference.

    The correction alone would let pass, in a large family of comparisons, losses that their own interval shows. Nor may
    the interval of the likelihood show one: on few examples an accuracy or a BLEU stands still for long.
    """
    return [row for row in rows if _stands(row, verdicts) and not likelihood_loss(row)]


def _stands(row: dict, verdicts: dict) -> bool:
    """Whether the score shows no loss, neither in its test nor in its own interval."""
    word, difference = verdicts.get(row["key"], (1, ""))[1], row["quality"]["difference"]
    spared = difference["high"] if row["quality"]["higher_is_better"] else -difference["low"]
    return word == "better" or (word == "no measurable change" and spared >= 0)
