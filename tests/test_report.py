"""The report says what its rows say, and `check` notices when it does not."""

import json

import pytest
from scipy.stats import norm

from helpers import report
from helpers.report import build, cards, check, conditions, wording
from helpers.report import rows_pruning as pruning
from lmcompress.errors import BadData
from lmcompress.results import store as results
from lmcompress.results import verdicts
from lmcompress.results.scores import read_scores
from lmcompress.results.store import RowStore
from tests.synthetic_rows import compared, pruning_rows, row


@pytest.fixture
def published(tmp_path):
    """A built report with its figures, as publishing leaves it."""
    rows = pruning_rows()
    build.build(rows, report=tmp_path / "report.md", images=tmp_path / "images", notebooks="notebooks")
    return tmp_path, rows


def findings(folder, rows):
    return check.check(report=folder / "report.md", images=folder / "images", rows=rows)


def test_a_fresh_report_is_current_and_building_again_draws_nothing(published):
    folder, rows = published
    assert findings(folder, rows) == []
    stamps = {png: png.stat().st_mtime_ns for png in (folder / "images").glob("*.png")}
    assert len(stamps) == 4
    said = build.build(rows, report=folder / "report.md", images=folder / "images", notebooks="notebooks")
    assert "0 of 4 figures redrawn" in said
    assert stamps == {png: png.stat().st_mtime_ns for png in (folder / "images").glob("*.png")}


@pytest.mark.slow  # starts processes
def test_figures_drawn_in_several_processes_are_the_same(published, monkeypatch):
    folder, rows = published
    monkeypatch.setattr(build, "MANY", 1)
    build.build(rows, report=folder / "again.md", images=folder / "again", notebooks="notebooks")
    drawn, again = (
        {png.name: png.read_bytes() for png in (folder / name).glob("*.png")} for name in ("images", "again")
    )
    assert drawn and again == drawn


def test_the_text_says_no_measurable_change_where_that_is_the_finding(published):
    text = (published[0] / "report.md").read_text()
    layer = next(line for line in text.splitlines() if line.startswith("- **Magnitude, per layer**"))
    assert "at 50 %: no measurable change" in layer
    assert "at 90 %: worse" in layer
    random = next(line for line in text.splitlines() if line.startswith("- **Random**"))
    assert "at 50 %: worse" in random and "collapsed at 90 %" in random
    assert "1.01 [0.99, 1.03], no measurable change" in text


def test_a_changed_row_makes_text_and_figures_stale(published):
    folder, rows = published
    rows[3]["quality"]["value"] = 0.85
    found = findings(folder, rows)
    assert any("report.md" in f and "not what the rows give" in f for f in found)
    assert any("pruning-quality.png is older" in f for f in found)


def test_a_number_typed_into_the_report_is_found(published):
    folder, rows = published
    page = folder / "report.md"
    page.write_text(page.read_text().replace("89.7 %", "91.7 %", 1))
    assert any("91.7 %" in f for f in findings(folder, rows))


def test_a_replaced_or_missing_figure_is_found(published):
    folder, rows = published
    (folder / "images" / "pruning-zeros.png").write_bytes(b"something else")
    (folder / "images" / "pruning-quality.png").unlink()
    found = " ".join(findings(folder, rows))
    assert "pruning-zeros.png is not the file that was drawn" in found
    assert "pruning-quality.png is missing" in found


def test_rows_of_an_older_technique_or_measuring_are_found(published):
    folder, rows = published
    rows[1]["provenance"]["technique_version"] = 0
    rows[2]["provenance"]["measure_version"] = 0
    found = " ".join(check.stale_rows(rows))
    assert "technique version 0" in found and "measured by version 0" in found
    rows[3]["quality"]["typed"] = 1
    assert "must not contain {'typed'}" in " ".join(check.stale_rows(rows))


def test_published_orders_are_tested_and_a_null_is_not_a_reproduction(published):
    text = (published[0] / "report.md").read_text()
    wanda = next(line for line in text.splitlines() if line.startswith("| Wanda 6.42 ahead of magnitude"))
    assert "not reproduced (no measurable difference)" in wanda and "p = 0.800" in wanda
    pattern = next(line for line in text.splitlines() if line.startswith("| 2:4 worse than unstructured"))
    assert "ordering reproduced" in pattern and "−7.80 points" in pattern
    assert "cannot be run here" in text and "meta-llama/Llama-2-7b-hf" in text


def test_a_published_order_found_the_other_way_round_is_called_reversed():
    found = compared("wanda", "magnitude-layer", -0.1, {"sparsity": 0.5}, {"sparsity": 0.5}, p=0.001)[
        "achieved"
    ]
    (card,) = cards.ordering("published", "protocol", [(found, 0.001, "worse")], "better", here="")
    assert card.verdict == "reversed (worse)"


def test_the_measured_break_even_by_hand():
    assert pruning.crossing([0.0, 0.5, 0.9], [1.5, 1.1, 0.7]) == pytest.approx(0.6)
    assert pruning.crossing([0.0, 0.5], [1.5, 1.1]) is None


