"""Folders that other programs read: each format written here is read back by the library it is for, alone."""

import gc
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import lmcompress
from lmcompress import formats
from lmcompress.compress import Context, get
from lmcompress.errors import BadSetting, CorruptCheckpoint, DiskFull
from lmcompress.formats.dense import dense_copy
from lmcompress.models import loading, storage, surgery
from lmcompress.models.anatomy import anatomy
from lmcompress.models.auto import MODEL_TYPE, auto_class
from lmcompress.paths import ROOT
from lmcompress.study import apply
from tests.format_grid import FORMATS, MODELS, PAGE, ROWS, TICK, page_of, read_page, try_cell
from tests.tiny_models import calibration_batches, inputs, logits, tiny

gguf = pytest.importorskip("gguf", reason="pip install -e '.[formats]'")
pytest.importorskip("compressed_tensors", reason="pip install -e '.[formats]'")
READER = Path(__file__).with_name("read_formats.py")


def uniform(model: nn.Module, *, heads: bool = False, depth: bool = True) -> nn.Module:
    """Cut alike in every block, as a config with one field for all of them can describe."""
    blocks = anatomy(model).blocks
    if heads:
        model = surgery.keep_heads(model, {block.name: [0, 1] for block in blocks})
    model = surgery.keep_ffn(model, {block.name: range(1, 33) for block in blocks})
    return surgery.drop_blocks(model, {stack: [0] for stack in anatomy(model).stacks}) if depth else model


def rounded_to_nearest(model: nn.Module, **settings) -> nn.Module:
    return get("rtn")(model, **{"bits": 4, "group_size": 16} | settings)[0]


PLAIN = {
    **{
        family: lambda family=family: uniform(tiny(family)) for family in ("bert", "distilbert", "gpt2", "t5")
    },
    **{family: lambda family=family: uniform(tiny(family)) for family in ("bart", "gpt_neo", "gpt_bigcode")},
    **{f: lambda f=f: uniform(tiny(f), heads=True) for f in ("llama", "qwen3", "gemma3", "olmo2")},
    "falcon": lambda: uniform(tiny("falcon"), depth=False),
    "classifier": lambda: uniform(tiny("roberta", "classification")),
    "cast": lambda: get("cast")(tiny("llama"), dtype="bfloat16")[0],
    "hidden": lambda: surgery.keep_hidden(tiny("llama"), [i for i in range(32) if i % 8 < 6]),
}


def untied() -> nn.Module:
    model = tiny("gpt2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    return model


def tied() -> nn.Module:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def two_dtypes() -> nn.Module:
    model = tiny("bert")
    model.bert.encoder.layer[1].bfloat16()
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), *args[1:]))
    return model


OURS = {
    "heads": lambda: surgery.keep_heads(tiny("bert"), {anatomy(tiny("bert")).blocks[0].name: [1]}),
    "integers": lambda: rounded_to_nearest(tiny("gpt2"), embeddings=True),
    "sentiment": lambda: rounded_to_nearest(tiny("bert", "classification")),
    "translator": lambda: rounded_to_nearest(tiny("t5")),
    "bloom": lambda: uniform(tiny("bloom")),
    "untied": untied,
    "tied": tied,
    "body": lambda: rounded_to_nearest(tiny("bert", None)),
}


def with_calibration(technique: str, model: nn.Module, **settings) -> nn.Module:
    batches = calibration_batches(anatomy(model).kind)
    return get(technique)(model, Context(calibration=batches), **settings)[0]


def heads_of_their_own() -> nn.Module:
    """A LLaMA whose heads share no keys and values: AWQ's scales of what attention gives can move to v."""
    return tiny("llama", num_key_value_heads=4)


INTEGERS = {  # as compressed-tensors; what those of 4 bits give is equal but for rounding of sums
    "rtn-asymmetric": lambda: rounded_to_nearest(tiny("bert", "classification")),
    "rtn-symmetric": lambda: rounded_to_nearest(uniform(tiny("llama"), heads=True), symmetric=True),
    "rtn-channel": lambda: rounded_to_nearest(tiny("t5"), bits=8, group_size=None),
    "rtn-3": lambda: rounded_to_nearest(tiny("gpt_neox").bfloat16(), bits=3),
    "rtn-mixed": lambda: rounded_to_nearest(tiny("qwen2"), bits=MIXED, symmetric=True),
    "gptq": lambda: with_calibration("gptq", tiny("qwen3"), bits=4, group_size=16, act_order=True),
    "awq": lambda: with_calibration("awq", heads_of_their_own(), bits=4, group_size=16),
    "awq-relu": lambda: with_calibration("awq", tiny("opt"), bits=8, symmetric=True),
}
MIXED = {f"decoder.{i}.{kind}": 4 + 4 * i for i in range(2) for kind in ("attention", "feed-forward")}
INT8 = {  # inputs are rounded by token there, by batch here: the file errs less from the dense model
    "int8-dynamic": (lambda: get("int8-dynamic")(tiny("llama"))[0], lambda: tiny("llama")),
    "smoothquant": (lambda: with_calibration("smoothquant", heads_of_their_own()), heads_of_their_own),
}


