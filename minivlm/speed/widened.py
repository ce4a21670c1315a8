"""Products of many rows with a bf16 matrix, on processors that cannot multiply bf16.

Many processors multiply fp32 in hardware and bf16 not. There PyTorch's own bf16 product of 256 rows takes
several times as long as one in fp32 (bench/widened.py), and a model in fp32 takes twice the memory. So the
matrix stays in bf16. A block of its rows at a time is widened to fp32, which is exact, multiplied, and then
forgotten. Widening costs as much as a bf16 product of about eight rows, so fewer are left to PyTorch. Sums
are in fp32 and rounded once.

Autograd would keep every widened block for the backward pass, which is the matrix in fp32 after all. So the
product has a backward of its own, which widens the blocks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.attention import onednn_has_bf16

FEW_ROWS = 8  # up to this many, PyTorch's bf16 product is as fast
WEIGHTS_PER_BLOCK = 2**19  # widened at a time: 2 MiB in fp32, which stay in the processor's cache


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., in], weight [out, in]; with blocks of the weight in fp32 where that is faster."""
    if not _is_faster(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _Product.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    out = out.unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1] == weight.shape[-1]
        and x.numel() > FEW_ROWS * x.shape[-1]
        and not onednn_has_bf16()
        and not torch.compiler.is_compiling()
    )


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of the weight come next, and these rows in fp32. Each block overwrites the one before."""
    step = max(1, WEIGHTS_PER_BLOCK // weight.shape[1])
    room = torch.empty(min(step, len(weight)), weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        yield slice(start, start + len(rows)), room[: len(rows)].copy_(rows)


class _Product(torch.autograd.Function):
    """rows [n, in] times weight [out, in], both in bf16 -> [n, out] in bf16."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        wide, out = rows.float(), rows.new_empty(len(rows), len(weight))
        for place, block in _blocks(weight.detach()):
            out[:, place] = wide @ block.T
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        wide, of_rows, of_weight = gradient.float(), None, None
        if ctx.needs_input_grad[0]:
            total = torch.zeros(rows.shape)
            for place, block in _blocks(weight):
                total.addmm_(wide[:, place], block)
            of_rows = total.to(rows.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (wide.T @ rows.float()).to(weight.dtype)
        return of_rows, of_weight
