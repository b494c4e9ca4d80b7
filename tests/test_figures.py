"""What figures draw: the numbers of the rows, their intervals, scales that say what they are, one look per
technique.
"""

import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from helpers.figures import (
    FIGURES,
    architecture,
    combinations,
    comparison,
    core,
    distillation,
    low_rank,
    other_text,
    pruning,
    quantization,
    structured,
    training_budgets,
    weights,
)
from helpers.report import build
from lmcompress import registry
from lmcompress.results import store
from lmcompress.study import decision
from tests.synthetic_rows import (
    architecture_rows,
    distillation_rows,
    moefication_rows,
    pruning_rows,
    row,
    sheared_rows,
    structured_rows,
)


@pytest.fixture
def axis():
    with plt.style.context(core.STYLE_SHEET):
        figure, axis = plt.subplots()
        yield axis
        plt.close(figure)


@pytest.fixture(autouse=True)
def closed():
    with plt.style.context("default", after_reset=True):  # a notebook's setup of another test has set ours
        yield
    plt.close("all")


def drawn_intervals(axis):
    """Return (x, low, high) of every vertical interval."""
    segments = [s for c in axis.collections if isinstance(c, LineCollection) for s in c.get_segments()]
    return sorted((x, low, high) for (x, low), (_, high) in filter(len, segments))


def drawn_lines(axis):
    """Return the lines that have points; one of the legend's has none."""
    return [line for line in axis.lines if len(line.get_xdata())]


def test_points_stand_at_their_numbers_with_the_recorded_interval(axis):
    rows = [row("wanda", 0.8, sparsity=0.5, p=0.1), row("wanda", 0.6, sparsity=0.9, p=0.1)]
    core.points(axis, core.scored([row(), *rows]).query("not is_dense"), "settings.sparsity")
    assert np.allclose(drawn_intervals(axis), [(0.5, 0.78, 0.82), (0.9, 0.58, 0.62)])
    line = drawn_lines(axis)[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5, 0.9], [0.8, 0.6])


def test_qualities_of_too_few_examples_are_drawn_without_intervals(axis):
    rows = [row("wanda", 0.8, sparsity=level, p=0.1) for level in (0.5, 0.9)]
    for scored in (dense := row(), *rows):
        scored["quality"] |= {"low": None, "high": None, "difference": None}
    table = core.scored([dense, *rows])
    core.baseline(axis, table, 0.0)
    core.points(axis, table[~table["is_dense"]], "settings.sparsity")
    assert not axis.patches and not drawn_intervals(axis) and len(drawn_lines(axis)) >= 2
    assert table["relative"].tolist() == pytest.approx([0, -100 / 9, -100 / 9])
    assert len(core.forest(table).axes[1].lines) > 0


@pytest.mark.parametrize("technique", ["wanda", "magnitude-layer", "dense", "no-such-technique"])
def test_a_technique_looks_as_it_is_registered_and_is_open_once_trained(axis, technique):
    table = core.scored([row(), row(technique, recovery=30, sparsity=0.5)])
    line, look = table.iloc[-1], registry.look(technique)
    assert (line["colour"], line["marker"], line["name"]) == (look.colour, look.marker, look.title)
    assert line["open"] and not core.scored([row(technique)])["open"].iloc[0]
    core.points(axis, table.tail(1), "settings.sparsity")
    (point,) = drawn_lines(axis)
    assert point.get_markerfacecolor() == "white" and point.get_linestyle() == "--"


def test_a_forest_has_a_line_per_configuration_and_a_mark_per_seed():
    rows = [row(), row("wanda", 0.8, sparsity=0.5, p=0.1), row("magnitude-layer", 0.7, sparsity=0.9, p=0.1)]
    seeds = [rows[1] | {"key": f"seed {seed}", "seed": seed} for seed in (1, 2)]
    figure = core.forest(core.scored([*rows, *seeds]))
    sizes, differences = figure.axes
    assert [label.get_text() for label in sizes.get_yticklabels()] == ["Wanda 50%", "magnitude 90%"]
    marked = [line for line in differences.lines if line.get_marker() not in ("None", "")]
    assert sorted(round(line.get_ydata()[0]) for line in marked) == [0, 0, 0, 1]
    assert "% of dense, higher is better" in differences.get_xlabel()


