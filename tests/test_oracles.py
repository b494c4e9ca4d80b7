"""What no rearrangement of the code may change: the keys of the committed rows, and the report they give."""

from helpers.report import build
from lmcompress.paths import ROOT
from lmcompress.results.store import published_rows, row_key

ROWS = published_rows()


def key_again(row: dict) -> str:
    """Return the key of a committed row, recomputed from what the row itself says."""
    provenance = row["provenance"]
    return row_key(
        task=row["task"],
        model_hash=provenance["model_hash"],
        data_hash=provenance["data_hash"],
        technique=row["technique"],
        technique_version=provenance["technique_version"],
        measure_version=provenance["measure_version"],
        settings=row["settings"],
        seed=row["seed"],
    )


def test_every_committed_key_recomputes_from_its_row():
    assert len(ROWS) == 1014
    assert [row["key"] for row in ROWS if key_again(row) != row["key"]] == []


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
            )
        ),
    ]
    assert len({row["key"], *map(key_again, changed)}) == 1 + len(changed)


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
