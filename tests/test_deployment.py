"""Exported graphs: near the dense model in every family, integers in the file, reloaded from the folder."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmcompress import compress, formats
from lmcompress.compress import Context
from lmcompress.errors import BadData, BadSetting, CorruptCheckpoint, NothingTouched, UnknownFamily
from lmcompress.formats import graphs, tracing
from lmcompress.measure import bytes
from lmcompress.measure.calls import default_shapes
from lmcompress.measure.latency import latency
from lmcompress.measure.memory import peak_memory
from lmcompress.models import assets, storage
from lmcompress.models.anatomy import anatomy, count_parameters
from lmcompress.models.packed import Packed
from tests.test_pruning import batches
from tests.test_sweep import house, subject_in  # noqa: F401
from tests.tiny_models import inputs, kind
from tests.tiny_models import tiny as any_tiny

for package in ("openvino", "nncf", "onnx", "onnxruntime"):
    pytest.importorskip(package, reason="pip install -e '.[deploy]'")

# Error against the dense model: of bfloat16, and of int8 on weights as wild as these.
FLOAT, EIGHT_BITS = (
    0.04,
    0.7,
)  # without VNNI sums of two products saturate: 0.62 was seen with AVX2 alone, else 0.2
CASES = {
    "openvino": ({}, FLOAT, "", 0),
    "openvino-weights": ({"weights": "int8"}, 0.1, "u8", 256),
    "openvino-int4": ({"weights": "int4", "group_size": 16}, 0.6, "u4", 16),
    "openvino-int8": ({}, EIGHT_BITS, "i8", 256),
    "onnxruntime": ({}, 1e-5, "", 0),
    "onnxruntime-int8": ({}, EIGHT_BITS, "int8", 256),
}
DECODER_CASES = ("openvino", "openvino-int8", "onnxruntime", "onnxruntime-int8")
PAIR_CASES = ("openvino", "onnxruntime", "onnxruntime-int8")
MODELS = [("bert", "classification"), ("gpt2", "lm"), ("t5", "lm")]
GRID = [(*model, case) for model, cases in zip(MODELS, (CASES, DECODER_CASES, PAIR_CASES)) for case in cases]
DEPTHS = {"bert": ["num_hidden_layers"], "gpt2": ["n_layer"], "t5": ["num_layers", "num_decoder_layers"]}


def tiny(family, head="lm"):
    """A model of one block: converting it takes seconds."""
    return any_tiny(family, head, **dict.fromkeys(DEPTHS[family], 1))


def deployed(model, case, calibration=None, **changes):
    """The model as a graph, and the report."""
    chosen = compress.get({"openvino-weights": "openvino", "openvino-int4": "openvino"}.get(case, case))
    text = batches(anatomy(model).kind) if calibration is None else calibration
    return chosen(model, Context(calibration=text), **(CASES[case][0] | changes))


@torch.no_grad()
def error(ours, dense, given):
    """‖difference‖ / ‖dense‖ over the positions that are not padding."""
    name = "logits" if "logits" in (wanted := dense(**given)) else "last_hidden_state"
    mask = given["attention_mask"].bool()
    rows = mask if wanted[name].shape[:2] == mask.shape else slice(None)
    moved = (ours(**given)[name] - wanted[name])[rows]
    return float(moved.norm() / wanted[name][rows].norm())


@pytest.fixture(scope="module")
def made():
    """Every case on an encoder, and those of a decoder, made once."""
    return {(family, case): deployed(tiny(family, head), case) for family, head, case in GRID}


@pytest.mark.parametrize("family,head,case", GRID)
def test_the_graph_computes_what_the_model_does(made, family, head, case):
    dense, (ours, _) = tiny(family, head), made[family, case]
    others = ({"batch": 1, "length": 3 if family == "t5" else 1}, {"batch": 2, "length": 17})
    for shape in ({"batch": 3, "length": 9}, *(others if CASES[case][1] <= FLOAT else ())):
        assert error(ours, dense, inputs(dense, padded=shape["batch"] > 1, **shape)) < CASES[case][1]


@pytest.mark.parametrize("family,head,case", GRID)
def test_the_folder_alone_gives_the_same_output_and_holds_the_integers(made, tmp_path, family, head, case):
    dense, (ours, report) = tiny(family, head), made[family, case]
    folder = storage.save(ours, tmp_path / "m", report=report)
    again, _ = storage.load(folder)
    given = inputs(dense, padded=True)
    with torch.no_grad():
        assert torch.equal(again(**given).logits, ours(**given).logits)
    assert not list(tmp_path.rglob("*.pkl")) and json.loads((folder / "config.json").read_text())
    assert storage.check_target(folder, replace=True) == folder.resolve()
    stems = [tracing.ENCODER, tracing.DECODER] if family == "t5" else [tracing.MODEL]
    files = [folder / ours.runtime().file_names(stem)[0] for stem in stems]
    assert all(file.is_file() for file in files) and not list(folder.glob("*.safetensors"))
    stored = [matrix for file in files for matrix in ours.runtime().stored_matrices(file)]
    _, _, element, most = CASES[case]
    assert bool(stored) == bool(element) and bytes.file_bytes(folder) >= sum(one.nbytes for one in stored)
    if element:
        assert report.layers == len(stored) >= 6 and element in report.achieved["stored"]
        assert all(one.values <= most for one in stored if one.element == element)
        assert 0.9 < report.achieved["share_quantized"] <= 1 and report.achieved["bits_per_weight"] < 12
    assert count_parameters(again) == count_parameters(dense)


@pytest.mark.parametrize("case", DECODER_CASES)
@torch.no_grad()
def test_a_decoder_goes_on_from_its_keys_and_values_and_a_copy_of_them_is_apart(made, case):
    dense, (ours, _) = tiny("gpt2"), made["gpt2", case]
    ids = inputs(dense)["input_ids"]
    past, other = (model(input_ids=ids, use_cache=True).past_key_values for model in (ours, dense))
    kept = copy.deepcopy(past)
    for step in range(3):
        token = ids[:, step, None]
        found, wanted = ours(token, past_key_values=past, use_cache=True), dense(token, past_key_values=other)
        past, other = found.past_key_values, wanted.past_key_values
        assert (found.logits - wanted.logits).norm() / wanted.logits.norm() < CASES[case][1]
    first = ours(ids[:, :1], past_key_values=kept, use_cache=False).logits
    again = ours(ids[:, :1], past_key_values=kept, use_cache=True)
    assert (past.length, again.past_key_values.length) == (12, 10) and torch.equal(first, again.logits)


@pytest.mark.parametrize(  # integers are of the same graph: once is enough
    "family,head,case", [entry for entry in GRID if entry[0] == "t5" or CASES[entry[2]][1] <= FLOAT]
)
def test_the_runtime_alone_gives_the_same_logits(made, tmp_path, family, head, case):
    ours = made[family, case][0]
    given = inputs(tiny(family, head))
    with torch.no_grad():
        expected = ours(**given).logits.numpy()
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    if family == "gpt2":
        arrays["position_ids"] = np.tile(np.arange(9), (3, 1))
    if family == "bert":
        arrays["token_type_ids"] = np.zeros((3, 9), dtype=np.int64)
    logits = run_alone(storage.save(ours, tmp_path / "m"), tmp_path, **arrays)
    # A decoder's come out of two calls, whose sums have other orders (in bfloat16 for OpenVINO).
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def run_alone(folder, scratch, **arrays):
    """Logits of `read_graphs`, in a process that knows neither this project nor torch."""
    np.savez(scratch / "given.npz", **arrays)
    script = Path(__file__).with_name("read_graphs.py")
    command = [sys.executable, script, folder, scratch / "given.npz", scratch / "found.npz"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    return np.load(scratch / "found.npz")["logits"]


@pytest.mark.parametrize("case", ["openvino", "onnxruntime"])
@torch.no_grad()
def test_an_encoder_decoder_writes_and_scores_what_the_dense_one_does(made, case):
    dense, (ours, _) = tiny("t5"), made["t5", case]
    given = inputs(dense, padded=True)
    del given["decoder_input_ids"]
    for beams in (1, 3) if case == "onnxruntime" else (1,):  # bfloat16 may prefer another of two like beams
        settings = {"num_beams": beams, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
        assert torch.equal(ours.generate(**given, **settings), dense.generate(**given, **settings))
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    logits, expected = (model(**given, labels=labels).logits for model in (ours, dense))
    assert float((logits - expected).norm() / expected.norm()) < CASES[case][1]


@torch.no_grad()
def test_padding_on_the_left_and_beams_change_nothing(made):
    dense, (ours, _) = tiny("gpt2"), made["gpt2", "onnxruntime"]
    given = inputs(dense)
    given["attention_mask"][1, :3] = 0
    for beams in (1, 3):
        settings = {"num_beams": beams, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
        assert torch.equal(ours.generate(**given, **settings), dense.generate(**given, **settings))


@pytest.mark.parametrize("case", ["openvino", "onnxruntime"])
def test_a_folder_saved_when_tensors_held_the_graph_still_loads(made, tmp_path, case):
    ours, _ = made["bert", case]
    folder = storage.save(ours, tmp_path / "m")
    record = json.loads((folder / "compression.json").read_text())
    contents = [(folder / name).read_bytes() for name in record.pop("weight_files")]
    tensors = {"empty": torch.empty(0)}
    for name, content in zip(("graph", "packed"), [*contents, b"\0"]):
        tensors[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    attributes = record["structure"]["attributes"][""]
    del attributes["files"]
    attributes["library"] = {"openvino": "openvino_graphs", "onnxruntime": "onnxruntime_graphs"}[case]
    record["structure"]["shapes"] = {name: list(tensors[name].shape) for name in ("graph", "packed")}
    record["class"] = "helpers.compress.graphs:GraphModel"
    record["weights"] = assets.file_hash(folder / "model.safetensors")
    (folder / "compression.json").write_text(json.dumps(record))
    again, _ = storage.load(folder)
    given = inputs(tiny("bert", "classification"))
    with torch.no_grad():
        assert torch.equal(again(**given).logits, ours(**given).logits)
    assert set(storage.save(again, tmp_path / "new").iterdir()) > {
        tmp_path / "new" / n for n, _ in ours.files
    }


def test_files_that_were_changed_or_are_gone_are_named(made, tmp_path):
    folder = storage.save(made["bert", "openvino"][0], tmp_path / "m")
    loaded, _ = storage.load(folder)
    weights = folder / "openvino_model.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    pytest.raises(CorruptCheckpoint, storage.load, folder).match(r"openvino_model\.bin")
    pytest.raises(BadSetting, storage.check_target, folder, replace=True).match("changed")
    weights.unlink()
    pytest.raises(CorruptCheckpoint, storage.load, folder).match(r"no openvino_model\.bin")
    (folder / "openvino_model.xml").unlink()
    pytest.raises(CorruptCheckpoint, loaded, torch.ones(1, 2).long()).match("is gone")


@pytest.mark.parametrize(
    "family,head,case",
    [("albert", None, "openvino"), ("mistral", "lm", "onnxruntime-int8"), ("gemma3", "lm", "openvino")],
)
def test_other_families_export_too(family, head, case):
    dense = any_tiny(family, head)
    ours, report = deployed(dense, case)
    assert error(ours, dense, inputs(dense, padded=True, length=17)) < CASES[case][1]
    assert report.achieved["share_quantized"] <= 1


CANDIDATES = [  # technique, settings, element, bits that a weight takes at most
    ("openvino", {"weights": "int4", "group_size": 16, "all_layers": True}, "u4", 6.5),
    ("openvino-int4", {"method": "scale_estimation", "group_size": 16}, "u4", 6.5),
    ("openvino-int4", {"method": "gptq", "group_size": 16}, "u4", 6.5),
    ("onnxruntime", {"weights": "int4", "group_size": 16}, "uint4", 6.6),
    ("onnxruntime", {"weights": "int8", "group_size": 32}, "uint8", 10),
    ("onnxruntime-dynamic", {}, "int8", 9.5),
]


@pytest.mark.parametrize("name,settings,element,bits", CANDIDATES)
def test_every_way_to_fewer_bits_is_near_the_model_and_in_the_file(name, settings, element, bits, tmp_path):
    dense = tiny("bert", "classification")
    ours, result = compress.get(name)(dense, Context(calibration=batches("encoder")), **settings)
    loaded, _ = storage.load(storage.save(ours, tmp_path / "m", report=result))
    given = inputs(dense, padded=True)
    assert error(loaded, dense, given) < (0.6 if bits < 7 else EIGHT_BITS)
    stored = result.achieved["stored"]
    assert result.achieved["bits_per_weight"] < bits and result.achieved["share_quantized"] > 0.9
    assert stored[element]["most_distinct_values"] <= (16 if element.endswith("4") else 256)
    if bits < 7:  # token tables and the head, too
        assert set(stored) == {element}


@pytest.mark.parametrize(
    "family,head,name,settings,tolerance",
    [
        ("bert", "classification", "rtn", {"bits": 4, "group_size": 16, "embeddings": True}, 0.05),
        ("gpt2", "lm", "rtn", {"bits": 8}, 0.06),
        ("llama", "lm", "awq", {"bits": 4, "group_size": 16}, 0.05),
        ("bert", "classification", "low-rank", {"rank": 8}, FLOAT),
    ],
)
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_what_torch_compressed_goes_to_the_runtimes_integer_by_integer(
    family, head, name, settings, tolerance, format, tmp_path
):
    dense = any_tiny(family, head, **({} if family == "llama" else dict.fromkeys(DEPTHS[family], 1)))
    compressed, result = compress.get(name)(
        dense, Context(calibration=batches(anatomy(dense).kind)), **settings
    )
    assert formats.refusal(compressed, format) is None
    folder = formats.save(compressed, tmp_path / "m", format=format, report=result)
    loaded, _ = formats.load(folder)
    assert error(loaded, compressed, inputs(compressed, padded=True, length=17)) < tolerance
    stored = [m for file, _ in loaded.files[:1] for m in loaded.runtime().stored_matrices(folder / file)]
    layers = [layer for layer in compressed.modules() if isinstance(layer, Packed)]
    assert len(stored) == len({id(layer) for layer in layers})
    assert all(matrix.element.endswith(str(settings["bits"])) for matrix in stored)
    assert sum(matrix.weights for matrix in stored) == sum(layer.weight_count for layer in layers)


@pytest.mark.parametrize("format,case", [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_weights_of_16_bits_stay_so_in_the_file(made, format, case, tmp_path):
    dense = tiny("bert", "classification").bfloat16()
    loaded, _ = formats.load(formats.save(dense, tmp_path / "m", format=format))
    assert error(loaded, dense, inputs(dense, padded=True)) < FLOAT
    size, whole = (model.files[-1][1] for model in (loaded, made["bert", case][0]))
    assert whole - size > 0.4 * 4 * count_parameters(dense)


def test_weights_too_large_for_an_onnx_file_lie_beside_it(monkeypatch, tmp_path):
    dense = tiny("bert", "classification")
    monkeypatch.setattr("lmcompress.formats.onnx.LARGEST", 1000)
    folder = formats.save(dense, tmp_path / "m", format="onnx")
    assert (folder / "model.onnx.data").stat().st_size > 3 * count_parameters(dense)
    loaded, _ = formats.load(folder)
    assert bytes.file_bytes(folder) == sum(size for _, size in loaded.files)
    assert error(loaded, dense, inputs(dense)) < CASES["onnxruntime"][1]


def test_what_a_graph_cannot_hold_is_refused_with_a_sentence(made):
    dense = tiny("bert", "classification")
    for name, settings, words in (
        ("nf4", {}, "NF4"),
        ("rtn", {"bits": 3}, "3 bits"),
        ("rtn", {"bits": 4, "group_size": 8}, "groups of 8"),
    ):
        assert words in formats.refusal(compress.get(name)(dense, **settings)[0], "onnx")
    assert "is a graph of openvino already" in formats.refusal(made["bert", "openvino"][0], "onnx")
    assert formats.refusal(made["bert", "openvino"][0], "openvino") is None
    assert "language-model head" in formats.refusal(tiny("t5", None), "openvino")


@pytest.mark.parametrize("family,precision", [("llama", "f32"), ("gpt2", "bf16")])
def test_a_gated_network_on_one_thread_runs_in_float32(family, precision):
    """In bfloat16 with AMX it would end this process; what has no gate runs in the plugin's choice."""
    import openvino

    graph, report = compress.get("openvino")(any_tiny(family, "lm"))
    capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert torch.get_num_threads() == 1 and torch.isfinite(graph(**inputs(graph)).logits).all()
    assert report.achieved["backend"].endswith(precision if "BF16" in capable else "f32")