def test_the_relative_difference_is_higher_is_better_for_every_metric():
    worse = row("wanda", 99.0, p=0.1, metric="perplexity")
    worse["quality"]["difference"] |= {"value": 9.0, "low": 4.5, "high": 13.5}
    lines = core.scored([row(value=90.0, metric="perplexity"), worse])
    columns = ["relative", "relative_low", "relative_high"]
    assert lines[columns].iloc[1].tolist() == pytest.approx([-10, -15, -5])
    assert lines["relative"].iloc[0] == 0


def test_shares_of_bytes_are_of_the_dense_model_in_fp32_whichever_format_it_came_in():
    dense, pruned = row(), row("wanda", 0.8, p=0.1)
    dense["memory"]["file_bytes"] //= 2  # as a checkpoint in BF16
    assert core.scored([dense, pruned])["size_share"].tolist() == pytest.approx([0.5, 1.0], abs=1e-3)


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


@pytest.mark.parametrize(("low", "scale"), [(-20, "linear"), (-130, "symlog"), (-40000, "symlog")])
def test_a_scale_that_is_linear_in_the_middle_says_so(axis, low, scale):
    label = core.difference_axis(axis, low, 2)
    assert axis.get_xscale() == scale and axis.get_xlim()[0] < low
    assert ("symlog, linear within ±10" in label) == (scale == "symlog")
    assert "higher is better" in label
    axis.figure.canvas.draw()
    texts = [tick.get_text() for tick in axis.get_xticklabels()]
    assert scale == "linear" or {"−100", "0"} <= set(texts)
    margins = {line.get_label(): line.get_xdata()[0] for line in axis.lines}
    assert (margins["1 % margin"], margins["5 % margin"]) == (-1, -5)


def timed_row(**shape):
    fast = row("wanda", p=0.1)
    fast["latency"]["shapes"]["batch1"] |= shape
    return fast


def test_times_lie_over_the_shaded_noise_floor_on_the_machine_that_took_them(axis):
    fast = timed_row(ratio=0.5, ratio_low=0.4, ratio_high=0.7, noise_floor=0.02)
    lines = core.timed([fast]).query("shape == 'batch1'")
    core.ratio_panel(axis, lines, ["Wanda"])
    (shade,) = axis.patches
    assert (shade.get_x(), shade.get_width()) == (pytest.approx(0.98), pytest.approx(0.04))
    (interval,) = [c.get_segments()[0] for c in axis.collections if isinstance(c, LineCollection)]
    assert interval[:, 0].tolist() == pytest.approx([0.4, 0.7])
    assert lines["machine"].tolist() == ["a cpu"]
    assert core.short_machine("Intel(R) Xeon(R) Processor") == "Intel Xeon"


def test_times_taken_from_another_row_are_not_drawn():
    shared = timed_row() | {"key": "other"}
    shared["latency"] = shared["latency"] | {"measured_on": "first"}
    assert (
        core.timed([shared]).empty and core.timed([]).empty and core.timed([row() | {"latency": None}]).empty
    )


def test_heads_and_widths_alone_stand_beside_the_published_sweep():
    rows = [scored for scored in structured_rows() if scored["technique"] == "dense"]
    heads = row("heads-ffn", 0.8, settings={"heads": 0.25, "n_iters": 4}, p=0.01, key="h" * 16)
    worse = row("heads-ffn", 0.1, settings={"ffn": 0.5, "n_iters": 4}, p=0.01, key="w" * 16)
    heads["memory"]["file_bytes"] = 2_000_000
    quality, width, size, _ = structured.levels([*rows, heads, worse]).axes
    own = drawn_lines(quality)[0]
    assert own.get_xdata().tolist() == [0.25, 1.0] and own.get_ydata()[-1] == 0
    assert own.get_ydata()[0] == pytest.approx(100 * heads["quality"]["difference"]["value"] / 0.9)
    assert drawn_lines(size)[0].get_ydata() == pytest.approx([2, 4], abs=1e-3)
    published = next(line for line in quality.lines if "published" in str(line.get_label()))
    assert published.get_ydata()[0] == 0 and min(published.get_ydata()) == pytest.approx(-36.02, abs=0.01)
    assert drawn_lines(width)[0].get_xdata().tolist() == [0.5, 1.0]


