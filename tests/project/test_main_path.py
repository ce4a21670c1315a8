"""A reader may skip what is optional: no cell of the main path needs it, and the minutes count both ways.

A section is optional if its heading ends with "(optional)". It reaches to the next heading of the same or a
higher level, and all of its cells have the tag `optional`.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
from notebooks_and_sources import NOTEBOOKS, Cell, read_cells

WORDS_A_MINUTE = 200
LINES_A_MINUTE = 15
NOT_READ = {"exercise", "check", "catch-up", "figure"}  # written by the reader, repeated, or only drawing

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def headings(cell: Cell) -> list[tuple[int, str]]:
    """Level and text of each heading in a markdown cell."""
    if cell.kind != "markdown":
        return []
    outside = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
    return [(len(marks), text.strip()) for marks, text in re.findall(r"^(#+) (.+)$", outside, re.MULTILINE)]


@each_notebook
def test_optional_sections_are_tagged(path: Path) -> None:
    level = 0  # of the optional section that we are in, 0 outside
    for cell in read_cells(path):
        for depth, text in headings(cell):
            if level and depth <= level:
                level = 0
            if not level and text.endswith("(optional)"):
                assert cell.source.startswith("#"), f"cell {cell.id}: an optional section begins a cell"
                level = depth
        assert cell.optional == bool(level), f"cell {cell.id} of {path.name}"


class Names(ast.NodeVisitor):
    """Names that a cell takes from earlier cells, and names that it gives to later ones."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.given: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            if node.id not in self.given:
                self.taken.add(node.id)
        else:
            self.given.add(node.id)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        inside = Names()
        values = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        for part in (*node.generators, *values):  # the generators bind first
            inside.visit(part)
        self.taken |= inside.taken - self.given

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)  # before its targets: x = x + 1 takes x
        for target in node.targets:
            self.visit(target)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.given |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        own = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        self.given.add(node.name)
        self.taken |= inside - own - self.given

    visit_ClassDef = visit_FunctionDef


@each_notebook
def test_the_main_path_needs_nothing_optional(path: Path) -> None:
    """As far as names tell; the order of cells is what counts, since a later definition comes too late."""
    main: set[str] = set()
    optional: dict[str, str] = {}  # name -> the optional cell that gave it last
    for cell in read_cells(path):
        if cell.kind != "code":
            continue
        names = Names()
        names.visit(ast.parse(cell.source))
        if cell.optional:
            optional |= dict.fromkeys(names.given, cell.id)
            continue
        missing = {name: optional[name] for name in names.taken - main if name in optional}
        assert not missing, f"cell {cell.id} needs optional cells: {missing}"
        main |= names.given


def minutes(cells: list[Cell]) -> int:
    """To read the prose and the code, and to solve the exercises, rounded up to five."""
    words = sum(len(re.findall(r"\w+(?:[-'.,]\w+)*", cell.prose)) for cell in cells)
    code = [
        cell.source.splitlines() for cell in cells if cell.kind == "code" and not NOT_READ & set(cell.tags)
    ]
    lines = sum(bool(line.strip()) for source in code for line in source)
    exercises = [re.search(r"^Difficulty: \S+ · (\d+) minutes", c.source, re.MULTILINE) for c in cells]
    solving = sum(int(found[1]) for found in exercises if found)
    return 5 * math.ceil((words / WORDS_A_MINUTE + lines / LINES_A_MINUTE + solving) / 5)


@each_notebook
def test_minutes_are_honest(path: Path) -> None:
    cells = read_cells(path)
    short, everything = minutes([cell for cell in cells if not cell.optional]), minutes(cells)
    line = f"**Minutes:** {short}"
    if everything > short:
        line += f" for the short path, {everything} with everything optional"
    assert re.search(rf"^{re.escape(line)}$", cells[0].source, re.MULTILINE), f"should be: {line}"
