"""Rows that the section of other text asks for."""


def points(rows: list[dict], metric: str) -> list[tuple[str, dict, dict]]:
    """Return the numbers of one metric: name of the text or field, row, and value with its interval."""
    numbers = []
    for row in (row for row in rows if row["quality"] and row["quality"]["metric"] == metric):
        quality = row["quality"]
        fields = {
            name.removeprefix("accuracy_").replace("_", " and "): quality_part
            for name, quality_part in quality["secondary"].items()
            if name.startswith("accuracy_")
        }
        by_name = {"all" if fields else row["task"]: quality} | fields
        numbers += [
            (name, row, quality_part)
            for name, quality_part in by_name.items()
            if quality_part["value"] is not None
        ]
    return numbers
