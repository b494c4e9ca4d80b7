"""What the front page promises: its examples run, its commands, links and lists are those of the checkout."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata

import house
import nbformat
import pytest
import torch
from packaging.specifiers import SpecifierSet

from lmcompress import compress, measure
from lmcompress.models.anatomy import prunable
from lmcompress.paths import NOTEBOOKS, ROOT
from lmcompress.study import study
from tests.test_sweep import save_tiny, write_reviews
from tests.tiny_models import tiny

PAGES = ["README.md", "CONTRIBUTING.md", "LOG.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    """The contents of a page's fenced blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def under(heading: str) -> str:
    """The text of README from `heading` to the next one of its level."""
    return re.split(r"^## ", README.split(f"\n## {heading}\n")[1], flags=re.M)[0]


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    lines = "\n".join(blocks("sh", page)).splitlines()
    return [line for line in (line.split("  #")[0].strip() for line in lines) if line]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Run the README's Python of one heading on a tiny model and a labelled file; return its names."""
    fake = {"peak_bytes": 1, "peak_kind": "not measured in this test"}
    monkeypatch.setattr(measure, "peak_memory", lambda *a, **k: fake)
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(compress, "_REGISTRY", compress.registered())
    model, reviews = save_tiny(tmp_path / "model"), write_reviews(tmp_path / "reviews.csv", 40, seed=1)
    more = write_reviews(tmp_path / "more.csv", 150, seed=2)

    def run(heading: str) -> dict:
        code = blocks("python", under(heading))[0]
        for written in ("path/or/hub-id", "pocket/minilm-pydocs"):
            code = code.replace(f'"{written}"', repr(model))
        for written in ('"reviews.csv"', '"pydocs-library"'):
            code = code.replace(written, f"{reviews!r}, train_path={more!r}")  # else it harvests
        assert code.count(model) == code.count(reviews) == 1, (
            "the example names its model and task otherwise now"
        )
        names: dict = {}
        exec(compile(code, f"README, {heading}", "exec"), names)
        return names

    return run


def test_the_own_model_example_gives_a_row_with_all_that_the_text_lists(example):
    row = example("Measure on your own model")["row"]
    assert row["technique"] == "wanda" and row["achieved"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert row["quality"]["low"] <= row["quality"]["value"] <= row["quality"]["high"]
    assert row["quality"]["difference"]["n"] == 40 and row["verdict"]["quality"]
    assert len(row["memory"]["formats"]) == 6 and row["compute"]
    assert all(shape["aa_ratio"] > 0 for shape in row["latency"]["shapes"].values())


def test_the_technique_example_is_a_technique(example, capsys):
    names = example("Add a technique")
    rows = {row["technique"]: row for row in names["study"].store.rows()}
    assert set(rows) == {"dense", "magnitude-layer", "signs"}
    assert rows["signs"]["achieved"] == {"layers": 12, "values_per_row": 2}
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in printed] == ["dense", "magnitude-layer", "signs"]
    for family in ("gpt2", "t5"):
        dense = tiny(family)
        before = {name: p.clone() for name, p in dense.named_parameters()}
        changed, report = compress.get("signs")(dense)
        assert report.layers == len(prunable(dense))
        for old, new in zip(prunable(dense), prunable(changed)):
            size = old.weight2d().abs().mean(dim=1, keepdim=True)
            torch.testing.assert_close(new.weight2d().abs(), size.expand_as(old.weight2d()))
            assert ((new.weight2d() > 0) == (old.weight2d() >= 0)).all()
        touched = {f"{layer.name}.weight" for layer in prunable(dense)}
        for name, parameter in changed.named_parameters():
            assert torch.equal(dict(dense.named_parameters())[name], before[name]), "its argument was changed"
            assert name in touched or torch.equal(parameter, before[name])


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md", "data/raw/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            anchors = [
                "".join(c for c in h.lower() if c.isalnum() or c in " -").replace(" ", "-") for h in headings
            ]
            assert anchor in anchors, f"{page} links to {target}"


