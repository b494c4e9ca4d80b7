"""What no rearrangement of the code may change: the keys of the committed rows, and the report they give."""

from helpers.report import build
from lmcompress.models import loading
from lmcompress.paths import MODELS, RESULTS, ROOT
from lmcompress.results.store import key_of, published_folder, published_rows, published_tokenizers

ROWS = published_rows()


def test_every_committed_key_recomputes_from_its_row():
    assert len(ROWS) == 1334
    assert [row["key"] for row in ROWS if key_of(row) != row["key"]] == []


def test_rows_of_a_run_under_way_recompute():
    for folder in (place for place in RESULTS.iterdir() if place.is_dir() and place != published_folder()):
        rows = published_rows(folder)
        assert [row["key"] for row in rows if key_of(row) != row["key"]] == [], folder


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
                ("selection_hash", "0" * 16),
            )
        ),
    ]
    assert len({row["key"], *map(key_of, changed)}) == 1 + len(changed)


def test_committed_rows_and_templates_render_the_committed_report_and_its_pages():
    texts, problems = build.render(ROWS, images="images", notebooks="notebooks")
    assert problems == []
    differing = [name for name, text in texts.items() if (ROOT / name).read_text(encoding="utf-8") != text]
    assert differing == []


def test_every_published_model_has_its_tokenizer_as_it_was():
    for folder in (MODELS / "pocket").iterdir():
        assert published_tokenizers()[loading.identity(folder)] == loading.tokenizer_identity(folder)
