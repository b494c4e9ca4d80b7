"""Numbers as Markdown: tables, lists, counts and folds, over `lmcompress.results.labels`."""

from collections.abc import Callable
from statistics import mean

from lmcompress.results.labels import bytes_text as bytes_text
from lmcompress.results.labels import difference as difference
from lmcompress.results.labels import difference_text as difference_text
from lmcompress.results.labels import grid_words as grid_words
from lmcompress.results.labels import label as label
from lmcompress.results.labels import label_of as label_of
from lmcompress.results.labels import likelihood_loss as likelihood_loss
from lmcompress.results.labels import metric_name as metric_name
from lmcompress.results.labels import number as number
from lmcompress.results.labels import percent as percent
from lmcompress.results.labels import plural as plural
from lmcompress.results.labels import with_interval as with_interval
from lmcompress.results.verdicts import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    less_likely,
    likelihood_of,
    shows_no_loss,
)

WORDS = (BETTER, NO_DIFFERENCE, WORSE)
SHOWN = 4  # lines of a list that is printed whole


def p_text(p: float) -> str:
    """`p < 0.001` or `p = 0.032`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def with_column(lines: list[list[str]], column: list[str]) -> str:
    """A Markdown table of `lines`, the head first, with a further column, unless that is empty."""
    header, *lines_after = [
        [*line, *more]
        for line, more in zip(lines, [[cell] for cell in column] or [[]] * len(lines), strict=True)
    ]
    return table(header, lines_after)


def ratio_text(timing: dict) -> str:
    """Return time over dense time with its interval: `0.50 [0.48, 0.53]`."""
    return f"{timing['ratio']:.2f} [{timing['ratio_low']:.2f}, {timing['ratio_high']:.2f}]"


def entrant_label(entrant: dict) -> str:
    """Return one side of a comparison in words."""
    return label(entrant["technique"], entrant["settings"])


def change_text(comparison: dict, p: float) -> str:
    """Return a tested difference with its p: `−2.1 points [−3.0, −1.2], p = 0.032`."""
    return f"{difference_text(comparison['difference'], comparison['metric'])}, {p_text(p)}"


def test_line(
    test: tuple[dict, float, str], name_of: Callable[[dict], str] = entrant_label
) -> tuple[str, list[str]]:
    """Return a comparison as an entry of `tested_list`: `- A, against B: better (+0.2 …)`, and its word."""
    comparison, p, word = test
    names = f"{name_of(comparison['first'])}, against {name_of(comparison['second'])}"
    return f"- {names}: {word} ({change_text(comparison, p)})", [word]


def listing(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def tally(words: list[str], order: tuple[str, ...] = WORDS) -> str:
    """`2 better and 5 no measurable difference`: how often each word came out, those of `order` first."""
    present = [word for word in dict.fromkeys((*order, *words)) if word in words]
    return listing([f"{words.count(word)} {word}" for word in present])


def folded(title: str, body: str) -> str:
    """A part that is read by who asks for it."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def tested_list(title: str, entries: list[tuple[str, list[str]]]) -> str:
    """List tested differences: counted, the measurable ones shown, the others folded away."""
    if not entries:
        return ""
    if len(entries) <= SHOWN:
        return f"{title}:\n\n" + "\n".join(line for line, _ in entries)
    words = [word for _, several in entries for word in several]
    unchanged = [line for line, several in entries if set(several) <= {NO_DIFFERENCE}]
    shown = [line for line, several in entries if not set(several) <= {NO_DIFFERENCE}]
    count = plural(len(words), "test")
    text = (
        f"{title}, {count}: {tally(words)}."
        if shown
        else f"{title}: none of {count} shows a measurable difference."
    )
    text += "\n\n" + "\n".join(shown) if shown else ""
    fold = folded(
        f"{plural(len(unchanged), 'comparison')} without a measurable difference", "\n".join(unchanged)
    )
    return f"{text}\n\n{fold}" if unchanged else text


def likelihood_column(dense: dict, groups: list[list[dict]]) -> list[str]:
    """A table's column of how likely the right answers are: head, dense model, and a cell for each group of
    seeds.

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
    alone = any(likelihood_loss(row) and shows_no_loss(row, verdicts) for row in rows)
    return "if only in its own interval" + (" or in how likely the right answers are" if alone else "")
