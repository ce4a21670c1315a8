"""Packages that only some commands need: where one is missing, say which extra has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from minivlm.errors import InputError


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
            f"python -m pip install 'minivlm[{name}]'"
        ) from error
