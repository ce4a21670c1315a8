"""Collecting garbage in a process that has imported everything."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Inside, gc.collect() looks at what came after. What other tests hold would take it over a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