def test_integers_on_paper_only_are_refused(monkeypatch):
    import nncf
    from onnxruntime import quantization

    monkeypatch.setattr(nncf, "quantize", lambda graph, *a, **k: graph)
    monkeypatch.setattr(nncf, "compress_weights", lambda graph, **k: graph)
    nothing = lambda before, after, *a, **k: after.write_bytes(before.read_bytes())  # noqa: E731
    monkeypatch.setattr(quantization, "quantize_static", nothing)
    for case in ("openvino-weights", "openvino-int8", "onnxruntime-int8"):
        pytest.raises(NothingTouched, deployed, tiny("bert", "classification"), case)


def test_what_cannot_be_done_is_said_in_a_sentence(made, monkeypatch):
    for case in ("openvino", "onnxruntime"):
        with pytest.raises(UnknownFamily, match="encoder-decoders with a language-model head"):
            compress.get(case)(tiny("t5", None))
    with pytest.raises(BadSetting, match="group_size"):
        deployed(tiny("bert", "classification"), "openvino", weights="int8", group_size=8)
    with pytest.raises(BadSetting, match="NNCF refuses"):
        deployed(tiny("bert", "classification"), "openvino", weights="int4", group_size=7)
    with pytest.raises(BadSetting, match="no power of two"):
        compress.get("onnxruntime")(tiny("bert", "classification"), weights="int4", group_size=24)
    with pytest.raises(BadSetting, match="takes no group_size"):
        compress.get("onnxruntime")(tiny("bert", "classification"), group_size=32)
    for case in ("openvino-int8", "onnxruntime-int8"):
        with pytest.raises(BadData, match="calibration"):
            deployed(tiny("bert", "classification"), case, calibration=[])
    pytest.raises(BadSetting, made["bert", "openvino"][0].train).match("train the model first")
    cases = {"nncf": "openvino-int8", "openvino": "openvino", "onnxruntime": "onnxruntime"}
    for package, case in cases.items():
        monkeypatch.setitem(sys.modules, package, None)
        pytest.raises(BadSetting, deployed, tiny("bert", "classification"), case).match("pip install")


