"""Products of a single row, or of a few, with a matrix, at memory speed.

Writing a token multiplies one row by every matrix of the decoder. That is two operations per weight, so
reading the weights takes nearly all of the time. On x86 processors with bf16 instructions, PyTorch hands bf16
products to oneDNN, whose kernels are made for many rows: with one row they reach about half of the memory
bandwidth, and PyTorch's own kernels reach most of it (bench/inference.py, bench/one_row.py).

All dense products of PyTorch ask the same switch whether to use oneDNN, and it belongs to the whole process:
a library that turned it would change what other threads compute. But the gradient of a sparse product is the
same product, and never goes to oneDNN. For S @ W with a sparse S, the gradient of the entry of S at (i, j) is
<gradient of row i of the result, row j of W>. If S has one row and stores all of its entries, these are the
products of one vector with every row of W, which is what `F.linear` computes for a single row. It reads W in
the order of the file, without a copy.

Where the processor has AMX, which multiplies tiles, oneDNN is faster than all of this, if it is asked in
another way. A matrix times one vector has a kernel of its own. And before any product, the second factor is
rearranged as the tiles need it: `F.linear` makes that the matrix, and with a few rows it pays to make it the
rows. Without bf16 kernels in oneDNN, PyTorch's own are used anyway, and many rows are widened.py's matter.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from minivlm.attention import has_amx, onednn_has_bf16
from minivlm.speed.widened import product

FEW_ROWS = 32  # up to this many, and with AMX, rearranging the rows costs less than rearranging the matrix


def is_one_row(x: Tensor) -> bool:
    """Whether a product with x has a faster kernel than oneDNN's for many rows, since it has one row."""
    return x.numel() == x.shape[-1] and goes_to_onednn(x)


def goes_to_onednn(x: Tensor) -> bool:
    """Whether PyTorch hands products with x to oneDNN and nobody asks for gradients: bf16, on a CPU."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and onednn_has_bf16()
    )


@cache
def row_of_all_entries(length: int) -> tuple[Tensor, Tensor]:
    """A sparse row that stores every entry, [1, length], and the numbers of its columns, [length]."""
    columns = torch.arange(length)
    entry = torch.zeros(1, dtype=torch.bfloat16)  # never read: only the pattern counts
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        row = torch.sparse_csr_tensor(
            torch.tensor([0, length]), columns, entry.expand(length), (1, length), check_invariants=True
        )
    return row, columns


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, at memory speed if x is a single row or few, and by `product` if it is not."""
    count = x.numel() // max(1, x.shape[-1])
    few = 1 <= count <= (FEW_ROWS if has_amx() else 1) and goes_to_onednn(x)
    if not few or weight.dtype != x.dtype or weight.shape[1] != x.shape[-1]:
        return product(x, weight, bias)
    rows = x.reshape(count, -1)
    if count > 1:
        out = (weight @ rows.T).T.contiguous()
    elif has_amx():
        out = torch.mv(weight, rows[0])
    else:
        out = as_sparse_gradient(rows, weight)
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def as_sparse_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, in], weight [out, in] -> [out], without oneDNN."""
    pattern, columns = row_of_all_entries(weight.shape[0])
    entries, _ = torch.ops.aten._sparse_mm_reduce_impl_backward(
        pattern, x, weight, "sum", columns, [True, False]
    )
    found: Tensor = entries.values()
    return found


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
