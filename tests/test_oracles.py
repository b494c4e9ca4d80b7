"""What no rearrangement of the code may change: the keys of the committed rows, and the report they give."""

import shutil

from helpers.report import build
from lmcompress.models import loading
from lmcompress.paths import MODELS, ROOT
from lmcompress.results.store import RowStore, key_of, published_rows, published_tokenizers
from scripts import migrate_keys

ROWS = published_rows()


def test_every_committed_key_recomputes_from_its_row():
    assert len(ROWS) == 1014
    assert [row["key"] for row in ROWS if key_of(row) != row["key"]] == []


def test_a_key_depends_on_everything_it_is_made_of():
    row = ROWS[0]
    changed = [
        row | {"task": "other"},
        row | {"technique": "other"},
        row | {"settings": row["settings"] | {"other": 1}},
        row | {"seed": 1},
        *(
            row | {"provenance": row["provenance"] | {name: value}}
            for name, value in (
                ("model_hash", "0" * 16),
                ("data_hash", "0" * 16),
                ("technique_version", 99),
                ("measure_version", 99),
                ("tokenizer_hash", "0" * 16),
                ("training_hash", "0" * 16),
            )
        ),
    ]
    assert len({row["key"], *map(key_of, changed)}) == 1 + len(changed)


def test_committed_rows_render_the_committed_report():
    text = build.render(ROWS, images="images", notebooks="notebooks")
    committed = (ROOT / "report.md").read_text(encoding="utf-8")
    differing = [
        (number, ours, theirs)
        for number, (ours, theirs) in enumerate(zip(text.split("\n"), committed.split("\n")), start=1)
        if ours != theirs
    ]
    assert differing[:3] == []
    assert len(text) == len(committed)


def test_rows_of_a_run_get_the_keys_of_today_and_references_follow(tmp_path, monkeypatch):
    """The committed rows of one model, as if it had been made in this run."""
    source = "pocket/minilm-sst2"
    rows = [row for row in ROWS if row["model"] == source]
    compared = next(row for row in rows if row["technique"] == "paired-difference")
    timed_on = next(row for row in rows if row["latency"] and row["latency"]["measured_on"])
    keys = {
        *compared["settings"].values(),
        compared["key"],
        timed_on["key"],
        timed_on["latency"]["measured_on"],
    }
    shutil.copytree(MODELS / source, tmp_path / "models" / "mine")
    monkeypatch.setattr(migrate_keys, "published_tokenizers", dict)
    store = RowStore(tmp_path / "rows")
    for row in rows:
        if row["key"] in keys:
            store.append(row | {"notebook": "mine"})
            store.save_scores(row["key"], {"correct": [1]})
    changed = migrate_keys.migrate(tmp_path)
    assert set(changed) == keys and not keys & set(changed.values()) and not migrate_keys.migrate(tmp_path)
    after = {row["key"]: row for row in store.rows()}
    assert set(after) == set(changed.values()) and all(key_of(row) == key for key, row in after.items())
    assert after[changed[compared["key"]]]["settings"] == {
        name: changed[key] for name, key in compared["settings"].items()
    }
    assert (
        after[changed[timed_on["key"]]]["latency"]["measured_on"]
        == changed[timed_on["latency"]["measured_on"]]
    )
    assert all(store.load_scores(key) for key in after)


def test_every_published_model_has_its_tokenizer_as_it_was():
    for folder in (MODELS / "pocket").iterdir():
        assert published_tokenizers()[loading.identity(folder)] == loading.tokenizer_identity(folder)
