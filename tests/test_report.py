"""Templates are filled from rows or leave the sentence out; `check` notices whatever is no longer true."""

import json
import shutil

import pytest

from helpers import report
from helpers.report import (
    appendix,
    build,
    check,
    claims,
    opening,
    page,
    switches,
    template,
    tensorboard,
    values,
)
from lmcompress.errors import BadData
from lmcompress.results import store as results
from lmcompress.results.frame import distinct_labels
from lmcompress.results.labels import label_of
from lmcompress.results.rows import by_model_task
from lmcompress.results.scores import read_scores
from lmcompress.results.store import RowStore, published_rows
from lmcompress.study import decision
from lmcompress.study.decision import Budget
from tests.synthetic_rows import EMPTY, SHAPE, compared, pruning_rows, row

HEADER = """---
numbers:
  half: [encoder, 'Magnitude, per layer, 50 %', change]
  pruned: {count: technique == 'magnitude-layer'}
  spread: {range: technique == 'magnitude-layer', column: settings.sparsity}
  steepest: {records: [scan, parts], range: "kind == 'norm'", column: std}
  absent: [encoder, 'GPTQ, 4 bits, per-channel', change]
presumes:
  holds: {where: technique == 'random', expect: delta < 0}
  turned: {where: technique == 'random', expect: delta > 0}
  nobody: {where: technique == 'gptq', expect: delta < 0}
  nameless: {where: "`settings.no` == 1", expect: delta < 0}
  unexpected: {where: technique == 'random', expect: "`ratio.decode_b1` > 1"}
  smallest: {where: technique == 'random', expect: smallest_5 == True}
  flat: {records: [scan, parts], where: kind == 'norm', expect: std < 5}
  steep: {records: [scan, parts], where: kind == 'norm', expect: std < 4}
  less: {where: technique == 'magnitude-layer', below: technique == 'random', column: loss, within: model}
  more: {where: technique == 'random', below: technique == 'magnitude-layer', column: loss, within: model}
  alone: {where: technique == 'random', below: technique == 'nf4', column: loss}
tables:
  levels: {rows: ['Magnitude, per layer, 50 %', 'Random, 90 %', NF4], cell: change; size}
  none: {rows: [NF4], cell: change}
  budgets: {rows: [NF4 + recovery (9 or 60 steps)], cell: change}
  untimed: {rows: ['Random, 90 %'], cell: change; time}
---
"""


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """Fill a text from the pruning rows, or those given; return it with the problems."""
    monkeypatch.setattr(template, "FOLDER", tmp_path)

    def fill(text, rows=None):
        (tmp_path / "page.md").write_text(HEADER + text)
        filler = template.Filler(rows or pruning_rows(), {"drawn": "![A](a.png)"}, {"told": "A sentence."})
        return filler.fill("page"), filler.problems

    return fill


def used(problems):
    """Return the problems but for what the header has and a text of one sentence does not use."""
    return [problem for problem in problems if "no sentence uses" not in problem]


def test_placeholders_are_numbers_counts_figures_blocks_and_presumptions(filled):
    text, problems = filled("{holds}It loses {half}; {pruned} of them.\n\n{figure:drawn}\n\n{block:told}")
    assert text == "It loses −0.30 pp [−2.30, +1.70]; 3 of them.\n\n![A](a.png)\n\nA sentence."
    assert used(problems) == []
    parts = [{"kind": "norm", "std": 4.8}, {"kind": "norm", "std": 2.0}, {"kind": "bias", "std": 9.0}]
    scan = row("scan", task="none", achieved={"parts": parts}, **EMPTY)
    text, problems = filled("{spread}; {steepest}{flat}{less}", [*pruning_rows(), scan])
    assert (text, used(problems)) == ("0.500 to 0.900; 2.00 to 4.80", [])
    assert (
        "page.md: no sentence uses turned" in problems and "page.md: no sentence uses table:none" in problems
    )
    text, problems = filled("It is so.{steep}", [*pruning_rows(), scan])
    assert text == "" and "presumed std < 4, which some/encoder" in used(problems)[0]


