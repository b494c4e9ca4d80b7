import errno
import hashlib
import os
import random
import signal
import string
import time
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcompress import paths
from lmcompress.corpus import docstrings, pydocs
from lmcompress.corpus.docstrings import Source, raw_docs
from lmcompress.corpus.prose import clean, split_summary, words
from lmcompress.corpus.pydocs import Corpus, harvest, split_of
from lmcompress.errors import BadData, BadSetting, DiskFull


def sentence(seed, n_words=30):
    """A sentence of random words, distinct for every seed."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(n_words)]
    return " ".join(words).capitalize() + "."


def name_in(split, nth=0, prefix="fake.mod.f"):
    """The nth function name whose qualified name falls into `split`."""
    return [f"f{i}" for i in range(2000) if split_of(f"{prefix}{i}") == split][nth]


def function(name, doc):
    return f'def {name}(x, *, order=1):\n    """{doc}"""\n\n\n'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A fake package `fake`; `package(**files)` writes it and makes it the only source of a harvest."""
    folder = tmp_path / "site" / "fake"
    monkeypatch.setattr(paths, "DATA_RAW", tmp_path / "raw")

    def write(version="1.0", **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = folder / (name.replace("__slash__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        source = Source(folder, "fake", version)
        monkeypatch.setattr(
            pydocs, "installed_sources", lambda: ({"fake": source}, {"absent": "not installed"})
        )
        return folder

    return write


def everything(made):
    return {row.qualname: row for split in pydocs.SPLITS for row in made.documents(split).itertuples()}


def test_every_kind_of_definition_is_read():
    source = dedent('''
        """Module text."""
        import os
        class Outer(Base):
            """Outer text."""
            def __init__(self, a: int, b: list[int] = [1], *rest, key="k", **more) -> None: pass
            class Inner:
                """Inner text."""
                async def wait(self, seconds: float = 1.5): "Wait text."
                @staticmethod
                def make(kind): "Make text."
                @classmethod
                def build(cls, kind): "Build text."
        if os.name:
            def chosen(a, /, b): "Chosen text."
        else:
            def chosen(b): "Other text."
        def outer():
            def hidden(): "Local functions are not documentation."
        def silent(): pass
        class Odd:
            def f(self=None): 'Odd text.'
        add_newdoc("fake.core", "ufunc", ("nin", "The number of inputs."))
        done = _add_docstr(torch.sinh, r"sinh(input, *, out=None) -> Tensor"
                           + "\\n\\nText of {name}".format(name=1))
    ''')
    docs = raw_docs(source.encode(), "fake.mod")
    found = {(raw.qualname, raw.kind, raw.signature, raw.doc) for raw in docs}
    assert found == {
        ("fake.mod", "module", "fake.mod", "Module text."),
        ("fake.mod.Outer", "class", "Outer(a, b=[1], *rest, key='k', **more)", "Outer text."),
        ("fake.mod.Outer.Inner", "class", "Inner", "Inner text."),
        ("fake.mod.Outer.Inner.wait", "function", "Inner.wait(seconds=1.5)", "Wait text."),
        ("fake.mod.Outer.Inner.make", "function", "Inner.make(kind)", "Make text."),
        ("fake.mod.Outer.Inner.build", "function", "Inner.build(kind)", "Build text."),
        ("fake.mod.chosen", "function", "chosen(a, /, b)", "Chosen text."),
        ("fake.mod.chosen", "function", "chosen(b)", "Other text."),
        ("fake.mod.Odd.f", "function", "Odd.f()", "Odd text."),
        ("fake.core.ufunc.nin", "function", "nin", "The number of inputs."),
        ("fake.mod.sinh", "function", "sinh", "sinh(input, *, out=None) -> Tensor\n\nText of %(name)s"),
    }


def test_a_c_functions_own_signature_is_lifted_out_of_its_text():
    raw = docstrings.Raw("m.f", "function", "f", "")
    text = "f(\n    a,\n    b=(1, 2),\n)\n--\n\nf($self, a)\n\nDo the thing."
    assert docstrings.lift_signature(raw, text) == ("f( a, b=(1, 2), )", "Do the thing.")


def test_installed_sources_are_found_without_importing_and_missing_ones_are_noted(monkeypatch):
    monkeypatch.setattr(docstrings, "LIBRARIES", ("python", "numpy", "sklearn"))
    monkeypatch.setattr(docstrings, "_MORE", "no_such_package_here")
    sources, notes = docstrings.installed_sources()
    assert sorted(sources) == ["numpy", "python", "sklearn"]
    assert sources["numpy"].version == np.__version__ and sources["sklearn"].version != "unknown"
    assert notes == {"no_such_package_here": "not installed: skipped"}


def test_clean_keeps_prose_and_parameters_and_drops_the_rest():
    doc = """Resample :class:`~fake.core.Image` with ``order`` 1, as in [1]_.

    See `the guide <https://example.org/a>`_.

    .. versionadded:: 1.2
       Not prose.

    Parameters
    ----------
    x : array_like
        Input of shape ``(n,)``.

    Use it like this, in a loop::

        for a in b: pass

    >>> resample(3)
    array([1, 2])

    .. note::
        It wraps.

    Examples
    --------
    Only makes sense with code:

    >>> 1

    References
    ----------
    .. [1] Somebody, 1999.

    Copyright (c) 2001 Somebody.
    """
    assert clean(doc).split("\n") == [
        "Resample `Image` with `order` 1, as in.",
        "",
        "See the guide.",
        "",
        "Parameters:",
        "x : array_like",
        "    Input of shape `(n,)`.",
        "",
        "Use it like this, in a loop:",
        "",
        "    It wraps.",
    ]


@pytest.mark.parametrize(
    "line", ["-" * 3000 + "x", " " * 3000 + "x", "f(" + "(a)" * 999, "`a" * 999, ":a" * 999]
)
def test_no_pattern_backtracks_exponentially(line):
    assert "More text." in clean(f"Title\n{line}\n\nMore text.")  # would not come back before the end of time
    split_summary(line)
    docstrings.lift_signature(docstrings.Raw("m.f", "function", "f", ""), line)


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("Return a\nview. It is cheap.\n\nMore.", "Return a view."),
        ("Use e.g. Numpy or J. Doe's idea (v1.2). Then stop.", "Use e.g. Numpy or J. Doe's idea (v1.2)."),
        ("No full stop\n\nBody.", "No full stop"),
        ("Do this\n:param x: the input\n:return: it", "Do this"),
        ("Short title\nThis starts a new sentence.", "Short title"),
        ("Args:\n    x (int): the input.", ""),
        ("hidden_size (`int`, *optional*):\n    Width.", ""),
    ],
)
def test_summary_is_the_first_sentence(text, summary):
    assert split_summary(text)[0] == summary


@given(
    st.lists(
        st.sampled_from(["One two.", "Three:", "- four", "  five six", "", "Args:", "`x` y"]), max_size=12
    )
)
def test_summary_and_body_together_lose_no_word(lines):
    text = "\n".join(lines).strip("\n")
    summary, body = split_summary(text)
    assert "\n" not in summary
    assert words(summary) + words(body) == words(text)


def test_split_is_a_function_of_the_name_alone():
    names = [f"pkg.f{i}" for i in range(20_000)]
    shares = [int.from_bytes(hashlib.sha256(n.encode()).digest()[:4], "big") / 2**32 for n in names]
    expected = ["train" if s < 0.9 else "validation" if s < 0.95 else "test" for s in shares]
    assert [split_of(n) for n in names] == expected
    shares = [expected.count(split) / len(names) for split in pydocs.SPLITS]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.01)


