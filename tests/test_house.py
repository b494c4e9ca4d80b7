"""The packages keep to their budgets and layers; each measure finds what it is for."""

import ast
import subprocess
import sys
from pathlib import Path

import house
import pytest

FIGURES, BUDGETS, TODAY = house.measurements(), house.budgets(), house.HOUSE.get("today", {})


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(name):
    assert FIGURES[name] <= TODAY.get(name, BUDGETS[name]), "see [tool.house] in pyproject.toml"


def test_rooms_import_only_rooms_below_and_never_in_a_circle():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=house.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_room_and_module_has_its_layer():
    named = set().union(*house.layers())
    there = {
        f"{package}.{path.stem}"
        for package in house.PACKAGES
        for path in (house.ROOT / package).iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }
    assert named == there


def test_names_are_counted_where_they_are_bound():
    tree = ast.parse("def f(one, *, layer): found = [own for own in layer]\nprint(kept)")
    assert sorted(house.bindings(tree)) == ["found", "layer", "one", "own"]