def test_every_machine_has_panels_of_its_own_in_a_figure_of_times():
    ours = timed_row(ratio=0.5) | {"technique": "rtn", "settings": {"bits": 4}}
    moved = json.loads(json.dumps(ours))
    moved["provenance"]["machine"]["cpu"], moved["key"] = "another cpu", "moved"
    figure = quantization.speed([row(), ours, moved])
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert [title.partition("\n")[2] for title in titles] == ["a cpu", "another cpu"]  # both shapes in each


def weight_row(model="org/model", stacks=("encoder",)):
    layers = [
        {"stack": stack, "kind": kind, "block": block, "skewness": block + 10 * (kind == "norm")}
        | {"fraction_above_0_1": 0.1 * block, "fraction_above_1": 0.01 * (kind == "norm")}
        for stack in stacks
        for kind in ("attention", "norm")
        for block in (0, 1)
    ]
    groups = [layer | {"is_bias": bias} for layer in layers[::2] for bias in (False, True)]
    groups.append(layers[0] | {"kind": "embedding", "is_bias": False, "stack": "shared"})
    groups.append(layers[0] | {"kind": "position-bias", "is_bias": False})
    achieved = {"layers": layers, "groups": groups}
    return {"technique": weights.TECHNIQUE, "model": model, "achieved": achieved}


def test_norms_stand_apart_from_matrices():
    _, matrices, norms = weights.skewness([weight_row()]).axes
    assert drawn_lines(matrices)[0].get_ydata().tolist() == [0, 1]
    assert drawn_lines(norms)[0].get_ydata().tolist() == [10, 11]


def test_types_of_weights_are_told_apart_and_a_decoder_follows_its_encoder():
    figure = weights.fractions([weight_row(stacks=("encoder", "decoder"))])
    types = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    names = [
        "token embedding",
        "attention",
        "bias of a linear layer",
        "norm gain",
        "norm bias",
        "position bias",
    ]
    assert types == names
    layers = [line.get_xdata().tolist() for line in drawn_lines(figure.axes[1])]
    assert sorted(layers) == [[0, 1], [2, 3]]
    assert "symlog" in figure.axes[2].get_xlabel()


def test_sensitivities_of_all_models_and_scans_share_one_scale():
    change = {"encoder.0.attention": [0.0, 0.5], "encoder.1.attention": [0.0, 0.01]}
    small = {name: [part / 100 for part in parts] for name, parts in change.items()}
    scans = [
        row("sensitivity", quality=None, achieved={"levels": [0.5, 0.9], "change": change}),
        row("sensitivity-bits", quality=None, achieved={"levels": [8, 4], "change": small}),
        row("sensitivity", quality=None, model="other", achieved={"levels": [0.5, 0.9], "change": small}),
    ]
    figure = pruning.sensitivity(scans)
    meshes = [axis.collections[0] for axis in figure.axes[:2]]
    assert [mesh.get_clim() for mesh in meshes] == [pytest.approx((0.1, 500))] * 2  # thousandths of a nat
    levels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert levels == ["50% pruned", "90% pruned", "8 bits", "4 bits"]
    assert [text.get_text() for text in figure.axes[0].texts][2:4] == ["500", "10"]
    change = {f"{stack}.0.attention": [0.0, 0.5] for stack in ("decoder", "encoder")}
    scan = row("sensitivity", quality=None, achieved={"levels": [0.5, 0.9], "change": change})
    blocks = [label.get_text() for label in pruning.sensitivity([scan]).axes[0].get_xticklabels()]
    assert blocks == ["enc 0\nattn", "dec 0\nattn"]


