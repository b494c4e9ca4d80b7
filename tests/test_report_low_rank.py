"""The low-rank section says what its rows say, holds with a part of them, and draws every figure it can."""

import pytest

from helpers.report import low_rank
from helpers.report import rows_low_rank as p
from tests.synthetic_rows import EMPTY, SHAPE, key_of, row
from tests.synthetic_rows import tested as compared_rows

HOME = "06_low_rank_and_sharing"
PAIR = ("some/encoder", "some-task")
BUDGET = {"steps": 8, "learning_rate": 1e-4, "batch_size": 8}


def form(technique, value, *, p, seed=0, share=0.75, collapsed=None, made=None, **settings) -> dict:
    """A row whose smallest stored form is `share` of the dense file."""
    one = row(technique, value, p=p, collapsed=collapsed, notebook=HOME, seed=seed, settings=settings)
    one["achieved"] = {"layers": 4, **(made or {})}
    one["memory"]["formats"] = {"dense": int(4_000_000 * share), "bitmask": 4_125_000}
    return one | {"latency": None, "key": key_of(technique, settings, seed)}


def differs(first, second, difference, *, p) -> dict:
    return compared_rows(first, second, difference, p=p) | {"notebook": HOME}


def analysis(technique, achieved, **settings) -> dict:
    return row(technique, notebook=HOME, achieved=achieved, settings=settings, **EMPTY) | {
        "key": key_of(technique, settings)
    }


def redundancy(each=6, stacked=10, concatenated=12, rest=10) -> dict:
    """One series of two maps of 16 x 16."""
    ranks = {
        "each": each,
        "mean": 5,
        "stacked": stacked,
        "concatenated": concatenated,
        "differences stacked": rest,
    }
    where = {"stack": "encoder", "kind": "attention", "role": "q"}
    table = {**where, "blocks": [0, 1], "cosine": [[1.0, -0.02], [-0.02, 1.0]]}
    one = {**where, "blocks": 2, "out": 16, "in": 16, "ranks": ranks}
    return analysis("redundancy", {"series": [one], "similarity": [table]}, energy=0.9)


def speed(crossover=96.0, dense_ms=1.0, ratios=(0.5, 1.4), spread=0.05) -> dict:
    fixed = {"noise_floor": 0.02, "rows": 128, "dense_ms": dense_ms}
    timings = [
        {"rank": rank, "ratio": r, "ratio_low": r - spread, "ratio_high": r + spread, **fixed}
        for rank, r in zip((None, 64, 128), (1.0, *ratios), strict=True)
    ]
    made = {
        "out": 256,
        "in": 256,
        "break_even": 128.0,
        "timings": timings,
        "crossover": [{"rows": 128, "rank": crossover}],
        "ceiling": {"gflops_per_s": 100.0, "bandwidth_gb_per_s": 10.0},
    }
    return analysis("layer-speed", made, rows=[128])


def low_rank_rows(seeds=(0, 1)) -> list[dict]:
    """Return forms one shot and trained, of parts, with tests; a GLAM that merged and one that did not."""
    plain = form("low-rank", 0.8, p=1e-4, rank=0.5)
    aware, basis, mean_maps = (
        form("low-rank-aware", 0.88, p=0.2, rank=0.5, calibration={"n": 8}),
        form("global-basis", 0.6, p=1e-6, rank=0.5, init="stacked"),
        form("mass", 0.5, p=1e-6, collapsed="predicts one class", blocks=[1, 2]),
    )
    timed = form("low-rank", 0.85, p=0.01, share=0.8, rank=0.75)
    timed["latency"] = row()["latency"] | {
        "shapes": {"batch8": SHAPE | {"batch": 8, "median_ms": 5.0, "ratio": 0.5}}
    }
    rows = [
        row(notebook=HOME),
        plain,
        aware,
        basis,
        mean_maps,
        timed,
        row(p=0.5, recovery=8, notebook=HOME),
        form("magnitude-layer", 0.89, p=0.6, share=0.76, sparsity=0.53),
        form("low-rank", 0.89, p=0.7, share=0.9, rank=0.5, kinds="ffn"),
        form("low-rank", 0.7, p=1e-5, share=0.9, rank=0.5, blocks=[0, 1]),
        differs(aware, plain, 0.08, p=0.001),
        differs(basis, plain, -0.2, p=1e-5),
        differs(mean_maps, plain, -0.3, p=1e-5),
    ]
    for seed in seeds:
        again = form("low-rank", 0.86, p=0.03, seed=seed, rank=0.5, recovery=BUDGET)
        merged = {
            "merges": [{"step": 4, "layers": [["a.b.q"], ["a.b.k"]], "distance": 1.39}],
            "bases": 2,
            "basis_layers": ["a.b.q", "a.b.k", "a.b.v"],
            "basis_by_layer": [[0, [0, 1, 2]], [4, [0, 0, 2]]],
        }
        glam = form("glam", 0.85, p=0.03, seed=seed, made=merged, rank=0.5, threshold=2.0, training=BUDGET)
        shared = form("mass-trained", 0.84, p=0.01, seed=seed, recover="lora", blocks=[1, 2], training=BUDGET)
        rows += [
            again,
            glam,
            shared,
            differs(glam, again, -0.01, p=0.6),
            differs(shared, again, -0.02, p=0.5),
        ]
    none = {"merges": [], "bases": 3, "basis_layers": ["a"], "basis_by_layer": [[0, [0]]]}
    rows.append(form("glam", 0.86, p=0.03, made=none, rank=0.5, threshold=0.5, training=BUDGET))
    return [*rows, redundancy(), speed()]


