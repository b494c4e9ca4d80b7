import errno
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from lmcompress.compress import TechniqueResult
from lmcompress.errors import BadSetting, CorruptCheckpoint, DiskFull, StudyError, UnknownFamily
from lmcompress.measure import bytes
from lmcompress.measure.calls import shape_signature
from lmcompress.measure.memory import memory
from lmcompress.models import loading, storage, surgery
from lmcompress.models.anatomy import anatomy, prunable
from lmcompress.models.packed import quantize, store_as_integers
from tests.tiny_models import CASES, FAMILIES, inputs, kind, tiny


def logits(model: nn.Module, given: dict | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(given or inputs(model)))[0]


def same_after_reload(model: nn.Module, folder) -> nn.Module:
    storage.save(model, folder)
    again, tokenizer = storage.load(folder)
    assert tokenizer is None
    assert not again.training
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    assert len(dict(again.named_parameters())) == len(dict(model.named_parameters()))
    dtypes, before = ({n: t.dtype for n, t in m.state_dict().items()} for m in (again, model))
    assert dtypes == before
    return again


def record(folder) -> dict:
    return json.loads((folder / "compression.json").read_text())


@pytest.mark.parametrize("family, head", CASES)
def test_untouched_models_come_back_and_are_plain_checkpoints(family, head, tmp_path):
    model = tiny(family, head)
    same_after_reload(model, tmp_path / "saved")
    assert record(tmp_path / "saved")["structure"] == {}
    again, notes = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"] and not notes["mismatched_keys"]
    torch.testing.assert_close(logits(again.eval()), logits(model), atol=1e-6, rtol=0)


def cut(model: nn.Module, how: str) -> nn.Module:
    """Cut so that no config can describe the result: other widths by block, other depths by stack."""
    blocks = anatomy(model).blocks
    if how == "heads":
        groups = [b.attention.heads // b.attention.kv_heads for b in blocks]
        counts = [group * (1 + i % 2) for i, group in enumerate(groups)]
        return surgery.keep_heads(model, {b.name: range(n) for b, n in zip(blocks, counts, strict=True)})
    if how == "ffn":
        return surgery.keep_ffn(model, {b.name: list(range(i, 20 + 3 * i)) for i, b in enumerate(blocks)})
    if how == "hidden":
        return surgery.keep_hidden(model, [i for i in range(32) if i % 8 < 6])
    if how == "depth":
        return surgery.drop_blocks(model, {blocks[0].stack: [0]})
    for step in ("heads", "ffn", "depth", "hidden"):
        try:
            model = cut(model, step)
        except (BadSetting, UnknownFamily):  # some families refuse one of them
            continue
    return model


@pytest.mark.parametrize("how", ["heads", "ffn", "hidden", "depth", "everything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_models_come_back(family, how, tmp_path):
    try:
        model = cut(tiny(family), how)
    except (BadSetting, UnknownFamily) as refused:
        pytest.skip(f"slicing refuses: {refused}")
    again = same_after_reload(model, tmp_path / "saved")
    assert shape_signature(again) == shape_signature(model)
    if model.can_generate() and kind(family) != "encoder":
        ids = {"input_ids": inputs(model)["input_ids"][:1], "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(again.generate(**ids), model.generate(**ids))


def test_attributes_that_change_the_forward_come_back(tmp_path):
    """Two heads of 16 instead of four of 8: the same shapes, another function."""
    model = tiny("bert")
    attention = model.bert.encoder.layer[1].attention.self
    before = logits(model)
    attention.num_attention_heads, attention.attention_head_size = np.int64(2), 16
    attention.scaling = 0.1
    assert not torch.allclose(before, logits(model), atol=1e-3)
    same_after_reload(model, tmp_path / "saved")


def test_absent_shared_and_replaced_modules_come_back(tmp_path):
    model = tiny("bert")
    layer = model.bert.encoder.layer
    layer[1] = layer[0]
    model.cls.predictions.transform.transform_act_fn = nn.ReLU()
    layer[0].output.LayerNorm = nn.Identity()
    layer[0].intermediate.dense = nn.Linear(32, 48, bias=False)
    again = same_after_reload(model, tmp_path / "saved")
    assert again.bert.encoder.layer[1] is again.bert.encoder.layer[0]
    assert again.bert.encoder.layer[0].intermediate.dense.bias is None

    model = tiny("llama")
    del model.model.layers[0]
    model.model.layers[0].self_attn.layer_idx = 0
    again = same_after_reload(model, tmp_path / "shorter")
    assert len(again.model.layers) == 1
    assert record(tmp_path / "shorter")["structure"]["absent"] == {"model.layers.1": "deleted"}

    model = tiny("bert", None)
    model.pooler = None
    again = same_after_reload(model, tmp_path / "headless")
    assert again.pooler is None


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "albert", "bert", "gemma2"])
def test_ties_stay_one_parameter_and_cut_ties_stay_cut(family, tmp_path):
    model = tiny(family)
    again = same_after_reload(model, tmp_path / "tied")
    output, table = again.get_output_embeddings(), again.get_input_embeddings()
    assert output.weight is table.weight
    model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach() * 2)
    again = same_after_reload(model, tmp_path / "cut")
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight


@storage.register_module
class Factored(nn.Module):
    """A low-rank layer with a basis that several layers may share, and a packed buffer."""

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, width_in) * 0.1)
        self.up = nn.Linear(rank, width_out)
        self.register_buffer("scale", torch.tensor([3], dtype=torch.int8))
        self.sizes = (width_in, width_out, rank)

    def spec(self) -> dict:
        return {"width_in": self.sizes[0], "width_out": self.sizes[1], "rank": self.sizes[2]}

    @classmethod
    def from_spec(cls, spec: dict) -> "Factored":
        return cls(**spec)

    def forward(self, x):
        return self.up(x @ self.down.T) * self.scale