def test_the_overview_marks_the_dense_model_and_counts_what_lies_outside():
    rows = decision.comparable_rows(pruning_rows())
    figure = comparison.overview(rows)
    panel, key = figure.axes
    assert any("below the panel" in text.get_text() for text in key.texts)
    stars = [line for line in panel.lines if line.get_marker() == "*"]
    assert [(round(line.get_xdata()[0], 3), line.get_ydata()[0]) for line in stars] == [(1.0, 0.0)]
    assert "file written" in panel.get_xlabel() and panel.get_xscale() == "log"
    larger = json.loads(json.dumps(rows[3])) | {
        "model": "a/second",
        "key": 16 * "l",
        "settings": {"sparsity": 0.7},
    }
    larger["memory"]["file_bytes"] *= 2
    larger["selection"] = larger["quality"]
    others = [scored | {"model": "a/second", "key": scored["key"][::-1]} for scored in rows]
    first, _, second, _ = comparison.overview([*rows, *others, larger]).axes
    assert first.get_title().startswith("second") and second.get_xlim() == first.get_xlim()
    drawn = np.concatenate([line.get_xdata() for line in first.lines if line.get_marker() == "."])
    low, high = first.get_xlim()
    assert low < min(drawn) and max(drawn) == pytest.approx(2.0, rel=1e-3) and max(drawn) < high


def test_the_overview_ranks_by_the_file_written_not_by_a_counted_encoding():
    rows = decision.comparable_rows(pruning_rows())
    for scored in rows:
        scored["memory"]["formats"]["bitmask"] = 1
    (panel, _), shares = comparison.overview(rows).axes, core.scored(rows)["size_share"]
    drawn = np.concatenate([line.get_xdata() for line in panel.lines if line.get_marker() == "."])
    assert min(drawn) >= shares.min() > 0.01


def test_the_front_by_hand():
    points = [(1, 60), (2, 90), (3, 80), (4, 95)]
    assert comparison.pareto_front(points, higher_is_better=True) == [0, 1, 3]
    assert comparison.pareto_front(points, higher_is_better=False) == [0]


def test_configurations_in_a_few_characters():
    assert core.tag({"bits": 4, "group_size": 128, "embeddings": True}) == "4-bit g128 +emb"
    assert core.tag({"dtype": "bfloat16"}) == "BF16" and core.tag({"bits": {"a": 3}}) == "mixed bits"
    steps = [{"technique": "sparsegpt", "sparsity": 0.5}, {"recovery": {"steps": 9, "teacher": True}}]
    assert core.short_recipe(json.dumps(steps)) == "SparseGPT 50% → distil"
    tuned = {"technique": "rtn", "bits": 4, "recovery": {"steps": 9}}
    assert core.short_recipe(json.dumps([tuned])) == "RTN 4-bit + fine-tune"
    assert combinations.path_of(json.dumps([{"technique": "dense"}])) == ()
    assert len(combinations.path_of(json.dumps([tuned]))) == 2


def test_orders_of_the_same_steps_and_their_parts_are_drawn():
    prune, quantize = {"technique": "sparsegpt", "sparsity": 0.5}, {"technique": "gptq", "bits": 4}
    distil, drop = {"recovery": {"steps": 9, "teacher": True}}, {"technique": "drop-blocks", "blocks": 1}
    orders = [[prune, quantize], [quantize, prune], [prune, distil, quantize], [quantize, distil, prune]]
    chains = [
        row("chain", 0.8, p=0.1, settings={"steps": steps}, key=f"chain {number}")
        for number, steps in enumerate([*orders, [drop, quantize]])
    ]
    figure = combinations.orders([row(), row("gptq", 0.8, p=0.1, settings={"bits": 4}), *chains])
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[0] == "GPTQ 4-bit" and len(names) == 5 and not any("blocks" in name for name in names)
    assert "SparseGPT 50% → distil → GPTQ 4-bit" in names


