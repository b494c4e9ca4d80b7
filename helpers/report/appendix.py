"""All rows of one notebook as Markdown tables, which the pages `report/NN_*.md` and the notebooks show.

Every comparison with the dense model is corrected (Holm) within one family: all configurations of a model and
task among the rows handed in, each once, of its first seed.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas

from helpers.report import switches, values
from lmcompress.results.frame import distinct_labels, frame
from lmcompress.results.labels import label, number
from lmcompress.results.rows import machine_of, model_task_of, model_tasks, with_times_again
from lmcompress.results.store import Row
from lmcompress.results.verdicts import comparisons
from lmcompress.study.decision import comparable_rows

if TYPE_CHECKING:
    from IPython.display import Markdown

COLUMNS = {
    "Quality": "quality",
    "Difference from dense": "change",
    "Cross-entropy or bits": "likelihood",
    "p (Holm)": "p",
    "Verdict": "verdict",
    "Loss bound": "bound",
    "Non-inferior at": "margins",
    "File": "size",
    "Time / dense time": "ratios",
}
FIRST = "model stack kind role is_bias block index part kernel shape window n std skewness excess_kurtosis"
FIRST = (*FIRST.split(), "fraction_above_0_1", "fraction_above_1", "mean")  # columns of an analysis
MANY_MODELS = 12  # from which on each model has a line instead of a table
_HIDDEN = ("settings", "first", "second", "keys")
NUMBERS = ({int}, {float}, {int, float})  # kinds of all that a mapping holds
_LEAST, _MOST = 2, 11  # columns of a table of records


def paragraphs(
    rows: list[Row], notebook: str | None = None, family: pandas.DataFrame | None = None
) -> list[str]:
    """Return the tables of the rows of `notebook`, by default of all rows given.

    `family` is the frame of the compared rows, by default made from those given.
    """
    family = frame(comparable_rows(rows), details=False) if family is None else family
    family = family.set_index("key")
    shown = [row for row in with_times_again(rows) if notebook in (None, row["notebook"])]
    scored = [row for row in shown if row["quality"]]
    blocks, pairs = [], model_tasks(scored)
    if len(pairs) > MANY_MODELS:
        blocks += ["### All models", _results(scored, family, named=True)]
        pairs = []
    for model_task in pairs:
        group = [row for row in scored if model_task_of(row) == model_task]
        blocks += [f"### {values.model_name(model_task[0])} on {model_task[1]}", _conditions(group)]
        blocks.append(_results(group, family))
    for model_task in model_tasks(scored):
        if tests := _comparisons(rows, model_task, notebook):
            blocks += [
                f"### Compared with each other: {values.model_name(model_task[0])} on {model_task[1]}",
                tests,
            ]
    blocks += _analyses([row for row in shown if not row["quality"]])
    return [block for block in blocks if block]


def results(rows: list[Row]) -> "Markdown":
    """Return `paragraphs` as a notebook shows them."""
    from IPython.display import Markdown  # here: the report is written without it

    return Markdown("\n\n".join(paragraphs(rows)))


def _results(rows: list[Row], family: pandas.DataFrame, *, named: bool = False) -> str:
    """Return a line per row, the dense model first; what repeats another seed stands outside the family."""
    table = frame(rows, details=False)
    table["p_holm"] = table["key"].map(family["p_holm"])
    table["verdict"] = table["key"].map(family["verdict"]).fillna("repeat or control")
    labels = distinct_labels(rows)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["technique"] != "dense")
    lines = []
    for index in order:
        line = table.iloc[index].to_dict()
        name = f"{line['model']}: {labels[index]}" if named else labels[index]
        lines.append([name, *(values.written(line, kind) for kind in COLUMNS.values())])
    used = [
        i
        for i in range(len(COLUMNS) + 1)
        if i == 0 or {line[i] for line in lines} - {"", "–", values.NOT_TIMED, values.MISSING}
    ]
    return values.table(
        [["Configuration", *COLUMNS][i] for i in used], [[line[i] for i in used] for line in lines]
    )


def _conditions(rows: list[Row]) -> str:
    """Return in a sentence what the rows were measured on."""
    provenance = [row["provenance"] for row in rows]
    machines = sorted(set(map(machine_of, rows)))
    examples = {row["quality"]["n"] for row in rows}
    threads = sorted({str(p["threads"]) for p in provenance})
    return (
        f"{max(examples):,} scored units, {len(rows)} rows, on {'; '.join(machines)}, {'/'.join(threads)} "
        f"threads, torch {provenance[0]['packages'].get('torch', '?')}."
    )


def _comparisons(rows: list[Row], model_task: tuple[str, str], notebook: str | None) -> str:
    lines = []
    for row, p, word in comparisons(rows, model_task):
        if notebook not in (None, row["notebook"]):
            continue
        comparison, gap = row["achieved"], row["achieved"]["difference"]
        change = values.difference(gap["value"], gap["low"], gap["high"], comparison["metric"])
        names = [
            label(comparison[side]["technique"], comparison[side]["settings"]) for side in ("first", "second")
        ]
        lines.append([*names, change, values.p_value(p), word])
    return (
        values.table(["First", "Second", "First − second", "p (Holm)", "Verdict of the first"], lines)
        if lines
        else ""
    )


def _analyses(rows: list[Row]) -> list[str]:
    """Return a table per kind of analysis: a line per record, or per row that holds single numbers."""
    blocks = ["### Switches of the training recipe", switched] if (switched := switches.table(rows)) else []
    apart = ("paired-difference", "switch")
    for technique in dict.fromkeys(row["technique"] for row in rows if row["technique"] not in apart):
        records: dict[str, list[dict]] = {}
        for row in (row for row in rows if row["technique"] == technique):
            for name, lines in _records(row["achieved"]):
                named = [{"model": values.model_name(row["model"])} | line for line in lines]
                records.setdefault(name, []).extend(named)
        for name, lines in records.items():
            columns = sorted(dict.fromkeys(name for line in lines for name in line), key=_rank)
            columns = [c for c in columns if c == "model" or len({str(line.get(c)) for line in lines}) > 1]
            columns = columns[:_MOST]
            if len(columns) >= _LEAST and len(lines) > 1:
                cells = [[_cell(line.get(column)) for column in columns] for line in lines]
                title = technique if name == "" else f"{technique}: {name}"
                blocks += [f"### {title.replace('-', ' ').capitalize()}", values.table(columns, cells)]
    return blocks


def _rank(column: str) -> int:
    """Return the place of a column: what is spoken of, its moments, then the others as they come."""
    return FIRST.index(column) if column in FIRST else len(FIRST)


def _records(achieved: dict) -> Iterable[tuple[str, list[dict]]]:
    """Yield each list of mappings in an analysis, and its single numbers as one record."""
    single = {name: cell for name, cell in achieved.items() if not isinstance(cell, dict | list)}
    if single:
        yield "", [single]
    for name, cell in achieved.items():
        if isinstance(cell, list) and cell and isinstance(cell[0], dict):
            plain = [{k: v for k, v in entry.items() if not isinstance(v, dict | list)} for entry in cell]
            yield name, plain
        elif isinstance(cell, dict) and name not in _HIDDEN and set(map(type, cell.values())) in NUMBERS:
            yield name, [{"part": key, name: entry} for key, entry in cell.items()]


def _cell(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3g}" if abs(cell) < 1e-3 else number(cell)
