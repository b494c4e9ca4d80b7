import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, kind, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lmcompress.errors import (
    AssetNotFound,
    BadSetting,
    BadWeights,
    CorruptCheckpoint,
    UnknownFamily,
    UnsafeCheckpoint,
    WrongTask,
)
from lmcompress.models import loading

QUANTIZED = ("gptq", "awq", "bitsandbytes", "hqq", "torchao", "quanto", "compressed-tensors", "fp8")


def saved(folder: Path, family="gpt2", head="lm", **changes):
    model = tiny(family, head, **changes)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def set_fields(folder: Path, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_as_it_was_saved(tmp_path, family):
    model = saved(tmp_path, family)
    loaded = loading.load(tmp_path)
    assert type(loaded.model) is type(model) and same_state(loaded.model, model)
    assert (loaded.kind, loaded.family) == (kind(family), model.config.model_type)
    assert not loaded.model.training and loaded.path == tmp_path and loaded.tokenizer is None


def test_a_headless_decoder_becomes_a_language_model_only_if_its_head_is_tied(tmp_path):
    saved(tmp_path / "tied", "gpt2", None)
    assert type(loading.load(tmp_path / "tied").model).__name__ == "GPT2LMHeadModel"
    saved(tmp_path / "untied", "llama", None)
    pytest.raises(WrongTask, loading.load, tmp_path / "untied").match(r"lm_head\.weight would be random")


def test_a_new_classification_head_is_asked_for_sized_and_reproducible(tmp_path):
    saved(tmp_path, "bert")
    before = torch.random.get_rng_state()
    one, other = (loading.load(tmp_path, head="classification", num_labels=5).model for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.classifier.out_features == 5 and same_state(one, other)
    regression = loading.load(tmp_path, head="regression").model
    assert regression.classifier.out_features == 1 and regression.config.problem_type == "regression"


def test_a_trained_head_is_kept_and_another_size_is_a_fresh_one(tmp_path):
    model = saved(tmp_path, "bert", "classification", num_labels=3)
    assert same_state(loading.load(tmp_path).model, model)
    assert same_state(loading.load(tmp_path, head="classification").model, model)
    assert loading.load(tmp_path, head="classification", num_labels=4).model.classifier.out_features == 4


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"head": "lm"}, WrongTask, "bidirectional"),
        ({"head": "parsing"}, BadSetting, "classification, regression, lm"),
        ({"num_labels": 3}, BadSetting, "head='classification'"),
        ({"head": "regression", "num_labels": 3}, BadSetting, "num_labels=3"),
    ],
)
def test_what_makes_no_sense_for_an_encoder_is_an_error(tmp_path, settings, error, words):
    saved(tmp_path, "bert")
    pytest.raises(error, loading.load, tmp_path, **settings).match(words)


def test_half_precision_files_load_as_fp32_and_in_any_dtype_asked_for(tmp_path):
    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = loading.load(tmp_path)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight.float())
    assert loaded.dtype == torch.bfloat16
    assert loaded.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    half = loading.load(tmp_path, dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


WEIGHT = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda tensors: tensors.pop(WEIGHT), CorruptCheckpoint, r"h\.1\.mlp\.c_fc\.weight.*random"),
        (lambda tensors: tensors.update({WEIGHT: torch.zeros(3)}), CorruptCheckpoint, r"h\.1\.mlp\.c_fc"),
        (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].int()}), BadWeights, r"integers: .*c_fc"),
        (
            lambda tensors: tensors.update({"transformer.extra": torch.zeros(3)}),
            CorruptCheckpoint,
            "no.*extra",
        ),
        (
            lambda tensors: tensors.update({"head.weight": torch.zeros(3)}),
            CorruptCheckpoint,
            "no place.*head",
        ),
        (lambda tensors: tensors[WEIGHT][3].fill_(float("nan")), BadWeights, r"1 tensors .*h\.1\.mlp\.c_fc"),
        (lambda tensors: tensors[WEIGHT][3].fill_(float("-inf")), BadWeights, r"1 tensors .*h\.1\.mlp\.c_fc"),
    ],
)
def test_tensors_that_the_model_lacks_or_has_no_place_for_are_named(tmp_path, change, error, words):
    saved(tmp_path)
    edit(tmp_path, change)
    pytest.raises(error, loading.load, tmp_path).match(words)