def test_registered_layers_with_a_shared_basis_come_back(tmp_path):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Factored(32, 48, 5)
    model.model.layers[1].mlp.up_proj.down = model.model.layers[0].mlp.up_proj.down
    again = same_after_reload(model, tmp_path / "saved")
    first, second = (layer.mlp.up_proj for layer in again.model.layers)
    assert first.down is second.down and first.scale.dtype == torch.int8


def packed(model: nn.Module) -> nn.Module:
    """The first linear layer of a BERT and its word table, as 4-bit integers."""
    for weight in (
        model.bert.encoder.layer[0].intermediate.dense.weight,
        model.get_input_embeddings().weight,
    ):
        grid = {"bits": 4, "group_size": 16}
        store_as_integers(model, weight, quantize(weight, **grid), **grid)
    return model


@pytest.mark.parametrize(
    ("model", "module", "old_module"),
    [
        (lambda: packed(tiny("bert")), "lmcompress.models.packed", "helpers.compress.packed_layers"),
        (lambda: cut(tiny("t5"), "heads"), "lmcompress.models.surgery", "helpers.compress.resizing"),
        (lambda: cut(tiny("bloom"), "heads"), "lmcompress.models.surgery", "lmcompress.models.resizing"),
        (lambda: tiny("headwise"), "lmcompress.models.headwise", "helpers.headwise"),
    ],
)
def test_models_saved_under_the_old_names_of_modules_come_back(model, module, old_module, tmp_path):
    model = model()
    storage.save(model, tmp_path)
    file = tmp_path / "compression.json"
    assert f'"{module}:' in file.read_text()
    file.write_text(file.read_text().replace(f'"{module}:', f'"{old_module}:'))
    torch.testing.assert_close(logits(storage.load(tmp_path)[0]), logits(model), atol=0, rtol=0)


