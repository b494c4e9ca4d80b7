"""Names of models and tasks in tables: different for different models, and for different scored data."""

from collections.abc import Callable, Hashable, Iterable


def told_apart(rows: Iterable[dict]) -> list[dict]:
    """Return the rows under names that no two models share, nor two evaluation sets of one model.

    Models of one name (two folders "checkpoint-500") get their folder's parent before it, data of one name (a
    file edited between runs, a quick look with `limit`) the number of examples behind it, or both their hash.
    One model measured under two names, a copied folder, has the name it was measured under first. A name that
    means one thing stays as it is.
    """
    rows, first_names = list(rows), {}
    for row in rows:
        first_names.setdefault(row["provenance"]["model_hash"], row["model"])
    rows = [row | {"model": first_names[row["provenance"]["model_hash"]]} for row in rows]
    rows = _renamed(
        rows, "model", "model_hash", lambda row: row["provenance"].get("folder"), within=lambda row: None
    )
    return _renamed(rows, "task", "data_hash", _with_count, within=lambda row: row["model"])


def _with_count(row: dict) -> str | None:
    count = row["provenance"].get("n_examples")
    return count and f"{row['task']} ({count:,} examples)"


def _renamed(
    rows: Iterable[dict],
    field: str,
    hash_name: str,
    longer: Callable[[dict], str | None],
    within: Callable[[dict], Hashable],
) -> list[dict]:
    """Return the rows, `field` renamed (`longer`, or hash) where it means several hashes, `within` equal."""
    rows = list(rows)
    names: dict[tuple, dict[str, str | None]] = {}  # by the name of several: hash -> longer name
    for row in rows:
        by_hash = names.setdefault((within(row), row[field]), {})
        content = row["provenance"][hash_name]
        by_hash[content] = by_hash.get(content) or longer(row)
    return [row | {field: _name(names[within(row), row[field]], row, field, hash_name)} for row in rows]


def _name(by_hash: dict[str, str | None], row: dict, field: str, hash_name: str) -> str:
    content = row["provenance"][hash_name]
    if len(by_hash) == 1:
        return row[field]
    is_telling = by_hash[content] and list(by_hash.values()).count(by_hash[content]) == 1
    return by_hash[content] if is_telling else f"{row[field]} ({str(content)[:8]})"