def test_a_bootstrap_p_at_its_floor_is_taken_from_the_interval():
    part = {"value": -2.0, "low": -3.0, "high": -1.0, "p": 0.001, "test": "paired bootstrap", "n": 200}
    spread = 2 / (2 * 1.959964)
    assert verdicts.tested_p(part) == pytest.approx(2 * norm.sf(2 / spread), rel=1e-4)
    assert verdicts.tested_p(part | {"p": 0.03}) == 0.03  # enough resamples to count
    assert verdicts.tested_p(part | {"test": "McNemar exact"}) == 0.001  # exact as it is
    assert verdicts.tested_p(part | {"resamples": 10_000}) == 0.001
    assert verdicts.tested_p(part | {"low": -2.0, "high": -2.0}) == 0.001  # no width to go by


def test_holm_is_applied_over_the_family_of_comparisons():
    rows = [row("magnitude-layer", 0.88, sparsity=s, p=0.02) for s in (0.1, 0.2, 0.3)]
    assert {verdict for _, verdict in verdicts.adjusted(rows).values()} == {"no measurable change"}
    assert verdicts.adjusted(rows[:1])[rows[0]["key"]] == (0.02, "worse")


def test_one_is_singular_and_many_null_results_are_counted_and_folded():
    assert [wording.plural(n, "head") for n in (0, 1, 1.0, 2.5)] == [
        "0 heads",
        "1 head",
        "1 head",
        "2.5 heads",
    ]
    assert wording.plural(1, "basis", "bases") == "1 basis" and wording.plural(1500, "row") == "1,500 rows"
    null, better = ["no measurable difference"], ["better", "no measurable difference"]
    text = wording.tested_list("T", [(f"- {n}", null) for n in range(5)] + [("- won", better)])
    assert text.startswith("T, 7 tests: 1 better and 6 no measurable difference.\n\n- won\n\n<details>")
    assert "5 comparisons without" in text and text.index("<details>") < text.index("- 4")
    none = wording.tested_list("T", [(f"- {n}", null) for n in range(5)])
    assert none.startswith("T: none of 5 tests shows a measurable difference.")
    assert wording.tested_list("T", [("- one", null)]) == "T:\n\n- one" and wording.tested_list("T", []) == ""


def test_a_published_finding_is_said_once_and_what_cannot_be_judged_stands_apart():
    made = [cards.Card("P", "who", f"ours {n}", "consistent", "here", "2 %") for n in range(2)]
    away = cards.Card("Q", "who", "`make`", cards.CANNOT, "needs a GPU")
    text = "\n".join(cards.block([*made, away]))
    assert "| P<br>*who* | ours 0 | here; within 2 % | consistent |" in text and "| ″ | ours 1 |" in text
    assert (
        "what others published, 2 cards: consistent 2." in text
        and "1 finding that cannot be judged here" in text
    )
    assert "None of them could be judged" in "\n".join(cards.block([away])) and cards.block([]) == []


def test_a_lower_perplexity_is_better():
    better = row("magnitude-layer", 20.0, sparsity=0.5, p=0.001, metric="perplexity")
    better["quality"]["difference"]["value"] = -3.0
    assert verdicts.adjusted([better])[better["key"]][1] == "better"


def test_numbers_in_words():
    assert wording.number(0.9123, "accuracy") == "91.2 %"
    assert (
        wording.with_interval({"value": 0.9, "low": 0.85, "high": 0.93}, "accuracy") == "90.0 % [85.0, 93.0]"
    )
    assert wording.number(12345.6) == "12,346"
    assert wording.percent(0.5) == "50 %" and wording.percent(0.667) == "66.7 %"
    assert wording.p_text(0.0002) == "p < 0.001"


def test_a_run_without_rows_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(BadData, match="make report"):
        report.build_run(tmp_path)


def test_publishing_promotes_rows_figures_and_text(tmp_path, monkeypatch):
    for module in (report, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for module in (check, results):
        monkeypatch.setattr(module, "PUBLISHED", tmp_path / "results" / "published.json")
    store = RowStore(tmp_path / "runs" / "pocket" / "rows")
    for one in pruning_rows():
        store.append(one)
    scored = pruning_rows()[0]
    store.save_scores(scored["key"], {"correct": [1.0, 0.0]})
    report.publish("pocket")
    assert list(read_scores(tmp_path / "results" / "pocket" / "scores")) == [scored["key"]]
    assert json.loads((tmp_path / "results" / "published.json").read_text()) == {
        "apart": [],
        "profile": "pocket",
    }
    assert check.check(report=tmp_path / "report.md", images=tmp_path / "images") == []
    with pytest.raises(BadData, match="make report PROFILE=reference"):
        report.publish("reference")
    for file in (tmp_path / "results" / "pocket").glob("*.jsonl"):
        file.unlink()
    assert "no rows in" in check.check(report=tmp_path / "report.md", images=tmp_path / "images")[0]


def test_the_learning_rates_that_were_kept_are_counted():
    tried = [[2e-5, 0.3], [1e-4, 0.4]]
    rows = [
        row("magnitude-layer", key=key, achieved={"rates": tried, "rate": rate})
        for key, rate in (("a", 2e-5), ("b", 2e-5), ("c", 1e-4))
    ]
    lead, said = conditions._rates(
        [*rows, rows[0], row("rtn", key="d")]
    )  # a row of two notebooks counts once
    assert "tried at learning rates of 2e-05 and 0.0001" in said
    assert said.endswith("2e-05 in 2 and 0.0001 in 1 of 3.")
    assert lead.startswith("Several learning rates were tried in 3 trainings of the notebooks 02; all other")
    assert conditions._rates([row("rtn", key="d")]) == []
