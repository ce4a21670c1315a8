"""What a student's notebook has solved. This file runs other people's code, so only in a process of its own.

`minivlm progress` (see progress.py) starts

    python -m minivlm.classroom.grading NOTEBOOK --report DESCRIPTOR

once for each notebook, and reads its report: lines of JSON, the last of them an empty object. Answers are
judged by the checks of the installed package, not by the notebook's check cells or its stored outputs. What a
notebook computes between its exercises takes minutes and matters to no check, so of those cells only imports,
definitions and constants are run, unless `--whole` asks for everything.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm import checks
from minivlm.classroom import landlock
from minivlm.classroom.notebooks import exercises_of, module_of, read_notebook
from minivlm.errors import extra

if TYPE_CHECKING:
    from nbformat import NotebookNode

LONGEST_REMARK = 300  # characters
LARGEST_FILE = 200 * 2**20  # bytes
DEVICES = (Path("/dev/null"), Path("/dev/shm"))  # what cooperating processes write to
# The parts of an expression without names and calls.
CONSTANT = (
    ast.Constant,
    ast.Tuple,
    ast.List,
    ast.Dict,
    ast.UnaryOp,
    ast.unaryop,
    ast.BinOp,
    ast.operator,
    ast.expr_context,
)


def judge(notebook: NotebookNode, whole: bool = False, seconds: float = 0) -> Iterator[dict[str, Any]]:
    """Run a notebook. Yields {"cell": number} before each cell and, for each exercise in it,
    {"name": str, "passed": bool, "remark": str}, where the remark is the check's hint.

    An answer is what a name is bound to right before its catch-up cell, which binds it to the solution.
    A cell or check that takes longer than `seconds` (0: no limit) is interrupted, and the next ones run.
    """
    with extra("notebooks"):
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config

    module = module_of(notebook)
    if module is None:
        return
    check_module = importlib.import_module(f"minivlm.checks.{module}")
    waiting = exercises_of(module)
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    answered: set[str] = set()

    def verdicts(names: set[str]) -> Iterator[dict[str, Any]]:
        for name in [name for name in waiting if name in names & answered]:
            waiting.remove(name)
            passed, remark = _ask_check(getattr(check_module, name), shell.user_ns.get(name), seconds)
            yield {"name": name, "passed": passed, "remark": remark}

    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code":
            continue
        yield {"cell": number}
        caught_up = set(re.findall(r"\bsolutions\.(\w+)", cell.source))
        yield from verdicts(caught_up)
        try:
            tree = ast.parse(shell.transform_cell(cell.source))  # without IPython's %magic
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            tree = ast.Module([], [])
        answers = set() if caught_up else _bound(tree).intersection(waiting)
        answered |= answers
        if answers or caught_up or whole:
            with suppress(TimeoutError), _at_most(seconds):
                shell.run_cell(cell.source)  # shows errors of the cell without raising them
        else:
            _run_definitions(tree, shell.user_ns, seconds)
    yield from verdicts(answered)


def _run_definitions(tree: ast.Module, scope: dict[str, Any], seconds: float) -> None:
    """Run the imports, definitions and constants of a cell. If one fails, the next ones still run."""
    for node in filter(_defines, tree.body):
        with suppress(Exception, SystemExit), _at_most(seconds):
            exec(compile(ast.Module([node], []), "notebook", "exec"), scope)


def _ask_check(check: Callable[[Any], None], answer: Any, seconds: float) -> tuple[bool, str]:
    """Whether a check accepts an answer, and what it says if not."""
    if answer is None:
        return False, "its cell stops with an error"
    try:
        with _at_most(seconds):
            check(answer)
    except (Exception, SystemExit) as error:  # NotYet has the hint; other errors are the answer's too
        hint = str(error) if isinstance(error, checks.NotYet) else f"{type(error).__name__}: {error}"
        return False, " ".join(hint.split())[:LONGEST_REMARK]
    return True, ""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer. Code that catches everything keeps running."""

    def stop(signal_number: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds:g} seconds: an endless loop?")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _bound(tree: ast.Module) -> set[str]:
    """Names of functions and variables that a cell binds at its top level."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    found = [name for node in assigned for name in ast.walk(node) if isinstance(name, ast.Name)]
    return names | {name.id for name in found if isinstance(name.ctx, ast.Store)}


def _defines(node: ast.stmt) -> bool:
    """Whether a statement is an import, a function, a class or a constant."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return node.value is not None and all(isinstance(part, CONSTANT) for part in ast.walk(node.value))
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return isinstance(node, kinds)


def limit(seconds: int, memory: int) -> None:
    """Limit this process and all that it starts: CPU time (seconds), memory and file size (bytes)."""
    try:
        import resource
    except ImportError:  # Windows has none of these
        return
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS has RLIMIT_AS but rejects it
            resource.setrlimit(kind, (value, value))


def main() -> None:
    """Judge one notebook and end the process, whatever threads the notebook left running."""
    parser = argparse.ArgumentParser()
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where files may be changed")
    parser.add_argument("--report", type=int, required=True, help="the file descriptor to write to")
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--memory", type=int, required=True, help="bytes")
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    os.set_inheritable(options.report, False)
    limit(int(2 * options.seconds) + 1, options.memory)
    notebook = read_notebook(options.notebook)
    landlock.change_only([options.folder, *filter(Path.exists, DEVICES)])
    for line in judge(notebook, options.whole, seconds=options.seconds / 4):
        os.write(options.report, f"{json.dumps(line)}\n".encode())
    os.write(options.report, b"{}\n")
    os._exit(0)


if __name__ == "__main__":
    main()