def test_unknown_layers_and_unfinished_pruning_are_refused_with_a_remedy(tmp_path):
    class Mystery(nn.Linear):
        pass

    model = tiny("bert")
    model.bert.encoder.layer[0].output.dense = Mystery(48, 32)
    pytest.raises(BadSetting, storage.save, model, tmp_path / "saved").match("register_module")
    model = tiny("bert")
    torch.nn.utils.prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", 0.5)
    pytest.raises(BadSetting, storage.save, model, tmp_path / "saved").match("prune.remove")
    pytest.raises(BadSetting, storage.save, nn.Linear(2, 2), tmp_path / "saved").match("Linear")
    pytest.raises(BadSetting, storage.register_module, Mystery).match("from_spec")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_half_precision_comes_back_bit_for_bit_and_a_cast_on_loading_leaves_rotary_frequencies(
    family, tmp_path
):
    """`model.bfloat16()` also rounds the rotary frequencies, which no checkpoint holds."""
    model = tiny(family).bfloat16()
    assert torch.equal(logits(same_after_reload(model, tmp_path / "saved")), logits(model))
    storage.save(tiny(family), tmp_path / "whole")
    cast, _ = storage.load(tmp_path / "whole", dtype=torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    exact = dict(tiny(family).named_buffers())
    assert all(
        torch.equal(buffer, exact[name]) for name, buffer in cast.named_buffers() if "inv_freq" in name
    )


def test_views_and_transposed_weights_are_saved_compactly(tmp_path):
    model = tiny("llama")
    both = torch.randn(2 * 48, 32)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = nn.Parameter(both[:48]), nn.Parameter(both[48:])
    mlp.down_proj.weight = nn.Parameter(torch.randn(48, 32).t())
    same_after_reload(model, tmp_path / "saved")
    bytes_of_values = sum(p.nbytes for p in model.parameters())
    assert bytes_of_values < bytes.file_bytes(tmp_path / "saved") < bytes_of_values + 10_000


def test_the_card_and_the_record_say_what_was_done(tmp_path):
    report = TechniqueResult("magnitude-layer", 12, {"sparsity": 0.5})
    storage.save(tiny("bert"), tmp_path / "saved", report=report, base_name="org/model")
    assert record(tmp_path / "saved")["report"] == {"layers": 12, "sparsity": 0.5}
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "base_model: org/model" in card and "magnitude-layer" in card and "sparsity: 0.5" in card


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: "{not json",
        lambda r: "[]",
        lambda r: json.dumps({"quantized_by": "another tool"}),
        lambda r: json.dumps(r | {"version": 99}),
        lambda r: json.dumps({k: v for k, v in r.items() if k != "ties"}),
        lambda r: json.dumps(r | {"class": "os:system"}),
        lambda r: json.dumps(r | {"weights": "0" * 16}),
        lambda r: json.dumps(r | {"structure": {"shapes": {"bert.nowhere.weight": [1, 2]}}}),
        lambda r: json.dumps(
            r | {"structure": {"replaced": {"bert.pooler": {"class": "os:system", "spec": {}}}}}
        ),
        lambda r: json.dumps(r | {"buffers": ["bert.embeddings.position_ids"]}),
        lambda r: json.dumps(r | {"structure": []}),
        lambda r: "[" * 100_000,
        lambda r: json.dumps(r | {"weight_files": ["../elsewhere.bin"]}),
        lambda r: json.dumps(r | {"files": "all"}),
        lambda r: json.dumps(r | {"format": ["gguf"]}),
    ],
)
def test_a_damaged_or_foreign_record_is_named(damage, tmp_path):
    storage.save(tiny("bert"), tmp_path / "saved")
    (tmp_path / "saved" / "compression.json").write_text(damage(record(tmp_path / "saved")))
    with pytest.raises(CorruptCheckpoint, match=r"compression\.json|os:system|not the file"):
        storage.load(tmp_path / "saved")


def test_truncated_or_exchanged_weights_are_named(tmp_path):
    storage.save(tiny("bert"), tmp_path / "one")
    storage.save(tiny("bert", seed=1), tmp_path / "two")
    weights = tmp_path / "one" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    pytest.raises(CorruptCheckpoint, storage.load, tmp_path / "one")
    weights.write_bytes((tmp_path / "two" / "model.safetensors").read_bytes())
    pytest.raises(CorruptCheckpoint, storage.load, tmp_path / "one").match("not the file")
    weights.unlink()
    pytest.raises(CorruptCheckpoint, storage.load, tmp_path / "one").match(r"no model\.safetensors")


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFull),
        (SafetensorError("something else"), SafetensorError),
    ],
)
@pytest.mark.parametrize("writer", ["save_file", "write_json"])
def test_what_fails_while_saving_leaves_what_was_there(failure, error, writer, monkeypatch, tmp_path):
    storage.save(tiny("bert"), tmp_path / "saved")
    before = files(tmp_path)
    monkeypatch.setattr(storage, writer, Mock(side_effect=failure))
    for folder in ("saved", "new"):
        with pytest.raises(error, match="intact" if error is DiskFull else "something else"):
            storage.save(tiny("bert", seed=1), tmp_path / folder, replace=True)
    assert files(tmp_path) == before


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_notes(folder):
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put_notes, "holds notes.txt, which saving would delete"),
        (lambda folder: (folder / "compression.json").unlink(), "config.json"),
        (lambda folder: (folder / "compression.json").write_text("{"), "compression.json"),
        (lambda folder: (folder / "compression.json").write_text('{"base": "x"}'), "compression.json"),
        (lambda folder: save_file({"w": torch.ones(1)}, folder / "model.safetensors"), "changed since"),
    ],
)
def test_only_a_saved_model_that_nobody_changed_is_replaced_and_only_when_asked(change, words, tmp_path):
    folder = storage.save(tiny("bert"), tmp_path / "saved")
    pytest.raises(BadSetting, storage.save, tiny("bert", seed=1), folder).match("replace=True")
    link = tmp_path / "link"
    link.symlink_to(folder)
    storage.save(tiny("bert", seed=1), link, replace=True)
    assert link.is_symlink()
    assert torch.equal(logits(storage.load(folder)[0]), logits(tiny("bert", seed=1)))
    change(folder)
    before = files(tmp_path)
    pytest.raises(BadSetting, storage.save, tiny("bert"), folder, replace=True).match(words)
    assert files(tmp_path) == before


