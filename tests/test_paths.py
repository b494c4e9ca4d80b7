"""Files appear whole or not at all, and what the system refuses is an error with a name."""

import errno
import multiprocessing
import os
import time

import pytest
from safetensors import SafetensorError

from lmcompress import paths
from lmcompress.code_digest import code_digest, reached
from lmcompress.errors import AssetNotFound, DiskFull, NotWritable
from lmcompress.paths import atomic_path, scratch_folder, write_json, write_text


def test_a_file_is_replaced_only_on_success(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "before")
    pytest.raises(ValueError, write_json, path, {"a": float("nan")}).match("JSON")
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


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, "no") for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
        OSError("64000 requested and 572 written"),  # of numpy
        RuntimeError("basic_ios::clear: iostream error"),  # of OpenVINO
    ],
)
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(DiskFull, match=r"no space left to write .*file\.txt.*run again"), atomic_path(path):
        raise error
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, monkeypatch, code):
    def refuse(*_, **named):
        raise OSError(code, "no", str(named["dir"]))

    monkeypatch.setattr(paths.tempfile, "mkdtemp", refuse)
    with pytest.raises(NotWritable, match=f"cannot write {tmp_path}: .*Name a folder"):
        write_json(tmp_path / "x.json", {})
    monkeypatch.undo()
    (tmp_path / "file").write_text("in the place of a folder")
    pytest.raises(NotWritable, write_text, tmp_path / "file" / "x.json", "").match("cannot write")
    with pytest.raises(PermissionError, match="elsewhere"), atomic_path(tmp_path / "y"):
        raise PermissionError(code, "no", "/elsewhere/input")


def hold(path, ready):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        ready.set()
        time.sleep(60)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=hold, args=(tmp_path / "a", ready))
    writer.start()
    assert ready.wait(30)
    (holder,) = tmp_path.iterdir()
    os.utime(holder, (0, 0))
    write_text(tmp_path / "b", "")
    assert holder.exists()
    writer.kill()
    writer.join()
    write_text(tmp_path / "b", "")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def fill(folders):
    with scratch_folder() as folder:
        folders.put(folder)
        time.sleep(60)


def test_scratch_folders_of_killed_processes_go_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.tempfile, "gettempdir", lambda: str(tmp_path))
    context = multiprocessing.get_context("fork")
    folders = context.Queue()
    process = context.Process(target=fill, args=(folders,))
    process.start()
    left = folders.get(timeout=30)
    with scratch_folder() as folder:
        assert folder != left and left.is_dir()
    process.kill()
    process.join()
    with scratch_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_what_only_a_checkout_holds_is_said(tmp_path):
    assert paths.from_checkout(tmp_path) == tmp_path
    with pytest.raises(AssetNotFound, match=r"profiles is not there.*\$STUDY_HOME"):
        paths.from_checkout(tmp_path / "profiles")


FILES = {
    "lmcompress/__init__.py": "",
    "lmcompress/deep.py": '"""Deep."""\n\n\ndef f(x):\n    """Double x."""\n    return 2 * x  # twice\n',
    "lmcompress/used.py": "def g(x):\n    from lmcompress.deep import f\n    return f(x)\n",
    "lmcompress/techniques/__init__.py": "from importlib import import_module\nNAMES = ('pruning',)\n",
    "lmcompress/techniques/pruning.py": "LEVEL = 1\n",
    "lmcompress/other.py": "LEVEL = 1\n",
    "lmcompress/unused.py": "LEVEL = 1\n",
    "helpers/__init__.py": """
from importlib import import_module
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from lmcompress.other import LEVEL
    from lmcompress.unused import LEVEL as LOW
def __getattr__(name):
    return import_module({"LEVEL": "lmcompress.other", "LOW": "lmcompress.unused"}[name]).LEVEL
""",
}
CELLS = """
from helpers import LEVEL
from lmcompress.used import g
from lmcompress import techniques
print(g(LEVEL))
"""


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "old", "new", "stale"),
    [
        ("lmcompress/deep.py", "2 * x", "3 * x", True),
        ("lmcompress/deep.py", "twice", "two times", False),
        ("lmcompress/deep.py", "Double x.", "Return twice x.", False),
        ("lmcompress/deep.py", "2 * x", "(2*x)", False),
        ("lmcompress/techniques/pruning.py", "1", "2", True),
        ("lmcompress/__init__.py", "", "LEVEL = 1", True),
        ("lmcompress/other.py", "1", "2", True),
        ("lmcompress/unused.py", "1", "2", False),
    ],
)
def test_a_change_of_reached_code_makes_stale_and_nothing_else(root, name, old, new, stale):
    before = code_digest([], code=CELLS, root=root)
    (root / name).write_text(FILES[name].replace(old, new, 1))
    assert (code_digest([], code=CELLS, root=root) != before) is stale


def test_sources_are_files_and_modules_that_are_there(root):
    deep = root / "lmcompress/deep.py"
    used = {root / "lmcompress/__init__.py", root / "lmcompress/used.py", deep}
    assert reached(["lmcompress.used"], root=root) == used
    assert code_digest([deep], root=root) != code_digest([], root=root)
    pytest.raises(FileNotFoundError, code_digest, ["lmcompress.gone"], root=root).match(r"lmcompress\.gone")
