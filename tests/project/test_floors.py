"""The package is a house: imports go down its floors, never up, and never in circles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "minivlm"
FLOORS = """
    errors | files | attention rope masks cache losses | layers generate distributed
    | configs checkpoints processing speed | vision text data adapters | models world | evaluation looking
    | training | checks | classroom | cli
"""  # bottom up; a room is a folder, or a file in the root
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS.split("|")) for room in rooms.split()}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imported(file: str) -> set[str]:
    """Which files of the package a file imports, wherever in it; a folder is its `__init__`."""
    found = set()
    for node in ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "minivlm":
            module = (node.module or "").removeprefix("minivlm").lstrip(".")
            for name in (f"{module}.{alias.name}".lstrip(".") for alias in node.names):
                candidates = (name, f"{name}.__init__", module, f"{module}.__init__")
                found.add(next(candidate for candidate in candidates if candidate in FILES))
    return found - {file}


@pytest.mark.parametrize("file", sorted(FILES.keys() - {"__init__", "__main__"}))
def test_no_import_goes_up(file: str) -> None:
    room = file.partition(".")[0]
    for other in imported(file):
        below = other.partition(".")[0]
        assert below == room or FLOOR_OF[below] < FLOOR_OF[room], f"{file} imports {other}"


def test_no_imports_in_a_circle() -> None:
    TopologicalSorter({file: imported(file) for file in FILES}).prepare()  # raises CycleError


def test_the_root_is_an_alphabet() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 13
