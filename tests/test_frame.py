"""The tidy frame agrees with the committed rows, with numbers worked by hand, and knows gaps from zeros."""

from types import SimpleNamespace

import pytest

from helpers import notebook
from lmcompress import registry
from lmcompress.compress import registered
from lmcompress.errors import BadSetting
from lmcompress.results import verdicts
from lmcompress.results.frame import COLUMNS, frame, times
from lmcompress.results.rows import dense_of, model_task_of
from lmcompress.results.store import published_rows
from lmcompress.train.recovery import Recovery
from tests.test_results import key_of, make_row

ROWS = published_rows()


@pytest.fixture(scope="module")
def committed():
    return frame(ROWS)


def compared(p, low, high, *, key=2, value=None, **quality):
    """A row whose accuracy differs from the dense 0.8 by `value` with the interval from `low` to `high`."""
    value = (low + high) / 2 if value is None else value
    change = {"value": value, "low": low, "high": high, "p": p, "test": "McNemar exact", "n": 100}
    row = make_row(key=key_of(key), technique="wanda")
    return row | {"quality": row["quality"] | {"difference": change, "metric": "accuracy"} | quality}


def dense(**changes):
    row = make_row(key=key_of(1), technique="dense", settings={})
    return (
        row | {"quality": row["quality"] | {"metric": "accuracy", "value": 0.8, "difference": None}} | changes
    )


def test_a_frame_has_gaps_where_nothing_was_measured_and_keeps_lists():
    unmeasured = make_row(key=key_of(3), quality=None, latency=None, settings={"levels": [1, 2]})
    table = frame([dense(), compared(0.5, -0.01, 0.01), unmeasured])
    assert table["achieved.sparsity"].tolist() == [0.5] * 3
    assert table["value"].isna().tolist() == [False, False, True]
    assert table["p"].isna().tolist() == [True, False, True]
    assert table["ratio.batch1"].isna().tolist() == [False, False, True]
    assert table["settings.levels"][2] == [1, 2]
    assert table["dense_key"].tolist() == [key_of(1)] * 2 + [key_of(1)]


def test_times_of_another_row_are_of_the_machine_they_were_taken_on():
    timed = dense()
    timed["provenance"] = timed["provenance"] | {"machine": {"cpu": "here", "gpu": None}}
    alike = make_row(key=key_of(3), technique="wanda")
    alike["latency"] = alike["latency"] | {"measured_on": timed["key"]}
    alike["provenance"] = alike["provenance"] | {"machine": {"cpu": "elsewhere", "gpu": None}}
    assert frame([timed, alike])["machine"].tolist() == ["here", "here"]


def test_frames_of_no_rows_have_the_columns():
    assert list(frame([]).columns) == list(COLUMNS) and len(times([])) == 0 and "shape" in times([])


@pytest.mark.parametrize(
    ("low", "high", "one", "five"),
    [  # of 0.8, 1 % is 0.008 and 5 % is 0.04; the one-sided bound lies 1.645/1.960 as far out as `low`
        (-0.009, 0.009, True, True),  # to 0.0076
        (-0.0097, 0.0097, False, True),  # to 0.0081
        (-0.047, 0.047, False, True),  # to 0.0394
        (-0.049, 0.049, False, False),  # to 0.0411
        (0.01, 0.03, True, True),
    ],
)
def test_noninferiority_is_a_one_sided_bound_within_a_share_of_the_dense_quality(low, high, one, five):
    line = frame([dense(), compared(0.3, low, high)]).iloc[1]
    assert (line["noninferior_1"], line["noninferior_5"]) == (one, five)


def test_a_rise_of_perplexity_counts_against_the_dense_perplexity():
    base = dense()
    base["quality"] |= {"metric": "perplexity", "value": 20.0, "higher_is_better": False}
    risen = compared(0.01, 0.1, 0.3, metric="perplexity", higher_is_better=False)
    line = frame([base, risen]).iloc[1]
    assert verdicts.relative_loss_bound(risen, base) == pytest.approx(
        (0.2 + 0.1 * 1.6449 / 1.95996) / 20, rel=1e-4
    )
    assert (line["noninferior_1"], line["noninferior_5"], line["loss_high"]) == (False, True, 0.3)


def test_a_recorded_bound_is_taken_as_it_is():
    row = compared(0.3, -0.009, 0.009)
    row["quality"]["difference"]["bound"] = 0.02
    line = frame([dense(), row]).iloc[1]
    assert line["bound_share"] == pytest.approx(0.02 / 0.8)
    assert (line["noninferior_1"], line["noninferior_5"]) == (False, True)


