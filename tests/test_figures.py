"""What figures draw: the numbers of the rows, their intervals, scales that say what they are, one look per
technique.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.text import Text

from helpers.figures import comparison, core, pruning, weights
from lmcompress import registry
from tests.synthetic_rows import pruning_rows, row


@pytest.fixture
def axis():
    with plt.style.context(core.STYLE_SHEET):
        figure, axis = plt.subplots()
        yield axis
        plt.close(figure)


def drawn_intervals(axis):
    """Return (x, low, high) of every interval that a mark of seaborn drew."""
    segments = [s for c in axis.collections if isinstance(c, LineCollection) for s in c.get_segments()]
    return sorted((x, low, high) for (x, low), (_, high) in segments)


def test_points_stand_at_their_numbers_with_the_recorded_interval(axis):
    rows = [row("wanda", 0.8, sparsity=0.5, p=0.1), row("wanda", 0.6, sparsity=0.9, p=0.1)]
    core.marks(axis, core.scored_frame(rows), "sparsity")
    assert np.allclose(drawn_intervals(axis), [(0.5, 0.78, 0.82), (0.9, 0.58, 0.62)])
    line = next(line for line in axis.lines if len(line.get_xdata()))
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5, 0.9], [0.8, 0.6])


def test_qualities_of_too_few_examples_are_drawn_without_intervals(axis):
    rows = [row("wanda", 0.8, sparsity=level) for level in (0.5, 0.9)]
    for scored in (dense := row(), *rows):
        scored["quality"] |= {"low": None, "high": None, "difference": None}
    core.dense_band(axis, dense["quality"])
    core.marks(axis, core.scored_frame(rows), "sparsity")
    assert not axis.patches and not np.isfinite([low for _, low, _ in drawn_intervals(axis)]).any()
    core.named_rows(axis, core.scored_frame(rows))
    assert len(axis.get_yticks()) == 1


@pytest.mark.parametrize("technique", ["wanda", "magnitude-layer", "dense", "no-such-technique"])
def test_a_technique_looks_as_it_is_registered_and_is_open_once_trained(technique):
    (line,) = core.scored_frame([row(technique, recovery=30)]).itertuples()
    look = registry.look(technique)
    assert (line.colour, line.marker, line.name) == (look.colour, look.marker, f"{look.title} + recovery")
    assert line.open and not core.scored_frame([row(technique)])["open"].iloc[0]


def test_seeds_of_one_name_stand_in_one_row_with_a_bar_at_their_mean(axis):
    lines = core.scored_frame([row(value=0.8), row(value=0.9), row("wanda", 0.7, p=0.1)])
    core.named_rows(axis, lines, means=True)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Dense", "Wanda"]
    (mean,) = [line for line in axis.lines if line.get_marker() == "|"]
    assert mean.get_xdata()[0] == pytest.approx(0.85) and mean.get_ydata()[0] == 0
    ends = [c.get_segments()[0][:, 0] for c in axis.collections if isinstance(c, LineCollection)]
    assert np.allclose(ends, [(0.78, 0.82), (0.88, 0.92), (0.68, 0.72)])


@pytest.mark.parametrize(("low", "high"), [(20, 120), (42, 55), (40, 9e6), (0.1, 1.1)])
def test_ticks_of_a_log_axis_are_plain_numbers(axis, low, high):
    axis.plot([0, 1], [low, high])
    core.log_axis(axis)
    axis.figure.canvas.draw()
    bottom, top = axis.get_ylim()
    shown = [t for t in axis.get_yticklabels() if bottom <= t.get_position()[1] <= top and t.get_text()]
    assert len(shown) >= 2
    for tick in shown:
        assert float(tick.get_text().replace(",", "")) == pytest.approx(tick.get_position()[1])


@pytest.mark.parametrize(("reach", "scale"), [(0.5, "linear"), (50, "symlog")])
def test_a_scale_that_is_linear_in_the_middle_says_so(axis, reach, scale):
    axis.plot([-reach, reach], [0, 1])
    core.difference_axis(axis, {"metric": "perplexity", "higher_is_better": False}, linear_to=0.1)
    assert axis.get_xscale() == scale
    assert ("symlog, linear within ±0.1" in axis.get_xlabel()) == (scale == "symlog")
    assert "lower is better" in axis.get_xlabel()


def test_times_lie_over_the_shaded_noise_floor_and_a_missing_shape_is_written(axis):
    fast = row("wanda", p=0.1)
    fast["latency"]["shapes"]["batch1"] |= {
        "ratio": 0.5,
        "ratio_low": 0.4,
        "ratio_high": 0.7,
        "noise_floor": 0.02,
    }
    core.ratio_rows(axis, core.ratio_frame([fast], "batch1", ["fast"]))
    (shade,) = axis.patches
    assert (shade.get_x(), shade.get_width()) == (pytest.approx(0.98), pytest.approx(0.04))
    (interval,) = [c.get_segments()[0] for c in axis.collections if isinstance(c, LineCollection)]
    assert interval[:, 0].tolist() == pytest.approx([0.4, 0.7])
    core.ratio_rows(axis, core.ratio_frame([fast], "decode_b1", ["fast"]))
    assert [text.get_text() for text in axis.texts] == ["cannot run it"]


def weight_row(model="org/model", stacks=("encoder",)):
    names = [*weights.MOMENTS, *weights.FRACTIONS]
    layers = [
        {"stack": stack, "kind": kind, "block": block} | dict.fromkeys(names, block + 10 * (kind == "norm"))
        for stack in stacks
        for kind in ("attention", "norm")
        for block in (0, 1)
    ]
    return {"technique": weights.TECHNIQUE, "model": model, "achieved": {"layers": layers}}


def test_norms_stand_apart_from_matrices():
    moments, norms = (draw([weight_row()]) for draw in (weights.moments_figure, weights.norms_figure))
    mean, spread = (next(iter(axis.lines)).get_ydata() for axis in moments.axes[:2])
    assert mean.tolist() == [0, 1000] and spread.tolist() == [0, 1]  # a mean is drawn in thousandths
    assert [len(axis.get_lines()) for axis in moments.axes] == [1] * 4
    assert next(iter(norms.axes[0].lines)).get_ydata().tolist() == [10, 11]
    plt.close("all")


def test_both_stacks_have_a_line_and_the_decoder_is_dashed():
    figure = weights.fractions_figure([weight_row(stacks=("encoder", "decoder"))])
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles == {"attention": "-", "attention, decoder": "--"}
    plt.close(figure)


def test_sensitivities_of_all_models_share_one_scale():
    change = {"encoder.0.attention": [0.0, 0.5], "encoder.1.attention": [0.0, 0.01]}
    small = {name: [part / 100 for part in parts] for name, parts in change.items()}
    rows = [
        row("sensitivity", quality=None, achieved={"levels": [0.5, 0.9], "change": part})
        for part in (change, small)
    ]
    figure = pruning.sensitivity_maps(rows)
    meshes = [axis.collections[0] for axis in figure.axes[:2]]
    assert [mesh.get_clim() for mesh in meshes] == [pytest.approx((0.1, 500))] * 2  # thousandths of a nat
    assert [text.get_text() for text in figure.axes[0].texts] == ["500", "10"]
    plt.close(figure)


def test_quality_against_dense_is_relative_and_higher_is_better_for_every_metric():
    worse = row("wanda", 99.0, p=0.1, metric="perplexity")
    worse["quality"]["difference"] |= {"value": 9.0, "low": 4.5, "high": 13.5}
    lines = comparison.relative_frame([row(value=90.0, metric="perplexity"), worse])
    assert lines[["better", "low", "high"]].iloc[1].tolist() == pytest.approx([-10, -15, -5])
    assert lines["better"].iloc[0] == 0 and lines["share"].iloc[0] == 1


@pytest.mark.parametrize("draw", [pruning.quality_by_sparsity, pruning.zeros_worth])
def test_no_type_is_smaller_than_eight_points(draw):
    with plt.style.context(core.STYLE_SHEET):
        figure = draw(pruning_rows())
        figure.canvas.draw()
        assert figure.get_size_inches()[0] == core.WIDTH
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 8
        plt.close(figure)


def test_a_line_that_has_no_number_is_left_out(axis):
    lines = core.scored_frame([row(), row("wanda", 0.8, sparsity=0.5, p=0.1)]).assign(value=[np.nan, 0.8])
    core.marks(axis, lines, "sparsity", line=False)
    assert len(drawn_intervals(axis)) == 1
    core.marks(axis, pd.DataFrame(columns=lines.columns), "sparsity")
    assert len(drawn_intervals(axis)) == 1