def text_of(rows) -> str:
    return "\n\n".join(low_rank.findings(rows))


def test_the_verdict_counts_the_tested_differences_of_sharing_only():
    (said,) = low_rank.summary(low_rank_rows())
    assert "did not pay here" in said and "at about the same bytes, 6 tests: " in said
    assert "one shot, 2 worse; after the same training, 4 no measurable difference" in said
    (null,) = low_rank.summary(
        [one for one in low_rank_rows() if one["key"] not in _keys("global-basis", "mass")]
    )
    assert "neither paid nor cost" in null and "one shot" not in null
    assert low_rank.summary([row(notebook=HOME)]) == []


def _keys(*techniques) -> set[str]:
    first = [one for one in low_rank_rows() if one["technique"] == "paired-difference"]
    return {one["key"] for one in first if one["achieved"]["first"]["technique"] in techniques}


def test_redundancy_counts_weights_by_hand():
    """Each its own: 6 · 2 · 32 of 512. Stacked: 10 · 48. Beside one another: 12 · 48. Mean map and the rest:
    256 + 480.
    """
    text = text_of(low_rank_rows())
    assert (
        "a basis for each map 0.75, one basis, of what they read 0.94, one basis, of what they write 1.12"
        in text
    )
    assert "rest 1.44" in text and "in 0 of 1 series" in text
    assert "in 1 of 1 series" in text_of([row(notebook=HOME), redundancy(stacked=7)])


@pytest.mark.parametrize(
    ("crossover", "ratios", "spread", "said"),
    [
        (
            96.0,
            (0.5, 1.4),
            0.05,
            "measurably faster up to rank 64; the ratio passes 1 at rank 96, 75 % of break-even;",
        ),
        (None, (0.5, 0.8), 0.05, "measurably faster at every rank tried, up to 128"),
        (0.0, (1.2, 1.4), 0.05, "measurably faster at no rank tried"),
        (96.0, (0.5, 1.4), 0.6, "measurably faster at no rank tried"),  # 0.5 may be 1.1
    ],
)
def test_speed_is_said_with_what_limits_the_dense_map(crossover, ratios, spread, said):
    """128 rows of 256 x 256: 16.8 MFLOP are 17 % of 100 GFLOP/s in 1 ms; 0.52 MB are 5 % of 10 GB/s."""
    text = text_of([speed(crossover, ratios=ratios, spread=spread)])
    assert said in text and "far from both limits (17 % of the machine's matmul rate, 5 % of its" in text


def test_a_part_is_no_form_of_the_whole_model():
    found = p.forms(low_rank_rows(), PAIR, trained=False)
    assert [one["settings"] for one in found["Low rank, SVD"]] == [{"rank": 0.5}, {"rank": 0.75}]
    assert set(p.forms(low_rank_rows(), PAIR, trained=True)) == {
        "Dense",
        "Low rank, SVD",
        "GLAM, threshold 2",
        "GLAM, threshold 0.5",
        "Shared mean layers, recovered, LoRA folded in",
    }