GGUF = {
    "llama": lambda: tiny("llama", intermediate_size=64),
    "llama-pruned": lambda: uniform(tiny("llama", rope_parameters=ROPE), heads=True),
    "qwen2": lambda: tiny("qwen2", intermediate_size=96),
    "qwen3": lambda: tiny("qwen3", tie_word_embeddings=True),
    "gpt2": lambda: tiny("gpt2"),
    "gpt2-integers": lambda: rounded_to_nearest(uniform(tiny("gpt2")), embeddings=True),
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def in_blocks(model: nn.Module, encoding: str) -> nn.Module:
    """What llama.cpp's rounding of each matrix makes of a dense model."""
    model = dense_copy(model)
    conv = {f"{name}.weight" for name, module in model.named_modules() if type(module) is Conv1D}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "wpe" in name:
            continue
        weight = parameter.detach().t().contiguous() if name in conv else parameter.detach()
        table = encoding == "Q4_0" and ("embed_tokens" in name or "wte" in name or "lm_head" in name)
        kind = "F16" if weight.shape[1] % 32 else "Q8_0" if table else encoding
        kind = gguf.GGMLQuantizationType[kind]
        rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        parameter.data = torch.from_numpy(rounded.T.copy() if name in conv else rounded)
    return model


def saved(models: dict, folder: Path, format: str = "transformers") -> list[Path]:
    """Save each model with a batch for it and the logits it gives."""
    folders = []
    for name, make in models.items():
        model = make()
        batch = inputs(model, padded=True)
        formats.save(model, folder / name, format=format)
        save_file(batch | {"logits": logits(model, batch)}, folder / f"{name}.batch.safetensors")
        folders.append(folder / name)
    return folders


def read(folders: list[Path], *, package: bool) -> dict[str, dict]:
    """Return what `read_formats.py` says of each folder, by its name, in a process of its own."""
    command = [sys.executable, READER, "with" if package else "without", *folders]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {folder.name: line for folder, line in zip(folders, lines, strict=True)}


@pytest.fixture(scope="module")
def readings(tmp_path_factory) -> dict[str, dict]:
    """What transformers says of every folder here, alone ("without") and with this package ("with")."""
    root = tmp_path_factory.mktemp("formats")
    plain, ours = saved(PLAIN, root / "plain"), saved(OURS, root / "ours")
    integers = saved(INTEGERS, root / "integers", "compressed-tensors")
    integers += saved({name: make for name, (make, _) in INT8.items()}, root / "int8", "compressed-tensors")
    for name, (_, dense) in INT8.items():
        batch = inputs(dense(), padded=True)
        save_file(batch | {"logits": logits(dense(), batch)}, root / "int8" / f"{name}.batch.safetensors")
    for encoding in ("F16", "Q8_0", "Q4_0"):
        models = {f"{name} {encoding}": make for name, make in GGUF.items()}
        integers += saved(models, root / encoding, f"gguf-{encoding.lower()}")
        for name, make in models.items():
            batch = inputs(model := in_blocks(make(), encoding), padded=True)
            save_file(batch | {"logits": logits(model, batch)}, root / encoding / f"{name}.batch.safetensors")
    alone = read([*plain, *ours, *integers], package=False)
    return {"root": root, "without": alone, "with": read(ours, package=True)}


def test_what_a_config_describes_loads_in_transformers_alone_with_equal_logits(readings):
    outcomes = {name: readings["without"][name] for name in PLAIN}
    assert {name: said for name, said in outcomes.items() if said.get("difference", 1) > 1e-5} == {}
    for name in PLAIN:
        assert "import lmcompress" not in (readings["root"] / "plain" / name / "README.md").read_text()


@pytest.mark.parametrize("name", OURS)
def test_what_no_config_describes_stops_transformers_and_loads_once_this_package_is_imported(name, readings):
    assert MODEL_TYPE in readings["without"][name]["auto"], readings["without"][name]
    assert "import lmcompress" in readings["without"][name]["by_name"], readings["without"][name]
    assert readings["with"][name].get("difference", 1) <= 1e-5, readings["with"][name]
    folder = readings["root"] / "ours" / name
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    card = (folder / "README.md").read_text()
    assert "import lmcompress" in card and auto_class(architecture) in card


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_written_as_compressed_tensors_give_the_same_logits_in_transformers(name, readings):
    allowed = 0.1 if name == "rtn-3" else 1e-4  # sums in bfloat16
    assert readings["without"][name].get("difference", 1) <= allowed, readings["without"][name]
    folder = readings["root"] / "integers" / name
    again, _ = lmcompress.load_compressed(folder)
    expected = load_file(folder.with_name(f"{name}.batch.safetensors")).pop("logits")
    torch.testing.assert_close(logits(again), expected, atol=allowed, rtol=0)
    assert 'from_pretrained("this folder")' in (folder / "README.md").read_text()
    pytest.raises(BadSetting, storage.load, folder).match("load_compressed")
    pytest.raises(BadSetting, loading.load, folder).match("compressed model")


@pytest.mark.parametrize("name", INT8)
def test_8_bit_inputs_written_as_compressed_tensors_err_no_more_than_here(name, readings):
    made, dense = (make() for make in INT8[name])
    assert 0 < readings["without"][name]["difference"] <= float((logits(made) - logits(dense)).abs().max())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny("llama"), "quantize it first"),
        (lambda: rounded_to_nearest(tiny("bert"), embeddings=True), "word_embeddings is a table"),
        (lambda: get("nf4")(tiny("bert"), group_size=16)[0], "no NF4"),
        (lambda: rounded_to_nearest(tiny("bert"), group_size=20), "groups of 20 do not divide"),
        (lambda: rounded_to_nearest(tiny("gpt2")), "Conv1D"),
        (lambda: rounded_to_nearest(OURS["heads"](), group_size=8), "structure"),
        (lambda: rounded_to_nearest(tiny("qwen2"), bits=MIXED), "several widths"),
        (lambda: with_calibration("awq", tiny("bert"), bits=4), "cannot be moved"),  # the norm is a residual
        (lambda: with_calibration("awq", tiny("llama"), bits=4), "o_proj, cannot be moved"),  # shared values
    ],
)
def test_what_compressed_tensors_cannot_hold_is_refused_with_a_sentence(make, words, tmp_path):
    model = make()
    assert words in formats.refusal(model, "compressed-tensors")
    with pytest.raises(BadSetting, match=words):
        formats.save(model, tmp_path / "m", format="compressed-tensors")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("encoding", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", GGUF)
def test_decoders_written_as_gguf_give_the_logits_of_its_blocks_in_transformers(name, encoding, readings):
    reading = readings["without"][f"{name} {encoding}"]
    assert reading.get("difference", 1) <= 1e-4, reading
    again, _ = lmcompress.load_compressed(readings["root"] / encoding / f"{name} {encoding}")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_a_gguf_file_splits_text_as_the_tokenizer_does(tmp_path):
    loaded = lmcompress.load(ROOT / "models" / "pocket" / "gpt2-pydocs")
    folder = formats.save(loaded.model, tmp_path / "m", format="gguf-q8_0", tokenizer=loaded.tokenizer)
    assert 0.5 < (folder / "model.gguf").stat().st_size / loaded.file_bytes < 0.6  # 8.5 bits instead of 16
    for file in folder.glob("tokenizer*"):
        file.unlink()
    again = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    text = "Return the number of items;\n    raise KeyError: it's naïve — 日本 12345</s> <pad>"
    assert again(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    assert again.eos_token == loaded.tokenizer.eos_token
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(BadSetting, match="no byte-level BPE"):
        formats.save(loaded.model, tmp_path / "n", format="gguf-f16", tokenizer=words)
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny("bert"), "decoders of llama"),
        (lambda: tiny("llama", "classification"), "language-model head"),
        (lambda: tiny("llama", attention_bias=True), "attention_bias=False for granted"),
        (
            lambda: tiny("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "scaled",
        ),
        (lambda: surgery.keep_ffn(tiny("llama"), {"model.layers.0": range(8)}), "structure"),
        (lambda: get("low-rank")(tiny("llama"), rank=4)[0], "structure"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_with_a_sentence(make, words, tmp_path):
    assert words in formats.refusal(make(), "gguf-f16")


def test_formats_are_named_and_protect_what_they_wrote(tmp_path):
    model = INTEGERS["rtn-asymmetric"]()
    pytest.raises(BadSetting, formats.save, model, tmp_path / "m", format="onyx").match("transformers, compr")
    assert "no transformers config" in formats.refusal(nn.Linear(2, 2), "compressed-tensors")
    folder = formats.save(model, tmp_path / "m", format="compressed-tensors")
    pytest.raises(BadSetting, formats.save, model, folder).match("replace=True")
    formats.save(model, folder, replace=True)
    assert type(storage.load(folder)[0]) is type(model)
    (folder / "model.safetensors").write_bytes(b"mine")
    pytest.raises(BadSetting, formats.save, model, folder, replace=True).match("changed since")


@pytest.mark.parametrize("format", ["gguf-f16", "gguf-q8_0", "openvino", "onnx"])
@pytest.mark.parametrize("room", [3_000, 20_000])
def test_a_full_disk_is_named_and_nothing_is_left(format, room, tmp_path, monkeypatch):
    if format in ("openvino", "onnx"):
        pytest.importorskip({"onnx": "onnxruntime"}.get(format, format), reason="pip install -e '.[deploy]'")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, limits = tiny("llama"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # Python ignores the signal of it
    try:
        with pytest.raises(DiskFull, match="no space left to write"):
            formats.save(model, tmp_path / "saved", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_models_of_two_dtypes_are_not_cast_to_one_in_silence(tmp_path):
    model = two_dtypes()
    storage.save(model, tmp_path / "mixed")
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["model_type"] == MODEL_TYPE
    again, _ = storage.load(tmp_path / "mixed")
    assert {n: p.dtype for n, p in again.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import lmcompress, sys; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_auto_classes_return_the_body_refuse_other_heads_and_options_without_meaning(tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    model = OURS["heads"]()
    storage.save(model, tmp_path / "m")
    body = AutoModel.from_pretrained(tmp_path / "m")
    assert type(body) is type(model.bert)
    assert torch.equal(logits(body, inputs(model)), logits(model.bert, inputs(model)))
    assert AutoConfig.from_pretrained(tmp_path / "m").original_model_type == "bert"
    again, report = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "m",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        device_map={"": "cpu"},
        output_loading_info=True,
    )
    assert again.dtype == torch.bfloat16 and again.config._attn_implementation == "eager"
    assert again.config.model_type == "bert" and not any(report.values())
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "m", dtype="auto").dtype == torch.float32
    pytest.raises(BadSetting, AutoModelForCausalLM.from_pretrained, tmp_path / "m").match("BertForMaskedLM")
    pytest.raises(BadSetting, AutoModel.from_pretrained, tmp_path / "m", max_memory={0: 1}).match(
        "max_memory"
    )
    split = {"bert": "cpu", "cls": "disk"}
    pytest.raises(BadSetting, AutoModel.from_pretrained, tmp_path / "m", device_map=split).match("one device")


def test_folders_of_earlier_versions_load_and_a_lost_record_is_named(tmp_path):
    for name, make in OURS.items():
        model = make()
        folder = storage.save(model, tmp_path / name)
        fields = json.loads((folder / "config.json").read_text())
        fields["model_type"] = fields.pop("original_model_type")
        fields["architectures"] = [type(model).__name__]
        del fields["transformers_weights"]
        (folder / "config.json").write_text(json.dumps(fields))
        torch.testing.assert_close(logits(storage.load(folder)[0]), logits(model), atol=0, rtol=0)
    folder = storage.save(OURS["heads"](), tmp_path / "lost")
    pytest.raises(BadSetting, loading.load, folder).match("compressed model")
    (folder / "compression.json").unlink()
    pytest.raises(CorruptCheckpoint, loading.load, folder).match(r"lacks compression\.json")


CELLS = read_page(PAGE.read_text(encoding="utf-8"))
GRAPHS = [
    (model, row, format) for model, row, format in zip(MODELS, list(ROWS)[7:], ("openvino", "onnx") * 2)
]


@pytest.mark.parametrize("model", MODELS)
def test_the_page_of_formats_says_what_a_technique_gives_in_a_format(model):
    """One format of each technique, another one for each model and row."""
    named = [format for format in FORMATS if format not in ("openvino", "onnx")]
    for number, row in enumerate(ROWS, list(MODELS).index(model)):
        format = named[number % len(named)]
        assert try_cell(model, row, format) == CELLS[model][row][format], "python tests/format_grid.py"


@pytest.mark.parametrize(("model", "row", "format"), GRAPHS[:3])
def test_graphs_hold_what_a_technique_gives(model, row, format):
    assert try_cell(model, row, format) == CELLS[model][row][format] == TICK


def test_the_page_of_formats_is_written_from_its_cells():
    assert page_of(CELLS) == PAGE.read_text(encoding="utf-8"), "python tests/format_grid.py"
    assert {*CELLS} == {*MODELS} and all({*rows} == {*ROWS} for rows in CELLS.values())


def test_a_recipe_is_written_in_a_format_and_read_back(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("[{technique: rtn, bits: 4, group_size: 32}]")
    command = [str(recipe), "--model", "pocket/llama-pydocs", "--task", str(tmp_path / "text.jsonl")]
    lines = [{"text": f"Return the number of items in list {i}, or None."} for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command += ["--save", str(tmp_path / "m"), "--format", "gguf-q8_0", "--output", str(tmp_path / "runs")]
    assert apply.main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"gguf-q8_0, 5\.\d MB, read back: logits differ .* (9\d\.\d|100\.0)% of", said), said
    assert lmcompress.load_compressed(tmp_path / "m")[1] is not None
    assert apply.main(command) == 1
    assert "replace" in capsys.readouterr().err
