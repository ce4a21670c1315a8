"""What a student's notebook has solved. This file runs other people's code, so only in a process of its own.

`minivlm progress` (see progress.py) starts

    python -m minivlm.classroom.grading NOTEBOOK --report DESCRIPTOR

once for each notebook, and reads its report: lines of JSON, the last of them an empty object. When it closes
standard input, or ends, everything that the notebook has started ends, too (supervise.py). Answers are
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
import signal
import symtable
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from minivlm import checks
from minivlm.classroom import landlock, namespace
from minivlm.classroom.notebooks import exercises_of, module_of, read_notebook
from minivlm.classroom.supervise import supervise
from minivlm.errors import extra

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell
    from nbformat import NotebookNode

LONGEST_REMARK = 300  # characters
NOT_KEPT = "its cell runs, but keeps nothing: remove its magic, as %%timeit"
KEEPING = ("time", "capture", "prun")  # magics that run what they are given as if they were not there
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
    """Run a notebook. Yields {"cell": number} before each cell and, for each answer in it,
    {"name": str, "passed": bool, "remark": str}, where the remark is the check's hint.

    An answer is what a cell binds an exercise's name to, unless that is the package's own. It is judged
    right before another cell binds the name again, as a catch-up cell does, or at the end. The first one
    that passes counts. A cell or check that takes longer than `seconds` (0: no limit) is interrupted, and
    the next ones run.
    """
    module = module_of(notebook)
    if module is None:
        return
    check_module = importlib.import_module(f"minivlm.checks.{module}")
    waiting = exercises_of(module)
    shell = _kernel()
    missing: dict[str, str] = {}  # names that a cell should have bound, and why it has not
    answered: set[str] = set()

    def verdicts(names: set[str]) -> Iterator[dict[str, Any]]:
        for name in [name for name in waiting if name in names & answered]:
            answered.remove(name)
            if name in shell.user_ns:
                passed, remark = _ask_check(getattr(check_module, name), shell.user_ns[name], seconds)
            else:
                passed, remark = False, missing[name]
            if passed:
                waiting.remove(name)
            yield {"name": name, "passed": passed, "remark": remark}

    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code":
            continue
        yield {"cell": number}
        statements = _statements(shell, cell.source)
        bound = set().union(*map(_bound, statements)).intersection(waiting)
        yield from verdicts(bound)
        if bound or whole:
            remark = "its cell takes too long"
            with suppress(TimeoutError), _at_most(seconds):
                done = shell.run_cell(cell.source)  # shows errors of the cell without raising them
                remark = NOT_KEPT if done.success else "its cell stops with an error"
            missing |= dict.fromkeys(bound, remark)
        else:
            _run_definitions(_statements(shell, cell.source, KEEPING), shell.user_ns, seconds)
        if not cell.source.lstrip().startswith("# minivlm/"):  # which is the package's code, shown
            answered |= {name for name in bound if _own(name, statements, shell.user_ns)}
    yield from verdicts(answered)


def _kernel() -> InteractiveShell:
    """IPython with what a notebook's kernel adds to it, and without a terminal, which cannot be had here."""
    with extra("notebooks"):
        from ipykernel.zmqshell import KernelMagics
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config

    class Kernel(InteractiveShell):
        system = InteractiveShell.system_raw  # for !commands; IPython's own choice opens a terminal

        def enable_gui(self, gui: Any = None) -> None:
            """Windows are not shown."""

    config = Config()
    config.HistoryManager.enabled = False
    shell = Kernel.instance(config=config)
    shell.register_magics(KernelMagics)  # such as %autosave
    return shell


def _statements(shell: InteractiveShell, source: str, magics: Container[str] | None = None) -> list[ast.stmt]:
    """The statements of a cell. For a magic that is given some, as `%%time` is, those stand in its place,
    unless it is none of these `magics` (None: any)."""
    try:
        tree = ast.parse(shell.transform_cell(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: list[ast.stmt] = []
    for node in tree.body:
        match node:
            case ast.Expr(
                ast.Call(
                    ast.Attribute(attr="run_cell_magic" | "run_line_magic"),
                    [ast.Constant(str(magic)), *_, ast.Constant(str(given))],
                )
            ):
                if magics is None or magic in magics:
                    found += _statements(shell, given, magics)
            case _:
                found.append(node)
    return found


def _own(name: str, statements: Sequence[ast.stmt], scope: Mapping[str, Any]) -> bool:
    """Whether a name is bound to somebody's own work, or should have been; not to the package's solution."""
    value = scope.get(name)
    if isinstance(value, FunctionType) and value.__module__.startswith("minivlm."):
        return False
    return not any(
        isinstance(part, ast.Attribute)
        and part.attr == name
        and ast.unparse(part.value).split(".")[-1] == "solutions"
        for node in statements
        if name in _bound(node)
        for part in ast.walk(node)
    )


def _run_definitions(statements: Sequence[ast.stmt], scope: dict[str, Any], seconds: float) -> None:
    """Run the imports, definitions and constants of a cell. If one fails, the next ones still run."""
    for node in filter(_defines, statements):
        with suppress(Exception, SystemExit), _at_most(seconds):
            exec(compile(ast.Module([node], []), "notebook", "exec"), scope)


def _ask_check(check: Callable[[Any], None], answer: Any, seconds: float) -> tuple[bool, str]:
    """Whether a check accepts an answer, and what it says if not."""
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


def _bound(node: ast.stmt) -> set[str]:
    """Names that a statement binds outside of functions and classes, also inside of `if` and `with`."""
    try:
        table = symtable.symtable(ast.unparse(node), "notebook", "exec")
    except (SyntaxError, RecursionError):
        return set()
    return {one.get_name() for one in table.get_symbols() if one.is_assigned() or one.is_imported()}


def _defines(node: ast.stmt) -> bool:
    """Whether a statement is an import, a function, a class or a constant, or holds nothing else, as
    `try: import ...` does."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return node.value is not None and all(isinstance(part, CONSTANT) for part in ast.walk(node.value))
    if isinstance(node, ast.If | ast.Try | ast.With):
        return all(map(_defines, node.body))
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
    supervise()
    namespace.enter(options.folder)
    limit(int(2 * options.seconds) + 1, options.memory)
    notebook = read_notebook(options.notebook)
    landlock.change_only([options.folder, *filter(Path.exists, DEVICES)])
    for line in judge(notebook, options.whole, seconds=options.seconds / 4):
        os.write(options.report, f"{json.dumps(line)}\n".encode())
    os.write(options.report, b"{}\n")
    os._exit(0)


if __name__ == "__main__":
    main()