def test_a_file_the_source_and_a_circle_are_no_place_for_a_model(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "empty").mkdir()
    folder = storage.save(tiny("bert"), tmp_path / "empty")
    loaded, _ = storage.load(folder)
    (tmp_path / "again").symlink_to(folder)
    before = files(tmp_path)
    for name, words in (
        ("file", "is a file"),
        ("file/below", "cannot write"),
        ("circle", "can be no folder"),
        ("x" * 300, "can be no folder"),
        ("again", "loaded from"),
        ("", "would delete"),
    ):
        pytest.raises(StudyError, storage.save, loaded, tmp_path / name, replace=True).match(words)
    assert files(tmp_path) == before
    tiny("bert").save_pretrained(tmp_path / "plain")
    source = loading.load(tmp_path / "plain").model
    pytest.raises(BadSetting, storage.save, source, tmp_path / "plain", replace=True).match("loaded from")


def test_what_appears_while_saving_is_not_deleted(monkeypatch, tmp_path):
    monkeypatch.setattr(
        storage, "write_json", lambda *_: ((tmp_path / "new").mkdir(), put_notes(tmp_path / "new"))
    )
    pytest.raises(BadSetting, storage.save, tiny("bert"), tmp_path / "new").match(r"notes\.txt")
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["notes.txt"]


def pruned(family: str, sparsity: float, *, dtype=torch.float32) -> nn.Module:
    """Exactly the given fraction of each prunable matrix zeroed, as torch's own pruning does it."""
    model = tiny(family, **({"hidden_size": 64, "intermediate_size": 128} if family == "bert" else {})).to(
        dtype
    )
    for linear in prunable(model):
        torch.nn.utils.prune.random_unstructured(linear.module, "weight", sparsity)
        torch.nn.utils.prune.remove(linear.module, "weight")
    return model


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "albert"])
@given(sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]), half=st.booleans())
@settings(max_examples=8, deadline=None)  # all of them
def test_bytes_are_those_of_real_encodings(family, sparsity, half):
    model = pruned(family, sparsity, dtype=torch.bfloat16 if half else torch.float32)
    sizes = bytes.bytes_by_format(model)
    weights = {id(m.module.weight): m.weight2d().detach() for m in prunable(model)}
    others = [p for p in model.parameters() if id(p) not in weights]
    others += [b for n, b in model.named_buffers() if n in model.state_dict()]
    expected = dict.fromkeys(("dense", "bitmask", "csr_int32", "csr_int64"), sum(t.nbytes for t in others))
    for weight in weights.values():
        csr = weight.float().to_sparse_csr()
        value_bytes = csr.values().numel() * weight.element_size()
        expected["dense"] += weight.nbytes
        expected["bitmask"] += len(np.packbits(weight.float().numpy() != 0)) + value_bytes
        for name, index in (("csr_int32", torch.int32), ("csr_int64", torch.int64)):
            indices = csr.crow_indices().to(index).nbytes + csr.col_indices().to(index).nbytes
            expected[name] += indices + value_bytes
    assert {name: sizes[name] for name in expected} == expected
    raw = [b"", b""]
    for parameter in model.parameters():
        raw[id(parameter) in weights] += parameter.detach().view(torch.uint8).numpy().tobytes()
    compressed = sum(len(zstandard.compress(part, 3)) for part in raw)
    assert sizes["dense_zstd"] == pytest.approx(compressed, rel=0.02, abs=2000)
    assert sparsity != 0.9 or sizes["bitmask_zstd"] < sizes["bitmask"] < sizes["dense"]


def test_a_plain_folder_loads_too_and_tokenizers_come_along(tmp_path):
    model = tiny("bert")
    model.save_pretrained(tmp_path / "plain")
    again, tokenizer = storage.load(tmp_path / "plain")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    assert tokenizer is None
    words = Tokenizer(WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    storage.save(model, tmp_path / "saved", tokenizer=tokenizer)
    tokenizer = storage.load(tmp_path / "saved")[1]
    assert tokenizer.pad_token == "[PAD]" and tokenizer.convert_tokens_to_ids(["b", "a"]) == [2, 1]


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "albert", "factored"])
def test_dense_bytes_are_the_files(family, tmp_path):
    model = tiny("llama" if family == "factored" else family)
    for layer in model.model.layers if family == "factored" else ():  # its inner layers are encoded
        layer.self_attn.q_proj = Factored(32, 32, 4)
    sizes = bytes.bytes_by_format(model)
    storage.save(model, tmp_path / family)
    assert 0 < bytes.file_bytes(tmp_path / family) - sizes["dense"] < 20_000
    assert memory(model, None)["parameters"] == sum(p.numel() for p in model.parameters())
