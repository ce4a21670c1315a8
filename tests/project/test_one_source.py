"""A definition in a cell marked `# minivlm/<file>.py` is the package's, and nothing taught is missing.

Compared are syntax trees without docstrings: a cell may leave those out, since the prose around it says the
same. A long class may be shown in pieces: `class Name(Name):` in a marked cell goes on with a class that an
earlier cell began, and every method it holds must be the package's.
"""

from __future__ import annotations

import ast
import difflib

import pytest
from notebooks_and_sources import NOTEBOOKS, ROOT, Cell, definitions, members, normalized, read_cells

MARKED = [cell for path in NOTEBOOKS for cell in read_cells(path) if cell.marked_file]

# Files that the notebooks teach in full.
TAUGHT = [
    "attention",
    "layers",
    "rope",
    "masks",
    "cache",
    "losses",
    "generate",
    "vision/siglip",
    "text/gemma",
    "models/sizes",
    "models/paligemma",
    "processing/boxes",
]
# Public names of these files that wait for a later notebook, and which one that is.
LATER: dict[str, str] = {}
# Public names of these files that no notebook shows, and why. Configs are lists of numbers: no reason needed.
NOT_SHOWN = {
    "attend_without_bf16": "for processors that multiply fp32 only",
    "has_amx": "asks what the processor can do",
    "onednn_has_bf16": "asks what the processor can do",
    "build_decoder": "chooses between two classes",
    "check_size": "refuses pictures without area",
    "last_token_indices": "counts padding; notebook 06 has the same line inside `prefill`",
    "explain_nonfinite": "only writes an error message",
    "open_folder": "finds out which processor fits a folder",
    "paligemma2_config": "a table of published numbers",
}


def _complaint(cell: Cell, name: str, expected: str, shown: str) -> str:
    diff = difflib.unified_diff(
        expected.splitlines(),
        shown.splitlines(),
        cell.marked_file or "",
        f"{cell.notebook}, cell {cell.number}",
        lineterm="",
    )
    return f"{name} differs from the package:\n" + "\n".join(diff)


@pytest.mark.parametrize("cell", MARKED, ids=lambda cell: f"{cell.notebook}-{cell.number}")
def test_marked_cell_equals_the_package(cell: Cell) -> None:
    path = ROOT / str(cell.marked_file)
    assert path.exists(), f"{cell.marked_file} does not exist"
    package = definitions(ast.parse(path.read_text(encoding="utf-8")))
    shown = definitions(ast.parse(cell.source))
    assert shown, "a marked cell must define something"
    for name, node in shown.items():
        assert name in package, f"{name} is not in {cell.marked_file}"
        original = package[name]
        goes_on = isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == [name]
        in_parts = goes_on or _is_continued(cell, name)
        if not in_parts:
            assert normalized(node) == normalized(original), _complaint(
                cell, name, normalized(original), normalized(node)
            )
            continue
        assert isinstance(node, ast.ClassDef)
        assert isinstance(original, ast.ClassDef)
        there = members(original)
        for member, code in members(node).items():
            assert member in there, f"{name}.{member} is not in {cell.marked_file}"
            assert code == there[member], _complaint(cell, f"{name}.{member}", there[member], code)


def _is_continued(cell: Cell, name: str) -> bool:
    """Whether a later cell of the same notebook goes on with this class."""
    return any(
        other.notebook == cell.notebook
        and other.number > cell.number
        and f"class {name}({name}):" in other.source
        for other in MARKED
    )


@pytest.mark.parametrize("notebook", sorted({cell.notebook for cell in MARKED}))
def test_classes_shown_in_pieces_are_complete(notebook: str) -> None:
    pieces: dict[tuple[str, str], set[str]] = {}
    continued: set[tuple[str, str]] = set()
    for cell in MARKED:
        if cell.notebook != notebook:
            continue
        for name, node in definitions(ast.parse(cell.source)).items():
            if isinstance(node, ast.ClassDef):
                key = (str(cell.marked_file), name)
                pieces.setdefault(key, set()).update(members(node))
                if [ast.unparse(base) for base in node.bases] == [name]:
                    continued.add(key)
    for file, name in continued:
        original = definitions(ast.parse((ROOT / file).read_text(encoding="utf-8")))[name]
        assert isinstance(original, ast.ClassDef)
        assert pieces[file, name] == set(members(original)), (
            f"{name} is shown in pieces, and some are missing"
        )


@pytest.mark.parametrize("file", TAUGHT)
def test_every_taught_name_appears_in_a_notebook(file: str) -> None:
    path = ROOT / "minivlm" / f"{file}.py"
    public = {
        name
        for name, node in definitions(ast.parse(path.read_text(encoding="utf-8"))).items()
        if not name.startswith("_") and isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    shown = {
        name
        for cell in MARKED
        if cell.marked_file == f"minivlm/{file}.py"
        for name in definitions(ast.parse(cell.source))
    }
    missing = {
        name for name in public - shown - LATER.keys() - NOT_SHOWN.keys() if not name.endswith("Config")
    }
    assert not missing, f"no notebook shows {sorted(missing)} of minivlm/{file}.py"


def test_names_for_later_are_not_shown_yet() -> None:
    shown = {name for cell in MARKED for name in definitions(ast.parse(cell.source))}
    assert not shown & LATER.keys(), f"shown already, take them off the list: {sorted(shown & LATER.keys())}"
