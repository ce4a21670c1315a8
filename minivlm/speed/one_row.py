"""Products of a single row with a matrix, at memory speed.

Writing a token multiplies one row by every matrix of the decoder. That is two operations per weight, so
reading the weights takes nearly all of the time. On x86 processors with bf16 instructions, PyTorch hands bf16
products to oneDNN, whose kernels are made for many rows: with one row they reach about half of the memory
bandwidth, and PyTorch's own kernel reaches most of it (bench/inference.py).

PyTorch chooses between the two with a process-wide switch, not with an argument. Here, oneDNN is off only
while such a product runs. There is one at a time: those of other threads wait, since one alone uses all of
the memory's bandwidth. So several threads may generate at once: whatever else another thread multiplies at
that moment uses PyTorch's kernel as well, whose results are equal up to rounding. Without bf16 kernels in
oneDNN, nothing is ever switched.
"""

from __future__ import annotations

from functools import cache
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_one_product = Lock()


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
    with _one_product:
        before = torch._C._get_mkldnn_enabled()
        try:  # Python notices Ctrl-C only after a call into C, so the switch is always restored
            torch._C._set_mkldnn_enabled(False)
            return F.linear(x, weight, bias)
        finally:
            torch._C._set_mkldnn_enabled(before)


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