def test_each_scale_of_trained_models_has_what_phi_adds_and_its_perplexities():
    rows = architecture_rows()
    gaps, final = architecture.training(rows).axes
    runs = [r for r in rows if r["technique"] == "architecture" and r["quality"]["metric"] == "perplexity"]
    assert len(drawn_lines(gaps)) == 3 + 1  # of five layers, a seed each, and the line at zero
    marks = np.concatenate([line.get_ydata() for line in final.lines if line.get_linestyle() == "None"])
    assert sorted(marks) == sorted(r["quality"]["value"] for r in runs)
    assert "millions" in gaps.get_xlabel() and "lower is better" in final.get_ylabel()


def test_cut_shapes_are_compared_with_scratch_of_the_same_seed():
    losses, gaps = architecture.shaped(sheared_rows()).axes
    assert len(drawn_lines(losses)) == 4 * 3 + 1 and len(drawn_lines(gaps)) == 3 * 3 + 1


def test_low_rank_of_a_part_of_the_layers_is_told_from_the_whole():
    parts = [row("low-rank", p=0.1), row("low-rank", p=0.1), row("mass", p=0.1)]
    for part, settings in zip(parts, ({"kinds": "ffn"}, {"rank": 0.5}, {"blocks": [1]})):
        part["settings"] = settings
    assert [low_rank.is_part(part) for part in parts] == [True, False, False]


def test_of_the_losses_that_were_tried_the_one_taken_is_drawn():
    def taught(student, steps, **loss):
        budget = {"steps": steps, "batch_size": 8}
        made = row("distil", 0.8, p=0.1, notebook="04_distillation")
        return made | {"settings": {"student": student, "training": budget} | loss}

    trials = [taught("copied", 300), taught("copied", 300, temperature=8.0)]
    assert distillation.losses_taken(trials) == {"some/encoder": []}
    taken = [taught(student, 1500, temperature=8.0) for student in ("copied", "random")]
    labels = taught("copied", 1500, soft_weight=0.0, hard_weight=1.0)
    losses = distillation.losses_taken([*trials, *taken, labels])
    assert losses == {"some/encoder": ["temperature 8"]}
    kinds = [distillation.student_of(made, losses) for made in (trials[0], taken[1], labels)]
    assert kinds == [None, ("random", "distilled"), ("copied", "hard labels")]


def test_what_longer_training_changes_is_drawn_where_two_budgets_are():
    def trained(technique, value, steps, **settings):
        made = row(technique, value, p=0.1, recovery=steps, **settings)
        made["settings"]["recovery"]["batch_size"] = 8
        return made

    rows = [row(), row("wanda", 0.81, sparsity=0.5, p=0.1), row("sparsegpt", 0.81, sparsity=0.5, p=0.1)]
    rows += [trained("wanda", value, steps, sparsity=0.5) for value, steps in ((0.72, 60), (0.855, 1500))]
    rows += [trained("dense", value, steps) for value, steps in ((0.9, 60), (0.909, 1500))]
    assert not FIGURES["training-budgets"].drawable([row(), rows[1], rows[3]])
    assert FIGURES["training-budgets"].drawable(rows)
    rows += [trained("sparsegpt", 0.7, 60, sparsity=0.5)]
    figure = training_budgets.training(rows)
    lines = {label: handle for handle, label in zip(*figure.axes[0].get_legend_handles_labels())}
    assert {"Wanda, 50 %", "Dense"} <= set(lines) and "SparseGPT, 50 %" not in lines
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["none", "480", "12,000"]
    heights = {name: list(lines[name].lines[0].get_ydata()) for name in ("Wanda, 50 %", "Dense")}
    assert np.allclose(heights["Wanda, 50 %"], [-10, -20, -5]) and np.allclose(heights["Dense"], [0, 0, 1])


