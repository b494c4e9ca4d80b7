"""The quantization section says what its rows say: null results, slower backends, refusals, one seed and
several.
"""

import copy

import matplotlib.pyplot as plt
import pytest

from helpers.figures import quantization as figures
from helpers.report import build, cards, quantization
from tests.synthetic_rows import EMPTY, SHAPE, compared, key_of, row

HOME = {"notebook": "05_quantization"}
MIXED = {"encoder.0.attention": 8, "encoder.0.feed-forward": 3}
DEALT = {"encoder.0.attention": 3, "encoder.0.feed-forward": 8}


def made(technique, value, settings, *, p, share=0.4, seed=0, shapes=None, words=None, achieved=None) -> dict:
    """A row of quantization: `share` of the dense file's bytes."""
    one = row(technique, value, p=p, seed=seed, **HOME)
    one |= {"settings": settings, "key": key_of(technique, settings, seed)}
    one["achieved"] = {"layers": 4, "bits_per_weight": 4.1, "backend": "torch"} | (achieved or {})
    one["memory"] = one["memory"] | {"file_bytes": int(4_000_100 * share)}
    if shapes:
        one["latency"] = one["latency"] | {"shapes": shapes}
        one["verdict"] = one["verdict"] | {"latency": words}
    else:
        one["latency"] = None
    return one


def shape(ratio: float | None) -> dict:
    ends = {"ratio_low": ratio and ratio * 0.97, "ratio_high": ratio and ratio * 1.03}
    return SHAPE | {"ratio": ratio} | ends


def analysis(technique, settings, achieved) -> dict:
    return row(
        technique, settings=settings, achieved=achieved, key=key_of(technique, settings), **EMPTY, **HOME
    )


def trained(aware, seed, value, last) -> dict:
    curve = {
        "train": [[5, 0.6], [15, last]],
        "validation": [[5, 0.7], [15, last + 0.1]],
        "seconds": 4.0,
        "tokens": 9,
    }
    settings = {"bits": 4, "training": {"steps": 15}} | ({} if aware else {"aware": False})
    return made("qat", value, settings, p=0.4, seed=seed, achieved={"curve": curve})


def rows_of(*, seeds=(0,)) -> list[dict]:
    four, groups, scan = {"bits": 4}, {"bits": 4, "group_size": 128}, {"levels": [8, 4, 3]}
    works = {"batch1": shape(0.5), "batch8": shape(1.4), "prefill_b1": shape(1.01), "decode_b1": shape(None)}
    words = {
        "batch1": "faster",
        "batch8": "slower",
        "prefill_b1": "no measurable change",
        "decode_b1": "baseline",
    }
    errors = {
        "output_error": 0.1,
        "output_error_rtn": 0.15,
        "layers_no_better_than_rtn": ["block.0.query"],
        "output_error_by_layer": {
            "block.0.query": {"gptq": 0.2, "rtn": 0.2},
            "block.0.key": {"gptq": 0.1, "rtn": 0.2},
        },
    }
    change = {"encoder.0.attention": [0.0, 0.1, 0.4], "encoder.0.feed-forward": [0.0, 0.02, 0.1]}
    allocations = {"by the scan": MIXED, "at random": DEALT}
    proof = {
        "technique": "gptq",
        "settings": four,
        "matrices": 36,
        "dtypes": ["uint8"],
        "bits": 4,
        "unique": 16,
        "file_bytes": 1_600_000,
        "dense_bytes": 4_000_000,
        "reloaded": ["uint8"],
    }
    aware, after = (
        {"bits": 4, "training": {"steps": 15}},
        {"bits": 4, "training": {"steps": 15}, "aware": False},
    )
    tests = [compared("qat", "qat", 0.01, aware, after, p=0.6) for _ in seeds]
    return [
        row(**HOME),
        made("cast", 0.9, {"dtype": "bfloat16"}, p=1.0, share=0.5),
        made("int8-dynamic", 0.898, {}, p=0.8, share=0.45, shapes=works, words=words),
        made("rtn", 0.7, four, p=1e-6),
        made("rtn", 0.5, {"bits": 3}, p=1e-9, share=0.35) | {},
        made("rtn", 0.89, four | {"embeddings": True}, p=0.0001, share=0.15),
        made("rtn", 0.88, {"bits": MIXED}, p=1e-6),
        made("rtn", 0.86, {"bits": DEALT}, p=1e-6),
        made("gptq", 0.88, four, p=0.2, achieved=errors),
        made("nf4", 0.89, {}, p=0.5, share=0.42),
        compared("gptq", "rtn", 0.18, four, four, p=1e-5) | HOME,
        compared("rtn", "rtn", 0.01, groups, four, p=0.5) | HOME,
        compared("rtn", "rtn", 0.02, {"bits": MIXED}, {"bits": DEALT}, p=0.7) | HOME,
        *(one | HOME | {"key": key_of("qat", n)} for n, one in enumerate(tests)),
        *(trained(way, seed, 0.88, last) for seed in seeds for way, last in ((True, 0.5), (False, 0.3))),
        analysis(
            "sensitivity-bits", scan, scan | {"weights": {}, "change": change, "allocations": allocations}
        ),
        analysis("stored-integers", {"of": "x"}, proof),
        analysis(
            "refused",
            {"technique": "openvino-int8"},
            {"reason": "openvino is missing: pip install openvino."},
        ),
    ]


@pytest.fixture
def rows():
    return rows_of()


def text_of(rows):
    return "\n\n".join([*quantization.findings(rows), *cards.block(quantization.SECTION.cards(rows))])


