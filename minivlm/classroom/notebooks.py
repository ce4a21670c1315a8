"""Read notebooks that other people wrote, some of which will be broken."""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm import checks
from minivlm.errors import InputError, extra

if TYPE_CHECKING:
    from nbformat import NotebookNode

MAX_BYTES = 50_000_000  # a larger notebook prints too much to be read


def read_notebook(path: Path) -> NotebookNode:
    """A notebook in format 4.

    Raises InputError: the file cannot be read, is too large, is not JSON, or is not a notebook.
    """
    with extra("notebooks"):
        import nbformat
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES // 10**6} MB: clear its outputs and save it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about cells without ids, which get some
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except nbformat.reader.NotJSONError as error:
        raise InputError(f"{path} is not JSON, so it is not a notebook: save it again in Jupyter") from error
    except InputError:
        raise
    except Exception as error:  # other JSON can raise any kind of error inside nbformat
        raise InputError(f"{path} is JSON, but not a notebook: save it again in Jupyter") from error
    return notebook


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
