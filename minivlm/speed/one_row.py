"""Products of a single row with a matrix, at memory speed.

Writing a token multiplies one row by every matrix of the decoder. That is two operations per weight, so
reading the weights takes nearly all of the time. On x86 processors with bf16 instructions, PyTorch hands bf16
products to oneDNN, whose kernels are made for many rows: with one row they reach about half of the memory
bandwidth, and PyTorch's own kernel reaches most of it (bench/inference.py).

PyTorch chooses between the two with a process-wide switch, not with an argument. Here, oneDNN is off only
while such a product runs, and the switch is restored when the last concurrent one ends. So several threads
may generate at once: what another thread multiplies at that moment uses PyTorch's kernel as well, whose
results are equal up to rounding. Without bf16 kernels in oneDNN, nothing is ever switched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock, get_ident

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def onednn_has_bf16() -> bool:
    """Whether PyTorch hands bf16 products to oneDNN on this machine."""
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
    """`F.linear`, at memory speed if x is a single row."""
    if not is_one_row(x):
        return F.linear(x, weight, bias)
    with _without_onednn():
        return F.linear(x, weight, bias)


class OneRowLinear(nn.Linear):
    """A linear layer that runs at memory speed on a single row."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


class TiedHead(nn.Module):
    """The tied head of a decoder: it scores tokens with the embedding table, which stays the decoder's."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = (table,)  # a tuple hides it from this module: neither saved nor counted twice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> scores [..., V]."""
        return linear(x, self.table[0].weight)


class _Switch:
    """The threads that run a product without oneDNN now, and the switch's setting before the first."""

    lock, threads, before = Lock(), set[int](), True


@contextmanager
def _without_onednn() -> Iterator[None]:
    with _Switch.lock:
        if not _Switch.threads:
            _Switch.before = bool(torch.backends.mkldnn.enabled)
        _Switch.threads.add(get_ident())  # a set: what an interrupt leaves behind, the next product removes
    try:
        _set_onednn(False)
        yield
    finally:
        with _Switch.lock:
            _Switch.threads.discard(get_ident())
            if not _Switch.threads:
                _set_onednn(_Switch.before)


def _set_onednn(enabled: bool) -> None:
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]
