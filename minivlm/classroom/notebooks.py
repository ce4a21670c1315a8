"""Read notebooks that other people wrote, some of which will be broken."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import stat
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm import checks
from minivlm.errors import InputError, extra

if TYPE_CHECKING:
    from nbformat import NotebookNode

PACKED = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
}
MAX_BYTES = 50_000_000  # a larger notebook prints too much to be read


def read_notebook(path: Path) -> NotebookNode:
    """A notebook in format 4.

    Raises InputError: the file cannot be read, is too large, is not JSON, or is not a notebook.
    """
    with extra("notebooks"):
        import nbformat
    text = _read_text(path)
    try:
        json.loads(text)
    except RecursionError as error:
        raise InputError(f"{path} is nested too deep for a notebook: save it again in Jupyter") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON, so it is not a notebook: save it again in Jupyter") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about cells without ids, which get some
            notebook = nbformat.reads(text, as_version=4)
            nbformat.validate(notebook)
    except Exception as error:  # other JSON can raise any kind of error inside nbformat
        raise InputError(f"{path} is JSON, but not a notebook: save it again in Jupyter") from error
    return notebook


def _read_text(path: Path) -> str:
    """Raises InputError: the file cannot be read, is too large, or is not text in UTF-8."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not an ordinary file: hand in the notebook itself")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES // 10**6} MB: clear its outputs and save it")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    for beginning, kind in PACKED.items():
        if data.startswith(beginning):
            raise InputError(f"{path} is {kind}, not a notebook: unpack it")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is text in UTF-16, and a notebook is in UTF-8: save it again in Jupyter")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8, so it is not a notebook: export it again") from error


def module_of(notebook: NotebookNode) -> str | None:
    """The module of `minivlm.checks` that most cells use: it tells which notebook of the course this is."""
    modules = {module.name for module in pkgutil.iter_modules(checks.__path__)}
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    used = Counter(name for source in sources for name in re.findall(r"\bchecks\.(\w+)", source))
    known = [name for name, _ in used.most_common() if name in modules]
    return known[0] if known else None


def exercises_of(module: str) -> list[str]:
    """Names of the exercises in a module of checks."""
    solutions = importlib.import_module(f"minivlm.checks.{module}").solutions
    return [name for name, member in vars(solutions).items() if isinstance(member, staticmethod)]
