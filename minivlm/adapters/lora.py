"""LoRA (https://arxiv.org/abs/2106.09685): a large matrix learns by a small change beside it.

    y = W x + s B A x          W [out, in] stays as it is, A [r, in] and B [out, r] are learned

The change B A has rank r, so it holds r (in + out) numbers instead of in * out. B starts at zero: at first,
the model answers as without. The scale s is alpha / r in the paper. With alpha / sqrt(r), a larger rank does
not learn more slowly (rsLoRA, https://arxiv.org/abs/2312.03732).

A and B are kept in fp32, whatever the dtype of W: their steps in training would be lost in bf16.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = slice | Tensor  # of a matrix: which of its outputs


class LowRank(nn.Module):
    """A change of low rank to one matrix W, of which several layers may each hold some rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """As peft begins: A uniform between +-1 / sqrt(in), B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B)

    def change(self, rows: Rows) -> Tensor:
        """s B A, for some rows of the matrix: [rows, in]."""
        return self.scale * self.lora_B[rows] @ self.lora_A

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """s B A x: x [..., in] -> [..., rows], in fp32."""
        x = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        return self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B[rows])

    def adapt(self, y: Tensor, x: Tensor, base: nn.Module, rows: Rows) -> Tensor:
        """What a layer `base` gives with the change: y = base(x) [..., rows] -> the same shape."""
        return y + self(x, rows)

    def merged(self, weight: Tensor, rows: Rows) -> Tensor:
        """W + s B A: the weight [rows, in] of a layer that gives the same without this module."""
        return weight + self.change(rows)


class AdaptedLinear(nn.Module):
    """A linear layer with the changes of several adapters beside it. One of them is active, or none."""

    base: Any

    def __init__(self, base: nn.Module, rows: Rows) -> None:
        """base: nn.Linear, or what took its place; `rows` of the matrix that the changes are for."""
        super().__init__()
        self.base = base
        self.rows = rows
        self.changes = nn.ModuleDict()  # name of an adapter -> its `LowRank`
        self.active: str | None = None
        self.original: nn.Parameter | None = None  # the weight, while a change is merged into it

    @property
    def weight(self) -> Tensor:
        """The weight of the layer alone: models ask it for its dtype and device."""
        weight: Tensor = self.base.weight
        return weight

    @property
    def in_features(self) -> int:
        """Its width: towers ask for it."""
        return int(self.base.in_features)

    @property
    def out_features(self) -> int:
        """How many outputs it has."""
        return int(self.base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = self.base(x)
        if self.active is None or self.original is not None:
            return y
        change: LowRank = self.changes[self.active]  # type: ignore[assignment]
        return change.adapt(y, x, self.base, self.rows).to(y.dtype)
