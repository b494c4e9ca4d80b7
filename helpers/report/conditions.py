"""Under which conditions the rows were measured."""

from helpers.report import values
from lmcompress.results.store import Row


def table(rows: list[Row]) -> str:
    """Return per notebook its rows, minutes of measuring, machines and the last day."""
    lines = []
    for notebook in dict.fromkeys(row["notebook"] for row in rows):
        provenance = [row["provenance"] for row in rows if row["notebook"] == notebook]
        machines = sorted({p["machine"].get("gpu") or p["machine"].get("cpu") for p in provenance})
        days = sorted(p["started"][:10] for p in provenance)
        lines.append(
            [
                notebook,
                str(len(provenance)),
                f"{sum(p['wall_s'] for p in provenance) / 60:.0f}",
                ", ".join(machines),
                days[-1],
            ]
        )
    return values.table(["Notebook", "Rows", "Minutes", "Processor", "Until"], lines)