def test_other_text_has_a_number_per_row_and_field():
    rows = [row(value=50.0, metric="perplexity", task=text) for text in ("pydocs-lm", "wikitext2")]
    rows += [row(value=0.6, task="blimp"), row("rtn", 0.5, task="blimp", p=0.1)]
    for scored in rows[2:]:
        parts = {"accuracy_morphology": 0.7, "accuracy_syntax_semantics": 0.5}
        scored["quality"]["secondary"] = {
            name: {"value": value, "low": value - 0.1, "high": value + 0.1} for name, value in parts.items()
        }
    table = other_text.numbers(rows)
    assert len(table[table["metric"] == "accuracy"]) == 6
    panels = other_text.other_text(rows).axes
    texts = [[label.get_text() for label in axis.get_yticklabels()] for axis in panels]
    assert texts == [["pydocs-lm", "wikitext2"], ["all fields", "morphology", "syntax semantics"]]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("pruning-quality", pruning_rows),
        ("pruning-zeros", pruning_rows),
        ("structured-quality", structured_rows),
        ("distillation-quality", distillation_rows),
        ("quantization-quality", pruning_rows),
        ("moefication-quality", moefication_rows),
        ("comparison-overview", pruning_rows),
    ],
)
def test_a_figure_is_a_page_wide_and_no_type_is_smaller_than_eight_points(name, rows):
    with plt.style.context(core.STYLE_SHEET):
        figure = FIGURES[name].draw(rows())
        figure.canvas.draw()
        assert figure.get_size_inches()[0] == core.WIDTH
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 8


def test_every_figure_has_a_function_a_caption_and_needs():
    for figure in FIGURES.values():
        module, _, function = figure.source.partition(":")
        assert callable(getattr(__import__(f"helpers.figures.{module}", fromlist=[function]), function))
        assert figure.caption.endswith(".") and figure.needs and not figure.drawable([])


def printed(figure):
    """Return the extents, in pixels, of all that is written in a figure, by its text and order."""
    extents = {}
    for axis in figure.axes:
        labels = [*axis.texts, axis.xaxis.label, axis.yaxis.label, axis.title, axis._left_title]
        for line in (axis.xaxis, axis.yaxis):
            low, high = sorted(line.get_view_interval())
            labels += [tick.label1 for tick in line.get_major_ticks() if low <= tick.get_loc() <= high]
        extents |= {
            text: text.get_window_extent() for text in labels if text.get_visible() and text.get_text()
        }
    for legend in figure.legends:
        extents |= {text: text.get_window_extent() for text in legend.get_texts()}
    return [(text.get_text(), extent) for text, extent in extents.items()]


@pytest.mark.slow  # draws every figure of the report
def test_no_word_of_a_committed_figure_is_printed_over_another_or_leaves_the_page():
    committed = store.published_rows()
    with plt.style.context(core.STYLE_SHEET):
        for name, rows in build.drawings(committed):
            figure = FIGURES[name].draw(rows)
            figure.canvas.draw()
            words = printed(figure)
            for (text, extent), (other, beside) in itertools.combinations(words, 2):
                over = Bbox.intersection(extent, beside)
                assert over is None or min(over.size) < 1.5, f"{name}: {text!r} lies over {other!r}"
            for text, extent in words:
                inside = Bbox.intersection(extent, figure.bbox.padded(1))
                assert inside.size == pytest.approx(extent.size), f"{name}: {text!r} leaves the page"
            plt.close(figure)


def test_a_name_with_two_dollars_is_no_formula():
    with plt.style.context(core.STYLE_SHEET):
        figure, axes = plt.subplots()
        axes.set_title("my-$model_$")
        figure.canvas.draw()  # of a formula: "unknown symbol"
        plt.close(figure)


def test_a_line_that_has_no_number_is_left_out(axis):
    table = core.scored([row(), row("wanda", 0.8, sparsity=0.5, p=0.1)]).assign(value=[np.nan, 0.8], x=[0, 1])
    core.points(axis, table, "x", line=False)
    assert len(drawn_intervals(axis)) == 1
    core.points(axis, pd.DataFrame(columns=table.columns), "x")
    assert len(drawn_intervals(axis)) == 1
