"""Products of one row with a matrix, at the speed of memory.

Writing a token multiplies one row with every matrix of the decoder: two operations for each weight that is
read. What it takes is the time of reading. On a CPU, PyTorch gives bf16 products to oneDNN, whose kernels
are made for many rows: with one row they reach about half of what the memory can deliver, and PyTorch's own
kernel most of it (bench/inference.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

_switched_off: ContextVar[bool] = ContextVar("switched_off", default=False)


def at_the_speed_of_memory(rows: Tensor) -> AbstractContextManager[None]:
    """Inside, products of one row do without oneDNN. With more rows, or on another device, nothing changes.

    Args:
        rows: [B, ...], what goes through the model: only its length and its device matter.
    """
    return _without_onednn() if len(rows) == 1 and rows.device.type == "cpu" else nullcontext()


@contextmanager
def _without_onednn() -> Iterator[None]:
    was_on = bool(torch.backends.mkldnn.enabled)
    token = _switched_off.set(was_on)
    _switch(False)
    try:
        yield
    finally:
        _switch(was_on)
        _switched_off.reset(token)


def is_one_row() -> bool:
    """Whether products of one row are meant to read at the speed of memory now."""
    return _switched_off.get()


@contextmanager
def as_many_rows() -> Iterator[None]:
    """Inside, oneDNN is back where `at_the_speed_of_memory` took it away, and nowhere else."""
    if not _switched_off.get():
        yield
        return
    _switch(True)
    try:
        yield
    finally:
        _switch(False)


def _switch(on: bool) -> None:
    torch.backends.mkldnn.enabled = on  # type: ignore[assignment]
