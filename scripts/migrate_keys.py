"""Give the rows of a run folder the keys of today: `python -m scripts.migrate_keys runs/pocket`.

Keys were made before without the tokenizer. A row of a model that lies in the run's `models` folder and was
not published by this project gets its `tokenizer_hash` and the key that follows; names of score files and
references of other rows follow, too. Rows of models that are no longer there keep theirs. Doing it twice
changes nothing.
"""

import json
import sys
from pathlib import Path

from lmcompress.errors import StudyError
from lmcompress.models import loading
from lmcompress.paths import write_text
from lmcompress.results.store import Row, canonical, key_of, published_tokenizers


def migrate(run: Path) -> dict[str, str]:
    """Rewrite the rows under `run`, each file as a whole, and return old key -> new key of those that
    changed.
    """
    files = {path: _rows(path) for path in sorted((run / "rows").glob("*.jsonl"))}
    tokenizers = _tokenizers(run / "models")
    keys = {}
    for row in (row for rows in files.values() for row in rows):
        tokenizer = tokenizers.get(row["provenance"]["model_hash"])
        if tokenizer and row["task"] != "none" and key_of(row) == row["key"]:
            row["provenance"].setdefault("tokenizer_hash", tokenizer)
        keys[row["key"]] = key_of(row)
    changed = {old: new for old, new in keys.items() if old != new}
    while _follow(files.values(), changed):  # a comparison's settings hold keys, so its own key follows
        pass
    scores = run / "rows" / "scores"
    for old, new in changed.items():
        if (scores / f"{old}.safetensors").exists():
            (scores / f"{old}.safetensors").rename(scores / f"{new}.safetensors")
    if changed:
        for path, rows in files.items():
            write_text(path, "".join(canonical(row) + "\n" for row in rows))
    return changed


def _follow(files, changed: dict[str, str]) -> bool:
    """Put new keys wherever a row names an old one; return whether that made further keys change."""
    count = len(changed)
    for row in (row for rows in files for row in rows):
        settings, latency, provenance = row["settings"], row["latency"] or {}, row["provenance"]
        for holder, names in ((settings, ("first", "second")), (latency, ("measured_on",))):
            holder |= {name: changed[holder[name]] for name in names if holder.get(name) in changed}
        if row["key"] in changed.values():
            continue
        new = key_of(row)
        if new != row["key"]:
            changed[row["key"]] = row["key"] = new
            if provenance.get("scores"):
                provenance["scores"] = f"scores/{new}.safetensors"
    return len(changed) > count


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _tokenizers(models: Path) -> dict[str, str]:
    """Return model hash -> tokenizer hash of the models in a folder that this project did not publish."""
    tokenizers = {}
    for config in models.rglob("config.json"):
        try:
            model, tokenizer = loading.identity(config.parent), loading.tokenizer_identity(config.parent)
        except StudyError:  # no model that a row could be of: compressed, or without weights
            continue
        if tokenizer and published_tokenizers().get(model) != tokenizer:
            tokenizers[model] = tokenizer
    return tokenizers


def main(folders: list[str]) -> int:
    """Migrate each folder and say how many keys changed."""
    for folder in folders:
        print(f"{folder}: {len(migrate(Path(folder)))} keys changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
