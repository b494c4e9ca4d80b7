"""A digest follows imports within the project, and sees code but no comment."""

import pytest

from lmcompress.code_digest import code_digest, reached


@pytest.fixture
def house(tmp_path):
    """A project of three modules: `a` imports `b`, nothing imports `c`."""
    package = tmp_path / "lmcompress"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(
        '"""Say."""\nfrom lmcompress import b\n\n\ndef f():\n    return b.one  # why\n'
    )
    (package / "b.py").write_text("one = 1\n")
    (package / "c.py").write_text("two = 2\n")
    return tmp_path


@pytest.mark.parametrize(
    ("module", "text", "changes"),
    [
        ("a", '"""Say more."""\nfrom lmcompress import b\ndef f():\n  """Do."""\n  return b.one\n', False),
        ("a", "from lmcompress import b\n\n\ndef f():\n    return b.one + 1\n", True),
        ("b", "# a comment\none = 1\n", False),
        ("b", "one = 2\n", True),
        ("c", "two = 3\n", False),
    ],
)
def test_only_code_that_is_imported_changes_the_digest(house, module, text, changes):
    before = code_digest(["lmcompress.a"], root=house)
    (house / "lmcompress" / f"{module}.py").write_text(text)
    assert (code_digest(["lmcompress.a"], root=house) != before) is changes


def test_imports_within_functions_and_modules_named_as_text_count(house):
    (house / "lmcompress" / "b.py").write_text(
        'def g():\n    import lmcompress.c\n    return "lmcompress.a:f"\n'
    )
    files = reached([house / "lmcompress" / "b.py"], root=house)
    assert {file.stem for file in files} == {"__init__", "a", "b", "c"}


def test_a_module_that_is_not_there_is_named(house):
    with pytest.raises(FileNotFoundError, match="lmcompress.d"):
        code_digest(["lmcompress.d"], root=house)
