"""The packages keep to their budgets and layers; each measure finds what it is for."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import house
import mutants
import pytest

FIGURES, BUDGETS = house.measurements(), house.budgets()


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(name):
    assert FIGURES[name] <= BUDGETS[name], "see [tool.house] in pyproject.toml"


def test_rooms_import_only_rooms_below_and_never_in_a_circle():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=house.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_room_and_module_has_its_layer():
    named = set().union(*house.layers())
    modules = {
        f"{package}.{path.stem}"
        for package in house.PACKAGES
        for path in (house.ROOT / package).iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }
    assert named == modules


def test_names_are_counted_where_they_are_bound():
    tree = ast.parse("def f(one, *, layer): found = [own for own in layer]\nprint(kept)")
    assert sorted(house.bindings(tree)) == ["found", "layer", "one", "own"]


@pytest.mark.parametrize("package", house.PACKAGES)
def test_a_front_door_offers_what_editors_see_and_imports_nothing_before(package):
    door = importlib.import_module(package)
    tree = ast.parse((house.ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If)).body
    names = {alias.asname or alias.name for node in block for alias in node.names}
    assert names == set(door.__all__) <= set(dir(door)) and len(names) <= 18
    assert all(getattr(door, name).__module__.startswith(package) for name in names)
    with pytest.raises(AttributeError, match=f"offers.*{min(names)}"):
        door.nothing  # noqa: B018
    code = f"import sys, {package}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_every_mutant_still_changes_a_line():
    assert mutants.untrue(mutants.MUTANTS) == []
    assert all((house.ROOT / "tests" / name).is_file() for m in mutants.MUTANTS for name in m.tests.split())
