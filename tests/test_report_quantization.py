"""The quantization section: refusals, collapse, files, published orders."""

import copy

import pytest

from helpers.report import cards, quantization
from helpers.report import rows_quantization as figures
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


def test_a_collapse_is_called_one(rows):
    rows[4]["quality"]["collapsed"] = "predicts one class"
    assert "collapsed: Round to nearest, 3 bits, per row" in text_of(rows)


def test_a_refusal_is_quoted_unless_it_was_done_after_all(rows):
    assert "could not be done: openvino is missing: pip install openvino." in text_of(rows)
    assert "could not be done" not in text_of([*rows, made("openvino-int8", 0.9, {}, p=0.9)])


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


def test_the_speed_figure_leaves_out_times_taken_from_another_row(rows):
    shared = copy.deepcopy(rows[2]) | {"key": "other"}
    shared["latency"]["measured_on"] = rows[2]["key"]
    assert figures.timed_rows([*rows, shared]) == [rows[2]]
