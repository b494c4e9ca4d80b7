import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lmcompress.errors import AssetNotFound, CorruptCheckpoint, UnsafeCheckpoint
from lmcompress.models import checkpoints

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def write_raw(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_back_bit_for_bit(tmp_path, dtype):
    tensor = (torch.randn(7, 5) * 3).to(dtype)
    save_file(
        {"x": tensor, "scalar": tensor[0, 0].clone(), "empty": tensor[:0].clone()}, tmp_path / "m.safetensors"
    )
    found = {ref.name: ref for ref in checkpoints.tensors(tmp_path)}
    assert found["x"].dtype == dtype and found["x"].shape == (7, 5)
    assert bits(found["x"].read()) == bits(tensor)
    assert found["scalar"].shape == () and bits(found["scalar"].read()) == bits(tensor[0, 0])
    assert found["empty"].shape == (0, 5) and found["empty"].read().numel() == 0


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    n=st.integers(0, 200),
    max_bytes=st.integers(1, 400),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_chunks_are_the_tensor_in_order_and_never_larger_than_asked(tmp_path, n, max_bytes, dtype):
    tensor = torch.randn(n).to(dtype)
    save_file({"x": tensor}, tmp_path / "m.safetensors")
    (ref,) = checkpoints.tensors(tmp_path / "m.safetensors")
    chunks = [chunk.clone() for chunk in ref.chunks(max_bytes)]
    assert torch.equal(torch.cat([torch.empty(0, dtype=dtype), *chunks]), tensor)
    assert all(chunk.nbytes <= max(max_bytes, dtype.itemsize) for chunk in chunks)


def test_a_sharded_checkpoint_equals_the_whole_one(tmp_path):
    whole = {f"h.{i}.w": torch.randn(3, i + 1) for i in range(4)}
    names = list(whole)
    weight_map = {}
    for number, part in enumerate((names[:1], names[1:])):
        file = f"model-{number}.safetensors"
        save_file({name: whole[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = {ref.name: ref.read() for ref in checkpoints.tensors(tmp_path)}
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)

    weight_map["h.9.w"] = "model-0.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpoint, match=r"promises 1 tensors.*h\.9\.w"):
        list(checkpoints.tensors(tmp_path))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"1 of 2 shards.*model-1\.safetensors"):
        list(checkpoints.tensors(tmp_path))


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"w": 3}}', b"[" * 100_000, b"\xff"]
)
def test_a_malformed_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    pytest.raises(CorruptCheckpoint, list, checkpoints.tensors(tmp_path)).match("index")


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/{}/secret.safetensors", "a/../../secret.safetensors"]
)
def test_shards_outside_the_folder_are_refused_though_they_are_valid(tmp_path, shard):
    save_file({"w": torch.ones(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "model" / "a").mkdir(parents=True)
    index = {"weight_map": {"w": shard.format(tmp_path)}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeCheckpoint, match=r"outside its folder: .*secret"):
        checkpoints.weight_files(tmp_path / "model")


def test_links_into_a_cache_of_blobs_are_read_and_broken_ones_named(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "blobs" / "abc")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/abc")
    assert [ref.name for ref in checkpoints.tensors(tmp_path / "snapshot")] == ["w"]
    (tmp_path / "blobs" / "abc").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"leads nowhere.*blobs/abc"):
        checkpoints.weight_files(tmp_path / "snapshot")
    (tmp_path / "blobs" / "abc").symlink_to("../snapshot/model.safetensors")
    pytest.raises(CorruptCheckpoint, checkpoints.weight_files, tmp_path / "snapshot").match("circle")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    pytest.raises(CorruptCheckpoint, list, checkpoints.tensors(tmp_path)).match(rf"{name} is a pipe")


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetNotFound, match=r"model\.safetensors.*it holds config\.json"):
        list(checkpoints.tensors(tmp_path))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(keep=st.floats(0, 0.999))
def test_a_file_cut_anywhere_is_corrupt(tmp_path, keep):
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(5, 5), "b": torch.randn(3)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    pytest.raises(CorruptCheckpoint, list, checkpoints.tensors(file)).match(r"m\.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "fault"),
    [
        ({"a": entry(0, 4)}, b"\0" * 8, "trailing"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12, "`b`: it overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12, "`b`.*gap"),
        ({"a": entry(4, 8)}, b"\0" * 8, "`a`.*gap"),
        ({"a": entry(0, 4, dtype="F128")}, b"\0" * 4, "`F128`"),
        ({"a": entry(0, 1, [2], dtype="F4")}, b"\0", "'F4'; known are F64, F32"),
        ({"a": entry(0, 4, [2])}, b"\0" * 4, "shape"),
        ({"a": entry(0, 4, [-1])}, b"\0" * 4, "-1"),
        ({"a": entry(0, 4, [2**40, 2**40])}, b"\0" * 4, "overflow"),
        ({"a": {"shape": [1]}}, b"", "missing field `dtype`"),
        ([1], b"", "JSON"),
        (b'{"a": ', b"", "JSON"),
        (b"[" * 100_000, b"", "JSON"),
        (b"\xff\xfe", b"", "UTF-8"),
    ],
)
def test_a_header_that_does_not_fit_says_why(tmp_path, header, data, fault):
    with pytest.raises(CorruptCheckpoint, match=rf"x\.safetensors.*({fault})"):
        checkpoints.validate_safetensors(write_raw(tmp_path / "x.safetensors", header, data))


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    pytest.raises(CorruptCheckpoint, checkpoints.validate_safetensors, file).match("git lfs pull")


def test_a_file_cut_while_it_is_read_is_corrupt(tmp_path):
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(100)}, file)
    (ref,) = checkpoints.tensors(file)
    os.truncate(file, file.stat().st_size - 8)
    pytest.raises(CorruptCheckpoint, ref.read).match("cut while")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_bin_checkpoint_reads_like_its_state_dict(tmp_path, zipped):
    weight = torch.randn(4, 6)
    state = {"w": weight, "t": torch.randn(3, 5).T, "half": torch.randn(3).bfloat16()}
    state |= {"row": torch.randn(8)[2:5], "apart": weight.clone()}
    shared = state | {"again": weight}  # counts once
    torch.save(shared, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = {ref.name: ref.read() for ref in checkpoints.tensors(tmp_path)}
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_of_several_weight_files_those_count_that_transformers_reads(tmp_path):
    def names():
        return [ref.name for ref in checkpoints.tensors(tmp_path)]

    save_file({"other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert names() == ["other"]
    save_file({"other": torch.ones(1)}, tmp_path / "b.safetensors")
    pytest.raises(CorruptCheckpoint, names).match(r"adapter_model\.safetensors and in .*b\.safetensors")
    (tmp_path / "b.safetensors").unlink()
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert names() == ["old"]
    save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    assert names() == ["new"]


class _Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_bin_that_runs_code_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"w": torch.ones(1), "x": _Evil(mark)}, tmp_path / "pytorch_model.bin")
    pytest.raises(UnsafeCheckpoint, list, checkpoints.tensors(tmp_path)).match(r"mkdir.*safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("content", ["cut", "noise", "no tensors"])
def test_a_broken_bin_is_corrupt(tmp_path, content):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": 3} if content == "no tensors" else {"w": torch.randn(100)}, file)
    if content == "cut":
        file.write_bytes(file.read_bytes()[:-300])
    elif content == "noise":
        file.write_bytes(b"\x80\x02 this is no pickle")
    with pytest.raises((CorruptCheckpoint, UnsafeCheckpoint), match=r"pytorch_model\.bin"):
        list(checkpoints.tensors(tmp_path))
