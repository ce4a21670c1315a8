"""The one exception that is the user's to fix.

Everything that can go wrong with a picture, a prompt or a folder given from outside is raised as an
`InputError`: one line that says what was wrong, what was expected and what to do. It is a `ValueError`, so
that library users need not know it; the command line prints it without a traceback and exits with 2.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from a user. The message is one line and says what to do about it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of packages that belong to an extra of pyproject.toml.

    Raises InputError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed, which the extra [{name}] brings: "
            f"{sys.executable} -m pip install 'minivlm[{name}]'"
        ) from error
