"""What holds for every exercise: its check accepts the solutions, and is polite about a blank.

Which mistakes each check names is tested in test_checks_*.py.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from notebooks_and_sources import NOTEBOOKS, definitions, read_cells

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.classroom.grading import _run_definitions


def exercises() -> list[Any]:
    """Notebook, module of its checks and name, for each exercise."""
    found = []
    for path in NOTEBOOKS:
        for cell in read_cells(path):
            if "check" in cell.tags:
                called = re.search(r"\bchecks\.(\w+)\.(\w+)\(", cell.source)
                assert called is not None
                found.append(pytest.param(path, *called.groups(), id=".".join(called.groups())))
    return found


each_exercise = pytest.mark.parametrize(("path", "module", "name"), exercises())


def from_the_notebook(path: Path, name: str) -> Callable[..., Any]:
    """The function that the exercise cell defines, with what `progress` runs of the notebook around it."""
    cells = [cell for cell in read_cells(path) if cell.kind == "code"]
    scope: dict[str, Any] = {}
    for cell in cells:
        _run_definitions(ast.parse(cell.source).body, scope, seconds=60)
        if cell.marked_file is not None:  # what the cell defines is the package's
            package = importlib.import_module(cell.marked_file.removesuffix(".py").replace("/", "."))
            scope |= {name: getattr(package, name) for name in definitions(ast.parse(cell.source))}
    exercise = next(cell for cell in cells if "exercise" in cell.tags and f"def {name}(" in cell.source)
    exec(exercise.source, scope)
    return scope[name]


def check_of(module: str, name: str) -> Callable[[Callable[..., Any]], None]:
    return getattr(getattr(checks, module), name)


@each_exercise
@pytest.mark.parametrize("source", ["solutions", "notebook"])
def test_accepts_right_answers(
    path: Path, module: str, name: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = getattr(getattr(checks, module).solutions, name)
    check_of(module, name)(reference if source == "solutions" else from_the_notebook(path, name))
    assert capsys.readouterr().out.startswith("Right: ")


@each_exercise
def test_a_blank_is_not_yet(path: Path, module: str, name: str) -> None:
    def blank(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("your turn")

    with pytest.raises(NotYet, match="blank"):
        check_of(module, name)(blank)


@each_exercise
def test_a_forgotten_return_is_not_yet(path: Path, module: str, name: str) -> None:
    with pytest.raises(NotYet, match="return"):
        check_of(module, name)(lambda *args, **kwargs: None)


@each_exercise
def test_an_error_inside_is_not_yet(path: Path, module: str, name: str) -> None:
    with pytest.raises(NotYet, match="ZeroDivisionError"):
        check_of(module, name)(lambda *args, **kwargs: 1 / 0)


def test_a_notebook_shows_the_hint_and_not_the_code_of_the_check() -> None:
    source = "from minivlm import checks\nchecks.expect(False, 'the hint')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, allow_errors=True, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.traceback == ["Not yet: the hint"]