def line_of(rows, start):
    return next(line for line in text_of(rows).splitlines() if line.startswith(start))


def test_null_results_and_losses_are_said_with_bytes(rows):
    assert line_of(rows, "- **Half precision").endswith(
        "No measurable change: Half precision, bfloat16 (50 % of the bytes)."
    )
    weights = line_of(rows, "- **Integers for weights only")
    assert "GPTQ, 4 bits, per row (40 % of the bytes)" in weights
    assert "Worse: Round to nearest, 4 bits, per row (40 % of the bytes, −20.0 points" in weights
    assert "embeddings too (15 % of the bytes" in weights and "mixed" not in weights


def test_a_collapse_is_called_one(rows):
    rows[4]["quality"]["collapsed"] = "predicts one class"
    assert "collapsed: Round to nearest, 3 bits, per row" in text_of(rows)


def test_comparisons_name_where_mixed_bits_come_from(rows):
    text = text_of(rows)
    assert "- GPTQ, 4 bits, per row, against Round to nearest, 4 bits, per row: better (+18.0 points" in text
    assert (
        "mixed bits dealt out by the scan, against Round to nearest, mixed bits dealt out at random: no "
        "measurable" in text
    )
    assert "| Round to nearest, mixed bits dealt out by the scan |" in text
    assert "10 %, against 15 % of plain rounding; no better in 1 of 2 layers (block.0.query)" in text


def test_a_slower_backend_is_said_to_be_slower_and_what_it_cannot_do(rows):
    line = line_of(rows, "| int8, dynamic | torch |")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2].startswith("0.50 [") and cells[2].endswith("]")  # faster: no word
    assert cells[3] == "1.40 [1.36, 1.44], slower" and cells[5] == "cannot do"
    assert cells[4].startswith("1.01 [") and cells[4].endswith("no measurable change")
    said = " ".join(quantization.summary(rows))
    assert "Of 3 pairs of backend and work timed: 1 faster, 1 slower and 1 no measurable change" in said


def test_a_refusal_is_quoted_unless_it_was_done_after_all(rows):
    assert "could not be done: openvino is missing: pip install openvino." in text_of(rows)
    assert "could not be done" not in text_of([*rows, made("openvino-int8", 0.9, {}, p=0.9)])


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_training_is_said_with_losses_and_one_test_per_seed(seeds):
    text = text_of(rows_of(seeds=seeds))
    count = "1 seed:" if len(seeds) == 1 else "3 seeds:"
    assert (
        f"- 4 bits, per row, {count} with rounded weights train loss 0.600 → 0.500, validation loss 0.700 → "
        f"0.600" in text
    )
    assert "in floating point train loss 0.600 → 0.300" in text
    line = next(line for line in text.splitlines() if "seed by seed" in line)
    assert line.count("no measurable difference (+1.00 points") == len(seeds)
    assert (
        "train 0.300 → 0.500, validation 0.400 → 0.600" in text
        and "asked: both higher | ordering reproduced |" in text
    )


def test_the_proof_counts_values_and_bytes(rows):
    assert "| GPTQ, 4 bits, per row | 36 | uint8 | 16 of 16 | 1.6 MB | 40 % | uint8 |" in text_of(rows)
    held = {"stored": {"i8": {"matrices": 37, "weights": 9, "most_distinct_values": 255}}}
    graph = made("openvino-int8", 0.9, {}, p=0.9, share=0.25, achieved=held)
    assert "| 37 | i8 | 255 | 1.0 MB | 25 % | the graph itself |" in text_of([*rows, graph])


def test_published_orders_are_judged(rows):
    text = text_of(rows)
    assert "GPTQ4 31.1 to 31.9, RTN4 37.28" in text and "| ordering reproduced |" in text
    assert "not reproduced (no measurable difference)" in text  # groups of 128


def test_the_summary_names_the_smallest_unnoticed_file_or_says_there_is_none(rows):
    gptq = next(row for row in rows if row["technique"] == "gptq")
    assert gptq["quality"]["difference"]["high"] < 0  # Holm lets it pass, its own interval does not
    assert "NF4, 42 % of the dense bytes" in quantization.summary(rows)[0]
    gptq["quality"]["difference"]["high"] = 0.001
    assert "GPTQ, 4 bits, per row, 40 % of the dense bytes" in quantization.summary(rows)[0]
    worse = [rows[0], rows[3], rows[4]]
    assert (
        "Every quantized model shows a loss, if only in its own interval; the smallest has 35 % of the "
        "dense bytes" in quantization.summary(worse)[0]
    )


@pytest.mark.parametrize("missing", [None, *sorted({one["technique"] for one in rows_of()} - {"dense"})])
def test_every_figure_is_drawn_from_the_rows_there_are(rows, missing):
    left = [one for one in rows if one["technique"] != missing]
    assert text_of(left) and isinstance(quantization.summary(left), list)
    for drawing in build.drawable(quantization.SECTION, left):
        figure = drawing.draw(left)
        figure.canvas.draw()
        plt.close(figure)


def test_partial_rows_hold(rows):
    for count in range(1, len(rows) + 1):
        assert isinstance(text_of(rows[:count]), str)


def test_the_speed_figure_leaves_out_times_taken_from_another_row(rows):
    shared = copy.deepcopy(rows[2]) | {"key": "other"}
    shared["latency"]["measured_on"] = rows[2]["key"]
    assert figures.timed_rows([*rows, shared]) == [rows[2]]