@pytest.mark.parametrize(
    ("family", "changes", "head", "fields", "words"),
    [
        ("llama", {"attention_bias": True}, "lm", {"attention_bias": False}, "8 tensors.*k_proj.bias"),
        ("llama", {"num_hidden_layers": 3}, "lm", {"num_hidden_layers": 2}, r"9 tensors.*layers\.2\."),
        ("bert", {}, None, {"num_hidden_layers": 1}, r"16 tensors.*encoder\.layer\.1\."),
        ("bert", {}, "classification", {"num_hidden_layers": 1}, r"16 tensors.*encoder\.layer\.1\."),
        (
            "t5",
            {},
            "lm",
            {"num_layers": 1, "architectures": ["T5EncoderModel"]},
            r"8 tensors.*encoder\.block\.1",
        ),
    ],
)
@pytest.mark.parametrize("asked", [None, "classification"])
def test_a_config_that_calls_for_less_than_the_file_holds_is_refused(
    tmp_path, family, changes, head, fields, words, asked
):
    saved(tmp_path, family, head, **changes)
    set_fields(tmp_path, **fields)
    pytest.raises(CorruptCheckpoint, loading.load, tmp_path, head=asked).match(words)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("bert", {"bert.pooler.dense.weight": (32, 32), "cls.seq_relationship.weight": (2, 32)}),
        ("roberta", {"roberta.embeddings.position_ids": (1, 66)}),
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": ()}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
    ],
)
def test_known_buffers_and_heads_of_pretraining_may_be_left_out(tmp_path, family, extra):
    model = saved(tmp_path, family)
    edit(
        tmp_path, lambda tensors: tensors.update({name: torch.zeros(shape) for name, shape in extra.items()})
    )
    assert same_state(loading.load(tmp_path).model, model)


@pytest.mark.parametrize(
    ("fields", "file", "words"),
    [
        *(
            ({"quantization_config": {"quant_method": method}}, None, rf"already \({method}\)")
            for method in QUANTIZED
        ),
        ({"quantization_config": {"load_in_8bit": True}}, None, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, None, "compressed-tensors"),
        ({}, "quantize_config.json", "quantize_config"),
    ],
)
def test_a_checkpoint_that_is_quantized_already_is_refused_by_name(tmp_path, fields, file, words):
    saved(tmp_path)
    set_fields(tmp_path, **fields)
    if file:
        (tmp_path / file).write_text("{}")
    pytest.raises(BadWeights, loading.load, tmp_path).match(rf"{words}.*dequantize")


def test_an_adapter_is_never_merged_unseen(tmp_path):
    saved(tmp_path, "llama")
    adapter = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for call in (loading.load, loading.identity):
        pytest.raises(BadSetting, call, tmp_path).match(r"'org/base'.*merge_and_unload")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").unlink()
    pytest.raises(BadSetting, loading.load, tmp_path).match("merge_and_unload")


def test_the_identity_is_of_the_files_that_are_loaded(tmp_path):
    model = saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    before = loading.identity(tmp_path)
    assert loading.load(tmp_path).hash == before
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert loading.identity(tmp_path) == before
    torch.save(tiny("llama", seed=1).state_dict(), tmp_path / "pytorch_model.bin")
    assert loading.identity(tmp_path) != before


