"""Products of one row with a matrix, at the speed of memory.

Writing a token multiplies one row with every matrix of the decoder: two operations for each weight that is
read, so that reading is all it takes. On x86 processors with bf16 instructions, PyTorch gives bf16 products
to oneDNN, whose kernels are made for many rows: with one row they reach about half of what the memory can
deliver, and PyTorch's own kernel most of it (bench/inference.py).

PyTorch chooses between the two by a switch of the whole process; no argument of a call reaches it. It is off
here only while such a product runs, and comes back when the last one that runs at that time has ended. So
several threads may generate at once: what another thread multiplies in that moment takes the other kernel as
well, which is equal up to rounding. Where there are no bf16 kernels of oneDNN, nothing is ever switched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def onednn_has_bf16() -> bool:
    """Whether this machine's PyTorch gives bf16 products to oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_one_row(x: Tensor) -> bool:
    """Whether a product with x is faster without oneDNN: one row, in bf16, on a CPU, without gradients."""
    return (
        x.numel() == x.shape[-1]
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and onednn_has_bf16()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, which reads the matrix at the speed of memory where x is one row."""
    if not is_one_row(x):
        return F.linear(x, weight, bias)
    with _without_onednn():
        return F.linear(x, weight, bias)


class OneRowLinear(nn.Linear):
    """A linear layer that reads its matrix at the speed of memory where it gets one row."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


class TiedHead(nn.Module):
    """The head of a decoder that scores words by its embedding table, which stays the decoder's own."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = (table,)  # in a tuple, it is no part of this module: neither saved nor counted twice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> scores [..., V]."""
        return linear(x, self.table[0].weight)


class _Switch:
    """How many products without oneDNN run now, and what the switch was before the first of them."""

    lock, running, before = Lock(), 0, True


@contextmanager
def _without_onednn() -> Iterator[None]:
    with _Switch.lock:
        if not _Switch.running:
            _Switch.before = bool(torch.backends.mkldnn.enabled)
            _turn(False)
        _Switch.running += 1
    try:
        yield
    finally:
        with _Switch.lock:
            _Switch.running -= 1
            if not _Switch.running:
                _turn(_Switch.before)


def _turn(on: bool) -> None:
    torch.backends.mkldnn.enabled = on  # type: ignore[assignment]