def test_what_is_chosen_is_non_inferior_on_the_selection_set_alone():
    base, row = dense(), compared(0.3, -0.3, -0.1)
    base["selection"] = base["quality"] | {"value": 0.5, "n": 50}
    row["selection"] = compared(0.9, -0.004, 0.004)["quality"] | {"value": 0.5, "n": 50}
    row["selection"]["difference"] |= {"bound": 0.004}
    without = compared(0.3, -0.3, -0.1, key=3)
    broken = compared(0.3, -0.3, -0.1, key=4) | {"selection": row["selection"] | {"collapsed": "one class"}}
    first, line, other, collapsed = (line for _, line in frame([base, row, without, broken]).iterrows())
    assert (line["chosen_1"], line["chosen_5"], line["noninferior_5"]) == (True, True, False)
    assert line["selection_bound_share"] == pytest.approx(0.008)
    assert (line["selection_value"], line["selection_n"], line["selection_delta"]) == (0.5, 50, 0.0)
    assert (line["selection_low"], line["selection_high"]) == (-0.004, 0.004)
    assert (first["selection_value"], first["chosen_1"], other["chosen_5"]) == (0.5, None, None)
    assert collapsed["chosen_5"] is False


def test_holm_corrects_within_a_model_and_task_and_counts_a_row_once():
    first, second = compared(0.02, -0.3, -0.1), compared(0.03, -0.3, -0.1, key=3)
    elsewhere = compared(0.03, -0.3, -0.1, key=4) | {"task": "other"}
    table = frame([dense(), first, first | {"notebook": "other"}, second, elsewhere]).set_index("notebook")
    assert table["p_holm"].dropna().tolist() == pytest.approx([0.04, 0.04, 0.04, 0.03])
    assert set(table["verdict"]) == {"baseline", "worse"}


def test_a_collapsed_model_is_never_noninferior():
    line = frame([dense(), compared(1.0, -0.01, 0.01, collapsed="majority class")]).iloc[1]
    assert (line["verdict"], line["noninferior_5"]) == ("collapsed", False)


def test_every_committed_row_has_its_line_and_its_dense_row(committed):
    assert committed["key"].tolist() == [row["key"] for row in ROWS]
    alone = [dense_of(ROWS, model_task_of(row)) is None for row in ROWS]
    assert (committed["dense_key"].isna() == alone).all()
    base = committed.drop_duplicates("key").set_index("key")["value"]
    tested = committed[committed["delta"].notna() & committed["dense_key"].notna()]
    delta = (tested["value"] - tested["dense_key"].map(base)).to_numpy()
    assert delta == pytest.approx(tested["delta"], rel=1e-6, abs=1e-5)
    sign = tested["higher_is_better"].map({True: -1, False: 1})
    assert (tested["loss"] * tested["delta"] * sign >= 0).all()
    # A margin that holds at 1 % holds at 5 %.
    assert not (committed["noninferior_1"].eq(True) & committed["noninferior_5"].ne(True)).any()


def test_the_long_form_has_a_line_per_timed_shape(committed):
    long = times(ROWS)
    assert len(long) == sum(len(row["latency"]["shapes"]) for row in ROWS if row["latency"])
    assert long.query("verdict == 'baseline'")["ratio"].eq(1.0).all()
    assert set(long["shape_name"]) >= {"batch 1", "prefill, batch 8"}


def test_versions_read_from_source_are_those_that_the_modules_register():
    techniques = {name: technique.version for name, technique in registered().items()}
    assert registry.versions().items() >= techniques.items()
    assert set(registry.versions()) - set(techniques) >= {"sensitivity-bits", "kernels", "weight-statistics"}


def test_a_table_takes_columns_of_the_frame_and_refuses_others():
    shown = notebook.table([dense(), compared(0.3, -0.01, 0.01)], {"label": "model", "settings.bits": "bits"})
    assert list(shown.columns) == ["model", "bits"] and len(shown) == 2
    with pytest.raises(BadSetting, match=r"no column valeu; available: key, .*\bvalue\b"):
        notebook.table([dense()], {"valeu": "value"})


def test_a_kind_of_model_has_budgets_and_rates_of_its_own():
    usual = Recovery(20, [1e-4], 8)
    decoder = SimpleNamespace(loaded=SimpleNamespace(kind="decoder"))
    assert notebook.budgets(decoder, usual, {"encoder": [[60, 8]]}) == [usual]
    longer = notebook.budgets(decoder, usual, {"decoder": [[60, 8], [300, 16, 1e-4, 5e-4]]})
    assert [(b.steps, b.batch_size, b.rates()) for b in longer] == [(60, 8, [1e-4]), (300, 16, [1e-4, 5e-4])]
    for wrong, said in (
        ({"decoders": [[60, 8]]}, "there are encoder"),
        ({"decoder": [[60]]}, "examples per step"),
    ):
        with pytest.raises(BadSetting, match=said):
            notebook.budgets(decoder, usual, wrong)
