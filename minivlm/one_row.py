"""Products of one row with a matrix, at the speed of memory.

Writing a token multiplies one row with every matrix of the decoder: two operations for each weight that is
read. What it takes is the time of reading. On a CPU, PyTorch gives bf16 products to oneDNN, whose kernels
are made for many rows: with one row they reach about half of what the memory can deliver, and PyTorch's own
kernel most of it (bench/inference.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def at_the_speed_of_memory(token_ids: Tensor) -> Iterator[None]:
    """While one row is decoded, switch oneDNN off; with more rows, or on another device, nothing changes.

    Args:
        token_ids: [B], the tokens that are read inside.
    """
    was_enabled = torch.backends.mkldnn.enabled
    if was_enabled and len(token_ids) == 1 and token_ids.device.type == "cpu":
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled
