import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, kind, tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lmcompress.errors import (
    AssetNotFound,
    BadSetting,
    BadWeights,
    CorruptCheckpoint,
    UnknownFamily,
    UnsafeCheckpoint,
    WrongTask,
)
from lmcompress.models import assets, loading


def saved(folder: Path, family="gpt2", head="lm", **changes):
    model = tiny(family, head, **changes)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


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
    with pytest.raises(WrongTask, match=r"lm_head\.weight would be random"):
        loading.load(tmp_path / "untied")


def test_minilm_loads_with_its_tokenizer_and_reads_text():
    loaded = loading.load(assets.MINILM)
    assert (loaded.kind, loaded.family, loaded.name) == ("encoder", "bert", assets.MINILM)
    batch = loaded.tokenizer(
        ["a cat sat", "the cat was sitting", "stock prices fell"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = loaded.model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert means[0] @ means[1] > 0.6 > 0.3 > means[0] @ means[2]


def test_a_new_classification_head_is_asked_for_sized_and_reproducible(tmp_path):
    saved(tmp_path, "bert")
    one, other = (loading.load(tmp_path, head="classification", num_labels=5).model for _ in range(2))
    assert one.classifier.out_features == 5 and same_state(one, other)
    regression = loading.load(tmp_path, head="regression").model
    assert regression.classifier.out_features == 1 and regression.config.problem_type == "regression"


def test_loading_a_head_leaves_the_random_state_alone(tmp_path):
    saved(tmp_path, "bert")
    before = torch.random.get_rng_state()
    loading.load(tmp_path, head="classification", num_labels=2)
    assert torch.equal(torch.random.get_rng_state(), before)


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
    with pytest.raises(error, match=words):
        loading.load(tmp_path, **settings)


def test_half_precision_files_load_as_fp32_and_in_any_dtype_asked_for(tmp_path):
    model = tiny("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = loading.load(tmp_path).model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())
    assert {p.dtype for p in loading.load(tmp_path, dtype=torch.bfloat16).model.parameters()} == {
        torch.bfloat16
    }


def test_attention_falls_back_where_a_family_has_one_implementation(tmp_path):
    saved(tmp_path, "gpt_neo")
    assert loading.load(tmp_path).model.config._attn_implementation == "eager"


def test_a_tensor_that_is_missing_is_not_made_up(tmp_path):
    saved(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))
    with pytest.raises(CorruptCheckpoint, match=r"h\.1\.mlp\.c_fc\.weight.*random"):
        loading.load(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    saved(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"transformer.h.0.mlp.c_fc.bias": torch.zeros(3)}))
    with pytest.raises(CorruptCheckpoint, match=r"h\.0\.mlp\.c_fc\.bias"):
        loading.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, value):
    saved(tmp_path)
    edit(tmp_path, lambda tensors: tensors["transformer.h.1.attn.c_proj.weight"][3].fill_(value))
    with pytest.raises(BadWeights, match=r"1 tensors .*transformer\.h\.1\.attn\.c_proj\.weight"):
        loading.load(tmp_path)


def test_a_truncated_file_is_corrupt(tmp_path):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        loading.load(tmp_path)


class _Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_bin_weights_load_and_those_that_carry_code_are_refused(tmp_path, capsys):
    model = saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same_state(loading.load(tmp_path).model, model)
    torch.save(model.state_dict() | {"x": _Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint):
        loading.load(tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_an_architecture_that_needs_its_own_code_is_refused(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "my_net", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnknownFamily, match="'my_net'"):
        loading.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "error"), [("{", CorruptCheckpoint), ("[]", CorruptCheckpoint), (None, AssetNotFound)]
)
def test_a_config_that_is_broken_or_missing_is_named(tmp_path, text, error):
    saved(tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=r"config\.json"):
        loading.load(tmp_path)


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


def test_a_partial_checkpoint_takes_a_head_of_another_size(partial):
    folder, tuned, _ = partial
    model = loading.load(folder, head="classification", num_labels=7).model
    assert model.classifier.out_features == 7 and same_state(model.bert, tuned.bert)


def test_a_partial_checkpoints_hash_follows_its_base(partial):
    folder, *_ = partial
    before = loading.load(folder).hash
    assert loading.identity(folder) == before != loading.identity(folder.parent / "base")
    edit(folder.parent / "base", lambda tensors: next(iter(tensors.values())).add_(1))
    assert loading.load(folder).hash != before


def test_a_partial_checkpoint_that_does_not_fit_its_base_is_corrupt(partial):
    folder, *_ = partial
    edit(
        folder,
        lambda tensors: tensors.update({"classifier.weight": torch.ones(7, 7), "extra": torch.ones(1)}),
    )
    with pytest.raises(CorruptCheckpoint, match=r"2 tensors .*classifier\.weight \[7, 7\], extra \[1\]"):
        loading.load(folder)


def test_a_compressed_folder_points_to_what_loads_it(tmp_path):
    saved(tmp_path)
    (tmp_path / "compression.json").write_text('{"version": 1}')
    with pytest.raises(BadSetting, match=r"lmcompress\.models\.storage\.load"):
        loading.load(tmp_path)


def test_the_hash_is_of_weights_and_config_alone(tmp_path):
    saved(tmp_path)
    first = loading.load(tmp_path).hash
    (tmp_path / "README.md").write_text("changed")
    assert loading.load(tmp_path).hash == first
    edit(tmp_path, lambda tensors: tensors["transformer.wpe.weight"].add_(1e-3))
    assert loading.load(tmp_path).hash != first


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets.resolve(assets.MINILM, kind="models"))
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    assert loading.tokenizer_of(tmp_path).pad_token == "[SEP]"
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetNotFound, match=r"tokenizer\.json"):
        loading.tokenizer_of(tmp_path / "empty")


def test_an_unknown_id_is_not_found(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetNotFound, match="hf download no/such-model"):
        loading.load("no/such-model")