@pytest.mark.parametrize("page", [*PAGES, "Containerfile", "environment.yml", ".ci/run"])
def test_every_make_target_that_a_page_names_is_one(page):
    targets = set(re.findall(r"^([a-z]+):.*##", MAKEFILE, re.M))
    named = set(re.findall(r"\bmake ((?!sure\b)[a-z]+)\b", (ROOT / page).read_text(encoding="utf-8")))
    named = {word for word in named if f"make {word}" in code_of(page)}
    assert named <= targets


def code_of(page: str) -> str:
    """What stands between backticks in a page; a file that is no Markdown is all code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if not page.endswith(".md"):
        return text
    return "\n".join([*re.findall(r"```.*?```", text, re.S), *re.findall(r"`[^`\n]+`", text)])


def test_the_table_has_every_notebook_with_the_question_it_asks():
    rows = dict(re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\)[^|]*\| ([^|]*?) \|", README, re.M))
    titles = {}
    for path in NOTEBOOKS.glob("[0-9]*.ipynb"):
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
        titles[path.stem] = title.removeprefix("# ")
    assert list(rows) == sorted(titles)
    assert {name: titles[name] for name in rows if not rows[name].startswith(titles[name])} == {}


def test_the_package_layout_names_every_folder_room_and_module():
    (listing,) = blocks("", under("Package layout"))
    words = set(re.findall(r"[\w.]+", listing))
    folders = {
        path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    }
    assert {name for name in folders - {"build"} if not name.endswith(".egg-info")} <= words
    assert {module.split(".")[1] for layer in house.layers() for module in layer} <= words


def test_an_install_by_hand_is_what_make_does():
    apart = re.search(r"^APART := (.+)$", MAKEFILE, re.M)[1]
    assert f"pip install {apart}" in commands(under("Install"))
    for text in (
        json.dumps(NOTEBOOKS.joinpath("_template.ipynb").read_text()),
        (ROOT / "environment.yml").read_text(),
    ):
        assert apart in text


def test_every_pin_installs_on_every_python_that_is_promised():
    """A pin that the first 3.11 refuses has pip search for hours: Debian 12 has 3.11.2."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert len(pins) > 150
    for name, pin in pins:
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        python = SpecifierSet(installed.metadata.get("Requires-Python") or "")
        if installed.version.split("+")[0] == pin:
            assert python.contains("3.11.0") and python.contains("3.12.0"), (
                f"{name}=={pin} wants Python {python}"
            )


WHEEL = "from setuptools.build_meta import build_wheel; print(build_wheel({!r}))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with the packages as `pip install .` puts them, and the names in the wheel."""
    folder = tmp_path_factory.mktemp("install")
    committed = subprocess.check_output(
        ["git", "ls-files", "-z", "helpers", "lmcompress"], cwd=ROOT, text=True
    )
    source = folder / "source"
    for name in {*committed.split("\0")[:-1], "pyproject.toml", "README.md", "LICENSE"}:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-c", WHEEL.format(str(folder))], cwd=source, check=True, capture_output=True
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
        files = {name for name in committed.split("\0")[:-1] if (ROOT / name).is_file()}
        return folder / "site", set(wheel.namelist()), files


def test_a_wheel_holds_every_file_of_both_packages(installed):
    _, names, committed = installed
    assert committed - names == set()
    assert any(name.endswith("entry_points.txt") for name in names)


@pytest.mark.parametrize(
    "command",
    ["lmcompress.study.decision", "helpers.report --run run", "helpers.report --check", "helpers.run.runner"],
)
def test_without_a_checkout_a_command_line_says_what_is_missing_and_how_to_get_it(
    installed, tmp_path, command
):
    environment = os.environ | {"PYTHONPATH": str(installed[0])}
    for name in ("STUDY_HOME", "STUDY_RUNS"):
        environment.pop(name, None)
    run = [sys.executable, "-m", *command.split()]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode and "Traceback" not in said and str(tmp_path) in said
    assert "Clone the repository" in said
