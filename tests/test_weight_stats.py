import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny

from helpers.figures import weights as plots_weights
from lmcompress.errors import BadSetting, BadWeights, NothingTouched
from lmcompress.models import assets, families
from lmcompress.models.anatomy import anatomy
from lmcompress.weights import moments, statistics

NAME = "h.0.mlp.c_fc.weight"
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def write(folder, **tensors):
    file = folder / "model.safetensors"
    save_file({name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def of(tensor, folder, **settings):
    return statistics.moments(write(folder, **{NAME: tensor}), **settings).iloc[0]


def check(row, x, tolerance=1e-9):
    """Compare a row with numpy and scipy on the same elements in float64."""
    x = x.detach().to(torch.float64).numpy().ravel()
    expected = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
    if x.std() > 0:
        expected |= {"skewness": scipy.stats.skew(x), "excess_kurtosis": scipy.stats.kurtosis(x)}
    for name, value in expected.items():
        assert np.isclose(row[name], value, rtol=tolerance, atol=1e-14 * np.abs(x).max()), (row["name"], name)
    counts = (np.abs(x) > 0.1).sum(), (np.abs(x) > 1).sum(), (x == 0).sum()
    assert (row["n"], row["n_above_0_1"], row["n_above_1"], row["n_zero"]) == (x.size, *counts)
    for name, p in moments.QUANTILES.items():
        quantile = np.quantile(np.abs(x), p)
        assert abs(row[name] - quantile) <= moments.QUANTILE_RESOLUTION * quantile + 1e-38, row["name"]


def test_tensors_of_minilm_of_every_size_agree_with_scipy():
    frame = statistics.moments(assets.MINILM)
    tensors = load_file(assets.resolve(assets.MINILM, kind="models") / "model.safetensors")
    assert frame.attrs == {"skipped": ["embeddings.position_ids"], "tied": {}}
    assert set(frame["name"]) == set(tensors) - {"embeddings.position_ids"} and len(frame) == 103
    for _, row in frame.sort_values("n").iloc[::4].iterrows():  # of all, the largest would take a minute
        check(row, tensors[row["name"]])
    assert statistics.overall(frame)["n"] == 22_713_216


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_format_agrees_with_scipy_in_float64(tmp_path, dtype):
    x = (torch.randn(301, 257, generator=torch.Generator().manual_seed(1)) * 0.4).to(dtype)
    x.view(-1)[:50] = torch.zeros(50).to(dtype)
    check(of(x, tmp_path, chunk_bytes=10_001), x)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 5000),
    chunk_bytes=st.integers(8, 30_000),
    scale=st.sampled_from([1e-6, 0.05, 3.0]),
    offset=st.sampled_from([0.0, 0.6, -1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_the_chunk_size_changes_nothing(tmp_path, n, chunk_bytes, scale, offset, dtype, seed):
    x = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale + offset).to(dtype)
    whole, cut = of(x, tmp_path), of(x, tmp_path, chunk_bytes=chunk_bytes)
    for name in ("n", "min", "max", "n_above_0_1", "n_above_1", "n_zero", *moments.QUANTILES):
        assert whole[name] == cut[name], name
    for name in ("mean", "std"):
        assert np.isclose(whole[name], cut[name], rtol=1e-12, atol=1e-15 * abs(offset)), name
    if whole["std"] > 1e-3 * abs(offset):
        for name in ("skewness", "excess_kurtosis"):
            assert np.isclose(whole[name], cut[name], rtol=1e-8, atol=1e-10, equal_nan=True), name


@pytest.mark.parametrize("offset", [1.0, 100.0, 1e4, 1e6])
def test_a_mean_far_from_zero_costs_no_digits(tmp_path, offset):
    x = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + offset
    check(of(x, tmp_path, chunk_bytes=50_000), x, tolerance=1e-6 if offset > 1e4 else 1e-9)
    mixed = torch.cat([x, 1e-3 * x, torch.zeros(40_000)])
    check(of(mixed, tmp_path, chunk_bytes=64_000), mixed, tolerance=1e-6 if offset > 1e4 else 1e-9)


def test_a_chunk_that_starts_far_from_its_mean_keeps_its_digits(tmp_path):
    x = torch.randn(1 << 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[:4096] += 1e4
    check(of(x.float(), tmp_path), x.float())


def test_exact_zeros_and_thresholds_are_strict(tmp_path):
    tenth = torch.tensor(0.1)  # the float32 nearest to 0.1 lies above 0.1
    x = torch.stack(
        [tenth, torch.nextafter(tenth, torch.tensor(0.0)), tenth * 0, tenth * 10, -1.5 * tenth / tenth]
    )
    row = of(x, tmp_path)
    assert (row["n_above_0_1"], row["n_above_1"], row["n_zero"]) == (3, 1, 1)


def test_scalars_empty_and_constant_tensors_have_what_is_defined(tmp_path):
    file = write(
        tmp_path, a=torch.tensor(2.5), b=torch.empty(0, 3), c=torch.full((70_000,), -0.3), d=torch.zeros(5)
    )
    rows = statistics.moments(file).set_index("name")
    assert rows.loc["a", ["n", "mean", "std", "abs_q50"]].tolist() == [1, 2.5, 0, 2.5]
    assert rows.loc["b", "n"] == 0 and np.isnan(rows.loc["b", "mean"]) and rows.loc["b", "n_zero"] == 0
    assert np.isclose(rows.loc["c", "mean"], -0.3) and rows.loc["c", "std"] < 1e-7
    assert np.isnan(rows.loc[["a", "b", "d"], "skewness"].astype(float)).all()
    assert (rows.loc["d", "n_zero"], rows.loc["d", "abs_q99"]) == (5, 0)
    assert statistics.overall(statistics.moments(file))["n"] == 70_006


def test_tied_matrices_count_once_however_they_are_stored(tmp_path):
    shared = torch.randn(50, 8)
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    file = tmp_path / "model.safetensors"
    save_file({name: shared.clone() for name in names} | {"other.embed.weight": torch.randn(50, 8)}, file)
    frame = statistics.moments(file)
    assert len(frame) == 2 and len(frame.attrs["tied"]) == 3 and statistics.overall(frame)["n"] == 2 * 400
    torch.save(dict.fromkeys(names, shared), tmp_path / "model.bin")
    assert statistics.overall(statistics.moments(tmp_path / "model.bin"))["n"] == 400


def test_equal_matrices_inside_blocks_are_not_tied(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({f"h.{i}.mlp.c_fc.weight": torch.zeros(4, 4) for i in range(2)}, file)
    assert len(statistics.moments(file)) == 2


def test_buffers_and_integers_are_left_out_by_name(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {
        "h.0.attn.bias": torch.tril(torch.ones(1, 1, 8, 8)),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "embeddings.position_ids": torch.arange(8),
        "h.0.attn.rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.c_attn.bias": torch.ones(24),
    }
    save_file(tensors, file)
    frame = statistics.moments(file)
    assert list(frame["name"]) == ["h.0.attn.c_attn.bias"] and len(frame.attrs["skipped"]) == 4
    save_file({"position_ids": torch.arange(3)}, file)
    pytest.raises(NothingTouched, statistics.moments, file).match("position_ids")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tensors_that_hold_no_numbers_are_named(tmp_path, dtype, value):
    bad = torch.randn(70_000).to(dtype)
    bad[65_000] = value
    file = write(tmp_path, good=torch.randn(9), h__1__w=bad)
    pytest.raises(BadWeights, statistics.moments, file).match(r"1 tensors .*: h\.1\.w\.")


def test_a_partial_checkpoint_points_to_its_base(tmp_path):
    write(tmp_path, w=torch.randn(100))
    (tmp_path / "compression.json").write_text('{"base": "org/base"}')
    pytest.raises(BadSetting, statistics.moments, tmp_path).match("statistics of org/base")


def test_groups_are_pooled_beside_the_unweighted_mean(tmp_path):
    big, small = torch.full((30, 10), 1.0), torch.full((100,), 3.0)
    frame = statistics.moments(write(tmp_path, h__0__mlp__c_fc__weight=big, h__0__mlp__extra__weight=small))
    (row,) = statistics.by_group(frame).to_dict("records")
    assert (row["mean"], row["mean_unweighted"]) == (1.5, 2.0)
    assert (row["n"], row["tensors"]) == (400, 2)
    assert (row["fraction_above_1"], row["fraction_above_0_1"]) == (0.25, 1.0)
    assert (row["stack"], row["kind"], row["is_bias"]) == ("decoder", "feed-forward", False)


PUBLISHED = {  # kind, moment, value that the pooled elements of committed models have
    assets.MINILM: ("feed-forward", "excess_kurtosis", 90.9),
    "reference/t5-multi30k-en-de": ("norm", "std", 4.80),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_pooled_moments_are_those_of_the_concatenated_elements(model):
    folder = assets.resolve(model, kind="models")
    state = load_file(folder / "model.safetensors")
    frame = statistics.split_position_biases(statistics.moments(folder))
    by = ["stack", "kind", "is_bias"]
    pooled, names = statistics.by_group(frame, by), frame.groupby(by)["name"].agg(list)
    assert ("position-bias" in set(pooled["kind"])) == ("t5" in model)
    kind, moment, value = PUBLISHED[model]
    assert pooled[pooled["kind"] == kind][moment].round(2 if value < 10 else 1).eq(value).any()
    for _, row in pooled.iterrows():
        x = torch.cat([state[name].flatten() for name in names[tuple(row[by])]]).double().numpy()
        expected = [x.mean(), x.std(), scipy.stats.skew(x), scipy.stats.kurtosis(x)]
        values = row[["mean", "std", "skewness", "excess_kurtosis"]].astype(float)
        assert np.allclose(values, expected, rtol=1e-9, equal_nan=True), row[by].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_names_say_what_the_model_itself_says(family):
    model = tiny(family)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    where = dict(zip(state, families.classify(list(state), list(state.values())), strict=True))
    parts = anatomy(model)
    maps = [(block, one) for blocks in parts.stacks.values() for block in blocks for one in block.linears]
    assert maps
    for block, one in maps:
        place = where[f"{one.name}.weight"]
        assert (place.stack, place.kind, place.role) == (block.stack, one.kind, one.role), one.name
        assert place.block == (0 if family == "albert" else block.index) and not place.is_bias
        assert where.get(f"{one.name}.bias", place).kind == one.kind
    norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    assert norms and all(where[f"{name}.weight"].kind == "norm" for name in norms)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            assert where[f"{name}.weight"].kind == "embedding", name
    head = model.get_output_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is head)
    assert where[f"{name}.weight"].kind == "head"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder.layer.3.attention.output.dense.weight", (8, 8), "encoder attention o False 3"),
        ("encoder.layer.3.output.dense.bias", (8,), "encoder feed-forward out True 3"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.gamma", (8,), "encoder norm LayerNorm False 0"),
        ("decoder.block.1.layer.1.EncDecAttention.v.weight", (8, 8), "decoder cross-attention v False 1"),
        ("transformer.h.11.attn.c_proj.weight", (8, 8), "decoder attention o False 11"),
        ("transformer.h.11.mlp.c_proj.weight", (32, 8), "decoder feed-forward out False 11"),
        ("0.auto_model.encoder.layer.2.intermediate.dense.weight", (8, 8), "encoder feed-forward in False 2"),
        ("model.layers.4.block_sparse_moe.experts.7.w2.weight", (8, 8), "decoder feed-forward out False 4"),
        ("cls.predictions.bias", (99,), "decoder head predictions True None"),
    ],
)
def test_names_of_known_traps(name, shape, expected):
    (place,) = families.classify([name], [shape])
    found = (place.stack, place.kind, place.role, place.is_bias, place.block)
    assert " ".join(map(str, found)) == expected


def test_effective_rank_by_hand():
    assert statistics.effective_rank(np.sqrt([9.0, 0.5, 0.3, 0.2])) == 0.25
    assert statistics.effective_rank(np.sqrt([0.2, 8.9, 0.5, 0.4])) == 0.5
    assert statistics.effective_rank(np.ones(10)) == 0.9
    assert statistics.effective_rank(np.ones(10), energy=1.0) == 1.0
    assert statistics.effective_rank(np.zeros(4)) == 0.0


def test_spectra_are_those_of_the_matrices_and_their_differences(tmp_path):
    draw = torch.Generator().manual_seed(3)
    weights = [torch.randn(12, 20, generator=draw) for _ in range(3)]
    file = tmp_path / "model.safetensors"
    save_file({f"h.{i}.mlp.c_fc.weight": weight for i, weight in enumerate(weights)}, file)
    threads = torch.get_num_threads()
    frame = statistics.spectra(file).set_index(["of", "block"])
    assert torch.get_num_threads() == threads
    mean = sum(weights) / 3
    expected = {("original", i): weight for i, weight in enumerate(weights)}
    expected |= {("consecutive difference", i): weights[i + 1] - weights[i] for i in range(2)}
    expected |= {("difference to the mean", i): weight - mean for i, weight in enumerate(weights)}
    for key, matrix in expected.items():
        reference = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        assert np.allclose(frame.loc[key, "singular_values"], reference, rtol=1e-6)
        assert frame.loc[key, "effective_rank"] == statistics.effective_rank(reference)
    assert len(frame) == len(expected) + 1


def test_a_shared_part_shows_as_lower_rank_of_the_differences(tmp_path):
    draw = torch.Generator().manual_seed(4)
    common, rank_one = torch.randn(30, 30, generator=draw), torch.randn(3, 30, 1, generator=draw)
    file = tmp_path / "model.safetensors"
    save_file({f"h.{i}.mlp.c_fc.weight": common + v @ v.T for i, v in enumerate(rank_one)}, file)
    ranks = statistics.spectra(file).groupby("of")["effective_rank"].max()
    assert ranks["consecutive difference"] <= 2 / 30 < ranks["Gaussian of the same shape"]
    cosines = statistics.similarity(file)
    flat = [(common + v @ v.T).flatten() for v in rank_one]
    for row in cosines.itertuples():
        reference = torch.nn.functional.cosine_similarity(flat[row.block_a], flat[row.block_b], dim=0)
        assert np.isclose(row.cosine, float(reference), rtol=1e-5)
    assert (
        statistics.similarity(file, chunk_bytes=100)["cosine"].round(10).equals(cosines["cosine"].round(10))
    )


def test_series_keep_stacks_roles_and_blocks_apart(tmp_path):
    tiny("t5").save_pretrained(tmp_path)
    frame = statistics.similarity(tmp_path)
    counted = frame.groupby(["stack", "kind", "role"]).size()
    assert (counted == 4).all() and len(counted) == 6 + 10  # q k v o, in out; twice q k v o, in out
    assert statistics.spectra(tmp_path).groupby(["stack", "kind", "role"]).size().eq(2 + 1 + 2 + 1).all()


def test_the_experts_of_a_mixture_are_series_of_their_own(tmp_path):
    names = [
        f"model.layers.{block}.mlp.experts.{expert}.up_proj.weight" for block in (0, 1) for expert in (0, 1)
    ]
    save_file({name: torch.randn(4, 4) for name in names}, tmp_path / "model.safetensors")
    frame = statistics.similarity(tmp_path)
    assert len(frame) == 2 * 4 and set(frame["block_a"]) == {0, 1}
    assert (frame[frame["block_a"] == frame["block_b"]]["cosine"].round(9) == 1).all()


def test_blocks_of_unequal_width_have_spectra_but_no_differences(tmp_path):
    file = write(
        tmp_path, h__0__mlp__c_fc__weight=torch.randn(8, 8), h__1__mlp__c_fc__weight=torch.randn(8, 6)
    )
    assert set(statistics.spectra(file)["of"]) == {"original", "Gaussian of the same shape"}
    assert len(statistics.similarity(file)) == 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "albert"])
def test_a_summary_is_strict_json_and_draws_every_figure(tmp_path, family):
    tiny(family).save_pretrained(tmp_path)
    achieved = json.loads(json.dumps(statistics.summary(tmp_path), allow_nan=False))
    row = {"technique": "weight-statistics", "model": f"org/{family}", "settings": {"energy": 0.9}}
    rows = [row | {"achieved": achieved}, row | {"technique": "dense", "achieved": None}]
    for draw in (plots_weights.fractions, plots_weights.skewness):
        figure = draw([*rows, rows[0]])
        figure.canvas.draw()
        assert figure.axes and figure.axes[0].get_xlabel()
        plt.close(figure)
