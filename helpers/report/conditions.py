"""Under which conditions the rows were measured, and how far times vary from process to process."""

from helpers.report import values
from lmcompress.results.labels import label_of, shape_name
from lmcompress.results.rows import TIMED_AGAIN, machine_of
from lmcompress.results.store import Row


def table(rows: list[Row]) -> str:
    """Return per notebook its rows, minutes of measuring, machines and the last day."""
    lines = []
    for notebook in dict.fromkeys(row["notebook"] for row in rows):
        measured = [row for row in rows if row["notebook"] == notebook]
        provenance = [row["provenance"] for row in measured]
        machines = sorted(set(map(machine_of, measured)))
        days = sorted(p["started"][:10] for p in provenance)
        lines.append(
            [
                f"[{notebook}]({notebook}.md)",
                str(len(provenance)),
                f"{sum(p['wall_s'] for p in provenance) / 60:.0f}",
                "; ".join(machines),
                days[-1],
            ]
        )
    return values.table(["Notebook", "Rows", "Minutes", "Processor", "Until"], lines)


def times_again(rows: list[Row]) -> str:
    """Return the times over dense of each process, of what was timed in several; "" if nothing was."""
    by_key = {row["key"]: row for row in rows if row["quality"]}
    runs: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        if row["technique"] == TIMED_AGAIN and (of := by_key.get(row["settings"]["of"])):
            name = f"{values.model_name(of['model'])}: {label_of(of)}"
            for shape in row["achieved"]["shapes"]:
                span = "{ratio:.2f} [{ratio_low:.2f}, {ratio_high:.2f}]".format(**shape)
                timed = name, shape_name(shape["shape"]), machine_of(row)
                runs.setdefault(timed, {})[row["settings"]["process"]] = span
    lines = [[*timed, ", ".join(dict(sorted(spans.items())).values())] for timed, spans in runs.items()]
    header = ["Configuration", "Call", "Processor", "Time / dense time in each process, 95 % intervals"]
    return values.table(header, lines) if lines else ""
