"""What depends on code is stale when code it reaches does something else, and not when a comment changes."""

import pytest

from lmcompress.code_digest import code_digest, reached

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
    assert reached(["lmcompress.used"], root=root) == {
        root / "lmcompress/__init__.py",
        root / "lmcompress/used.py",
        deep,
    }
    assert code_digest([deep], root=root) != code_digest([], root=root)
    with pytest.raises(FileNotFoundError, match=r"lmcompress\.gone"):
        code_digest(["lmcompress.gone"], root=root)