def test_a_conversion_that_fails_leaves_the_processs_logging_alone(monkeypatch):
    def fails(*_, **__):
        logging.getLogger().setLevel(logging.CRITICAL)
        raise RuntimeError("no such operation")

    monkeypatch.setattr("openvino.convert_model", fails)
    level = logging.getLogger().level
    with pytest.raises(RuntimeError, match="no such operation"):
        deployed(tiny("bert", "classification"), "openvino")
    assert logging.getLogger().level == level


def test_as_many_threads_as_torch_and_nothing_is_sent_anywhere(made):
    assert sys.modules["openvino_telemetry"] is None
    ours = made["bert", "openvino"][0]
    given, before = inputs(tiny("bert", "classification")), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours(**given)
            assert ours._threads == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family,head", MODELS)
def test_every_shape_is_timed_beside_the_dense_model(made, family, head):
    dense = tiny(family, head)
    for case in ("openvino", "onnxruntime-int8"):
        shapes = default_shapes(kind(family), length=8)
        found = latency(dense, made[family, case][0], kind=kind(family), shapes=shapes, calls=2)
        assert all(one["ratio"] > 0 for one in found["shapes"].values())


@pytest.mark.parametrize("name", ["openvino-int8", "onnxruntime-int8"])
def test_a_row_from_end_to_end_claims_nothing_that_was_not_seen(house, name):  # noqa: F811
    subject = subject_in(house)
    row = subject.measure(name, keep=house / "kept")
    assert row["compute"] is None and row["memory"]["nonzero_parameters"] is None
    assert row["memory"]["parameters"] == subject.dense["memory"]["parameters"]
    assert row["latency"]["shapes"]["batch8"]["ratio"] > 0 and row["achieved"]["layers"] > 0
    assert abs(row["quality"]["difference"]["value"]) < 0.2
    loaded, tokenizer = storage.load(house / "kept")
    text = "returns the number of rows"
    logits = run_alone(house / "kept", house, text=np.array(text))
    with torch.no_grad():
        expected = loaded(**tokenizer(text, return_tensors="pt")).logits.numpy()
    np.testing.assert_array_equal(logits, expected)
    if name == "openvino-int8":  # one start of torch and the runtime is enough
        peak = peak_memory(house / "kept", kind="encoder", shape=default_shapes("encoder")[0])
        assert peak["peak_bytes"] > peak["baseline_bytes"]


def test_a_model_of_this_kind_can_do_the_original_s_tasks(made):
    from lmcompress.tasks.capabilities import capabilities

    for family, head in MODELS:
        assert capabilities(made[family, "openvino"][0]) == capabilities(tiny(family, head)) != set()
    assert isinstance(made["bert", "openvino"][0], graphs.GraphModel)
