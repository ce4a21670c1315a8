"""Reading notebooks that others wrote, of which some will be broken."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.errors import InputError
from minivlm.extras import extra

if TYPE_CHECKING:
    from nbformat import NotebookNode

LARGEST = 50_000_000  # bytes: one that stores more prints too much to be read


def read_notebook(path: Path) -> NotebookNode:
    """A notebook in format 4.

    Raises InputError: it is no file that can be read, too large, not JSON, or not a notebook.
    """
    with extra("notebooks"):
        import nbformat
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} is larger than {LARGEST // 10**6} MB: clear its outputs and save it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cells without ids, which get some
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except nbformat.reader.NotJSONError as error:
        raise InputError(f"{path} is not JSON, so it is not a notebook: save it again in Jupyter") from error
    except InputError:
        raise
    except Exception as error:  # JSON of any other kind ends in any kind of error inside nbformat
        raise InputError(f"{path} is JSON, but not a notebook: save it again in Jupyter") from error
    return notebook
