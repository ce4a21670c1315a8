"""The one exception that a user can fix, and a kind of it for several processes.

Whatever is wrong with a picture, a prompt or a folder that a user supplies is raised as an `InputError`: one
line that says what was wrong, what was expected and what to do. It is a `ValueError`, so library users need
not know it; the command line prints it without a traceback and exits with status 2.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from a user. The message is one line and says what to do about it."""


class ToldElsewhere(InputError):
    """An error that process 0 has reported, too: it need not be shown twice."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Wrap imports of packages that belong to an extra in pyproject.toml.

    Raises InputError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed, but comes with the extra [{name}]: "
            f"{sys.executable} -m pip install 'minivlm[{name}]'"
        ) from error