@pytest.mark.parametrize(
    ("placeholder", "reason"),
    [
        ("turned", "presumed delta > 0, which some/encoder, Random, 50 % is not"),
        ("nobody", "no row with technique == 'gptq'"),
        ("nameless", "settings.no"),
        ("unexpected", "ratio.decode_b1"),
        ("absent", "0 rows of encoder are 'GPTQ, 4 bits, per-channel'"),
        ("smallest", "presumed smallest_5 == True, which some/encoder, Random, 50 % is not"),
        ("more", "presumed loss below"),
        ("alone", "nothing to compare loss with"),
        ("typo", "the header does not say what typo is"),
        ("figure:gone", "no figure gone"),
        ("block:gone", "no block gone"),
        ("table:none", "no row with one of NF4"),
    ],
)
def test_what_cannot_be_filled_leaves_its_sentence_out_and_is_a_problem(filled, placeholder, reason):
    items = f"First.\n\n- Kept {{half}}.\n- Lost {{{placeholder}}}.\n- Kept, too.\n\nWhole {{{placeholder}}}."
    text, problems = filled(items)
    assert text == "First.\n\n- Kept −0.30 pp [−2.30, +1.70].\n- Kept, too."
    assert len(used(problems)) == 2 and all(reason in problem for problem in used(problems))


def test_a_label_of_two_rows_is_a_problem_and_never_a_number(filled):
    rows = pruning_rows()
    twice = json.loads(json.dumps(rows[3])) | {"key": "f" * 16}
    twice["settings"]["calibration"] = {"n": 7}
    for text in ("It loses {half}.", "{table:levels}"):
        left, problems = filled(text, [*rows, twice])
        assert left == "" and "2 rows of" in used(problems)[0]


def test_tables_have_a_line_per_configuration_and_say_what_was_not_run(filled):
    other = [r | {"model": "another/model", "key": r["key"][::-1]} for r in pruning_rows()[:4]]
    text, problems = filled("{table:levels}", [*pruning_rows(), *other])
    assert text.splitlines() == [
        "| Configuration | encoder | model |",
        "| --- | --- | --- |",
        "| Magnitude, per layer, 50 % |" + 2 * " −0.30 pp [−2.30, +1.70]; 4.0 MB |",
        "| Random, 90 % |" + 2 * " −40.0 pp [−42.0, −38.0]; 4.0 MB |",
    ]
    other[3]["settings"] = {"sparsity": 0.3}
    assert "+1.70]; 4.0 MB | not run |" in filled("{table:levels}", [*pruning_rows(), *other])[0]
    nf4 = row("nf4", 0.8, p=0.1) | {"key": "e" * 16}
    fewer = filled("{table:levels}", [*pruning_rows(), nf4, *other])[0].splitlines()
    assert fewer[0] == "| Configuration | encoder |" and len(fewer) == 5, (
        "one of three is too few for a column"
    )
    assert used(problems) == []
    untimed = filled("{table:untimed}", [scored | {"latency": None} for scored in pruning_rows()])[0]
    assert untimed.endswith("| −40.0 pp [−42.0, −38.0] |"), "a time that was not taken is left out"
    for model, steps in (("some/encoder", 60), ("another/model", 9)):
        other.append(row("nf4", 0.8, p=0.1, model=model, recovery=steps) | {"key": f"{steps:016}"})
    budgets = filled("{table:budgets}", [*pruning_rows(), *other])[0].splitlines()
    assert budgets[2:] == ["| NF4 + recovery (60, 9 steps) |" + 2 * " −10.00 pp [−12.0, −8.00] |"]


@pytest.mark.parametrize("name", build.ORDER)
def test_what_a_section_says_first_is_presumed_of_the_rows_and_its_tables_and_lists_are_short(name):
    header, text = template.read(name)
    assert all(len(table["rows"]) <= 8 for table in header.get("tables", {}).values())
    if name[:2].isdigit():
        first = text.split("\n\n")[1]
        assert "**" in first and any(f"{{{presumed}}}" in first for presumed in header["presumes"])
        assert text.count("\n- ") <= 3 and text.count("*Limit.*") == 1 and text.count("{figure:") <= 2


def test_every_kind_of_number_says_what_was_not_measured():
    empty = dict.fromkeys(decision.frame(pruning_rows()).columns)
    words = {kind: values.written(empty | {"metric": "chrf"}, kind) for kind in values.KINDS}
    missing = {"quality", "change", "size", "verdict"}
    assert {kind for kind, word in words.items() if word == values.MISSING} == missing
    assert words["ratios"] == values.written(empty, "ratio.batch1") == "not timed"
    assert (words["bound"], words["margins"], words["p"], words["metric"]) == ("–", "–", "", "chrF")
    assert values.p_value(0.0002) == "< 0.001" and values.p_value(0.04) == "0.040"
    assert values.difference(0.5, 0.2, 0.8, "perplexity") == "+0.50 PPL [+0.20, +0.80]"


