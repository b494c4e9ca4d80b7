"""Exported graphs: near the dense model in every family, integers in the file, reloaded from the folder."""

import copy
import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.errors import BadData, BadSetting, NothingTouched, UnknownFamily
from lmcompress.formats import graphs, onnx, openvino
from lmcompress.measure import bytes
from lmcompress.measure.calls import default_shapes
from lmcompress.measure.latency import latency
from lmcompress.measure.memory import peak_memory
from lmcompress.models import storage
from lmcompress.models.anatomy import anatomy, count_parameters
from tests.test_pruning import batches
from tests.test_sweep import house, subject_in  # noqa: F401
from tests.tiny_models import inputs, kind, tiny

for package in ("openvino", "nncf", "onnx", "onnxruntime"):
    pytest.importorskip(package, reason="pip install -e '.[deploy]'")

# Error against the dense model: of bfloat16, and of int8 on weights as wild as these.
FLOAT, EIGHT_BITS = 0.04, 0.45  # without VNNI, sums of two products saturate: 0.38 was seen, else 0.2
CASES = {
    "openvino": ({}, FLOAT, "", 0),
    "openvino-weights": ({"weights": "int8"}, 0.1, "u8", 256),
    "openvino-int4": ({"weights": "int4", "group_size": 16}, 0.6, "u4", 16),
    "openvino-int8": ({}, EIGHT_BITS, "i8", 256),
    "onnxruntime": ({}, 1e-5, "", 0),
    "onnxruntime-int8": ({}, EIGHT_BITS, "int8", 256),
}
DECODER_CASES = ("openvino", "openvino-int8", "onnxruntime-int8")
MODELS = [("bert", "classification"), ("gpt2", "lm")]
GRID = [(*MODELS[0], case) for case in CASES] + [(*MODELS[1], case) for case in DECODER_CASES]


def deployed(model, case, calibration=None, **changes):
    """The model as a graph, and the report."""
    chosen = compress.get({"openvino-weights": "openvino", "openvino-int4": "openvino"}.get(case, case))
    text = batches(anatomy(model).kind) if calibration is None else calibration
    return chosen(model, Context(calibration=text), **(CASES[case][0] | changes))


@torch.no_grad()
def error(ours, dense, given):
    """‖difference‖ / ‖dense‖ over the positions that are not padding."""
    name = "logits" if "logits" in (wanted := dense(**given)) else "last_hidden_state"
    rows = given["attention_mask"].bool() if wanted[name].dim() == 3 else slice(None)
    moved = (ours(**given)[name] - wanted[name])[rows]
    return float(moved.norm() / wanted[name][rows].norm())


@pytest.fixture(scope="module")
def made():
    """Every case on an encoder, and those of a decoder, made once."""
    return {(family, case): deployed(tiny(family, head), case) for family, head, case in GRID}


@pytest.mark.parametrize("family,head,case", GRID)
def test_the_graph_computes_what_the_model_does(made, family, head, case):
    dense, (ours, _) = tiny(family, head), made[family, case]
    others = ({"batch": 1, "length": 1}, {"batch": 2, "length": 17})
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
    buffers = load_file(folder / "model.safetensors")
    graph, packed = (buffers[name].numpy() for name in ("graph", "packed"))
    if "openvino" in case:
        stored = openvino.stored_matrices(graph, packed)
    else:
        stored = onnx.stored_matrices(graph)
    _, _, element, most = CASES[case]
    assert bool(stored) == bool(element) and bytes.file_bytes(folder) >= sum(one.nbytes for one in stored)
    if element:
        assert report.layers == len(stored) >= 10 and element in report.achieved["stored"]
        assert all(one.values <= most for one in stored if one.element == element)
        assert 0.9 < report.achieved["share_quantized"] <= 1 and report.achieved["bits_per_weight"] < 10
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


@pytest.mark.parametrize(
    "family,head,case",
    [("albert", None, "openvino"), ("mistral", "lm", "onnxruntime-int8"), ("gemma3", "lm", "openvino")],
)
def test_other_families_export_too(family, head, case):
    dense = tiny(family, head)
    ours, report = deployed(dense, case)
    assert error(ours, dense, inputs(dense, padded=True, length=17)) < CASES[case][1]
    assert report.achieved["share_quantized"] <= 1


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
        with pytest.raises(UnknownFamily, match="encoder-decoders are not"):
            compress.get(case)(tiny("t5"))
    with pytest.raises(BadSetting, match="group_size"):
        deployed(tiny("bert", "classification"), "openvino", weights="int8", group_size=8)
    with pytest.raises(BadSetting, match="NNCF refuses"):
        deployed(tiny("bert", "classification"), "openvino", weights="int4", group_size=7)
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
    for case in ("openvino-int8", "onnxruntime-int8"):
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
    if name == "openvino-int8":  # one start of torch and the runtime is enough
        peak = peak_memory(house / "kept", kind="encoder", shape=default_shapes("encoder")[0])
        assert peak["peak_bytes"] > peak["baseline_bytes"]


def test_a_model_of_this_kind_can_do_the_original_s_tasks(made):
    from lmcompress.tasks.capabilities import capabilities

    assert capabilities(made["gpt2", "openvino"][0]) == {"language modelling"}
    assert capabilities(made["bert", "openvino"][0]) == capabilities(tiny("bert", "classification"))
    assert isinstance(made["bert", "openvino"][0], graphs.GraphModel)
