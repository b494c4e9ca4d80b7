"""Files appear whole or not at all, and a full disk is an error with a name."""

import errno

import pytest

from lmcompress.errors import DiskFull
from lmcompress.paths import atomic_path, write_json, write_text


def test_a_file_is_replaced_only_on_success(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "before")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped in the middle")
    assert path.read_text() == "before"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, code):
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(DiskFull, match=r"no space left to write .*file\.txt.*run again"), atomic_path(path):
        raise OSError(code, "full")
    assert path.read_text() == "before"


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "no")


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