# A built report.


@pytest.fixture
def published(tmp_path):
    """A built report with its figures, as publishing leaves it."""
    rows = pruning_rows()
    places = {"report": tmp_path / "report.md", "images": tmp_path / "images"}
    build.build(rows, notebooks="notebooks", **places)
    return tmp_path, rows, lambda: stale(check.check(rows=rows, **places))


def stale(problems):
    """What the templates of the committed report do not find in these rows is another matter."""
    return [problem for problem in problems if not problem.startswith("template ")]


def test_a_fresh_report_is_current_and_building_again_draws_nothing(published):
    folder, rows, problems = published
    assert problems() == []
    stamps = {png: png.stat().st_mtime_ns for png in (folder / "images").glob("*.png")}
    assert {"comparison-overview.png", "pruning-quality.png"} <= {png.name for png in stamps}
    said = build.build(rows, report=folder / "report.md", images=folder / "images", notebooks="notebooks")
    assert f"0 of {len(stamps)} figures redrawn" in said
    assert stamps == {png: png.stat().st_mtime_ns for png in (folder / "images").glob("*.png")}
    assert "(report/02_pruning.md)" in (folder / "report.md").read_text()
    assert not (folder / "report" / "05_quantization.md").exists()  # no row of it


@pytest.mark.slow  # starts processes
def test_figures_drawn_in_several_processes_are_the_same(published, monkeypatch):
    folder, rows, _ = published
    monkeypatch.setattr(build, "MANY", 1)
    build.build(rows, report=folder / "again.md", images=folder / "again", notebooks="notebooks")
    drawn, again = (
        {png.name: png.read_bytes() for png in (folder / name).glob("*.png")} for name in ("images", "again")
    )
    assert drawn and again == drawn


def test_whatever_changes_makes_the_report_stale(published):
    folder, rows, problems = published
    (folder / "images" / "pruning-zeros.png").write_bytes(b"something else")
    (folder / "images" / "sensitivity.png").unlink()
    listing = folder / "report" / "02_pruning.md"
    listing.write_text(listing.read_text().replace("89.7 %", "91.7 %", 1))
    told = " ".join(problems())
    assert "pruning-zeros.png is not the file that was drawn" in told and "sensitivity.png is missing" in told
    assert "report/02_pruning.md: line" in told and "91.7 %" in told and "report.md: line" not in told
    rows[3]["quality"]["value"] = 0.85
    rows[1]["provenance"] = rows[1]["provenance"] | {"technique_version": 0}
    rows[2]["provenance"] = rows[2]["provenance"] | {"measure_version": 0}
    rows[4]["quality"]["typed"] = 1
    told = " ".join(problems())
    for part in ("pruning-quality.png is older", "technique version 0", "measured by version 0", "{'typed'}"):
        assert part in told
    (folder / page.NAME).unlink()
    assert "report.html: is missing" in " ".join(problems())


def test_a_report_of_too_many_words_or_figures_is_a_problem():
    assert check.limits("word " * (check.MOST_WORDS - 1) + "\n![") == []
    assert "more than 6000" in check.limits("word " * (check.MOST_WORDS + 1))[0]
    assert "13 figures, more than 12" in check.limits("\n![" * 13)[0]


def test_a_run_without_rows_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(BadData, match="make report"):
        report.build_run(tmp_path)


