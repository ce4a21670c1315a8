"""A notebook with a pause can be started behind it: the second half uses no name of the first."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from notebooks_and_sources import NOTEBOOKS, Cell, read_cells


def pause_of(path: Path) -> int | None:
    """The cell with the heading of the pause."""
    return next((c.number for c in read_cells(path) if c.source.startswith("## Pause")), None)


def bound(cells: list[Cell]) -> set[str]:
    """Names that these cells bind outside of functions and classes: a function's own names are its own."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(cell.source) for cell in cells]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            todo.append(node)
    return names


PAUSED = [path for path in NOTEBOOKS if pause_of(path) is not None]


@pytest.mark.parametrize("path", PAUSED, ids=lambda path: path.stem)
def test_the_second_half_stands_alone(path: Path) -> None:
    code = [cell for cell in read_cells(path) if cell.kind == "code"]
    before = [cell for cell in code if cell.number < (pause_of(path) or 0)]
    known: set[str] = set()
    for cell in code[len(before) :]:
        known |= bound([cell])
        loaded = {n.id for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)}
        missing = (loaded & bound(before)) - known - own_names(cell)
        assert not missing, f"cell {cell.number} of {path.name} needs {sorted(missing)} of the first half"


def own_names(cell: Cell) -> set[str]:
    """Arguments and variables of the cell's functions."""
    nodes = list(ast.walk(ast.parse(cell.source)))
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return arguments | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def test_a_notebook_has_a_pause() -> None:
    assert PAUSED