def test_a_text_that_also_occurs_in_train_is_never_in_evaluation(package):
    """Nor its summary alone; and of equal texts in one split the first name stays."""
    in_test, also, third, fourth, *twice = (name_in("test", nth) for nth in range(6))
    shouted = sentence(1).upper().replace(" ", "  ")  # the same words: a copy
    texts = {
        in_test: sentence(1),
        name_in("train", 500): shouted,
        also: sentence(2),
        third: f"Same words here.\n\n{sentence(3)}",
        name_in("train"): f"Same words here.\n\n{sentence(4)}",
    } | dict.fromkeys(twice, sentence(5))
    package(mod="".join(function(name, text) for name, text in texts.items()))
    made = harvest(processes=1)
    kept = {name_in("train", 500): "train", also: "test", name_in("train"): "train", min(twice): "test"}
    assert {name.rpartition(".")[2]: row.split for name, row in everything(made).items()} == kept
    assert made.stats()["dropped"]["same_text"] == 2 and made.stats()["dropped"]["same_summary"] == 1


@pytest.mark.parametrize(("shared_words", "kept"), [(22, True), (23, False)])
def test_an_evaluation_text_goes_when_half_of_its_windows_are_in_train(package, shared_words, kept):
    # 39 words make 32 windows; a shared run of 22 words holds 15 of them, one of 23 words exactly half.
    own, train = sentence(1, 39).split(), sentence(2, 50).split()
    mixed = own[: 39 - shared_words] + train[10 : 10 + shared_words]
    name = name_in("validation")
    package(mod=function(name, " ".join(mixed)) + function(name_in("train"), " ".join(train)))
    assert (f"fake.mod.{name}" in everything(harvest(processes=1))) is kept