class _Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_bin_weights_load_and_those_that_carry_code_are_refused(tmp_path, capsys):
    model = saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same_state(loading.load(tmp_path).model, model)
    torch.save(model.state_dict() | {"x": _Evil()}, tmp_path / "pytorch_model.bin")
    pytest.raises(UnsafeCheckpoint, loading.load, tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_an_architecture_that_needs_its_own_code_is_refused(tmp_path):
    saved(tmp_path)
    set_fields(tmp_path, model_type="my_net", auto_map={"AutoConfig": "code.Config"})
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    pytest.raises(UnknownFamily, loading.load, tmp_path).match("'my_net'")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", CorruptCheckpoint),
        ("[]", CorruptCheckpoint),
        ("[" * 100_000, CorruptCheckpoint),
        (None, AssetNotFound),
        ('{"model_type": "llama", "hidden_size": "big"}', CorruptCheckpoint),
        ('{"model_type": "llama", "transformers_weights": "x.safetensors"}', BadSetting),
    ],
)
def test_a_config_that_is_broken_or_missing_is_named(tmp_path, text, error):
    saved(tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    pytest.raises(error, loading.load, tmp_path).match(r"config\.json")


def test_what_is_no_folder_or_more_than_memory_is_refused_at_once(tmp_path):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    pytest.raises(BadSetting, loading.load, file).match(f"no folder.*{tmp_path}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, file.stat().st_size + 2**40)  # sparse: takes no space
    pytest.raises(BadSetting, loading.load, tmp_path).match(r"1099\.5 GB")
    file.unlink()


@pytest.fixture
def partial(tmp_path):
    """A bare encoder, and a classifier fine-tuned from it that holds its last block and head alone."""
    saved(tmp_path / "base", "bert", None)
    base = loading.load(tmp_path / "base", head="classification", num_labels=3).model
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    changed = {}
    for name, tensor in tuned.state_dict().items():
        if "layer.1." in name or "classifier" in name or "pooler" in name:
            tensor.add_(0.5)
            changed[name] = tensor.bfloat16().contiguous()
            tensor.copy_(changed[name])
    folder = tmp_path / "tuned"
    tuned.config.architectures = ["BertForSequenceClassification"]
    tuned.config.save_pretrained(folder)
    (folder / "compression.json").write_text(json.dumps({"base": str(tmp_path / "base")}))
    save_file(changed, folder / "model.safetensors")
    return folder, tuned, base


def test_a_partial_checkpoint_is_its_base_with_its_own_tensors(partial):
    folder, tuned, base = partial
    loaded = loading.load(folder)
    assert same_state(loaded.model, tuned) and not same_state(loaded.model, base)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    model = loading.load(folder, head="classification", num_labels=7).model
    assert model.classifier.out_features == 7 and same_state(model.bert, tuned.bert)
    wrong = {"classifier.weight": torch.ones(7, 7), "extra": torch.ones(1)}
    edit(folder, lambda tensors: tensors.update(wrong))
    message = r"2 tensors .*classifier\.weight \[7, 7\], extra \[1\]"
    pytest.raises(CorruptCheckpoint, loading.load, folder).match(message)


def test_a_partial_checkpoints_hash_follows_its_base(partial):
    folder, *_ = partial
    before = loading.load(folder).hash
    assert loading.identity(folder) == before != loading.identity(folder.parent / "base")
    edit(folder.parent / "base", lambda tensors: next(iter(tensors.values())).add_(1))
    assert loading.load(folder).hash != before


def test_a_compressed_folder_points_to_what_loads_it(tmp_path):
    saved(tmp_path)
    (tmp_path / "compression.json").write_text('{"version": 1}')
    pytest.raises(BadSetting, loading.load, tmp_path).match(r"lmcompress\.models\.storage\.load")


def test_the_hash_is_of_weights_and_config_alone(tmp_path):
    saved(tmp_path)
    first = loading.load(tmp_path).hash
    (tmp_path / "README.md").write_text("changed")
    assert loading.load(tmp_path).hash == first
    edit(tmp_path, lambda tensors: tensors["transformer.wpe.weight"].add_(1e-3))
    assert loading.load(tmp_path).hash != first


def words(count: int, **special) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(count)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")), **special
    )


def test_a_tokenizer_without_padding_gets_a_token_that_has_a_row(tmp_path):
    saved(tmp_path, "llama", pad_token_id=None)
    for tokenizer, pad in ((words(100, eos_token="w2"), 2), (words(100, unk_token="w3"), 3), (words(9), 0)):
        tokenizer.save_pretrained(tmp_path)
        loaded = loading.load(tmp_path)
        assert (loaded.tokenizer.pad_token_id, loaded.model.config.pad_token_id) == (pad, pad)
    tokenizer = words(100, eos_token="w2")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # row 100 of 100
    tokenizer.save_pretrained(tmp_path)
    assert loading.load(tmp_path).tokenizer.pad_token_id == 2
    (tmp_path / "empty").mkdir()
    pytest.raises(AssetNotFound, loading.tokenizer_of, tmp_path / "empty").match(r"tokenizer\.json")


@pytest.mark.parametrize("pad", [-1, 5])
def test_a_decoders_classifier_reads_the_last_token_whatever_its_config_calls_padding(tmp_path, pad):
    saved(tmp_path, "llama", "classification", pad_token_id=pad)
    words(100, pad_token="w7").save_pretrained(tmp_path)
    model = loading.load(tmp_path).model
    alone, batch = torch.tensor([[9, 4, 5]]), torch.tensor([[9, 4, 5, 7, 7], [8, 8, 8, 8, 8]])
    with torch.no_grad():
        logits = model(input_ids=batch, attention_mask=batch != 7).logits[:1]
        torch.testing.assert_close(logits, model(input_ids=alone).logits)


def test_tokens_without_a_row_are_refused_unless_no_text_becomes_them(tmp_path):
    saved(tmp_path)
    words(102).save_pretrained(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"2 tokens.*100 rows.*w100, w101.*resize_token_embeddings"):
        loading.load(tmp_path)
    tokenizer = words(100)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    assert len(loading.load(tmp_path).tokenizer) == 101
    (tmp_path / "tokenizer.json").write_text("{}")
    pytest.raises(CorruptCheckpoint, loading.load, tmp_path).match("tokenizer in .* does not load")
