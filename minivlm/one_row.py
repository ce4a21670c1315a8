"""Products of one row with a matrix, at the speed of memory.

Writing a token multiplies one row with every matrix of the decoder: two operations for each weight that is
read. What it takes is the time of reading. On a CPU, PyTorch gives bf16 products to oneDNN, whose kernels
are made for many rows: with one row they reach about half of what the memory can deliver, and PyTorch's own
kernel most of it (bench/inference.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def at_the_speed_of_memory(rows: Tensor) -> AbstractContextManager[None]:
    """Inside, products of one row do without oneDNN. With more rows, or on another device, nothing changes.

    Args:
        rows: [B, ...], what goes through the model: only its length and its device matter.
    """
    return onednn(False) if len(rows) == 1 and rows.device.type == "cpu" else nullcontext()


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Inside, oneDNN is used or not; it is never switched on where PyTorch has none."""
    before = bool(torch.backends.mkldnn.enabled)
    torch.backends.mkldnn.enabled = enabled and torch.backends.mkldnn.is_available()  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before  # type: ignore[assignment]