def many_files():
    return {
        f"m{i}": "".join(function(f"g{j}", sentence(100 * i + j)) for j in range(40)) for i in range(12)
    } | {"copy": function("g0", sentence(3)) * 2}


def test_harvest_skips_what_is_not_documentation_and_says_so(package):
    text = function("f", sentence(9))
    package(
        mod=function("f", sentence(1)) + function("short", "Too short."),
        broken="def f(:\n    '''x'''",
        tests__slash__thing=text,
        _vendor__slash__thing=text,
        test_more=text,
        made="# This file was automatically generated from x; do not edit.\n" + text,
    )
    made = harvest(processes=1)
    assert list(everything(made)) == ["fake.mod.f"]
    assert made.documents("test").empty and list(made.text("test")) == []
    stats, row = made.stats(), everything(made)["fake.mod.f"]
    assert stats["unreadable"] == ["fake.broken: SyntaxError"] and stats["documents"] == 1
    assert stats["notes"] == {"absent": "not installed"}
    size = len(row.signature + row.summary + row.body)
    assert stats["bytes"] == stats["libraries"]["fake"]["bytes"] == size


def test_result_depends_neither_on_processes_nor_on_batches(package, monkeypatch, tmp_path):
    package(**many_files())
    one = harvest(processes=1)
    monkeypatch.setattr(paths, "DATA_RAW", tmp_path / "again")
    monkeypatch.setattr(docstrings, "_BATCH_BYTES", 3000)
    seen = []
    two = harvest(processes=2, progress=lambda done, total: seen.append((done, total)))
    assert one.folder != two.folder and one.hash == two.hash
    train = one.documents("train")
    assert list(train.columns) == list(pydocs.COLUMNS) and set(train["split"]) == {"train"}
    assert not train["qualname"].is_monotonic_increasing  # in one fixed mixed order
    assert one.documents("train", limit=7).equals(train.head(7))
    assert next(one.text("train")) == f"{train.iloc[0].signature}\n\n{train.iloc[0].summary}"
    pytest.raises(BadData, one.documents, "dev").match("train, validation, test")
    with pq.ParquetFile(one.file) as file:
        for group in range(file.num_row_groups):  # no group holds two splits
            split = file.metadata.row_group(group).column(pydocs.COLUMNS.index("split")).statistics
            assert split.min == split.max
    assert one.file.read_bytes() == two.file.read_bytes()
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


def test_content_hash_follows_the_text_of_its_split_only(package):
    name = name_in("test")
    names = (name, name_in("train"), name_in("validation"))
    mod = "".join(function(one, sentence(seed)) for seed, one in enumerate(names, start=1))
    package(mod=mod)
    before = harvest(processes=1)
    package(version="1.1", mod=mod.replace(sentence(1), sentence(4)))
    after = harvest(processes=1)
    assert before.hash != after.hash
    changed = [split for split in pydocs.SPLITS if before.content_hash(split) != after.content_hash(split)]
    assert changed == ["test"]


def test_nothing_to_harvest_is_an_error_that_leaves_no_corpus(package, tmp_path):
    package(mod="x = 1\n")
    pytest.raises(BadData, harvest, processes=1).match("fake")
    assert not list((tmp_path / "raw").rglob("*.parquet"))
    pytest.raises(BadSetting, harvest, processes=0).match("at least 1")


def test_concurrent_callers_harvest_once_and_all_get_the_result(package, monkeypatch):
    package(mod=function("f", sentence(1)))
    builds, build = [], pydocs._build

    def slow_build(*arguments):
        builds.append(1)
        time.sleep(0.2)
        build(*arguments)

    monkeypatch.setattr(pydocs, "_build", slow_build)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: len(everything(harvest(processes=1))), range(4)))
    assert results == [1, 1, 1, 1] and builds == [1]


def test_a_full_disk_leaves_the_earlier_corpus_whole(package, monkeypatch):
    package(mod=function("f", sentence(1)))
    made = harvest(processes=1)
    before = made.file.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetWriter, "write_table", full)
        pytest.raises(DiskFull, harvest, force=True, processes=1)
    assert made.file.read_bytes() == before
    assert sorted(p.name for p in made.folder.iterdir()) == [".lock", "docs.parquet", "stats.json"]
    assert harvest(processes=1) == Corpus(made.folder, made.hash)


def test_workers_end_when_the_process_they_read_for_is_killed():
    reading, writing = os.pipe()
    if (owner := os.fork()) == 0:
        parent = os.getpid()
        if os.fork() == 0:
            pydocs._end_with(parent)
            os.write(writing, b"watching")
            time.sleep(60)
            os.write(writing, b"still alive")
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 20) == b"watching"
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert os.read(reading, 20) == b""  # closed by the last process that held it
    os.close(reading)