def test_publishing_promotes_rows_scores_figures_and_text(tmp_path, monkeypatch):
    for module in (report, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for module in (check, results):
        monkeypatch.setattr(module, "PUBLISHED", tmp_path / "results" / "published.json")
    store = RowStore(tmp_path / "runs" / "pocket" / "rows")
    for scored in pruning_rows():
        store.append(scored)
    key = pruning_rows()[0]["key"]
    store.save_scores(key, {"correct": [1.0, 0.0]})
    report.publish("pocket")
    places = {"report": tmp_path / "report.md", "images": tmp_path / "images"}
    assert list(read_scores(tmp_path / "results" / "pocket" / "scores")) == [key]
    written = json.loads((tmp_path / "results" / "published.json").read_text())
    assert written == {"apart": [], "profile": "pocket", "superseded": {}}
    assert stale(check.check(**places)) == []
    with pytest.raises(BadData, match="make report PROFILE=reference"):
        report.publish("reference")
    committed = (tmp_path / "results" / "pocket" / "02_pruning.jsonl").read_bytes().splitlines(keepends=True)
    store.append(pruning_rows()[0] | {"key": "f" * 16})
    with pytest.raises(BadData, match="has rows"):
        report.resume("pocket")
    shutil.rmtree(tmp_path / "runs")
    report.resume("pocket")  # of the other scored rows no scores were published
    assert [row["key"] for row in store.rows() if row["quality"]] == [key]
    file = tmp_path / "runs" / "pocket" / "rows" / "02_pruning.jsonl"
    whole = file.read_bytes()
    assert set(whole.splitlines(keepends=True)) <= set(committed)  # names and all
    file.write_bytes(whole[:-20])  # killed meanwhile: it goes on
    report.resume("pocket")
    assert file.read_bytes() == whole
    assert list(store.load_scores(key)["correct"]) == [1.0, 0.0]
    for file in (tmp_path / "results" / "pocket").glob("*.jsonl"):
        file.unlink()
    assert "no rows in" in check.check(**places)[0]


# The opening.


def encoder_rows():
    """The pruned encoder, with an NF4 file of a quarter that holds 1 %, and a fast one that holds 5 %."""
    small, fast = row("nf4", 0.899, p=0.8), row("openvino", 0.88, p=0.01)
    small["memory"]["file_bytes"] = 1_000_000
    small["quality"]["difference"] |= {"low": -0.003, "high": 0.001}
    fast["quality"]["difference"] |= {"low": -0.03, "high": -0.01}
    fast["latency"] = fast["latency"] | {
        "shapes": {"batch1": SHAPE | {"ratio": 0.5, "ratio_low": 0.45, "ratio_high": 0.55}}
    }
    fast["verdict"] = fast["verdict"] | {"latency": {"batch1": "faster"}}
    return [*pruning_rows(), row("nf4", 0.898, p=0.8, calibration={"n": 8}), small, fast]  # NF4 counts once


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_the_opening_names_the_smallest_and_the_fastest_inside_each_margin():
    count = len(decision.configurations())
    (subject, *first), (again, *second) = cells(opening.decision_table(encoder_rows()))
    assert subject == "encoder, accuracy 90.0 % [88.0, 92.0], 4.0 MB" and again == ""
    asked = f"4 of {count}, 4 timed (a cpu)"  # magnitude, Wanda, NF4, OpenVINO
    smallest = "**NF4**: 1.0 MB, time 1.00, −0.10 pp [−0.30, +0.10], bound 0.3 %"
    assert first == ["1 %", smallest, "none inside the margin is faster", asked]
    refused = row("refused") | {"quality": None, "settings": {"listed": decision.configurations()[0]}}
    told = cells(opening.decision_table([*encoder_rows(), refused, refused | {"task": "another"}]))
    assert told[0][-1] == asked.replace(",", ", 1 refused,", 1)
    fastest = "**OpenVINO** (4.0 MB, −2.00 pp [−3.00, −1.00], one process): 0.55 at batch 1"
    assert second == ["5 %", "as above", fastest, ""]
    made = opening.commands(encoder_rows())
    assert made.count("lmcompress.study.apply KEY") == 1
    assert f"\nencoder\n{encoder_rows()[-2]['key']}  1 %, smallest\n" in made and made.count("\n") == 6


def test_where_nothing_is_smaller_or_timed_the_opening_says_so():
    rows = [scored | {"latency": None} if scored["latency"] else scored for scored in pruning_rows()]
    first, second = cells(opening.decision_table(rows))
    assert first[2:4] == ["none smaller", "not measured"] and first[4].endswith(", 0 timed")
    assert second[2:4] == ["as above", "as above"]
    assert opening.commands(rows) == "" and opening.decision_table([row()]).count("\n") == 1


def test_choices_made_on_a_selection_set_say_whether_the_report_set_confirms_them():
    rows = encoder_rows()
    assert opening.standing(rows) == "encoder: selected and reported on the same examples."
    scored = [r for r in rows if r["quality"]]
    for one in scored:
        one["selection"] = one["quality"]
    rows[-2]["quality"] = json.loads(json.dumps(rows[-2]["quality"]))
    rows[-2]["quality"]["difference"]["low"] = -0.02  # chosen at 1 %, and lost more where it was not chosen
    first, second = cells(opening.decision_table(rows))
    assert first[2].startswith("**NF4**") and first[2].endswith(", not confirmed)")
    assert second[2].endswith("bound 1.9 % (chosen at 0.3 %, confirmed)")
    assert opening.standing(rows) == "encoder: selected on one set and reported on another."
    rows[-1]["quality"] = json.loads(json.dumps(rows[-1]["quality"]))
    rows[-1]["quality"]["difference"]["low"] = -0.06
    fastest = cells(opening.decision_table(rows))[1][3]
    assert fastest.endswith(", not confirmed), one process): 0.55 at batch 1")
    unscored = next(row for row in scored if row["technique"] == "openvino")
    unscored["selection"] = None  # fastest at 5 %, but nothing chose it
    assert opening.standing(rows).endswith(" Not scored on the first, and left out: encoder's OpenVINO.")
    assert "OpenVINO" not in opening.decision_table(rows)


def test_what_is_fastest_at_both_margins_is_written_once():
    assert opening._differing(["A: 0.5", "B: 0.6"], ["B: 0.6", "C: 0.7"]) == "A: 0.5; else as above"
    assert opening._differing(["A: 0.5"], ["A: 0.5"]) == "as above"
    assert opening._differing(["A: 0.5"], []) == "A: 0.5"


@pytest.fixture(scope="module")
def committed():
    return published_rows()


def written_out(table: list[list[str]]) -> list[list[str]]:
    """The named files of each line, with what it says is as above it."""
    lines, above = [], ["", ""]
    for line in table:
        above = [
            new.replace("else as above", old).replace("as above", old) for new, old in zip(line[2:4], above)
        ]
        lines.append(above)
    return lines


def test_what_the_committed_opening_names_is_inside_its_margin_and_nothing_smaller_is(committed):
    table = cells(opening.decision_table(committed))
    pairs = [
        (options, margin) for options in opening.choices(committed).values() for margin in decision.MARGINS
    ]
    assert len(table) == len(pairs) >= 10
    for (smallest, fastest), (options, margin) in zip(written_out(table), pairs, strict=True):
        alive = [o for o in options if o.listed and o.verdict != "collapsed" and o.chosen_by is not None]
        inside = [o for o in alive if o.chosen_by <= margin]
        least = min(o.bytes for o in inside)
        best = min((o for o in inside if o.bytes == least), key=lambda o: (not o.baseline, o.chosen_by))
        assert smallest.startswith("none smaller" if best.baseline else f"**{best.name}**: ")
        for shape in options[0].ratio:
            quickest = min((o for o in inside if shape in o.ratio), key=lambda o: o.ratio[shape])
            assert (quickest.ratio[shape] == 1) or f"**{quickest.name}**" in fastest
            chosen = decision.decide(options, Budget(shape=shape, margin=margin, listed=True)).chosen
            assert chosen.ratio[shape] == quickest.ratio[shape]


@pytest.mark.parametrize("shape", [None, "batch8", "decode_b1"])
def test_the_command_answers_as_the_first_table_and_as_the_page_at_its_start(committed, capsys, shape):
    named = written_out(cells(opening.decision_table(committed)))
    for row_of_margin, margin in enumerate(decision.MARGINS):
        decision.main([f"--max-loss={margin:.0%}", *(["--at", shape] if shape else [])])
        sentences = capsys.readouterr().out.splitlines()
        pairs = zip(opening.choices(committed).items(), named[row_of_margin::2], strict=True)
        for ((model, task), options), (smallest, fastest) in pairs:
            said = next(line for line in sentences if line.startswith(f"{model} on {task}: "))
            if shape and shape not in options[0].ms:
                assert "no time measured at" in said
                continue
            chosen = decision.decide(options, Budget(margin=margin, shape=shape, listed=True)).chosen
            no_gain = chosen.baseline or (shape and chosen.ratio[shape] == 1)  # not in the table
            assert f": use {chosen.name} (" in said
            assert no_gain or chosen.name in (fastest if shape else smallest)
    assert 'listed: "yes"' in page.TEMPLATE.read_text(encoding="utf-8")


# Claims and the pages of all rows.

ORDER = {"first": "Wanda, 50 %", "second": "Magnitude, per layer, 50 %"}


def judged(monkeypatch, words, expect="better", *, turned=False):
    """The verdict on a claim of comparisons that came out as `words`, on a model each."""
    tests = []
    for number, word in enumerate(words):
        gap = {"better": 0.1, "worse": -0.1, "n.s.": 0.0}[word] * (-1 if turned else 1)
        names = ["magnitude-layer", "wanda"] if turned else ["wanda", "magnitude-layer"]
        test = compared(*names, gap, *[{"sparsity": 0.5}] * 2, p=0.9 if word == "n.s." else 0.001)
        tests += [row(model=f"m/{number}"), test | {"model": f"m/{number}"}]
    claim = {"claim": "C", "source": "S", "order": ORDER | {"expect": expect}}
    monkeypatch.setattr(claims, "claims", lambda: [claim])
    lines = cells(claims.table(tests)) if claims.table(tests) else []
    assert len(lines) <= 1  # a claim is one line, however many models speak to it
    return lines[0][2:] if lines else claims.elsewhere(tests)


@pytest.mark.parametrize(
    ("words", "expect", "verdict"),
    [
        (["better", "better"], "better", "reproduced"),
        (["better", "n.s."], "better", "reproduced where significant"),
        (["better", "worse", "n.s."], "better", "mixed"),
        (["worse", "n.s."], "better", "reversed"),
        (["n.s.", "n.s."], "better", "not decided (n.s.)"),
        (["n.s."], "n.s.", "consistent"),
        (["n.s.", "worse"], "n.s.", "not reproduced"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_claim_has_one_verdict(monkeypatch, words, expect, verdict, turned):
    ours, told = judged(monkeypatch, words, expect, turned=turned)
    unclear = words.count("n.s.")
    assert told == f"**{verdict}**" and ours.count("; ") == len(words) - max(1, unclear)
    assert all(f"({word})" in ours for word in words if word != "n.s.")
    names = ", ".join(str(number) for number, word in enumerate(words) if word == "n.s.")
    assert ours.endswith(f"n.s.: {names}") if unclear else "n.s." not in ours
    assert "better" not in words or "+10.0 pp [+8.00, +12.0] (better)" in ours


def test_a_claim_that_no_row_speaks_to_stands_apart_and_a_value_has_a_tolerance(monkeypatch):
    assert "| C | S | another profile |" in judged(monkeypatch, [])
    value = {"model": "encoder", "task": "some-task", "published": 0.91, "tolerance": 0.02}
    assert claims.judged({"value": value}, [row()]) == ("0.9000", "reproduced")
    assert claims.judged({"value": value | {"tolerance": 0.001}}, [row()])[1] == "not reproduced"
    for elsewhere in ({"task": "other"}, {"set": "selection"}):
        assert claims.judged({"value": value | elsewhere}, [row()]) == ("", claims.CANNOT)


def test_every_claim_names_labels_that_the_committed_rows_have_or_a_command(committed):
    labels = {label_of(scored) for scored in committed if scored["quality"]}
    for claim in claims.claims():
        assert claim["claim"] and claim["source"] and len({"order", "value", "command"} & set(claim)) == 1
        assert {claim["order"]["first"], claim["order"]["second"]} <= labels if "order" in claim else True
        assert "command" in claim or claims.judged(claim, committed)[1] != claims.CANNOT


def test_the_pages_correct_over_one_family_and_tell_repeats_apart():
    rows = pruning_rows()
    again = json.loads(json.dumps(rows[3])) | {"seed": 1, "key": "e" * 16}
    elsewhere = row("nf4", 0.8, p=0.012, notebook="05_quantization")
    text = "\n".join(appendix.paragraphs([*rows, again, elsewhere], "05_quantization"))
    # Ninth of nine comparisons by p is 0.8; of all eight it has the fourth smallest but three, times 5.
    alone = "\n".join(appendix.paragraphs([row(), row("nf4", 0.8, p=0.012), rows[3]]))
    assert "| 0.024 | worse |" in alone and "| 0.048 | worse |" in text
    pages = "\n".join(appendix.paragraphs([*rows, again, elsewhere], "02_pruning"))
    assert "Magnitude, per layer, 50 % (seed=0)" in pages
    repeat = next(line for line in pages.splitlines() if "(seed=1)" in line)
    assert "repeat or control" in repeat and "NF4" not in pages


def test_analyses_are_tables_of_their_records():
    entries = [{"window": 256, "value": 0.00012, "kind": "a"}, {"window": 512, "value": 41.234, "kind": "a"}]
    rows = [row(), row("context-lengths", achieved={"contexts": entries}, key="c" * 16, **EMPTY)]
    title, table = appendix.paragraphs(rows)[-2:]
    assert title == "### Context lengths: contexts"
    assert table.splitlines()[2:] == ["| encoder | 256 | 0.00012 |", "| encoder | 512 | 41.23 |"]


def test_the_curves_of_every_committed_training_are_named_tensorboard_logs(committed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = {scored["key"]: scored for scored in committed if "curve" in scored["achieved"]}
    said = tensorboard.write(committed, tmp_path)
    logs = [log.parent for log in tmp_path.glob("*/*/events*")]
    assert int(said.split()[0]) == len(logs) >= len(trained) > 80
    notebook, key = "05_quantization", next(key for key, r in trained.items() if r["technique"] == "qat")
    (log,) = (tmp_path / notebook).glob(f"*, {key[:6]}")
    assert f"seed {trained[key]['seed']}" in log.name and "bits" in log.name
    events = EventAccumulator(str(log)).Reload()
    for split in ("train", "validation"):
        points = [[event.step, pytest.approx(event.value)] for event in events.Scalars(f"loss/{split}")]
        assert points == trained[key]["achieved"]["curve"][split]
    with pytest.raises(BadData, match="no row holds the curve"):
        tensorboard.write(pruning_rows(), tmp_path)


def test_no_two_committed_lines_of_a_page_have_the_same_label(committed):
    for notebook in dict.fromkeys(scored["notebook"] for scored in committed):
        here = [scored for scored in committed if scored["notebook"] == notebook]
        for rows in by_model_task(here).values():
            labels = distinct_labels({scored["key"]: scored for scored in rows}.values())
            assert len(set(labels)) == len(labels)


def test_switches_are_told_by_rounds_against_the_baseline_of_the_same_round():
    def run(switch, seed, step_ms, loss):
        achieved = {"step_ms": step_ms, "peak_bytes": 100.0, "loss": loss}
        made = row("switch", notebook="09_sheared_llama") | {"quality": None, "achieved": achieved}
        return made | {"settings": {"switch": switch, "seed": seed, "steps": 8}, "key": f"{switch}{seed}"}

    rounds = [(10.0, 5.0), (20.0, 5.5), (40.0, 6.0)]  # a machine that becomes four times slower
    rows = [run("baseline", seed, *figures) for seed, figures in enumerate(rounds)]
    rows += [run("QLoRA", seed, 1.5 * ms, loss + seed / 10) for seed, (ms, loss) in enumerate(rounds)]
    rows += [run("compiled", seed, 1.0, 5.0) for seed in (0, 1)]
    ((_, switch, count, times, memory, losses),) = cells(switches.table(rows))
    assert (switch, count, times, memory) == ("QLoRA", "3", "1.50 [1.50, 1.50]", "1.00 [1.00, 1.00]")
    assert losses == "0.10 [0.00, 0.20]"
    assert "cannot be told" in switches.table(rows[:2]) and switches.table([row()]) == ""
    page = "\n".join(appendix.paragraphs([row(), *rows[:2]], "09_sheared_llama"))
    assert "cannot be told" in page and "tokens_per_s" not in page


def test_a_model_that_another_has_replaced_is_in_no_first_answer(monkeypatch):
    monkeypatch.setattr(values, "superseded", lambda: {"some/encoder": "new/encoder"})
    old, new = encoder_rows(), [made | {"model": "new/encoder"} for made in encoder_rows()]
    new = [made | {"key": made["key"][::-1]} for made in new]
    assert [pair[0] for pair in opening.decided(old)] == ["some/encoder"]  # alone it has its answer
    assert [pair[0] for pair in opening.decided([*old, *new])] == ["new/encoder"]
    assert len(cells(opening.decision_table([*old, *new]))) == 2
    assert values.current(["some/encoder", "other", "other"]) == ["some/encoder", "other"]
    assert values.current(["some/encoder", "new/encoder"]) == ["new/encoder"]
